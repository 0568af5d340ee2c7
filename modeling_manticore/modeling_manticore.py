"""The models: a trunk of blocks (`ManticoreModel`), and the heads that make it a language model or a classifier."""

import os

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging

from .cache_manticore import CACHE, ManticoreCache, describe
from .configuration_manticore import AUTO_MAP, ManticoreConfig, OwnGenerationConfig
from .forward_manticore import (
    ManticoreModelOutput,
    TrunkOutput,
    balanced_components,
    boundaries_wanted,
    chains,
    check_inputs,
    check_order,
    check_positions,
    check_rope,
    check_shapes,
    component_weights,
    derive_positions,
    is_recurrent,
    rope_limits,
    router_collectors,
    router_losses,
    takes_cache,
    walks,
    weighted_sum,
)
from .mixing_manticore import Boundary, ManticoreBlock, Mixture, Projector, junctions, stream_of
from .saving_manticore import staged
from .sharing_manticore import all_are_watched, new_tables
from .slicing_manticore import (
    ComponentBlueprint,
    OutsideLoops,
    collect_dtype_rules,
    component_blueprints,
    materialise,
    position_limit,
    run_head,
    run_view,
)


logger = logging.get_logger(__name__)


class ManticorePreTrainedModel(OutsideLoops, PreTrainedModel):
    """Base of all hybrids: initialisation, saving, mixture weights, description."""

    config_class = ManticoreConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ManticoreBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    # What a component lacks is refused or left out for that component.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_set_experts_implementation_cached_value = True
    generation_config_class = OwnGenerationConfig

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: all initialisation here goes through transformers' own functions, which know what was loaded."""
        return False

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Projector):
            module.initialise(self.config.projector_init)
        elif isinstance(module, Mixture):
            module.initialise()
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)

    @property
    def trunk(self) -> "ManticoreModel":
        """The `ManticoreModel` of this model."""
        return self if isinstance(self, ManticoreModel) else self.model

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of the first stem."""
        return next(iter(self.trunk.stems.values())).get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding of the first stem."""
        next(iter(self.trunk.stems.values())).set_input_embeddings(value)

    @property
    def vocab_size(self) -> int:
        """Size of the one vocabulary."""
        return self.config.vocab_size

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """As in transformers, for every stem and every head. Returns the first stem's embedding."""
        if new_num_tokens is None and pad_to_multiple_of is None:
            return self.get_input_embeddings()
        for stem in self.trunk.stems.values():
            old = stem.get_input_embeddings()
            new = self._get_resized_embeddings(old, new_num_tokens, pad_to_multiple_of, mean_resizing)
            stem.set_input_embeddings(new.requires_grad_(old.weight.requires_grad))
        size = self.get_input_embeddings().weight.shape[0]
        for head in getattr(self, "heads", {}).values():
            old = head.get_output_embeddings()
            new = self._get_resized_lm_head(old, size, mean_resizing=mean_resizing)
            head.set_output_embeddings(new.requires_grad_(old.weight.requires_grad))
        self.config.vocab_size = size
        self.tie_weights()
        return self.get_input_embeddings()

    def mixture_weights(self) -> list[torch.Tensor]:
        """Copies of every block's mixture weights, without gradient: B float32 points of the simplex, (paths,)."""
        return [block.mixture_weights().detach().clone() for block in self.trunk.blocks]

    @torch.no_grad()
    def set_mixture_weights(self, weights: list) -> None:
        """
        Set every block's mixture weights: B lists or tensors, each non-negative with sum 1 (a block of one path: [1]).

        Raises:
            ValueError: names the block, what was given and what is allowed. Nothing is changed then.
        """
        blocks = self.trunk.blocks
        if len(weights) != len(blocks):
            raise ValueError(f"weights: got {len(weights)} blocks, allowed is {len(blocks)}.")
        points = []
        for b, (point, block) in enumerate(zip(weights, blocks)):
            point = torch.as_tensor(point, dtype=torch.float32)
            if point.shape != (len(block.paths),):
                raise ValueError(f"weights[{b}]: got shape {tuple(point.shape)}, allowed is ({len(block.paths)},).")
            if not torch.isfinite(point).all() or (point < 0).any() or abs(point.sum().item() - 1) > 1e-4:
                raise ValueError(f"weights[{b}]: got {point.tolist()}, allowed are numbers >= 0 with sum 1.")
            if b in (0, len(blocks) - 1) and not point[block.real].any():
                raise ValueError(f"weights[{b}]: got all on a skip path; the stems and heads need some of it.")
            points.append(point / point.sum())
        for point, block in zip(points, blocks):
            if block.mixture is not None:
                block.mixture.set(point)

    def describe(self) -> str:
        """A printable account: slices, bridges, parameters, key-value bytes per token, context."""
        joints = [joint.name for joint in junctions(self.config)]
        return describe(self.config, joints, sum(p.numel() for p in self.parameters()), self.dtype.itemsize)

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs) -> None:
        """
        As in transformers, but never half-written: everything is written to a hidden folder first and then moved,
        weights before the configuration. Foreign files stay, stale shards go.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"save_directory: got the file {save_directory}, allowed is a folder.")
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", os.path.basename(os.path.abspath(save_directory)))
        self.config.auto_map = dict(AUTO_MAP)
        if type(self).__module__.startswith("torch."):  # FSDP's subclass: transformers would save its code and name
            type(self).__module__, type(self).__name__ = __name__, type(self).__name__.removeprefix("FSDP")
        state = kwargs.pop("state_dict", None)
        kwargs["state_dict"] = dict(sorted((self.state_dict() if state is None else state).items()))
        with staged(save_directory, keep=is_main_process) as folder:
            super().save_pretrained(folder, is_main_process=is_main_process, **kwargs)


class ManticoreModel(ManticorePreTrainedModel):
    """Stems and blocks. Its last hidden state is the stream after the last block, (batch, tokens, D)."""

    def __init__(self, config: ManticoreConfig, blueprints: list[ComponentBlueprint] | None = None):
        super().__init__(config)
        blueprints = component_blueprints(config) if blueprints is None else blueprints
        plan = junctions(config)
        out_projectors = plan[0].out_projectors()
        self.stems, self.stem_projectors = nn.ModuleDict(), nn.ModuleDict()
        for k, projector in zip(config.stem_components, out_projectors):
            self.stems[str(k)] = blueprints[k].view(0, 0, stem=True)
            if projector is not None:
                self.stem_projectors[str(k)] = projector
        self.blocks = nn.ModuleList(
            ManticoreBlock(config, b, plan[b], plan[b + 1], blueprints) for b in range(len(config.blocks))
        )
        self._no_split_modules = ["ManticoreBlock"] + ["Mixture"] * (not config.is_discretized)  # FSDP reads this
        self._position_limits = {k: position_limit(self.stems[str(k)]) for k in config.stem_components}
        self._rope_limits, self._balanced = rope_limits(config), balanced_components(config)
        self._chains = chains(self.blocks)
        self.is_recurrent = is_recurrent(config)
        self.gradient_checkpointing = False
        materialise(self)
        collect_dtype_rules(self, blueprints)
        self.post_init()

    @can_return_tuple
    @takes_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: ManticoreCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
        return_boundary: bool = False,
        **kwargs,
    ) -> ManticoreModelOutput | TrunkOutput:
        """
        Args:
            input_ids: (batch, tokens). attention_mask: (batch, tokens seen so far), 1 for tokens and 0 for padding.
            position_ids: (batch, tokens); by default the number of unmasked tokens before each token.
            inputs_embeds: (batch, tokens, d_k) in place of `input_ids`, where the hybrid has one stem.
            output_hidden_states: also return the B + 1 boundaries of the stream, (batch, tokens, D); or given ones.
            output_router_logits: collect the routers of mixtures of experts; by default as each component has it.
            return_boundary: return a `TrunkOutput`, what heads need in place of the stream.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`; a foreign cache; attentions asked for;
                positions beyond the learned ones.
        """
        check_inputs(len(self.stems), input_ids, inputs_embeds, attention_mask, past_key_values, output_attentions)
        given = input_ids if inputs_embeds is None else inputs_embeds
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.modules()):
            logger.warning_once("`use_cache=True` is incompatible with gradient checkpointing: no cache is used.")
            use_cache, past_key_values = False, None
        if use_cache and past_key_values is None:
            past_key_values = ManticoreCache(self.config)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        check_shapes(given, attention_mask, position_ids, seen)
        tokens = given.shape[1]
        check_rope(self.config, self._rope_limits, tokens, seen)
        if self.is_recurrent:
            check_order(attention_mask, position_ids, tokens, seen)
        position_ids = derive_positions(given, attention_mask, position_ids, seen)
        check_positions(self.config, self._position_limits, position_ids, seen)

        weights, wanted = self._block_weights(), boundaries_wanted(output_hidden_states, len(self.blocks) + 1)
        routers = router_collectors(self.config, self._balanced, output_router_logits)
        tables = new_tables()
        given = input_ids, inputs_embeds, attention_mask, position_ids
        boundary = self.run_stems(*given, weights[0], wanted[0], tables)
        streams = [self._stream(boundary) if wanted[0] else None]
        together = tables is not None and not (self.training or routers or any(wanted) or all_are_watched())
        blocks = list(self.blocks)
        for *begun, b in walks(blocks, self._chains, ManticoreBlock if together else None):
            need_stream = wanted[b + 1] or (b == len(blocks) - 1 and not return_boundary)
            here = (boundary, weights[b], *given[2:], past_key_values, need_stream)
            boundary = blocks[b](*here, routers=routers, tables=tables, begun=[blocks[i] for i in begun])
            streams.append(self._stream(boundary) if wanted[b + 1] else None)
        if past_key_values is not None:
            past_key_values.advance(tokens)
        aux_loss, router_loss = router_losses(self.config, routers, attention_mask)
        found = {
            CACHE: past_key_values if use_cache else None,
            "hidden_states": tuple(streams) if any(wanted) else None,
            "router_logits": tuple(logits for collected in routers.values() for logits in collected) or None,
            "aux_loss": aux_loss,
            "router_loss": router_loss,
        }
        if return_boundary:
            return TrunkOutput(boundary, weights, *found.values())
        return ManticoreModelOutput(last_hidden_state=self._stream(boundary), **found)

    def _stream(self, boundary: Boundary) -> torch.Tensor:
        """The stream in the model's dtype; some families end in float32 whatever theirs is."""
        return stream_of(boundary).to(self.dtype)

    def run_stems(
        self, input_ids, inputs_embeds, attention_mask, position_ids, first_weights, need_stream, tables=None
    ) -> Boundary:
        """Block 0: the states of all stems, (batch, tokens, d_k) each, and what of the stream is asked for."""
        weights = component_weights(self.config, 0, first_weights)
        states = [
            run_view(
                self.stems[str(k)],
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                tables=tables,
            )
            for k in weights
        ]
        projectors = [self.stem_projectors[str(k)] if str(k) in self.stem_projectors else None for k in weights]
        return self.blocks[0].before.emit(states, list(weights.values()), projectors, need_stream)

    def _block_weights(self) -> list[list]:
        """The weights of this pass, as scalars; computed once, they also gate the projectors around each block."""
        return [[1.0] if block.mixture is None else list(block.mixture().unbind()) for block in self.blocks]


class ManticoreForCausalLM(ManticorePreTrainedModel, GenerationMixin):
    """
    A hybrid with its language-model heads: logits = sum_k a_{B,k} head_k(u_k).

    `from_components` (bound when the package is imported) makes one from pretrained components; the plain constructor
    makes one from scratch.
    """

    def __init__(self, config: ManticoreConfig):
        super().__init__(config)
        blueprints = component_blueprints(config)
        self.model = ManticoreModel(config, blueprints)
        self.junction = self.model.blocks[-1].after
        self.heads, self.head_projectors = nn.ModuleDict(), nn.ModuleDict()
        for k, projector in zip(config.head_components, self.junction.in_projectors()):
            self.heads[str(k)] = blueprints[k].head(norm=config.norm_in_head(k))
            if projector is not None:
                self.head_projectors[str(k)] = projector
        self._tied_weights_keys = {
            f"heads.{k}.{target}": f"model.stems.{k}.{source}"
            for k in config.tied_components
            for target, source in blueprints[k].tied_names.items()
        } or None
        self._is_stateful = any(type(b.paths[p].slice)._is_stateful for b in self.model.blocks for p in b.real)
        materialise(self.heads, self.head_projectors)
        collect_dtype_rules(self, blueprints)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The output matrix of the first head."""
        return next(iter(self.heads.values())).get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output matrix of the first head."""
        next(iter(self.heads.values())).set_output_embeddings(new_embeddings)

    @can_return_tuple
    @takes_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: ManticoreCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """
        Arguments of `ManticoreModel.forward`, and:
            labels: (batch, tokens), shifted inside; -100 is ignored. `num_items_in_batch` scales the loss.
            logits_to_keep: compute logits of the last so many positions only (0: all), or of the given positions.

        Returns:
            logits (batch, kept tokens, vocab_size), loss (with the router loss where router logits are collected),
            cache, and the B + 1 boundaries of the stream if asked for.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_router_logits=output_router_logits,
            return_boundary=True,
        )
        logits = self._logits(outputs.boundary.keep(logits_to_keep), outputs.weights[self.config.head_block])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            loss = loss if outputs.router_loss is None else loss + outputs.router_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=outputs.aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            router_logits=outputs.router_logits,
            **{CACHE: outputs.cache},
        )

    def _logits(self, boundary: Boundary, block_weights: list) -> torch.Tensor:
        weights = component_weights(self.config, self.config.head_block, block_weights)
        gates = list(weights.values())
        projectors = [self.head_projectors[str(k)] if str(k) in self.head_projectors else None for k in weights]
        inputs = self.junction.receive(boundary, projectors, gates, self.training)
        tables = new_tables()
        logits = [
            None if state is None else run_head(self.heads[str(k)], state, tables) for k, state in zip(weights, inputs)
        ]
        return weighted_sum(gates, logits)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if model_kwargs.get(CACHE) is not None or generation_config.use_cache is False:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
            return
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation: got {generation_config.cache_implementation!r}, allowed are None and "
                "'dynamic': a hybrid's cache mixes key-value and recurrent layers."
            )
        model_kwargs[CACHE] = ManticoreCache(self.config)
        if generation_config.is_assistant:
            model_kwargs[CACHE].activate_past_recording()


class ManticoreForSequenceClassification(GenericForSequenceClassification, ManticorePreTrainedModel):
    """A classifier on the last token's stream, (batch, D) -> (batch, num_labels)."""

    def __init__(self, config: ManticoreConfig):
        ManticorePreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = ManticoreModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class ManticoreForTokenClassification(GenericForTokenClassification, ManticorePreTrainedModel):
    """A classifier on every token's stream, (batch, tokens, D) -> (batch, tokens, num_labels)."""

    def __init__(self, config: ManticoreConfig):
        ManticorePreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = ManticoreModel(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.0)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()


__all__ = [
    "ManticoreForCausalLM",
    "ManticoreForSequenceClassification",
    "ManticoreForTokenClassification",
    "ManticoreModel",
    "ManticorePreTrainedModel",
]
