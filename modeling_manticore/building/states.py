"""The uncut components inside a hybrid, and their hidden states at chosen depths."""

import copy
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..cache_manticore import derive_positions
from ..configuration_manticore import component_weights
from ..mixing_manticore import Boundary
from ..slicing_manticore import AFTER_LAST, FINAL_NORMS, PassThrough, find_layers, owner_of, run_view


class ComponentStates:
    """
    Runs the uncut components of a hybrid. They are put together from the layers that `providers` (hybrids with the
    same components) hold, without copying; a component that is not complete there is loaded from its recorded source.

    Args:
        config: the hybrid's configuration.
        providers: hybrids to borrow modules from, tried in order.
        uncut: the components themselves, one for each of the hybrid's, instead.

    Raises:
        ValueError: `uncut` are other models than the configuration says.
    """

    def __init__(self, config, providers: list[PreTrainedModel], uncut: list[PreTrainedModel] | None = None):
        self.config, self.providers = config, providers
        self._bases: dict[tuple[int, int], PreTrainedModel] = {}
        self._loaded: dict[int, PreTrainedModel] = {}
        if uncut is not None:
            shapes = [
                [(c.model_type, c.hidden_size, c.num_hidden_layers) for c in side]
                for side in ([model.config for model in uncut], config.components)
            ]
            if shapes[0] != shapes[1]:
                raise ValueError(f"components: got {shapes[0]} (family, width, depth), allowed is {shapes[1]}.")
            self._loaded = {k: getattr(model, model.base_model_prefix) for k, model in enumerate(uncut)}

    def check(self, wanted: Iterable[int]) -> None:
        """
        Raises:
            ValueError: a component is neither complete in the providers nor recorded with a source.
        """
        for k in wanted:
            self._complete(k)

    @torch.no_grad()
    def run(
        self, k: int, batch: "Batch", positions: Iterable[tuple[int, bool]]
    ) -> dict[tuple[int, bool], torch.Tensor]:
        """
        States of component k, (batch, tokens, d_k), at positions (i, False): before layer i (i = depth: after the last
        layer, before the final norm), and (depth, True): after the final norm.
        """
        positions = set(positions)
        depth = self.config.depth(k)
        base = self._base(k, max(layer for layer, _ in positions))
        layers = base.get_submodule(find_layers(base, self.config.components[k]))
        found: dict[tuple[int, bool], torch.Tensor] = {}
        handles = []
        for layer, ended in positions:
            if layer < depth:
                handles.append(
                    layers[layer].register_forward_pre_hook(keep_input(found, (layer, ended)), with_kwargs=True)
                )
            elif not ended:
                handles.append(layers[depth - 1].register_forward_hook(_keep_output(found, (layer, ended))))
        try:
            output = run_view(
                base, input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
            )
        finally:
            for handle in handles:
                handle.remove()
        if (depth, True) in positions:
            found[depth, True] = output
        return found

    def _base(self, k: int, deepest: int) -> PreTrainedModel:
        """The base model whose layers from `deepest` on are stubs, unless it runs to its end."""
        if (k, deepest) not in self._bases:
            complete, depth = self._complete(k), self.config.depth(k)
            name = find_layers(complete, self.config.components[k])
            base = _shallow(complete, name)
            if deepest < depth:
                owner, leaf = owner_of(base, name)
                arity = self.config.components[k].layer_arity
                owner._modules[leaf] = nn.ModuleList(
                    layer if i < deepest else PassThrough(layer, arity) for i, layer in enumerate(owner._modules[leaf])
                )
            self._bases[k, deepest] = base.eval()
        return self._bases[k, deepest]

    def _complete(self, k: int) -> PreTrainedModel:
        if k in self._loaded:
            return self._loaded[k]
        for model in self.providers:
            base = _assemble(model, k)
            if base is not None:
                self._loaded[k] = base
                return base
        source = getattr(self.config.components[k], "source", None)
        if source is None:
            raise ValueError(
                f"components[{k}]: its own hidden states are needed, but the hybrid holds only part of it and no "
                "source to load it from. Pass `components`: the uncut models, or a supernet of them."
            )
        provider = self.providers[0]
        loaded = AutoModelForCausalLM.from_pretrained(
            source, revision=self.config.components[k].revision, dtype=provider.dtype, use_safetensors=True
        ).to(provider.device)
        self._loaded[k] = getattr(loaded, loaded.base_model_prefix)
        return self._loaded[k]


