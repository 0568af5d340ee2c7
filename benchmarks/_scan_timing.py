"""Times of things of very different length that take turns, and their ratios with bootstrap intervals."""

import random
from collections.abc import Callable
from statistics import median

from _timing import CLOCKS, interval


def take_turns(
    runs: dict[str, Callable[[], object]], rounds: int, budget: float, least: int = 3, seed: int = 0
) -> dict[str, dict[str, list[float]]]:
    """
    Seconds of every run in every round, in an order that each round draws anew.

    Args:
        budget: seconds; a run that has used them up stays out of later rounds, but not of the first `least`.

    Returns:
        clock -> run -> seconds, an entry for every round that it took part in; these are the first ones.
    """
    draw = random.Random(seed)
    seconds: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in runs} for clock in CLOCKS}
    for done in range(rounds):
        used = seconds["wall"]
        names = [name for name in runs if len(used[name]) == done and (done < least or sum(used[name]) < budget)]
        for name in draw.sample(names, len(names)):
            began = {clock: now() for clock, now in CLOCKS.items()}
            runs[name]()
            for clock, now in CLOCKS.items():
                seconds[clock][name].append(now() - began[clock])
    return seconds


def ratio(above: list[float], below: list[float]) -> dict:
    """Median over the rounds that both have of the ratio within a round, with its 95 % bootstrap interval."""
    ratios = [a / b for a, b in zip(above, below)]  # stops at the shorter one
    return {"median": median(ratios), "interval": list(interval(ratios)), "rounds": len(ratios)}


def half_width(found: dict) -> float:
    """Half the width of a ratio's interval: of a thing against itself, what the measurement cannot tell apart."""
    low, high = found["interval"]
    return (high - low) / 2


def shown(found: dict, digits: int = 2) -> str:
    """`median [low, high]`."""
    low, high = found["interval"]
    return f"{found['median']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
