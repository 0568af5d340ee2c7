"""The one picture of a hybrid: README, model cards and reports draw it with the same function."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..mixing_manticore import junctions


COLOURS = ("#2f6fb2", "#c8662b", "#4b8f5b", "#8a5aa8", "#b23a55", "#5b7d8f", "#94812a", "#5f5f5f")
FRAME, EDGE = "#d62728", "#777777"
SMALL, NORMAL = 8.5, 10  # points
BOX, END, LANE, PITCH = 0.74, 0.52, 0.46, 0.6  # inches: width of a path and of a stem, height of a box, lane to lane
GAP, BRIDGE_GAP, CONTINUED_GAP = 0.44, 0.98, 0.3  # inches between columns that are mixed, bridged, continued
DPI, WIDEST = 150, 6000  # pixels per inch, and the most pixels that a PNG has across


def draw_hybrid(
    hybrid: Any,
    file: str | os.PathLike | None = None,
    *,
    weights: Sequence[Sequence[float]] | None = None,
    names: Sequence[str] | None = None,
    choice: Sequence[int] | None = None,
    page: str | None = None,
) -> str | None:
    """
    Draw blocks (across) and components (down): slices, skip paths, bridges, stems, heads and mixture weights.

    Args:
        hybrid: a hybrid or its configuration.
        file: a `.png` or `.svg` to write in one move; its folder is made. None: return the SVG as text.
        weights: a point of the simplex over the paths of every block; by default the hybrid's own. A configuration
            alone has none, and none are drawn.
        names: of the components; by default the last part of their `source`, or the model type.
        choice: a path of every block, which is framed.
        page: the SVG for a page whose script changes it: no background, text as text, and the ids `{page}-box-B-P`,
            `{page}-slice-B-P` and `{page}-weight-B-P` (of a skip path `{page}-skip-B-P`) of path P in block B.

    Raises:
        ValueError: another suffix; not one list of weights a block and one weight a path; not one name a
            component; not one path a block.
        ImportError: matplotlib is not installed.
    """
    config = getattr(hybrid, "config", hybrid)
    if weights is None and hasattr(hybrid, "mixture_weights"):
        weights = [point.tolist() for point in hybrid.mixture_weights()]
    suffix = ".svg" if file is None else Path(file).suffix
    if suffix not in (".png", ".svg"):
        raise ValueError(f"file: got {os.fspath(file)!r}, allowed are names that end in .png or .svg.")
    if weights is not None and [len(point) for point in weights] != [len(block) for block in config.blocks]:
        raise ValueError(f"weights: got {weights!r}, allowed is one list a block with one weight a path.")
    names = component_names(config) if names is None else list(names)
    if len(names) != len(config.components):
        raise ValueError(f"names: got {len(names)}, allowed is one for each of {len(config.components)} components.")
    if choice is not None and (
        len(choice) != len(config.blocks) or not all(p in range(len(b)) for p, b in zip(choice, config.blocks))
    ):
        raise ValueError(f"choice: got {choice!r}, allowed is one path of each of {len(config.blocks)} blocks.")

    content = _render(_Drawing(config, weights, names, choice, page).figure(), suffix[1:], page is not None)
    if file is None:
        return content.decode()
    target = Path(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}")
    staged.write_bytes(content)
    os.replace(staged, target)
    return None


def component_names(config: Any) -> list[str]:
    """A short name of every component: the last part of its `source`, else its model type."""
    sources = [getattr(component, "source", None) for component in config.components]
    return [
        os.path.basename(str(source).rstrip("/\\")) if source else component.model_type
        for source, component in zip(sources, config.components)
    ]


def path_look(component: int | None, weight: float | None, chosen: bool) -> tuple[str, str, str]:
    """
    Colours `#rrggbb` of a path's box, of the text on it, and of its edge.

    Args:
        component: None for a skip path. weight: its mixture weight; None where it is alone in its block.
    """
    colour = EDGE if component is None else COLOURS[component % len(COLOURS)]
    return (*_shade(colour, _strength(weight)), FRAME if chosen else colour)


def _strength(weight: float | None) -> float:
    return 0.8 if weight is None else 0.05 + 0.85 * weight


def _shade(colour: str, strength: float) -> tuple[str, str]:
    """A colour mixed with white, and the colour of text that can be read on it."""
    parts = [1 - strength * (1 - int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5)]
    ink = "#ffffff" if 0.3 * parts[0] + 0.59 * parts[1] + 0.11 * parts[2] < 0.6 else "#222222"
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts), ink


def _render(figure, kind: str, live: bool = False) -> bytes:
    """The figure as PNG or SVG bytes, the same for the same figure."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none" if live else "path", "svg.hashsalt": "hybrid"}):
        dpi = min(DPI, WIDEST / figure.get_figwidth())
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=metadata, transparent=live)
    return buffer.getvalue()


