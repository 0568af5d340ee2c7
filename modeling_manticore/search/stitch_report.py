"""What a training-free search found: a ranking, a table, JSON, and two pictures."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..configuration_manticore import ManticoreConfig
from ..pages.of_reports import COSTS, stitch_page
from .history import by_component, component_names
from .pictures import SMALL, can_draw, draw_heat_map, new_figure, write_figure


@dataclass
class Candidate:
    """
    A discrete hybrid: the kept path of every block, its loss without training (nats per token), its costs, and its
    held-out losses after short fine-tunings, by share of the token budget.
    """

    choice: list[int]
    slices: str
    loss: float
    attention_blocks: int
    parameters: int
    cache_bytes_per_token: int
    flops_per_token: int
    tuned: dict[str, float] = field(default_factory=dict)

    @property
    def rank_key(self) -> tuple:
        """Those trained longest first, by their loss then; the untrained last, by their score."""
        share = max(self.tuned, key=float, default=None)
        return (-float(share), self.tuned[share]) if share else (0.0, self.loss)


@dataclass
class StitchReport:
    """
    Candidates, best first (`sort` keeps it so), and how they were found: "exhaustive" or "beam", order of
    calibration, context of the FLOPs, held-out fit of every bridge (order "parallel"), seconds of every stage, the
    component's name for every path of every block, the hard limits (cost kind -> limit); the supernet's configuration,
    for pictures and not in the JSON.
    """

    method: str
    order: str
    keep: int
    context: int
    candidates: list[Candidate]
    fits: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    components: list[list[str]] = field(default_factory=list)
    limits: dict[str, float] = field(default_factory=dict)
    config: Any = field(default=None, repr=False, compare=False)

    def sort(self) -> None:
        """Rank: fine-tuned longest first, then by loss; ties by fewer parameters."""
        self.candidates.sort(key=lambda c: (*c.rank_key, c.parameters, c.choice))

    @property
    def best(self) -> Candidate:
        """The first candidate."""
        return self.candidates[0]

    def pareto(self, kind: str) -> list[Candidate]:
        """Candidates that no other beats in both a cost and the loss without training, by rising cost."""
        front: list[Candidate] = []
        for candidate in sorted(self.candidates, key=lambda c: (getattr(c, kind), c.loss)):
            if not front or candidate.loss < front[-1].loss:
                front.append(candidate)
        return front

    def __str__(self) -> str:
        shares = sorted({share for c in self.candidates for share in c.tuned}, key=float)
        names = ["choice", "loss", *(f"after {100 * float(s):g} %" for s in shares)]
        names += ["parameters", "KV bytes", "MFLOPs", "Pareto", "slices"]
        fronts = {kind: {id(c) for c in self.pareto(kind)} for kind in COSTS}
        rows = []
        for c in self.candidates[: self.keep]:
            tuned = [f"{c.tuned[s]:.4f}" if s in c.tuned else "-" for s in shares]
            marks = "".join(m if id(c) in fronts[k] else "-" for k, m in zip(COSTS, "pkf"))
            costs = [f"{c.parameters:,}", f"{c.cache_bytes_per_token:,}", f"{c.flops_per_token / 1e6:.2f}"]
            rows.append([",".join(map(str, c.choice)), f"{c.loss:.4f}", *tuned, *costs, marks, c.slices])
        widths = [max(len(row[i]) for row in [names, *rows]) for i in range(len(names))]
        lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths)).rstrip() for row in [names, *rows]]
        seconds = ", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items())
        lines.append("Pareto: p, k, f where no hybrid with fewer parameters, KV bytes, FLOPs has a lower loss")
        lines.append(f"{len(self.candidates)} hybrids scored ({self.method}, bridges {self.order}); {seconds}")
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return report_values(self) | {"pareto": {kind: [c.choice for c in self.pareto(kind)] for kind in COSTS}}

    def save(self, folder: str | Path) -> None:
        """
        Write `stitch.json`, the same as a page in `report.html`, and where matplotlib is installed `pareto.png` (cost
        against loss), `blocks.png` (the lowest loss among candidates with a given path in a given block) and, where
        the paths' components are known, `components.png` (how many of the `keep` best take a component in a block).
        Each file is replaced in one move.

        Raises:
            ValueError: the folder is a file.
        """
        folder = Path(folder)
        if folder.is_file():
            raise ValueError(f"folder: got the file {str(folder)!r}, allowed is a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "stitch.json", self.to_dict())
        self.write_page(folder)
        if can_draw("pareto.png, blocks.png and components.png"):
            self._plot_pareto(folder / "pareto.png")
            self._plot_blocks(folder / "blocks.png")
            if self.components:
                self._plot_components(folder / "components.png")

    def write_page(self, folder: str | Path, recipe: Any = None) -> None:
        """Write `report.html`; `recipe` are plain values that say how the search was started."""
        stitch_page(self.to_dict(), self.config, recipe).write(folder)

    def _plot_pareto(self, file: Path) -> None:
        figure, axes = new_figure(len(COSTS), 3.6, 3.2)
        for axis, (kind, (label, scale)) in zip(axes, COSTS.items()):
            axis.scatter([getattr(c, kind) / scale for c in self.candidates], [c.loss for c in self.candidates], s=10)
            front = self.pareto(kind)
            axis.plot([getattr(c, kind) / scale for c in front], [c.loss for c in front], "o-", color="tab:red", ms=4)
            for c in front:
                place = (getattr(c, kind) / scale, c.loss)
                axis.annotate(
                    ",".join(map(str, c.choice)), place, fontsize=SMALL, xytext=(3, 3), textcoords="offset points"
                )
            axis.set(xlabel=label, ylabel="loss without training (nats)")
        write_figure(figure, file)

    def _plot_blocks(self, file: Path) -> None:
        blocks = len(self.best.choice)
        paths = 1 + max(p for c in self.candidates for p in c.choice)
        lowest = [[float("nan")] * blocks for _ in range(paths)]
        for c in self.candidates:
            for b, p in enumerate(c.choice):
                lowest[p][b] = c.loss if lowest[p][b] != lowest[p][b] else min(lowest[p][b], c.loss)
        rows = [f"path {p}" for p in range(paths)]
        draw_heat_map(lowest, file, rows, "lowest loss with the path (frame: best)", "nats", self.best.choice)

    def _plot_components(self, file: Path) -> None:
        best = self.candidates[: self.keep]
        taken = [
            [sum(c.choice[b] == p for c in best) / len(best) for p in range(len(block))]
            for b, block in enumerate(self.components)
        ]
        names, values = by_component(taken, self.components)
        frame = [names.index(block[p]) for block, p in zip(self.components, self.best.choice)]
        title = f"which component the best {len(best)} hybrids take (frame: best)"
        draw_heat_map(values, file, names, title, "share of hybrids", frame, share=True)


def slices_of(config: ManticoreConfig, choice: Sequence[int]) -> str:
    """The hybrid in words, `gpt_neox[0:3] > mamba2[3:6]`; slices that continue each other are one."""
    parts: list[list] = []
    for block, p in zip(config.blocks, choice):
        path = block[p]
        if path["component"] is None:
            continue
        if parts and parts[-1][0] == path["component"] and parts[-1][2] == path["start"]:
            parts[-1][2] = path["stop"]
        else:
            parts.append([path["component"], path["start"], path["stop"]])
    names = component_names(config)
    return " > ".join(f"{names[k]}[{start}:{stop}]" for k, start, stop in parts)


def report_values(report: Any) -> dict[str, Any]:
    """The fields of a report, a dataclass with a `config`, as plain values without that."""
    values = asdict(replace(report, config=None))
    del values["config"]
    return values


def write_json(file: Path, content: dict) -> None:
    """Write JSON in one move, so that a kill leaves the old file or the new one."""
    staged = file.with_name(f".{file.name}")
    staged.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(staged, file)
