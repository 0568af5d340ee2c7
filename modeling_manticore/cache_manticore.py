"""
What travels with a forward pass: positions and masks, checked; router logits; and the cache of a hybrid, a flat list
of transformers' own cache layers, seen by each path through a view of its slice.

Some layers need help to be exact with a cache and with padding: those that keep states on their modules, let padding
into a convolution, or limit their time steps in prefill but not in decoding.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from .configuration_manticore import ManticoreConfig
from .scan_manticore import use_own_scan
from .sharing_manticore import kinds_of


# Families whose layers keep their state on modules instead of in the cache: (convolution state, recurrent state).
STATE_ON_MODULES = {"recurrent_gemma": ("temporal_block.conv1d_state", "temporal_block.rg_lru.recurrent_states")}

# Families that let padding into a convolution: (module that gets `position_ids`, its child whose output is masked).
PADDING_LEAKS = {"recurrent_gemma": ("temporal_block", "linear_x")}


@dataclass
class ManticoreModelOutput(BaseModelOutputWithPast):
    """
    Output of the trunk; `boundary` is what the last block hands to the heads, `block_weights` the weights used;
    `aux_loss` balances the experts of all components, `router_loss` is what of it enters a training loss.
    """

    boundary: tuple | None = None
    block_weights: list | None = None
    router_logits: tuple | None = None
    aux_loss: torch.Tensor | None = None
    router_loss: torch.Tensor | None = None


class Placeholder:
    """Stands in a slice's cache for a layer that is not in the slice. (The one of transformers is new in 5.21.)"""

    supports_early_init, is_initialized, is_compileable, is_croppable = False, True, True, True
    keys = values = None


class SliceCache(Cache):
    """
    The cache as one path's slice sees it: as many layers as the uncut component has, the real ones in [start, stop),
    placeholders outside. The layer objects are those of the parent, so reordering and cropping the parent is enough.
    """

    def __init__(self, parent: "ManticoreCache", layers: list, start: int, depth: int):
        placeholders = [Placeholder() for _ in range(depth)]
        super().__init__(layers=placeholders[:start] + layers + placeholders[start + len(layers) :])
        self.parent, self.kinds = parent, kinds_of(self.layers)
        self.ahead = 0  # tokens of the current forward pass that this slice has already been fed, one at a time

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that this slice has seen. Linear layers do not count them, so the parent does."""
        return self.parent.get_seq_length() + self.ahead

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(kv_length, kv_offset) of the layer; of a full-attention layer where the index names no attention layer."""
        layer = self.layers[layer_idx]
        if isinstance(layer, CacheLayerMixin):
            return layer.get_mask_sizes(query_length)
        return self.get_seq_length() + query_length, 0


class ManticoreCache(Cache):
    """
    Cache of a whole hybrid. Every path owns the cache layers of its slice, also where slices overlap or repeat:
    two paths that shared the state of a recurrent layer would silently overwrite each other's.

    Args:
        config (`ManticoreConfig`): the hybrid's configuration.
    """

    is_compileable = False

    def __init__(self, config: ManticoreConfig):
        owned, layers = {}, []
        for b, block in enumerate(config.blocks):
            for p in config.real_paths(b):
                complete = DynamicCache(config=config.components[block[p]["component"]]).layers
                owned[b, p] = complete[block[p]["start"] : block[p]["stop"]]
                layers.extend(owned[b, p])
        super().__init__(layers=layers)
        self.seen_tokens, self.skipped = 0, set()
        self._views = {
            (b, p): SliceCache(
                self, owned[b, p], config.blocks[b][p]["start"], config.depth(config.blocks[b][p]["component"])
            )
            for b, p in owned
        }

    def view(self, block: int, path: int) -> SliceCache:
        """The part of the cache that belongs to one path."""
        return self._views[block, path]

    def run_or_skip(self, block: int, path: int, runs: bool) -> None:
        """
        Note that a path runs, or is skipped because its weight is zero.

        Raises:
            ValueError: it runs now but was skipped before: it has not seen the tokens in the cache.
        """
        if not runs:
            self.skipped.add((block, path))
        elif (block, path) in self.skipped:
            raise ValueError(
                f"past_key_values: path {path} of block {block} had weight 0 when this cache was filled and has not "
                "seen its tokens; allowed is a cache filled under the present mixture weights. Start again without it."
            )

    def advance(self, tokens: int) -> None:
        """Count tokens that a forward pass has just written into every layer."""
        self.seen_tokens += tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far."""
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(kv_length, kv_offset) for `query_length` new tokens."""
        return self.seen_tokens + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """
        Remove the last `-tokens_to_remove` tokens (a number <= 0, as transformers counts).

        Raises:
            ValueError: some layer holds a recurrent state, which cannot forget its last tokens.
        """
        if tokens_to_remove < 0 and not self.is_croppable:
            raise ValueError(
                f"tokens_to_remove: got {tokens_to_remove}, allowed is 0: the recurrent states in this cache cannot "
                "forget their last tokens. Keep a copy (`copy.deepcopy(cache)`) of the cache to come back to."
            )
        super().crop(tokens_to_remove)
        self.seen_tokens += min(tokens_to_remove, 0)

    def reset(self) -> None:
        """Empty every layer and the token count."""
        super().reset()
        self.seen_tokens, self.skipped = 0, set()


