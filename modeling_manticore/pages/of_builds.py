"""The page of a build: its stages, the search it made, the hybrid that came out, what was measured, the recipe."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..configuration_manticore import ManticoreConfig
from ..hub.cards import architecture
from .charts import line_chart
from .of_reports import components_table, search_page, stitch_page
from .page import Page, Picture, Table


SEARCHES = {"search.json": search_page, "stitch.json": stitch_page}


def build_page(
    folder: Path, hybrid: Path, stages: Sequence[tuple[str, str, float | None]], recipe: Mapping[str, Any]
) -> Page:
    """
    The page of a build that has ended.

    Args:
        folder: of the build, with a folder for every stage.
        hybrid: the folder of the finished hybrid.
        stages: name, what became of it, and seconds where it ran.
        recipe: plain values.
    """
    config = ManticoreConfig.from_pretrained(hybrid)
    facts = architecture(config)
    blocks = [[block["block"], block["joint"], ", ".join(block["paths"])] for block in facts["blocks"]]
    blocks.append(["heads", facts["heads"]["joint"], ", ".join(facts["heads"]["paths"])])
    kind = "discretized hybrid" if config.is_discretized else "supernet"
    page = Page(
        title=f"Build of {recipe.get('name') or folder.name}",
        lead=f"A {kind} of {' and '.join(facts['components'][k]['name'] for k in config.used_components)}.",
        facts={
            "blocks": str(len(config.blocks)),
            "stream": str(config.hidden_size),
            "vocabulary": f"{config.vocab_size:,}",
            "context": f"{facts['context']:,} tokens" if facts["context"] else "unlimited",
        },
        pictures=[Picture(config, title="The hybrid")],
        components=components_table(config),
        blocks=Table(["block", "joint before it", "paths"], blocks),
        tables={"Stages": Table(["stage", "what became of it", "seconds"], stages, {"seconds": ",.1f"})},
        recipe=dict(recipe),
    )
    _add_search(page, folder)
    _add_training(page, folder)
    _add_results(page, folder)
    return page


def _add_search(page: Page, folder: Path) -> None:
    """The supernet with its slider, charts, candidates and budgets."""
    for name, make in SEARCHES.items():
        file = folder / "search" / "report" / name
        if not file.is_file():
            continue
        found = make(_read(file), ManticoreConfig.from_pretrained(folder / "compose" / "model"))
        page.pictures = [*page.pictures, *found.pictures]
        page.charts = {f"Search: {title.lower()}": chart for title, chart in found.charts.items()}
        page.fronts, page.candidates, page.candidates_note = found.fronts, found.candidates, found.candidates_note
        page.tables = found.tables | page.tables
        told = {key: value for key, value in found.facts.items() if not key.startswith("seconds")}  # of a stage below
        page.facts = page.facts | {f"search: {key}": value for key, value in told.items()}
        page.sources = [f"search/report/{name}"]


def _add_training(page: Page, folder: Path) -> None:
    file = folder / "finetune" / "log.json"
    if file.is_file():
        losses = [(entry["step"], entry["loss"]) for entry in _read(file) if "loss" in entry]
        page.charts = page.charts | {"Fine-tuning: loss": line_chart({"loss": losses}, "step", "loss (nats)")}
        page.sources = [*page.sources, "finetune/log.json"]


def _add_results(page: Page, folder: Path) -> None:
    file = folder / "evaluate" / "results.json"
    if file.is_file():
        columns = ["text", "model", "loss", "perplexity", "accuracy", "bits_per_byte", "tokens"]
        measured = _read(file)
        models = [("the hybrid", measured["texts"])]
        models += [(f"{found['name']} alone", found["texts"]) for found in measured.get("components", [])]
        rows = [
            [text, name, *(texts[text].get(column) for column in columns[2:])]
            for text in measured["texts"]
            for name, texts in models
        ]
        losses = {f"loss on {text}": f"{found['loss']:.4f} nats" for text, found in measured["texts"].items()}
        page.facts = losses | dict(page.facts)
        titles = [column.replace("_", " ") for column in columns]
        page.tables = {"Evaluation": Table(titles, rows, {"perplexity": ",.2f"})} | page.tables
        page.sources = [*page.sources, "evaluate/results.json"]


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
