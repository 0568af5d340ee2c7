"""Accuracy of one label a row, beside what the most frequent label alone gives."""

import numpy as np


def label_accuracy(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float | int]:
    """
    The share of labels that are predicted.

    Args:
        predictions: labels (rows,), or logits (rows, classes).
        labels: (rows,).

    Returns:
        `accuracy`, the numbers of `correct` predictions and of `targets`, and `majority`, the accuracy of whoever
        always says the most frequent of these labels.

    Raises:
        ValueError: the shapes do not fit, or there is no row.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if labels.ndim != 1 or predictions.ndim not in (1, 2) or len(predictions) != len(labels) or not len(labels):
        raise ValueError(
            f"predictions, labels: got shapes {predictions.shape} and {labels.shape}, allowed are (rows,) or (rows, "
            "classes) and (rows,), of at least one row."
        )
    if predictions.ndim == 2:
        predictions = predictions.argmax(axis=-1)
    correct, targets = int((predictions == labels).sum()), len(labels)
    majority = int(np.unique(labels, return_counts=True)[1].max())
    return {"accuracy": correct / targets, "correct": correct, "targets": targets, "majority": majority / targets}
