"""A picture of an experiment: every model's mean and interval on every task."""

import io
from pathlib import Path

from .records import write_whole
from .results import Results


COLUMNS = 3
SALT = "manticore"  # of the identifiers in the file, so that equal results give equal files


def draw(results: Results, file: Path) -> None:
    """Write an SVG: one panel a column, models below each other, the frequency baseline as a dashed line."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = results.columns
    across = min(COLUMNS, len(columns))
    down = -(-len(columns) // across)
    height = 0.6 + 0.28 * len(results.models)
    with matplotlib.rc_context({"svg.hashsalt": SALT, "svg.fonttype": "path", "font.size": 9}):
        figure = Figure(figsize=(2.2 + 2.6 * across, 0.3 + height * down), layout="constrained")
        panels = figure.subplots(down, across, squeeze=False, sharey=True)
        for panel in panels.flat[len(columns) :]:
            panel.set_visible(False)
        for panel, column in zip(panels.flat, columns):
            scale = 100 if column.greater_is_better else 1
            for place, model in enumerate(results.models):
                found = results.interval(column, model)
                if found is None:
                    continue
                half = None if found.half_width is None else scale * found.half_width
                panel.errorbar(scale * found.mean, place, xerr=half, fmt="o", color=f"C{place % 10}", capsize=3)
                values = [scale * value for value in results.values(column, model).values()]
                panel.plot(values, [place] * len(values), "|", color="0.4", markersize=6)
            guess = results.baseline(column)
            if guess is not None:
                panel.axvline(scale * guess, color="0.6", linestyle="--", linewidth=1)
            panel.set_title(column.name)
            panel.set_xlabel("accuracy, %" if column.greater_is_better else "loss, nats")
        for row in panels:
            row[0].set_yticks(range(len(results.models)), results.models)
        panels[0][0].invert_yaxis()
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    write_whole(file, drawn.getvalue())
