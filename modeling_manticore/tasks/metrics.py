"""Metrics of language models and classifiers, as plain functions."""

import math
from collections.abc import Sequence

import numpy as np


NORMAL_95 = 1.959963984540054


def bits_per_byte(nats: Sequence[float], sizes: Sequence[int]) -> float:
    """
    Bits that a model needs for a byte of text: the sum of nats over the sum of bytes, over ln 2. It does not depend
    on how a tokenizer cuts the text, so that models with different tokenizers compare.

    Args:
        nats: negative log-likelihood of every text.
        sizes: UTF-8 bytes of every text.

    Raises:
        ValueError: the lengths differ, there is no text, or a number is no such size.
    """
    total, count = _sums(nats, sizes, "sizes")
    return total / count / math.log(2)


def perplexity(nats: Sequence[float], tokens: Sequence[int]) -> float:
    """
    exp(sum of nats / sum of tokens), infinite where that is beyond a float. Comparable for one tokenizer only.

    Raises:
        ValueError: as `bits_per_byte`.
    """
    total, count = _sums(nats, tokens, "tokens")
    mean = total / count
    return math.exp(mean) if mean < 709 else math.inf


def classification_accuracy(
    predictions: np.ndarray, labels: np.ndarray, train_labels: np.ndarray | None = None
) -> dict[str, float | int | bool]:
    """
    Accuracy beside what always saying one class gives.

    Args:
        predictions: classes (rows), or logits (rows, classes).
        labels: classes (rows).
        train_labels: the class that the baseline says is the most frequent one here (the smallest of several); None:
            in `labels`, the most that any constant answer reaches.

    Returns:
        `accuracy`; `low` and `high`, its 95 % interval over rows (Wilson's); `majority`, the baseline's accuracy;
        `learned`, whether the interval is above it; and the numbers of `correct` predictions and of `targets`.

    Raises:
        ValueError: the shapes do not fit, or there is no row.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if labels.ndim != 1 or predictions.ndim not in (1, 2) or len(predictions) != len(labels) or not len(labels):
        raise ValueError(
            f"predictions, labels: got shapes {predictions.shape} and {labels.shape}, allowed are (rows) or "
            "(rows, classes) and (rows), with at least one row."
        )
    said = labels if train_labels is None else np.asarray(train_labels)
    if said.ndim != 1 or not len(said):
        raise ValueError(f"train_labels: got shape {said.shape}, allowed is (rows) with at least one row.")
    if predictions.ndim == 2:
        predictions = predictions.argmax(axis=-1)
    rows, correct = len(labels), int((predictions == labels).sum())
    classes, counts = np.unique(said, return_counts=True)
    majority = float((labels == classes[counts.argmax()]).mean())
    low, high = wilson(correct, rows)
    return {
        "accuracy": correct / rows,
        "low": low,
        "high": high,
        "majority": majority,
        "learned": low > majority,
        "correct": correct,
        "targets": rows,
    }


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson's score interval)."""
    share, square = successes / trials, NORMAL_95**2
    centre = (share + square / (2 * trials)) / (1 + square / trials)
    half = NORMAL_95 * math.sqrt(share * (1 - share) / trials + square / (4 * trials**2)) / (1 + square / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def _sums(nats: Sequence[float], counts: Sequence[int], name: str) -> tuple[float, int]:
    nats, counts = np.asarray(nats, dtype=np.float64), np.asarray(counts)
    if nats.ndim != 1 or nats.shape != counts.shape or not len(nats):
        raise ValueError(
            f"nats, {name}: got shapes {nats.shape} and {counts.shape}, allowed are two lists of one length."
        )
    if np.isnan(nats).any() or (nats < 0).any():
        raise ValueError("nats: got a number that is negative or NaN, allowed are numbers of at least 0.")
    if counts.dtype.kind not in "iu" or (counts < 0).any() or not counts.sum():
        raise ValueError(f"{name}: got {counts.tolist()[:5]}, allowed are integers of at least 0, not all 0.")
    return float(nats.sum()), int(counts.sum())
