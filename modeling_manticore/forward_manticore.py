"""What goes into a forward pass and what comes out of it: checks, positions, losses of routers, the output."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from .cache_manticore import ManticoreCache
from .configuration_manticore import ManticoreConfig
from .scan_manticore import is_transformed


@dataclass
class ManticoreModelOutput(BaseModelOutputWithPast):
    """
    Output of the trunk: `aux_loss` balances the experts of all components, `router_loss` is what of it enters a
    training loss.
    """

    router_logits: tuple | None = None
    aux_loss: torch.Tensor | None = None
    router_loss: torch.Tensor | None = None


class TrunkOutput(NamedTuple):
    """
    The same for the heads, in place of the stream `boundary`, what the last block hands on, and the `weights` of all
    blocks. A plain tuple, which costs less than a ModelOutput.
    """

    boundary: tuple
    weights: list
    cache: ManticoreCache | None
    hidden_states: tuple | None
    router_logits: tuple | None
    aux_loss: torch.Tensor | None
    router_loss: torch.Tensor | None


def takes_cache(forward: Callable) -> Callable:
    """A forward that takes `cache`, as it is called from transformers 5.24 on, for `past_key_values`, too."""

    @functools.wraps(forward)
    def wrapper(self, *args, cache: ManticoreCache | None = None, **kwargs):
        if cache is not None:
            if kwargs.get("past_key_values") is not None:
                raise ValueError("cache: got one beside past_key_values, allowed is one of them.")
            kwargs["past_key_values"] = cache
        return forward(self, *args, **kwargs)

    return wrapper


def pad(x: torch.Tensor, width: int) -> torch.Tensor:
    """Zero-pad the last axis of `x` to `width` (pad_D of the paper)."""
    return x if x.shape[-1] == width else nn.functional.pad(x, (0, width - x.shape[-1]))


def cut(x: torch.Tensor, width: int) -> torch.Tensor:
    """Keep the first `width` entries of the last axis of `x` (cut_d of the paper)."""
    return x if x.shape[-1] == width else x[..., :width]


def component_weights(config: ManticoreConfig, block: int, weights: list) -> dict:
    """
    Weight of every component with a path in a block, for stems and heads: the sum over its paths there, renormalised
    without a skip path.
    """
    if len(weights) == 1:
        return {config.blocks[block][0]["component"]: weights[0]}
    totals, real = {}, config.real_paths(block)
    for p in real:
        k = config.blocks[block][p]["component"]
        totals[k] = totals[k] + weights[p] if k in totals else weights[p]
    if len(real) < len(weights):
        whole = sum(totals.values()) + 1e-30  # softmax weights of components may all underflow, never the sum
        totals = {k: total / whole for k, total in totals.items()}
    return {k: totals[k] for k in sorted(totals)}


def weighted_sum(
    weights: list, values: list, always: bool = False, beside: torch.Tensor | None = None
) -> torch.Tensor:
    """
    sum_j a_j x_j of the x_j that are there, and `beside`. A lone x counts as it is, unless `always` its weight does,
    too. A device map may have parted them: the sum is where `beside` is, else the last x.
    """
    if len(values) == 1 and not always:
        return values[0]
    terms = [(a, x) for a, x in zip(weights, values) if x is not None]
    place = (terms[-1][1] if beside is None else beside).device
    terms = [(a.to(place) if isinstance(a, torch.Tensor) else a, x.to(place)) for a, x in terms]
    weights, values = zip(*terms)
    kinds = {getattr(t, "dtype", None) for t in (*weights, *values, *([] if beside is None else [beside]))}
    fits = len(kinds) == 1 and not is_transformed()
    if fits and all(x.shape == values[0].shape for x in values):
        return _WeightedSum.apply(len(terms), *weights, *values, beside)
    products = [a * x for a, x in terms]
    return sum(products[1:], products[0] if beside is None else beside + products[0])


class _WeightedSum(torch.autograd.Function):
    """
    `weighted_sum` in one pass over memory a term, and with slopes of the weights that are dot products: what autograd
    makes of products and sums is twice as many passes, which for logits is a large part of a training step.
    """

    @staticmethod
    def forward(count, *tensors):
        weights, values, beside = tensors[:count], tensors[count:-1], tensors[-1]
        first = values[0] * weights[0] if beside is None else torch.addcmul(beside, values[0], weights[0])
        for a, x in zip(weights[1:], values[1:]):
            first.addcmul_(x, a)
        return first

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.count = inputs[0]
        ctx.save_for_backward(*inputs[1:-1])

    @staticmethod
    def backward(ctx, slope):
        saved = ctx.saved_tensors  # asked for once: checkpointing computes them anew at every asking
        weights, values = saved[: ctx.count], saved[ctx.count :]
        wanted = ctx.needs_input_grad
        of_weights = [_dot(slope, x) if wanted[1 + j] else None for j, x in enumerate(values)]
        of_values = [slope * a if wanted[1 + ctx.count + j] else None for j, a in enumerate(weights)]
        return None, *of_weights, *of_values, slope if wanted[-1] else None


def _dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The sum of products, row by row: exact as a sum in blocks is, without memory for the products."""
    width = x.shape[-1]
    return torch.bmm(x.reshape(-1, 1, width), y.reshape(-1, width, 1)).sum()


