"""Token accuracy over the positions that have a label."""

import numpy as np


IGNORED = -100


def token_accuracy(predictions: np.ndarray, labels: np.ndarray, shift: bool = True) -> dict[str, float | int]:
    """
    The share of labels that are predicted, where there is a label (not -100).

    Args:
        predictions: token ids (rows, length), or logits (rows, length, vocabulary).
        labels: (rows, length).
        shift: the prediction at position i - 1 is of label i, as in causal models; False: the prediction at i.

    Returns:
        `accuracy`, and the numbers of `correct` predictions and of `targets`.

    Raises:
        ValueError: the shapes do not fit, or there is no label.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if labels.ndim != 2 or predictions.ndim not in (2, 3) or predictions.shape[:2] != labels.shape:
        raise ValueError(
            f"predictions, labels: got shapes {predictions.shape} and {labels.shape}, allowed are (rows, length) or "
            "(rows, length, vocabulary) and (rows, length)."
        )
    if predictions.ndim == 3:
        predictions = predictions.argmax(axis=-1)
    if shift:
        predictions, labels = predictions[:, :-1], labels[:, 1:]
    asked = labels != IGNORED
    targets = int(asked.sum())
    if not targets:
        raise ValueError(f"labels: got {IGNORED} everywhere, allowed is at least one label.")
    correct = int((predictions[asked] == labels[asked]).sum())
    return {"accuracy": correct / targets, "correct": correct, "targets": targets}
