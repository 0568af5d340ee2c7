"""Measured results in a model card: as `model-index` and as a table of models at the budgets they had."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult

from .numbers import number, rounded


REQUIRED = ("dataset", "metric", "value")
OPTIONAL = ("model", "interval", "level", "over", "tokens", "split", "dataset_id", "task")


def check_results(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """
    Results as plain dictionaries, one a measurement:

        dataset, metric, value: what was measured on, what, and the number.
        model: of what, for rows to compare with; absent or None for the hybrid itself.
        interval, level, over: [low, high] that hold with confidence `level`, and over what they were taken
            ("128 test rows", "5 seeds").
        tokens: training tokens that this model has seen; equal ones are a fair comparison.
        split, dataset_id, task: of the dataset; its id on the Hub; the Hub's task, "text-generation" if absent.

    Raises:
        ValueError: names the entry and the field.
    """
    if isinstance(results, (str, Mapping)) or not isinstance(results, Sequence):
        raise ValueError(f"results: got {type(results).__name__}, allowed is a list of dictionaries.")
    checked = []
    for i, entry in enumerate(results):
        where = f"results[{i}]"
        if not isinstance(entry, Mapping):
            raise ValueError(f"{where}: got {type(entry).__name__}, allowed is a dictionary.")
        entry = {key: value for key, value in entry.items() if value is not None}
        unknown, missing = set(entry) - {*REQUIRED, *OPTIONAL}, set(REQUIRED) - set(entry)
        if unknown or missing:
            raise ValueError(
                f"{where}: got the keys {sorted(entry)}, needed are {', '.join(REQUIRED)}, allowed besides "
                f"{', '.join(OPTIONAL)}."
            )
        for field in set(entry) & {"dataset", "metric", "model", "over", "split", "dataset_id", "task"}:
            if not isinstance(entry[field], str) or not entry[field].strip():
                raise ValueError(f"{where}.{field}: got {entry[field]!r}, allowed is a text that is not empty.")
        for field in set(entry) & {"value", "level", "tokens"}:
            if not _is_number(entry[field]):
                raise ValueError(f"{where}.{field}: got {entry[field]!r}, allowed is a finite number.")
        interval = entry.get("interval")
        if interval is not None and not (
            isinstance(interval, (list, tuple))
            and len(interval) == 2
            and all(map(_is_number, interval))
            and interval[0] <= interval[1]
        ):
            raise ValueError(f"{where}.interval: got {interval!r}, allowed is [low, high].")
        checked.append(entry)
    return checked


def eval_results(results: list[dict[str, Any]]) -> list[EvalResult]:
    """`model-index` entries of the hybrid's own results; budget and interval are in the arguments of the metric."""
    return [
        EvalResult(
            task_type=entry.get("task", "text-generation"),
            dataset_type=entry.get("dataset_id", entry["dataset"]),
            dataset_name=entry["dataset"],
            dataset_split=entry.get("split"),
            metric_type=entry["metric"],
            metric_name=entry["metric"],
            metric_value=rounded(entry["value"]),
            metric_args=rounded(
                {key: _listed(entry[key]) for key in ("interval", "level", "over", "tokens") if key in entry}
            )
            or None,
        )
        for entry in results
        if "model" not in entry
    ]


def results_table(results: list[dict[str, Any]]) -> str | None:
    """Models down, measurements across, the hybrid first; None without results."""
    if not results:
        return None
    columns = list(dict.fromkeys((entry["dataset"], entry.get("split"), entry["metric"]) for entry in results))
    models = list(dict.fromkeys(entry.get("model") for entry in results))
    models.sort(key=lambda model: model is not None)
    heads = [" ".join(word for word in column if word) for column in columns]
    lines = [f"| model | training tokens | {' | '.join(map(_cell, heads))} |", "|---|---|" + "---|" * len(columns)]
    for model in models:
        own = [entry for entry in results if entry.get("model") == model]
        tokens = list(dict.fromkeys(number(entry["tokens"]) for entry in own if "tokens" in entry))
        cells = [_cell("**this hybrid**" if model is None else model), ", ".join(tokens) or "-"]
        for column in columns:
            found = [e for e in own if (e["dataset"], e.get("split"), e["metric"]) == column]
            cells.append(", ".join(map(_value, found)) or "-")
        lines.append(f"| {' | '.join(cells)} |")
    notes = dict.fromkeys(
        f"level {number(entry['level']) if 'level' in entry else 'unknown'}, over {entry.get('over', 'unknown')}"
        for entry in results
        if "interval" in entry
    )
    if notes:
        lines += ["", f"In brackets: intervals ({'; '.join(notes)})."]
    return "\n".join(lines)


def _value(entry: dict[str, Any]) -> str:
    text = number(entry["value"])
    return f"{text} [{', '.join(map(number, entry['interval']))}]" if "interval" in entry else text


def _cell(text: str) -> str:
    return " ".join(text.replace("|", r"\|").split())


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
