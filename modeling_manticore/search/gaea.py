"""Exponentiated gradient on the simplex, as a modifier of single-level or alternating search."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .gradients import (
    check_kind,
    check_own_steps,
    gates_among,
    mixture_points,
    mixture_rate,
    search_gradients,
    taken_out,
)
from .search_data import SearchBatches
from .strategy import STRATEGIES, SearchStrategy


if TYPE_CHECKING:
    from .arguments import ManticoreTrainingArguments
    from .trainer import ManticoreTrainer


FLOOR = 1e-8  # a path's smallest weight: float32 keeps it, and the path can come back


class GaeaStrategy(SearchStrategy):
    """
    GAEA (Li et al. 2021, equation 4): the mixture weights themselves are stepped, and stay on the simplex,

        a_i <- a_i exp(-rate(n) g_i) / Z,   g = grad_a L,   Z so that sum_i a_i = 1

    With `gaea_base="joint"`, g is the (clipped) gradient of the weight step; with "darts" that of a batch of the
    search split, before every weight step. There is no momentum: useful rates are larger than Adam's, such as 0.1 (the
    default) to 1. Learned gates belong to projectors and step with the weights, by the optimizer, at
    `mixture_learning_rate` too.
    """

    name = "gaea"
    kinds = ("simplex",)
    fixed_arguments = ("gaea_base",)

    def __init__(self, args: "ManticoreTrainingArguments"):
        super().__init__(args)
        self.parameters: list[nn.Parameter] = []
        self.batches: SearchBatches | None = None
        self.loss: torch.Tensor | None = None
        self.restored: dict[str, Any] | None = None

    def uses_search_data(self) -> bool:
        """Only the alternating variant does."""
        return self.args.gaea_base == "darts"

    def check(self, hybrid: nn.Module) -> None:
        """
        Raises:
            ValueError: mixture weights that are not points of the simplex, or what `check_own_steps` says.
        """
        check_kind(self.name, hybrid, self.kinds)
        check_own_steps(self.args, hybrid)

    def optimizer_parameters(self, mixtures: list[nn.Parameter]) -> list[nn.Parameter]:
        """Learned gates only."""
        return gates_among(mixtures)

    @contextmanager
    def attached(self, trainer: "ManticoreTrainer") -> Iterator[None]:
        """In the alternating variant mixture weights are constants for the weight step."""
        self.parameters = mixture_points(trainer)
        with taken_out(self.parameters if self.uses_search_data() else []):
            yield

    def begin(self, trainer: "ManticoreTrainer") -> None:
        """Move weights of 0, which no factor would change, into the simplex; open the search split."""
        for point in self.parameters:
            exponentiated_step(point, torch.zeros_like(point), 0.0)
        if self.uses_search_data():
            self.batches = SearchBatches(trainer)
            if self.restored is not None:
                self.batches.load_state_dict(self.restored["batches"])

    def before_step(self, trainer: "ManticoreTrainer") -> None:
        """The mixture step of the alternating variant."""
        if self.batches is not None:
            gradients, self.loss = search_gradients(trainer, self.parameters, self.batches.step())
            self._step(trainer, gradients)

    def before_update(self, trainer: "ManticoreTrainer") -> None:
        """The mixture step of the single-level variant."""
        if self.batches is None:
            self._step(trainer, [point.grad for point in self.parameters])

    def _step(self, trainer: "ManticoreTrainer", gradients: list[torch.Tensor]) -> None:
        rate = mixture_rate(trainer)
        for point, gradient in zip(self.parameters, gradients):
            exponentiated_step(point, gradient, rate)

    def logs(self) -> dict[str, float]:
        """`search_loss`, nats: the search split's at the last mixture step of the alternating variant."""
        return {} if self.loss is None else {"search_loss": self.loss.item()}

    def state_dict(self) -> dict[str, Any]:
        """The place in the search split. The weights are the model's; nothing else is remembered."""
        return {} if self.batches is None else {"batches": self.batches.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Kept for `begin`."""
        self.restored = state


@torch.no_grad()
def exponentiated_step(point: torch.Tensor, gradient: torch.Tensor, rate: float) -> None:
    """
    a_i <- a_i exp(-rate g_i) / Z in place, computed in float64 over logarithms, so that no factor overflows. Weights
    stay at least `FLOOR` and sum to 1 but for their rounding to float32.

    Args:
        point: weights (paths,), float32, on the simplex.
        gradient: (paths,), of the loss in nats.
        rate: learning rate, at least 0.
    """
    # On the CPU, because not every device has float64.
    logits = point.detach().cpu().double().clamp_min(FLOOR).log() - rate * gradient.detach().cpu().double()
    weights = torch.softmax(logits, dim=0).clamp_min(FLOOR)
    point.copy_(weights / weights.sum())


STRATEGIES[GaeaStrategy.name] = GaeaStrategy
