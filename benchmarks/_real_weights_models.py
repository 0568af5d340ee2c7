"""
A Llama with some of its layers dropped, replaced by a linear map, or given a Mamba-2, or nothing, in place of their
attention.

All of them are hybrids of this package. The Mamba-2 layers are those of a GraniteMoeHybrid without experts, whose
layer is norm, Mamba-2, norm, gated MLP: with the norms and the MLP of the layer that it replaces only the attention
differs. Its states live in the space of the Llama, so the bridges around it are the identity and stay so.
"""

import torch
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM, PreTrainedModel

from modeling_manticore import ManticoreForCausalLM
from modeling_manticore.mixing_manticore import Projector


def pieces(depth: int, layers: list[int]) -> list[tuple[int, int]]:
    """The ranges [start, stop) of layers between those that are replaced, empty ones left out."""
    cuts = [-1, *sorted(layers), depth]
    ranges = [(before + 1, after) for before, after in zip(cuts, cuts[1:])]
    return [(start, stop) for start, stop in ranges if start < stop]


def check_layers(depth: int, layers: list[int]) -> None:
    """
    Raises:
        ValueError: a layer is named twice, or is the first or the last, which the stem and the head need.
    """
    if len(set(layers)) < len(layers) or not all(0 < layer < depth - 1 for layer in layers) or not layers:
        raise ValueError(f"layers: got {layers}, allowed are different ones of 1..{depth - 2}.")


def dropped(teacher: PreTrainedModel, layers: list[int]) -> PreTrainedModel:
    """The teacher without these layers: what enters one is what enters the next, through identity bridges."""
    depth = teacher.config.num_hidden_layers
    check_layers(depth, layers)
    blocks = [[{"component": 0, "start": start, "stop": stop}] for start, stop in pieces(depth, layers)]
    return ManticoreForCausalLM.from_components([teacher], blocks=blocks)


