"""Strategy mad of `manticore search`: the options of programming on MAD tasks."""

from dataclasses import dataclass, field
from typing import ClassVar


@dataclass
class ProgramOptions:
    """Of strategy mad."""

    _argument_group_name: ClassVar[str] = "strategy mad"

    tasks: list[str] = field(
        default_factory=lambda: ["in-context-recall"],
        metadata={"help": "TASK or TASK=WEIGHT; `manticore mad` has the same tasks."},
    )
    task_length: int | None = field(default=None, metadata={"help": "Tokens per row (default: the task's own)."})
    program_steps: int = field(default=200, metadata={"help": "Optimizer steps."})


def task_weights_of(options: ProgramOptions) -> dict[str, float]:
    """
    Weights of MAD tasks from TASK and TASK=WEIGHT.

    Raises:
        ValueError: no such task, or a weight that is none.
    """
    from ..search.programming_data import task_weights

    tasks = {}
    for word in options.tasks:
        task, _, weight = word.partition("=")
        try:
            tasks[task] = float(weight or 1)
        except ValueError as error:
            raise ValueError(f"tasks: got {word!r}, allowed are TASK and TASK=WEIGHT.") from error
    return task_weights(tasks)
