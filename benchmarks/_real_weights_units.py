"""The units of `real_weights.py`: which there are, what one does, and how long it is going to take."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from _components import train
from _ledger import Ledger, digest
from _real_weights_data import TEXTS, load_teacher, make_rows, smollm2
from _real_weights_fit import FitOptions, MixerFit, fitted
from _real_weights_models import dropped, freeze_bridges, with_mamba, without_attention
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from modeling_manticore import ManticoreConfig, calibrate
from modeling_manticore.cache_manticore import cache_growth
from modeling_manticore.commands.models import measure
from modeling_manticore.mixing_manticore import Projector


VARIANTS = ("teacher", "dropped", "linear", "no attention", "mamba2")
# CPU seconds a token on a machine of two cores, where the ledger has no unit of the kind yet: full training, a forward
# pass, a forward pass of the trunk up to layer 20, a step of one Mamba-2.
GUESSES = {"train": 1 / 110, "evaluate": 1 / 490, "trunk": 1 / 700, "mixer": 1 / 3600}


@dataclass(frozen=True)
class Preset:
    """
    Sizes of the experiment, all counted in tokens of the teacher's tokenizer.

    Args:
        fit_tokens: read to fit the mixers. linear_tokens: to fit the linear maps.
        train_tokens: of the end-to-end step. test_tokens: of every test text, at most (the newer
            one has 25,600).
    """

    fit_tokens: int
    linear_tokens: int
    train_tokens: int
    test_tokens: int
    seeds: int = 3
    length: int = 512
    rows_per_step: int = 2
    learning_rate: float = 1e-4
    replaced: tuple[tuple[int, ...], ...] = ((15,), (10, 15, 20))
    fit_rows_per_step: int = 4
    fit_learning_rate: float = 2e-3
    state: int = 64
    like_attention: bool = True

    @property
    def fit_layers(self) -> list[int]:
        """All layers that are replaced in some variant."""
        return sorted({layer for layers in self.replaced for layer in layers})

    @property
    def fit(self) -> FitOptions:
        """How the mixers are fitted."""
        rates = self.fit_rows_per_step, self.fit_learning_rate
        return FitOptions(self.fit_tokens, *rates, self.state, like_attention=self.like_attention)


PRESETS = {
    "full": Preset(fit_tokens=2_000_000, linear_tokens=60_000, train_tokens=100_000, test_tokens=37_000),
    "smoke": Preset(fit_tokens=2_048, linear_tokens=1_024, train_tokens=512, test_tokens=512, seeds=2, length=256),
    "short": Preset(fit_tokens=300_000, linear_tokens=20_000, train_tokens=16_000, test_tokens=8_000),
}


@dataclass(frozen=True)
class Unit:
    """
    One thing to do: fit all mixers ("fit"), or make a variant, train it end to end if it has a seed, and measure it
    ("evaluate", "train").
    """

    kind: str
    variant: str = ""
    layers: tuple[int, ...] = ()
    seed: int | None = None

    def settings(self, preset: Preset) -> dict:
        """All that the result depends on; no more, so that presets share what they can."""
        given = asdict(preset)
        names = ["length"]
        if self.kind == "fit" or self.variant == "mamba2":
            names += ["fit_tokens", "fit_rows_per_step", "fit_learning_rate", "state", "like_attention"]
        names += ["linear_tokens"] * (self.variant == "linear") + ["test_tokens"] * (self.kind != "fit")
        names += ["train_tokens", "rows_per_step", "learning_rate"] * (self.kind == "train")
        layers = preset.fit_layers if self.kind == "fit" else list(self.layers)
        own = {"unit": self.kind, "variant": self.variant, "layers": layers, "seed": self.seed}
        return own | {name: given[name] for name in names}

    def tokens(self, preset: Preset) -> dict[str, float]:
        """Tokens that each kind of work reads, for an estimate."""
        if self.kind == "fit":
            return {"trunk": preset.fit_tokens, "mixer": preset.fit_tokens * len(preset.fit_layers)}
        found = {"evaluate": 3.0 * preset.test_tokens}
        if self.variant == "linear" and self.kind == "evaluate":
            found["evaluate"] += 1.2 * preset.linear_tokens * len(self.layers)
        return found | ({"train": preset.train_tokens} if self.kind == "train" else {})

    def __str__(self) -> str:
        where = "+".join(map(str, self.layers))
        seed = "" if self.seed is None else f", trained end to end, seed {self.seed}"
        return " ".join(filter(None, (self.kind if self.kind == "fit" else self.variant, where))) + seed


def units(preset: Preset) -> list[Unit]:
    """All units, in the order in which they are worth having: everything of one seed before the next."""
    pairs = [("teacher", ())] + [(v, layers) for layers in reversed(preset.replaced) for v in VARIANTS[1:]]
    order = [Unit("fit")] + [Unit("evaluate", *pair) for pair in pairs]
    return order + [Unit("train", *pair, seed) for seed in range(preset.seeds) for pair in pairs]


def estimate(unit: Unit, preset: Preset, ledger: Ledger) -> float:
    """CPU seconds of a unit: the guess, scaled by what finished units of the kind took against theirs."""
    guess = _guess(unit, preset)
    done = [(u, line) for u in units(preset) if u.kind == unit.kind and (line := ledger.find(u.settings(preset)))]
    if not done:
        return guess
    return guess * sum(line["seconds"]["cpu"] for _, line in done) / sum(_guess(u, preset) for u, _ in done)


def _guess(unit: Unit, preset: Preset) -> float:
    return sum(GUESSES[kind] * tokens for kind, tokens in unit.tokens(preset).items())


class Bench:
    """The teacher, the rows and the files of finished fits in one work folder. Made anew in every worker process."""

    def __init__(self, folder: Path, preset: Preset, teacher: Path | None = None, rows: dict | None = None):
        self.folder, self.preset = Path(folder), preset
        self.teacher_folder = smollm2(self.folder) if teacher is None else teacher
        self.rows = make_rows(self.folder, self.teacher_folder, preset.length) if rows is None else rows

    def teacher(self) -> PreTrainedModel:
        """A fresh copy of the uncut model."""
        return load_teacher(self.teacher_folder)

    def fit_folder(self) -> Path:
        """Where the fitted mixers of the preset are kept."""
        return self.folder / "fits" / digest(Unit("fit").settings(self.preset))

    def is_fitted(self) -> bool:
        """Whether the fitted mixers are there; on another machine they are not, whatever the ledger says."""
        return (self.fit_folder() / "fit.json").is_file()

    def fit(self, out_of_time: Callable[[], bool]) -> dict:
        """Fit the mixers, or go on fitting them."""
        work = MixerFit(self.teacher(), self.preset.fit_layers, self.preset.fit, self.fit_folder())
        return work.run(self.rows["train"], self.rows["search"], out_of_time)

    def build(self, variant: str, layers: list[int]) -> PreTrainedModel:
        """A variant before the end-to-end step."""
        teacher = self.teacher()
        if variant == "teacher":
            return teacher
        if variant == "mamba2":
            mixers = fitted(self.fit_folder(), layers)
            return freeze_bridges(with_mamba(teacher, mixers, self.preset.state, self.preset.like_attention))
        if variant == "no attention":
            return freeze_bridges(without_attention(teacher, layers, teacher.config.head_dim))
        model = dropped(teacher, layers)
        return freeze_bridges(model) if variant == "dropped" else self._give_maps(model, teacher)

    def _give_maps(self, model: PreTrainedModel, teacher: PreTrainedModel) -> PreTrainedModel:
        """Fit the bridges over the dropped layers in closed form; the maps are kept in the work folder."""
        settings = Unit("evaluate", "linear", tuple(self._gaps(model))).settings(self.preset)
        file = self.folder / "maps" / f"{digest(settings)}.safetensors"
        bridges = {name: module for name, module in model.named_modules() if isinstance(module, Projector)}
        if not file.is_file():
            count = max(2, self.preset.linear_tokens // self.preset.length)
            calibrate(model, self.rows["train"][:count], components=[teacher], batch_size=4, progress=False)
            file.parent.mkdir(parents=True, exist_ok=True)
            values = {f"{name}.{key}": v for name, m in bridges.items() for key, v in m.state_dict().items()}
            staged = file.with_name(f".{file.name}.{time.time_ns()}")
            save_file(values, staged)
            staged.replace(file)
        values = load_file(file)
        for name, module in bridges.items():
            module.load_state_dict({key: values[f"{name}.{key}"] for key in module.state_dict()})
        return model

    def _gaps(self, model: PreTrainedModel) -> list[int]:
        kept = {i for (path,) in model.config.blocks for i in range(path["start"], path["stop"])}
        return [i for i in range(model.config.components[0].num_hidden_layers) if i not in kept]

    def measured(self, unit: Unit) -> dict:
        """Build, train where the unit has a seed, and measure: loss of every text, parameters and cache bytes."""
        preset = self.preset
        model = self.build(unit.variant, list(unit.layers))
        own = [p for name, p in model.named_parameters() if p.requires_grad]
        result = {"parameters": sum(p.numel() for p in own), "cache_bytes_per_token": cache_bytes_per_token(model)}
        if unit.seed is not None:
            generator = torch.Generator().manual_seed(1000 + unit.seed)
            order = torch.randperm(len(self.rows["train"]), generator=generator)
            steps = max(1, preset.train_tokens // (preset.rows_per_step * preset.length))
            rows = self.rows["train"][order[: steps * preset.rows_per_step]]
            options = {"rows_per_step": preset.rows_per_step, "learning_rate": preset.learning_rate}
            train(model, rows, steps=steps, seed=unit.seed, **options)
            result["train_tokens"] = rows.numel()
        count = max(1, preset.test_tokens // preset.length)
        texts = {name: measure(model, self.rows[name][:count], batch_size=2) for name in TEXTS}
        return result | {"texts": texts}


def cache_bytes_per_token(model: PreTrainedModel, itemsize: int = 2) -> int:
    """Key-value bytes that the cache grows by per token, in 16-bit floats."""
    config = model.config
    if config.model_type != "manticore":
        block = [{"component": 0, "start": 0, "stop": config.num_hidden_layers}]
        config = ManticoreConfig(components=[config], blocks=[block])
    return cache_growth(config, itemsize)


def do(unit: Unit, folder: Path, preset: Preset, threads: int, bench: Bench | None = None) -> tuple[dict, dict]:
    """One unit that is no fit: its result and its seconds. What a worker process runs."""
    torch.set_num_threads(threads)
    cpu, wall = time.process_time(), time.perf_counter()
    result = (Bench(folder, preset) if bench is None else bench).measured(unit)
    return result, {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
