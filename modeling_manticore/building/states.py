"""The uncut components inside a hybrid, and their hidden states at chosen depths."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..configuration_manticore import ManticoreConfig
from ..forward_manticore import component_weights, derive_positions
from ..mixing_manticore import Boundary
from ..modeling_manticore import ManticoreForCausalLM
from ..slicing_manticore import AFTER_LAST, FINAL_NORMS, PassThrough, find_layers, owner_of, run_view


if TYPE_CHECKING:
    from .alignment import OwnTokens


class ComponentStates:
    """
    Runs the uncut components of a hybrid. They are put together from the layers that `providers` (hybrids with the
    same components) hold, without copying; a component that is not complete there is loaded from its recorded source.

    Args:
        config: the hybrid's configuration.
        providers: hybrids to borrow modules from, tried in order.
        uncut: the components themselves, one for each of the hybrid's, instead.
        tokenizers: where vocabularies were transplanted: the components' own, if those are not recorded.

    Raises:
        ValueError: `uncut` are other models than the configuration says.
    """

    def __init__(
        self,
        config: ManticoreConfig,
        providers: list[PreTrainedModel],
        uncut: list[PreTrainedModel] | None = None,
        tokenizers: list | None = None,
    ):
        self.config, self.providers, self.uncut, self.tokenizers = config, providers, uncut, tokenizers
        self._bases: dict[tuple[int, int, bool], PreTrainedModel] = {}
        self._loaded: dict[int, PreTrainedModel] = {}
        self._own: dict[int, PreTrainedModel] = {}
        if uncut is not None:
            shapes = [
                [(c.model_type, c.hidden_size, c.num_hidden_layers) for c in side]
                for side in ([model.config for model in uncut], config.components)
            ]
            if shapes[0] != shapes[1]:
                raise ValueError(f"components: got {shapes[0]} (family, width, depth), allowed is {shapes[1]}.")
            for k, model in enumerate(uncut):
                own = self.is_transplanted(k) and getattr(model.config, "own_vocab_size", None) is None
                (self._own if own else self._loaded)[k] = getattr(model, model.base_model_prefix)

    def is_transplanted(self, k: int) -> bool:
        """Whether component k came with another vocabulary than the hybrid's."""
        return getattr(self.config.components[k], "own_vocab_size", None) is not None

    def check(self, wanted: Iterable[int]) -> None:
        """
        Raises:
            ValueError: a component is neither complete in the providers nor recorded with a source.
        """
        for k in wanted:
            self._complete(k)

    def can_read_own(self, k: int, tokenizer: Any = None) -> bool:
        """Whether the uncut component k, its tokenizer and the hybrid's (unless `tokenizer`) are given or recorded."""
        recorded = [getattr(component, "source", None) is not None for component in self.config.components]
        given = [None] * len(recorded) if self.tokenizers is None else self.tokenizers
        spoken = [source or own is not None for source, own in zip(recorded, given)]
        there = k in self._own or (self.uncut is None and recorded[k])
        return there and spoken[k] and (tokenizer is not None or spoken[self.config.tokenizer_from])

    @torch.no_grad()
    def run(
        self, k: int, batch: "Batch", positions: Iterable[tuple[int, bool]]
    ) -> dict[tuple[int, bool], torch.Tensor]:
        """
        States of component k, (batch, tokens, d_k), at positions (i, False): before layer i (i = depth: after the last
        layer, before the final norm), and (depth, True): after the final norm.
        """
        return self._run(k, batch, set(positions), own=False)

    @torch.no_grad()
    def run_own(
        self, k: int, batch: "Batch", positions: Iterable[tuple[int, bool]]
    ) -> dict[tuple[int, bool], torch.Tensor]:
        """
        As `run`, but component k reads the texts in its own tokenization. The states stand at the hybrid's positions,
        (batch, tokens, d_k); where none is matched (`batch.own[k].matched`) they mean nothing.
        """
        own = batch.own[k]
        index = own.positions[..., None]
        found = self._run(k, own.batch, set(positions), own=True)
        return {place: states.gather(1, index.expand(-1, -1, states.shape[-1])) for place, states in found.items()}

    def _run(
        self, k: int, batch: "Batch", positions: set[tuple[int, bool]], own: bool
    ) -> dict[tuple[int, bool], torch.Tensor]:
        depth = self.config.depth(k)
        base = self._base(k, max(layer for layer, _ in positions), own)
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

    def _base(self, k: int, deepest: int, own: bool) -> PreTrainedModel:
        """The base model whose layers from `deepest` on are stubs, unless it runs to its end."""
        if (k, deepest, own) not in self._bases:
            complete, depth = self.own_base(k) if own else self._complete(k), self.config.depth(k)
            name = find_layers(complete, self.config.components[k])
            base = _shallow(complete, name)
            if deepest < depth:
                owner, leaf = owner_of(base, name)
                arity = self.config.components[k].layer_arity
                owner._modules[leaf] = nn.ModuleList(
                    layer if i < deepest else PassThrough(layer, arity) for i, layer in enumerate(owner._modules[leaf])
                )
            self._bases[k, deepest, own] = base.eval()
        return self._bases[k, deepest, own]

    def own_base(self, k: int) -> PreTrainedModel:
        """
        The base model of component k with its own vocabulary.

        Raises:
            ValueError: it was not given, and no source is recorded.
        """
        if k not in self._own:
            self._own[k] = self._from_source(k)
        return self._own[k]

    def _complete(self, k: int) -> PreTrainedModel:
        if k in self._loaded:
            return self._loaded[k]
        for model in self.providers:
            base = _assemble(model, k)
            if base is not None:
                self._loaded[k] = base
                return base
        self._loaded[k] = self._transplanted(k) if self.is_transplanted(k) else self._from_source(k)
        return self._loaded[k]

    def _source(self, k: int) -> tuple[str, str | None]:
        """Repository or folder of component k, and its revision."""
        component = self.config.components[k]
        if getattr(component, "source", None) is None:
            raise ValueError(
                f"components[{k}]: its own hidden states are needed, but the hybrid holds only part of it and no "
                "source to load it from. Pass `components`: the uncut models, or a supernet of them."
            )
        return component.source, component.revision

    def _from_source(self, k: int) -> PreTrainedModel:
        source, revision = self._source(k)
        provider = self.providers[0]
        loaded = AutoModelForCausalLM.from_pretrained(
            source, revision=revision, dtype=provider.dtype, use_safetensors=True
        ).to(provider.device)
        return getattr(loaded, loaded.base_model_prefix)

    def _transplanted(self, k: int) -> PreTrainedModel:
        """Component k with its own vocabulary, made to speak the hybrid's once more."""
        from .compose import from_components

        pair = [self.config.tokenizer_from, k]
        if self.uncut is None:
            given, revisions = zip(*(self._source(j) for j in pair))
            options = {"revision": list(revisions)}
        else:
            given, options = [self.uncut[j] for j in pair], {}
        recorded = [getattr(component, "tokenizer_source", None) for component in self.config.components]
        tokenizers = recorded if self.tokenizers is None else self.tokenizers
        whole = from_components(
            ManticoreForCausalLM,
            list(given),
            blocks=[[{"component": 1, "start": 0, "stop": self.config.depth(k)}]],
            dtype=self.providers[0].dtype,
            tokenizers=[tokenizers[j] for j in pair],
            **options,
        )
        return _assemble(whole.to(self.providers[0].device), 1)


