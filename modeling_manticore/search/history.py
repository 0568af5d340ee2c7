"""The course of the mixture weights: values for the logs, and a picture made from the logs."""

import re
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

from ..cache_manticore import path_name
from ..pages.page import thinned
from .pictures import SMALL, new_figure, write_figure


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


def points_in(logs: dict[str, float], paths: list[int]) -> list[torch.Tensor] | None:
    """
    The mixture weights that one entry of the logs holds, or None if it holds none.

    Args:
        paths: the number of paths of every block; a block with one is not in the logs.
    """
    points = []
    for b, count in enumerate(paths):
        keys = [f"mixture/block_{b}/path_{p}" for p in range(count)] if count > 1 else []
        if any(key not in logs for key in keys):
            return None
        points.append(torch.tensor([logs[key] for key in keys] or [1.0]))
    return points


def course_of(log_history: list[dict], paths: list[int], most: int = 150) -> list[dict]:
    """
    The mixture weights over time, [{"step", "weights"}], one entry a step (the last logged), at most `most` of them.

    Args:
        paths: as of `points_in`.
    """
    found = {}
    if any(count > 1 for count in paths):
        for entry in log_history:
            if (points := points_in(entry, paths)) is not None:
                found[entry["step"]] = [point.tolist() for point in points]
    return [{"step": step, "weights": weights} for step, weights in thinned(sorted(found.items()), most)]


def component_names(config: PretrainedConfig) -> list[str]:
    """The family of every component, with its index where two are of one family."""
    families = [component.model_type for component in config.components]
    return [name if families.count(name) == 1 else f"{name}#{k}" for k, name in enumerate(families)]


def path_owners(config: PretrainedConfig) -> list[list[str]]:
    """The component's name for every path of every block; "skip" for a path without one."""
    names = component_names(config)
    return [["skip" if p["component"] is None else names[p["component"]] for p in block] for block in config.blocks]


def path_names(hybrid: nn.Module) -> list[list[str]]:
    """A label for every path of every block: its component and its layers."""
    names = component_names(hybrid.config)
    return [[path_name(path, names) for path in block] for block in hybrid.config.blocks]


def by_component(weights: list[list[float]], owners: list[list[str]]) -> tuple[list[str], list[list[float]]]:
    """
    What every component has in every block: its paths' weights summed, nan where it has no path.

    Args:
        weights: a number for every path of every block.
        owners: the component's name for every path of every block.

    Returns:
        the names, and `values[component][block]`.
    """
    names = list(dict.fromkeys(name for block in owners for name in block))
    values = [
        [
            sum(w for w, owner in zip(block, own) if owner == name) if name in own else float("nan")
            for block, own in zip(weights, owners)
        ]
        for name in names
    ]
    return names, values


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
    figure, axes = new_figure(len(courses) + 1, 3.3, 2.7, COLUMNS)
    entropies = axes[-1]
    for axis, (b, paths) in zip(axes, courses.items()):
        for p in sorted(path for path in paths if path is not None):
            label = names[b][p] if names is not None else f"path {p}"
            axis.plot(*zip(*paths[p]), label=label, marker="." if len(paths[p]) == 1 else None)
        entropies.plot(*zip(*paths[None]), label=f"block {b}", marker="." if len(paths[None]) == 1 else None)
        axis.set(title=f"block {b}", xlabel="step", ylabel="mixture weight", ylim=(-0.02, 1.02))
        axis.legend(fontsize=SMALL, frameon=False)
    entropies.set(title="entropy", xlabel="step", ylabel="nats")
    entropies.set_ylim(bottom=0)
    entropies.legend(fontsize=SMALL, frameon=False, ncols=1 + len(courses) // 9)
    write_figure(figure, file)
    return True
