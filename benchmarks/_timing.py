"""
How two ways of doing the same work are timed against each other.

All pieces of work take turns: a round runs each once, in an order of its own, after a warm-up that is not counted. The
ratio of a round is the work over its reference in that round; reported are the median of the rounds' ratios and its
95 % interval (bootstrap over rounds). The reference runs twice in every round: the ratio of its second run to its
first, "A/A", is the same model against itself and shows the noise of that very run.

A bound is met when the interval's upper end is below the bound plus half the width of the A/A interval, and fails when
the interval's lower end exceeds the bound. Between the two the run has not decided.

Times are processor time of one thread unless the clock is asked for: what else runs on the machine then counts only
by what it takes from caches and from the processor's frequency. Both are recorded.
"""

import gc
import math
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch


CLOCKS = {"processor": time.process_time, "wall": time.perf_counter}
REFERENCE, AGAIN = "reference", "reference again"
SHORTEST = 0.01  # seconds of one sample: shorter work is repeated within a sample
PACKAGES = ("torch", "transformers", "numpy", "safetensors")


@dataclass(frozen=True)
class Work:
    """Something to time, `run(prepare())`; only `run` is timed. Work that must be prepared is not repeated."""

    run: Callable
    prepare: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Ratio:
    """
    Median of the rounds' ratios with its 95 % interval, that of the reference against itself, and the median seconds
    of both sides.
    """

    ratio: float
    low: float
    high: float
    again: float
    again_low: float
    again_high: float
    seconds: float
    reference_seconds: float
    rounds: int

    @property
    def noise(self) -> float:
        """Half the width of the A/A interval."""
        return (self.again_high - self.again_low) / 2

    def meets(self, bound: float) -> bool:
        """Whether the interval is below the bound, but for the noise of the run."""
        return self.high < bound + self.noise

    def fails(self, bound: float) -> bool:
        """Whether the interval is beyond the bound."""
        return self.low > bound

    def row(self, bound: float | None = None) -> dict:
        """For JSON."""
        row = {
            "ratio": self.ratio,
            "interval": [self.low, self.high],
            "again": self.again,
            "again_interval": [self.again_low, self.again_high],
            "again_half_width": self.noise,
            "seconds": self.seconds,
            "reference_seconds": self.reference_seconds,
            "rounds": self.rounds,
        }
        if bound is not None:
            row |= {"bound": bound, "met": self.meets(bound), "fails": self.fails(bound)}
        return row


def interval(values: Sequence[float], resamples: int = 4000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    values = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.quantile(np.median(values[drawn], axis=1), [0.025, 0.975])
    return float(low), float(high)


def ratio_of(measured: Sequence[float], reference: Sequence[float], again: Sequence[float]) -> Ratio:
    """
    The ratio of seconds of three runs, one entry a round.

    Raises:
        ValueError: not the same number of rounds, or fewer than two.
    """
    measured, reference, again = (np.asarray(values, dtype=float) for values in (measured, reference, again))
    if not len(measured) == len(reference) == len(again) > 1:
        given = len(measured), len(reference), len(again)
        raise ValueError(f"rounds: got {given}, allowed is the same number for all three, at least 2.")
    ratios, same = measured / reference, again / reference
    return Ratio(
        float(np.median(ratios)),
        *interval(ratios),
        float(np.median(same)),
        *interval(same),
        float(np.median(measured)),
        float(np.median(reference)),
        len(ratios),
    )


def take_turns(
    works: dict[str, Work], seconds: float, fewest: int = 7, most: int = 60, warm_up: int = 1, seed: int = 0
) -> dict[str, dict[str, list[float]]]:
    """
    Run the works in turns until `seconds` of wall time are over, at least `fewest` and at most `most` rounds.

    Returns:
        clock -> work -> seconds of one call, an entry a round.
    """
    order, names = random.Random(seed), list(works)
    calls = {name: _calls(work, warm_up) for name, work in works.items()}
    found: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in names} for clock in CLOCKS}
    deadline, collecting = time.perf_counter() + seconds, gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        done = 0
        while done < fewest or (done < most and time.perf_counter() < deadline):
            for name in order.sample(names, len(names)):
                for clock, value in _sample(works[name], calls[name]).items():
                    found[clock][name].append(value)
            done += 1
            if done % 8 == 0:
                gc.collect()
    finally:
        if collecting:
            gc.enable()
    return found


def _calls(work: Work, warm_up: int) -> int:
    """Calls in a sample, after the warm-up."""
    for _ in range(warm_up):
        _sample(work, 1)
    if work.prepare is not None:
        return 1
    once = min(_sample(work, 1)["wall"] for _ in range(2))
    return max(1, math.ceil(SHORTEST / max(once, 1e-7)))


def _sample(work: Work, calls: int) -> dict[str, float]:
    given = () if work.prepare is None else (work.prepare(),)
    began = {clock: now() for clock, now in CLOCKS.items()}
    for _ in range(calls):
        work.run(*given)
    return {clock: (now() - began[clock]) / calls for clock, now in CLOCKS.items()}


def compare(
    measured: Work | Sequence[Work],
    reference: Work | Sequence[Work],
    seconds: float,
    clock: str = "processor",
    **turns,
) -> tuple[Ratio, dict[str, dict[str, float]]]:
    """
    Time work against its reference; several pieces on a side count as their sum.

    Returns:
        the ratio by the chosen clock, and both clocks' ratio with its interval.
    """
    sides = {"measured": measured, REFERENCE: reference, AGAIN: reference}
    parts = {side: [works] if isinstance(works, Work) else list(works) for side, works in sides.items()}
    flat = {f"{side} {i}": work for side, works in parts.items() for i, work in enumerate(works)}
    taken = take_turns(flat, seconds, **turns)
    ratios = {
        name: ratio_of(
            *(
                np.sum([samples[f"{side} {i}"] for i in range(len(parts[side]))], axis=0)
                for side in ("measured", REFERENCE, AGAIN)
            )
        )
        for name, samples in taken.items()
    }
    both = {name: {"ratio": found.ratio, "interval": [found.low, found.high]} for name, found in ratios.items()}
    return ratios[clock], both


def fix_threads(count: int) -> None:
    """So many threads for the operators, one between them; before any work."""
    torch.set_num_threads(count)
    if torch.get_num_interop_threads() != 1:
        torch.set_num_interop_threads(1)


def machine() -> dict:
    """What a figure depends on: processor, cores, load, versions, and the commit of this repository."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": list(os.getloadavg()),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "commit": commit(),
    }


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def commit() -> str | None:
    """The commit that is checked out, with a plus where files were changed since; None outside a repository."""
    folder = Path(__file__).parents[1]

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short", "HEAD")
    return head and head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
