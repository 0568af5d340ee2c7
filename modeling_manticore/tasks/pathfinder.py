"""
Pathfinder of Long Range Arena (arXiv 2011.04006; Linsley et al. 2018): an image of dashed curves, two of them long,
and two markers on ends of long curves: are they the two ends of one curve?
"""

import os
from dataclasses import astuple, dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from .curves import MARGIN, add_curve, draw, pixels_of
from .generated import Rows, as_dataset, check_sizes, kept_on_disk, make_splits
from .mad.draws import Draws
from .mad.settings import require_integer


if TYPE_CHECKING:
    from datasets import DatasetDict

ROWS = (160_000, 20_000, 20_000)
VOCAB_SIZE = 256
LABEL_NAMES = ("not connected", "connected")
# A dash is never as bright as a marker, which is a square of 3 pixels.
DASH_LIGHT, MARKER_LIGHT = 208, 255
SHORTEST_DISTRACTOR = 4
# By so many pixels the distance of the markers, and that from the centre, may differ between the two labels.
DISTANCE_TOLERANCE, CENTRE_TOLERANCE = 1.0, 1.5
# Markers nearer than this would touch.
LEAST_DISTANCE = 6.0
# Images begun at a time, of 32 x 32. It is part of what a seed means, as VERSION is of what is kept.
IMAGES = 1024
VERSION = 1


@dataclass(frozen=True)
class PathfinderSetting:
    """
    Attributes:
        image_size: pixels of a side; a row has image_size ** 2 tokens.
        curve_length: pixels along each of the two long curves.
        distractors: further curves of a third of that length.
        dash, gap: pixels along a curve that are drawn, one more or fewer at random where there are more than one, and
            that are left out before the next dash.
    """

    image_size: int = 32
    curve_length: int = 20
    distractors: int = 5
    dash: int = 3
    gap: int = 2


def pathfinder(
    rows: tuple[int, int, int] = ROWS,
    *,
    image_size: int = 32,
    curve_length: int = 20,
    distractors: int = 5,
    dash: int = 3,
    gap: int = 2,
    paths: bool = False,
    seed: int = 0,
    workers: int | None = None,
    cache: str | os.PathLike | bool | None = None,
) -> "DatasetDict":
    """
    Pathfinder as train, validation and test (so many `rows` each), with the columns input_ids (grey levels 0..255, the
    image row by row, image_size ** 2 of them) and label (1: connected). With `paths` also the column paths, the same
    shape: 1 on the pixels of every curve without gaps, else 0; curves never touch. No row occurs twice. The same seed
    gives the same rows on any machine and for any number of workers (threads; None: one a core), and the same
    validation and test rows for any number of train rows.

    An image is made before its label: two long curves, distractors, and three ends, of which one gets a marker in any
    case, and one of the other two, as far from it as each other within a pixel, with either label. So labels differ in
    nothing but the connection. Half of the labels are 1, but for one row or where few different rows exist.

    Args:
        cache: the folder where sets are kept, None for `tasks.text.cache_folder()`, False to keep nothing.

    Raises:
        ValueError: a setting out of range, too little room for the curves, or too few different rows.
    """
    from datasets import DatasetDict

    check_sizes(rows, seed, workers)
    if not isinstance(paths, bool):
        raise ValueError(f"paths: got {paths!r}, allowed are True and False.")
    setting = PathfinderSetting(image_size, curve_length, distractors, dash, gap)
    check(setting)

    def make() -> DatasetDict:
        splits = make_pathfinder(setting, rows, seed, workers)
        if not paths:
            for part in splits.values():
                del part.columns["paths"]
        return DatasetDict({name: as_dataset(part, list(LABEL_NAMES)) for name, part in splits.items()})

    return kept_on_disk("pathfinder", (VERSION, astuple(setting), tuple(rows), seed, paths), make, cache)


def make_pathfinder(
    setting: PathfinderSetting, rows: tuple[int, int, int] = ROWS, seed: int = 0, workers: int | None = None
) -> dict[str, Rows]:
    """
    The rows of `pathfinder` as arrays, with paths, without the cache.

    Raises:
        ValueError: as `pathfinder`.
    """
    check_sizes(rows, seed, workers)
    check(setting)
    return make_splits(partial(make_chunk, setting), rows, seed, workers, "a larger image_size or fewer distractors")


def check(setting: PathfinderSetting) -> None:
    """
    Raises:
        ValueError: a field out of range, or curves that cannot have room.
    """
    for name, least, most in (
        ("image_size", 12, 256),
        ("curve_length", 8, 1024),
        ("distractors", 0, 256),
        ("dash", 1, 64),
        ("gap", 0, 64),
    ):
        value = getattr(setting, name)
        require_integer(name, value, least)
        if value > most:
            raise ValueError(f"{name}: got {value}, allowed is at most {most}.")
    # A pixel of a curve keeps about two others to each side clear.
    asked = 3 * sum(curve_lengths(setting))
    room = (setting.image_size - 2 * MARGIN) ** 2
    if asked > room:
        raise ValueError(
            f"image_size: got {setting.image_size}, but curve_length {setting.curve_length} and {setting.distractors} "
            f"distractors ask for {asked} pixels of {room}; allowed are larger images, or shorter or fewer curves."
        )


