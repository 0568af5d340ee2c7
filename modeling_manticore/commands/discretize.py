"""`manticore discretize`: a supernet in a folder -> a hybrid with one path per block in another."""

import json
from dataclasses import dataclass, field

from .limits import LimitOptions
from .parsing import TEXT_CACHE, parse_options, require_positive


@dataclass
class DiscretizeOptions:
    model: str = field(metadata={"help": "Folder or repository of the supernet."})
    output_folder: str = field(metadata={"help": "Where the hybrid and its tokenizer are written."})
    choice: str = field(default="argmax", metadata={"help": "argmax, or the path kept in every block: 0,1,1,0."})
    calibration_texts: list[str] | None = field(
        default=None,
        metadata={
            "help": "bible, python, topics, or .txt/.jsonl files and folders to fit the bridges on; without them the "
            "bridges are composed of the supernet's projectors."
        },
    )
    calibration_rows: int = field(default=256, metadata={"help": "Rows of calibration text."})
    row_length: int = field(default=128, metadata={"help": "Tokens per row."})
    batch_size: int = field(default=8, metadata={"help": "Rows per batch."})
    order: str = field(default="sequential", metadata={"help": "Order of calibration: sequential or parallel."})
    json: bool = field(default=False, metadata={"help": "Print JSON instead of text."})
    cache_folder: str | None = field(default=None, metadata={"help": TEXT_CACHE})


def parse_choice(choice: str) -> str | list[int]:
    """
    "argmax" or a list of path indices.

    Raises:
        ValueError: neither.
    """
    if choice == "argmax":
        return choice
    try:
        return [int(index) for index in choice.split(",")]
    except ValueError as error:
        raise ValueError(f"choice: got {choice!r}, allowed are 'argmax' and indices such as 0,1,1,0.") from error


KINDS = (DiscretizeOptions, LimitOptions)


def run(arguments: list[str]) -> None:
    """
    Raises:
        ValueError: bad options, model or choice.
    """
    options, limits = parse_options(KINDS, arguments, "discretize")
    require_positive(options, "calibration_rows", "row_length", "batch_size")
    choice, budget = parse_choice(options.choice), limits.budget()

    from .. import discretize
    from ..hub.cards import architecture
    from .models import check_output, load_hybrid, load_tokenizer, rows_of

    folder = check_output(options.output_folder)
    model = load_hybrid(options.model)
    tokenizer = load_tokenizer(options.model, field="model")
    rows = None
    if options.calibration_texts:
        rows = rows_of(
            options.calibration_texts, tokenizer, options.row_length, options.calibration_rows, options.cache_folder
        )
    hybrid = discretize(
        model,
        choice,
        calibration=rows,
        refit=rows is not None,
        order=options.order,
        batch_size=options.batch_size,
        budget=budget,
    )
    if not options.json:
        print(hybrid.describe())
    hybrid.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if options.json:
        print(json.dumps({"folder": str(folder)} | architecture(hybrid), indent=2))
    else:
        print(f"The hybrid is in {folder}")
