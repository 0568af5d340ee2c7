"""Strategy "mad": search mixture weights on synthetic tasks, around the pretrained blocks."""

import dataclasses
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import EvalPrediction, PreTrainedModel, PrinterCallback, TrainerCallback

from ..progress import progress_bar
from ..tasks.mad import MadSetting, token_accuracy
from ..tasks.mad.settings import require_integer
from .arguments import ManticoreTrainingArguments
from .history import path_names
from .mixture_kind import set_mixture_kind
from .programming_data import (
    TaskBatches,
    all_batches,
    check_positive,
    drawn_batches,
    joint_rows,
    only,
    settings_of,
    task_weights,
)
from .programming_model import with_fresh_ends
from .programming_report import ProgrammingReport, check_folder
from .stages import check_stage, unwrap
from .trainer import ManticoreTrainer


# How mixture weights are kept while each strategy searches.
KINDS = {"joint": "softmax", "darts": "softmax", "dash": "gumbel_softmax", "gaea": "simplex"}
OWN_ARGUMENTS = {
    *("output_dir", "stage", "strategy", "train_components", "seed", "data_seed", "max_steps", "num_train_epochs"),
    *("learning_rate", "mixture_learning_rate", "per_device_train_batch_size", "per_device_eval_batch_size"),
    *("eval_strategy", "eval_steps", "eval_on_start", "save_strategy", "load_best_model_at_end", "push_to_hub"),
    *("remove_unused_columns", "label_names", "disable_tqdm"),
}
SIDE_OUTPUTS = ["past_key_values", "cache", "hidden_states", "aux_loss", "router_logits"]


