"""The course of the mixture weights: values for the logs, and a picture made from the logs."""

import os
import re
from pathlib import Path

import torch
from torch import nn

from ..configuration_manticore import path_name


KEY = re.compile(r"mixture/block_(\d+)/(?:path_(\d+)|entropy)")
COLUMNS = 6


def mixture_logs(hybrid: nn.Module) -> dict[str, float]:
    """`mixture/block_b/path_p` and `mixture/block_b/entropy` (nats) of every block that has more than one path."""
    logs = {}
    for b, point in enumerate(hybrid.mixture_weights()):
        if len(point) > 1:
            point = point.detach().float().cpu()
            logs |= {f"mixture/block_{b}/path_{p}": weight for p, weight in enumerate(point.tolist())}
            logs[f"mixture/block_{b}/entropy"] = torch.special.entr(point).sum().item()
    return logs


def path_names(hybrid: nn.Module) -> list[list[str]]:
    """A label for every path of every block: its component's family and its layers."""
    config = hybrid.config
    families = [component.model_type for component in config.components]
    return [[path_name(path, families) for path in block] for block in config.blocks]


def mixture_courses(log_history: list[dict]) -> dict[int, dict[int | None, list[tuple[int, float]]]]:
    """`courses[block][path]`, points (step, weight); path None is the entropy. One point a step, the last logged."""
    courses: dict = {}
    for entry in log_history:
        for key, value in entry.items():
            if match := KEY.fullmatch(key):
                path = None if match[2] is None else int(match[2])
                courses.setdefault(int(match[1]), {}).setdefault(path, {})[entry["step"]] = value
    return {b: {p: sorted(points.items()) for p, points in paths.items()} for b, paths in sorted(courses.items())}


def plot_mixtures(log_history: list[dict], file: Path, names: list[list[str]] | None = None) -> bool:
    """
    Write a PNG with one panel per block, the weights of its paths against the step, and one panel with the entropies.
    An existing picture is replaced in one move.

    Args:
        log_history: as in `TrainerState`.
        names: the label of every path of every block.

    Returns:
        False, and no file, where the logs have no mixture weights.
    """
    courses = mixture_courses(log_history)
    if not courses:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = len(courses) + 1
    columns = min(panels, COLUMNS)
    rows = -(-panels // columns)
    figure = Figure(figsize=(3.2 * columns + 0.6, 2.6 * rows + 0.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (b, paths) in zip(axes, courses.items()):
        for p in sorted(path for path in paths if path is not None):
            label = names[b][p] if names is not None else f"path {p}"
            axis.plot(*zip(*paths[p]), label=label, marker="." if len(paths[p]) == 1 else None)
        axes[len(courses)].plot(*zip(*paths[None]), label=f"block {b}", marker="." if len(paths[None]) == 1 else None)
        axis.set(title=f"block {b}", xlabel="step", ylabel="mixture weight", ylim=(-0.02, 1.02))
        axis.legend(fontsize="x-small", frameon=False)
    axes[len(courses)].set(title="entropy (nats)", xlabel="step")
    axes[len(courses)].set_ylim(bottom=0)
    axes[len(courses)].legend(fontsize="x-small", frameon=False)
    for axis in axes[panels:]:
        axis.remove()
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_name(f".{file.name}")
    figure.savefig(staged, dpi=120, format="png")
    os.replace(staged, file)
    return True
