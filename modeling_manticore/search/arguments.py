"""Training arguments: those of transformers, plus the stage, the search strategy and the mixture's learning rate."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import has_length

from ..building.costs import check_kind
from .stages import STAGES
from .strategy import STRATEGIES, check_strategy_name


GAEA_BASES = ("joint", "darts")


@dataclass
class ManticoreTrainingArguments(TrainingArguments):
    """
    `transformers.TrainingArguments` with the arguments of a hybrid. What trains in each stage: `search/stages.py`.

    Raises:
        ValueError: names the argument, what was given and what is allowed.
    """

    stage: str = field(
        default="finetune",
        metadata={
            "help": "What trains: 'projectors' (projectors only), 'search' (mixture weights, projectors and, unless "
            "train_components is off, components), 'finetune' (everything but mixture weights) or 'distill' (the "
            "same, taught by another model: the Trainer's `teacher`)."
        },
    )
    strategy: str = field(
        default="joint", metadata={"help": "How stage 'search' finds mixture weights; see modeling_manticore.search."}
    )
    mixture_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of mixture weights and learned gates, scheduled like the other. 0.1 by default. "
            "Learned gates step with the optimizer's weights, whatever the strategy."
        },
    )
    train_components: bool = field(
        default=True, metadata={"help": "Whether stage 'search' also trains the components' own weights."}
    )
    cost_weight: float = field(
        default=0.0,
        metadata={
            "help": "Stage 'search' adds so many nats times the expected cost of the hybrid, as a share of the "
            "dearest choice's, to the training loss."
        },
    )
    cost_kind: str = field(
        default="parameters",
        metadata={"help": "attention_blocks, parameters, cache_bytes_per_token or flops_per_token."},
    )
    gaea_base: str = field(
        default="joint",
        metadata={
            "help": "What strategy 'gaea' modifies: 'joint' (mixture weights step with the weights, on the training "
            "split) or 'darts' (before them, on the search split)."
        },
    )
    temperature_start: float = field(
        default=1.0, metadata={"help": "Temperature of the Gumbel-softmax at the first step of strategy 'dash'."}
    )
    temperature_end: float = field(
        default=0.1, metadata={"help": "Temperature at the last step of strategy 'dash'; it falls geometrically."}
    )
    distill_weight: float | None = field(
        default=None,
        metadata={
            "help": "Share w of the teacher in the loss, (1 - w) * labels + w * T^2 * KL(teacher || student), T being "
            "distill_temperature; default 1 in stage 'distill', else 0."
        },
    )
    distill_temperature: float = field(
        default=1.0, metadata={"help": "Temperature T at which the teacher's and the student's probabilities meet."}
    )
    hidden_weight: float = field(
        default=0.0,
        metadata={
            "help": "The loss gets so many times the squared distance between the hybrid's states and the teacher's, "
            "a component's, at the cuts, relative to their variance."
        },
    )

    def __post_init__(self):
        if self.stage not in STAGES:
            raise ValueError(f"stage: got {self.stage!r}, allowed are {', '.join(map(repr, STAGES))}.")
        check_strategy_name(self.strategy)
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # pins for nothing, with a warning in every run
        if self.mixture_learning_rate is None:
            self.mixture_learning_rate = STRATEGIES[self.strategy].default_rate
        rate = self.mixture_learning_rate
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not math.isfinite(rate) or rate < 0:
            raise ValueError(f"mixture_learning_rate: got {rate!r}, allowed is a finite number >= 0.")
        if not isinstance(self.train_components, bool):
            raise ValueError(f"train_components: got {self.train_components!r}, allowed are True and False.")
        weight = self.cost_weight
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight < 0:
            raise ValueError(f"cost_weight: got {weight!r}, allowed is a finite number >= 0.")
        check_kind(self.cost_kind, "cost_kind")
        if self.gaea_base not in GAEA_BASES:
            raise ValueError(f"gaea_base: got {self.gaea_base!r}, allowed are {', '.join(map(repr, GAEA_BASES))}.")
        for name in ("temperature_start", "temperature_end"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{name}: got {value!r}, allowed is a finite number > 0.")
        if self.temperature_end > self.temperature_start:
            raise ValueError(
                f"temperature_end: got {self.temperature_end!r}, allowed is at most temperature_start, "
                f"{self.temperature_start!r}."
            )
        self._check_distillation()
        super().__post_init__()

    def _check_distillation(self) -> None:
        if self.distill_weight is None:
            self.distill_weight = 1.0 if self.stage == "distill" else 0.0
        limits = {"distill_weight": (0, 1), "hidden_weight": (0, math.inf)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise ValueError(f"{name}: got {value!r}, allowed is a number of {low}..{high}.")
        temperature = self.distill_temperature
        number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
        if not number or not 0 < temperature < math.inf:
            raise ValueError(f"distill_temperature: got {temperature!r}, allowed is a finite number > 0.")
        if math.isinf(self.hidden_weight):
            raise ValueError("hidden_weight: got inf, allowed is a finite number >= 0.")
        if self.stage == "distill" and not (self.distill_weight or self.hidden_weight):
            raise ValueError(
                "distill_weight: got 0 with stage='distill' and hidden_weight=0, so nothing would be learned from the "
                "teacher; allowed is a number above 0, or stage='finetune'."
            )


def check_datasets(args: ManticoreTrainingArguments, train_dataset: Any, eval_dataset: Any) -> None:
    """
    What can be said about the data without reading it.

    Raises:
        ValueError: a dataset is empty, evaluation data are missing or are the training data themselves, or the metric
            for the best model is one that this evaluation does not give.
    """
    named = isinstance(eval_dataset, dict)
    parts = {f"eval_dataset[{name!r}]": data for name, data in eval_dataset.items()} if named else {}
    if not named and eval_dataset is not None:
        parts["eval_dataset"] = eval_dataset
    for field_name, data in {"train_dataset": train_dataset, **parts}.items():
        if data is not None and has_length(data) and len(data) == 0:
            raise ValueError(f"{field_name}: got 0 examples, allowed is at least 1.")
    for field_name, data in parts.items():
        if data is not None and data is train_dataset:
            raise ValueError(
                f"{field_name}: got the train_dataset itself, allowed are held-out examples: on training data neither "
                "the evaluation nor the choice of the best checkpoint means anything."
            )
    if args.eval_strategy != "no" and not parts:
        raise ValueError(
            f"eval_dataset: got {eval_dataset!r} with eval_strategy={args.eval_strategy.value!r}, allowed is a "
            "dataset, a dictionary of datasets, or eval_strategy='no'."
        )
    metric = args.metric_for_best_model
    if named and metric is not None and (args.load_best_model_at_end or args.save_strategy == "best"):
        full = metric if metric.startswith("eval_") else f"eval_{metric}"
        if not any(full.startswith(f"eval_{name}_") for name in eval_dataset):
            allowed = ", ".join(f"'eval_{name}_loss'" for name in eval_dataset)
            raise ValueError(
                f"metric_for_best_model: got {metric!r}, but eval_dataset is a dictionary whose metrics carry its "
                f"names; allowed are such as {allowed}."
            )
