"""Models built for their shapes alone: without values, and hollow in layers that no path has.

All that is made of such a layer is a stub that shows the layer's plain attributes. The family's own code makes these,
while the layer's parts, which take most of the time, are left out.
"""

import functools
import types
from collections.abc import Callable, Container
from contextlib import nullcontext

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


class ShapesOnly(TorchFunctionMode):
    """Modules built on meta inside are not initialised by what `torch.nn.init` lets others do: there are no values."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == nn.init.__name__ and (args or "tensor" in kwargs):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


class Part(nn.Module):
    """Stands for whatever a hollow layer would be made of."""


PART = Part()


class Parts:
    """Stands for `torch.nn`, and makes that of whatever it is asked for."""

    def __getattr__(self, name: str) -> Callable[..., Part]:
        return _part


def _part(*args, **kwargs) -> Part:
    return PART


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
    with nullcontext() if torch.get_default_device().type == "meta" else torch.device("meta"), ShapesOnly():
        if used is None:
            return causal_class(config)

        def base(*args, **kwargs) -> PreTrainedModel:
            return _made(base_class, args, kwargs, hollow)

        kinds = [kind for kind in _named_by(base_class) if issubclass(kind, GradientCheckpointingLayer)]
        hollow = {kind.__name__: functools.partial(_layer, kind, used) for kind in kinds}
        try:
            model = _made(causal_class, (config,), {}, {base_class.__name__: base})
        except (AttributeError, TypeError):  # it asks something of parts that are not there
            return causal_class(config)
        return causal_class(config) if _lacks(model, used) else model


def _lacks(model: nn.Module, used: Container[int]) -> bool:
    """Whether a layer is hollow that is used: what it was given was not its index."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = [layer for layers in lists for i, layer in enumerate(layers) if i in used]
    return any(part is PART for layer in layers for part in layer.modules())


def _layer(kind: type[nn.Module], used: Container[int], *args, **kwargs) -> nn.Module:
    indices = [value for value in (*args, *kwargs.values()) if type(value) is int]
    if len(indices) != 1 or indices[0] in used:
        return kind(*args, **kwargs)
    return _made(kind, args, kwargs, {part.__name__: _part for part in _named_by(kind)} | {"nn": Parts()})


def _made(kind: type[nn.Module], args: tuple, kwargs: dict, names: dict) -> nn.Module:
    """`kind(*args, **kwargs)`, whose constructor finds something else under some global names."""
    own = kind.__init__
    if not isinstance(own, types.FunctionType) or hasattr(own, "__wrapped__"):
        return kind(*args, **kwargs)
    start = types.FunctionType(own.__code__, own.__globals__ | names, own.__name__, own.__defaults__, own.__closure__)
    start.__kwdefaults__ = own.__kwdefaults__
    made = kind.__new__(kind)
    start(made, *args, **kwargs)
    return made


@functools.cache
def _named_by(kind: type[nn.Module]) -> list[type[nn.Module]]:
    """Classes of modules that the constructor of a class names."""
    own = kind.__init__
    if not isinstance(own, types.FunctionType):
        return []
    found = (own.__globals__.get(name) for name in global_names(own.__code__))
    return [value for value in found if isinstance(value, type) and issubclass(value, nn.Module)]


def global_names(code: types.CodeType) -> set[str]:
    """Names that a function, and the functions within it, look up."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(global_names, inner))


__all__ = ["ShapesOnly", "on_meta"]