def derive_positions(given, attention_mask, position_ids, seen) -> torch.LongTensor:
    """Positions (batch, tokens): as given, else counted from the mask, else consecutive."""
    batch, tokens = given.shape[:2]
    if position_ids is not None:
        return position_ids.expand(batch, -1)
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -tokens:]
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


def check_rope(config: ManticoreConfig, tokens: int, seen: int) -> None:
    """
    Raises:
        ValueError: a cache whose keys have other rotary factors than those that the new length asks for (longrope).
    """
    for k in config.used_components:
        rope = getattr(config.components[k], "rope_parameters", None) or {}
        short = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
        if short and 0 < seen <= short < seen + tokens:
            raise ValueError(
                f"past_key_values: got a cache of {seen} tokens, allowed beyond {short} tokens is none: component {k} "
                f"({config.components[k].model_type}) has other rotary factors from there on. Give all tokens at once "
                "without a cache, and continue the one that comes out."
            )


@contextmanager
def lent_states(layers: nn.ModuleList, family: str, cache: SliceCache | None) -> Iterator[None]:
    """
    For families with STATE_ON_MODULES: put the states of `cache` (None: no states) on the modules of the layers, and
    take them back, so that the cache is all there is to reorder, copy or forget.
    """
    owners = {}
    for i, layer in enumerate(layers):
        names = [path.rpartition(".") for path in STATE_ON_MODULES[family]]
        if {owner for owner, _, _ in names} <= dict(layer.named_modules()).keys():
            owners[i] = [(layer.get_submodule(owner), name) for owner, _, name in names]
    stores = {} if cache is None else {i: cache.layers[i] for i in owners}
    for i, pairs in owners.items():
        states = [stores[i].conv_states[0], stores[i].recurrent_states[0]] if i in stores else [None, None]
        for (module, name), state in zip(pairs, states):
            setattr(module, name, state)
    try:
        yield
        for i, store in stores.items():
            convolution, recurrent = (getattr(module, name) for module, name in owners[i])
            store.device, store.dtype = convolution.device, convolution.dtype
            store.conv_states[0], store.recurrent_states[0] = convolution, recurrent
            store.is_conv_states_initialized[0] = store.is_recurrent_states_initialized[0] = True
            store.has_previous_state[0] = True
    finally:
        for pairs in owners.values():
            for module, name in pairs:
                setattr(module, name, None)


class Note:
    """What a module's pre-hook tells the hook of one of its children, within one forward pass."""

    value: torch.Tensor | tuple | None = None


def correct_layer(layer: nn.Module, family: str) -> None:
    """
    Hook what a layer needs to be exact: for families with PADDING_LEAKS the child's output is zero at padding (which
    repeats position 0), and mixers in the manner of Mamba-2 with limited time steps keep to the limits also for single
    tokens, where the families' own code forgets them (nemotron_h).
    """
    if family in PADDING_LEAKS:
        owner_name, child_name = PADDING_LEAKS[family]
        owner, note = layer.get_submodule(owner_name), Note()
        if hasattr(owner, child_name):
            owner.register_forward_pre_hook(functools.partial(_note_padding, note), with_kwargs=True)
            getattr(owner, child_name).register_forward_hook(functools.partial(_zero_padding, note))
    use_own_scan(layer)
    for mixer in layer.modules():
        limits = getattr(mixer, "time_step_limit", None)
        if limits is None or tuple(limits) == (0.0, float("inf")):
            continue
        note = Note()
        mixer.register_forward_pre_hook(functools.partial(_note_time_step_bias, note))
        mixer.in_proj.register_forward_hook(functools.partial(_limit_single_time_steps, note, tuple(limits)))


