"""How large a hybrid is, out of its configuration alone: it is built without memory for its weights."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..building.costs import running_flops
from ..cache_manticore import CACHE, cache_growth
from ..configuration_manticore import ManticoreConfig
from ..mixing_manticore import Projector
from ..modeling_manticore import ManticoreForCausalLM


@dataclass
class Sizes:
    """
    A hybrid. `bytes` are those of its weights in memory and on disk, `cache_bytes_per_token` what keys and values grow
    by, `state_bytes_per_sequence` recurrent states and full windows of attention (None where they cannot be told),
    `flops_per_token` at the plan's context; projectors and bridges are in `parameters` and `flops_per_token`.
    """

    parameters: int
    bytes: int
    cache_bytes_per_token: int
    state_bytes_per_sequence: int | None
    flops_per_token: int
    projector_parameters: int
    projector_flops_per_token: int


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors are of this dtype inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_on_meta(config: ManticoreConfig, dtype: torch.dtype) -> PreTrainedModel:
    """
    The hybrid of a configuration as `from_components` builds it, on the meta device.

    Raises:
        ValueError: a component cannot be sliced.
    """
    with default_dtype(dtype), torch.device("meta"):
        return ManticoreForCausalLM(config)


def weight_bytes(model: PreTrainedModel) -> dict[str, int]:
    """Name -> bytes of every parameter and saved buffer, shared ones once; some families keep some in float32."""
    kept = {re.compile(rf"(^|\.){rule}(\.|$)"): dtype for rule, dtype in model._get_dtype_plan(model.dtype).items()}
    saved = set(model.state_dict(keep_vars=True))
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n in saved)]
    found = {}
    for name, tensor in tensors:
        dtype = next((dtype for rule, dtype in kept.items() if rule.search(name)), tensor.dtype)
        found[name] = tensor.numel() * (dtype.itemsize if tensor.is_floating_point() else tensor.element_size())
    return found


def sizes_of(model: PreTrainedModel, context: int, states: dict[int, list[int] | None]) -> Sizes:
    """
    The sizes of a hybrid, which may be on meta.

    Args:
        context: tokens at which FLOPs are counted.
        states: of every component, `state_bytes` of its layers.
    """
    config = model.config
    projectors = [module for module in model.modules() if isinstance(module, Projector)]
    return Sizes(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes=sum(weight_bytes(model).values()),
        cache_bytes_per_token=cache_growth(config, model.dtype.itemsize),
        state_bytes_per_sequence=_states_of(config, states),
        flops_per_token=running_flops(model, context),
        projector_parameters=sum(p.numel() for projector in projectors for p in projector.parameters()),
        projector_flops_per_token=sum(2 * projector.weight.numel() for projector in projectors),
    )


def _states_of(config: ManticoreConfig, states: dict[int, list[int] | None]) -> int | None:
    total = 0
    for block in config.blocks:
        for path in block:
            if path["component"] is not None:
                own = states[path["component"]]
                if own is None:
                    return None
                total += sum(own[path["start"] : path["stop"]])
    return total


@torch.no_grad()
def state_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> list[int] | None:
    """
    Bytes per sequence that each layer of a component keeps whatever the length: recurrent and convolution states, and
    windows when they are full. One token is run on the meta device; None where the family cannot run there.
    """
    with default_dtype(dtype), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).eval()
        try:
            output = model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True)
        except (RuntimeError, NotImplementedError):  # some operators of experts have no meta kernel
            return None
    found = output.get(CACHE, output.get("cache_params"))
    if not isinstance(found, DynamicCache):
        return None
    sizes = []
    for layer in found.layers:
        held = sum(t.numel() * t.element_size() for t in _tensors({**vars(layer)}))
        if isinstance(layer, DynamicLayer):
            window = getattr(layer, "sliding_window", None)
            keys = sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
            other = sum(t.numel() * t.element_size() for t in _states(layer))
            held = other + (keys * (window - 1) if layer.is_sliding and window else 0)
        sizes.append(held)
    return sizes


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for entry in values for tensor in _tensors(entry)]


def _states(layer: nn.Module) -> list[torch.Tensor]:
    """States beside keys and values, of layers that have both."""
    return _tensors({name: value for name, value in vars(layer).items() if name.endswith("states")})
