"""
Long Range Arena's tasks by other means than the package's: ListOps made row by row and solved by parsing the text,
Pathfinder solved by tracing paths from marker to marker. The tests and a benchmark share it.
"""

import random
from collections.abc import Iterable

import numpy as np


def listops_row(
    chance: random.Random, min_length: int, max_length: int, max_depth: int, max_arguments: int
) -> tuple[str, int]:
    """Trees as the definition draws them, node by node, until one has the right length: its text and its value."""

    def node(depth: int) -> tuple[list[str], int]:
        if depth == max_depth or chance.random() > 0.25:
            digit = chance.randrange(10)
            return [str(digit)], digit
        words, values = [], []
        for _ in range(chance.randint(2, max_arguments)):
            inner, value = node(depth + 1)
            words += inner
            values.append(value)
        operator = chance.choice(["MIN", "MAX", "MED", "SM"])
        return ["[" + operator, *words, "]"], apply(operator, values)

    while True:
        words, value = node(1)
        if min_length < len(words) < max_length:
            return " ".join(words), value


def apply(operator: str, values: list[int]) -> int:
    """What an operator makes of its arguments."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return {
        "MIN": ordered[0],
        "MAX": ordered[-1],
        "MED": ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) // 2,
        "SM": sum(ordered) % 10,
    }[operator]


def parse(text: str) -> tuple[int, int, int]:
    """The value of a ListOps text, the depth of its deepest digit, and its largest number of arguments."""
    open_lists: list[tuple[str, list[int]]] = []
    deepest = widest = 0
    words = text.split(" ")
    for place, word in enumerate(words):
        if word.startswith("["):
            open_lists.append((word[1:], []))
            continue
        if word == "]":
            operator, values = open_lists.pop()
            assert len(values) >= 2
            widest = max(widest, len(values))
            value = apply(operator, values)
        else:
            value = int(word)
            deepest = max(deepest, len(open_lists) + 1)
        if not open_lists:
            assert place == len(words) - 1
            return value, deepest, widest
        open_lists[-1][1].append(value)
    raise AssertionError("a list is not closed")


def connected_parts(pixels: Iterable[tuple[int, int]]) -> list[set[tuple[int, int]]]:
    """Pixels that touch, by a side or a corner, directly or through others."""
    left, parts = set(pixels), []
    while left:
        part, edge = set(), [left.pop()]
        while edge:
            row, column = edge.pop()
            part.add((row, column))
            near = {(row + down, column + right) for down in (-1, 0, 1) for right in (-1, 0, 1)} & left
            left -= near
            edge += near
        parts.append(part)
    return parts


def markers(image: list[int], size: int) -> list[tuple[int, int]]:
    """The middles of the two markers of an image: the squares of 3 x 3 white pixels."""
    squares = connected_parts(divmod(place, size) for place, light in enumerate(image) if light == 255)
    assert len(squares) == 2
    middles = []
    for square in squares:
        row, column = (sum(pixel[axis] for pixel in square) // 9 for axis in (0, 1))
        assert square == {(row + down, column + right) for down in (-1, 0, 1) for right in (-1, 0, 1)}
        middles.append((row, column))
    return sorted(middles)


def trace(image: list[int], paths: list[int], size: int) -> tuple[int, int]:
    """Whether one path goes through both markers, which must be on its ends, and the number of paths."""
    pixels = [divmod(place, size) for place, on in enumerate(paths) if on]
    parts = connected_parts(pixels)
    first, second = markers(image, size)
    (one,) = [part for part in parts if first in part]
    (other,) = [part for part in parts if second in part]
    return int(one is other), len(parts)


def trivial_statistics(images: np.ndarray) -> dict[str, np.ndarray]:
    """Numbers of an image that say nothing of how curves run, each (rows,), of images (rows, size, size)."""
    size = images.shape[-1]
    light = images.astype(np.int64)
    first, second = np.array([markers(image.ravel().tolist(), size) for image in images]).swapaxes(0, 1)
    rows = np.arange(len(images))[:, None, None]
    near = np.arange(-3, 4)
    wide = np.pad(light, ((0, 0), (3, 3), (3, 3)))
    around = [
        wide[rows, middle[:, 0, None, None] + 3 + near[:, None], middle[:, 1, None, None] + 3 + near].sum(axis=(1, 2))
        for middle in (first, second)
    ]
    edges = [np.minimum(middle, size - 1 - middle).min(axis=1) for middle in (first, second)]
    return {
        "brightness": light.sum(axis=(1, 2)),
        "lit pixels": (light > 0).sum(axis=(1, 2)),
        "brightness around the markers": around[0] + around[1],
        "distance of the markers": ((first - second) ** 2).sum(axis=1),
        "row of the markers": (first + second)[:, 0],
        "column of the markers": (first + second)[:, 1],
        "markers from the centre": sum(((2 * middle - size + 1) ** 2).sum(axis=1) for middle in (first, second)),
        "nearer marker from the edge": np.minimum(*edges),
        "farther marker from the edge": np.maximum(*edges),
    }


def light_between(images: np.ndarray) -> np.ndarray:
    """The mean light on the straight line from marker to marker, without these, (rows,) float64."""
    size = images.shape[-1]
    first, second = np.array([markers(image.ravel().tolist(), size) for image in images]).swapaxes(0, 1)
    part = np.linspace(0, 1, 4 * size)[:, None]
    means = []
    for image, begin, end in zip(images, first, second):
        places = np.rint(begin + (end - begin) * part).astype(int)
        lights = image[places[:, 0], places[:, 1]]
        means.append(lights[lights < 255].mean() if (lights < 255).any() else 0.0)
    return np.array(means)


def best_threshold(statistic: np.ndarray, labels: np.ndarray) -> float:
    """How much more than half of the second half's labels (0, 1) a threshold tells that is best on the first half."""
    half = len(labels) // 2
    order = np.argsort(statistic[:half])
    gain = np.cumsum(2 * labels[:half][order] - 1)
    place = np.abs(gain).argmax()
    said = (statistic[half:] <= statistic[:half][order][place]) == (gain[place] > 0)
    return float((said == labels[half:]).mean() - 0.5)
