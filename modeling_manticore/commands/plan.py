"""`manticore plan`: what a recipe would make and what it would take. No weights are downloaded."""

import json
from dataclasses import dataclass, field

from .parsing import parse_options


@dataclass
class PlanOptions:
    recipe: str = field(metadata={"help": "A .yaml file, or the name of a shipped recipe."})
    json: bool = field(default=False, metadata={"help": "Print JSON instead of text."})


KINDS = (PlanOptions,)


def run(arguments: list[str]) -> None:
    """
    Raises:
        ValueError: the file is no recipe, or the recipe cannot be built; names all problems.
    """
    (options,) = parse_options(KINDS, recipe_first(arguments), "plan")

    from transformers.utils import logging

    from ..hub.plan import plan

    logging.set_verbosity_error()
    made = plan(options.recipe)
    print(json.dumps(made.to_dict(), indent=2) if options.json else made)
    made.check()


def recipe_first(arguments: list[str]) -> list[str]:
    """The recipe may be the first word of the command line."""
    if arguments and not arguments[0].startswith("-"):
        return ["--recipe", *arguments]
    return arguments