def mamba_layers(
    teacher: PreTrainedModel, count: int, state: int, chunk: int = 64, like_attention: bool = False
) -> PreTrainedModel:
    """
    A language model of `count` + 1 layers of the teacher's sizes with a fresh Mamba-2 in each (the last is not used: a
    model's last layer would bring its final norm). Time steps start log-uniform in [0.001, 0.1] and decays uniform in
    [1, 16], as in the Mamba-2 paper (arXiv 2405.21060). `like_attention` gives it the shape of the teacher's attention
    in place of twice the width: as many heads and groups as queries, biases, and `state` has to be the head's width.
    """
    given = teacher.config
    expand = 1 if like_attention else 2
    heads = expand * given.hidden_size // given.head_dim
    config = GraniteMoeHybridConfig(
        vocab_size=given.vocab_size,
        hidden_size=given.hidden_size,
        num_hidden_layers=count + 1,
        num_attention_heads=given.num_attention_heads,
        num_key_value_heads=given.num_key_value_heads,
        shared_intermediate_size=given.intermediate_size,
        num_local_experts=0,
        hidden_act=given.hidden_act,
        rms_norm_eps=given.rms_norm_eps,
        max_position_embeddings=given.max_position_embeddings,
        mamba_n_heads=heads,
        mamba_d_head=given.head_dim,
        mamba_d_state=state,
        mamba_expand=expand,
        mamba_n_groups=heads if like_attention else 1,
        mamba_proj_bias=like_attention,
        mamba_chunk_size=chunk,
        tie_word_embeddings=True,
        **{key: getattr(given, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    model = GraniteMoeHybridForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            steps = torch.exp(torch.empty(heads).uniform_(-6.9078, -2.3026))
            layer.mamba.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus of it is the step
            layer.mamba.A_log.copy_(torch.log(torch.empty(heads).uniform_(1, 16)))
    return model.eval()


@torch.no_grad()
def give_own_parts(layer: torch.nn.Module, original: torch.nn.Module) -> None:
    """Copy the norms and the gated MLP of a Llama layer into a GraniteMoeHybrid layer."""
    layer.input_layernorm.weight.copy_(original.input_layernorm.weight)
    layer.post_attention_layernorm.weight.copy_(original.post_attention_layernorm.weight)
    mlp = original.mlp
    layer.shared_mlp.input_linear.weight.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
    layer.shared_mlp.output_linear.weight.copy_(mlp.down_proj.weight)


@torch.no_grad()
def start_from_attention(mixer: torch.nn.Module, attention: torch.nn.Module) -> None:
    """
    Copy queries to C, keys to B, values to x and the output projection, as in "The Mamba in the Llama" (arXiv
    2408.15237): without its gate, convolution and decay a Mamba-2 is linear attention. The gate starts almost constant
    (SiLU of 1.278 is 1) and the convolution almost at the token itself.

    Raises:
        ValueError: the mixer was not made with `like_attention`, or its state has not the width of a head.
    """
    width, state = mixer.intermediate_size, mixer.n_groups * mixer.ssm_state_size
    if attention.q_proj.weight.shape[0] != width or state != width or not mixer.use_bias:
        raise ValueError(f"state: got {mixer.ssm_state_size}, allowed is the width of a head of the attention.")
    groups = attention.num_key_value_groups

    def for_queries(weight: torch.Tensor) -> torch.Tensor:
        return weight.view(-1, attention.head_dim, weight.shape[1]).repeat_interleave(groups, 0).flatten(0, 1)

    scale = attention.head_dim**-0.5
    rows, bias = mixer.in_proj.weight, mixer.in_proj.bias
    rows[:width] *= 0.1
    rows[width : 2 * width] = for_queries(attention.v_proj.weight)
    rows[2 * width : 3 * width] = scale * for_queries(attention.k_proj.weight)
    rows[3 * width : 4 * width] = scale * attention.q_proj.weight
    bias.zero_()
    bias[:width] = 1.278
    mixer.conv1d.weight *= 0.1
    mixer.conv1d.weight[..., -1] = 1.0
    mixer.conv1d.bias.zero_()
    mixer.norm.weight.fill_(0.1)
    mixer.out_proj.weight.copy_(attention.o_proj.weight)
    mixer.out_proj.bias.zero_()


@torch.no_grad()
def with_mamba(
    teacher: PreTrainedModel,
    mixers: dict[int, dict[str, torch.Tensor]],
    state: int,
    like_attention: bool = False,
) -> PreTrainedModel:
    """The teacher with Mamba-2 mixers (layer -> state dictionary) in place of the attention of these layers."""
    layers, depth = sorted(mixers), teacher.config.num_hidden_layers
    check_layers(depth, layers)
    donor = mamba_layers(teacher, len(layers), state, like_attention=like_attention)
    for own, layer in zip(donor.model.layers, layers):
        give_own_parts(own, teacher.model.layers[layer])
        own.mamba.load_state_dict(mixers[layer])
    blocks = [(start, {"component": 0, "start": start, "stop": stop}) for start, stop in pieces(depth, layers)]
    blocks += [(layer, {"component": 1, "start": i, "stop": i + 1}) for i, layer in enumerate(layers)]
    ordered = [[path] for _, path in sorted(blocks, key=lambda entry: entry[0])]
    return ManticoreForCausalLM.from_components([teacher, donor], blocks=ordered)


def without_attention(teacher: PreTrainedModel, layers: list[int], state: int) -> PreTrainedModel:
    """
    The teacher with nothing in place of the attention of these layers, their norms and MLP kept: the model that a
    Mamba-2 has to beat. It is that of `with_mamba` with mixers that give zeros and are not trained.
    """
    donor = mamba_layers(teacher, len(layers), state, like_attention=True)
    silent = [own.mamba.requires_grad_(False) for own in donor.model.layers]
    for mixer in silent:
        mixer.out_proj.weight.zero_()
        mixer.out_proj.bias.zero_()
    mixers = {layer: mixer.state_dict() for layer, mixer in zip(sorted(layers), silent)}
    model = with_mamba(teacher, mixers, state, like_attention=True)
    for module in model.modules():
        if isinstance(module, type(silent[0])):
            module.requires_grad_(False)
    return model


def freeze_bridges(model: PreTrainedModel) -> PreTrainedModel:
    """Identity bridges join states of one space; they are no part of the model to be trained."""
    for module in model.modules():
        if isinstance(module, Projector):
            module.requires_grad_(False)
    return model