class Batch:
    """Token ids (batch, tokens) with their mask and positions; `texts` where the rows come from strings."""

    def __init__(self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor | None):
        self.input_ids, self.attention_mask = input_ids, attention_mask
        self.position_ids = derive_positions(input_ids, attention_mask, None, 0)
        self.texts: list[str] | None = None
        self.own: dict[int, OwnTokens] = {}  # by component: the same texts in its own tokenization

    @classmethod
    def of(cls, rows: Sequence, masks: Sequence, device: torch.device) -> "Batch":
        """Rows of ids of any lengths, with their masks (None: all ones), padded on the right where they differ."""
        longest = max(len(row) for row in rows)
        if all(len(row) == longest for row in rows) and all(mask is None or bool(mask.all()) for mask in masks):
            return cls(torch.stack(list(rows)).to(device), None)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, (row, own) in enumerate(zip(rows, masks)):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1 if own is None else own
        return cls(ids.to(device), mask.to(device))

    def tokens(self, states: torch.Tensor, aligned_with: int | None = None) -> torch.Tensor:
        """The states of unmasked tokens, (tokens, d); of those that component `aligned_with` has matched only."""
        kept = None if self.attention_mask is None else self.attention_mask.bool()
        if aligned_with is not None:
            matched = self.own[aligned_with].matched
            kept = matched if kept is None else kept & matched
        return states.reshape(-1, states.shape[-1]) if kept is None else states[kept]


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
        candidates = [owner_of(view, name)[0]._modules.get(tail) for view in ends]
        real = [module for module in candidates if module is not None]
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
