"""Charts as SVG text in the colours of the page around them, readable without a script."""

import math
from collections.abc import Mapping, Sequence
from html import escape


WIDTH, HEIGHT = 360, 230  # of the view box
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 38  # margins in it
SHADES = 8  # of lines, `--s0` to `--s7` in the style

Points = Sequence[tuple[float, float]]


def line_chart(series: Mapping[str, Points], x_label: str, y_label: str) -> str:
    """
    A chart with one line a series and a legend below; a series of one point is a dot.

    Args:
        series: name -> points (x, y), by rising x. Points that are not finite are left out.

    Returns:
        HTML, or "" without a point.
    """
    finite = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in series.items()}
    finite = {name: points for name, points in finite.items() if points}
    if not finite:
        return ""
    frame = _Frame([p for points in finite.values() for p in points], x_label, y_label)
    parts, legend = [], []
    for i, (name, points) in enumerate(finite.items()):
        shade = f"s{i % SHADES}"
        if len(points) == 1:
            parts.append(f'<circle class="dot {shade}" {frame.at(*points[0])} r="3.5"/>')
        else:
            places = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
            parts.append(f'<polyline class="line {shade}" points="{places}"/>')
        last = f"{points[-1][1]:.4g}"
        legend.append(f'<li><span class="key {shade}"></span>{escape(name)} <b>{last}</b></li>')
    names = escape(f"{y_label} against {x_label}: {', '.join(finite)}", quote=True)
    return f'{frame.svg(parts, names)}<ul class="legend">{"".join(legend)}</ul>'


def scatter_chart(points: Sequence[tuple[float, float, int, str]], front: Sequence[int], x_label: str, y_label: str):
    """
    A chart with a dot for every candidate, and a line through those of the Pareto front.

    Args:
        points: (x, y, row of the candidate's table, text that a browser shows over the dot).
        front: rows of the front, by rising x.

    Returns:
        HTML, or "" without a point.
    """
    points = [p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]
    if not points:
        return ""
    frame = _Frame([(x, y) for x, y, _, _ in points], x_label, y_label)
    place = {row: (x, y) for x, y, row, _ in points}
    best = [row for row in front if row in place]
    line = " ".join(f"{frame.x(place[row][0]):.1f},{frame.y(place[row][1]):.1f}" for row in best)
    parts = [f'<polyline class="line front" points="{line}"/>'] if len(best) > 1 else []
    for x, y, row, text in sorted(points, key=lambda p: p[2] in best):
        kind, more = ("point front", ' r="6" tabindex="0" role="button"') if row in best else ("point", ' r="4"')
        parts.append(
            f'<circle class="{kind}" data-row="{row}" {frame.at(x, y)}{more}><title>{escape(text)}</title></circle>'
        )
    return frame.svg(parts, escape(f"{y_label} against {x_label} of {len(points)} candidates", quote=True))


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers in [low, high], at most `most` of them, of equal distance."""
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-300)))
    while True:
        for factor in (0.1, 0.2, 0.5, 1, 2, 5):
            size = step * factor
            first, last = math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9)
            if last - first < most:
                return [i * size for i in range(first, last + 1)]
        step *= 10


class _Frame:
    """Axes around points."""

    def __init__(self, points: Points, x_label: str, y_label: str):
        self.labels = x_label, y_label
        self.x_range = _widened([x for x, _ in points])
        self.y_range = _widened([y for _, y in points])

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    def at(self, x: float, y: float) -> str:
        return f'cx="{self.x(x):.1f}" cy="{self.y(y):.1f}"'

    def svg(self, parts: list[str], name: str) -> str:
        lines = []
        for value in ticks(*self.x_range):
            x = self.x(value)
            lines.append(f'<path class="grid" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
            lines.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{_told(value)}</text>')
        for value in ticks(*self.y_range):
            y = self.y(value)
            lines.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            lines.append(f'<text x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{_told(value)}</text>')
        middle, side = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
        across, up = map(escape, self.labels)
        lines.append(f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{across}</text>')
        lines.append(f'<text transform="translate(11 {side}) rotate(-90)" text-anchor="middle">{up}</text>')
        content = "".join([*lines, *parts])
        return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{content}</svg>'


def _widened(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _told(value: float) -> str:
    return f"{value:.4g}" if value else "0"
