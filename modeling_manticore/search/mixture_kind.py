"""Another parametrisation of a hybrid's mixture weights."""

import math

from torch import nn

from ..configuration_manticore import MIXTURES
from ..mixing_manticore import Mixture
from .stages import is_a, mixture_modules, unwrap
from .strategy import STRATEGIES, check_strategy_name


def suit_mixture(model: nn.Module, strategy: str) -> bool:
    """
    Give a hybrid's mixtures a parametrisation that a strategy can step, where they have another; their weights stay.
    Logits get temperature 1, so that a learning rate means the same whatever was searched before.

    Args:
        strategy: a name in `STRATEGIES`.

    Returns:
        whether anything was changed.

    Raises:
        ValueError: there is no such strategy, or what `set_mixture_kind` says.
    """
    check_strategy_name(strategy)
    hybrid, kinds = unwrap(model), STRATEGIES[strategy].kinds
    if hybrid.config.mixture in kinds:
        return False
    set_mixture_kind(hybrid, kinds[0], temperature=1.0)
    return True


def set_mixture_kind(model: nn.Module, kind: str, temperature: float | None = None) -> None:
    """
    Change how mixture weights are parametrised, in place and without changing them: "softmax" for the strategies joint
    and darts, "gumbel_softmax" for dash, "simplex" for gaea. Weights of 0 become 1e-30 where they are kept as logits.
    The mixtures' parameters are new ones, so do it before a trainer or an optimizer is made. Frozen ones stay frozen.

    Args:
        model: the hybrid, without adapters.
        kind: one of `MIXTURES`.
        temperature: of the softmax from now on; by default as before. A search by dash leaves its last one, under
            which a step on the logits moves the weights by so much more.

    Raises:
        ValueError: `model` is no hybrid or has adapters, there is no such parametrisation, or a bad temperature.
            Nothing is changed then.
    """
    hybrid = unwrap(model)
    if kind not in MIXTURES:
        raise ValueError(f"kind: got {kind!r}, allowed are {', '.join(map(repr, MIXTURES))}.")
    if temperature is not None and (
        isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf
    ):
        raise ValueError(f"temperature: got {temperature!r}, allowed is None or a finite number > 0.")
    owners = [block for block in hybrid.modules() if is_a(getattr(block, "mixture", None), Mixture)]
    if len(owners) != len(mixture_modules(hybrid)):
        raise ValueError("model: got a hybrid with adapters on its mixtures, allowed is one without.")
    for block in owners:
        old = block.mixture
        new = type(old)(old.paths, kind, old.temperature if temperature is None else float(temperature)).to(
            old.parameter.device
        )
        new.set(old.weights_without_noise().detach())
        new.parameter.requires_grad_(old.parameter.requires_grad)
        block.mixture = new.train(old.training)
    hybrid.config.mixture = kind
    if temperature is not None:
        hybrid.config.mixture_temperature = float(temperature)
