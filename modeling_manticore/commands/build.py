"""`manticore build`: a recipe -> a hybrid, stage by stage. A stage whose output is there and valid is skipped."""

from dataclasses import dataclass, field

from .parsing import TEXT_CACHE, parse_options
from .plan import recipe_first


@dataclass
class BuildOptions:
    recipe: str = field(metadata={"help": "A .yaml file, or the name of a shipped recipe."})
    dry_run: bool = field(default=False, metadata={"help": "Plan, and say which stages would run; write nothing."})
    from_stage: str | None = field(
        default=None,
        metadata={
            "help": "Run from this stage on again: compose, calibrate, search, discretize, finetune, evaluate, card, "
            "push."
        },
    )
    cache_folder: str | None = field(default=None, metadata={"help": TEXT_CACHE})
    allow_local_sources: bool = field(
        default=False, metadata={"help": "Push with 'local' in place of local paths, which are otherwise refused."}
    )


KINDS = (BuildOptions,)


def run(arguments: list[str]) -> None:
    """
    Raises:
        ValueError: the file is no recipe, or the recipe cannot be built; names all problems.
    """
    (options,) = parse_options(KINDS, recipe_first(arguments), "build")

    from ..hub.build import build
    from ..hub.recipes import load_recipe

    build(
        load_recipe(options.recipe),
        dry_run=options.dry_run,
        from_stage=options.from_stage,
        cache_folder=options.cache_folder,
        allow_local_sources=options.allow_local_sources,
    )
