"""Gumbel-softmax search with a temperature that falls over the steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .gradients import check_kind
from .stages import mixture_modules
from .strategy import STRATEGIES, SearchStrategy


if TYPE_CHECKING:
    from .arguments import ManticoreTrainingArguments
    from .trainer import ManticoreTrainer


class DashStrategy(SearchStrategy):
    """
    Mixture weights and weights step together, as in "joint", under the weights

        a = softmax((logits + G) / T_n),   G ~ Gumbel(0, 1),   T_n = T_start (T_end / T_start)^(n / (N - 1))

    at step n = 0..N-1 (Shen et al. 2022; Gumbel-softmax: Jang et al. 2017, equation 2). G is drawn once per step and
    block, from a generator seeded with (seed, n): micro-batches and processes of one step see one sample, so a step
    does not depend on how its batch is cut, and a resumed run draws what the uninterrupted one would have.
    Evaluation has no noise: softmax(logits / T_n). The temperature is written into the model's configuration, so that
    a saved hybrid has the weights that were evaluated, and it stays there: a reloaded one evaluates, fine-tunes and
    is discretized with T_end. Another search by dash starts from the weights the hybrid has, at T_start. "joint" and
    "darts" on such a hybrid would draw noise and step logits at T_end; `set_mixture_kind(model, kind,
    temperature=1.0)` keeps the weights and takes the temperature off.
    """

    name = "dash"
    kinds = ("gumbel_softmax",)
    fixed_arguments = ("temperature_start", "temperature_end")

    def __init__(self, args: "ManticoreTrainingArguments"):
        super().__init__(args)
        self.temperature = float(args.temperature_start)
        self.resumed = False
        self.noise: dict[int, torch.Tensor] = {}

    def check(self, hybrid: nn.Module) -> None:
        """
        Raises:
            ValueError: mixture weights without Gumbel noise.
        """
        check_kind(self.name, hybrid, self.kinds)

    @contextmanager
    def attached(self, trainer: "ManticoreTrainer") -> Iterator[None]:
        """Mixtures in training use this step's noise."""
        modules = mixture_modules(trainer.hybrid)
        handles = [module.register_forward_hook(partial(self._noisy, b)) for b, module in enumerate(modules)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _noisy(self, block: int, module: nn.Module, inputs: tuple, weights: torch.Tensor) -> torch.Tensor:
        if not module.training or block not in self.noise:
            return weights
        return torch.softmax((module.parameter + self.noise[block].to(weights.device)) / module.temperature, dim=0)

    def begin(self, trainer: "ManticoreTrainer") -> None:
        """A fresh search keeps the weights and takes the first temperature."""
        if self.resumed:
            return
        for module in mixture_modules(trainer.hybrid):
            point = module.weights_without_noise().detach().clone()
            module.temperature = self.temperature
            module.set(point)
        trainer.hybrid.config.mixture_temperature = self.temperature

    def before_step(self, trainer: "ManticoreTrainer") -> None:
        """This step's temperature and noise."""
        step = trainer.state.global_step
        self.temperature = annealed(
            self.args.temperature_start, self.args.temperature_end, step, trainer.state.max_steps
        )
        self.apply(trainer.hybrid)
        generator = torch.Generator().manual_seed((self.args.seed << 32) + step)
        for block, module in enumerate(mixture_modules(trainer.hybrid)):
            exponential = torch.empty(module.paths).exponential_(generator=generator)
            self.noise[block] = -exponential.clamp_min(torch.finfo(torch.float32).tiny).log()

    def apply(self, hybrid: nn.Module) -> None:
        """Give the mixtures, and the configuration that is saved with them, the temperature."""
        for module in mixture_modules(hybrid):
            module.temperature = self.temperature
        hybrid.config.mixture_temperature = self.temperature

    def logs(self) -> dict[str, float]:
        """`mixture/temperature` of the last step."""
        return {"mixture/temperature": self.temperature}

    def state_dict(self) -> dict[str, Any]:
        """The temperature; the noise follows from the step."""
        return {"temperature": self.temperature}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The temperature of the checkpoint; `apply` puts it into the model."""
        self.temperature, self.resumed = state["temperature"], True


def annealed(start: float, end: float, step: int, steps: int) -> float:
    """`start` at step 0, `end` at step `steps` - 1, geometric between: each step multiplies by the same factor."""
    return float(start * (end / start) ** (min(step, steps - 1) / max(steps - 1, 1)))


STRATEGIES[DashStrategy.name] = DashStrategy
