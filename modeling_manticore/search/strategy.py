"""The interface of search strategies, and the table of those there are."""

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn


if TYPE_CHECKING:
    from .arguments import ManticoreTrainingArguments
    from .trainer import ManticoreTrainer


STRATEGY_STATE_NAME = "strategy_state.json"


class SearchStrategy:
    """
    How mixture weights are searched in stage "search". Everything here has a default, so that a strategy is only what
    differs from training mixture weights like any other parameter.

    The Trainer makes a fresh one for every `train`, and calls

        check                at construction of the Trainer, before anything is written
        uses_search_data     at construction of the Trainer: whether it must be given a `search_dataset`
        attached             around a whole `train`, before the optimizer and wrappers exist
        load_state_dict      when a checkpoint is resumed, before `begin`, and when the best one is loaded at the end
        apply                after `load_state_dict`
        begin                when the optimizer exists and training starts
        before_step          before optimizer step n: its batches are drawn, no gradient is computed
        before_update        gradients of step n are complete and clipped, the optimizer has not stepped
        after_step           step n is done, gradients are gone, `trainer.state.global_step` is n + 1
        logs                 when the Trainer logs the mixture weights
        state_dict           into every checkpoint, as `strategy_state.json`

    The hooks get the Trainer itself: `trainer.hybrid` is the model without wrappers, `trainer.state` has `global_step`
    and `max_steps`.
    """

    name: ClassVar[str] = ""
    fixed_arguments: ClassVar[tuple[str, ...]] = ()  # arguments that a resumed run must share
    kinds: ClassVar[tuple[str, ...]] = ()  # parametrisations of the mixture that it can step, the usual one first
    default_rate: ClassVar[float] = 0.1  # `mixture_learning_rate` where none is given

    def __init__(self, args: "ManticoreTrainingArguments"):
        self.args = args

    def check(self, hybrid: nn.Module) -> None:
        """
        Raises:
            ValueError: this strategy cannot search this model; names the field, what was given and what is allowed.
        """

    def uses_search_data(self) -> bool:
        """Whether mixture weights step on a split of their own, the Trainer's `search_dataset`."""
        return False

    def attached(self, trainer: "ManticoreTrainer") -> AbstractContextManager:
        """What the model has only while it trains, and loses when that ends, also with an error."""
        return nullcontext()

    def optimizer_parameters(self, mixtures: list[nn.Parameter]) -> list[nn.Parameter]:
        """Those of the mixture weights and learned gates that the Trainer's optimizer steps; the rest is yours."""
        return mixtures

    def begin(self, trainer: "ManticoreTrainer") -> None:
        """Training starts, or continues from the state that `load_state_dict` was given."""

    def before_step(self, trainer: "ManticoreTrainer") -> None:
        """An optimizer step begins."""

    def before_update(self, trainer: "ManticoreTrainer") -> None:
        """Gradients are complete; the optimizer steps next."""

    def after_step(self, trainer: "ManticoreTrainer") -> None:
        """An optimizer step is done."""

    def logs(self) -> dict[str, float]:
        """Values to be logged beside the mixture weights."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""

    def apply(self, hybrid: nn.Module) -> None:
        """Put into the model what of the restored state belongs there and is not in its tensors."""


STRATEGIES: dict[str, type[SearchStrategy]] = {}


def make_strategy(args: "ManticoreTrainingArguments") -> SearchStrategy:
    """
    A fresh strategy of the kind that `args.strategy` names.

    Raises:
        ValueError: there is none of that name.
    """
    check_strategy_name(args.strategy)
    return STRATEGIES[args.strategy](args)


def check_strategy_name(name: Any) -> None:
    """
    Raises:
        ValueError: there is no strategy of that name.
    """
    if name == "mad":
        raise ValueError(
            "strategy: got 'mad', which searches on data of its own: call modeling_manticore.program(model, "
            "'in-context-recall', strategy='joint') and model.set_mixture_weights(report.weights); allowed here are "
            f"{', '.join(map(repr, STRATEGIES))}."
        )
    if not isinstance(name, str) or name not in STRATEGIES:
        raise ValueError(f"strategy: got {name!r}, allowed are {', '.join(map(repr, STRATEGIES))}.")


def write_search_state(
    folder: Path, args: "ManticoreTrainingArguments", strategy: SearchStrategy | None, effort: dict[str, float]
) -> None:
    """
    Write `strategy_state.json`, the last file of a checkpoint: the stage, the state of its strategy, and what the
    training has cost so far.
    """
    state = {"stage": args.stage, "train_components": args.train_components, "strategy": None, "state": {}}
    state["effort"] = effort
    if strategy is not None:
        state |= {name: getattr(args, name) for name in strategy.fixed_arguments}
        state |= {"strategy": strategy.name, "state": strategy.state_dict()}
    (folder / STRATEGY_STATE_NAME).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def read_search_state(folder: Path) -> dict[str, Any]:
    """What `write_search_state` wrote."""
    return json.loads((folder / STRATEGY_STATE_NAME).read_text(encoding="utf-8"))


def check_search_state(folder: Path, args: "ManticoreTrainingArguments") -> None:
    """
    Raises:
        ValueError: the checkpoint was written in another stage, by another strategy or with other arguments of it, or
            with other parameters trained.
    """
    saved = read_search_state(folder)
    search = ("strategy", "train_components", *STRATEGIES[args.strategy].fixed_arguments)
    for field in ("stage", *search) if args.stage == "search" else ("stage",):
        if saved[field] != getattr(args, field):
            raise ValueError(
                f"{field}: got {getattr(args, field)!r}, but {str(folder)!r} was written with {saved[field]!r}; "
                "allowed is the same. To start another stage, load the model and do not resume."
            )
