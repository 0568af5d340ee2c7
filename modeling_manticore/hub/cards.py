"""Model cards: what a hybrid is, how it was made and how good it is, each from a source and nothing else."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..cache_manticore import cache_growth, path_name
from ..mixing_manticore import junctions
from .card_check import REPO_ID, check_card
from .card_results import check_results, eval_results, results_table
from .contents import cleaned_text, is_local
from .licences import LICENCES, UNSAID, licence_of_folder, licence_of_hybrid
from .numbers import number, rounded
from .picture import component_names, draw_hybrid


TEMPLATE = "model_cards/hybrid.md"
TAGS = ["manticore", "hybrid", "custom_code"]
PICTURE = "hybrid.png"


def render_card(
    hybrid: Any,
    *,
    repo_id: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    results: Sequence[Mapping[str, Any]] | None = None,
    report: Any = None,
    versions: Mapping[str, str] | None = None,
    licences: Sequence[str | None] | Mapping[str, str | None] | None = None,
    picture: str | None = None,
) -> str:
    """
    The model card of a hybrid, checked by `check_card`. What has no source is left out or "unknown"; strings that are
    absolute paths become "local".

    Args:
        hybrid: a hybrid or its configuration; a configuration alone has no parameter count and no mixture weights.
        repo_id: where it goes.
        recipe: how it was made, embedded as YAML. Read from it: `components[k].license`; `license`, `license_reason`,
            `license_name`, `license_link`, `language`, `description`, `limits` and `tags` at the top or under
            `publishing`; `dataset` and `datasets` anywhere.
        results: as `card_results.check_results` says.
        report: of a search or a calibration: a text, a dictionary or what has `to_dict()`. `blocks` of a
            `SearchReport` become a table.
        versions: name -> version of what made it; by default those in the configuration.
        licences: id of the licence of every component, or source or name of a component -> id; those that a choice
            dropped may be among them. Else the recipe's, else the README's in a local folder.
        picture: file name, beside the card, of a picture by `draw_hybrid`.

    Raises:
        ValueError: a licence that is not known or does not follow (see `licence_of_hybrid`); bad arguments.
    """
    config = getattr(hybrid, "config", hybrid)
    given, recipe = recipe or {}, _plain(recipe or {}, "recipe")
    results = check_results(results or [])
    said = recipe | (recipe.get("publishing") or {})
    facts = architecture(hybrid)
    used = config.used_components
    licences = _licences(config, given.get("components"), licences)
    licence = licence_of_hybrid([licences[k] for k in used], said.get("license"), said.get("license_reason"), repo_id)
    sources = [_source(config, k) for k in range(len(config.components))]
    names = component_names(config)
    title = repo_id.split("/")[-1] if repo_id else f"Hybrid of {' and '.join(names[k] for k in used)}"
    bases = [sources[k] for k in used if sources[k] is not None]
    datasets = _datasets(recipe)
    data = ModelCardData(
        language=said.get("language"),
        license=licence,
        license_name=said.get("license_name"),
        license_link=said.get("license_link"),
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=list(dict.fromkeys(bases)) or None,
        base_model_relation=("merge" if len(used) > 1 else "finetune") if bases else None,
        tags=[*TAGS, *(said.get("tags") or [])],
        datasets=[name for name in datasets if REPO_ID.fullmatch(name) and "/" in name] or None,
        eval_results=eval_results(results) or None,
        model_name=title,
    )
    report, search_blocks = _report(report)
    kind = "discretized hybrid" if facts["discretized"] else "supernet, a hybrid whose blocks mix several paths,"
    text = ModelCard.from_template(
        data,
        template_str=template_file().read_text(encoding="utf-8"),
        title=title,
        description=said.get("description"),
        summary=f"A {kind} of {_listed([names[k] for k in used])}.",
        components=[_component_row(facts, k, sources[k], licences[k]) for k in used],
        picture=picture,
        blocks=[_block_row(block) for block in facts["blocks"]],
        heads={"paths": ", ".join(facts["heads"]["paths"]), "joint": facts["heads"]["joint"]},
        sizes=_sizes(facts),
        repo_id=repo_id,
        recipe=_fenced(_yaml(recipe), "yaml") if recipe else None,
        search_blocks=search_blocks,
        report=report,
        data=_listed([_cell(name) for name in datasets]),
        versions=", ".join(f"{name} {version}" for name, version in (versions or _versions(config)).items()),
        results=results_table(results),
        licence_line=_licence_line(licence, said),
        obligations=_obligations(names, licences, used),
        limits=[*_context_limit(facts), *map(str, said.get("limits") or [])],
    ).content
    check_card(text)
    return text


def write_card(folder: str | os.PathLike, hybrid: Any, **arguments: Any) -> Path:
    """
    Write `README.md` and the picture it shows into a folder, the card in one move; arguments as in `render_card`.

    Without matplotlib there is no picture.

    Raises:
        ValueError: as `render_card`, before anything is drawn or written.
    """
    folder = Path(folder)
    text = render_card(hybrid, picture=PICTURE, **arguments)
    try:
        draw_hybrid(hybrid, folder / PICTURE)
    except ImportError:
        text = render_card(hybrid, **arguments)
    staged = folder / ".README.md"
    staged.write_text(text, encoding="utf-8")
    os.replace(staged, folder / "README.md")
    return folder / "README.md"


def template_file() -> Path:
    """The template: inside the installed package, or beside it in a clone."""
    package = Path(__file__).parents[1]
    inside = package / TEMPLATE
    return inside if inside.is_file() else package.parent / TEMPLATE


def architecture(hybrid: Any) -> dict[str, Any]:
    """
    What a card says of the architecture, as plain values: components, blocks with their paths, weights and joints,
    sizes. `parameters`, `dtype`, `cache_bytes_per_token` and weights only of a model, not of a configuration.
    """
    config = getattr(hybrid, "config", hybrid)
    names, joints = component_names(config), [joint.name for joint in junctions(config)]
    weights = [[None] * len(block) for block in config.blocks]
    if hasattr(hybrid, "mixture_weights"):
        weights = [point.tolist() for point in hybrid.mixture_weights()]
    facts = {
        "discretized": config.is_discretized,
        "components": [
            {
                "index": k,
                "name": names[k],
                "family": component.model_type,
                "layers": config.depth(k),
                "width": component.hidden_size,
                "used": _layers_used(config, k),
                "revision": getattr(component, "revision", None),
            }
            for k, component in enumerate(config.components)
        ],
        "blocks": [
            {
                "block": b,
                "paths": [path_name(path, names) for path in block],
                "weights": weights[b] if len(block) > 1 else [None],
                "joint": joints[b],
            }
            for b, block in enumerate(config.blocks)
        ],
        "heads": {"paths": [names[k] for k in config.head_components], "joint": joints[-1]},
        "stream": config.hidden_size,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
    }
    if isinstance(hybrid, PreTrainedModel):
        facts["parameters"] = sum(p.numel() for p in hybrid.parameters())
        facts["dtype"] = str(hybrid.dtype).removeprefix("torch.")
        facts["cache_bytes_per_token"] = cache_growth(config, hybrid.dtype.itemsize)
    return facts


def _layers_used(config: Any, k: int) -> str:
    layers = sorted(
        {i for block in config.blocks for p in block if p["component"] == k for i in range(p["start"], p["stop"])}
    )
    runs: list[list[int]] = []
    for i in layers:
        if runs and runs[-1][1] == i:
            runs[-1][1] = i + 1
        else:
            runs.append([i, i + 1])
    return ", ".join(f"{start}:{stop}" for start, stop in runs)


# ---------------------------------------------------------------------- sources and licences
def _source(config: Any, k: int) -> str | None:
    """The repository of a component; None where it came from a folder or from memory."""
    source = getattr(config.components[k], "source", None)
    if not isinstance(source, str) or not REPO_ID.fullmatch(source) or os.path.isdir(source):
        return None
    return source


def _licences(config: Any, entries: Any, given: Any) -> list[str | None]:
    """
    The licence of every component of the configuration, of which a choice may have dropped some.

    Args:
        entries: `components` of the recipe.
    """
    entries = [e if isinstance(e, dict) else {} for e in entries] if isinstance(entries, list) else []
    if given is not None:
        return _given_licences(config, entries, given)
    sources = [getattr(component, "source", None) for component in config.components]
    if len(entries) == len(sources):
        own = entries
    else:
        own = [next((e for e in entries if _is_of(e, source)), {}) for source in sources]
    return [
        entry.get("license") or (licence_of_folder(source) if _is_folder(source) else None)
        for entry, source in zip(own, sources)
    ]


def _given_licences(config: Any, entries: list[dict], given: Any) -> list[str | None]:
    names, count = component_names(config), len(config.components)
    sources = [getattr(component, "source", None) or name for component, name in zip(config.components, names)]
    if isinstance(given, Mapping):
        return [given.get(source, given.get(name)) for source, name in zip(sources, names)]
    listed = isinstance(given, (list, tuple))
    if listed and len(given) == count:
        return list(given)
    if listed and len(given) > count and len(set(given)) == 1:
        return list(given[:count])
    if listed and len(given) > count and len(given) == len(entries):
        found = [[own for entry, own in zip(entries, given) if _is_of(entry, source)] for source in sources]
        if all(found):
            return [own[0] for own in found]
    raise ValueError(
        f"licences: got {given!r}, allowed is a list with one id or None for each of {count} components, or, where a "
        f"choice dropped some, a mapping of names to ids with {', '.join(map(repr, sources))}."
    )


def _is_of(entry: dict, source: Any) -> bool:
    """Whether an entry of a recipe's `components` is what a component came from."""
    return isinstance(source, str) and source in (entry.get("repo"), entry.get("folder"))


