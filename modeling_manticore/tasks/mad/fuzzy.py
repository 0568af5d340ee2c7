"""Fuzzy in-context recall: keys and values are motifs of several tokens, with a new mapping in every row."""

import numpy as np

from .draws import Draws
from .settings import MadSetting


def fuzzy_recall(
    setting: MadSetting, rows: int, draws: Draws, evaluated: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """
    Rows of pairs of motifs: different tokens in random order, keys from the lower half of the vocabulary without its
    last token, values from the upper half, each of 1..motif_size tokens. The last token of the vocabulary pads the
    beginning of a row. The last pair has a key that was shown before.

    In one row, all keys that begin with the same token have one length (drawn for every token and row). Without that,
    it would not be determined whether a key goes on or its value begins. Where models are evaluated, all keys have the
    full length, as in MAD.

    Args:
        evaluated: the rows are of a validation or test split.

    Returns:
        input_ids and labels, (rows, sequence_length) int64: labels are the values of keys shown before, else -100.
    """
    size, length, padding = setting.motif_size, setting.sequence_length, setting.vocab_size - 1
    known_keys = padding // 2
    keys, key_sizes, first = _keys(setting, rows, draws, evaluated)
    pairs = first.shape[1]
    value_sizes = np.take_along_axis(1 + draws.below(size, rows, pairs), first, axis=1)

    # As many pairs as leave room for the last one, then that one, all moved to the end of the row.
    sizes = key_sizes + value_sizes
    ends = sizes.cumsum(axis=1)
    kept = ends <= length - 2 * size
    counts = kept.sum(axis=1)
    each = np.arange(rows)
    asked = (draws.raw(rows).astype(np.int64) * counts) >> 32
    starts = ends - sizes + (length - ends[each, counts - 1] - sizes[each, asked])[:, None]

    # From here on flat: the kept pairs of all rows, then the last pairs. `number` is a pair's place in (rows, pairs).
    number = np.flatnonzero(kept)
    values = np.zeros((size, rows * pairs), dtype=np.int64)
    values[:, number] = known_keys + draws.arrangements(padding - known_keys, len(number), size)
    repeated = (first != np.arange(pairs)).ravel()[number]
    number = np.concatenate([number, each * pairs + asked])
    known = np.concatenate([repeated, np.ones(rows, dtype=bool)])
    begin = starts + each[:, None] * length
    place = np.concatenate([begin[kept], (each + 1) * length - sizes[each, asked]])

    input_ids = np.full(rows * length, padding, dtype=np.int64)
    labels = np.full(rows * length, -100, dtype=np.int64)
    key_lengths, value_lengths = key_sizes.ravel()[number], value_sizes.ravel()[number]
    source = number // pairs * pairs + first.ravel()[number]
    for part in range(size):
        here = np.flatnonzero(key_lengths > part)
        input_ids[place[here] + part] = keys[part, number[here]]
        here = np.flatnonzero(value_lengths > part)
        at, tokens = place[here] + key_lengths[here] + part, values[part, source[here]]
        input_ids[at] = tokens
        labels[at] = np.where(known[here], tokens, -100)
    return input_ids.reshape(rows, length), labels.reshape(rows, length)


def _keys(setting: MadSetting, rows: int, draws: Draws, evaluated: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Keys in the order of time, more than fit: tokens (motif_size, rows * pairs), 0 beyond a key's length; lengths
    (rows, pairs); and the first pair of the row with the same key (rows, pairs).
    """
    size, length, known_keys = setting.motif_size, setting.sequence_length, (setting.vocab_size - 1) // 2
    if evaluated:
        pairs = length // (size + 1)
        sizes = np.full((rows, pairs), size)
        leads = draws.below(known_keys, rows, pairs)
    else:
        # A pair has motif_size + 1 tokens on average; a row of very short ones gets a little more padding.
        pairs = min(length // 2, 3 * length // (2 * size + 2) + 8)
        size_of = 1 + draws.below(size, rows, known_keys)
        leads = draws.below(known_keys, rows, pairs)
        sizes = np.take_along_axis(size_of, leads, axis=1)
    keys = np.zeros((size, rows * pairs), dtype=np.int64)
    keys[0] = leads.ravel()
    if size > 1:
        keys[1:] = draws.arrangements(known_keys - 1, rows * pairs, size - 1)
        keys[1:] += keys[1:] >= keys[0]
        keys[1:] *= sizes.ravel() > np.arange(1, size)[:, None]
    return keys, sizes, _first_with_the_same(keys, known_keys, rows, pairs)


def _first_with_the_same(keys: np.ndarray, known_keys: int, rows: int, pairs: int) -> np.ndarray:
    """The first pair of the row with the same key, (rows, pairs). Where the lengths differ, the first tokens do."""
    code = np.zeros(rows * pairs, dtype=np.int64)
    for tokens in keys:
        code = code * known_keys + tokens
    bits = pairs.bit_length()
    order = np.sort((code.reshape(rows, pairs) << bits) | np.arange(pairs), axis=1)
    pair, code = order & ((1 << bits) - 1), order >> bits
    begins = np.zeros((rows, pairs), dtype=np.int64)
    begins[:, 1:] = np.where(code[:, 1:] != code[:, :-1], np.arange(1, pairs), 0)
    leader = np.maximum.accumulate(begins, axis=1)
    first = np.empty((rows, pairs), dtype=np.int64)
    np.put_along_axis(first, pair, np.take_along_axis(pair, leader, axis=1), axis=1)
    return first