def curve_lengths(setting: PathfinderSetting) -> list[int]:
    """Pixels along every curve of an image, the two long ones first."""
    short = max(SHORTEST_DISTRACTOR, setting.curve_length // 3)
    return [setting.curve_length] * 2 + [short] * setting.distractors


def make_chunk(setting: PathfinderSetting, draws: Draws) -> Rows:
    """As many rows as come of `IMAGES` images (fewer where images are larger), an even number, half of each label."""
    size = setting.image_size
    paths = np.zeros((max(2, IMAGES * 32**2 // size**2), size, size), dtype=bool)
    curves: list[np.ndarray] = []
    for number, length in enumerate(curve_lengths(setting)):
        curve, kept = add_curve(paths, length, draws)
        curves.append(curve)
        if number == 1:
            ends = np.stack([pixels_of(curve[:, place]) for curve in curves for place in (0, -1)], axis=1)
            chosen, fits = _choices(ends, size, length, draws)
            kept &= fits
        elif number > 1:
            ends, chosen = ends[kept], chosen[kept]
        paths, curves = paths[kept], [curve[kept] for curve in curves]
        if number == 1:
            ends, chosen = ends[kept], chosen[kept]
    rows = len(paths) // 2 * 2
    labels = np.repeat(draws.below(2, rows // 2), 2).astype(np.int64)
    labels[1::2] ^= 1

    images = np.zeros((rows, size, size), dtype=np.int32)
    for curve in curves:
        _draw_dashed(images, curve[:rows], setting, draws)
    images = np.minimum(images, DASH_LIGHT).astype(np.uint8)
    every = np.arange(rows)[:, None]
    marked = np.stack([chosen[:rows, 0], np.where(labels == 1, chosen[:rows, 1], chosen[:rows, 2])], axis=1)
    centres = ends[every, marked]
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            images[every, centres[..., 0] + down, centres[..., 1] + right] = MARKER_LIGHT
    columns = {"input_ids": images.ravel(), "paths": paths[:rows].ravel().astype(np.uint8)}
    return Rows(columns, np.full(rows, size**2), labels)


def _choices(ends: np.ndarray, size: int, length: int, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """
    Three of the four ends (two of one long curve, two of the other): one, the other end of its curve, and an end of
    the other curve. The latter two are as far from the first end, and as far from the image's centre, as each other:
    one pair of ends is about the other one's mirror image.

    Args:
        ends: pixels, (rows, 4, 2).
        length: of the long curves.

    Returns:
        Their numbers, (rows, 3) int64, drawn among all that fit, and whether any do, (rows,) bool.
    """
    triples = np.array([(end, end ^ 1, other) for end in range(4) for other in ((2, 3) if end < 2 else (0, 1))])
    one, same, other = (ends[:, triples[:, column]] for column in range(3))
    within, between = (_length(one - to) for to in (same, other))
    inner, outer = (_length(2 * to - (size - 1)) / 2 for to in (same, other))
    # No distance is possible with one label only.
    fits = (np.minimum(within, between) >= LEAST_DISTANCE) & (np.maximum(within, between) <= length - 1)
    fits &= (np.abs(within - between) <= DISTANCE_TOLERANCE) & (np.abs(inner - outer) <= CENTRE_TOLERANCE)
    lots = np.where(fits, draws.raw(len(ends), len(triples)).astype(np.int64), -1)
    return triples[lots.argmax(axis=1)], fits.any(axis=1)


def _length(vectors: np.ndarray) -> np.ndarray:
    """Of integer vectors (..., 2): the root of a whole number is the same on every machine."""
    return np.sqrt((vectors**2).sum(axis=-1))


def _draw_dashed(images: np.ndarray, curve: np.ndarray, setting: PathfinderSetting, draws: Draws) -> None:
    """Add the dashes of curves, (rows, length, 2), that begin anywhere in their period; each has its own light."""
    rows, length, _ = curve.shape
    count = length // max(setting.dash - 1 + setting.gap, 1) + 2
    # Dashes of varying length: where a curve begins in its period must not say where it ends.
    dashes = np.full((rows, count), setting.dash)
    if setting.dash > 1:
        dashes += draws.below(3, rows, count) - 1
    ends = np.cumsum(dashes + setting.gap, axis=1) - draws.below(setting.dash + setting.gap, rows)[:, None]
    number = (np.arange(length)[:, None] >= ends[:, None]).sum(axis=2)
    left = np.take_along_axis(ends, number, axis=1) - np.arange(length)
    lights = DASH_LIGHT - draws.below(DASH_LIGHT // 2, rows, count).astype(np.int64)
    light = np.where(left > setting.gap, np.take_along_axis(lights, number, axis=1), 0)
    draw(images, curve, light)
    # Half-way to the next place, where both are seen.
    draw(images, (curve[:, 1:] + curve[:, :-1]) // 2, np.minimum(light[:, 1:], light[:, :-1]) // 2)
