"""Alternating search, first order: mixture weights step on a split of their own."""

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


class DartsStrategy(SearchStrategy):
    """
    First-order DARTS (Liu et al. 2019, Algorithm 1 with xi = 0). Every step n does

        a <- a - rate(n) * Adam(grad_a L_search(w, a))        on a batch of `search_dataset`
        w <- w - lr(n) * optimizer(grad_w L_train(w, a))      on a batch of `train_dataset`, as the Trainer does it

    `a` are the logits of the mixtures. Their Adam has the betas and epsilon of the arguments and no weight decay.
    Learned gates belong to projectors and step with the weights, by the optimizer, at `mixture_learning_rate` too.
    Both batches have the same size. A step costs a forward pass and a backward pass through activations more than a
    plain one.
    """

    name = "darts"
    kinds = ("softmax", "gumbel_softmax")

    def __init__(self, args: "ManticoreTrainingArguments"):
        super().__init__(args)
        self.parameters: list[nn.Parameter] = []
        self.batches: SearchBatches | None = None
        self.loss: torch.Tensor | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.restored: dict[str, Any] | None = None

    def uses_search_data(self) -> bool:
        """Mixture weights step on the search split."""
        return True

    def check(self, hybrid: nn.Module) -> None:
        """
        Raises:
            ValueError: a mixture of points of the simplex, or what `check_own_steps` says.
        """
        check_kind(self.name, hybrid, self.kinds)
        check_own_steps(self.args, hybrid)

    def optimizer_parameters(self, mixtures: list[nn.Parameter]) -> list[nn.Parameter]:
        """Learned gates only."""
        return gates_among(mixtures)

    @contextmanager
    def attached(self, trainer: "ManticoreTrainer") -> Iterator[None]:
        """Mixture weights are constants for the weight step."""
        self.parameters = mixture_points(trainer)
        with taken_out(self.parameters):
            yield

    def begin(self, trainer: "ManticoreTrainer") -> None:
        """Open the search split and make the optimizer, where the checkpoint left them."""
        args = self.args
        self.batches = SearchBatches(trainer)
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=args.mixture_learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=0.0,
        )
        if self.restored is not None:
            self.batches.load_state_dict(self.restored["batches"])
            restore_adam(self.optimizer, self.restored["adam"])

    def before_step(self, trainer: "ManticoreTrainer") -> None:
        """The mixture step."""
        gradients, self.loss = search_gradients(trainer, self.parameters, self.batches.step())
        for parameter, gradient in zip(self.parameters, gradients):
            parameter.grad = gradient
        self.optimizer.param_groups[0]["lr"] = mixture_rate(trainer)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def logs(self) -> dict[str, float]:
        """`search_loss`, nats: the search split's at the last mixture step."""
        return {} if self.loss is None else {"search_loss": self.loss.item()}

    def state_dict(self) -> dict[str, Any]:
        """The place in the search split, and the mixture optimizer's moments."""
        return {"batches": self.batches.state_dict(), "adam": adam_state(self.optimizer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Kept for `begin`, when there is an optimizer."""
        self.restored = state


def adam_state(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Steps and moments of every parameter as JSON values; float32 numbers are exact there. {} before the first."""
    return [
        {name: value.tolist() for name, value in optimizer.state.get(parameter, {}).items()}
        for parameter in optimizer.param_groups[0]["params"]
    ]


def restore_adam(optimizer: torch.optim.Optimizer, state: list[dict[str, Any]]) -> None:
    """
    Restore what `adam_state` returned.

    Raises:
        ValueError: it is the state of other parameters.
    """
    parameters = optimizer.param_groups[0]["params"]
    if [len(entry["exp_avg"]) for entry in state if entry] != [len(p) for p, entry in zip(parameters, state) if entry]:
        raise ValueError(
            f"checkpoint: got the mixture optimizer of {len(state)} blocks, allowed is one of {len(parameters)} "
            "blocks with the same paths."
        )
    for parameter, entry in zip(parameters, state, strict=True):
        if entry:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(entry["step"])),
                "exp_avg": torch.tensor(entry["exp_avg"]).to(parameter),
                "exp_avg_sq": torch.tensor(entry["exp_avg_sq"]).to(parameter),
            }


STRATEGIES[DartsStrategy.name] = DartsStrategy
