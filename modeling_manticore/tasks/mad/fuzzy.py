"""Fuzzy in-context recall: keys and values are motifs of several tokens, with a new mapping in every row."""

import numpy as np

from .draws import Draws
from .settings import MadSetting


# Added to tokens that are labels, until the row is complete: more than any token.
ANSWER = np.int32(2**20)


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
        input_ids and labels, (rows, sequence_length) int32: labels are the values of keys shown before, else -100.
    """
    size, length, padding = setting.motif_size, setting.sequence_length, setting.vocab_size - 1
    known_keys = padding // 2
    keys, key_sizes, first = _keys(setting, rows, draws, evaluated)
    pairs = first.shape[1]
    each = np.arange(rows)
    cell = first + (each * pairs)[:, None]  # where the pair is whose value this one has
    value_sizes = (draws.below(size, rows, pairs) + 1).take(cell)

    # As many pairs as leave room for the last one, which repeats one of them, all moved to the end of the row.
    sizes = key_sizes + value_sizes
    ends = sizes.cumsum(axis=1)
    kept = ends <= length - 2 * size
    counts = kept.sum(axis=1)
    asked = each * pairs + ((draws.raw(rows).astype(np.int64) * counts) >> 32)
    padded = length - ends.ravel().take(each * pairs + counts - 1) - sizes.ravel().take(asked)

    # From here on flat: the kept pairs of all rows, then the last pairs. A row has room for what the longest motif
    # could write beyond its end.
    width = length + size
    pair = np.flatnonzero(kept)
    source = cell.ravel().take(pair)
    values = np.empty((size, rows * pairs), dtype=np.int32)
    values[:, pair] = draws.arrangements(padding - known_keys, len(pair), size)
    repeated = np.concatenate([source != pair, np.ones(rows, dtype=bool)])
    starts = (ends - sizes + (padded + each * width)[:, None]).ravel().take(pair)
    starts = np.concatenate([starts, each * width + length - sizes.ravel().take(asked)])
    pair = np.concatenate([pair, asked])
    source = np.concatenate([source, cell.ravel().take(asked)])
    middles = starts + key_sizes.ravel().take(pair)

    # All motifs are written at the full length, their last tokens first: a token beyond its motif's end is at a place
    # of a token with a smaller number in its motif, so the right one is written over it later. Answers are marked.
    marks = np.int32(known_keys) + ANSWER * repeated
    flat = np.full(rows * width, padding, dtype=np.int32)
    for part in reversed(range(size)):
        flat[starts + part] = keys[part].take(pair)
        flat[middles + part] = values[part].take(source) + marks
    flat = flat.reshape(rows, width)[:, :length]
    input_ids = flat & (ANSWER - 1)
    labels = (input_ids + np.int32(100)) * (flat >= ANSWER) - np.int32(100)
    return input_ids, labels


def _keys(setting: MadSetting, rows: int, draws: Draws, evaluated: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Keys in the order of time, more than fit: tokens (motif_size, rows * pairs), 0 beyond a key's length; lengths
    (rows, pairs); and the first pair of the row with the same key (rows, pairs).
    """
    size, length, known_keys = setting.motif_size, setting.sequence_length, (setting.vocab_size - 1) // 2
    if evaluated:
        pairs = length // (size + 1)
        sizes = np.full((rows, pairs), size, dtype=np.int32)
        leads = draws.below(known_keys, rows, pairs)
    else:
        # A pair has motif_size + 1 tokens on average; a rare row of very short ones has more padding.
        pairs = min(length // 2, 5 * length // (4 * size + 4) + 8)
        size_of = draws.below(size, rows, known_keys) + 1
        leads = draws.below(known_keys, rows, pairs)
        sizes = size_of.ravel().take(leads + np.arange(rows)[:, None] * known_keys)
    keys = np.zeros((size, rows * pairs), dtype=np.int32)
    keys[0] = leads.ravel()
    if size > 1:
        keys[1:] = draws.arrangements(known_keys - 1, rows * pairs, size - 1)
        keys[1:] += keys[1:] >= keys[0]
        keys[1:] *= sizes.ravel() > np.arange(1, size)[:, None]
    return keys, sizes, _first_with_the_same(keys, known_keys, rows, pairs)


def _first_with_the_same(keys: np.ndarray, known_keys: int, rows: int, pairs: int) -> np.ndarray:
    """The first pair of the row with the same key, (rows, pairs). Where the lengths differ, the first tokens do."""
    bits = pairs.bit_length()
    kind = np.int32 if known_keys ** len(keys) << bits < 2**31 else np.int64
    code = np.zeros(rows * pairs, dtype=kind)
    for tokens in keys:
        code *= kind(known_keys)
        code += tokens
    order = (code.reshape(rows, pairs) << kind(bits)) | np.arange(pairs, dtype=kind)
    order.sort(axis=1)
    pair, code = order & kind((1 << bits) - 1), order >> kind(bits)
    begins = np.zeros((rows, pairs), dtype=np.int32)
    begins[:, 1:] = (code[:, 1:] != code[:, :-1]) * np.arange(1, pairs, dtype=np.int32)
    leader = np.maximum.accumulate(begins, axis=1)
    before = np.arange(rows)[:, None] * pairs
    first = np.empty(rows * pairs, dtype=np.int64)
    first[pair + before] = pair.ravel().take(leader + before)
    return first.reshape(rows, pairs)
