"""What may stand in an experiment file: one dataclass for each section. Nothing here trains or writes anything."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..configuration_manticore import GATES
from ..hub.checked import checked, read
from ..hub.recipe_schema import some_text
from ..hub.safe_yaml import read_yaml
from .tasks import TASKS, check_task


ATTENTION = ("gpt_neox", "llama")
STATE_SPACE = ("mamba2",)
FAMILIES = ATTENTION + STATE_SPACE
MOST_STEPS = 10**7
# What each kind of model needs and may have beside its name.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "component": (("family",), ("hidden_size", "layers")),
    "searched": ((), ("families", "sources", "blocks", "gate", "hidden_size", "layers")),
    "discretized": (("of",), ("max_attention_blocks",)),
    "mixture": (("weights",), ("families", "sources", "blocks", "gate", "hidden_size", "layers")),
    "mambaformer": ((), ("families", "hidden_size", "layers")),
    "striped": ((), ("families", "hidden_size", "layers")),
    "same_parameters": (("family", "of"), ("layers",)),
    "continued": (("source",), ()),
    "ensemble": (("sources",), ()),
}
COMPONENT_KINDS = ("component", "continued")
# What each test of a claim needs and may have beside `paper`.
CLAIMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "at_least": (("model", "against"), ("tasks",)),
    "better": (("model", "against"), ("tasks",)),
    "cache": (("model", "against", "share"), ("tasks",)),
    "number": (("file", "path"), ("at_most", "at_least")),
}
BEST = "best component"


@dataclass
class Shape:
    """Sizes of models from scratch; a model may have its own `hidden_size` and `layers`."""

    hidden_size: int = checked(64, least=16, most=8192)
    layers: int = checked(2, least=1, most=256)
    blocks: int = checked(2, least=1, most=256)
    attention: str = checked("gpt_neox", choices=ATTENTION)
    state_space: str = checked("mamba2", choices=STATE_SPACE)
    head_size: int = checked(32, least=8, most=512)
    state_size: int = checked(32, least=1, most=1024)
    chunk_size: int = checked(32, least=1, most=4096)

    def validate(self, where: str) -> None:
        """
        Raises:
            ValueError: the width is no multiple of the heads' size, or there are more blocks than layers.
        """
        if self.hidden_size % self.head_size or self.head_size % 2:
            raise ValueError(
                f"{where}.hidden_size: got {self.hidden_size}, allowed are multiples of head_size, {self.head_size}, "
                "an even number."
            )
        if self.blocks > self.layers:
            raise ValueError(f"{where}.blocks: got {self.blocks}, allowed is at most layers, {self.layers}.")


@dataclass
class ModelEntry:
    """A row of the tables: its name there, what it is, and what that kind needs (`KINDS`)."""

    name: str = checked(check=some_text)
    kind: str = checked(choices=tuple(KINDS))
    family: str | None = checked(None, choices=(None, *FAMILIES))
    families: list[str] | None = checked(None, least=1, most=16)
    source: str | None = checked(None, check=some_text)
    sources: list[str] | None = checked(None, least=1, most=16, check=some_text)
    of: str | None = None
    weights: str | None = checked(None, choices=(None, "uniform", "random"))
    gate: str | None = checked(None, choices=(None, *GATES))
    max_attention_blocks: int | None = checked(None, least=0, most=256)
    blocks: int | None = checked(None, least=1, most=256)
    hidden_size: int | None = checked(None, least=16, most=8192)
    layers: int | None = checked(None, least=1, most=256)

    def validate(self, where: str) -> None:
        """
        Raises:
            ValueError: a field that the kind needs is missing, or one is given that it has not.
        """
        _check_fields(self, where, repr(self.kind), *KINDS[self.kind], ("name", "kind"))
        for i, family in enumerate(self.families or []):
            if family not in FAMILIES:
                raise ValueError(f"{where}.families[{i}]: got {family!r}, allowed are {', '.join(FAMILIES)}.")
        if self.families and self.sources:
            raise ValueError(f"{where}.families: got it with sources, allowed is one of them.")
        if self.kind in ("mambaformer", "striped") and self.families and len(self.families) != 2:
            raise ValueError(f"{where}.families: got {len(self.families)}, allowed are attention and state space.")
        if self.kind == "ensemble" and len(self.sources) < 2:
            raise ValueError(f"{where}.sources: got {len(self.sources)}, allowed are two or more.")


@dataclass
class ExtraTest:
    """A further test split: another `split` of the task, or of the task with some options changed."""

    name: str = checked(check=some_text)
    split: str = checked("test", check=some_text)
    options: dict[str, Any] = checked({})


@dataclass
class Budget:
    """What a task may have in place of the experiment's budget, the same for all models; None leaves that."""

    tuning_steps: int | None = checked(None, least=1, most=MOST_STEPS)
    steps: int | None = checked(None, least=1, most=MOST_STEPS)
    batch_size: int | None = checked(None, least=1, most=4096)
    eval_steps: int | None = checked(None, least=1, most=MOST_STEPS)
    group_by_length: bool | None = None


