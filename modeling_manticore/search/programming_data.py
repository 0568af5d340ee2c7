"""MAD rows for programming: tasks and their weights, one joint vocabulary, batches of one task each."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..tasks.mad import SETTINGS, MadSetting, make_splits, setting_of
from ..tasks.mad.settings import require_integer


CAUSAL_TASKS = tuple(task for task in SETTINGS if task != "compression")


def task_weights(tasks: Any) -> dict[str, float]:
    """
    Tasks with weights that sum to 1, from a name, a list of names (equal weights) or a dictionary.

    Raises:
        ValueError: nothing, an unknown task, one that occurs twice, compression, or a weight that is not positive.
    """
    if isinstance(tasks, str):
        tasks = [tasks]
    if not isinstance(tasks, (list, tuple, Mapping)) or not tasks:
        raise ValueError(f"tasks: got {tasks!r}, allowed are a MAD task, a list of them, or a dictionary of weights.")
    weights = dict(tasks) if isinstance(tasks, Mapping) else dict.fromkeys(tasks, 1.0)
    if len(weights) < len(tasks):
        raise ValueError(f"tasks: got {tasks!r}, allowed is every task once; weights go into a dictionary.")
    for task, weight in weights.items():
        if task == "compression":
            raise ValueError(
                "tasks: got 'compression', whose decoder takes the place of the heads and reads one state of the "
                f"stream, so that it says nothing of heads and their mixture; allowed are {', '.join(CAUSAL_TASKS)}."
            )
        if task not in SETTINGS:
            raise ValueError(f"tasks: got {task!r}, allowed are {', '.join(CAUSAL_TASKS)}.")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise ValueError(f"tasks[{task!r}]: got {weight!r}, allowed is a positive finite number.")
    total = sum(weights.values())
    return {task: weight / total for task, weight in weights.items()}


def settings_of(
    tasks: Mapping[str, float], settings: Mapping[str, Mapping] | None, rows: int | None, context: int | None
) -> dict[str, MadSetting]:
    """
    The setting of every task: MAD's default, with the changes in `settings` and so many training rows.

    Args:
        context: the most tokens that the components take, None without a limit.

    Raises:
        ValueError: settings of another task, or what `setting_of` refuses, or rows longer than the context.
    """
    settings = {} if settings is None else settings
    if not isinstance(settings, Mapping):
        raise ValueError(f"settings: got {type(settings).__name__}, allowed is a dictionary by task.")
    for task, changes in settings.items():
        if task not in tasks:
            raise ValueError(f"settings: got {task!r}, allowed are the tasks, {', '.join(tasks)}.")
        if not isinstance(changes, Mapping):
            raise ValueError(f"settings[{task!r}]: got {changes!r}, allowed is a dictionary of fields of MadSetting.")
    found = {task: setting_of(task, **({"train_rows": rows} | dict(settings.get(task, {})))) for task in tasks}
    for task, setting in found.items():
        if context is not None and setting.sequence_length > context:
            raise ValueError(
                f"settings[{task!r}]['sequence_length']: got {setting.sequence_length}, allowed are at most {context} "
                "tokens, the context of the components."
            )
    return found


@dataclass
class TaskRows:
    """Token ids of the joint vocabulary and labels, (rows, length) int64, of one task in one split."""

    input_ids: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.input_ids)


def joint_rows(
    settings: Mapping[str, MadSetting], searched: bool, validation_rows: int, seed: int
) -> tuple[dict[str, dict[str, TaskRows]], int]:
    """
    Rows of every task by split, "train", "validation" and, if `searched`, "search" (as many as for training). No split
    shares a row, memorization excepted. Tokens and labels of a task are moved behind those of the tasks before it.

    Returns:
        rows by split and task, and the size of the joint vocabulary.

    Raises:
        ValueError: a task has too few different rows.
    """
    splits: dict[str, dict[str, TaskRows]] = {"train": {}, "validation": {}} | ({"search": {}} if searched else {})
    offset = 0
    for task, setting in settings.items():
        wanted = setting.train_rows
        doubled = replace(setting, train_rows=2 * wanted) if searched else setting
        made = make_splits(doubled, validation_rows, 1, seed)
        made["search"] = tuple(part[wanted:] for part in made["train"])
        made["train"] = tuple(part[:wanted] for part in made["train"])
        for name in splits:
            input_ids, labels = (torch.from_numpy(part.astype(np.int64)) for part in made[name])
            splits[name][task] = TaskRows(input_ids + offset, torch.where(labels == -100, labels, labels + offset))
        offset += setting.vocab_size
    return splits, offset


class TaskBatches(Dataset):
    """
    Batches of rows of one task each: item i is a whole batch, {"input_ids", "labels"}, each (rows, length). So rows of
    different lengths never meet, and a task's share of the loss is its weight, however many labels its rows have.
    """

    def __init__(self, rows: Mapping[str, TaskRows], plan: list[tuple[str, torch.Tensor]]):
        self.rows, self.plan = rows, plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        task, chosen = self.plan[index]
        return {"input_ids": self.rows[task].input_ids[chosen], "labels": self.rows[task].labels[chosen]}


def drawn_batches(
    rows: Mapping[str, TaskRows], weights: Mapping[str, float], count: int, size: int, generator: torch.Generator
) -> TaskBatches:
    """
    `count` batches of `size` rows: of every task its weight's share, rounded so that the sum is right, in random
    order. A task's rows come in permutations, one after the other.

    Raises:
        ValueError: a task's share is less than one batch.
    """
    shares = {task: weight * count for task, weight in weights.items()}
    counts = {task: int(share) for task, share in shares.items()}
    for task in sorted(shares, key=lambda task: counts[task] - shares[task])[: count - sum(counts.values())]:
        counts[task] += 1
    for task, batches in counts.items():
        if not batches:
            raise ValueError(
                f"tasks[{task!r}]: got the weight {weights[task]:.4g}, allowed is at least {1 / count:.4g}, one of "
                f"{count} batches."
            )
    plan = []
    for task, batches in counts.items():
        rounds = -(-batches * size // len(rows[task]))
        stream = torch.cat([torch.randperm(len(rows[task]), generator=generator) for _ in range(rounds)])
        plan += [(task, part) for part in stream[: batches * size].split(size)]
    order = torch.randperm(count, generator=generator).tolist()
    return TaskBatches(rows, [plan[i] for i in order])


def all_batches(rows: Mapping[str, TaskRows], task: str, size: int) -> TaskBatches:
    """Every row of a task once, in order."""
    return TaskBatches(rows, [(task, part) for part in torch.arange(len(rows[task])).split(size)])


def only(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The collator of `TaskBatches`: the one item is the batch."""
    (item,) = items
    return item


def check_positive(**numbers: int) -> None:
    """
    Raises:
        ValueError: one of them is no positive integer.
    """
    for name, value in numbers.items():
        require_integer(name, value, 1)
