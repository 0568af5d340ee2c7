"""The runs of one experiment as numbers by column, model and seed, and what may be said of them."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from .intervals import Interval, interval, paired
from .jobs import FINAL, TUNING, best_of, shared_settings
from .records import read_lines
from .schema import BEST, COMPONENT_KINDS, Experiment
from .tasks import TASKS


@dataclass(frozen=True)
class Column:
    """A task and the test split it is measured on: its own (`extra` None) or one of `also_tested`."""

    task: str
    extra: str | None
    greater_is_better: bool

    @property
    def name(self) -> str:
        """In tables."""
        return self.task if self.extra is None else f"{self.task} ({self.extra})"


class Results:
    """
    The final runs of an experiment, of one setting each: where lines of several settings are there (the file was
    changed since), those are left out whose model, budget, task or shape is not the file's, and of final runs those
    whose learning rate is not the one that the comparison chose.
    """

    def __init__(self, experiment: Experiment, lines: list[dict[str, Any]] | None = None):
        self.experiment = experiment
        lines = read_lines(experiment.output, experiment.name) if lines is None else lines
        self.lines = [line for line in lines if self._is_current(line)]
        self.outdated = len(lines) - len(self.lines)
        self.columns = self._columns()
        self._final: dict[tuple, dict] = {}
        for line in self.lines:
            if line["phase"] == FINAL and self.chosen_rate(line["task"], line["model"]) in (
                None,
                line["learning_rate"],
            ):
                self._final.setdefault((line["task"], line["model"], line["seed"]), line)

    def _is_current(self, line: dict) -> bool:
        """Whether the line is of this file's grid, whichever learning rate was the best."""
        experiment, settings = self.experiment, line["settings"]
        task = next((task for task in experiment.tasks if task.name == line["task"]), None)
        model = next((model for model in experiment.models if model.name == line["model"]), None)
        if task is None or model is None:
            return False
        training = experiment.training_of(task)
        tuning_steps = min(training.tuning_steps, training.steps)
        shared = shared_settings(experiment, task, model)
        return (
            all(settings.get(name) == value for name, value in shared.items())
            and line["seed"] in training.seeds
            and line["learning_rate"] in training.learning_rates
            and line["steps"] == (tuning_steps if line["phase"] == TUNING else training.steps)
        )

    def tuning(self, task: str, model: str) -> list[dict]:
        """The runs that compare learning rates, in the order of the grid; empty while one is missing."""
        found = {
            line["learning_rate"]: line
            for line in self.lines
            if (line["task"], line["model"], line["phase"]) == (task, model, TUNING)
        }
        rates = self.experiment.training.learning_rates
        return [found[rate] for rate in rates] if all(rate in found for rate in rates) else []

    def chosen_rate(self, task: str, model: str) -> float | None:
        """The learning rate that is best on validation rows; None without (all of) the comparison."""
        runs = self.tuning(task, model)
        entry = next(entry for entry in self.experiment.tasks if entry.name == task)
        return runs[best_of(runs, entry)]["learning_rate"] if runs else None

    def chosen_by_chance(self, task: str, model: str) -> bool:
        """Whether none of the compared learning rates was above the frequency baseline, so that none is better."""
        runs = self.tuning(task, model)
        entry = next(entry for entry in self.experiment.tasks if entry.name == task)
        if not runs or TASKS[entry.task].measure != "accuracy":
            return False
        return max(line["validation"]["accuracy"] for line in runs) <= runs[0]["baseline"]

    def _columns(self) -> list[Column]:
        columns = []
        for task in self.experiment.tasks:
            better = TASKS[task.task].greater_is_better
            columns.append(Column(task.name, None, better))
            columns += [Column(task.name, extra.name, better) for extra in task.also_tested]
        return columns

    @property
    def models(self) -> list[str]:
        """Names in the order of the file."""
        return [model.name for model in self.experiment.models]

    @property
    def components(self) -> list[str]:
        """Models that are a component, from scratch or continued."""
        return [model.name for model in self.experiment.models if model.kind in COMPONENT_KINDS]

    def runs(self, task: str, model: str) -> list[dict]:
        """The final runs, in the order of the seeds; those that are missing left out."""
        found = (self._final.get((task, model, seed)) for seed in self.experiment.training.seeds)
        return [line for line in found if line is not None]

    @property
    def has_final_runs(self) -> bool:
        """Whether anything has been tested."""
        return bool(self._final)

    def tested(self, task: str) -> bool:
        """Whether every model has a final run of the task, so that something can be said of it."""
        return all(self.runs(task, model) for model in self.models)

    def values(self, column: Column, model: str) -> dict[int, float]:
        """The column's measure on test rows by seed; what is not a finite number is left out."""
        measure = "accuracy" if column.greater_is_better else "loss"
        found = {}
        for line in self.runs(column.task, model):
            tested = line["test"] if column.extra is None else line["also_tested"][column.extra]
            if tested[measure] is not None:
                found[line["seed"]] = tested[measure]
        return found

    def interval(self, column: Column, model: str) -> Interval | None:
        """Mean and interval over seeds, or None without runs."""
        values = list(self.values(column, model).values())
        return interval(values) if values else None

    def baseline(self, column: Column) -> float | None:
        """Test accuracy of a guess by frequency, mean over seeds (their data differ); None for losses."""
        if not column.greater_is_better:
            return None
        by_seed = {}
        for model in self.models:
            for line in self.runs(column.task, model):
                of_split = line["baseline"] if column.extra is None else line["also_baseline"][column.extra]
                by_seed[line["seed"]] = of_split
        return sum(by_seed.values()) / len(by_seed) if by_seed else None

    def learned(self, column: Column, model: str) -> bool:
        """Whether the lower end of the model's interval is above the baseline and the margin; for losses: yes."""
        found = self.interval(column, model)
        if found is None or not column.greater_is_better:
            return found is not None
        low = found.mean if found.half_width is None else found.low
        return low > self.baseline(column) + self.experiment.learned_margin

    def learned_by_anyone(self, column: Column) -> bool:
        """Whether some model learned the task; else it is left out of every count."""
        return any(self.learned(column, model) for model in self.models)

    def best_component(self, column: Column) -> str | None:
        """The component that is best on validation rows, mean over seeds: the test rows must not choose the rival."""
        measure = "accuracy" if column.greater_is_better else "loss"

        def rank(model: str) -> tuple[float, float]:
            found = [line["validation"] for line in self.runs(column.task, model)]
            worst = float("-inf")
            losses = [worst if entry["loss"] is None else -entry["loss"] for entry in found]
            mean_loss = sum(losses) / len(losses)
            if measure == "loss":
                return (mean_loss, 0.0)
            return (sum(entry["accuracy"] for entry in found) / len(found), mean_loss)

        have_runs = [model for model in self.components if self.runs(column.task, model)]
        return max(have_runs, key=rank, default=None)

    def rival(self, column: Column, name: str) -> str | None:
        """A model's name; "best component" is resolved for the column."""
        return self.best_component(column) if name == BEST else name

    def differences(self, column: Column, model: str, rival: str) -> list[float]:
        """Seed by seed, how much better the model is: difference of accuracies, or of losses with the sign turned."""
        first, second = self.values(column, model), self.values(column, rival)
        sign = 1.0 if column.greater_is_better else -1.0
        return [sign * (first[seed] - second[seed]) for seed in first if seed in second]

    def difference(self, column: Column, model: str, rival: str) -> Interval | None:
        """Interval of `differences`, or None without a pair of runs."""
        found = self.differences(column, model, rival)
        return paired(found, [0.0] * len(found)) if found else None

    def is_complete(self, column: Column, model: str) -> bool:
        """Whether every seed of the experiment has a number."""
        return len(self.values(column, model)) == len(self.experiment.training.seeds)

    def mean_of(self, field: str, model: str, task: str | None = None) -> float | None:
        """Mean of a numeric field of the final runs, over seeds and, without a task, over tasks."""
        tasks = [task] if task is not None else [entry.name for entry in self.experiment.tasks]
        found = [line[field] for name in tasks for line in self.runs(name, model)]
        return sum(found) / len(found) if found else None

    def rates(self, task: str, model: str) -> list[float]:
        """Learning rates of the final runs, which is one."""
        return sorted({line["learning_rate"] for line in self.runs(task, model)})

    def choices(self, task: str, model: str) -> Counter:
        """How often a search, or what was built by it, has which paths, as digits."""
        found = (line.get("choice") for line in self.runs(task, model))
        return Counter("".join(map(str, choice)) for choice in found if choice)

    def single_choices(self, model: str) -> tuple[int, int]:
        """Of how many runs the choice is one component alone, and how many runs have a choice."""
        found = sum((self.choices(task.name, model) for task in self.experiment.tasks), Counter())
        return sum(count for choice, count in found.items() if len(set(choice)) == 1), found.total()
