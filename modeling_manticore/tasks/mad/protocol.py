"""
MAD's protocol: each setting is trained with every learning rate and weight decay, the best run on the validation split
is measured once on the test split, and a task's score is the mean over its settings.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import EvalPrediction, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ...progress import progress_bar
from .metric import token_accuracy
from .models import configuration_of, model_of
from .settings import SETTINGS, TEST_ROWS, VALIDATION_ROWS, MadSetting, difficulties, setting_of
from .splits import dataset_of


MIN_LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Preset:
    """
    What is trained and how.

    Attributes:
        settings: tasks at their difficulties.
        learning_rates, weight_decays: of AdamW with a cosine decay; every pair is one run of each setting.
        layers: as in MAD, where a layer mixes the sequence or the channels.
    """

    settings: tuple[MadSetting, ...]
    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...]
    batch_size: int
    epochs: int
    hidden_size: int
    layers: int
    validation_rows: int = VALIDATION_ROWS
    test_rows: int = TEST_ROWS

    def cost(self) -> dict[str, int]:
        """The number of `settings` and `runs`, optimizer `steps` and `tokens` seen in training, with repetitions."""
        runs = len(self.learning_rates) * len(self.weight_decays)
        return {
            "settings": len(self.settings),
            "runs": runs * len(self.settings),
            "steps": runs * sum(map(self.steps, self.settings)),
            "tokens": runs * self.epochs * sum(s.train_rows * s.sequence_length for s in self.settings),
        }

    def steps(self, setting: MadSetting) -> int:
        """Optimizer steps of one run."""
        return self.epochs * -(-setting.train_rows // self.batch_size)


_SMALL = {"sequence_length": 32, "train_rows": 3200}
PRESETS = {
    "cpu": Preset(
        settings=(
            setting_of("in-context-recall", **_SMALL),
            setting_of("fuzzy-in-context-recall", **_SMALL),
            setting_of("noisy-in-context-recall", **_SMALL),
            setting_of("selective-copying", copies=8, **_SMALL),
            setting_of("memorization", train_rows=3200),
            setting_of("compression", sequence_length=16, train_rows=3200),
        ),
        learning_rates=(1e-3, 3e-3),
        weight_decays=(0.0,),
        batch_size=32,
        epochs=8,
        hidden_size=64,
        layers=4,
        validation_rows=256,
        test_rows=512,
    ),
    "paper": Preset(
        settings=tuple(setting for task in SETTINGS for setting in difficulties(task)),
        learning_rates=(1e-4, 5e-4, 1e-3),
        weight_decays=(0.0, 0.1),
        batch_size=128,
        epochs=200,
        hidden_size=128,
        layers=4,
    ),
}


def preset_of(name: str, tasks: Iterable[str] | None = None, epochs: int | None = None) -> Preset:
    """
    A preset, with some of its tasks or another number of epochs.

    Raises:
        ValueError: an unknown preset or task, or fewer epochs than one.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: got {name!r}, allowed are {', '.join(PRESETS)}.")
    preset = PRESETS[name]
    if tasks is not None:
        tasks = list(tasks)
        for task in tasks:
            if task not in SETTINGS:
                raise ValueError(f"tasks: got {task!r}, allowed are {', '.join(SETTINGS)}.")
        if not tasks:
            raise ValueError(f"tasks: got nothing, allowed are some of {', '.join(SETTINGS)}.")
        preset = replace(preset, settings=tuple(setting for setting in preset.settings if setting.task in tasks))
    if epochs is not None:
        if epochs < 1:
            raise ValueError(f"epochs: got {epochs}, allowed is a positive integer.")
        preset = replace(preset, epochs=epochs)
    return preset


def run_mad(
    preset: Preset,
    architecture: str,
    seed: int = 0,
    output_file: str | os.PathLike | None = None,
    progress: bool = True,
) -> dict:
    """
    Run a protocol. The result is also written to `output_file` after every setting; a file of an interrupted run with
    the same options is continued.

    Returns:
        `options`; `settings`, one entry each with its runs, the chosen one and the `test_accuracy`; `scores`, for each
        task that is complete the mean over its settings; and `mean` over the tasks.

    Raises:
        ValueError: an unknown architecture, or a file with other options.
    """
    for setting in preset.settings:
        configuration_of(architecture, setting, preset.hidden_size, preset.layers)
    output = None if output_file is None else Path(output_file)
    options = json.loads(json.dumps({"architecture": architecture, "seed": seed, **asdict(preset)}))
    finished = _finished(output, options)
    cost = preset.cost()
    with progress_bar(total=cost["steps"], unit="step", show=progress) as bar:
        for setting in preset.settings:
            if any(entry["setting"] == asdict(setting) for entry in finished):
                bar.update(len(preset.learning_rates) * len(preset.weight_decays) * preset.steps(setting))
                continue
            finished.append(_run_setting(preset, setting, architecture, seed, bar))
            result = _summary(preset, options, finished)
            if output is not None:
                _write(output, result)
    return _summary(preset, options, finished)


