"""MQAR: every answer is found by reading the row; gaps, longer tests, seeds, bad input."""

import hashlib

import numpy as np
import pytest

from modeling_manticore.tasks.mad.draws import Draws
from modeling_manticore.tasks.mqar import MqarSetting, make_rows, metric, mqar


SETTINGS = {
    "small": MqarSetting(64, 64, 8),
    "large vocabulary": MqarSetting(8192, 64, 4),
    "blank": MqarSetting(128, 96, 16, random_filler=False),
    "no room": MqarSetting(34, 64, 16),
    "uniform gaps": MqarSetting(300, 128, 8, gap_exponent=0.0),
}


def solve(setting, row):
    """The answers of a row, by its definition: behind the pairs, a key that was shown asks for its value."""
    shown, answers = {}, [-100] * len(row)
    for place in range(0, 2 * setting.num_pairs, 2):
        key, value = row[place : place + 2]
        assert 0 < key < setting.vocab_size // 2 <= value < setting.vocab_size and key not in shown
        shown[key] = value
    assert len(set(shown.values())) == len(shown)
    for place in range(2 * setting.num_pairs, len(row)):
        if row[place] in shown:
            assert place % 2 == 0
            answers[place + 1] = shown.pop(row[place])
    assert not shown
    return answers


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_reading_the_row_gives_every_answer(setting):
    input_ids, labels = make_rows(setting, 2000, draws=Draws(0))
    assert input_ids.shape == labels.shape == (2000, setting.sequence_length)
    assert input_ids.min() >= 0 and input_ids.max() < setting.vocab_size
    for row, answers in zip(input_ids.tolist(), labels.tolist()):
        assert answers == solve(setting, row)
    if not setting.random_filler:
        asked = np.roll(labels != -100, -1, axis=1)
        assert (input_ids[:, 2 * setting.num_pairs :][~asked[:, 2 * setting.num_pairs :]] == 0).all()


@pytest.mark.parametrize("exponent", [-0.99, 0.0])
def test_gaps_follow_the_power_law(exponent):
    setting = MqarSetting(64, 60, 2, gap_exponent=exponent)
    input_ids, _ = make_rows(setting, 20_000, draws=Draws(1))
    slots = (input_ids[:, 4::2] == input_ids[:, :1]).argmax(axis=1)  # the first key's draw is the plain law
    expected = np.arange(1, 29.0) ** exponent
    shares = np.bincount(slots, minlength=28) / len(slots)
    assert np.abs(shares - expected / expected.sum()).max() < 0.012


def test_splits_are_disjoint_and_repeatable():
    settings = {"vocab_size": 64, "sequence_length": 32, "num_pairs": 4, "validation_rows": 50, "test_rows": 60}
    data = mqar(**settings, train_rows=300, seed=3)
    assert {name: len(rows) for name, rows in data.items()} == {"train": 300, "validation": 50, "test": 60}
    rows = [tuple(row) for split in data.values() for row in split["input_ids"]]
    assert len(set(rows)) == len(rows)
    other = mqar(**settings, train_rows=20, longer=(2, 4), scale_pairs=True, seed=3)
    assert other["test"][:] == data["test"][:] and other["validation"][:] == data["validation"][:]
    assert mqar(**settings, train_rows=300, seed=4)["test"][:] != data["test"][:]
    for multiple in (2, 4):
        test = other[f"test_{multiple}x"]
        setting = MqarSetting(64, 32 * multiple, 4 * multiple)
        assert len(test) == 60 and all(row["labels"] == solve(setting, row["input_ids"]) for row in test)
    same_pairs = mqar(**settings, train_rows=20, longer=(4,), seed=3)["test_4x"]
    assert all(row["labels"] == solve(MqarSetting(64, 128, 4), row["input_ids"]) for row in same_pairs)


def test_a_seed_means_these_rows():
    content = hashlib.sha256()
    for setting in SETTINGS.values():
        for part in make_rows(setting, 100, draws=Draws(7)):
            content.update(part.astype("<i4").tobytes())
    assert content.hexdigest()[:16] == "10821b387567ee7c"


def test_the_metric_reads_the_logits_before_the_answer():
    rows = mqar(vocab_size=64, sequence_length=32, num_pairs=4, train_rows=1, validation_rows=1, test_rows=20)["test"]
    labels = np.array(rows["labels"])
    predictions = np.full_like(labels, -1)
    predictions[:, :-1] = labels[:, 1:]
    assert metric(predictions, labels) == {"accuracy": 1.0, "correct": 80, "targets": 80}


BAD = {
    "length": (
        {"sequence_length": 31, "num_pairs": 8},
        "sequence_length: got 31, allowed is an integer of at least 32",
    ),
    "odd": ({"sequence_length": 65}, "sequence_length: got 65, allowed is an even number"),
    "vocabulary": ({"vocab_size": 17}, "vocab_size: got 17, allowed is an integer of at least 18"),
    "large": ({"vocab_size": 2**17}, "vocab_size: got 131072, allowed is at most 65536"),
    "exponent": ({"gap_exponent": float("nan")}, "gap_exponent: got nan, allowed is a number of -8 to 8"),
    "longer": ({"longer": (1,)}, "longer: got 1, allowed is an integer of at least 2"),
    "scaled": ({"longer": (4,), "scale_pairs": True, "vocab_size": 20}, "vocab_size: got 20, .* at least 66"),
    "rows": ({"test_rows": 0}, "test_rows: got 0"),
    "seed": ({"seed": -1}, "seed: got -1"),
    "too few": (
        {"vocab_size": 4, "sequence_length": 4, "num_pairs": 1, "random_filler": False},
        "test_rows: got 1280, but only",
    ),
}


@pytest.mark.parametrize("settings, message", BAD.values(), ids=BAD)
def test_bad_input(settings, message):
    with pytest.raises(ValueError, match=message):
        mqar(**({"train_rows": 10} | settings))
