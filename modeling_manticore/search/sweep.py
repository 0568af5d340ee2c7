"""A grid over mixture weights with everything frozen (the paper's oracle figure)."""

import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..building.texts import batches_of
from ..pages.of_reports import sweep_page
from ..progress import progress_bar
from .history import by_component, path_owners
from .pictures import can_draw, draw_heat_map, new_figure, write_figure
from .slices import held_out_loss
from .stitch_report import report_values, write_json


@dataclass
class SweepPoint:
    """Mixture weights of every block, and the loss there (nats per token)."""

    weights: list[list[float]]
    loss: float


@dataclass
class SweepReport:
    """
    All points of the grid, best first, the component's name for every path of every block, and the supernet's
    configuration (for pictures, not in the JSON).
    """

    divisions: int
    points: list[SweepPoint]
    components: list[list[str]] = field(default_factory=list)
    config: Any = field(default=None, repr=False, compare=False)

    @property
    def best(self) -> SweepPoint:
        """The point of the lowest loss."""
        return self.points[0]

    def __str__(self) -> str:
        lines = [f"{len(self.points)} points, {self.divisions} divisions; loss and weights by block"]
        for point in self.points[:10]:
            words = " | ".join(" ".join(f"{a:.2f}" for a in block) for block in point.weights)
            lines.append(f"{point.loss:.4f}  {words}")
        return "\n".join(lines)

    def save(self, folder: str | Path) -> None:
        """
        Write `sweep.json`, the same as a page in `report.html`, and where matplotlib is installed `sweep.png` (the
        loss against the weight of the first path, a panel for each block, the lowest over the other blocks as a line)
        and, where the paths' components are known, `mixture_heatmap.png` (the mixture weights of the best point).

        Raises:
            ValueError: the folder is a file.
        """
        folder = Path(folder)
        if folder.is_file():
            raise ValueError(f"folder: got the file {str(folder)!r}, allowed is a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "sweep.json", self.to_dict())
        self.write_page(folder)
        if not can_draw("sweep.png and mixture_heatmap.png"):
            return
        if self.components:
            names, values = by_component(self.best.weights, self.components)
            title = f"mixture weights of the best point (loss {self.best.loss:.3f} nats)"
            draw_heat_map(values, folder / "mixture_heatmap.png", names, title, "mixture weight", share=True)
        figure, axes = new_figure(len(self.best.weights), 3.0, 2.8, columns=6)
        for b, axis in enumerate(axes):
            axis.scatter([p.weights[b][0] for p in self.points], [p.loss for p in self.points], s=8)
            lowest: dict[float, float] = {}
            for p in self.points:
                lowest[p.weights[b][0]] = min(p.loss, lowest.get(p.weights[b][0], math.inf))
            axis.plot(*zip(*sorted(lowest.items())), color="tab:red")
            axis.set(title=f"block {b}", xlabel="weight of the first path", ylabel="loss (nats)")
        write_figure(figure, folder / "sweep.png")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return report_values(self)

    def write_page(self, folder: str | Path, recipe: Any = None) -> None:
        """Write `report.html`; `recipe` are plain values that say how the sweep was started."""
        sweep_page(self.to_dict(), self.config, recipe).write(folder)


def sweep(
    model: PreTrainedModel,
    score_texts: Any,
    tokenizer: Any = None,
    *,
    divisions: int = 4,
    limit: int = 1024,
    folder: str | Path | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> SweepReport:
    """
    The loss of a supernet on a grid of mixture weights, components and projectors frozen: in every block all points of
    the simplex whose entries are multiples of 1 / divisions, C(divisions + K - 1, K - 1) of them, independently. The
    mixture weights are as before at the end.

    Args:
        model: a supernet with heads; calibrate it first.
        limit: the most points.

    Raises:
        ValueError: the grid has more than `limit` points, the model is no supernet with heads, or bad texts; before
            anything is evaluated.
    """
    if not hasattr(model, "heads") or model.config.is_discretized:
        raise ValueError("model: nothing to mix; allowed is a supernet ManticoreForCausalLM.")
    for name, value in (("divisions", divisions), ("limit", limit)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: got {value!r}, allowed is a positive integer.")
    if folder is not None and Path(folder).is_file():
        raise ValueError(f"folder: got the file {str(folder)!r}, allowed is a folder.")
    paths = [len(block) for block in model.config.blocks]
    count = math.prod(math.comb(divisions + k - 1, k - 1) for k in paths)
    if count > limit:
        raise ValueError(
            f"divisions: got {divisions}, a grid of {count} points for blocks of {paths} paths; allowed are at most "
            f"{limit} points (fewer divisions, blocks or paths, or a higher limit)."
        )
    batches = batches_of(score_texts, model, tokenizer, batch_size, field="score_texts")
    before = [mixture.parameter.detach().clone() for mixture in _mixtures(model)]
    points: list[SweepPoint] = []
    best: SweepPoint | None = None
    try:
        grids = [simplex_grid(k, divisions) for k in paths]
        for end in {0, len(paths) - 1}:  # stems and heads need weight on a component
            grids[end] = [w for w in grids[end] if any(w[p] for p in model.config.real_paths(end))]
        grid = itertools.product(*grids)
        with progress_bar(
            grid, total=math.prod(map(len, grids)), desc="sweep", unit="point", show=progress, leave=False
        ) as bar:
            for weights in bar:
                model.set_mixture_weights(list(weights))
                points.append(SweepPoint([list(w) for w in weights], held_out_loss(model, batches)))
                if best is None or points[-1].loss < best.loss:
                    best = points[-1]
                words = " | ".join(" ".join(f"{a:.2f}" for a in block) for block in best.weights)
                bar.set_postfix_str(f"best {words} {best.loss:.3f}", refresh=False)
    finally:
        for mixture, value in zip(_mixtures(model), before):
            mixture.parameter.data.copy_(value)
    report = SweepReport(divisions, sorted(points, key=lambda p: p.loss), path_owners(model.config), model.config)
    if folder is not None:
        report.save(folder)
    return report


def simplex_grid(paths: int, divisions: int) -> list[tuple[float, ...]]:
    """All points of the simplex with `paths` entries that are multiples of 1 / divisions."""
    bars = itertools.combinations(range(divisions + paths - 1), paths - 1)
    ends = [(-1, *cut, divisions + paths - 1) for cut in bars]
    return [tuple((b - a - 1) / divisions for a, b in itertools.pairwise(cut)) for cut in ends]


def _mixtures(model: PreTrainedModel) -> list:
    return [block.mixture for block in model.trunk.blocks if block.mixture is not None]