def program(
    model: PreTrainedModel,
    tasks: str | list[str] | Mapping[str, float] = "in-context-recall",
    *,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    strategy: str = "joint",
    steps: int = 200,
    batch_size: int = 16,
    rows: int | None = None,
    validation_rows: int = 128,
    learning_rate: float = 1e-3,
    mixture_learning_rate: float | None = None,
    train_components: bool = False,
    eval_steps: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    apply: bool = False,
    progress: bool = True,
    **options: Any,
) -> ProgrammingReport:
    """
    Search the mixture weights of a supernet on MAD tasks instead of text (programming; arXiv 2406.00894).

    The search runs on a second supernet: the slices, projectors and mixture weights of `model` between fresh token
    embeddings and LM heads of the tasks' vocabularies. Those, the projectors and the mixture weights train, the slices
    only with `train_components`. Several tasks share everything: token t of a task becomes t plus the vocabulary sizes
    of the tasks before it, and every batch is of one task, of each its weight's share. Mixture weights start where the
    model's are. Accuracy is measured on validation rows, which no step sees.

        report = program(model, {"in-context-recall": 2, "selective-copying": 1}, steps=400)
        model.set_mixture_weights(report.weights)

    Args:
        model: a supernet ManticoreForCausalLM, calibrated or trained. It is not changed, unless `apply`.
        tasks: a MAD task, several (equal weights), or their weights. Not compression, which has a decoder for a head.
        settings: fields of `MadSetting` by task, such as {"in-context-recall": {"sequence_length": 64}}.
        strategy: "joint", "darts", "gaea" or "dash". What searches on a split of its own gets one, of as many rows.
        rows: training rows of every task; by default the setting's.
        train_components: slices are copied and train too; else they share the model's memory.
        eval_steps: steps between two evaluations; by default a quarter of `steps`.
        folder: for `report.save`.
        apply: set the weights found, `model.set_mixture_weights(report.weights)`.
        **options: further fields of `ManticoreTrainingArguments`. (A `cost_weight` weighs the costs of the second
            supernet, with the embeddings and heads of the tasks.)

    Returns:
        the report: `weights` for `set_mixture_weights`, their course, accuracy and loss of every task over the steps.

    Raises:
        ValueError: names what is wrong with the model, the tasks, their settings or the options, before training.
    """
    clock, processor = time.perf_counter(), time.process_time()
    hybrid = _supernet(model)
    weights = task_weights(tasks)
    check_positive(steps=steps, batch_size=batch_size, validation_rows=validation_rows)
    eval_steps = max(1, steps // 4) if eval_steps is None else eval_steps
    check_positive(eval_steps=eval_steps)
    require_integer("seed", seed, 0)
    chosen = settings_of(weights, settings, rows, hybrid.config.max_position_embeddings)
    folder = None if folder is None else check_folder(folder)
    _check_options(options)
    with tempfile.TemporaryDirectory(prefix="manticore-programming-") as output:
        arguments = ManticoreTrainingArguments(
            output_dir=output,
            **_arguments(strategy, steps, eval_steps, seed, hybrid) | options,
            learning_rate=learning_rate,
            mixture_learning_rate=mixture_learning_rate,
        )
        searched = strategy == "darts" or (strategy == "gaea" and arguments.gaea_base == "darts")
        data, vocabulary = joint_rows(chosen, searched, validation_rows, seed)
        generator = torch.Generator().manual_seed(seed)
        count = steps * arguments.gradient_accumulation_steps * arguments.world_size
        batches = {
            name: drawn_batches(data[name], weights, count, batch_size, generator)
            for name in ("train", "search")
            if name in data
        }
        validation = {task: all_batches(data["validation"], task, batch_size) for task in weights}
        fresh = with_fresh_ends(hybrid, vocabulary, train_components=train_components, seed=seed)
        kind = KINDS.get(strategy, fresh.config.mixture)
        if kind != fresh.config.mixture:
            set_mixture_kind(fresh, kind)
        trainer = _trainer(fresh, arguments, batches, validation, steps, progress)
        trainer.train(ignore_keys_for_eval=SIDE_OUTPUTS)
        if _course(trainer.state.log_history, next(iter(weights)))[-1]["step"] < steps:
            trainer.evaluate(ignore_keys=SIDE_OUTPUTS)
    found = [point.detach().cpu().tolist() for point in fresh.eval().mixture_weights()]
    report = ProgrammingReport(
        config=model.config,
        tasks=weights,
        settings={task: _fields(setting) for task, setting in chosen.items()},
        strategy=strategy,
        steps=steps,
        seed=seed,
        train_components=train_components,
        weights=found,
        paths=path_names(hybrid),
        metrics={task: _course(trainer.state.log_history, task) for task in weights},
        seconds=time.perf_counter() - clock,
        processor_seconds=time.process_time() - processor,
        log_history=trainer.state.log_history,
    )
    if folder is not None:
        report.save(folder)
    if apply:
        hybrid.set_mixture_weights(found)
    return report


def _supernet(model: nn.Module) -> PreTrainedModel:
    check_stage(model, "search")
    hybrid = unwrap(model)
    if not hasattr(hybrid, "heads"):
        raise ValueError(f"model: got {type(hybrid).__name__}, allowed is a supernet ManticoreForCausalLM.")
    return hybrid


def _check_options(options: dict[str, Any]) -> None:
    allowed = {field.name for field in dataclasses.fields(ManticoreTrainingArguments)} - OWN_ARGUMENTS
    for name in options:
        if name not in allowed:
            raise ValueError(
                f"{name}: got {options[name]!r}, allowed beside the arguments of `program` are fields of "
                "ManticoreTrainingArguments that it does not set itself."
            )


def _arguments(strategy: str, steps: int, eval_steps: int, seed: int, hybrid: PreTrainedModel) -> dict[str, Any]:
    """Training arguments; an item of the datasets is a whole batch."""
    return {
        "stage": "search",
        "strategy": strategy,
        "max_steps": steps,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "eval_strategy": "steps",
        "eval_steps": eval_steps,
        "eval_on_start": True,
        "save_strategy": "no",
        "logging_steps": max(1, steps // 50),
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "seed": seed,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": hybrid.device.type == "cpu",
    }


def _trainer(
    model: PreTrainedModel,
    arguments: ManticoreTrainingArguments,
    batches: dict[str, TaskBatches],
    validation: dict[str, TaskBatches],
    steps: int,
    progress: bool,
) -> ManticoreTrainer:
    trainer = ManticoreTrainer(
        model,
        arguments,
        only,
        batches["train"],
        validation,
        search_dataset=batches.get("search"),
        compute_metrics=_accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(dim=-1),
        callbacks=[_Bar(steps, progress)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": token_accuracy(prediction.predictions, prediction.label_ids)["accuracy"]}


class _Bar(TrainerCallback):
    """A bar over the steps that shows the last accuracy of every task and the paths that lead."""

    def __init__(self, steps: int, progress: bool):
        self.bar = progress_bar(total=steps, desc="program", unit="step", show=progress, leave=False)
        self.accuracies: dict[str, float] = {}

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.accuracies |= {k: v for k, v in (metrics or {}).items() if k.endswith("_accuracy")}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.bar.update()
        best = ",".join(str(int(point.argmax())) for point in unwrap(model).mixture_weights())
        scores = " ".join(f"{value:.2f}" for value in self.accuracies.values())
        self.bar.set_postfix_str(f"best {best} accuracy {scores}", refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def _course(log_history: list[dict], task: str) -> list[dict[str, float]]:
    """Step, accuracy and loss (nats) of a task at every evaluation."""
    accuracy, loss = f"eval_{task}_accuracy", f"eval_{task}_loss"
    return [{"step": e["step"], "accuracy": e[accuracy], "loss": e[loss]} for e in log_history if accuracy in e]


def _fields(setting: MadSetting) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(setting).items() if name != "task"}
