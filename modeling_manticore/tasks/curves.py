"""
Smooth curves on a grid that keep clear of each other and of themselves, for many images at once. Integers only, so
that they are the same on every machine: places are in 1/256 of a pixel, directions in 1/64 of a turn.
"""

import numpy as np

from .mad.draws import Draws


UNIT = 256
DIRECTIONS = 64
# A step turns by at most so many directions (17 degrees), and by at most one more or less than the step before.
SHARPEST_TURN = 3
# Pixels of two curves, or of two far parts of one, differ by more than this in one coordinate.
CLEARANCE = 2
# Steps after which a curve must be clear of itself.
NEARBY = 2 * (CLEARANCE + 1)
# Pixels between a curve and the image's edge.
MARGIN = 2
TRIES = 24

_ANGLES = np.arange(DIRECTIONS) * (2 * np.pi / DIRECTIONS)
_STEP = np.stack([np.rint(UNIT * np.sin(_ANGLES)), np.rint(UNIT * np.cos(_ANGLES))], axis=-1).astype(np.int64)


def pixels_of(places: np.ndarray) -> np.ndarray:
    """The nearest pixels of places, (..., 2) int64, row before column."""
    return (places + UNIT // 2) // UNIT


def propose(rows: int, length: int, size: int, draws: Draws) -> np.ndarray:
    """Curves of so many places, a pixel apart, that start anywhere within the margin, (rows, length, 2) int64."""
    room = size - 2 * MARGIN
    start = draws.below(room * 16, rows, 2).astype(np.int64) * (UNIT // 16) + MARGIN * UNIT
    turn = np.empty((rows, length), dtype=np.int64)
    turn[:, 0] = draws.below(2 * SHARPEST_TURN + 1, rows) - SHARPEST_TURN
    change = draws.below(3, rows, length) - 1
    for step in range(1, length):
        turn[:, step] = np.clip(turn[:, step - 1] + change[:, step], -SHARPEST_TURN, SHARPEST_TURN)
    heading = draws.below(DIRECTIONS, rows)[:, None] + np.cumsum(turn, axis=1)
    places = np.empty((rows, length, 2), dtype=np.int64)
    places[:, 0] = start
    places[:, 1:] = start[:, None] + np.cumsum(_STEP[heading[:, 1:] % DIRECTIONS], axis=1)
    return places


def clear_of_itself(pixels: np.ndarray) -> np.ndarray:
    """Whether parts that are `NEARBY` or more steps apart keep clear, (rows,) bool, of pixels (rows, length, 2)."""
    length = pixels.shape[1]
    clear = np.ones(len(pixels), dtype=bool)
    for apart in range(NEARBY, length):
        distance = np.abs(pixels[:, apart:] - pixels[:, : length - apart]).max(axis=2)
        clear &= (distance > CLEARANCE).all(axis=1)
    return clear


def _closed(paths: np.ndarray) -> np.ndarray:
    """Where no other curve may be: paths, (rows, size, size) bool, with everything within the clearance."""
    wide = paths.copy()
    for shift in range(1, CLEARANCE + 1):
        wide[:, :, shift:] |= paths[:, :, :-shift]
        wide[:, :, :-shift] |= paths[:, :, shift:]
    closed = wide.copy()
    for shift in range(1, CLEARANCE + 1):
        closed[:, shift:] |= wide[:, :-shift]
        closed[:, :-shift] |= wide[:, shift:]
    return closed


def add_curve(paths: np.ndarray, length: int, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """
    A curve at random in every image where one finds room in `TRIES` tries.

    Args:
        paths: the pixels on curves so far, (rows, size, size) bool; the new ones join them.

    Returns:
        Places, (rows, length, 2) int64, and where there is a curve, (rows,) bool.
    """
    size = paths.shape[-1]
    closed = _closed(paths)
    curve = np.zeros((len(paths), length, 2), dtype=np.int64)
    missing = np.arange(len(paths))
    for _ in range(TRIES):
        places = propose(len(missing), length, size, draws)
        pixels = pixels_of(places)
        good = ((pixels >= MARGIN) & (pixels < size - MARGIN)).all(axis=(1, 2))
        inside = np.flatnonzero(good)
        row, column = pixels[inside, :, 0], pixels[inside, :, 1]
        free = ~closed[missing[inside, None], row, column].any(axis=1)
        good[inside] = free & clear_of_itself(pixels[inside])
        curve[missing[good]] = places[good]
        missing = missing[~good]
        if not len(missing):
            break
    found = np.ones(len(paths), dtype=bool)
    found[missing] = False
    rows = np.flatnonzero(found)
    pixels = pixels_of(curve[rows])
    paths[rows[:, None], pixels[..., 0], pixels[..., 1]] = True
    return curve, found


def draw(images: np.ndarray, places: np.ndarray, light: np.ndarray) -> None:
    """
    Add a curve to images, spread over the pixels around each place by how near they are.

    Args:
        images: (rows, size, size) int32, changed.
        places: (rows, length, 2) int64, at least a pixel away from the edge.
        light: what every place gives, (rows, length) int64.
    """
    size = images.shape[-1]
    row, at = np.nonzero(light)
    chosen, given = places[row, at], light[row, at]
    corner, part = chosen // UNIT, chosen % UNIT
    first = (row * size + corner[:, 0]) * size + corner[:, 1]
    flat = images.reshape(-1)
    for down in (0, 1):
        for right in (0, 1):
            near = (part[:, 0] if down else UNIT - part[:, 0]) * (part[:, 1] if right else UNIT - part[:, 1])
            np.add.at(flat, first + down * size + right, (near * given // UNIT**2).astype(np.int32))