def _is_folder(source: Any) -> bool:
    return isinstance(source, str) and os.path.isdir(source)


def _licence_line(licence: str, said: dict) -> str:
    name = LICENCES[licence].name if licence in LICENCES else said.get("license_name") or licence
    line = f"`{licence}` ({name})." if name != licence else f"`{licence}`."
    return f"{line} Reason: {said['license_reason']}" if said.get("license_reason") else line


def _obligations(names: list[str], licences: list[str | None], used: list[int]) -> list[str]:
    lines = []
    for k in used:
        licence = licences[k]
        if licence in (None, *UNSAID):
            lines.append(f"{names[k]}: licence unknown; ask who made it")
        elif licence in LICENCES:
            words = "; ".join(LICENCES[licence].obligations) or "asks for nothing"
            lines.append(f"{names[k]} ({licence}): {words}")
        else:
            lines.append(f"{names[k]} ({licence}): read it; what it asks is not in our table")
    return lines


def _datasets(recipe: Any) -> list[str]:
    """Names under the keys `dataset` and `datasets`, at any depth, each once."""
    found: list[str] = []

    def collect(value: Any, named: bool) -> None:
        if isinstance(value, str) and named:
            found.append(value)
        elif isinstance(value, dict):
            for key, inner in value.items():
                collect(inner, key in ("dataset", "datasets") or (named and key in ("repo", "name", "path")))
        elif isinstance(value, list):
            for inner in value:
                collect(inner, named)

    collect(recipe, False)
    return list(dict.fromkeys(found))