@dataclass
class Published:
    """What others published for a task: accuracies in percent by model, and what differs in their setting."""

    difference: str = checked(check=some_text)
    accuracies: dict[str, float] = checked({}, least=1)

    def validate(self, where: str) -> None:
        """
        Raises:
            ValueError: an accuracy is not between 0 and 100.
        """
        for name, value in self.accuracies.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 100:
                raise ValueError(f"{where}.accuracies.{name}: got {value!r}, allowed is a number in 0..100.")


@dataclass
class TaskEntry:
    """
    A column of the tables: its name there, the task, its options, further test splits, a `budget` of its own, and
    published numbers to stand beside.
    """

    name: str = checked(check=some_text)
    task: str = checked(check=some_text)
    options: dict[str, Any] = checked({})
    also_tested: list[ExtraTest] = checked([], most=16)
    budget: Budget = field(default_factory=Budget)
    published: Published | None = None

    def validate(self, where: str) -> None:
        """
        Raises:
            ValueError: two further test splits have one name.
        """
        _check_names(f"{where}.also_tested", self.also_tested)


@dataclass
class Training:
    """
    The same budget for every model. Learning rates are compared by validation after `tuning_steps` on the first seed,
    and the best one is trained for at most `steps` on every seed. `group_by_length` makes batches of rows of about one
    length, so that less is padding.
    """

    learning_rates: list[float] = checked([5e-4, 2e-3, 5e-3], least=1, most=32)
    tuning_steps: int = checked(500, least=1, most=MOST_STEPS)
    steps: int = checked(1500, least=1, most=MOST_STEPS)
    seeds: list[int] = checked([0, 1, 2], least=1, most=100)
    batch_size: int = checked(64, least=1, most=4096)
    weight_decay: float = checked(0.0, least=0.0)
    warmup_steps: int = checked(0, least=0, most=MOST_STEPS)
    eval_steps: int = checked(100, least=1, most=MOST_STEPS)
    stop_at: float | None = checked(0.995, above=0.0, most=1.0)
    mixture_learning_rate: float = checked(0.01, least=0.0)
    group_by_length: bool = False
    calibration_rows: int = checked(256, least=1, most=10**6)

    def validate(self, where: str) -> None:
        """
        Raises:
            ValueError: a learning rate is not positive, or a seed or rate is given twice.
        """
        for i, rate in enumerate(self.learning_rates):
            if rate <= 0:
                raise ValueError(f"{where}.learning_rates[{i}]: got {rate}, allowed is a number above 0.")
        for i, seed in enumerate(self.seeds):
            if not 0 <= seed < 2**31:
                raise ValueError(f"{where}.seeds[{i}]: got {seed}, allowed are 0..{2**31 - 1}.")
        for name in ("learning_rates", "seeds"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{where}.{name}: it has an entry twice.")


@dataclass
class Claim:
    """
    What the paper says, and the test on our data that decides whether it holds (`experiments/claims.py`).

    Fields: `tasks` is the number of tasks on which it must hold, by default all that were learned; `at_most` and
    `at_least` are for "number", a value of a JSON file in the folder of results, at keys joined by "/".
    """

    paper: str = checked(check=some_text)
    test: str = checked(choices=tuple(CLAIMS))
    model: str | None = None
    against: str | None = None
    tasks: int | None = checked(None, least=1)
    share: float | None = checked(None, above=0.0)
    file: str | None = checked(None, check=some_text)
    path: str | None = checked(None, check=some_text)
    at_most: float | None = None
    at_least: float | None = None

    def validate(self, where: str) -> None:
        """
        Raises:
            ValueError: a field that the test needs is missing, or one is given that it has not.
        """
        needed, optional = CLAIMS[self.test]
        _check_fields(self, where, f"the test {self.test!r}", needed, optional, ("paper", "test"))
        if self.test == "number" and self.at_most is None and self.at_least is None:
            raise ValueError(f"{where}.at_most, {where}.at_least: both are missing, allowed is one or both.")
        if self.file is not None and ("/" in self.file or "\\" in self.file or not self.file.endswith(".json")):
            raise ValueError(
                f"{where}.file: got {self.file!r}, allowed is the name of a .json file among the results."
            )


@dataclass
class Experiment:
    """
    One experiment. `output` is the folder of results, relative to the file. `learned_margin` is by how much the lower
    end of a model's interval must exceed the guess by frequency to count as learned. One that is no `evidence` is in
    no report unless named. An experiment without models and tasks has claims on JSON files that other scripts wrote.
    """

    name: str = checked(check=some_text)
    title: str = checked(check=some_text)
    description: str = ""
    output: str = checked("../results", check=some_text)
    workers: int = checked(2, least=1, most=256)
    evidence: bool = True
    learned_margin: float = checked(0.02, least=0.0, most=1.0)
    shape: Shape = field(default_factory=Shape)
    training: Training = field(default_factory=Training)
    models: list[ModelEntry] = checked([], most=64)
    tasks: list[TaskEntry] = checked([], most=64)
    claims: list[Claim] = checked([], most=64)

    def validate(self, where: str) -> None:
        """
        Raises:
            ValueError: names that are given twice or refer to nothing.
        """
        if not self.name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"name: got {self.name!r}, allowed are letters, digits, '-' and '_'.")
        for section in ("models", "tasks"):
            _check_names(section, getattr(self, section))
        if bool(self.models) != bool(self.tasks):
            raise ValueError("models, tasks: got only one of them, allowed are both or neither.")
        models = {model.name: model for model in self.models}
        for i, model in enumerate(self.models):
            self._check_model(i, model, models)
        for i, claim in enumerate(self.claims):
            if claim.model is not None and claim.model not in models:
                raise ValueError(f"claims[{i}].model: got {claim.model!r}, allowed are {', '.join(models)}.")
            if claim.against is not None and claim.against not in (*models, BEST):
                raise ValueError(f"claims[{i}].against: got {claim.against!r}, allowed are {BEST!r} and models.")
            if claim.tasks is not None and claim.tasks > len(self.tasks):
                raise ValueError(f"claims[{i}].tasks: got {claim.tasks}, allowed is at most {len(self.tasks)}.")

    def _check_model(self, i: int, model: ModelEntry, models: dict[str, ModelEntry]) -> None:
        size = model.hidden_size or self.shape.hidden_size
        if size % self.shape.head_size:
            raise ValueError(
                f"models[{i}].hidden_size: got {size}, allowed are multiples of head_size, {self.shape.head_size}."
            )
        layers, blocks = model.layers or self.shape.layers, model.blocks or self.shape.blocks
        if model.kind in ("searched", "mixture") and model.sources is None and blocks > layers:
            raise ValueError(f"models[{i}].blocks: got {blocks}, allowed is at most layers, {layers}.")
        if model.of is None:
            return
        kinds = ("searched",) if model.kind == "discretized" else tuple(k for k in KINDS if k != "same_parameters")
        allowed = [other.name for other in models.values() if other.kind in kinds]
        if model.of not in allowed:
            raise ValueError(
                f"models[{i}].of: got {model.of!r}, allowed are {', '.join(map(repr, allowed)) or 'none'}."
            )

    def training_of(self, task: TaskEntry) -> Training:
        """The budget of all models on a task."""
        return replace(
            self.training, **{key: value for key, value in asdict(task.budget).items() if value is not None}
        )

    def families_of(self, model: ModelEntry) -> list[str]:
        """Families of a hybrid from scratch: its own, or attention and state space of the shape."""
        return model.families or [self.shape.attention, self.shape.state_space]


