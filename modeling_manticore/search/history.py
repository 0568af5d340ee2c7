"""The course of the mixture weights: values for the logs, and a picture made from the logs."""

from pathlib import Path

import torch
from torch import nn


def mixture_logs(model: nn.Module) -> dict[str, float]:
    """`mixture/block_b/path_p` and `mixture/block_b/entropy` (nats) of every block that has more than one path."""
    logs = {}
    for b, point in enumerate(model.mixture_weights()):
        if len(point) > 1:
            point = point.detach().float().cpu()
            logs |= {f"mixture/block_{b}/path_{p}": weight for p, weight in enumerate(point.tolist())}
            logs[f"mixture/block_{b}/entropy"] = torch.special.entr(point).sum().item()
    return logs


def plot_mixtures(log_history: list[dict], path: Path, names: list[list[str]] | None = None) -> bool:
    """
    Write a PNG with one panel per block: weights of its paths against the step. Returns False if there are none.

    Args:
        log_history: as in `TrainerState`.
        names: the label of every path of every block.
    """
    steps = [entry for entry in log_history if any(key.startswith("mixture/") for key in entry)]
    keys = {key for entry in steps for key in entry if key.startswith("mixture/")}
    blocks = sorted({int(key.split("/")[1].removeprefix("block_")) for key in keys})
    if not blocks:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(blocks), figsize=(3.2 * len(blocks) + 0.6, 2.8), sharey=True, squeeze=False)
    for axis, b in zip(axes[0], blocks):
        prefix = f"mixture/block_{b}/path_"
        for key in sorted({k for e in steps for k in e if k.startswith(prefix)}):
            p = int(key.removeprefix(prefix))
            label = names[b][p] if names is not None else f"path {p}"
            points = [(e["step"], e[key]) for e in steps if key in e]
            axis.plot([x for x, _ in points], [y for _, y in points], label=label)
        axis.set(title=f"block {b}", xlabel="step", ylim=(-0.02, 1.02))
        axis.legend(fontsize="x-small", frameon=False)
    axes[0][0].set_ylabel("mixture weight")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