def _versions(config: Any) -> dict[str, str]:
    """Versions that the configuration states."""
    stated = {"modeling_manticore": "manticore_version", "transformers": "transformers_version"}
    return {name: value for name, field in stated.items() if (value := getattr(config, field, None))}


# ---------------------------------------------------------------------- text
def _component_row(facts: dict, k: int, source: str | None, licence: str | None) -> dict[str, Any]:
    component = facts["components"][k]
    link = f"[{source}](https://huggingface.co/{source})" if source else f"{_cell(component['name'])} (local)"
    commit = f"`{component['revision']}`" if component["revision"] else "unknown"
    return component | {"link": link, "commit": commit, "licence": licence or "unknown"}


def _block_row(block: dict) -> dict[str, Any]:
    words = [
        f"`{name}`" if weight is None else f"`{name}` {number(weight)}"
        for name, weight in zip(block["paths"], block["weights"])
    ]
    return {"block": block["block"], "paths": _cell(", ".join(words)), "joint": block.get("joint")}


def _sizes(facts: dict) -> list[str]:
    lines = [f"stream {facts['stream']}, vocabulary {facts['vocabulary']:,}"]
    if "parameters" in facts:
        lines.append(f"{facts['parameters']:,} parameters, {facts['dtype']}")
        lines.append(f"key-value cache: {facts['cache_bytes_per_token']:,} bytes per token")
    return lines


def _context_limit(facts: dict) -> list[str]:
    context = facts["context"]
    return [f"At most {context:,} tokens; longer inputs raise an error."] if context else []


def _report(report: Any) -> tuple[str | None, list[dict] | None]:
    """A report as fenced text, and its blocks as rows of a table."""
    if report is None or isinstance(report, str):
        return (_fenced(cleaned_text(report)) if report else None), None
    content = report.to_dict() if hasattr(report, "to_dict") else report
    if not isinstance(content, Mapping):
        raise ValueError(f"report: got {type(report).__name__}, allowed are a text, a dictionary and a report.")
    content, rows = _plain(content, "report"), None
    blocks = content.get("blocks")
    if isinstance(blocks, list) and all(isinstance(b, dict) and {"paths", "weights"} <= set(b) for b in blocks):
        del content["blocks"]
        rows = [_block_row({"block": b} | block) for b, block in enumerate(blocks)]
    return (_fenced(_yaml(rounded(content)), "yaml") if content else None), rows


def _plain(value: Mapping, field: str) -> dict:
    """A copy of plain values without local paths."""

    def clean(inner: Any, where: str) -> Any:
        if isinstance(inner, Mapping):
            return {str(key): clean(entry, f"{where}.{key}") for key, entry in inner.items()}
        if isinstance(inner, (list, tuple)):
            return [clean(entry, f"{where}[{i}]") for i, entry in enumerate(inner)]
        if inner is None or isinstance(inner, (bool, int, float)):
            return inner
        if isinstance(inner, (str, os.PathLike)):
            text = os.fspath(inner)
            return "local" if is_local(text) else cleaned_text(text)
        raise ValueError(f"{where}: got {type(inner).__name__}, allowed are plain values.")

    if not isinstance(value, Mapping):
        raise ValueError(f"{field}: got {type(value).__name__}, allowed is a dictionary.")
    return clean(value, field)


def _yaml(value: dict) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110).rstrip()


def _fenced(text: str, language: str = "") -> str:
    """A code block that its own text cannot end."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return " ".join(cleaned_text(text).replace("|", r"\|").split())


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""
