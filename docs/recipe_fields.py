"""
The fields of recipes as tables: names, types, defaults and bounds are read from the schema, meanings stand here.
`make docs` puts them into reference/recipes.md; a field without a meaning is an error.
"""

import typing
from dataclasses import MISSING, Field, fields, is_dataclass
from types import UnionType
from typing import Any

from modeling_manticore.hub.checked import Limits
from modeling_manticore.hub.recipe_schema import Recipe


NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", dict: "mapping"}
TEXTS = "built-in texts (`bible`, `python`, `topics`), `.txt` or `.jsonl` files, folders of such"
ROWS = "rows of tokens that are read"
LENGTH = "tokens of a row"
BATCH = "rows that are run at once"
MEANINGS: dict[str, dict[str, str]] = {
    "Recipe": {
        "name": "of the recipe and of its folder; the file's name by default",
        "components": "the pretrained models; their order is that of indices below",
        "description": "what the hybrid is for; goes into the card",
        "output_folder": "where the stages are written; `runs/NAME` by default",
        "num_blocks": "cut every component into so many blocks, as evenly as possible; this or `blocks`",
        "blocks": "the paths of every block: `{component, start, stop}` with layers start up to stop, or "
        "`{component: null}` to skip the block",
        "skip_paths": "add a path to every inner block that skips it, so that a search may drop depth",
        "tokenizer_from": "the component whose tokenizer the hybrid speaks; the others' rows are transplanted",
        "tokenizer": "where the tokenizer is, for components that start from scratch",
        "gate": "what a path hears: itself unprojected and the others projected (`routed`), the paper's `mixture`, "
        "one scalar a projector (`learned`), or everything projected (`none`)",
        "mixture": "how mixture weights are kept; `gaea` needs `simplex`, `dash` needs `gumbel_softmax`",
        "head_mixture": "whose weights mix the heads: those of the `last` block, or the `first` (the paper's code)",
        "project_ends": "whether stems and heads have projectors too, and no plain padding",
        "projector_init": "projectors before they are calibrated or trained",
        "hidden_size": "width of the shared stream; that of the widest component by default",
        "dtype": "of the hybrid's weights; `auto` keeps the components'",
        "seed": "of whatever is drawn when the hybrid is composed",
        "calibration": "fit the projectors in closed form",
        "search": "find the path of every block; left out, the supernet is kept",
        "finetune": "train what came out",
        "evaluation": "measure it",
        "publishing": "write its card, and push it",
    },
    "ComponentRecipe": {
        "repo": "a repository of the Hub; this, `folder` or `config`",
        "folder": "a folder with a saved model",
        "config": "a configuration with `model_type`, for a component that starts from scratch",
        "revision": "branch, tag or commit of the repository; what it is now is recorded",
        "license": "its licence, where neither the Hub nor its card says it",
        "license_reason": "how you know",
        "trust_remote_code": "run code that comes with the component; only if you have read it",
    },
    "TokenizerRecipe": {
        "repo": "a repository of the Hub; this, `folder` or `train_texts`",
        "folder": "a folder with a saved tokenizer",
        "revision": "branch, tag or commit of the repository",
        "train_texts": f"train one on these: {TEXTS}",
        "vocab_size": "tokens of a trained one",
    },
    "CalibrationRecipe": {
        "texts": f"what projectors are fitted on: {TEXTS}",
        "rows": ROWS,
        "row_length": LENGTH,
        "batch_size": BATCH,
        "order": "`sequential`: each on what those before it make; `parallel`: all at once, cheaper and worse",
    },
    "SearchRecipe": {
        "strategy": "`stitch` scores discrete hybrids without training; `joint`, `darts`, `gaea` and `dash` train "
        "mixture weights; `none` takes `choice`",
        "choice": "the path of every block, with strategy `none`",
        "texts": f"what bridges are fitted, or weights trained, on: {TEXTS}",
        "score_texts": "what hybrids are scored on; by default a quarter of the rows of `texts` is held out",
        "search_texts": "what mixture weights are trained on, with `darts` or `gaea` on darts",
        "rows": ROWS,
        "row_length": LENGTH,
        "batch_size": BATCH,
        "limits": "hard limits of the hybrid that is chosen",
        "limit": "`stitch`: score every hybrid while there are at most so many, else go by beams",
        "beam": "`stitch`: hybrids that are kept from block to block",
        "order": "how bridges are fitted, as of `calibration`; by default parallel for `stitch`, else sequential",
        "halving_tokens": "`stitch`: fine-tune the best ones on 5 and 15 % of so many tokens, and rank them again",
        "halving_learning_rate": "of that fine-tuning",
        "steps": "of a gradient strategy",
        "learning_rate": "of the weights",
        "mixture_learning_rate": "of the mixture weights; the strategy's own by default",
        "train_components": "whether components train during the search, or only projectors and mixture weights",
        "gaea_base": "what `gaea` steps like: one set of rows (`joint`) or two (`darts`)",
        "temperature_start": "of the Gumbel noise at the first step, with `dash`",
        "temperature_end": "and at the last",
        "cost_weight": "nats for the expected cost, as a share of the dearest choice's",
        "cost_kind": "which cost that is",
        "seed": "of the search",
    },
    "LimitsRecipe": {
        "max_attention_blocks": "blocks that keep a key-value cache",
        "max_parameters": "of the hybrid",
        "max_cache_bytes_per_token": "by which the cache grows with every token",
        "max_flops_per_token": "multiplications and additions a token",
        "min_components": "paths of at least so many components; 2 forbids one component alone",
    },
    "FinetuneRecipe": {
        "texts": f"what is trained on: {TEXTS}",
        "steps": "of the optimizer",
        "rows": ROWS,
        "row_length": LENGTH,
        "batch_size": BATCH,
        "gradient_accumulation_steps": "batches a step",
        "learning_rate": "at its highest",
        "weight_decay": "of everything that trains but mixture weights and learned gates",
        "warmup_steps": "over which the learning rate rises",
        "lr_scheduler_type": "how it falls",
        "bf16": "compute in bfloat16",
        "gradient_checkpointing": "less memory for more computing",
        "seed": "of the order of rows, and of dropout",
        "teacher": "what to learn from besides labels: names, folders, numbers of components; several: their mean",
        "distill_weight": "the teacher's share of the loss",
        "distill_temperature": "at which both distributions are compared",
        "hidden_weight": "of the difference of states where components change",
    },
    "EvaluationRecipe": {
        "texts": f"what is measured on, and nothing was fitted to: {TEXTS}",
        "rows": ROWS,
        "row_length": LENGTH,
        "batch_size": BATCH,
        "components": "measure every component by itself, too; those of the Hub are then downloaded whole",
    },
    "PublishingRecipe": {
        "repo_id": "where the hybrid is pushed; left out, only the card is written",
        "private": "whether a new repository is private",
        "title": "of the card",
        "description": "what the hybrid is for",
        "limits": "what it should not be used for",
        "license": "of the hybrid, where the components' leave a choice",
        "license_reason": "why it may have that one",
        "allow_local_sources": "push with `local` in place of local paths, which are otherwise refused",
        "language": "languages, as two letters",
        "tags": "further tags of the card",
        "datasets": "data sets of the Hub that it was trained on",
    },
}


