"""
The cache of a hybrid, a flat list of transformers' own cache layers, seen by each path through a view of its slice.

Some layers need help to be exact with a cache and with padding: those that keep states on their modules, let padding
into a convolution, or limit their time steps in prefill but not in decoding.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
)
from transformers.masking_utils import create_causal_mask

from .configuration_manticore import ManticoreConfig
from .sharing_manticore import kinds_of


# What a cache is called among arguments and outputs: another name from transformers 5.24 on.
CACHE = "cache" if "cache" in signature(create_causal_mask).parameters else "past_key_values"

# Families whose layers keep their state on modules instead of in the cache: (convolution state, recurrent state).
STATE_ON_MODULES = {"recurrent_gemma": ("temporal_block.conv1d_state", "temporal_block.rg_lru.recurrent_states")}

# Families that let padding into a convolution: (module that gets `position_ids`, its child whose output is masked).
PADDING_LEAKS = {"recurrent_gemma": ("temporal_block", "linear_x")}


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
        placeholder = Placeholder()
        others = [placeholder] * (depth - len(layers))
        super().__init__(layers=others[:start] + layers + others[start:])
        self.parent, self.kinds = parent, kinds_of(layers + others[:1])
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
        self._slices, self._views, unused = {}, {}, {}
        for b, block in enumerate(config.blocks):
            for p in config.real_paths(b):
                k, start, stop = (block[p][name] for name in ("component", "start", "stop"))
                own = _take(unused.setdefault(k, []), config.components[k], start, stop)
                self._slices[b, p] = own, start, config.depth(k)
        super().__init__(layers=[layer for own, _, _ in self._slices.values() for layer in own])
        self.seen_tokens, self.skipped = 0, set()
        for b, p in self._slices:  # here, not when asked for: a compiled graph could not make them
            self.view(b, p)

    def view(self, block: int, path: int, before: Sequence[int] = ()) -> SliceCache:
        """The part of the cache that belongs to one path, with those of the blocks of one path that it continues."""
        key = (block, path, *before)
        if key not in self._views:
            parts = [*(self._slices[b, 0] for b in before), self._slices[block, path]]
            _, start, depth = parts[0]
            self._views[key] = SliceCache(self, [layer for own, _, _ in parts for layer in own], start, depth)
        return self._views[key]

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


def _take(caches: list[list], component: PreTrainedConfig, start: int, stop: int) -> list:
    """Layers [start, stop) of a component's cache that no path has yet; out of those left over, or of a new one."""
    left = next((layers for layers in caches if None not in layers[start:stop]), None)
    if left is None:
        left = list(DynamicCache(config=component).layers)
        caches.append(left)
    own = left[start:stop]
    left[start:stop] = [None] * len(own)
    return own


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
    for mixer in layer.modules():
        limits = vars(mixer).get("time_step_limit")
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


__all__ = ["ManticoreCache"]
