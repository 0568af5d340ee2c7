"""Pictures of searches: figures without a display, the heat map that all reports share, files replaced in one move."""

import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging


logger = logging.get_logger(__name__)

SMALL = 8  # points; the smallest text in any picture
TAG = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
CELL_WIDTH, CELL_HEIGHT = 0.62, 0.5  # inches


def can_draw(what: str) -> bool:
    """Whether matplotlib is installed; where not, a warning names what will not be drawn."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    logger.warning(f"matplotlib is not installed: {what} will not be drawn.")
    return False


def new_figure(panels: int, width: float, height: float, columns: int | None = None):
    """
    A figure without a display, and its axes.

    Args:
        panels: number of axes, in rows of at most `columns` (default: one row).
        width, height: of one panel, in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(panels, columns or panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.remove()
    return figure, axes[:panels]


def write_figure(figure, file: Path) -> None:
    """Write a PNG in one move; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_name(f".{file.name}")
    figure.savefig(staged, dpi=120, format="png")
    os.replace(staged, file)


def draw_heat_map(
    values: Sequence[Sequence[float]],
    file: Path,
    rows: Sequence[str],
    title: str,
    unit: str,
    frame: Sequence[int] | None = None,
    share: bool = False,
) -> None:
    """
    Write a heat map of blocks (along) and components or paths (down) with the value in every cell.

    Args:
        values: `values[row][block]`; nan leaves a cell empty.
        rows: the label of every row.
        unit: what the colours mean.
        frame: the row that is framed in every block.
        share: values are between 0 and 1, and colours are fixed to that range; else the lowest value is the best.
    """
    from matplotlib.patches import Rectangle

    blocks = len(values[0])
    labels = max(map(len, rows))
    width = max(CELL_WIDTH * blocks + 0.075 * labels + 1.4, 0.075 * len(title) + 0.4, 3.0)
    figure, (axis,) = new_figure(1, width, CELL_HEIGHT * len(values) + 1.1)
    limits = {"vmin": 0.0, "vmax": 1.0, "cmap": "viridis"} if share else {"cmap": "viridis_r"}
    digits = ".2f" if share else ".3f"
    picture = axis.imshow(values, aspect="auto", **limits)
    for row, entries in enumerate(values):
        for b, value in enumerate(entries):
            if not math.isnan(value):
                axis.text(b, row, f"{value:{digits}}", ha="center", va="center", fontsize=SMALL, bbox=TAG)
    for b, row in enumerate(frame or []):
        axis.add_patch(Rectangle((b - 0.46, row - 0.44), 0.92, 0.88, fill=False, edgecolor="tab:red", linewidth=2))
    axis.set(xlabel="block", xticks=range(blocks), yticks=range(len(values)))
    axis.set_yticklabels(rows)
    axis.set_title(title, fontsize="medium")
    figure.colorbar(picture, ax=axis, label=unit)
    write_figure(figure, file)
