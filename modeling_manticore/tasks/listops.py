"""
ListOps of Long Range Arena (arXiv 2011.04006; Nangia and Bowman 2018): nested lists of MIN, MAX, MED and SM (the sum
modulo 10) over digits, and the digit that the whole is.
"""

import os
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from .generated import Rows, as_dataset, check_sizes, kept_on_disk, make_splits
from .mad.draws import Draws
from .mad.settings import require_integer


if TYPE_CHECKING:
    from datasets import DatasetDict

# The token of a number is the number itself.
VOCABULARY = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "[MIN", "[MAX", "[MED", "[SM", "]", "<pad>")
MINIMUM, MAXIMUM, MEDIAN, SUM, END, PADDING = range(10, 16)
OPERATOR_SHARE = 0.25
ROWS = (96_000, 2000, 2000)
SMALLEST_TREE = 4
# Trees begun at a time. It is part of what a seed means, as VERSION is of what is kept.
TREES = 2048
VERSION = 1
LEAST_SHARE = 1e-3

# 1 << 4 * digit, 0 for other tokens: how often each digit occurs is a sum of these, of at most 15 each.
_ONE_OF = np.array([1 << 4 * token if token < 10 else 0 for token in range(16)], dtype=np.uint64)
_EVERY_DIGIT = np.uint64(0x1111111111)
_BITS = np.array([number.bit_count() for number in range(2**16)], dtype=np.int64)


@dataclass(frozen=True)
class ListOpsSetting:
    """
    Attributes:
        min_length, max_length: a row has more than the one and fewer than the other tokens (brackets are part of
            their operator; a closing bracket is a token).
        max_depth: the depth of the deepest digit; an operator alone over digits has depth 2.
        max_arguments: an operator has 2..max_arguments of them.
    """

    min_length: int = 500
    max_length: int = 2000
    max_depth: int = 10
    max_arguments: int = 10


def listops(
    rows: tuple[int, int, int] = ROWS,
    *,
    min_length: int = 500,
    max_length: int = 2000,
    max_depth: int = 10,
    max_arguments: int = 10,
    seed: int = 0,
    workers: int | None = None,
    cache: str | os.PathLike | bool | None = None,
) -> "DatasetDict":
    """
    ListOps as train, validation and test (so many `rows` each), with the columns input_ids (tokens of `VOCABULARY`, of
    varying length) and label (0..9). No row occurs twice. The same seed gives the same rows on any machine and for any
    number of workers (threads; None: one a core), and the same validation and test rows for any number of train rows.

    Trees are drawn as Long Range Arena does: a node is an operator with probability 1/4, else a digit; digits from
    `max_depth` on; operators, their number of arguments (2..max_arguments) and digits are uniform; a tree whose length
    is not between `min_length` and `max_length`, both excluded, is thrown away. The median of an even number of
    arguments is the mean of the middle two, rounded down. Labels are not balanced.

    Args:
        cache: the folder where sets are kept, None for `tasks.text.cache_folder()`, False to keep nothing.

    Raises:
        ValueError: a setting out of range, lengths that (nearly) no tree has, or too few different rows.
    """
    from datasets import DatasetDict

    check_sizes(rows, seed, workers)
    setting = ListOpsSetting(min_length, max_length, max_depth, max_arguments)
    check(setting)

    def make() -> DatasetDict:
        splits = make_listops(setting, rows, seed, workers)
        return DatasetDict({name: as_dataset(part, list(VOCABULARY[:10])) for name, part in splits.items()})

    return kept_on_disk("listops", (VERSION, astuple(setting), tuple(rows), seed), make, cache)


def make_listops(
    setting: ListOpsSetting, rows: tuple[int, int, int] = ROWS, seed: int = 0, workers: int | None = None
) -> dict[str, Rows]:
    """
    The rows of `listops` as arrays, without the cache.

    Raises:
        ValueError: as `listops`.
    """
    check_sizes(rows, seed, workers)
    check(setting)
    return make_splits(partial(make_chunk, setting), rows, seed, workers, "a wider range of lengths")


def listops_text(input_ids: Iterable[int]) -> str:
    """
    A row as text, as `[MAX 4 3 [MIN 2 3 ] 1 ]`; padding is left out.

    Raises:
        ValueError: a number that is no token.
    """
    tokens = [int(token) for token in input_ids]
    for place, token in enumerate(tokens):
        if not 0 <= token < len(VOCABULARY):
            raise ValueError(f"input_ids: got {token} at {place}, allowed are 0..{len(VOCABULARY) - 1}.")
    return " ".join(VOCABULARY[token] for token in tokens if token != PADDING)


