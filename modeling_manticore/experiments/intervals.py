"""Intervals over seeds: Student's t, paired differences, and the exact sign-flip test."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


LEVEL = 0.95
FEWEST_FOR_P = 6  # with fewer pairs the smallest two-sided p, 2 / 2^n, is above 0.05
MOST_FLIPS = 2**16


@dataclass(frozen=True)
class Interval:
    """The mean of n values and half the width of its two-sided 95 % interval, None with one value."""

    mean: float
    half_width: float | None
    n: int

    @property
    def low(self) -> float:
        """Lower end; -inf with one value."""
        return -math.inf if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end; inf with one value."""
        return math.inf if self.half_width is None else self.mean + self.half_width


def interval(values: Sequence[float]) -> Interval:
    """
    Mean +- t_{n-1} s / sqrt(n) at 95 %.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("values: got none, allowed is at least one.")
    n = len(values)
    half = None if n == 1 else t_quantile(n - 1) * stdev(values) / math.sqrt(n)
    return Interval(fmean(values), half, n)


def paired(first: Sequence[float], second: Sequence[float]) -> Interval:
    """
    The interval of first - second, seed by seed.

    Raises:
        ValueError: there are not as many of both.
    """
    if len(first) != len(second):
        raise ValueError(f"values: got {len(first)} and {len(second)}, allowed are pairs.")
    return interval([a - b for a, b in zip(first, second)])


def sign_flip_p(differences: Sequence[float]) -> float | None:
    """
    Two-sided p of "the differences are symmetric around 0": the share of the 2^n sign patterns whose |mean| is at
    least the one found. None with fewer than 6 differences, where no p can be small.

    Raises:
        ValueError: more than 16 differences.
    """
    n = len(differences)
    if n < FEWEST_FOR_P:
        return None
    if 2**n > MOST_FLIPS:
        raise ValueError(f"differences: got {n}, allowed are at most {MOST_FLIPS.bit_length() - 1}.")
    found = abs(math.fsum(differences))
    tolerance = 1e-12 * math.fsum(map(abs, differences))
    patterns = itertools.product((1, -1), repeat=n)
    reached = sum(abs(math.fsum(s * d for s, d in zip(signs, differences))) >= found - tolerance for signs in patterns)
    return reached / 2**n


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """
    t with P(|T| <= t) = level for Student's T of `freedom` degrees, by bisection.

    Raises:
        ValueError: fewer degrees than one, or a level outside (0, 1).
    """
    if freedom < 1:
        raise ValueError(f"freedom: got {freedom}, allowed is a positive integer.")
    if not 0 < level < 1:
        raise ValueError(f"level: got {level}, allowed is a number between 0 and 1.")
    low, high = 0.0, 1.0
    while _inside(high, freedom) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def _inside(t: float, freedom: int) -> float:
    """P(|T| <= t), the finite series for whole degrees of freedom in theta = atan(t / sqrt(freedom))."""
    theta = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = freedom % 2
    term, total = (cosine, cosine) if odd else (1.0, 1.0)
    for j in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine**2 * (j - 1) / j
        total += term
    if odd:
        return 2 / math.pi * (theta + (sine * total if freedom > 1 else 0.0))
    return sine * total