def _run_setting(preset: Preset, setting: MadSetting, architecture: str, seed: int, bar: tqdm) -> dict:
    """Every run of one setting; the best on the validation split is measured on the test split."""
    data = dataset_of(setting, preset.validation_rows, preset.test_rows, seed).with_format("torch")
    runs, best = [], None
    for rate in preset.learning_rates:
        for decay in preset.weight_decays:
            bar.set_description(f"{setting.task} {len(runs) + 1}")
            started = time.perf_counter()
            model = model_of(architecture, setting, preset.hidden_size, preset.layers, seed)
            with tempfile.TemporaryDirectory() as folder:
                trainer = _trainer(model, setting, preset, data["train"], (rate, decay, seed), folder, bar)
                trainer.train()
                found = trainer.evaluate(data["validation"])
                run = {"learning_rate": rate, "weight_decay": decay, "seconds": time.perf_counter() - started}
                run |= {"validation_accuracy": found["eval_accuracy"], "validation_loss": found["eval_loss"]}
                runs.append(run)
                # Accuracies tie when a task is solved (or not at all); then the loss decides.
                rank = (run["validation_accuracy"], -run["validation_loss"])
                if best is None or rank > best[0]:
                    best = (rank, run, model)
            bar.set_postfix(best=f"{best[1]['validation_accuracy']:.3f}")
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(best[2], setting, preset, None, (0.0, 0.0, seed), folder, bar)
        tested = trainer.evaluate(data["test"])
    chosen = {name: best[1][name] for name in ("learning_rate", "weight_decay")}
    return {"setting": asdict(setting), "runs": runs, "chosen": chosen, "test_accuracy": tested["eval_accuracy"]}


def _trainer(
    model: nn.Module,
    setting: MadSetting,
    preset: Preset,
    train_dataset,
    hyperparameters: tuple[float, float, int],
    folder: str,
    bar: tqdm,
) -> Trainer:
    rate, decay, seed = hyperparameters
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=preset.batch_size,
        per_device_eval_batch_size=preset.batch_size,
        num_train_epochs=preset.epochs,
        learning_rate=rate,
        weight_decay=decay,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": MIN_LEARNING_RATE},
        seed=seed,
        label_names=["labels"],
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    shift = setting.task != "compression"

    def accuracy(prediction: EvalPrediction) -> dict[str, float]:
        return {"accuracy": token_accuracy(prediction.predictions, prediction.label_ids, shift)["accuracy"]}

    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train_dataset,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(dim=-1),
        callbacks=[_Steps(bar)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Steps(TrainerCallback):
    """One step of the bar for one of the optimizer."""

    def __init__(self, bar: tqdm):
        self.bar = bar

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()


def _summary(preset: Preset, options: dict, finished: list[dict]) -> dict:
    scores = {}
    for task in dict.fromkeys(setting.task for setting in preset.settings):
        found = [entry["test_accuracy"] for entry in finished if entry["setting"]["task"] == task]
        if len(found) == sum(setting.task == task for setting in preset.settings):
            scores[task] = float(np.mean(found))
    mean = float(np.mean(list(scores.values()))) if scores else None
    return {"options": options, "torch": torch.__version__, "scores": scores, "mean": mean, "settings": finished}


def _finished(output: Path | None, options: dict) -> list[dict]:
    """
    Raises:
        ValueError: the file is a folder, no result, or one of other options.
    """
    if output is None or not output.exists():
        return []
    if output.is_dir():
        raise ValueError(f"output_file: got the folder {str(output)!r}, allowed is a file.")
    try:
        result = json.loads(output.read_text(encoding="utf-8"))
        same, entries = result["options"] == options, result["settings"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"output_file: {str(output)!r} is there and is no result of MAD.") from error
    if not same:
        raise ValueError(f"output_file: {str(output)!r} has results of other options; allowed is another file.")
    return entries


def _write(output: Path, result: dict) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=output.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        file.write(json.dumps(result, indent=2) + "\n")
    os.replace(file.name, output)