def sections(kind: type = Recipe, place: str = "") -> dict[str, type]:
    """Where in a recipe, such as `search.limits`, stands which dataclass; the recipe itself is ""."""
    found = {place: kind}
    for name, hint in typing.get_type_hints(kind).items():
        for inner in [hint, *typing.get_args(hint)]:
            if is_dataclass(inner):
                many = "[]" if typing.get_origin(hint) is list else ""
                found |= sections(inner, f"{place}.{name}{many}".lstrip("."))
    return found


def undocumented() -> list[str]:
    """Fields without a meaning, and meanings without a field."""
    kinds = {kind.__name__: {entry.name for entry in fields(kind)} for kind in sections().values()}
    wrong = [f"{name}.{field}" for name, known in kinds.items() for field in known ^ set(MEANINGS.get(name, {}))]
    return sorted(wrong + [name for name in MEANINGS if name not in kinds])


def field_tables() -> str:
    """
    A section in Markdown for every part of a recipe.

    Raises:
        ValueError: a field has no meaning, or a meaning no field.
    """
    if wrong := undocumented():
        raise ValueError(f"MEANINGS: got none, or one too many, for {', '.join(wrong)}.")
    parts = []
    for place, kind in sections().items():
        title = f"## {place.removesuffix('[]')}" if place else "## The recipe"
        lines = [
            title,
            "",
            (kind.__doc__ or "").strip(),
            "",
            "| field | value | default | meaning |",
            "|---|---|---|---|",
        ]
        hints = typing.get_type_hints(kind)
        for entry in fields(kind):
            told = [f"`{entry.name}`", value_of(hints[entry.name], entry), default_of(entry)]
            lines.append(f"| {' | '.join([*told, MEANINGS[kind.__name__][entry.name]])} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def value_of(hint: Any, entry: Field) -> str:
    """The type of a field with its choices or bounds."""
    limits = entry.metadata.get("limits", Limits())
    if limits.choices is not None:
        return ", ".join(f"`{choice}`" for choice in limits.choices if choice is not None)
    kind = next(k for k in _kinds(hint) if k is not type(None))
    if is_dataclass(kind):
        return f"a mapping: [{entry.name}](#{anchor(kind)})"
    if typing.get_origin(kind) is list:
        (inner,) = typing.get_args(kind)
        if is_dataclass(inner):
            return f"a list of mappings: [{entry.name}](#{anchor(inner)})"
        return "a list of lists of mappings" if typing.get_origin(inner) is list else f"a list: {NAMES[inner]}"
    return f"{NAMES[kind]}{_bounds(limits)}"


def anchor(kind: type) -> str:
    """Where on the page a section stands."""
    place = next(place for place, found in sections().items() if found is kind)
    return place.removesuffix("[]").replace(".", "").lower()


def default_of(entry: Field) -> str:
    """The default of a field in YAML's words."""
    if entry.default is MISSING and entry.default_factory is MISSING:
        return "required"
    value = entry.default_factory() if entry.default is MISSING else entry.default
    words = {None: "-", True: "`true`", False: "`false`"}
    return words[value] if value is None or isinstance(value, bool) else f"`{value}`"


def _kinds(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (UnionType, typing.Union) else (hint,)


def _bounds(limits: Limits) -> str:
    low = f"above {limits.above}" if limits.above is not None else "" if limits.least is None else str(limits.least)
    if limits.most is None or limits.most >= 2**16:
        return f", at least {low}" if low and limits.above is None else f", {low}" if low else ""
    return f", {low} to {limits.most}" if low else f", at most {limits.most}"
