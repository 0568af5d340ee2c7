"""MAD: every row is solved by brute force from the task's definition; splits, seeds, difficulty, bad input, metric."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from datasets import DatasetDict

from modeling_manticore.tasks.mad import AXES, SETTINGS, difficulties, mad, make_splits, setting_of, token_accuracy


ROWS = {"validation_rows": 100, "test_rows": 1000}


def runs(tokens, is_key):
    """Alternating motifs of keys and values: [(key tuple, value tuple, place of the value)]."""
    pairs, at = [], 0
    while at < len(tokens):
        key_end = at
        while is_key(tokens[key_end]):
            key_end += 1
        end = key_end
        while end < len(tokens) and not is_key(tokens[end]):
            end += 1
        assert at < key_end < end
        pairs.append((tuple(tokens[at:key_end]), tuple(tokens[key_end:end]), key_end))
        at = end
    return pairs


def solve_pairs(setting, row, answer):
    """Recall, plain and noisy: token by token, with a dictionary of what was shown."""
    usable, shown, at = setting.vocab_size - setting.noise_vocab_size, {}, 0
    while at < len(row):
        if row[at] >= usable:
            assert row[at + 1] >= usable
        else:
            key, value = row[at], row[at + 1]
            assert key < usable // 2 <= value < usable
            if key in shown:
                answer[at + 1] = shown[key]
                assert value == shown[key]
            shown[key] = value
        at += 2
    assert answer[-1] is not None


def solve_motifs(setting, row, answer):
    """Fuzzy recall: motifs are told apart by their vocabularies; no key may be the beginning of another."""
    padding, size = setting.vocab_size - 1, setting.motif_size
    begin = next(at for at, token in enumerate(row) if token != padding)
    assert padding not in row[begin:]
    shown = {}
    for key, value, at in runs(row[begin:], lambda token: token < padding // 2):
        assert len(set(key)) == len(key) <= size and len(set(value)) == len(value) <= size
        assert not any(key != other and key[: len(other)] == other for other in shown)
        assert not any(key != other and other[: len(key)] == key for other in shown)
        if key in shown:
            assert value == shown[key]
            answer[begin + at : begin + at + len(value)] = shown[key]
        shown[key] = value
    assert answer[-1] is not None


def solve_copying(setting, row, answer):
    """Selective copying: everything that is no blank before the copy token, in order."""
    blank, copy = setting.vocab_size - 2, setting.vocab_size - 1
    at = row.index(copy)
    tokens = [token for token in row[:at] if token != blank]
    assert len(tokens) == setting.copies == len(row) - at - 1 and set(row[at + 1 :]) == {blank}
    answer[at + 1 :] = tokens


def solve_compression(setting, row, answer):
    """Compression: the tokens before the one that carries them."""
    assert row[-1] == setting.vocab_size - 1 and row[-1] not in row[:-1]
    answer[:-1] = row[:-1]


SOLVERS = {
    "in-context-recall": solve_pairs,
    "noisy-in-context-recall": solve_pairs,
    "fuzzy-in-context-recall": solve_motifs,
    "selective-copying": solve_copying,
    "compression": solve_compression,
}


def solved(setting, rows):
    """Labels by brute force, -100 where nothing determines the answer."""
    labels = []
    for row in rows.tolist():
        answer = [None] * len(row)
        SOLVERS[setting.task](setting, row, answer)
        labels.append([-100 if token is None else token for token in answer])
    return np.array(labels)


@pytest.mark.parametrize("task", SOLVERS)
def test_every_determined_target_is_solved(task):
    setting = setting_of(task, train_rows=1000)
    for input_ids, labels in make_splits(setting, **ROWS).values():
        assert input_ids.shape == labels.shape == (len(input_ids), setting.sequence_length)
        np.testing.assert_array_equal(labels, solved(setting, input_ids))


@pytest.mark.parametrize("task", SOLVERS)
def test_every_difficulty_is_solved(task):
    for setting in difficulties(task):
        for input_ids, labels in make_splits(replace(setting, train_rows=8), 8, 8, seed=1).values():
            np.testing.assert_array_equal(labels, solved(setting, input_ids))


def test_memorization_is_solved():
    for setting in difficulties("memorization"):
        known, insert = (setting.vocab_size - 1) // 2, setting.vocab_size - 1
        splits = make_splits(setting, 744, 1000)
        value_of = {}
        for input_ids, labels in (splits["train"], splits["validation"], splits["test"]):
            assert (input_ids[:, ::2] < known).all() and (input_ids[:, 1::2] == insert).all()
            assert (labels[:, ::2] == -100).all()
            for key, value in zip(input_ids[:, ::2].ravel().tolist(), labels[:, 1::2].ravel().tolist()):
                if input_ids is splits["train"][0]:
                    assert value_of.setdefault(key, value) == value
                else:
                    assert value_of[key] == value
        assert len(value_of) == known == len(set(value_of.values()))
        assert known <= min(value_of.values()) and max(value_of.values()) < insert
        counts = np.bincount(splits["train"][0][:, ::2].ravel())
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("task", [task for task in SETTINGS if task != "memorization"])
def test_no_row_is_in_two_places(task):
    splits = make_splits(setting_of(task, train_rows=2000), 500, 500)
    rows = np.concatenate([input_ids for input_ids, _ in splits.values()])
    assert len(np.unique(rows, axis=0)) == len(rows) == 3000


def test_few_different_rows_are_told_apart_or_refused():
    # Sequences of 6 tokens out of 2: 64 different rows.
    splits = make_splits(setting_of("compression", vocab_size=3, sequence_length=7, train_rows=40), 10, 10)
    assert len(np.unique(np.concatenate([rows for rows, _ in splits.values()]), axis=0)) == 60
    with pytest.raises(ValueError, match="train_rows: got 50, but only"):
        make_splits(setting_of("compression", vocab_size=3, sequence_length=7, train_rows=50), 10, 10)


DIGESTS = {
    "in-context-recall": "a5728069cb4bd884",
    "fuzzy-in-context-recall": "71931ba09e60cbcd",
    "noisy-in-context-recall": "e4b88c6988438d5c",
    "selective-copying": "5c21e7d0133dd640",
    "memorization": "1b64f8c8cde022ea",
    "compression": "22b9af1784b0e411",
}


def digest(splits):
    content = hashlib.sha256()
    for name in ("train", "validation", "test"):
        for column in splits[name]:
            content.update(column.astype("<i8").tobytes())
    return content.hexdigest()[:16]


@pytest.mark.parametrize("task", SETTINGS)
def test_seeds_reproduce(task):
    setting = setting_of(task, **({} if task == "memorization" else {"train_rows": 1500}))
    splits = make_splits(setting, 40, 30, seed=5)
    assert digest(splits) == DIGESTS[task]
    assert digest(splits) != digest(make_splits(setting, 40, 30, seed=6))
    state = np.random.get_state()[1].copy()
    again = make_splits(setting_of(task, train_rows=300), 40, 30, seed=5)
    for name in ("validation", "test"):
        np.testing.assert_array_equal(again[name][0], splits[name][0])
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    heads = [splits[name][0][:30] for name in splits]
    assert all((heads[a] != heads[b]).any() for a, b in ((0, 1), (0, 2), (1, 2)))


def test_datasets():
    data = mad("fuzzy-in-context-recall", vocab_size=32, sequence_length=64, train_rows=50, validation_rows=5, seed=3)
    assert isinstance(data, DatasetDict) and set(data) == {"train", "validation", "test"}
    assert [len(data[name]) for name in ("train", "validation", "test")] == [50, 5, 1280]
    assert data["train"].column_names == ["input_ids", "labels"]
    expected = make_splits(setting_of("fuzzy-in-context-recall", vocab_size=32, sequence_length=64, train_rows=50), 5)
    assert data["test"][7]["input_ids"] != expected["test"][0][7].tolist()  # another seed
    row = data["train"][3]
    assert len(row["input_ids"]) == 64
    assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"]))


def test_difficulty():
    assert [len(difficulties(task)) for task in SETTINGS] == [11, 11, 14, 13, 6, 11]
    assert all(len({str(setting) for setting in difficulties(task)}) == len(difficulties(task)) for task in AXES)

    def known(labels):
        return (labels != -100).mean()

    def train(task, **changes):
        return make_splits(setting_of(task, **{"train_rows": 300, **changes}), 1, 1)["train"]

    # More keys: fewer come again. More noise: fewer pairs. More to copy: as many targets.
    assert known(train("in-context-recall")[1]) > known(train("in-context-recall", vocab_size=128)[1]) + 0.1
    assert known(train("fuzzy-in-context-recall")[1]) > 1.5 * known(train("fuzzy-in-context-recall", vocab_size=64)[1])
    for noise in (0.2, 0.4, 0.6, 0.8):
        input_ids, _ = train("noisy-in-context-recall", noise=noise)
        assert abs((input_ids >= 16).mean() * 64 / 63 - noise) < 0.03
    for copies in (16, 32, 64, 96):
        assert ((train("selective-copying", copies=copies)[1] != -100).sum(axis=1) == copies).all()
    input_ids, _ = train("selective-copying", copies=16)
    places = (input_ids < 14).nonzero()[1].reshape(-1, 16)
    # 223 blanks in 17 gaps, the first and the last among them.
    assert abs(places[:, 0].mean() - 223 / 17) < 1 and abs(238 - places[:, -1].mean() - 223 / 17) < 1

    # Motifs of all lengths in training; keys of the full length where models are evaluated.
    setting = setting_of("fuzzy-in-context-recall", train_rows=300)
    lengths = {}
    for name, (rows, _) in make_splits(setting, 50, 50).items():
        pairs = [pair for row in rows.tolist() for pair in runs(row[row.count(15) :], lambda token: token < 7)]
        lengths[name] = ({len(key) for key, _, _ in pairs}, {len(value) for _, value, _ in pairs})
    assert lengths == {"train": ({1, 2, 3}, {1, 2, 3}), "validation": ({3}, {1, 2, 3}), "test": ({3}, {1, 2, 3})}


@pytest.mark.parametrize(
    "task, changes, message",
    [
        ("recall", {}, "task: got 'recall', allowed are in-context-recall"),
        ("in-context-recall", {"noise": 0.2}, "noise: got 0.2 for 'in-context-recall', allowed only for noisy"),
        ("in-context-recall", {"copies": 3}, "copies: got 3 for .* allowed only for selective-copying"),
        ("in-context-recall", {"sequence_length": 127}, "sequence_length: got 127, allowed is an even number"),
        ("in-context-recall", {"sequence_length": 2}, "sequence_length: got 2, allowed is at least 4"),
        ("in-context-recall", {"vocab_size": 3}, "vocab_size: got 3, allowed is at least 4"),
        ("in-context-recall", {"vocab_size": 16.0}, "vocab_size: got 16.0, allowed is an integer"),
        ("in-context-recall", {"vocab_size": 70_000}, "vocab_size: got 70000, allowed is at most 65536"),
        ("in-context-recall", {"train_rows": 0}, "train_rows: got 0, allowed is an integer of at least 1"),
        ("in-context-recall", {"test_rows": True}, "test_rows: got True, allowed is an integer"),
        ("in-context-recall", {"validation_rows": -1}, "validation_rows: got -1"),
        ("in-context-recall", {"seed": -1}, "seed: got -1, allowed is an integer of at least 0"),
        ("noisy-in-context-recall", {"noise": 1.0}, "noise: got 1.0, allowed is a number of at least 0 and below 1"),
        ("noisy-in-context-recall", {"noise": "no"}, "noise: got 'no'"),
        ("noisy-in-context-recall", {"vocab_size": 19}, "vocab_size: got 19, allowed is at least 20"),
        ("noisy-in-context-recall", {"noise_vocab_size": 0}, "noise_vocab_size: got 0, allowed is .* at least 1"),
        ("fuzzy-in-context-recall", {"vocab_size": 6}, "vocab_size: got 6, allowed is at least 7"),
        ("fuzzy-in-context-recall", {"sequence_length": 11}, "sequence_length: got 11, allowed is at least 12"),
        ("fuzzy-in-context-recall", {"motif_size": 7, "vocab_size": 256}, "motif_size: got 7, allowed is less"),
        ("selective-copying", {"copies": 128}, "sequence_length: got 256, allowed is at least 258"),
        ("selective-copying", {"vocab_size": 3}, "vocab_size: got 3, allowed is at least 4"),
        ("memorization", {"train_rows": 7}, "train_rows: got 7, allowed is at least 8"),
        ("memorization", {"sequence_length": 31}, "sequence_length: got 31"),
        ("memorization", {"vocab_size": 4}, "vocab_size: got 4"),
        ("compression", {"sequence_length": 1}, "sequence_length: got 1, allowed is at least 2"),
        ("compression", {"vocab_size": 2}, "vocab_size: got 2, allowed is at least 3"),
    ],
)
def test_bad_input(task, changes, message):
    with pytest.raises(ValueError, match=message):
        mad(task, **changes)


def test_smallest_settings():
    smallest = {
        "in-context-recall": {"vocab_size": 4, "sequence_length": 4},
        "noisy-in-context-recall": {"vocab_size": 5, "noise_vocab_size": 1, "sequence_length": 6, "noise": 0.9},
        "fuzzy-in-context-recall": {"vocab_size": 7, "sequence_length": 12},
        "selective-copying": {"vocab_size": 4, "sequence_length": 8, "copies": 3},
        "compression": {"vocab_size": 3, "sequence_length": 4},
    }
    for task, changes in smallest.items():
        setting = setting_of(task, train_rows=2, **changes)
        for input_ids, labels in make_splits(setting, 1, 1).values():
            np.testing.assert_array_equal(labels, solved(setting, input_ids))


@pytest.mark.parametrize("task, vocab_size", [(task, size) for task in SOLVERS for size in (37, 201, 5000)])
def test_other_vocabularies(task, vocab_size):
    setting = setting_of(task, vocab_size=vocab_size, train_rows=100)
    for input_ids, labels in make_splits(setting, 50, 50).values():
        np.testing.assert_array_equal(labels, solved(setting, input_ids))


def test_motifs_of_one_token():
    short = setting_of("fuzzy-in-context-recall", motif_size=1, vocab_size=5, sequence_length=10, train_rows=9)
    assert len(make_splits(short, 2, 2)["train"][0]) == 9


def test_token_accuracy():
    labels = np.array([[-100, 4, -100, 5], [-100, -100, 2, -100]])
    shifted = np.array([[4, 9, 0, 9], [9, 2, 9, 9]])
    assert token_accuracy(shifted, labels) == {"accuracy": 2 / 3, "correct": 2, "targets": 3}
    assert token_accuracy(np.eye(10)[shifted], labels)["correct"] == 2
    assert token_accuracy(labels, labels, shift=False)["accuracy"] == 1
    with pytest.raises(ValueError, match="labels: got -100 everywhere"):
        token_accuracy(shifted[:, :1], labels[:, :1])
    with pytest.raises(ValueError, match=r"predictions, labels: got shapes \(2, 3\) and \(2, 4\)"):
        token_accuracy(shifted[:, :3], labels)
