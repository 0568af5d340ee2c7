"""Models built for their shapes alone: without values, and hollow in layers that no path has.

The families' own constructors run, and find other classes under some names: those of torch make layers without initial
values, and a hollow layer is made of nothing but the plain attributes that a stub shows. Both take most of the time.
"""

import functools
import types
from collections.abc import Callable, Container
from contextlib import nullcontext

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


class Part(nn.Module):
    """Stands for whatever a hollow layer would be made of."""


PART = Part()


class Parts:
    """Stands for `torch.nn`, and makes that of whatever it is asked for."""

    def __getattr__(self, name: str) -> Callable[..., Part]:
        return _part


def _part(*args, **kwargs) -> Part:
    return PART


class Bare:
    """Stands for `torch.nn`: its layers are made as they are, but for their initial values."""

    def __getattr__(self, name: str):
        found = getattr(nn, name)
        has_values = isinstance(found, type) and hasattr(found, "reset_parameters")
        return functools.partial(_without_values, found) if has_values else found


@functools.cache
def _passive(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (kind,), {"reset_parameters": lambda self: None})


def _without_values(kind: type[nn.Module], *args, **kwargs) -> nn.Module:
    made = _passive(kind)(*args, **kwargs)
    object.__setattr__(made, "__class__", kind)
    return made


def on_meta(
    causal_class: type[PreTrainedModel],
    base_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    used: Container[int] | None = None,
) -> PreTrainedModel:
    """
    A causal language model on the meta device. Layers whose index is not in `used` (None: all are) are hollow, where
    the family builds its layers one by one in the constructor of its base model and a layer asks nothing of its parts.
    """
    with nullcontext() if torch.get_default_device().type == "meta" else torch.device("meta"):
        hollow = {}
        if used is not None:
            kinds = [kind for kind in _named_by(base_class) if issubclass(kind, GradientCheckpointingLayer)]
            hollow = {kind.__name__: functools.partial(_layer, kind, used) for kind in kinds}
        base = functools.partial(_made, base_class, hollow)
        try:
            model = _made(causal_class, {base_class.__name__: base} if hollow else {}, config)
        except (AttributeError, TypeError):  # it asks something of parts that are not there
            return causal_class(config)
        return causal_class(config) if hollow and _lacks(model, used) else model


def _lacks(model: nn.Module, used: Container[int]) -> bool:
    """Whether a layer is hollow that is used: what it was given was not its index."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = [layer for layers in lists for i, layer in enumerate(layers) if i in used]
    return any(part is PART for layer in layers for part in layer.modules())


def _layer(kind: type[nn.Module], used: Container[int], *args, **kwargs) -> nn.Module:
    indices = [value for value in (*args, *kwargs.values()) if type(value) is int]
    if len(indices) != 1 or indices[0] in used:
        return _made(kind, {}, *args, **kwargs)
    return _made(kind, {part.__name__: _part for part in _named_by(kind)} | {"nn": Parts()}, *args, **kwargs)


def _made(kind: type[nn.Module], names: dict, *args, **kwargs) -> nn.Module:
    """
    `kind(*args, **kwargs)` without initial values; its constructor finds `names` under global names, and under those
    of classes of modules what makes them in this same way.
    """
    own = kind.__init__
    if not isinstance(own, types.FunctionType) or hasattr(own, "__wrapped__"):
        return kind(*args, **kwargs)
    parts = {part.__name__: functools.partial(_made, part, {}) for part in _named_by(kind)}
    values = own.__globals__ | parts | {"nn": Bare()} | names
    start = types.FunctionType(own.__code__, values, own.__name__, own.__defaults__, own.__closure__)
    start.__kwdefaults__ = own.__kwdefaults__
    made = kind.__new__(kind)
    start(made, *args, **kwargs)
    return made


def _named_by(kind: type[nn.Module]) -> list[type[nn.Module]]:
    """Classes of modules that the constructor of a class names."""
    own = kind.__init__
    if not isinstance(own, types.FunctionType):
        return []
    found = (own.__globals__.get(name) for name in global_names(own.__code__))
    return [value for value in found if isinstance(value, type) and issubclass(value, nn.Module)]


@functools.cache
def global_names(code: types.CodeType) -> set[str]:
    """Names that a function, and the functions within it, look up."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(global_names, inner))


__all__ = ["global_names", "on_meta"]
