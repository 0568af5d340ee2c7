"""Selective copying, memorization and compression."""

import numpy as np

from .draws import Draws
from .settings import MadSetting


def selective_copying(
    setting: MadSetting, rows: int, draws: Draws, evaluated: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """
    Tokens to copy with blanks before, between and after them (each blank in a gap of its own choice), the copy token,
    and as many blanks as there are tokens to copy, in whose places the labels are those tokens in their order. The
    blank is the last token of the vocabulary but one, the copy token the last.

    Returns:
        input_ids and labels, (rows, sequence_length) int32. The copy token predicts the first label, the blanks the
        others.
    """
    copies, blank = setting.copies, setting.vocab_size - 2
    blanks = setting.sequence_length - 2 * copies - 1
    tokens = draws.below(blank, rows, copies)
    each = np.arange(rows)[:, None]
    gaps = draws.below(copies + 1, rows, blanks) + each * (copies + 1)
    in_gap = np.bincount(gaps.ravel(), minlength=rows * (copies + 1)).reshape(rows, copies + 1)
    places = np.arange(copies) + in_gap[:, :copies].cumsum(axis=1)
    input_ids = np.full((rows, setting.sequence_length), blank, dtype=np.int32)
    input_ids.ravel()[places + each * setting.sequence_length] = tokens
    input_ids[:, copies + blanks] = setting.vocab_size - 1
    labels = np.full_like(input_ids, -100)
    labels[:, -copies:] = tokens
    return input_ids, labels


def facts(setting: MadSetting, draws: Draws) -> np.ndarray:
    """
    The value of every key of the memorization task, (keys,) int32: keys are the lower half of the vocabulary without
    its last token, values different tokens of the upper half.
    """
    keys = (setting.vocab_size - 1) // 2
    return draws.permutations(1, setting.vocab_size - 1 - keys)[0, :keys].astype(np.int32) + np.int32(keys)


def memorization(
    setting: MadSetting, rows: int, draws: Draws, evaluated: bool = False, values: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """
    Rows of keys, each followed by the vocabulary's last token, in whose place the label is the key's value, the same
    in every row. No row shows a value. In a train split all keys are equally frequent (or differ by one), so every
    fact that is asked for was taught; elsewhere they are drawn independently.

    Args:
        values: what `facts` gave.

    Returns:
        input_ids and labels, (rows, sequence_length) int32.
    """
    known, pairs = len(values), setting.sequence_length // 2
    if evaluated:
        keys = draws.below(known, rows, pairs)
    else:
        decks = draws.permutations(-(-rows * pairs // known), known)
        keys = decks.ravel()[: rows * pairs].reshape(rows, pairs)
    input_ids = np.full((rows, pairs, 2), setting.vocab_size - 1, dtype=np.int32)
    input_ids[:, :, 0] = keys
    labels = np.full_like(input_ids, -100)
    labels[:, :, 1] = values.take(keys)
    return input_ids.reshape(rows, -1), labels.reshape(rows, -1)


def compression(
    setting: MadSetting, rows: int, draws: Draws, evaluated: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """
    Random tokens, then the vocabulary's last token, which must carry them: a `CompressionDecoder` sees only the state
    at that token. So the labels are not for a shifted loss: label i is token i, and the last one is -100.

    Returns:
        input_ids and labels, (rows, sequence_length) int32.
    """
    carrier = setting.vocab_size - 1
    input_ids = np.full((rows, setting.sequence_length), carrier, dtype=np.int32)
    input_ids[:, :-1] = draws.below(carrier, rows, setting.sequence_length - 1)
    labels = input_ids.copy()
    labels[:, -1] = -100
    return input_ids, labels
