"""What a gradient search found: the mixture weights, the choice, its costs, and what the search itself cost."""

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..building.costs import COST_KINDS, Budget, CostTable
from ..building.discretize import usable_paths
from ..building.limits import argmax_under
from ..hub.picture import draw_hybrid
from ..pages.of_reports import search_page
from ..pages.page import PAGE_NAME, thinned
from .history import by_component, course_of, path_names, path_owners, plot_mixtures
from .pictures import can_draw, draw_heat_map
from .stitch_report import report_values, slices_of, write_json


if TYPE_CHECKING:
    from .trainer import ManticoreTrainer


SCHEMA = 1
FILES = ("search.json", "mixture_heatmap.png", "mixture_weights.png", "hybrid.png", PAGE_NAME)
ARGUMENTS = (
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "mixture_learning_rate",
    "lr_scheduler_type",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "max_grad_norm",
    "weight_decay",
    "train_components",
    "cost_weight",
    "cost_kind",
    "seed",
)
CANDIDATES = 30
EVALUATION_LOSS = re.compile(r"eval_(?:.+_)?loss")


@dataclass
class Effort:
    """
    What a training has cost so far, over all its resumptions: tokens of the weight steps and of mixture steps on the
    search split, padding included and all processes together (each taken to have as many as this one), and seconds
    with evaluations and checkpoints.
    """

    tokens: int = 0
    search_tokens: int = 0
    seconds_before: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Wall clock until now."""
        return self.seconds_before + time.perf_counter() - self.started

    def state_dict(self) -> dict[str, float]:
        """JSON values, for a checkpoint."""
        return {"tokens": self.tokens, "search_tokens": self.search_tokens, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        self.tokens, self.search_tokens = state["tokens"], state["search_tokens"]
        self.seconds_before, self.started = state["seconds"], time.perf_counter()


def tokens_in(inputs: Mapping[str, Any]) -> int:
    """Entries of `input_ids` in a batch; of a batch without them 0."""
    ids = inputs.get("input_ids")
    return ids.numel() if isinstance(ids, torch.Tensor) else 0


@dataclass
class SearchReport:
    """
    Args:
        strategy, arguments: how was searched.
        steps, effort: optimizer steps; tokens and seconds as in `Effort`.
        blocks: for every block `paths` (labels), `components`, `weights` and `entropy` (nats).
        choice: the path of the largest weight in every block; `slices` in words, `probability` the product of its
            weights.
        limits: cost kind -> hard limit, and min_components.
        choice_within_limits: the choice of the largest product that meets them all, None without limits.
        costs: kind -> expected cost under the mixture weights, and cost of both choices; adapters count as parameters.
        best_evaluation: metric -> the lowest value and its step, of every loss that was evaluated.
        best_checkpoint: whose weights the model has, where `load_best_model_at_end` put them there.
        discretized: what came of it, where the caller discretized: the choice, losses, costs.
        alone: component -> its own held-out loss (nats) before the search, where the caller measured it.
        course: the mixture weights over time, [{"step", "weights"}]. losses: name -> [[step, nats]].
        candidates: the likeliest choices with probability, costs and whether they are within the limits (None: none).
        config: the supernet's; for its picture, not in the JSON.
    """

    strategy: str
    arguments: dict[str, Any]
    steps: int
    effort: dict[str, float]
    blocks: list[dict[str, Any]]
    choice: list[int]
    slices: str
    probability: float
    limits: dict[str, float]
    choice_within_limits: list[int] | None
    costs: dict[str, dict[str, float]]
    best_evaluation: dict[str, dict[str, float]]
    best_checkpoint: str | None = None
    discretized: dict[str, Any] | None = None
    alone: dict[str, float] = field(default_factory=dict)
    course: list[dict[str, Any]] = field(default_factory=list)
    losses: dict[str, list[list[float]]] = field(default_factory=dict)
    candidates: list[dict[str, Any]] = field(default_factory=list)
    config: Any = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"schema": SCHEMA} | report_values(self)

    def __str__(self) -> str:
        lines = [f"{'block':<6} {'entropy':>7}  mixture weights"]
        for b, block in enumerate(self.blocks):
            words = ", ".join(f"{name} {weight:.3f}" for name, weight in zip(block["paths"], block["weights"]))
            lines.append(f"{b:<6} {block['entropy']:7.3f}  {words}")
        lines.append(f"largest weights: {_commas(self.choice)} ({self.slices}), probability {self.probability:.2g}")
        if self.choice_within_limits is not None:
            limits = ", ".join(
                f"components >= {limit}" if kind == "min_components" else f"{kind} <= {limit:g}"
                for kind, limit in self.limits.items()
            )
            lines.append(f"within the limits ({limits}): {_commas(self.choice_within_limits)}")
        lines.append(
            f"strategy {self.strategy}, {self.steps} steps, {self.effort['tokens'] + self.effort['search_tokens']:,} "
            f"tokens, {self.effort['seconds']:.1f} s"
        )
        if self.discretized is not None:
            found = self.discretized
            lines.append(f"kept: {_commas(found['choice'])} ({found['slices']})")
        return "\n".join(lines + self.loss_lines())

    def loss_lines(self) -> list[str]:
        """The held-out losses that were measured, the components' own first."""
        lines = []
        if self.alone:
            words = ", ".join(f"{name} {loss:.4f}" for name, loss in self.alone.items())
            lines.append(f"held-out loss of the components alone, as they came: {words} nats")
        for name, best in self.best_evaluation.items():
            lines.append(f"lowest {name} in the search: {best['value']:.4f} nats, after {best['step']:,} steps")
        if self.discretized is not None and "loss" in self.discretized:
            found = self.discretized
            lines.append(f"held-out loss: supernet {found['supernet_loss']:.4f}, hybrid {found['loss']:.4f} nats")
        return lines

    def save(self, folder: str | Path, log_history: list[dict] | None = None) -> None:
        """
        Write `search.json`, the same as a page in `report.html`, and where matplotlib is installed
        `mixture_heatmap.png` (blocks x components, the weight of a component summed over its paths in the block),
        `hybrid.png` (the supernet as cards draw it, with the chosen paths framed) and, given the logs,
        `mixture_weights.png` (the course over the steps). Each file is replaced in one move.

        Raises:
            ValueError: the folder is a file.
        """
        folder = Path(folder)
        if folder.is_file():
            raise ValueError(f"folder: got the file {str(folder)!r}, allowed is a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILES[0], self.to_dict())
        self.write_page(folder)
        if not can_draw(f"{', '.join(FILES[1:3])} and {FILES[3]}"):
            return
        owners = [block["components"] for block in self.blocks]
        names, values = by_component([block["weights"] for block in self.blocks], owners)
        kept = self.choice_within_limits or self.choice
        frame = [names.index(own[p]) for own, p in zip(owners, kept)]
        what = "largest" if self.choice_within_limits is None else "best within the limits"
        title = f"mixture weights of {self.strategy} after {self.steps} steps (frame: {what})"
        draw_heat_map(values, folder / FILES[1], names, title, "mixture weight", frame, share=True)
        if self.config is not None:
            draw_hybrid(
                self.config, folder / FILES[3], weights=[block["weights"] for block in self.blocks], choice=kept
            )
        if log_history is not None:
            plot_mixtures(log_history, folder / FILES[2], [block["paths"] for block in self.blocks])

    def write_page(self, folder: str | Path, recipe: Any = None) -> None:
        """Write `report.html`; `recipe` are plain values that say how the search was started."""
        search_page(self.to_dict(), self.config, recipe).write(folder)


def report_of(trainer: "ManticoreTrainer", table: CostTable) -> SearchReport:
    """
    The report of a search that has trained. Under FSDP every process must call it.

    Args:
        table: the costs of the trainer's hybrid.
    """
    hybrid, args, state = trainer.hybrid, trainer.args, trainer.state
    points = [point.detach().float().cpu() for point in hybrid.mixture_weights()]
    choice = best_choice_of(hybrid, points, table, None)
    limits = {} if trainer.budget is None else trainer.budget.stated()
    within = best_choice_of(hybrid, points, table, trainer.budget) if limits else None
    costs = {"expected": {kind: float(table.terms[kind].expected(points)) for kind in COST_KINDS}}
    costs |= {"choice": table.of(choice)} | ({} if within is None else {"choice_within_limits": table.of(within)})
    blocks = [
        {
            "paths": names,
            "components": owners,
            "weights": point.tolist(),
            "entropy": torch.special.entr(point).sum().item(),
        }
        for names, owners, point in zip(path_names(hybrid), path_owners(hybrid.config), points)
    ]
    names = ARGUMENTS + trainer.strategy.fixed_arguments
    arguments = {name: _plain(getattr(args, name)) for name in dict.fromkeys(names)}
    arguments |= {"gate": hybrid.config.gate, "mixture": hybrid.config.mixture}
    evaluated: dict[str, dict[str, float]] = {}
    for entry in state.log_history:
        for key, value in entry.items():
            if EVALUATION_LOSS.fullmatch(key) and value < evaluated.get(key, {}).get("value", math.inf):
                evaluated[key] = {"value": value, "step": entry["step"]}
    losses: dict[str, list[list[float]]] = {}
    for entry in state.log_history:
        for key, value in entry.items():
            if key in ("loss", "search_loss") or EVALUATION_LOSS.fullmatch(key):
                losses.setdefault(key, []).append([entry["step"], value])
    return SearchReport(
        strategy=trainer.strategy.name,
        arguments=arguments,
        steps=state.global_step,
        effort=trainer.effort.state_dict(),
        blocks=blocks,
        choice=choice,
        slices=slices_of(hybrid.config, choice),
        probability=probability_of(points, choice),
        limits=limits,
        choice_within_limits=within,
        costs=costs,
        best_evaluation=evaluated,
        best_checkpoint=Path(state.best_model_checkpoint).name if _best_is_loaded(trainer) else None,
        course=course_of(state.log_history, [len(point) for point in points]),
        losses={name: thinned(series, 300) for name, series in losses.items()},
        candidates=[
            {"choice": one, "slices": slices_of(hybrid.config, one), "probability": probability_of(points, one)}
            | {"within_limits": table.within(one, trainer.budget) if limits else None}
            | table.of(one)
            for one in likeliest(points, usable_paths(hybrid), CANDIDATES)
        ],
        config=hybrid.config,
    )


def likeliest(points: list[torch.Tensor], paths: list[list[int]], count: int) -> list[list[int]]:
    """The `count` choices of the largest products of weights, falling; `paths` are those that may be chosen."""
    best: list[tuple[float, list[int]]] = [(1.0, [])]
    for point, own in zip(points, paths):
        grown = [(product * float(point[p]), [*choice, p]) for product, choice in best for p in own]
        best = sorted(grown, key=lambda pair: (-pair[0], pair[1]))[:count]
    return [choice for _, choice in best]


def best_choice_of(hybrid, points: list[torch.Tensor], table: CostTable | None, budget: Budget | None) -> list[int]:
    """What `discretize` would keep: the largest weight in every block; with a budget the largest product within it."""
    paths = usable_paths(hybrid)
    if budget is None or not budget.stated():
        return [max(own or range(len(point)), key=point.tolist().__getitem__) for own, point in zip(paths, points)]
    return argmax_under(table, points, budget, paths)


def probability_of(points: list[torch.Tensor], choice: list[int]) -> float:
    """The product of the chosen paths' weights: how likely the choice is when paths are drawn independently."""
    return math.prod(float(point[p]) for point, p in zip(points, choice))


def _best_is_loaded(trainer: "ManticoreTrainer") -> bool:
    return bool(trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint)


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _commas(choice: list[int]) -> str:
    return ",".join(map(str, choice))
