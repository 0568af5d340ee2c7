"""The interface of search strategies, and the table of those there are."""

from typing import Any

import torch
from torch import nn


class SearchStrategy:
    """
    How mixture weights are searched in stage "search". The Trainer calls `check` before anything starts, `before_step`
    and `after_step` around every optimizer step, and keeps `state_dict` (plain JSON values) in every checkpoint.
    """

    name = ""

    def check(self, model: nn.Module) -> None:
        """
        Raises:
            ValueError: this strategy cannot search this model.
        """

    def before_step(self, model: nn.Module, step: int, total_steps: int) -> None:
        """Called before optimizer step `step` of `total_steps`, gradients not yet computed."""

    def after_step(self, model: nn.Module, step: int, total_steps: int) -> None:
        """Called after optimizer step `step` of `total_steps`."""

    def optimizer_parameters(self, mixtures: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
        """Those of the mixture parameters that the Trainer's optimizer updates; the strategy updates the rest."""
        return mixtures

    def state_dict(self) -> dict[str, Any]:
        """State as JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class JointStrategy(SearchStrategy):
    """Single level: mixture weights and weights step together on the same batches (the paper's default)."""

    name = "joint"

    def check(self, model: nn.Module) -> None:
        """
        Raises:
            ValueError: the mixture is a bare point of the simplex, which a gradient step would leave.
        """
        if model.config.mixture == "simplex":
            raise ValueError(
                "strategy: got 'joint' for mixture='simplex', which needs exponentiated gradient; allowed "
                "with it are mixture='softmax' and 'gumbel_softmax'."
            )


STRATEGIES: dict[str, type[SearchStrategy]] = {JointStrategy.name: JointStrategy}


def make_strategy(name: str) -> SearchStrategy:
    """
    A fresh strategy.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in STRATEGIES:
        raise ValueError(f"strategy: got {name!r}, allowed are {', '.join(map(repr, STRATEGIES))}.")
    return STRATEGIES[name]()
