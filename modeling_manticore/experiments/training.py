"""One run of a grid: a model is built, trained within its budget, and measured."""

import subprocess
import tempfile
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from ..building.costs import count
from ..hub.checked import read
from ..search.stages import mixture_parameters
from .architectures import Sizes, costs_of
from .models import Request, build, choice_of, configs_of, hybrid_in
from .schema import ModelEntry, Shape, TaskEntry, Training
from .tasks import (
    SPLITS,
    TASKS,
    classes_of,
    collate,
    data_of,
    frequency_baseline,
    longest,
    require_splits,
    resolve,
    vocabulary_of,
)


BACKWARD = 3  # a training step is a forward pass and a backward pass of twice its operations
PACKAGES = ("torch", "transformers")


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """
    Train and measure what the settings of a job say (`jobs.Job.settings`), on one thread's worth of work.

    Returns:
        plain values: `validation` and, unless the job only compares learning rates, `test` (accuracy and loss, nats),
        `also_tested`; `baseline`, the accuracy of a guess by frequency; steps, tokens, parameters, FLOPs, seconds of
        the clock and of the processor; mixture `weights` and `choice` of a search; versions and the commit.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    clock, processor = time.perf_counter(), time.process_time()
    task = read(TaskEntry, {"name": "task"} | settings["task"])
    training = read(Training, settings["training"])
    kind = TASKS[task.task]
    data = data_of(task.task, task.options, settings["seed"])
    seed = settings["seed"]
    require_splits(task.task, data, SPLITS)
    others = {test.name: data_of(task.task, task.options | test.options, seed) for test in task.also_tested}
    for test in task.also_tested:
        require_splits(task.task, others[test.name], [test.split])
    request = _request(settings, _sizes(kind.head, task, [data, *others.values()]), kind.head, data, training)
    model = build(request)
    with tempfile.TemporaryDirectory(prefix="manticore-run-") as folder:
        trainer = _trainer(model, data, kind, training, settings, folder)
        trainer.train()
        found = {"validation": _measured(trainer, data["validation"])}
        if settings["tested"]:
            found["test"] = _measured(trainer, data["test"])
            found["also_tested"], found["also_baseline"] = {}, {}
            for test in task.also_tested:
                rows = others[test.name][test.split]
                found["also_tested"][test.name] = _measured(trainer, rows)
                found["also_baseline"][test.name] = frequency_baseline(data["train"], rows, kind.head)
    found["baseline"] = frequency_baseline(data["train"], data["test"], kind.head)
    found["steps_done"] = trainer.state.global_step
    found |= _costs(model, data, trainer.tokens)
    hybrid = hybrid_in(model)
    if hybrid is not None:
        found["weights"] = [point.tolist() for point in hybrid.eval().mixture_weights()]
        found["choice"] = choice_of(hybrid)
    elif request.choice is not None:
        found["choice"] = request.choice
    found |= {"wall_seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - processor}
    return found | {"versions": _versions(), "git_commit": git_commit(), "threads": torch.get_num_threads()}


def _request(settings: dict, sizes: Sizes, head: str, data, training: Training) -> Request:
    supernet = settings.get("supernet")
    return Request(
        entry=read(ModelEntry, {"name": "model"} | settings["model"]),
        shape=read(Shape, settings["shape"]),
        sizes=sizes,
        head=head,
        seed=settings["seed"],
        families=settings["families"],
        supernet=None if supernet is None else read(ModelEntry, {"name": "supernet"} | supernet),
        choice=settings.get("choice"),
        weights=settings.get("weights"),
        parameters=settings.get("parameters"),
        rows=_calibration_rows(settings, data, training),
    )


def _calibration_rows(settings: dict, data, training: Training) -> torch.Tensor | None:
    layout = settings.get("supernet") or settings["model"]
    if not layout.get("sources") or settings["model"]["kind"] == "ensemble":
        return None
    return torch.tensor(data["train"]["input_ids"][: training.calibration_rows])


def _sizes(head: str, task: TaskEntry, parts: list) -> Sizes:
    classes = max(map(classes_of, parts)) if head == "sequence" else 0
    vocabulary = max(vocabulary_of(data, head, task.options) for data in parts)
    return Sizes(vocabulary, max(longest(data[split]) for data in parts for split in data), classes)


def _trainer(model: nn.Module, data, kind, training: Training, settings: dict, folder: str) -> "_CountingTrainer":
    metric = resolve(kind.metric)
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        max_steps=settings["steps"],
        learning_rate=settings["learning_rate"],
        weight_decay=training.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=training.warmup_steps,
        train_sampling_strategy="group_by_length" if training.group_by_length else "random",
        eval_strategy="steps",
        eval_steps=training.eval_steps,
        seed=settings["seed"],
        label_names=["labels"],
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    stopped = kind.measure == "accuracy" and training.stop_at is not None
    trainer = _CountingTrainer(
        model,
        arguments,
        collate,
        data["train"].with_format("numpy"),
        data["validation"].with_format("numpy"),
        compute_metrics=lambda found: {"accuracy": metric(found.predictions, found.label_ids)["accuracy"]},
        preprocess_logits_for_metrics=_largest,
        callbacks=[_Stop(training.stop_at)] if stopped else None,
        optimizers=(_optimizer(model, settings, training), None),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _largest(logits, labels) -> torch.Tensor:
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.argmax(dim=-1)


def _optimizer(model: nn.Module, settings: dict, training: Training) -> torch.optim.Optimizer:
    """AdamW; mixture weights have their own learning rate, they and vectors no weight decay."""
    mixture = [p for p in mixture_parameters(model) if p.requires_grad]
    own = {id(p) for p in mixture}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    if mixture:
        groups.append({"params": mixture, "lr": training.mixture_learning_rate, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=settings["learning_rate"])


class _CountingTrainer(Trainer):
    """Counts the tokens of the batches it trains on, padding included."""

    tokens = 0

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        self.tokens += inputs["input_ids"].numel()
        return super().training_step(model, inputs, num_items_in_batch)


class _Stop(TrainerCallback):
    """Ends training when validation accuracy is high enough."""

    def __init__(self, accuracy: float):
        self.accuracy = accuracy

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if metrics["eval_accuracy"] >= self.accuracy:
            control.should_training_stop = True


def _measured(trainer: Trainer, rows) -> dict[str, float]:
    found = trainer.evaluate(rows.with_format("numpy"))
    return {"accuracy": found["eval_accuracy"], "loss": found["eval_loss"]}


def _costs(model: nn.Module, data, tokens: int) -> dict[str, int]:
    context = longest(data["train"])
    parts = [costs_of(config, context) for config in configs_of(model)]
    found = {name: sum(part[name] for part in parts) for name in parts[0]}
    found |= {"context": context, "parameters": count(model), "tokens": tokens}
    return found | {"training_flops": BACKWARD * found["flops_per_token"] * tokens}


def _versions() -> dict[str, str]:
    from .. import __version__

    return {"modeling_manticore": __version__} | {package: version(package) for package in PACKAGES}


@cache
def git_commit() -> str | None:
    """The commit of the clone that this package is in, with "+" where its code differs; None without a clone."""
    folder = Path(__file__).parents[1]

    def git(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=30)

    try:
        tracked = git("ls-files", "--error-unmatch", "__init__.py").returncode == 0
    except OSError:
        return None  # git is not installed
    if not tracked:
        return None
    return git("rev-parse", "HEAD").stdout.strip() + "+" * git("diff", "--quiet", "HEAD", "--", ".").returncode
