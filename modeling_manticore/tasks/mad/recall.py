"""
In-context recall, plain and noisy: pairs of a key and a value, with a new mapping in every row. When a key comes
again, its value follows from the row.
"""

import numpy as np

from .draws import Draws
from .settings import MadSetting


def recall(setting: MadSetting, rows: int, draws: Draws, evaluated: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """
    Rows of pairs. Keys are the lower half of the vocabulary without noise, values the upper half; every key has one
    value in a row, drawn independently. With noise, two tokens of the noise vocabulary are in the place of a pair.
    The last pair has a key that was shown before.

    Returns:
        input_ids and labels, (rows, sequence_length) int32: labels are the values of keys shown before, else -100.
    """
    usable = setting.vocab_size - setting.noise_vocab_size
    known_keys, pairs = usable // 2, setting.sequence_length // 2
    earlier = pairs - 1
    values_of = draws.below(usable - known_keys, rows, known_keys) + np.int32(known_keys)
    keys = draws.below(known_keys, rows, pairs)
    shown = None
    if setting.noise:
        shown = np.ones((rows, pairs), dtype=bool)
        shown[:, :earlier] = ~draws.happens(setting.noise, rows, earlier)
        shown[np.arange(rows), draws.below(earlier, rows)] = True
    before, ever = _shown_before(keys[:, :earlier], None if shown is None else shown[:, :earlier], known_keys)
    keys[:, earlier] = np.where(ever, draws.raw(rows, known_keys).astype(np.int64), -1).argmax(axis=1)

    values = values_of.ravel().take(keys + np.arange(rows)[:, None] * known_keys)
    input_ids = np.empty((rows, pairs, 2), dtype=np.int32)
    input_ids[:, :, 0], input_ids[:, :, 1] = keys, values
    labels = np.full_like(input_ids, -100)
    # A product instead of a choice: random branches cost more than all the rest.
    labels[:, :earlier, 1] = (values[:, :earlier] + np.int32(100)) * before - np.int32(100)
    labels[:, earlier, 1] = values[:, earlier]
    if shown is not None:
        places = np.flatnonzero(~shown)
        input_ids.reshape(-1, 2)[places] = draws.below(setting.noise_vocab_size, len(places), 2) + np.int32(usable)
    return input_ids.reshape(rows, -1), labels.reshape(rows, -1)


def _shown_before(keys: np.ndarray, shown: np.ndarray | None, known_keys: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Args:
        keys: (rows, pairs).
        shown: where there is a pair, (rows, pairs); None: everywhere.

    Returns:
        Whether there is a pair whose key was shown earlier in the row (rows, pairs), and whether the row shows a key
        at all (rows, known_keys).
    """
    rows, pairs = keys.shape
    before = np.zeros((rows, pairs), dtype=bool)
    if known_keys <= 64:
        # The keys shown so far are bits of one number.
        number = next(
            kind for kind in (np.uint8, np.uint16, np.uint32, np.uint64) if known_keys <= 8 * kind().itemsize
        )
        keys = keys.astype(number)
        bits = number(1) << keys
        if shown is not None:
            bits *= shown
        seen = np.bitwise_or.accumulate(bits, axis=1)
        before[:, 1:] = (seen[:, :-1] >> keys[:, 1:]) & number(1)
        ever = (seen[:, -1:] >> np.arange(known_keys, dtype=number)) & number(1) == 1
    else:
        # Where each key is shown first; noise writes to a column of its own.
        width = known_keys + 1
        cells = (keys if shown is None else np.where(shown, keys, known_keys)) + np.arange(rows)[:, None] * width
        first = np.full(rows * width, pairs, dtype=np.int64)
        np.minimum.at(first, cells.ravel(), np.tile(np.arange(pairs), rows))
        before = first.take(cells) < np.arange(pairs)
        ever = first.reshape(rows, width)[:, :known_keys] < pairs
    return (before if shown is None else before & shown), ever
