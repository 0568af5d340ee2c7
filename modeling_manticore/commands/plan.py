"""`manticore plan`: what a recipe would make and what it would take. No weights are downloaded."""

import json
from dataclasses import dataclass, field, replace

from .parsing import parse_options, require, require_positive


@dataclass
class PlanOptions:
    recipe: str = field(metadata={"help": "A .yaml file, or the name of a shipped recipe."})
    json: bool = field(default=False, metadata={"help": "Print JSON instead of text."})
    gpus: list[int] = field(
        default_factory=list, metadata={"help": "Numbers of GPUs: what training takes on each under FSDP."}
    )
    batch_size: int = field(default=1, metadata={"help": "With --gpus, sequences of a step on each GPU."})
    row_length: int | None = field(
        default=None, metadata={"help": "With --gpus, tokens of a sequence (default: those of the recipe's training)."}
    )


KINDS = (PlanOptions,)


def run(arguments: list[str]) -> None:
    """
    Raises:
        ValueError: the file is no recipe, or the recipe cannot be built; names all problems.
    """
    (options,) = parse_options(KINDS, recipe_first(arguments), "plan")

    require_positive(options, "batch_size", "row_length")
    require(all(n >= 1 for n in options.gpus), f"gpus: got {options.gpus}, allowed are positive integers.")
    from transformers.utils import logging

    from ..hub.plan import ClusterQuestion, plan

    logging.set_verbosity_error()
    question = ClusterQuestion(options.gpus, options.batch_size, options.row_length) if options.gpus else None
    made = plan(options.recipe, question)
    if options.json:
        print(json.dumps(made.to_dict(), indent=2))
    elif not made.problems:
        print(made)
    else:  # the error has the problems, in one line
        print(replace(made, problems=[]))
    made.check()


def recipe_first(arguments: list[str]) -> list[str]:
    """The recipe may be the first word of the command line."""
    if arguments and not arguments[0].startswith("-"):
        return ["--recipe", *arguments]
    return arguments
