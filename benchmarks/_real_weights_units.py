"""The units of `real_weights.py`: which there are, what one does, and how long it is going to take."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from _components import train
from _real_weights_data import (
    NEW_PACKAGE,
    TEACHER_PACKAGE,
    TEXTS,
    load_rows,
    load_teacher,
    make_rows,
    make_teacher,
)
from _real_weights_fit import FitOptions, MixerFit, fitted
from _real_weights_models import dropped, freeze_bridges, with_mamba, without_attention
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils import logging

from modeling_manticore import ManticoreConfig, calibrate
from modeling_manticore.cache_manticore import cache_growth
from modeling_manticore.commands.models import measure
from modeling_manticore.experiments.units import Unit
from modeling_manticore.mixing_manticore import Projector


VARIANTS = ("teacher", "dropped", "linear", "no attention", "mamba2")
# Seconds a token of one thread, where no unit of the kind is finished yet: full training, a forward pass, a forward
# pass of the trunk up to layer 20, a step of one Mamba-2.
GUESSES = {"train": 1 / 100, "evaluate": 1 / 370, "trunk": 1 / 550, "mixer": 1 / 3600}


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


PRESETS = {
    "full": Preset(fit_tokens=2_000_000, linear_tokens=60_000, train_tokens=100_000, test_tokens=37_000),
    "smoke": Preset(fit_tokens=2_048, linear_tokens=1_024, train_tokens=512, test_tokens=512, seeds=2, length=256),
    "short": Preset(fit_tokens=300_000, linear_tokens=20_000, train_tokens=16_000, test_tokens=8_000),
}


class Units:
    """
    The units of a preset. Settings are all that a result depends on and no more, so that presets share what they can.
    """

    def __init__(self, preset: Preset):
        self.preset = preset
        made_once = {"estimate": 60.0, "leaves_files": True, "must_repeat": True}
        self.teacher = Unit("teacher", {"package": TEACHER_PACKAGE}, label="teacher", **made_once)
        settings = {"length": preset.length, "newer": NEW_PACKAGE}
        self.rows = Unit("rows", settings, {"teacher": self.teacher}, "rows", **made_once)
        self._given = {"teacher": self.teacher, "rows": self.rows}
        self.fit = self._fit()

    def all(self, variants: tuple[str, ...] = VARIANTS) -> list[Unit]:
        """What the tables read, in the order in which it is worth having: everything of one seed before the next."""
        fit = [self.fit] if "mamba2" in variants else []
        seeds = (None, *range(self.preset.seeds))
        return fit + [self.measured(*pair, seed) for seed in seeds for pair in self.pairs() if pair[0] in variants]

    def pairs(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(variant, layers)."""
        yield "teacher", ()
        for layers in reversed(self.preset.replaced):
            yield from ((variant, layers) for variant in VARIANTS[1:])

    def measured(self, variant: str, layers: tuple[int, ...], seed: int | None = None) -> Unit:
        """A variant's losses, as it is made or (seed) trained end to end."""
        preset, needs = self.preset, dict(self._given)
        settings = {"variant": variant, "layers": list(layers), "test_tokens": preset.test_tokens}
        tokens = {"evaluate": 3.0 * preset.test_tokens}
        label = f"evaluation, {preset.test_tokens:,} tokens a text"
        if variant == "mamba2":
            needs["fit"] = self.fit
            settings |= {"state": preset.state, "like_attention": preset.like_attention}
        elif variant == "linear":
            needs["maps"] = self._maps(layers)
        if seed is not None:
            names = ("train_tokens", "rows_per_step", "learning_rate")
            settings |= {"seed": seed} | {name: getattr(preset, name) for name in names}
            tokens["train"] = preset.train_tokens
            label = f"end to end, {preset.train_tokens:,} tokens, and {label}"
        return Unit("measure", settings, needs, label, _guess(tokens))

    def _fit(self) -> Unit:
        preset = self.preset
        names = ("fit_tokens", "fit_rows_per_step", "fit_learning_rate", "state", "like_attention")
        settings = {"layers": preset.fit_layers} | {name.removeprefix("fit_"): getattr(preset, name) for name in names}
        seconds = _guess({"trunk": preset.fit_tokens, "mixer": preset.fit_tokens * len(preset.fit_layers)})
        label = f"fit of {len(preset.fit_layers)} mixers, {preset.fit_tokens:,} tokens"
        return Unit("fit", settings, self._given, label, seconds, leaves_files=True)

    def _maps(self, layers: tuple[int, ...]) -> Unit:
        tokens = self.preset.linear_tokens
        settings = {"layers": list(layers), "tokens": tokens}
        seconds = _guess({"evaluate": 1.2 * tokens * len(layers)})
        return Unit("maps", settings, self._given, f"linear maps, {tokens:,} tokens", seconds, leaves_files=True)


