"""Whether a claim holds: computed from runs, never typed."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .intervals import Interval
from .results import Column, Results
from .schema import Claim


ENDS = {"low": "lower end", "high": "upper end"}


@dataclass(frozen=True)
class Verdict:
    """
    `holds` is None where the data cannot tell; `measured` says in a sentence what was found. `contradicts` is whether
    means are on the wrong side of what nevertheless lies within their intervals.
    """

    holds: bool | None
    measured: str
    contradicts: bool = False

    @property
    def word(self) -> str:
        """In tables."""
        if self.holds and self.contradicts:
            return "not refuted"
        return {True: "yes", False: "no", None: "not decided"}[self.holds]


def judge(claim: Claim, results: Results) -> Verdict:
    """
    - "at_least": on enough columns the upper end of the interval of the paired difference model - rival is at least 0,
      and where the rival learned the task the model did too.
    - "better": on enough columns the lower end is above 0.
    - "cache": as "at_least", and the model's cache bytes are at most `share` of those of the component with most.
    - "number": a value in a JSON file of results is within its bounds; the mean of an interval is if all of the
      interval is.

    Columns that neither the model nor its rival learned are left out of the count. The claim is undecided while runs
    are missing, with one seed, where nothing was learned, or where a bound is inside an interval.

    Raises:
        ValueError: a JSON file or a value in it that "number" needs is broken.
    """
    if claim.test == "number":
        return _number(claim, results)
    missing = [column for column in results.columns if not _is_ready(claim, results, column)]
    if missing:
        return Verdict(None, "not run" if not results.lines else f"unfinished: {_names(missing)}")
    if len(results.experiment.training.seeds) < 2:
        return Verdict(None, "one seed has no interval")
    learned = [column for column in results.columns if _ranks(claim, results, column)]
    left_out = [column for column in results.columns if column not in learned]
    note = f"; left out, since neither of the two learned it: {_names(left_out)}" if left_out else ""
    if not learned:
        return Verdict(None, f"neither of the two learned anything{note}")
    needed = len(learned) if claim.tasks is None else claim.tasks
    passed = [column for column in learned if TESTS[claim.test](claim, results, column)]
    ahead = [column for column in learned if _found(claim, results, column)[0].mean >= 0]
    parts = [f"{column.name} {_difference(claim, results, column)}" for column in learned]
    measured = f"{len(passed)} of {len(learned)} (needed: {needed}; mean difference at least 0: {len(ahead)}): "
    measured += "; ".join(parts) + note + _choices_note(claim, results)
    return Verdict(len(passed) >= needed, measured, len([c for c in passed if c in ahead]) < needed)


def _choices_note(claim: Claim, results: Results) -> str:
    """That a hybrid is none, where its search chose one component for all blocks."""
    single, count = results.single_choices(claim.model)
    return f"; in {single} of {count} runs one component alone was chosen" if single else ""


def _is_ready(claim: Claim, results: Results, column: Column) -> bool:
    named = claim.against in results.models and claim.test != "cache"
    rivals = [claim.against] if named else results.components
    return bool(rivals) and all(results.is_complete(column, model) for model in (claim.model, *rivals))


def _ranks(claim: Claim, results: Results, column: Column) -> bool:
    """Whether a difference says anything: of two models at chance neither is better."""
    return any(results.learned(column, name) for name in (claim.model, results.rival(column, claim.against)))


def _found(claim: Claim, results: Results, column: Column) -> tuple[Interval, str]:
    rival = results.rival(column, claim.against)
    return results.difference(column, claim.model, rival), rival


def _at_least(claim: Claim, results: Results, column: Column) -> bool:
    found, rival = _found(claim, results, column)
    return found.high >= 0 and (results.learned(column, claim.model) or not results.learned(column, rival))


def _better(claim: Claim, results: Results, column: Column) -> bool:
    return _found(claim, results, column)[0].low > 0


def _cache(claim: Claim, results: Results, column: Column) -> bool:
    own, most = _cache_bytes(claim, results, column)
    return _at_least(claim, results, column) and own <= claim.share * most


def _cache_bytes(claim: Claim, results: Results, column: Column) -> tuple[float, float]:
    """Of the model, and of the component with most: one with a state of fixed size has none."""
    own, *others = (
        results.mean_of("cache_bytes_per_token", name, column.task) for name in (claim.model, *results.components)
    )
    return own, max(others)


TESTS: dict[str, Callable[[Claim, Results, Column], bool]] = {
    "at_least": _at_least,
    "better": _better,
    "cache": _cache,
}


def _difference(claim: Claim, results: Results, column: Column) -> str:
    found, rival = _found(claim, results, column)
    scale, unit = (100, "points") if column.greater_is_better else (1, "nats")
    text = f"{scale * found.mean:+.2f} ± {scale * found.half_width:.2f} {unit} against {rival}"
    if claim.test == "cache":
        own, most = _cache_bytes(claim, results, column)
        text += f" at {own:,.0f} cache bytes a token (components: at most {most:,.0f})"
    return text


def _names(columns: list[Column]) -> str:
    return ", ".join(column.name for column in columns)


def _number(claim: Claim, results: Results) -> Verdict:
    file = Path(results.experiment.output) / claim.file
    if not file.is_file():
        return Verdict(None, "not run")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: it is not JSON ({error}).") from error
    around: object = None
    for key in claim.path.split("/"):
        try:
            around = value
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise ValueError(f"{file}: there is no {claim.path!r} (at {key!r}).") from error
    if not _is_number(value):
        given = value if isinstance(value, float) else type(value).__name__
        raise ValueError(f"{file}: {claim.path!r} is {given}, allowed is a number.")
    low, high = claim.at_least, claim.at_most
    bounds = [f"{word} {bound:g}" for word, bound in (("at least", low), ("at most", high)) if bound is not None]
    text, half = _in_interval(key, value, around)
    ends = (value - half, value + half)
    within = [(low is None or end >= low) and (high is None or end <= high) for end in ends]
    outside = (low is not None and ends[1] < low) or (high is not None and ends[0] > high)
    holds = True if all(within) else False if outside else None
    return Verdict(holds, f"{text} (needed: {' and '.join(bounds)})")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _in_interval(key: str, value: float, around: object) -> tuple[str, float]:
    """
    A number, in words, and half of its interval's width. One that is the mean or an end of an interval is told with
    what the rest of the interval says; an end has no width of its own.
    """
    if not isinstance(around, dict) or key not in ("mean", "low", "high"):
        return f"{value:.4g}", 0.0
    mean, half = around.get("mean"), around.get("half_width")
    if not (_is_number(mean) and _is_number(half)):
        return f"{value:.4g}", 0.0
    text = f"{mean:.4g} ± {half:.4g}"
    return (text, half) if key == "mean" else (f"{text}, {ENDS[key]} {value:.4g}", 0.0)