def _check_fields(
    entry: Any, where: str, kind: str, needed: tuple[str, ...], optional: tuple[str, ...], always: tuple[str, ...]
) -> None:
    given = [name for name in entry.__dataclass_fields__ if name not in always and getattr(entry, name) is not None]
    for name in needed:
        if name not in given:
            raise ValueError(f"{where}.{name}: it is missing, {kind} needs it.")
    for name in given:
        if name not in needed + optional:
            allowed = ", ".join(needed + optional) or "no other field"
            raise ValueError(f"{where}.{name}: got it for {kind}, allowed there is {allowed}.")


def _check_names(where: str, entries: list) -> None:
    names = [entry.name for entry in entries]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ValueError(f"{where}[{i}].name: {name!r} is given twice.")


def load_experiment(file: str | Path) -> Experiment:
    """
    An experiment out of a YAML file. Only read and checked.

    Raises:
        ValueError: names the file and the field, what was given and what is allowed.
    """
    path = Path(file)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"experiment: got {str(file)!r}, allowed is a .yaml file.")
    settings = read_yaml(path)
    try:
        experiment = read(Experiment, {"name": path.stem} | settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    experiment.output = str(path.parent / experiment.output)
    return experiment


def check_tasks(experiment: Experiment) -> None:
    """
    What needs the tasks' own code. A report does without it.

    Raises:
        ValueError: names the task, what was given and what is allowed.
    """
    for i, entry in enumerate(experiment.tasks):
        splits = check_task(entry.task, entry.options, f"tasks[{i}]")
        for j, model in enumerate(experiment.models):
            if (model.source or model.sources) and TASKS[entry.task].head != "tokens":
                raise ValueError(
                    f"models[{j}]: it is pretrained, allowed with {entry.task!r} are models from scratch."
                )
        for j, extra in enumerate(entry.also_tested):
            where = f"tasks[{i}].also_tested[{j}]"
            own = check_task(entry.task, entry.options | extra.options, where) if extra.options else splits
            if own is not None and extra.split not in own:
                raise ValueError(f"{where}.split: got {extra.split!r}, allowed are {', '.join(own)}.")
