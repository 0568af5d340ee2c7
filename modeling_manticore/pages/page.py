"""One page: what it holds, and how it becomes a file. Every string from data is escaped by the template."""

import base64
import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml
from markupsafe import Markup

from ..hub.picture import draw_hybrid, path_look


PAGE_NAME = "report.html"
FOLDER = Path(__file__).parent
PACKAGES = ("modeling-manticore", "torch", "transformers", "datasets", "accelerate", "peft")
MOST_FRAMES, MOST_ROWS = 150, 1000


@dataclass
class Table:
    """Names of columns, and rows of texts and numbers; a number is shown by the format of its column."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    formats: Mapping[str, str] = field(default_factory=dict)

    def cells(self) -> list[list[dict[str, Any]]]:
        """For every row, `text`, the number to sort by (None of a text), and whether its column is of numbers."""
        return [[self._cell(name, value) for name, value in zip(self.columns, row)] for row in self.rows]

    def _cell(self, name: str, value: Any) -> dict[str, Any]:
        if value is None:
            return {"text": "-", "number": None, "right": self.is_right(name)}
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return {"text": str(value), "number": None, "right": False}
        form = self.formats.get(name, ",d" if isinstance(value, int) else ",.0f" if abs(value) >= 1000 else ".4f")
        return {"text": format(value, form), "number": repr(value), "right": True}

    def is_right(self, name: str) -> bool:
        """Whether a column has numbers, which stand at its right edge."""
        place = list(self.columns).index(name)
        return any(isinstance(row[place], (int, float)) for row in self.rows)


@dataclass
class Picture:
    """
    An architecture as `draw_hybrid` draws it.

    Args:
        config: of the hybrid.
        frames: what a slider goes through, the last one or `start` drawn: (label, weights of every block, choice or
            None to leave the frames where they are).
        choice: the paths that are framed.
        start: the frame that is drawn at first. of: what frames are, "steps" or the first "candidates" of the table.
    """

    config: Any
    frames: Sequence[tuple[str, Sequence[Sequence[float]], Sequence[int] | None]] = ()
    choice: Sequence[int] | None = None
    start: int = -1
    title: str = "Architecture"
    of: str = "steps"

    @property
    def slider(self) -> str:
        """The label of the slider."""
        return {"steps": "Step of the search", "candidates": "Candidate"}[self.of]

    def svg(self, page: str) -> str:
        """The picture as inline SVG; "" where matplotlib is not installed."""
        shown = self.frames[self.start] if self.frames else None
        weights = None if shown is None else shown[1]
        choice = self.choice if shown is None or shown[2] is None else shown[2]
        try:
            text = draw_hybrid(self.config, weights=weights, choice=choice, page=page)
        except ImportError:
            return ""
        names = re.compile(rf'( id="|url\(#|href="#)(?!{page}-)')
        return names.sub(rf"\1{page}-", text[text.index("<svg") :])

    def steps(self) -> list[dict[str, Any]]:
        """The frames for the script: label, and of every path weight, choice, colours of box, text and edge."""
        return [
            {"label": label, "paths": [self._looks(b, weights[b], choice or self.choice) for b in range(len(weights))]}
            for label, weights, choice in self.frames
        ]

    def _looks(self, b: int, point: Sequence[float], choice: Sequence[int] | None) -> list[list[Any]]:
        looks = []
        for p, (path, weight) in enumerate(zip(self.config.blocks[b], point)):
            chosen = choice is not None and choice[b] == p
            own = None if len(point) == 1 else weight
            looks.append([f"{weight:.3f}", chosen, *path_look(path["component"], own, chosen)])
        return looks


@dataclass
class Page:
    """
    Args:
        title: says what was run. lead: one sentence with what came of it.
        facts: short things to know, name -> text.
        pictures: architectures; charts: title -> HTML of `charts`.
        components, blocks: the architecture as tables.
        candidates: the table that charts with points refer to by row; `candidates_note` stands above it.
        tables: further tables, by title. recipe: plain values, shown as YAML.
        sources: files beside the page with the same numbers.
    """

    title: str
    lead: str
    facts: Mapping[str, str] = field(default_factory=dict)
    pictures: Sequence[Picture] = ()
    charts: Mapping[str, str] = field(default_factory=dict)
    fronts: Mapping[str, str] = field(default_factory=dict)
    components: Table | None = None
    blocks: Table | None = None
    candidates: Table | None = None
    candidates_note: str = ""
    tables: Mapping[str, Table] = field(default_factory=dict)
    recipe: Any = None
    sources: Sequence[str] = ()

    def render(self) -> str:
        """The page as HTML. Its policy lets no request leave it and no script run but its own."""
        environment = jinja2.Environment(
            autoescape=True, loader=jinja2.FileSystemLoader(FOLDER), trim_blocks=True, lstrip_blocks=True
        )
        script, style = ((FOLDER / f"report.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))
        pictures = [(picture, f"picture{i}") for i, picture in enumerate(self.pictures)]
        data = {name: picture.steps() for picture, name in pictures if len(picture.frames) > 1}
        recipe = None if self.recipe is None else yaml.safe_dump(self.recipe, sort_keys=False, allow_unicode=True)
        return environment.get_template("report.html").render(
            page=self,
            pictures=[(picture, name, Markup(picture.svg(name))) for picture, name in pictures],
            charts={title: Markup(chart) for title, chart in self.charts.items() if chart},
            fronts={title: Markup(chart) for title, chart in self.fronts.items() if chart},
            recipe=recipe,
            environment=surroundings(),
            data=Markup(_inert(data)),
            script=Markup(script),
            style=Markup(style),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )

    def write(self, folder: str | os.PathLike) -> Path:
        """Write `report.html` into a folder, in one move."""
        target = Path(folder) / PAGE_NAME
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(f".{PAGE_NAME}")
        staged.write_text(self.render(), encoding="utf-8")
        os.replace(staged, target)
        return target


def surroundings() -> dict[str, str]:
    """What the page was made on: versions, Python, processor or accelerator, threads. No names of people or places."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found["system"] = f"{platform.system()} on {platform.machine()}"
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found["threads"] = str(torch.get_num_threads())
    return found


def thinned(items: Sequence[Any], most: int = MOST_FRAMES) -> list[Any]:
    """At most so many of the items, evenly spread, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _inert(data: Any) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
