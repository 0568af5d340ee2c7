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
        input_ids and labels, (rows, sequence_length) int64: labels are the values of keys shown before, else -100.
    """
    usable = setting.vocab_size - setting.noise_vocab_size
    keys_known, pairs = usable // 2, setting.sequence_length // 2
    earlier = pairs - 1
    index = np.arange(rows)[:, None]
    values_of = keys_known + draws.below(usable - keys_known, rows, keys_known)
    keys = draws.below(keys_known, rows, pairs)
    shown = np.ones((rows, pairs), dtype=bool)
    if setting.noise:
        shown[:, :earlier] = ~draws.happens(setting.noise, rows, earlier)
        shown[index[:, 0], draws.below(earlier, rows)] = True

    # Where each key is shown first; noise writes to a column of its own.
    columns = np.where(shown, keys, keys_known)[:, :earlier]
    first = np.full(rows * (keys_known + 1), earlier, dtype=np.int64)
    np.minimum.at(first, (columns + index * (keys_known + 1)).ravel(), np.tile(np.arange(earlier), rows))
    first = first.reshape(rows, keys_known + 1)
    lots = np.where(first[:, :keys_known] < earlier, draws.raw(rows, keys_known).astype(np.int64), -1)
    keys[:, earlier] = lots.argmax(axis=1)

    values = values_of[index, keys]
    known = (first[index, keys] < np.arange(pairs)) & shown
    input_ids = np.stack([keys, values], axis=2)
    if setting.noise:
        noise = usable + draws.below(setting.noise_vocab_size, rows, pairs, 2)
        input_ids = np.where(shown[:, :, None], input_ids, noise)
    labels = np.full_like(input_ids, -100)
    labels[:, :, 1] = np.where(known, values, -100)
    return input_ids.reshape(rows, -1), labels.reshape(rows, -1)