def check(setting: ListOpsSetting) -> None:
    """
    Raises:
        ValueError: a field out of range, or lengths that fewer than one in 1,000 trees have.
    """
    require_integer("min_length", setting.min_length, 1)
    require_integer("max_length", setting.max_length, SMALLEST_TREE + 1)
    require_integer("max_depth", setting.max_depth, 2)
    require_integer("max_arguments", setting.max_arguments, 2)
    for name, most in (("max_length", 2**16), ("max_depth", 100), ("max_arguments", 15)):
        if getattr(setting, name) > most:
            raise ValueError(f"{name}: got {getattr(setting, name)}, allowed is at most {most}.")
    if setting.max_length < setting.min_length + 2:
        raise ValueError(
            f"max_length: got {setting.max_length}, allowed is at least {setting.min_length + 2}: lengths are above "
            f"min_length ({setting.min_length}) and below max_length."
        )
    share = length_shares(setting)[setting.min_length + 1 :].sum()
    if share < LEAST_SHARE:
        raise ValueError(
            f"min_length, max_length: got {setting.min_length} and {setting.max_length}, but a share of {share:.0e} "
            f"of the trees of depth {setting.max_depth} with {setting.max_arguments} arguments is between them; "
            f"allowed are lengths that a share of {LEAST_SHARE:.0e} has."
        )


def length_shares(setting: ListOpsSetting) -> np.ndarray:
    """
    The probability of each length below `max_length` of a tree whose root is an operator, (max_length,) float64, by
    the recursion over depths: f(x) = 3/4 x + 1/4 x^2 * mean over n of g(x)^n, with g one level deeper.
    """
    size = 1 << (setting.max_length * (setting.max_arguments + 1)).bit_length()
    node = np.zeros(setting.max_length)
    node[1] = 1.0
    for depth in range(setting.max_depth - 1, 0, -1):
        spectrum = np.fft.rfft(node, size)
        powers = sum(spectrum**count for count in range(2, setting.max_arguments + 1)) / (setting.max_arguments - 1)
        operator = np.zeros(setting.max_length)
        operator[2:] = np.maximum(np.fft.irfft(powers, size)[: setting.max_length - 2], 0.0)
        if depth > 1:
            node = OPERATOR_SHARE * operator
            node[1] += 1 - OPERATOR_SHARE
    return operator


@dataclass
class _Level:
    """Operators of one depth, those of one tree and one parent together: which arguments of each are operators."""

    tree: np.ndarray  # (operators,) int64
    arguments: np.ndarray  # (operators,) int64
    inner: np.ndarray  # (operators,) uint32; bit 2 * i is set where argument i is an operator
    inner_count: np.ndarray  # (operators,) int64

    def where(self, keep: np.ndarray) -> "_Level":
        return _Level(self.tree[keep], self.arguments[keep], self.inner[keep], self.inner_count[keep])


def make_chunk(setting: ListOpsSetting, draws: Draws) -> Rows:
    """As many rows as come of `TREES` trees: first their shapes, then the tokens of those whose length is right."""
    levels = _shapes(setting, draws)
    spans = _spans(levels)
    lengths = spans[0]
    starts = _starts(levels, spans)
    input_ids = draws.below(10, int(lengths.sum())).astype(np.uint8)
    operators = []
    for start, span in zip(starts, spans):
        operators.append(draws.below(4, len(start)) + MINIMUM)
        input_ids[start] = operators[-1]
        input_ids[start + span - 1] = END
    return Rows({"input_ids": input_ids}, lengths, _values(levels, spans, starts, operators, input_ids))


