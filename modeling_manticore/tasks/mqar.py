"""
Multi-query associative recall (MQAR; Zoology, arXiv 2312.04927): pairs of a key and a value are shown, then every key
is asked for once. How far behind the pairs a key is asked for follows a power law.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from .mad.draws import Draws
from .mad.metric import IGNORED, token_accuracy
from .mad.settings import TEST_ROWS, VALIDATION_ROWS, require_integer
from .mad.splits import CHUNK, Rows, token_dataset, unseen_rows


if TYPE_CHECKING:
    from datasets import DatasetDict

TRAIN_ROWS = 20_000
BLANK = 0

metric = token_accuracy


@dataclass(frozen=True)
class MqarSetting:
    """
    Attributes:
        vocab_size: 0 is the blank, 1..vocab_size // 2 - 1 are keys, the rest are values.
        sequence_length: tokens of a row, an even number of at least 4 * num_pairs.
        num_pairs: pairs that are shown, and keys that are asked for, in a row.
        gap_exponent: a key is asked for in slot g = 1, 2, ... behind the pairs with a probability proportional to
            g ** gap_exponent; 0 is uniform. Zoology's `power_a` is gap_exponent + 1.
        random_filler: what stands between the questions is drawn from the vocabulary without the keys shown in the
            row; False: it is blank.
    """

    vocab_size: int
    sequence_length: int
    num_pairs: int
    gap_exponent: float = -0.99
    random_filler: bool = True


def mqar(
    *,
    vocab_size: int = 8192,
    sequence_length: int = 64,
    num_pairs: int = 8,
    train_rows: int = TRAIN_ROWS,
    validation_rows: int = VALIDATION_ROWS,
    test_rows: int = TEST_ROWS,
    gap_exponent: float = -0.99,
    random_filler: bool = True,
    longer: tuple[int, ...] = (),
    scale_pairs: bool = False,
    seed: int = 0,
) -> "DatasetDict":
    """
    MQAR as train, validation and test, with columns input_ids and labels of one length. `metric` is the share of
    right answers. The same seed gives the same rows, and the same validation and test rows for any number of train
    rows and whatever `longer` is. No row occurs twice.

    Labels are aligned with the inputs, as transformers' causal models expect them (the logits at position i - 1
    predict label i): behind a key that is asked for stands its value in the labels and filler in the inputs. All
    other labels are -100.

    Args:
        longer: multiples of the length at which the trained model is tested too: with 2 there is a split `test_2x` of
            2 * sequence_length tokens, with `test_rows` rows.
        scale_pairs: those rows have as many times the pairs; False: they have `num_pairs`.

    Raises:
        ValueError: settings with which there are not enough rows.
    """
    setting = MqarSetting(vocab_size, sequence_length, num_pairs, gap_exponent, random_filler)
    tests = longer_settings(setting, longer, scale_pairs)
    counts = {"test": test_rows, "validation": validation_rows, "train": train_rows}
    for name, count in counts.items():
        require_integer(f"{name}_rows", count, 1)
    make, taken = partial(make_rows, setting, draws=Draws(seed)), set()
    splits = {name: unseen_rows(make, count, name, taken) for name, count in counts.items()}
    for multiple, test in tests.items():
        draws = Draws(seed + (multiple << 64))
        splits[f"test_{multiple}x"] = unseen_rows(partial(make_rows, test, draws=draws), test_rows, "test", set())

    from datasets import DatasetDict

    names = ("train", "validation", "test", *(f"test_{multiple}x" for multiple in tests))
    return DatasetDict({name: token_dataset(*splits[name]) for name in names})


def longer_settings(
    setting: MqarSetting, longer: tuple[int, ...], scale_pairs: bool = False
) -> dict[int, MqarSetting]:
    """
    Multiple of the length -> the setting of its test rows, all of them checked, and the setting itself too.

    Raises:
        ValueError: as `mqar`.
    """
    check(setting)
    tests = {}
    for multiple in longer:
        require_integer("longer", multiple, 2)
        pairs = setting.num_pairs * multiple if scale_pairs else setting.num_pairs
        tests[multiple] = replace(setting, sequence_length=setting.sequence_length * multiple, num_pairs=pairs)
        check(tests[multiple])
    return tests


def check(setting: MqarSetting) -> None:
    """
    Raises:
        ValueError: a field is no number of its kind, or there are no rows with it.
    """
    require_integer("num_pairs", setting.num_pairs, 1)
    require_integer("sequence_length", setting.sequence_length, 4 * setting.num_pairs)
    require_integer("vocab_size", setting.vocab_size, 2 * setting.num_pairs + 2)
    if setting.sequence_length % 2:
        raise ValueError(f"sequence_length: got {setting.sequence_length}, allowed is an even number.")
    if setting.vocab_size > 2**16:
        raise ValueError(f"vocab_size: got {setting.vocab_size}, allowed is at most {2**16}.")
    exponent = setting.gap_exponent
    if isinstance(exponent, bool) or not isinstance(exponent, (int, float)) or not -8 <= exponent <= 8:
        raise ValueError(f"gap_exponent: got {exponent!r}, allowed is a number of -8 to 8.")


def make_rows(setting: MqarSetting, rows: int, evaluated: bool = False, *, draws: Draws) -> Rows:
    """input_ids and labels, (rows, sequence_length) int32. `evaluated` changes nothing."""
    chunk = max(1, CHUNK // setting.sequence_length)
    parts = [_rows(setting, min(chunk, rows - start), draws) for start in range(0, rows, chunk)]
    return tuple(np.concatenate(part) for part in zip(*parts))


def _rows(setting: MqarSetting, rows: int, draws: Draws) -> Rows:
    pairs, shown, first_value = setting.num_pairs, 2 * setting.num_pairs, setting.vocab_size // 2
    keys = _different(draws, first_value - 1, rows, pairs) + 1
    values = _different(draws, setting.vocab_size - first_value, rows, pairs) + first_value
    places = shown + 2 * _slots(setting, rows, draws)

    input_ids = np.full((rows, setting.sequence_length), BLANK, dtype=np.int32)
    input_ids[:, 0:shown:2], input_ids[:, 1:shown:2] = keys, values
    if setting.random_filler:
        input_ids[:, shown:] = _without(keys, setting, draws)
    np.put_along_axis(input_ids, places, keys, axis=1)
    labels = np.full_like(input_ids, IGNORED)
    np.put_along_axis(labels, places + 1, values, axis=1)
    return input_ids, labels


def _different(draws: Draws, limit: int, rows: int, count: int) -> np.ndarray:
    """In every row different numbers of 0..limit - 1 in random order, (rows, count) int32."""
    # One by one where that is less work than to sort all numbers.
    if count * count <= 4 * limit:
        return draws.arrangements(limit, rows, count).T
    return draws.permutations(rows, limit)[:, :count].astype(np.int32)


def _slots(setting: MqarSetting, rows: int, draws: Draws) -> np.ndarray:
    """The slot of every key, (rows, num_pairs): drawn one after the other among those left, likelier ones first."""
    slots = setting.sequence_length // 2 - setting.num_pairs
    weights = np.arange(1, slots + 1, dtype=np.float64) ** setting.gap_exponent
    # Of exponential clocks with these rates, the order of ringing is that of drawing without putting back.
    rings = -np.log((draws.raw(rows, slots) + 0.5) / 2**32) / weights
    return rings.argsort(axis=1, kind="stable")[:, : setting.num_pairs]


def _without(keys: np.ndarray, setting: MqarSetting, draws: Draws) -> np.ndarray:
    """Uniform tokens without the row's keys, (rows, sequence_length - 2 * num_pairs) int32."""
    rows, length = len(keys), setting.sequence_length - 2 * setting.num_pairs
    start = np.arange(rows)[:, None] * setting.vocab_size
    is_key = np.zeros(rows * setting.vocab_size, dtype=bool)
    is_key[start + keys] = True
    tokens = draws.below(setting.vocab_size, rows, length)
    while len(again := np.flatnonzero(is_key[start + tokens])):
        tokens.ravel()[again] = draws.below(setting.vocab_size, len(again))
    return tokens