def derive_positions(given, attention_mask, position_ids, seen) -> torch.LongTensor:
    """Positions (batch, tokens): as given, else counted from the mask, else consecutive."""
    batch, tokens = given.shape[:2]
    if position_ids is not None:
        return position_ids.expand(batch, -1)
    if attention_mask is not None and attention_mask.ndim == 2:
        before = attention_mask.long().sum(-1, keepdim=True) if tokens == 1 else attention_mask.long().cumsum(-1)
        return (before - 1).clamp_min(0)[:, -tokens:]
    return torch.arange(seen, seen + tokens, device=given.device).expand(batch, -1)


def check_inputs(stems: int, input_ids, inputs_embeds, attention_mask, past_key_values, output_attentions) -> None:
    """
    Raises:
        ValueError: both or neither kind of input; `inputs_embeds` for several stems; a mask that is none of padding; a
            foreign cache; attentions.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of input_ids and inputs_embeds.")
    if inputs_embeds is not None and stems > 1:
        raise ValueError(
            f"inputs_embeds: this hybrid has {stems} stems with an embedding each; give input_ids, or discretize it "
            "first."
        )
    if attention_mask is not None and getattr(attention_mask, "ndim", None) != 2:
        raise ValueError(
            f"attention_mask: got {getattr(attention_mask, 'shape', type(attention_mask).__name__)}, allowed is the "
            "padding mask (batch, tokens seen so far): each component builds its own masks from it."
        )
    if output_attentions:
        raise ValueError("output_attentions: got True, allowed is False: paths attend differently or not at all.")
    if past_key_values is not None and not hasattr(past_key_values, "advance"):
        raise ValueError(
            f"past_key_values: got {type(past_key_values).__name__}, allowed is a ManticoreCache or None."
        )


def check_positions(config: ManticoreConfig, limits: dict[int, int | None], position_ids, seen: int) -> None:
    """
    Raises:
        ValueError: a position is beyond the learned ones of a component (`limits`: component -> their number).
    """
    for k, limit in limits.items():
        if limit is not None and seen + position_ids.shape[-1] > limit and int(position_ids.max()) >= limit:
            raise ValueError(
                f"position_ids: got position {int(position_ids.max())}, allowed is at most {limit - 1}: component "
                f"{k} ({config.components[k].model_type}) has {limit} learned positions."
            )


def is_recurrent(config: ManticoreConfig) -> bool:
    """Whether some path has a layer whose state takes in every token, so that none can be masked afterwards."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in ManticoreCache(config).layers)


def check_order(attention_mask, position_ids, tokens: int, seen: int) -> None:
    """
    What recurrent layers cannot do: skip padding once they have a state, or start afresh within a row. (Not checked
    in a compiled graph, which cannot depend on values.)

    Raises:
        ValueError: padding behind or between tokens that a state goes on from, or sequences packed into one row.
    """
    if torch.compiler.is_compiling():
        return
    if attention_mask is None:
        if position_ids is not None and tokens > 1 and bool((position_ids[..., 1:] < position_ids[..., :-1]).any()):
            raise ValueError(
                "position_ids: got positions that start again, allowed are rising ones: recurrent layers would carry "
                "one packed sequence over into the next. Give every sequence a row of its own."
            )
        return
    mask = attention_mask.bool()
    if seen:
        wrong = not bool(mask[:, seen - 1 :].all())
    else:
        ended = (mask[:, :-1] & ~mask[:, 1:]).cumsum(-1) > 0
        wrong = bool((ended & mask[:, 1:]).any())
    if wrong:
        raise ValueError(
            "attention_mask: got padding after the first tokens, or a row still in its padding when the cache is "
            "continued; allowed is padding before a row's tokens, all in the first pass: recurrent layers cannot skip "
            "it. Continue rows of unequal length each on its own, or start again without the cache."
        )