def _guess(tokens: dict[str, float]) -> float:
    return sum(GUESSES[kind] * count for kind, count in tokens.items())


# ---------------------------------------------------------------------- what a unit does
def work(task: dict) -> dict:
    """The record of a unit; `task` is as `experiments.units.run_units` says."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    needs = {name: Path(folder) for name, folder in task["needs"].items()}
    folder = None if task["folder"] is None else Path(task["folder"])
    return KINDS[task["kind"]](task["settings"], needs, folder, Path(task["unfinished"]))


def write_teacher(settings: dict, needs: dict, folder: Path, unfinished: Path) -> dict:
    """SmolLM2 as a folder."""
    make_teacher(folder)
    return {}


def write_rows(settings: dict, needs: dict, folder: Path, unfinished: Path) -> dict:
    """The texts as rows of token ids; the record counts them."""
    make_rows(folder, needs["teacher"], settings["length"])
    return {"rows": {name: len(rows) for name, rows in load_rows(folder).items()}}


def fit_mixers(settings: dict, needs: dict, folder: Path, unfinished: Path) -> dict:
    """The Mamba-2 of every layer that is replaced somewhere."""
    rows = load_rows(needs["rows"])
    options = FitOptions(**{name: value for name, value in settings.items() if name != "layers"})
    fit = MixerFit(load_teacher(needs["teacher"]), settings["layers"], options, unfinished)
    found = fit.run(rows["train"], rows["search"])
    fit.save(folder)
    return found


def fit_maps(settings: dict, needs: dict, folder: Path, unfinished: Path) -> dict:
    """The bridges over the dropped layers in closed form."""
    teacher, rows = load_teacher(needs["teacher"]), load_rows(needs["rows"])["train"]
    model = dropped(teacher, settings["layers"])
    count = max(2, settings["tokens"] // rows.shape[1])
    calibrate(model, rows[:count], components=[teacher], batch_size=4, progress=False)
    values = {f"{name}.{key}": v for name, m in bridges_of(model).items() for key, v in m.state_dict().items()}
    save_file(values, folder / "maps.safetensors")
    return {}


def bridges_of(model: PreTrainedModel) -> dict[str, Projector]:
    """Name -> projector."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Projector)}


def build(settings: dict, needs: dict) -> PreTrainedModel:
    """A variant before the end-to-end step; identity bridges do not train."""
    teacher, variant, layers = load_teacher(needs["teacher"]), settings["variant"], settings["layers"]
    if variant == "teacher":
        return teacher
    if variant == "mamba2":
        mixers = fitted(needs["fit"], layers)
        return freeze_bridges(with_mamba(teacher, mixers, settings["state"], settings["like_attention"]))
    if variant == "no attention":
        return freeze_bridges(without_attention(teacher, layers, teacher.config.head_dim))
    model = dropped(teacher, layers)
    if variant == "dropped":
        return freeze_bridges(model)
    values = load_file(needs["maps"] / "maps.safetensors")
    for name, module in bridges_of(model).items():
        module.load_state_dict({key: values[f"{name}.{key}"] for key in module.state_dict()})
    return model


def measure_variant(settings: dict, needs: dict, folder: None, unfinished: Path) -> dict:
    """Build, train where there is a seed, and measure: loss of every text, parameters and cache bytes."""
    model, rows = build(settings, needs), load_rows(needs["rows"])
    own = [p for p in model.parameters() if p.requires_grad]
    found = {"parameters": sum(p.numel() for p in own), "cache_bytes_per_token": cache_bytes_per_token(model)}
    length = rows["train"].shape[1]
    if "seed" in settings:
        generator = torch.Generator().manual_seed(1000 + settings["seed"])
        order = torch.randperm(len(rows["train"]), generator=generator)
        steps = max(1, settings["train_tokens"] // (settings["rows_per_step"] * length))
        read = rows["train"][order[: steps * settings["rows_per_step"]]]
        options = {name: settings[name] for name in ("rows_per_step", "learning_rate", "seed")}
        train(model, read, steps=steps, **options)
        found["train_tokens"] = read.numel()
    count = max(1, settings["test_tokens"] // length)
    return found | {"texts": {name: measure(model, rows[name][:count], batch_size=2) for name in TEXTS}}


KINDS = {
    "teacher": write_teacher,
    "rows": write_rows,
    "fit": fit_mixers,
    "maps": fit_maps,
    "measure": measure_variant,
}


def cache_bytes_per_token(model: PreTrainedModel, itemsize: int = 2) -> int:
    """Key-value bytes that the cache grows by per token, in 16-bit floats."""
    config = model.config
    if config.model_type != "manticore":
        block = [{"component": 0, "start": 0, "stop": config.num_hidden_layers}]
        config = ManticoreConfig(components=[config], blocks=[block])
    return cache_growth(config, itemsize)
