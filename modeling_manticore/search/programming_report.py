"""What programming found: mixture weights, their course, the accuracy on every task over time."""

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..pages.of_reports import programming_page
from .history import course_of, mixture_courses, plot_mixtures
from .search_report import FILES
from .stitch_report import report_values, write_json


REPORT_NAME = "programming.json"


@dataclass
class ProgrammingReport:
    """
    Attributes:
        tasks: their weights, with sum 1.
        settings: the fields of `MadSetting` of every task.
        weights: the mixture weights that were found, one point for each block; `set_mixture_weights` takes them.
        paths: a label for every path of every block.
        metrics: of every task, [{"step", "accuracy", "loss"}] on the validation split; accuracy counts tokens of the
            joint vocabulary, loss is in nats.
        seconds, processor_seconds: of the whole, by the clock and of all threads together.
        log_history: what the Trainer logged, in the form of `TrainerState`.
        config: the supernet's, for pictures; not in the JSON.
    """

    tasks: dict[str, float]
    settings: dict[str, dict]
    strategy: str
    steps: int
    seed: int
    train_components: bool
    weights: list[list[float]]
    paths: list[list[str]]
    metrics: dict[str, list[dict[str, float]]]
    seconds: float
    processor_seconds: float
    log_history: list[dict]
    config: Any = field(default=None, repr=False, compare=False)

    @property
    def choice(self) -> list[int]:
        """The path of the largest weight in every block; `discretize` keeps no skip path in the first and last."""
        return [point.index(max(point)) for point in self.weights]

    @property
    def course(self) -> dict[int, dict[int, list[tuple[int, float]]]]:
        """`course[block][path]`: points (step, weight) of every block with more than one path."""
        found = mixture_courses(self.log_history)
        return {b: {p: points for p, points in paths.items() if p is not None} for b, paths in found.items()}

    def __str__(self) -> str:
        lines = [f"{self.strategy}, {self.steps} steps, {self.seconds:.1f} s", ""]
        width = max(len("task"), *map(len, self.tasks))
        lines.append(f"{'task':<{width}}  weight  accuracy at the start  at the end  loss")
        for task, weight in self.tasks.items():
            first, last = self.metrics[task][0], self.metrics[task][-1]
            lines.append(
                f"{task:<{width}}  {weight:6.3f}  {first['accuracy']:21.3f}  {last['accuracy']:10.3f}  "
                f"{last['loss']:.3f}"
            )
        lines += ["", "block  weights (* is the largest)"]
        for b, (point, names) in enumerate(zip(self.weights, self.paths)):
            best = point.index(max(point))
            words = [
                f"{name} {weight:.3f}{'*' if p == best else ''}" for p, (name, weight) in enumerate(zip(names, point))
            ]
            lines.append(f"{b:<5}  " + "   ".join(words))
        return "\n".join(lines)

    def save(self, folder: str | Path) -> None:
        """
        Write `programming.json`, the same as a page in `report.html` and, with matplotlib, `mixture_weights.png` into
        the folder.

        Raises:
            ValueError: the folder is a file.
        """
        folder = check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / REPORT_NAME, report_values(self))
        self.write_page(folder)
        if importlib.util.find_spec("matplotlib") is not None:
            plot_mixtures(self.log_history, folder / FILES[2], self.paths)

    def write_page(self, folder: str | Path, recipe: Any = None) -> None:
        """Write `report.html`; `recipe` are plain values that say how the search was started."""
        course = course_of(self.log_history, [len(point) for point in self.weights])
        values = report_values(self) | {"choice": self.choice, "course": course}
        programming_page(values, self.config, recipe).write(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "ProgrammingReport":
        """
        What `save` wrote.

        Raises:
            ValueError: there is none in the folder.
        """
        file = Path(folder) / REPORT_NAME
        if not file.is_file():
            raise ValueError(f"folder: got {str(folder)!r}, allowed is a folder with a {REPORT_NAME}.")
        return cls(**json.loads(file.read_text(encoding="utf-8")))


def check_folder(folder: str | Path) -> Path:
    """
    Raises:
        ValueError: the folder is a file.
    """
    if Path(folder).is_file():
        raise ValueError(f"folder: got the file {str(folder)!r}, allowed is a folder.")
    return Path(folder)