def check_shapes(given, attention_mask, position_ids, seen: int) -> None:
    """
    Raises:
        ValueError: tokens, mask and positions that do not fit each other and the `seen` tokens of the cache.
    """
    if given.ndim < 2 or given.shape[1] == 0:
        raise ValueError(
            f"input_ids: got shape {tuple(given.shape)}, allowed is (batch, tokens) with a token or more."
        )
    batch, tokens = given.shape[:2]
    if attention_mask is not None and tuple(attention_mask.shape) != (batch, seen + tokens):
        raise ValueError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}, allowed is {(batch, seen + tokens)}: "
            f"every row, with the {seen} tokens in the cache and the {tokens} new ones."
        )
    if position_ids is not None and (
        position_ids.shape[-1] != tokens or position_ids.shape[:-1].numel() not in (1, batch)
    ):
        raise ValueError(
            f"position_ids: got shape {tuple(position_ids.shape)}, allowed is (tokens,), (1 or batch, tokens): "
            f"{tokens} tokens, a batch of {batch}."
        )


def boundaries_wanted(output_hidden_states: bool | int | list[int], count: int) -> list[bool]:
    """Which of the `count` boundaries `output_hidden_states` asks for: all, none, or some by (negative) index."""
    if isinstance(output_hidden_states, bool):
        return [output_hidden_states] * count
    indices = [output_hidden_states] if isinstance(output_hidden_states, int) else list(output_hidden_states)
    if any(not -count <= index < count for index in indices):
        raise ValueError(f"output_hidden_states: got {indices}, allowed are indices from {-count} to {count - 1}.")
    chosen = {index % count for index in indices}
    return [b in chosen for b in range(count)]


def chains(blocks: nn.ModuleList) -> list[list[int]]:
    """The indices of the blocks in order, those together that continue each other through nothing."""
    found = []
    for b, block in enumerate(blocks):
        if block.continues:
            found[-1].append(b)
        else:
            found.append([b])
    return found


def walks(blocks: list[nn.Module], found: list[list[int]], kind: type | None) -> Iterator[list[int]]:
    """
    The blocks of a pass as lists of indices: the last of a list runs with the layers of those before it, in one walk
    of their family's code. Where one is not of this kind (it is wrapped), or has to run alone, each runs by itself.
    """
    for chain in found:
        members = [blocks[b] for b in chain] if len(chain) > 1 else ()
        if members and all(type(block) is kind and not block.runs_alone() for block in members):
            yield chain
        else:
            yield from ([b] for b in chain)


def rope_limits(config: ManticoreConfig) -> dict[int, int]:
    """Of every component in use with other rotary factors for long texts (longrope): the tokens of a short one."""
    ropes = {k: getattr(config.components[k], "rope_parameters", None) or {} for k in config.used_components}
    limits = {
        k: r.get("original_max_position_embeddings") for k, r in ropes.items() if r.get("rope_type") == "longrope"
    }
    return {k: limit for k, limit in limits.items() if limit}


def check_rope(config: ManticoreConfig, limits: dict[int, int], tokens: int, seen: int) -> None:
    """
    Raises:
        ValueError: a cache whose keys have other rotary factors than those that the new length asks for.
    """
    for k, short in limits.items():
        if 0 < seen <= short < seen + tokens:
            raise ValueError(
                f"past_key_values: got a cache of {seen} tokens, allowed beyond {short} tokens is none: component {k} "
                f"({config.components[k].model_type}) has other rotary factors from there on. Give all tokens at once "
                "without a cache, and continue the one that comes out."
            )


def balanced_components(config: ManticoreConfig) -> list[int]:
    """Components in use whose routers can be balanced."""
    return [
        k for k in config.used_components if getattr(config.components[k], "router_aux_loss_coef", None) is not None
    ]


def router_collectors(config: ManticoreConfig, balanced: list[int], wanted: bool | None) -> dict[int, list]:
    """An empty list for every component whose routers are to be balanced; `wanted` None: as its configuration says."""
    return {k: [] for k in balanced if (config.components[k].output_router_logits if wanted is None else wanted)}


def router_losses(config: ManticoreConfig, routers: dict[int, list], attention_mask: torch.Tensor | None) -> tuple:
    """
    (sum of the components' load-balancing losses, the same sum with each component's coefficient), scalars; a
    component's loss is that of the uncut model over the layers it has here. (None, None) without routers.
    """
    losses, coefficients = [], []
    for k, logits in routers.items():
        component = config.components[k]
        experts = getattr(component, "num_experts", None) or component.num_local_experts
        if logits:
            mask = None if attention_mask is None else attention_mask[:, -logits[0].shape[0] // len(attention_mask) :]
            losses.append(load_balancing_loss_func(tuple(logits), experts, component.num_experts_per_tok, mask))
            coefficients.append(component.router_aux_loss_coef)
    if not losses:
        return None, None
    return sum(losses), sum(c * loss for c, loss in zip(coefficients, losses))


__all__ = ["ManticoreModelOutput", "TrunkOutput"]