def _note_padding(note, module, args, kwargs):
    positions = kwargs["position_ids"]
    following = nn.functional.pad(positions[:, 1:], (0, 1), value=1)
    note.value = ((positions > 0) | (following > 0))[..., None]


def _zero_padding(note, module, args, output):
    return output * note.value.to(output.dtype)


def _note_time_step_bias(note, module, args):
    scale = getattr(module, "mup_vector", None)  # falcon_h1 multiplies what its projection gives
    note.value = module.dt_bias, 1.0 if scale is None else scale.flatten()[-len(module.dt_bias) :]


def _limit_single_time_steps(note, limits, module, args, output):
    """Clamp the last entries, which become time steps softplus(entry + bias), as if the time steps were clamped."""
    if output.shape[1] != 1:
        return output
    bias, scale = note.value
    rest, steps = output.split([output.shape[-1] - len(bias), len(bias)], dim=-1)
    low, high = ((_inverse_softplus(limit) - bias) / scale for limit in limits)
    return torch.cat([rest, steps.clamp(low.to(steps.dtype), high.to(steps.dtype))], dim=-1)


def _inverse_softplus(value: float) -> float:
    if value == 0:
        return -float("inf")
    return value if value > 30 else math.log(math.expm1(value))


def cache_growth(config: ManticoreConfig, itemsize: int) -> int:
    """Key and value bytes that a hybrid's cache grows by per token."""
    paths = [block[p] for b, block in enumerate(config.blocks) for p in config.real_paths(b)]
    return sum(cache_bytes(config, path, itemsize) for path in paths)


def cache_bytes(config: ManticoreConfig, path: dict, itemsize: int) -> int:
    """Key and value bytes that the full-attention layers of a slice add per token; windows and states are bounded."""
    component = config.components[path["component"]]
    layers = DynamicCache(config=component).layers[path["start"] : path["stop"]]
    growing = sum(isinstance(layer, DynamicLayer) and not layer.is_sliding for layer in layers)
    if not growing:
        return 0
    heads = next(
        heads
        for name in ("num_key_value_heads", "num_kv_heads", "num_attention_heads")
        if (heads := getattr(component, name, None))
    )
    if getattr(component, "multi_query", False) and not getattr(component, "new_decoder_architecture", False):
        heads = 1
    width = getattr(component, "head_dim", None) or component.hidden_size // component.num_attention_heads
    return growing * 2 * heads * width * itemsize


def path_name(path: dict, names: list[str]) -> str:
    """`name[start:stop]` of a path, by the names of the components, or `skip`."""
    return "skip" if path["component"] is None else f"{names[path['component']]}[{path['start']}:{path['stop']}]"


def describe(config: ManticoreConfig, joints: list[str], parameters: int, itemsize: int) -> str:
    """Slices, the B + 1 joints, parameters, key-value bytes per token and context of a hybrid, as lines of text."""
    names = [getattr(c, "source", None) or c.model_type for c in config.components]
    lines = [f"{'discretized hybrid' if config.is_discretized else 'supernet'} of {', '.join(names)}"]
    lines.append("  stems: " + ", ".join(f"{names[k]} ({k})" for k in config.stem_components))
    for b, block in enumerate(config.blocks):
        lines.append(f"  block {b}: {' | '.join(path_name(path, names) for path in block)}  ({joints[b]})")
    lines.append("  heads: " + ", ".join(f"{names[k]} ({k})" for k in config.head_components) + f"  ({joints[-1]})")
    lines.append(f"  stream {config.hidden_size}, vocabulary {config.vocab_size}, parameters {parameters:,}")
    grows, context = cache_growth(config, itemsize), config.max_position_embeddings
    lines.append(f"  key-value cache {grows:,} bytes per token, context {context if context else 'unlimited'}")
    return "\n".join(lines)


def router_collectors(config: ManticoreConfig, wanted: bool | None) -> dict[int, list]:
    """An empty list for every component whose routers are to be balanced; `wanted` None: as its configuration says."""
    return {
        k: []
        for k in config.used_components
        if getattr(config.components[k], "router_aux_loss_coef", None) is not None
        and (config.components[k].output_router_logits if wanted is None else wanted)
    }


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


__all__ = ["ManticoreCache"]
