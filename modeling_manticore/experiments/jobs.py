"""From an experiment to its runs: what each is, in which order, and which learning rate goes on."""

import hashlib
import json
import math
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from typing import Any

from .schema import Experiment, ModelEntry, TaskEntry, Training
from .tasks import TASKS


TUNING, FINAL = "tuning", "final"
RUN_FIELDS = (
    *("batch_size", "weight_decay", "warmup_steps", "eval_steps", "stop_at"),
    *("mixture_learning_rate", "calibration_rows"),
)


@dataclass(frozen=True)
class Job:
    """
    One run. `settings` decide its result and nothing else is in them: names in tables are not. `digest` is their
    fingerprint, with the version of this package.
    """

    model: str
    task: str
    phase: str
    settings: dict[str, Any] = field(hash=False)

    @property
    def digest(self) -> str:
        """20 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:20]


@dataclass
class Chain:
    """A task with models of which one may need another's result. Chains need nothing of each other."""

    experiment: Experiment
    task: TaskEntry
    models: list[ModelEntry]

    @property
    def count(self) -> int:
        """Number of runs."""
        training = self.experiment.training_of(self.task)
        tuned = len(training.learning_rates) if len(training.learning_rates) > 1 else 0
        return len(self.models) * (tuned + len(training.seeds))

    def jobs(self) -> Generator[list[Job], list[dict], None]:
        """
        Batches of jobs that may run at the same time; send the records of one, in its order, for the next. For each
        model all learning rates on the first seed (no batch with only one), then the best of them on all seeds.
        """
        training = self.experiment.training_of(self.task)
        rates, first = training.learning_rates, training.seeds[0]
        finished: dict[tuple[str, int], dict] = {}
        for model in self.models:
            rate = rates[0]
            if len(rates) > 1:
                tuned = yield [self._job(model, rate, first, TUNING, finished) for rate in rates]
                rate = rates[best_of(tuned, self.task)]
            found = yield [self._job(model, rate, seed, FINAL, finished) for seed in training.seeds]
            finished |= {(model.name, seed): record for seed, record in zip(training.seeds, found)}

    def _job(self, model: ModelEntry, rate: float, seed: int, phase: str, finished: dict) -> Job:
        from .. import __version__

        training = self.experiment.training_of(self.task)
        settings: dict[str, Any] = {}
        if model.kind == "discretized":
            found = "choice" if model.max_attention_blocks is None else "weights"
            settings[found] = finished[model.of, seed][found]
        if model.kind == "same_parameters":
            settings["parameters"] = finished[model.of, seed]["parameters"]
        settings |= shared_settings(self.experiment, self.task, model)
        settings |= {
            "version": __version__,
            "learning_rate": rate,
            "seed": seed,
            "steps": min(training.tuning_steps, training.steps) if phase == TUNING else training.steps,
            "tested": phase == FINAL,
        }
        return Job(model.name, self.task.name, phase, settings)


def shared_settings(experiment: Experiment, task: TaskEntry, model: ModelEntry) -> dict[str, Any]:
    """What of the settings all runs of a model on a task have in common."""
    layout, found = model, {}
    if model.kind == "discretized":
        layout = next(other for other in experiment.models if other.name == model.of)
        found["supernet"] = nameless(layout)
    return found | {
        "model": nameless(model) | {"of": None if model.of is None else "of"},
        "families": experiment.families_of(layout),
        "task": nameless(task),
        "shape": asdict(experiment.shape),
        "training": run_fields(experiment.training_of(task)),
    }


def nameless(entry: ModelEntry | TaskEntry) -> dict[str, Any]:
    """An entry as plain values that decide a run: without its name, its budget and what others published."""
    return {key: value for key, value in asdict(entry).items() if key not in ("name", "budget", "published")}


def run_fields(training: Training) -> dict[str, Any]:
    """
    What of the budget changes a single run; the rest is of the grid. What was added later is here only where it is not
    the default, so that older runs still count.
    """
    found = {name: getattr(training, name) for name in RUN_FIELDS}
    return found | ({"group_by_length": True} if training.group_by_length else {})


def best_of(records: list[dict], task: TaskEntry) -> int:
    """
    Index of the best on validation. Accuracies tie when a task is solved, or not at all; then the loss decides, and
    then the first. The test split is not looked at.
    """
    measure = TASKS[task.task].measure

    def rank(record: dict) -> tuple[float, float]:
        loss = record["validation"]["loss"]
        loss = -math.inf if loss is None else -loss
        accuracy = record["validation"]["accuracy"]
        return (accuracy, loss) if measure == "accuracy" else (loss, accuracy)

    return max(range(len(records)), key=lambda i: (*rank(records[i]), -i))


def chains_of(experiment: Experiment) -> list[Chain]:
    """All chains; those of most models, which take longest, first."""
    groups: list[list[ModelEntry]] = []
    for model in experiment.models:
        root = model
        while root.of is not None:
            root = next(other for other in experiment.models if other.name == root.of)
        own = next((group for group in groups if root in group), None)
        if own is None:
            groups.append([root] if root is model else [root, model])
        elif model not in own:
            own.append(model)
    groups = [_in_order(group) for group in groups]
    groups.sort(key=len, reverse=True)
    return [Chain(experiment, task, group) for group in groups for task in experiment.tasks]


def _in_order(group: list[ModelEntry]) -> list[ModelEntry]:
    """Every model after the one that it is made of."""
    ordered: list[ModelEntry] = []
    while len(ordered) < len(group):
        names = {model.name for model in ordered}
        ordered += [m for m in group if m.name not in names and (m.of is None or m.of in names)]
    return ordered


def shard_of(chains: list[Chain], index: int, count: int) -> list[Chain]:
    """The chains of shard `index` (1..count): every chain is in exactly one."""
    return chains[index - 1 :: count]
