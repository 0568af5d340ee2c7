"""Another parametrisation of a hybrid's mixture weights."""

from torch import nn

from ..configuration_manticore import MIXTURES
from ..mixing_manticore import Mixture
from .stages import is_a, mixture_modules, unwrap


def set_mixture_kind(model: nn.Module, kind: str) -> None:
    """
    Change how mixture weights are parametrised, in place and without changing them: "softmax" for the strategies joint
    and darts, "gumbel_softmax" for dash, "simplex" for gaea. Weights of 0 become 1e-30 where they are kept as logits.
    The mixtures' parameters are new ones, so do it before a trainer or an optimizer is made. Frozen ones stay frozen.

    Args:
        model: the hybrid, without adapters.
        kind: one of `MIXTURES`.

    Raises:
        ValueError: `model` is no hybrid or has adapters, or there is no such parametrisation. Nothing is changed then.
    """
    hybrid = unwrap(model)
    if kind not in MIXTURES:
        raise ValueError(f"kind: got {kind!r}, allowed are {', '.join(map(repr, MIXTURES))}.")
    owners = [block for block in hybrid.modules() if is_a(getattr(block, "mixture", None), Mixture)]
    if len(owners) != len(mixture_modules(hybrid)):
        raise ValueError("model: got a hybrid with adapters on its mixtures, allowed is one without.")
    for block in owners:
        old = block.mixture
        new = type(old)(old.paths, kind, old.temperature).to(old.parameter.device)
        new.set(old.weights_without_noise().detach())
        new.parameter.requires_grad_(old.parameter.requires_grad)
        block.mixture = new.train(old.training)
    hybrid.config.mixture = kind