def _middle(places: list[float]) -> float:
    return (min(places) + max(places)) / 2


class _Drawing:
    """Places, in inches, of everything in the picture of one configuration."""

    def __init__(
        self,
        config: Any,
        weights: Sequence[Sequence[float]] | None,
        names: list[str],
        choice: Sequence[int] | None = None,
        page: str | None = None,
    ):
        self.config, self.weights, self.names, self.choice, self.page = config, weights, names, choice, page
        self.joints = junctions(config)
        self._place_lanes()
        self._place_columns()

    def _place_lanes(self) -> None:
        """One lane a component, more where a block has several paths of it, and one for skip paths."""
        self.lanes: dict[tuple[int, int], int] = {}
        for k in self.config.used_components:
            counts = [sum(path["component"] == k for path in block) for block in self.config.blocks]
            for i in range(max(counts)):
                self.lanes[k, i] = len(self.lanes)
        self.has_skip = any(self.config.skip_path(b) is not None for b in range(len(self.config.blocks)))
        self.height = 0.55 + PITCH * (len(self.lanes) + self.has_skip) + 0.26

    def _place_columns(self) -> None:
        used = self.config.used_components
        longest = max(max(len(self.names[k]), len(self._shape(k)) * SMALL / NORMAL) for k in used)
        self.label_width = 0.15 + 0.088 * longest
        left = self.label_width + 0.62
        self.columns = [(left, END)]  # left edge and width: stems, blocks, heads
        for joint, width in zip(self.joints, [BOX] * len(self.config.blocks) + [END]):
            gap = GAP
            if joint.single:
                gap = BRIDGE_GAP if joint.has_in[0] else CONTINUED_GAP
            left += self.columns[-1][1] + gap
            self.columns.append((left, width))
        self.width = left + END + 0.72

    def _shape(self, k: int) -> str:
        component = self.config.components[k]
        return f"{self.config.depth(k)} layers, width {component.hidden_size}"

    def _y(self, lane: int) -> float:
        return self.height - 0.55 - PITCH * (lane + 0.5)

    def _ends(self, components: list[int]) -> list[float]:
        return [self._y(self.lanes[k, 0]) for k in components]

    def _paths(self, b: int) -> list[tuple[int, float]]:
        """Component and height of every path with a component."""
        seen: dict[int, int] = {}
        places = []
        for p in self.config.real_paths(b):
            k = self.config.blocks[b][p]["component"]
            places.append((k, self._y(self.lanes[k, seen.setdefault(k, 0)])))
            seen[k] += 1
        return places

    # ------------------------------------------------------------------ drawing
    def figure(self):
        """The matplotlib figure, one unit an inch."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(self.width, self.height), facecolor="white")
        FigureCanvasAgg(figure)
        self.axis = figure.add_axes((0, 0, 1, 1))
        self.axis.set(xlim=(0, self.width), ylim=(0, self.height))
        self.axis.set_axis_off()
        self._draw_labels()
        self._draw_boxes()
        self._draw_wires()
        return figure

    def _text(self, x: float, y: float, text: str, size: float = NORMAL, colour: str = "#222222", **more) -> None:
        more = {"ha": "center", "va": "center"} | more
        self.axis.text(x, y, text.replace("$", r"\$"), fontsize=size, color=colour, **more)

    def _line(self, *points: tuple[float, float], **more) -> None:
        more = {"color": "#777777", "linewidth": 1.3, "zorder": 1, "solid_capstyle": "round"} | more
        self.axis.plot([x for x, _ in points], [y for _, y in points], **more)

    def _box(
        self,
        x: float,
        y: float,
        width: float,
        colour: str,
        strength: float,
        height: float = LANE,
        framed: bool = False,
        name: str | None = None,
    ) -> str:
        """A rounded box with its left edge at x; returns the colour for text on it."""
        from matplotlib.patches import FancyBboxPatch

        face, ink = _shade(colour, strength)
        style = "round,pad=0,rounding_size=0.07"
        box = FancyBboxPatch(
            (x, y - height / 2),
            width,
            height,
            boxstyle=style,
            facecolor=face,
            edgecolor=FRAME if framed else colour,
            linewidth=2.6 if framed else 1.3,
            zorder=2,
            gid=name,
        )
        self.axis.add_patch(box)
        return ink

    def _draw_labels(self) -> None:
        for k in self.config.used_components:
            y = self._y(self.lanes[k, 0])
            self._text(0.1, y + 0.1, self.names[k], colour=self._colour(k), weight="bold", ha="left")
            self._text(0.1, y - 0.1, self._shape(k), SMALL, "#555555", ha="left")
        blocks = [f"block {b}" for b in range(len(self.config.blocks))]
        for (left, width), name in zip(self.columns, ["stem", *blocks, "head"]):
            self._text(left + width / 2, self.height - 0.3, name, NORMAL, "#555555")
        if not all(joint.single for joint in self.joints):
            gate = f"gate {self.config.gate}, stream of width {self.config.hidden_size}"
            self._text((self.columns[0][0] + self.columns[-1][0] + END) / 2, 0.16, gate, SMALL, "#555555")

    def _id(self, what: str, b: int, p: int) -> str | None:
        return None if self.page is None else f"{self.page}-{what}-{b}-{p}"

    def _colour(self, k: int) -> str:
        return COLOURS[k % len(COLOURS)]

    def _draw_boxes(self) -> None:
        for (left, width), word, components in (
            (self.columns[0], "stem", self.config.stem_components),
            (self.columns[-1], "head", self.config.head_components),
        ):
            for k, y in zip(components, self._ends(components)):
                ink = self._box(left, y, width, self._colour(k), 0.15)
                self._text(left + width / 2, y, word, SMALL, ink, zorder=3)
        for b, block in enumerate(self.config.blocks):
            left, width = self.columns[b + 1]
            point = self.weights[b] if self.weights is not None and len(block) > 1 else None
            for p, (k, y) in zip(self.config.real_paths(b), self._paths(b)):
                strength = _strength(None) if len(block) == 1 else 0.35 if point is None else _strength(point[p])
                framed = self.choice is not None and self.choice[b] == p
                ink = self._box(left, y, width, self._colour(k), strength, framed=framed, name=self._id("box", b, p))
                slice_name, x = f"[{block[p]['start']}:{block[p]['stop']}]", left + width / 2
                self._text(
                    x, y + 0.1 * (point is not None), slice_name, NORMAL, ink, zorder=3, gid=self._id("slice", b, p)
                )
                if point is not None:
                    self._text(x, y - 0.11, f"{point[p]:.3f}", SMALL, ink, zorder=3, gid=self._id("weight", b, p))
            skip = self.config.skip_path(b)
            if skip is not None:
                y = self._y(len(self.lanes))
                colour = FRAME if self.choice is not None and self.choice[b] == skip else EDGE
                dashes = {"linestyle": (0, (3, 2)), "color": colour, "gid": self._id("box", b, skip)}
                self._line((left, y), (left + width, y), **dashes)
                note = "skip" if point is None else f"skip {point[skip]:.3f}"
                self._text(left + width / 2, y + 0.11, note, SMALL, gid=self._id("skip", b, skip))

    def _draw_wires(self) -> None:
        """From column to column: a bus where paths are mixed, a bridge or a plain line where one meets one."""
        stems, heads = self._ends(self.config.stem_components), self._ends(self.config.head_components)
        sides = [stems, *([y for _, y in self._paths(b)] for b in range(len(self.config.blocks))), heads]
        for b in range(len(self.config.blocks)):
            if self.config.skip_path(b) is not None:
                sides[b + 1] = [*sides[b + 1], self._y(len(self.lanes))]
        first, (last, _) = self.columns[0][0], self.columns[-1]
        self._bus(first - 0.52, first - 0.2, first, [_middle(stems)], stems)
        self._text(first - 0.45, _middle(stems) + 0.12, "tokens", SMALL)
        for i, joint in enumerate(self.joints):
            start, stop = self.columns[i][0] + self.columns[i][1], self.columns[i + 1][0]
            if joint.single:
                self._bridge(start, stop, sides[i][0], sides[i + 1][0], joint)
            else:
                self._bus(start, (start + stop) / 2, stop, sides[i], sides[i + 1])
        self._bus(last + END, last + END + 0.2, last + END + 0.66, heads, [_middle(heads)])
        self._text(last + END + 0.45, _middle(heads) + 0.12, "logits", SMALL)

    def _bus(self, left: float, x: float, right: float, sources: list[float], targets: list[float]) -> None:
        for y in sources:
            self._line((left, y), (x, y))
        for y in targets:
            self._line((x, y), (right, y))
        both = [*sources, *targets]
        if max(both) > min(both):
            self._line((x, min(both)), (x, max(both)), linewidth=2.6, color="#444444")

    def _bridge(self, left: float, right: float, source: float, target: float, joint) -> None:
        if not joint.has_in[0]:
            self._line((left, source), (right, target))
            return
        width, y = 0.74, (source + target) / 2
        x = (left + right - width) / 2
        self._line((left, source), (x, y) if source == target else (x + 0.1, y))
        self._line((x + width, y) if source == target else (x + width - 0.1, y), (right, target))
        self._box(x, y, width, "#444444", 0.06, 0.4)
        self._text(x + width / 2, y + 0.075, "bridge", SMALL, zorder=3)
        ends = f"{joint.sources[0].width}\N{RIGHTWARDS ARROW}{joint.targets[0].width}"
        self._text(x + width / 2, y - 0.085, ends, SMALL - 1, zorder=3)
