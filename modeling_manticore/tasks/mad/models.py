"""Small models of the MAD protocol, from configurations: attention, state space, and a hybrid of both."""

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GPTNeoXConfig, Mamba2Config, PreTrainedConfig

from ... import ManticoreConfig
from .decoder import CompressionModel
from .settings import MadSetting


ARCHITECTURES = ("gpt_neox", "mamba2", "hybrid")
HEAD_SIZE = 32
STATE_SIZE = 32


def model_of(architecture: str, setting: MadSetting, hidden_size: int, layers: int, seed: int) -> nn.Module:
    """
    A fresh model for a task: a causal language model, or a `CompressionModel`. Weights follow from the seed.

    Raises:
        ValueError: as `configuration_of`.
    """
    config = configuration_of(architecture, setting, hidden_size, layers)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        if setting.task == "compression":
            return CompressionModel(AutoModel.from_config(config), setting.vocab_size, setting.sequence_length)
        return AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_rng_state(state)


def configuration_of(architecture: str, setting: MadSetting, hidden_size: int, layers: int) -> PreTrainedConfig:
    """
    Layers are counted as in MAD, where a layer mixes either the sequence or the channels: a GPT-NeoX layer is two, a
    Mamba-2 layer one. The hybrid's first half are Mamba-2 layers, its second half GPT-NeoX layers.

    Raises:
        ValueError: an unknown architecture, a hidden size that is no multiple of 32, or layers that are not even
            (for the hybrid: no multiple of 4).
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture: got {architecture!r}, allowed are {', '.join(ARCHITECTURES)}.")
    if hidden_size < HEAD_SIZE or hidden_size % HEAD_SIZE:
        raise ValueError(f"hidden_size: got {hidden_size}, allowed are positive multiples of {HEAD_SIZE}.")
    unit = 4 if architecture == "hybrid" else 2
    if layers < unit or layers % unit:
        raise ValueError(f"layers: got {layers} of {architecture!r}, allowed are positive multiples of {unit}.")
    shared = {"vocab_size": setting.vocab_size, "hidden_size": hidden_size, "use_cache": False}
    shared |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    attention = GPTNeoXConfig(
        num_hidden_layers=layers // 2,
        num_attention_heads=hidden_size // HEAD_SIZE,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=max(setting.sequence_length, 2),
        use_parallel_residual=False,
        **shared,
    )
    space = Mamba2Config(
        num_hidden_layers=layers,
        num_heads=2 * hidden_size // HEAD_SIZE,
        head_dim=HEAD_SIZE,
        state_size=STATE_SIZE,
        n_groups=1,
        chunk_size=min(64, setting.sequence_length),
        **shared,
    )
    if architecture == "hybrid":
        blocks = [
            [{"component": 0, "start": 0, "stop": layers // 2}],
            [{"component": 1, "start": layers // 4, "stop": layers // 2}],
        ]
        return ManticoreConfig(components=[space, attention], blocks=blocks, use_cache=False)
    return attention if architecture == "gpt_neox" else space
