"""From a task and its settings to a `datasets.DatasetDict` of three splits that share no row."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from .draws import Draws
from .fuzzy import fuzzy_recall
from .others import compression, facts, memorization, selective_copying
from .recall import recall
from .settings import TEST_ROWS, VALIDATION_ROWS, MadSetting, check, require_integer, setting_of


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

# Tokens that are made at a time: what is at work fits the processor's cache. It is part of what a seed means.
CHUNK = 2**16
ROUNDS = 20
AGAIN = 256

Rows = tuple[np.ndarray, np.ndarray]

_GENERATORS = {
    "in-context-recall": recall,
    "fuzzy-in-context-recall": fuzzy_recall,
    "noisy-in-context-recall": recall,
    "selective-copying": selective_copying,
    "compression": compression,
}


def mad(
    task: str,
    *,
    vocab_size: int | None = None,
    sequence_length: int | None = None,
    train_rows: int | None = None,
    validation_rows: int = VALIDATION_ROWS,
    test_rows: int = TEST_ROWS,
    noise_vocab_size: int | None = None,
    noise: float | None = None,
    copies: int | None = None,
    motif_size: int | None = None,
    seed: int = 0,
) -> "DatasetDict":
    """
    A MAD task (arXiv 2403.17844) as train, validation and test, with columns input_ids and labels of one length. What
    is not given is the task's default; `MadSetting` explains the fields. The same seed gives the same rows on any
    machine, and the same validation and test rows for any number of train rows.

    Labels are aligned with the inputs, as transformers' causal models expect them (the logits at position i - 1
    predict label i), and -100 wherever the answer does not follow from what precedes. The exception is compression,
    whose labels are for a `CompressionDecoder`, without a shift. No row occurs twice; in memorization, whose splits
    ask for the same facts, it may.

    Raises:
        ValueError: an unknown task, a field of another task, or settings with which there are not enough rows.
    """
    setting = setting_of(
        task,
        vocab_size=vocab_size,
        sequence_length=sequence_length,
        train_rows=train_rows,
        noise_vocab_size=noise_vocab_size,
        noise=noise,
        copies=copies,
        motif_size=motif_size,
    )
    return dataset_of(setting, validation_rows, test_rows, seed)


def dataset_of(
    setting: MadSetting, validation_rows: int = VALIDATION_ROWS, test_rows: int = TEST_ROWS, seed: int = 0
) -> "DatasetDict":
    """
    As `mad`, from a setting.

    Raises:
        ValueError: as `mad`.
    """
    from datasets import DatasetDict

    splits = make_splits(setting, validation_rows, test_rows, seed)
    return DatasetDict({name: token_dataset(*splits[name]) for name in ("train", "validation", "test")})


def make_splits(
    setting: MadSetting, validation_rows: int = VALIDATION_ROWS, test_rows: int = TEST_ROWS, seed: int = 0
) -> dict[str, Rows]:
    """
    The rows of `mad` as arrays: input_ids and labels, (rows, sequence_length) int32, of every split.

    Raises:
        ValueError: as `mad`.
    """
    check(setting)
    require_integer("validation_rows", validation_rows, 1)
    require_integer("test_rows", test_rows, 1)
    draws = Draws(seed)
    make = generator_of(setting, draws)
    # The train split comes last: its size must not change what the others are.
    wanted = {"test": test_rows, "validation": validation_rows, "train": setting.train_rows}
    if setting.task == "memorization":
        return {name: make(rows, name != "train") for name, rows in wanted.items()}
    taken: set[bytes] = set()
    return {name: unseen_rows(make, rows, name, taken) for name, rows in wanted.items()}


def generator_of(setting: MadSetting, draws: Draws) -> Callable[[int, bool], Rows]:
    """A function of a number of rows, and of whether they are for evaluation, that makes rows of the task."""
    if setting.task == "memorization":
        make = partial(memorization, setting, draws=draws, values=facts(setting, draws))
        return lambda rows, evaluated: make(rows, evaluated=evaluated)
    generate = partial(_GENERATORS[setting.task], setting)
    chunk = max(1, CHUNK // setting.sequence_length)

    def make_rows(rows: int, evaluated: bool) -> Rows:
        parts = [generate(min(chunk, rows - start), draws, evaluated) for start in range(0, rows, chunk)]
        return parts[0] if len(parts) == 1 else tuple(np.concatenate(part) for part in zip(*parts))

    return make_rows


def unseen_rows(make: Callable[[int, bool], Rows], wanted: int, split: str, taken: set[bytes]) -> Rows:
    """
    So many rows of `make` (tokens below 2**16) that are not among those taken, which they join.

    Raises:
        ValueError: the task has too few different rows.
    """
    parts: list[Rows] = []
    missing = wanted
    for attempt in range(ROUNDS):
        # Where few rows are left to find, many must be looked at.
        input_ids, labels = make(max(missing, AGAIN) if attempt else wanted, split != "train")
        fresh = []
        for number, row in enumerate(input_ids.astype(np.uint16)):
            if len(fresh) < missing and (content := row.tobytes()) not in taken:
                taken.add(content)
                fresh.append(number)
        parts.append((input_ids[fresh], labels[fresh]))
        missing -= len(fresh)
        if not missing:
            return tuple(np.concatenate(part) for part in zip(*parts))
    raise ValueError(
        f"{split}_rows: got {wanted}, but only {wanted - missing} rows were found that are in no split yet; allowed "
        "are fewer rows, a larger vocab_size or a larger sequence_length."
    )


def token_dataset(input_ids: np.ndarray, labels: np.ndarray) -> "Dataset":
    """A `datasets.Dataset` of input_ids and labels, both (rows, length) of integers."""
    import pyarrow
    from datasets import Dataset

    rows, length = input_ids.shape
    offsets = np.arange(rows + 1, dtype=np.int32) * length
    columns = {
        name: pyarrow.ListArray.from_arrays(offsets, pyarrow.array(column.ravel().astype(np.int64)))
        for name, column in (("input_ids", input_ids), ("labels", labels))
    }
    return Dataset(pyarrow.table(columns))