class Batch:
    """Token ids (batch, tokens) with their mask and positions."""

    def __init__(self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor | None):
        self.input_ids, self.attention_mask = input_ids, attention_mask
        self.position_ids = derive_positions(input_ids, attention_mask, None, 0)

    def tokens(self, states: torch.Tensor) -> torch.Tensor:
        """The states of unmasked tokens, (tokens, d)."""
        return (
            states.reshape(-1, states.shape[-1]) if self.attention_mask is None else states[self.attention_mask.bool()]
        )


@torch.no_grad()
def boundaries(model: PreTrainedModel, batch: Batch) -> Iterator[Boundary]:
    """What the stems and then each block of a hybrid hand on, one after the other."""
    trunk = model.trunk
    weights = [list(w.to(model.device).unbind()) if len(w) > 1 else [1.0] for w in model.mixture_weights()]
    boundary = trunk.run_stems(batch.input_ids, None, batch.attention_mask, batch.position_ids, weights[0], False)
    yield boundary
    for block, own in zip(trunk.blocks, weights):
        boundary = block(boundary, own, batch.attention_mask, batch.position_ids)
        yield boundary


def block_and_head_gates(model: PreTrainedModel) -> list[list[float]]:
    """Current gate of every target of the B + 1 junctions under gate="mixture": its own mixture weight."""
    points = [point.tolist() for point in model.mixture_weights()]
    heads = component_weights(model.config, model.config.head_block, points[model.config.head_block])
    return _of_components(model, points) + [list(heads.values())]


def stem_and_block_gates(model: PreTrainedModel) -> list[list[float]]:
    """Current gate of every source of the B + 1 junctions under gate="mixture": its own mixture weight."""
    points = [point.tolist() for point in model.mixture_weights()]
    return [list(component_weights(model.config, 0, points[0]).values())] + _of_components(model, points)


def _of_components(model: PreTrainedModel, points: list[list[float]]) -> list[list[float]]:
    """The weights without those of skip paths."""
    return [[point[p] for p in model.config.real_paths(b)] for b, point in enumerate(points)]


def _assemble(model: PreTrainedModel, k: int) -> PreTrainedModel | None:
    """Component k's base model out of the hybrid's own modules, or None if some part of it is not there."""
    config, trunk = model.config, model.trunk
    if k >= len(config.components) or str(k) not in trunk.stems:
        return None
    stem, depth = trunk.stems[str(k)], config.depth(k)
    name = find_layers(stem, config.components[k])
    views = [
        (spec, path.slice)
        for block, specs in zip(trunk.blocks, config.blocks)
        for path, spec in zip(block.paths, specs)
        if spec["component"] == k
    ]
    layers = []
    for i in range(depth):
        holders = [view for spec, view in views if spec["start"] <= i < spec["stop"]]
        if not holders:
            return None
        layers.append(holders[0].get_submodule(name)[i])
    ends = [view for _, view in views] + [
        getattr(head, head.base_model_prefix) for key, head in getattr(model, "heads", {}).items() if key == str(k)
    ]
    base = _shallow(stem, name)
    owner, leaf = owner_of(base, name)
    owner._modules[leaf] = nn.ModuleList(layers)
    for tail in FINAL_NORMS + AFTER_LAST:
        if owner._modules.get(tail) is None:
            continue
        candidates = [owner_of(view, name)[0]._modules[tail] for view in ends]
        real = [module for module in candidates if not isinstance(module, nn.Identity)]
        if not real:
            return None
        owner._modules[tail] = real[0]
    return base


def _shallow(base: PreTrainedModel, layers_name: str) -> PreTrainedModel:
    """A copy of the model object down to the owner of its layers, sharing all modules."""
    top = copy.copy(base)
    top._modules = dict(base._modules)
    parent = top
    for part in layers_name.split(".")[:-1]:
        child = copy.copy(parent._modules[part])
        child._modules = dict(child._modules)
        parent._modules[part] = child
        parent = child
    return top


def keep_input(found, key):
    def hook(module, args, kwargs):
        found[key] = args[0] if args else kwargs["hidden_states"]

    return hook


def _keep_output(found, key):
    def hook(module, args, output):
        found[key] = output[0] if isinstance(output, tuple) else output

    return hook
