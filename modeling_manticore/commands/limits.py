"""Options for hard limits on the cost of a discrete hybrid, shared by sub-commands."""

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar


if TYPE_CHECKING:
    from .. import Budget


@dataclass
class LimitOptions:
    _argument_group_name: ClassVar[str] = "hard limits of the hybrid"

    max_attention_blocks: int | None = field(default=None, metadata={"help": "At most so many blocks with attention."})
    max_parameters: int | None = field(default=None, metadata={"help": "At most so many parameters."})
    max_cache_bytes_per_token: int | None = field(
        default=None, metadata={"help": "At most so many bytes that keys and values grow by per token."}
    )
    max_flops_per_token: float | None = field(
        default=None, metadata={"help": "At most so many floating-point operations per token."}
    )
    min_components: int | None = field(
        default=None, metadata={"help": "Paths of at least so many components; 2 forbids a cut of one alone."}
    )

    def budget(self) -> "Budget | None":
        """
        The limits that are set; None where none is.

        Raises:
            ValueError: a limit is negative or not finite.
        """
        from .. import Budget

        limits = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return Budget(**limits) if any(limit is not None for limit in limits.values()) else None
