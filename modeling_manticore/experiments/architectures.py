"""Configurations of models from scratch: components, hybrids by hand, supernets, and what a search chose of one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GPTNeoXConfig, LlamaConfig, Mamba2Config, PreTrainedConfig

from .. import ManticoreConfig, ManticoreForCausalLM
from ..building.costs import running_flops
from ..building.discretize import merged
from ..cache_manticore import cache_bytes
from .schema import ATTENTION, Shape


ITEM_SIZE = 4  # bytes of a float32


@dataclass(frozen=True)
class Sizes:
    """What the data ask of a model: tokens of the vocabulary, of the longest row, and classes (0: no classifier)."""

    vocabulary: int
    length: int
    classes: int = 0


def component_config(
    family: str, shape: Shape, sizes: Sizes, hidden_size: int | None = None, layers: int | None = None, **changes
) -> PreTrainedConfig:
    """
    A component from scratch.

    Args:
        changes: fields of the family's configuration in place of ours.
    """
    width = hidden_size or shape.hidden_size
    shared = {
        "vocab_size": sizes.vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers or shape.layers,
        "use_cache": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family in ATTENTION:
        attention = {
            "num_attention_heads": width // shape.head_size,
            "max_position_embeddings": max(sizes.length, 2),
        }
        if family == "llama":
            return LlamaConfig(**shared | attention | {"intermediate_size": 8 * width // 3} | changes)
        attention |= {"intermediate_size": 4 * width, "use_parallel_residual": False}
        return GPTNeoXConfig(**shared | attention | changes)
    state_space = {
        "num_heads": 2 * width // shape.head_size,
        "head_dim": shape.head_size,
        "expand": 2,
        "state_size": shape.state_size,
        "n_groups": 1,
        "chunk_size": min(shape.chunk_size, sizes.length),
    }
    return Mamba2Config(**shared | state_space | changes)


def sized_component(
    family: str,
    shape: Shape,
    sizes: Sizes,
    parameters: int,
    layers: int | None,
    parameters_of: Callable[[PreTrainedConfig], int],
) -> PreTrainedConfig:
    """
    A component with as nearly so many parameters as its inner width allows: of the feed-forward part in attention
    families, of the state in Mamba-2. The number of parameters is affine in it, so two counts give it.

    Args:
        parameters_of: counts those of the task's model with a configuration.

    Raises:
        ValueError: with an inner width of 8 it still has more than 1.05 times as many.
    """
    knob = "intermediate_size" if family in ATTENTION else "state_size"

    def made(inner: int) -> PreTrainedConfig:
        return component_config(family, shape, sizes, layers=layers, **{knob: inner})

    first, second = (parameters_of(made(inner)) for inner in (8, 16))
    inner = max(8, round(8 + (parameters - first) * 8 / (second - first)))
    if first > 1.05 * parameters:
        raise ValueError(f"same_parameters: got {parameters} parameters, the smallest {family!r} here has {first}.")
    return made(inner)


def alternating_config(families: list[PreTrainedConfig], state_space_first: bool) -> ManticoreConfig:
    """
    Layers of two components in turn, one a block, each component's own in order: attention, state space, attention,
    ... (striped), or beginning with the state space (MambaFormer: a Mamba layer in the place of positions, then
    attention and Mamba in turn). Both configurations have as many layers as the hybrid, so that none ends in the
    middle of it with its final norm; only layers that are used exist.

    Args:
        families: the attention component and the state space, of one depth.
    """
    depth = families[0].num_hidden_layers
    used, blocks = [0, 0], []
    for layer in range(depth):
        k = (layer + state_space_first) % 2
        blocks.append([{"component": k, "start": used[k], "stop": used[k] + 1}])
        used[k] += 1
    return ManticoreConfig(components=families, blocks=blocks, use_cache=False)


def supernet_config(components: list[PreTrainedConfig], blocks: int, gate: str | None) -> ManticoreConfig:
    """All components side by side in `blocks` blocks."""
    options = {} if gate is None else {"gate": gate}
    return ManticoreConfig.from_partition(components, blocks, use_cache=False, **options)


def chosen_config(supernet: ManticoreConfig, choice: list[int]) -> ManticoreConfig:
    """The discrete hybrid of one path a block."""
    target, _ = merged(supernet, choice)
    del target.kept_components
    return target


def on_meta(config: PreTrainedConfig) -> nn.Module:
    """A causal language model without memory for its weights. A component becomes a hybrid of one block."""
    if config.model_type != "manticore":
        path = {"component": 0, "start": 0, "stop": config.num_hidden_layers}
        config = ManticoreConfig(components=[config], blocks=[[path]], use_cache=False)
    with torch.device("meta"):
        return ManticoreForCausalLM(config)


def costs_of(config: PreTrainedConfig, context: int) -> dict[str, int]:
    """
    Of a model as it runs, with every path of a supernet: forward `flops_per_token` at the end of `context` tokens (as
    in `building/costs.py`, with an LM head), and the `cache_bytes_per_token` of keys and values in float32.
    """
    model = on_meta(config)
    config = model.config
    paths = [path for block in config.blocks for path in block if path["component"] is not None]
    return {
        "flops_per_token": running_flops(model, context),
        "cache_bytes_per_token": sum(cache_bytes(config, path, ITEM_SIZE) for path in paths),
    }
