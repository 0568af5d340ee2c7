"""`manticore verify REPO`: is the code that travels with a hybrid that of the installed release, byte for byte?"""

from dataclasses import dataclass, field

from .parsing import parse_options, positional_first, require, require_positive


@dataclass
class VerifyOptions:
    source: str = field(metadata={"help": "Repository, or the folder of a saved hybrid."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit; default main."})
    patience: int = field(default=60, metadata={"help": "Seconds without a sign of life before giving up."})


def run(arguments: list[str]) -> None:
    """
    Raises:
        ValueError: the code is another, or cannot be read.
    """
    (options,) = parse_options(VerifyOptions, positional_first(arguments, "source"), "verify", __doc__)
    require_positive(options, "patience")

    from ..hub.identity import verify

    found = verify(options.source, revision=options.revision, patience=float(options.patience))
    require(not found.problems, str(found))
    print(found)
