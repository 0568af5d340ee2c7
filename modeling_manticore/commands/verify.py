"""`manticore verify REPO`: is the code that travels with a hybrid that of the installed release, byte for byte?"""

import json
from dataclasses import asdict, dataclass, field

from .parsing import Failure, parse_options, positional_first, require_positive


@dataclass
class VerifyOptions:
    source: str = field(metadata={"help": "Repository, or folder of a saved hybrid."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit (default: main)."})
    patience: int = field(default=60, metadata={"help": "Seconds without a sign of life after which it gives up."})
    json: bool = field(default=False, metadata={"help": "Print JSON instead of text."})


KINDS = (VerifyOptions,)


def run(arguments: list[str]) -> None:
    """
    Raises:
        ValueError: the code is another, or cannot be read.
    """
    (options,) = parse_options(KINDS, positional_first(arguments, "source"), "verify")
    require_positive(options, "patience")

    from ..hub.identity import verify

    found = verify(options.source, revision=options.revision, patience=float(options.patience))
    if options.json:
        print(json.dumps(asdict(found) | {"verified": not found.problems}, indent=2))
    elif not found.problems:
        print(found)
    if found.problems:
        raise Failure(str(found))
