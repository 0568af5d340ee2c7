"""The tasks that an experiment may name. A task is a function that returns a `datasets.DatasetDict`, and a metric."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
import torch
from pyarrow import compute

from ..tasks.mad.settings import SETTINGS


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

IGNORED = -100
HEADS = ("tokens", "last_state", "sequence")
SPLITS = ("train", "validation", "test")


class TaskFailed(ValueError):
    """Data that cannot be made; the message is for the user, and where in the code it happened does not matter."""


@dataclass(frozen=True)
class Task:
    """
    Attributes:
        make: "module:function"; called with the options of the experiment file and `seed`, it returns a DatasetDict of
            train, validation and test, and others for `also_tested`. Columns: input_ids, and `labels` of the same
            length (-100: not asked) or, with the head "sequence", one `label` or `labels` a row. Rows may differ in
            length.
        metric: "module:function" of predictions and labels (rows, length) or (rows,), which returns a dictionary with
            `accuracy`; predictions are the largest logits.
        head: "tokens", a causal language model whose logits at i - 1 predict label i; "last_state", a decoder that
            gives all labels from the state at the last token; "sequence", a classifier of that state.
        measure: what is compared: "accuracy", or "loss" in nats (less is better).
        fixed: options that belong to the name.
        check: "module:function" of all arguments of `make`, which refuses bad ones with a ValueError without making
            rows, and returns the names of splits beside `SPLITS` (or None). Without it they are found out when a run
            begins.
    """

    make: str
    metric: str
    head: str = "tokens"
    measure: str = "accuracy"
    fixed: dict[str, Any] = field(default_factory=dict)
    check: str | None = None

    @property
    def greater_is_better(self) -> bool:
        """Whether more of the measure is better."""
        return self.measure == "accuracy"


TASKS: dict[str, Task] = {}


def register(name: str, task: Task) -> None:
    """
    Make a task known under a name. Its modules are imported when it is used.

    Raises:
        ValueError: the name is taken, or a field has a value that is not allowed.
    """
    if name in TASKS:
        raise ValueError(f"name: got {name!r}, which is taken, allowed is a new name.")
    if task.head not in HEADS:
        raise ValueError(f"head: got {task.head!r}, allowed are {', '.join(map(repr, HEADS))}.")
    if task.measure not in ("accuracy", "loss"):
        raise ValueError(f"measure: got {task.measure!r}, allowed are 'accuracy' and 'loss'.")
    TASKS[name] = task


OWN, CHECKS = "modeling_manticore.experiments.tasks", "modeling_manticore.experiments.task_checks"
for _name in SETTINGS:
    register(
        f"mad/{_name}",
        Task(
            make="modeling_manticore.tasks.mad:mad",
            metric=f"{OWN}:{'aligned' if _name == 'compression' else 'shifted'}_accuracy",
            head="last_state" if _name == "compression" else "tokens",
            fixed={"task": _name},
            check=f"{CHECKS}:check_mad",
        ),
    )
register("mqar", Task("modeling_manticore.tasks.mqar:mqar", f"{OWN}:shifted_accuracy", check=f"{CHECKS}:check_mqar"))
for _name, _make, _check in (
    ("listops", "listops:listops", "check_listops"),
    ("pathfinder", "pathfinder:pathfinder", "check_pathfinder"),
    ("image", "lra:image_task", "check_files"),
    ("text-classification", "lra:text_task", "check_files"),
    ("retrieval", "lra:retrieval_task", "check_files"),
    ("digits-standin", "lra:digits_standin", "check_standin"),
    ("snippets-standin", "lra:snippets_standin", "check_standin"),
):
    _path, _measured = f"modeling_manticore.tasks.{_make}", f"{OWN}:class_accuracy"
    register(_name, Task(_path, _measured, head="sequence", check=f"{CHECKS}:{_check}"))
register(
    "text",
    Task(
        make="modeling_manticore.experiments.text_rows:text_rows",
        metric=f"{OWN}:shifted_accuracy",
        measure="loss",
        check="modeling_manticore.experiments.text_rows:check_text_rows",
    ),
)


def resolve(path: str) -> Callable:
    """
    The function of "module:function".

    Raises:
        ValueError: there is no such module or function.
    """
    module, name = path.split(":")
    try:
        missing = find_spec(module) is None
    except ModuleNotFoundError:
        missing = True
    if missing or not hasattr(import_module(module), name):
        raise ValueError(f"task: it needs {path}, which this installation does not have.")
    return getattr(import_module(module), name)


def check_task(name: str, options: dict[str, Any], where: str) -> tuple[str, ...] | None:
    """
    Returns:
        the names of the task's splits; None where only making it can tell.

    Raises:
        ValueError: an unknown task, one whose code is not installed, or options that it does not take.
    """
    if name not in TASKS:
        raise ValueError(f"{where}.task: got {name!r}, allowed are {', '.join(TASKS)}.")
    task = TASKS[name]
    try:
        make = resolve(task.make)
        resolve(task.metric)
        signature = inspect.signature(make)
        own = {option: entry for option, entry in signature.parameters.items() if option not in ("seed", *task.fixed)}
        for option in options:
            if option not in own:
                raise ValueError(f"options.{option}: there is no such option of {name!r}, allowed are {list(own)}.")
        for option, entry in own.items():
            if entry.default is entry.empty and entry.kind is not entry.VAR_KEYWORD and option not in options:
                raise ValueError(f"options.{option}: it is missing, {name!r} needs it.")
        if task.check is None:
            return None
        given = signature.bind(**task.fixed, **options)
        given.apply_defaults()
        return SPLITS + tuple(resolve(task.check)(**given.arguments) or ())
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


@cache
def _made(name: str, options: tuple, seed: int) -> "DatasetDict":
    task = TASKS[name]
    make = resolve(task.make)
    own = {"seed": seed} if "seed" in inspect.signature(make).parameters else {}
    try:
        return make(**task.fixed, **{key: _thawed(value) for key, value in options}, **own)
    except (ValueError, OSError) as error:
        raise TaskFailed(f"the task {name!r} cannot be made: {error}") from error


def require_splits(name: str, data: "DatasetDict", wanted: Iterable[str]) -> None:
    """
    Raises:
        TaskFailed: the task made no such split.
    """
    missing = [split for split in wanted if split not in data]
    if missing:
        raise TaskFailed(f"the task {name!r} made no split {', '.join(missing)}, but {', '.join(data)}.")


def data_of(name: str, options: dict[str, Any], seed: int) -> "DatasetDict":
    """The splits of a task (a task that draws nothing has no `seed`); those made last are kept in memory."""
    if _made.cache_info().currsize > 8:
        _made.cache_clear()
    return _made(name, tuple(sorted((key, _frozen(value)) for key, value in options.items())), seed)


def _frozen(value: Any) -> Any:
    return ("list", *map(_frozen, value)) if isinstance(value, list) else value


def _thawed(value: Any) -> Any:
    return list(map(_thawed, value[1:])) if isinstance(value, tuple) else value


def flat(split: "Dataset", name: str) -> np.ndarray:
    """All entries of a column, of rows of any length one after the other."""
    column = split.with_format("arrow")[:][name].combine_chunks()
    return (column if pyarrow.types.is_integer(column.type) else column.flatten()).to_numpy(zero_copy_only=False)


def label_column(split: "Dataset") -> str:
    """`label` where there is one, else `labels`."""
    return "label" if "label" in split.column_names else "labels"


def longest(split: "Dataset") -> int:
    """Tokens of the longest row."""
    return compute.max(compute.list_value_length(split.with_format("arrow")[:]["input_ids"])).as_py()


def vocabulary_of(data: "DatasetDict", head: str, options: dict[str, Any]) -> int:
    """One more than the largest token of any split, and no less than the option `vocab_size`."""
    columns = ["input_ids"] if head == "sequence" else ["input_ids", "labels"]
    found = max(int(flat(data[split], column).max()) for split in data for column in columns) + 1
    return max(found, options.get("vocab_size") or 1)


def classes_of(data: "DatasetDict") -> int:
    """One more than the largest label of any split."""
    return max(int(flat(rows, label_column(rows)).max()) for rows in data.values()) + 1


def frequency_baseline(train: "Dataset", test: "Dataset", head: str) -> float:
    """
    Accuracy on the rows `test` of a guess by frequency alone: always the label that is most frequent in the rows
    `train` or, if that is more, at every place the token that was most frequent in the row before it, of those that
    are labels. In recall the latter is what a model learns first: which values a row has, and not yet whose they are.
    """
    column = label_column(train)
    known, asked = (labels[labels != IGNORED] for labels in (flat(train, column), flat(test, column)))
    always = float(np.mean(asked == np.bincount(known).argmax()))
    if head == "sequence":
        return always
    candidates = np.unique(known)
    rows = test.with_format("numpy")[:]
    hits = sum(_frequency_hits(*row, candidates, head) for row in zip(rows["input_ids"], rows[column]))
    return max(always, hits / len(asked))


def _frequency_hits(input_ids: np.ndarray, labels: np.ndarray, candidates: np.ndarray, head: str) -> int:
    """Labels of a row that are the most frequent candidate among the inputs before them ("last_state": of the row)."""
    counts = (input_ids[:, None] == candidates).cumsum(axis=0)
    places = np.flatnonzero(labels != IGNORED)
    before = np.full(len(places), len(input_ids)) if head == "last_state" else places
    guessed = candidates[counts[np.maximum(before - 1, 0)].argmax(axis=1)]
    return int((guessed == labels[places]).sum())


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    """
    Rows of any length -> input_ids (rows, longest) padded at the end with 0, labels likewise with -100 or (rows,), and
    an attention_mask where a row is padded.
    """
    column = "label" if "label" in examples[0] else "labels"
    rows = [torch.as_tensor(example["input_ids"]).long() for example in examples]
    lengths = torch.tensor([len(row) for row in rows])
    batch = {"input_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)}
    labels = [torch.as_tensor(example[column]).long() for example in examples]
    if labels[0].ndim == 0:
        batch["labels"] = torch.stack(labels)
    else:
        batch["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    if int(lengths.min()) < int(lengths.max()):
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return batch


def shifted_accuracy(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Share of labels (rows, length) that the prediction one place before is equal to."""
    from ..tasks.mad import token_accuracy

    return token_accuracy(predictions, labels)


def aligned_accuracy(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Share of labels (rows, length) that the prediction at the same place is equal to."""
    from ..tasks.mad import token_accuracy

    return token_accuracy(predictions, labels, shift=False)


def class_accuracy(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Share of rows whose class (rows,) is predicted."""
    return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(labels)))}