def _shapes(setting: ListOpsSetting, draws: Draws) -> list[_Level]:
    """Levels of the trees whose length is right; a tree is left as soon as it is too long."""
    tree = np.arange(TREES)
    lengths = np.zeros(TREES, dtype=np.int64)
    levels = []
    for depth in range(1, setting.max_depth):
        arguments = draws.below(setting.max_arguments - 1, len(tree)).astype(np.int64) + 2
        inner = np.zeros(len(tree), dtype=np.uint32)
        if depth + 1 < setting.max_depth:
            # Two bits an argument, both 0 with probability 1/4.
            lots = draws.raw(len(tree))
            inner = ~(lots | lots >> np.uint32(1)) & np.uint32(0x55555555)
            inner &= ((np.int64(1) << 2 * arguments) - 1).astype(np.uint32)
        inner_count = _BITS[inner & np.uint32(0xFFFF)] + _BITS[inner >> np.uint32(16)]
        levels.append(_Level(tree, arguments, inner, inner_count))
        lengths += np.bincount(tree, 2 + arguments - inner_count, minlength=TREES).astype(np.int64)
        tree = np.repeat(tree, inner_count)
        at_least = lengths + SMALLEST_TREE * np.bincount(tree, minlength=TREES)
        lengths[at_least >= setting.max_length] = setting.max_length
        tree = tree[lengths[tree] < setting.max_length]
        if not len(tree):
            break
    right = (lengths > setting.min_length) & (lengths < setting.max_length)
    return [level.where(right[level.tree]) for level in levels]


def _sums(numbers: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums of so many neighbouring numbers each; counts sum up to all of them."""
    before = np.zeros(len(numbers) + 1, dtype=numbers.dtype)
    np.cumsum(numbers, out=before[1:])
    ends = np.cumsum(counts)
    return before[ends] - before[ends - counts]


def _spans(levels: list[_Level]) -> list[np.ndarray]:
    """Tokens of every operator with all that is inside it, per level (operators,) int64."""
    spans: list[np.ndarray] = []
    for level in reversed(levels):
        span = 2 + level.arguments - level.inner_count
        spans.append(span + _sums(spans[-1], level.inner_count) if spans else span)
    return spans[::-1]


def _starts(levels: list[_Level], spans: list[np.ndarray]) -> list[np.ndarray]:
    """The place of every operator's token among those of all rows, per level (operators,) int64."""
    starts = [np.cumsum(spans[0]) - spans[0]]
    for level, span in zip(levels, spans[1:]):
        slots = np.arange(16, dtype=np.uint32)[: int(level.arguments.max(initial=0))]
        parent, slot = np.nonzero((level.inner[:, None] >> 2 * slots) & np.uint32(1))
        # Operators among the arguments before this one take more than a token.
        more = np.cumsum(span - 1) - (span - 1)
        first = np.cumsum(level.inner_count) - level.inner_count
        starts.append(starts[-1][parent] + 1 + slot + more - more[first[parent]])
    return starts


def _values(
    levels: list[_Level],
    spans: list[np.ndarray],
    starts: list[np.ndarray],
    operators: list[np.ndarray],
    input_ids: np.ndarray,
) -> np.ndarray:
    """
    What the root of every row is, (rows,) int64. How often each digit is an argument of an operator is what stands
    between its brackets, without what stands between inner brackets, with what inner operators are. Overflow of the
    sums over all tokens cancels out.
    """
    before = np.zeros(len(input_ids) + 1, dtype=np.uint64)
    np.cumsum(_ONE_OF[input_ids], out=before[1:])
    value = correction = np.zeros(0, dtype=np.uint64)
    for level, span, start, operator in zip(*(parts[::-1] for parts in (levels, spans, starts, operators))):
        inside = before[start + span] - before[start]
        counts = inside + (_sums(correction, level.inner_count) if len(correction) else np.uint64(0))
        value = _results(operator, level.arguments, counts)
        correction = _ONE_OF[value] - inside
    return value


def _results(operator: np.ndarray, arguments: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """
    What each operator makes of its arguments, (operators,) int64.

    Args:
        operator: tokens, (operators,).
        arguments: how many, (operators,).
        counts: how many arguments are digit d, in bits 4 d to 4 d + 3, (operators,) uint64.
    """
    up_to = counts * _EVERY_DIGIT  # bits 4 d to 4 d + 3: how many arguments are at most d
    last = arguments - 1
    low = np.where(operator == MAXIMUM, last, np.where(operator == MEDIAN, last // 2, 0))
    high = np.where(operator == MEDIAN, arguments // 2, low)
    below = np.zeros_like(arguments)
    total = arguments * 9
    for digit in range(9):
        known = (up_to >> np.uint64(4 * digit) & np.uint64(15)).astype(np.int64)
        below += known <= low
        below += known <= high
        total -= known
    return np.where(operator == SUM, total % 10, below // 2)
