"""Views of a component that run only part of it, through the component's own code.

A slice is the component's base model in which every layer outside [start, stop) is a pass-through stub, the embedding
is gone, and what belongs before the first or after the last layer is neutral. Families differ in tables only;
`layer_arity` proves for each that the view without layers is the identity.
"""

import copy
import functools
import inspect
from collections import Counter, OrderedDict
from collections.abc import Sequence

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from .cache_manticore import CACHE, PADDING_LEAKS, STATE_ON_MODULES, SliceCache, correct_layer, lent_states
from .configuration_manticore import ManticoreConfig
from .hollow_manticore import on_meta
from .scan_manticore import use_own_scan
from .sharing_manticore import Absent, PassThrough, SliceLayers, Tables, Zero, pass_on, same, share_tables, sharing


FINAL_NORMS = ("norm", "final_norm", "ln_f", "norm_f", "final_layer_norm", "final_layernorm", "embedding_norm")
AFTER_LAST = ("project_out",)
BEFORE_FIRST = ("project_in", "word_embeddings_layernorm", "drop", "emb_dropout")
LEARNED_POSITIONS = ("wpe", "embed_positions")
UNIT_FACTORS = ("normalizer", "embedding_multiplier")  # buffers or numbers that scale the embeddings

# Families that take the mask of the tokens they are given, and none for a single one.
MASK_OF_PRESENT_TOKENS = ("mamba", "mamba2", "falcon_mamba")

# Families whose recurrence restarts from zero when several tokens meet a filled cache: fed one token at a time there.
ONE_TOKEN_AT_A_TIME = ("mamba", "falcon_mamba", "jamba", "recurrent_gemma")


class ComponentBlueprint:
    """
    A component on the meta device, taken apart: what views are made of. No memory is spent on weights here.

    Args:
        config: the component's configuration (shared by all its views).
        attn_implementation, experts_implementation: as requested of the hybrid, or None for the family's defaults.
        uses: how many views will have each layer; the last gets the layer itself, and no view has others. None: every
            view gets copies.
        views: how many stems, slices and heads there will be; the last gets what is left of the component itself.

    Raises:
        ValueError: the family has no list of layers, or its empty view is not the identity.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        attn_implementation: str | None = None,
        experts_implementation: str | None = None,
        uses: Counter | None = None,
        views: int | None = None,
    ):
        self.config, self.uses, self.views = config, uses, None
        causal_class = _model_class(MODEL_FOR_CAUSAL_LM_MAPPING, config)
        if attn_implementation not in (None, "sdpa"):
            config._attn_implementation = attn_implementation
        if config._attn_implementation is not None:
            config._attn_implementation = attention_for(causal_class, config._attn_implementation)
        if config._experts_implementation is None and causal_class._can_set_experts_implementation():
            config._experts_implementation = experts_implementation
        base_class = _model_class(MODEL_MAPPING, config) if type(config) in MODEL_MAPPING else None
        self.causal = on_meta(
            causal_class, base_class, config, None if base_class is None or uses is None else {*uses}
        )
        self.prefix = causal_class.base_model_prefix
        base = getattr(self.causal, self.prefix, None)
        if base_class is None or type(base) is not base_class:
            raise ValueError(f"{config.model_type}: its causal language model is not built on its base model.")
        _parameters(type(base))  # before any torch.compile, which would see the table change
        self.layers_name = find_layers(base, config)
        owner, leaf = owner_of(base, self.layers_name)
        self.layers = owner._modules[leaf]
        owner._modules[leaf] = nn.ModuleList()
        if getattr(config, "layer_arity", None) is None:
            config.layer_arity = self._find_arity()
            config.projects_out = any(owner._modules.get(name) is not None for name in AFTER_LAST)
        self.views = views  # those that were made to find out do not count

    def view(self, start: int, stop: int, stem: bool = False, tail: bool = False) -> PreTrainedModel:
        """The base model with layers [start, stop) only, as a meta model of the component's own class."""
        view = self._copy(getattr(self.causal, self.prefix))
        self._fill(view, start, stop, self.config.layer_arity, stem, tail)
        return view

    def head(self, norm: bool) -> PreTrainedModel:
        """
        The causal language model with an empty base: (last hidden states as `inputs_embeds`) -> logits, with whatever
        the family does to its logits. `norm`: whether the final norm still has to run.
        """
        head = self._copy(self.causal)
        depth = self.config.num_hidden_layers
        base = getattr(head, self.prefix)
        self._fill(base, depth, depth, self.config.layer_arity, stem=False, tail=norm)
        if not norm:
            pass_on(base)
        return head

    @property
    def tied_names(self) -> dict[str, str]:
        """{parameter of the head view: parameter of the stem view} of the matrices that the family ties."""
        names = type(self.causal)._tied_weights_keys or {}
        return {target: source.removeprefix(self.prefix + ".") for target, source in names.items()}

    def _copy(self, model: PreTrainedModel) -> PreTrainedModel:
        if self.views is not None:
            self.views -= 1
        if self.views != 0:
            model = copy.deepcopy(model, memo=self._memo(model))
        for module in model.modules():
            module._load_state_dict_pre_hooks.clear()
            if isinstance(module, PreTrainedModel):
                module._tied_weights_keys, module.all_tied_weights_keys = None, {}
        return model

    def _fill(self, base, start, stop, arity, stem, tail) -> None:
        owner, leaf = owner_of(base, self.layers_name)
        owner._modules[leaf] = SliceLayers(
            self._layer(i) if start <= i < stop else PassThrough(layer, arity) for i, layer in enumerate(self.layers)
        )
        kept = list(owner._modules[leaf]._modules.values())[start:stop]
        for layer in kept:
            correct_layer(layer, self.config.model_type)
        use_own_scan(*kept)
        share_tables(owner, owner._modules[leaf])
        if not tail:
            _neutralise(owner, FINAL_NORMS + AFTER_LAST)
        if stem:
            return
        _neutralise(owner, BEFORE_FIRST)
        for name in LEARNED_POSITIONS:
            if owner._modules.get(name) is not None:
                owner._modules[name] = Zero()
        for name in UNIT_FACTORS:
            if owner._buffers.pop(name, None) is not None:
                setattr(owner, name, Absent())
            elif name in vars(owner):
                setattr(owner, name, 1.0)
        embedding = base.get_input_embeddings()
        parent, leaf_name = owner_of(base, next(name for name, module in base.named_modules() if module is embedding))
        parent._modules[leaf_name] = nn.Identity()
        before = self.layers_name.rpartition(".")[0]
        ends = [f"{before}.{name}.".removeprefix(".") for name in FINAL_NORMS + AFTER_LAST]
        allowed = (f"{self.layers_name}.", *ends)
        stray = [name for name, _ in base.named_parameters() if not name.startswith(allowed)]
        if stray:
            raise ValueError(
                f"{self.config.model_type}: cannot be sliced, it has parameters outside its layers: {stray}."
            )

    def _layer(self, index: int) -> nn.Module:
        if self.uses is not None:
            self.uses[index] -= 1
            if self.uses[index] == 0:
                return self.layers[index]
        return copy.deepcopy(self.layers[index], memo=self._memo(self.layers[index]))

    def _memo(self, model: nn.Module) -> dict:
        """For a copy that shares the configuration; and copying the many empty tables of hooks one by one is slow."""
        tables = (table for module in model.modules() for table in vars(module).values())
        empty = {id(table): OrderedDict() for table in tables if type(table) is OrderedDict and not table}
        return empty | {id(self.config): self.config}

    def _find_arity(self) -> int:
        """
        The guard: the view without layers must be the identity on `inputs_embeds`, also in training mode, and run its
        final norm once. Returns what its layers return (0: a tensor, n: an n-tuple).
        """
        problems = []
        with torch.random.fork_rng(devices=[]):
            hidden = torch.randn(2, 3, self.config.hidden_size, device="cpu", dtype=torch.float32)
            for arity in (0, 1, 2, 3):
                view = self._empty_view(arity, tail=False)
                try:
                    output, _ = _run_empty(view, self.layers_name, hidden)
                except (TypeError, AttributeError, IndexError, KeyError, ValueError, RuntimeError) as error:
                    problems.append(f"arity {arity}: {type(error).__name__}: {error}")
                    continue
                if isinstance(output, torch.Tensor) and output.shape == hidden.shape and torch.equal(output, hidden):
                    norms = _run_empty(self._empty_view(arity, tail=True), self.layers_name, hidden)[1]
                    if norms > 1:
                        raise ValueError(
                            f"{self.config.model_type}: cannot be sliced, its final norm runs {norms} times, also "
                            "before its first layer."
                        )
                    return arity
                problems.append(f"arity {arity}: it changes its input")
        raise ValueError(
            f"{self.config.model_type}: cannot be sliced, its base model without layers is not the identity "
            f"({'; '.join(problems)[:400]})."
        )

    def _empty_view(self, arity: int, tail: bool) -> PreTrainedModel:
        view = self._copy(getattr(self.causal, self.prefix))
        self._fill(view, 0, 0, arity, stem=False, tail=tail)
        return view


@torch.no_grad()
def _run_empty(view: PreTrainedModel, layers_name: str, hidden: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(output of a view without layers in training mode, number of times that final norms ran)."""
    calls = []
    for name, module in owner_of(view, layers_name)[0]._modules.items():
        if name in FINAL_NORMS and module is not None:
            module.register_forward_hook(lambda *_: calls.append(1))
    with torch.device("cpu"):
        view = view.to_empty(device="cpu").float()
        view.initialize_weights()
        positions = torch.arange(3, device="cpu").expand(2, 3)
        mask = torch.ones_like(positions)
        output = run_view(view.train(), inputs_embeds=hidden, attention_mask=mask, position_ids=positions)
    return output, len(calls)


_ACCEPTED: dict[type, frozenset] = {}


def _parameters(model_class: type) -> frozenset:
    if model_class not in _ACCEPTED:
        _ACCEPTED[model_class] = frozenset(inspect.signature(model_class.forward).parameters)
    return _ACCEPTED[model_class]


def run_view(
    view: PreTrainedModel,
    *,
    input_ids: torch.LongTensor | None = None,
    inputs_embeds: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.LongTensor | None = None,
    cache: SliceCache | None = None,
    router_logits: list | None = None,
    tables: Tables | None = None,
    lent: Sequence = (),
) -> torch.Tensor:
    """
    Run a stem or a slice: tokens (batch, tokens) or hidden states (batch, tokens, d_k) -> hidden states
    (batch, tokens, d_k). `attention_mask` is the two-dimensional padding mask of all tokens seen so far. What the
    routers of a mixture of experts say, (batch * tokens, experts) a layer, is added to `router_logits` if given. Masks
    and rotary tables come from `tables`, or go there, if given. `lent` layers of other views (`SliceLayers.to_lend`)
    run in place of stubs.
    """
    with sharing(tables, lent):
        return _run_view(view, input_ids, inputs_embeds, attention_mask, position_ids, cache, router_logits)


def _run_view(view, input_ids, inputs_embeds, attention_mask, position_ids, cache, router_logits):
    family = type(view.config).model_type
    tokens = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
    if cache is not None and tokens > 1 and cache.get_seq_length() and family in ONE_TOKEN_AT_A_TIME:
        return _run_token_by_token(view, inputs_embeds, attention_mask, position_ids, cache, router_logits)
    if family in PADDING_LEAKS and attention_mask is not None:  # whatever positions a caller gives to padding
        position_ids = position_ids * attention_mask[:, -tokens:].bool()
    accepted = _parameters(type(view))
    arguments = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
    if "position_ids" in accepted:
        arguments["position_ids"] = position_ids
    if family in MASK_OF_PRESENT_TOKENS and attention_mask is not None:
        attention_mask = attention_mask[:, -tokens:] if tokens > 1 else None
    arguments["attention_mask"] = attention_mask
    arguments["use_cache"] = cache is not None
    if cache is not None:
        arguments[next(name for name in (CACHE, "cache_params", "past_key_values") if name in accepted)] = cache
    if router_logits is not None:
        arguments["output_router_logits"] = True
        output = view(**arguments)
        router_logits.extend(output.router_logits)
        return output[0]
    if family in STATE_ON_MODULES:
        with lent_states(view.get_submodule(find_layers(view, view.config)), family, cache):
            return view(**arguments)[0]
    return view(**arguments)[0]


def run_head(head: PreTrainedModel, hidden_states: torch.Tensor, tables: Tables | None = None) -> torch.Tensor:
    """Logits (batch, tokens, vocabulary) of last hidden states (batch, tokens, d_k); the lowest for padded ids."""
    options = {"output_router_logits": False} if "output_router_logits" in _parameters(type(head)) else {}
    with sharing(tables):
        logits, size = head(inputs_embeds=hidden_states, use_cache=False, **options).logits, head.config.vocab_size
    known = getattr(head.config, "padded_from", None) or size
    lowest = torch.finfo(logits.dtype).min  # with -inf the gradient of mixture weights would be NaN
    return logits if known == size else nn.functional.pad(logits[..., :known], (0, size - known), value=lowest)


def _run_token_by_token(view, inputs_embeds, attention_mask, position_ids, cache, router_logits):
    steps, tokens = [], inputs_embeds.shape[1]
    for t in range(tokens):
        cache.ahead, now = t, slice(t, t + 1)
        steps.append(
            _run_view(
                view,
                None,
                inputs_embeds[:, now],
                None if attention_mask is None else attention_mask[:, : t + 1 - tokens or None],
                position_ids[:, now],
                cache,
                router_logits,
            )
        )
    cache.ahead = 0
    return torch.cat(steps, dim=1)


def attention_for(model_class: type[PreTrainedModel], requested: str) -> str:
    """What to ask of a family: "sdpa" only where it has it, as by default; nothing where there is no attention."""
    kinds = (model_class._supports_sdpa, model_class._supports_flash_attn, model_class._supports_flex_attn)
    return requested if kinds[0] or (any(kinds) and requested != "sdpa") else "eager"


def position_limit(stem: PreTrainedModel) -> int | None:
    """Number of learned positions of a stem, None where the family has none."""
    has_learned = any(name.rpartition(".")[2] in LEARNED_POSITIONS for name, _ in stem.named_modules())
    return stem.config.max_position_embeddings if has_learned else None


def component_blueprints(config: ManticoreConfig) -> list[ComponentBlueprint | None]:
    """One blueprint per component, None for components that no path uses."""
    if not config.blocks:
        raise ValueError("blocks: got an empty configuration; a hybrid needs components and blocks.")
    uses, views = {k: Counter() for k in config.used_components}, Counter(config.stem_components)
    views.update(config.head_components)
    for path in (path for block in config.blocks for path in block if path["component"] is not None):
        uses[path["component"]].update(range(path["start"], path["stop"]))
        views[path["component"]] += 1
    requested = config._attn_implementation, config._experts_implementation
    return [
        ComponentBlueprint(component, *requested, uses[k], views[k]) if k in uses else None
        for k, component in enumerate(config.components)
    ]


class OutsideLoops:
    """What other libraries, or their loops, do to a model and would silently get wrong for a hybrid."""

    keep_forward = False  # True: a `forward` that would be refused is ignored; for callers that do without it

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As in torch. Names on disk are understood too: some are those of a family's first release."""
        own = self.state_dict()
        if not state_dict.keys() <= own.keys():
            dtype = functools.reduce(torch.promote_types, {t.dtype for t in own.values() if t.is_floating_point()})
            options = {"state_dict": dict(state_dict), "dtype": dtype, "output_loading_info": True}
            loaded, info = type(self).from_pretrained(None, config=self.config, **options)
            found = {n: t.to(own[n].dtype) for n, t in loaded.state_dict().items() if n not in info["missing_keys"]}
            state_dict = found | {name: state_dict[name] for name in info["unexpected_keys"]}
        return super().load_state_dict(state_dict, strict, assign)

    def __setattr__(self, name, value):
        fused = name == "forward" and "fused_lm_head" in getattr(getattr(value, "__code__", None), "co_varnames", ())
        if fused and not self.keep_forward and not self.logits_are_one_product():
            raise ValueError(
                "forward: got one with `fused_lm_head`: logits as last hidden state times a matrix; this hybrid's are "
                "more. Allowed is the model's own forward; in place of TRL's loop: modeling_manticore.search.sft."
            )
        if not (fused and self.keep_forward):
            super().__setattr__(name, value)

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False) -> None:
        """As in transformers, for every component with attention; families without "sdpa" stay eager under it."""
        if isinstance(attn_implementation, dict):
            attn_implementation = attn_implementation.get("", self.config._attn_implementation)
        chosen = self._check_and_adjust_attn_implementation(attn_implementation, False, allow_all_kernels)
        views = [m for m in self.modules() if isinstance(m, PreTrainedModel) and m.config is not self.config]
        wanted = [(view, attention_for(type(view), chosen)) for view in views]
        for view, implementation in wanted:
            view.get_correct_attn_implementation(implementation)
        self.config._attn_implementation_internal = chosen
        for view, implementation in wanted:
            view.set_attn_implementation(implementation, allow_all_kernels)

    @torch.no_grad()
    def logits_are_one_product(self) -> bool:
        """Whether logits = last hidden state @ `get_output_embeddings().weight`.T + bias. Found out by trying."""
        (head, *others), matrix = self.heads.values(), self.get_output_embeddings()
        if others or len(self.head_projectors) or matrix.weight.shape[1] != self.config.hidden_size:
            return False
        state = torch.linspace(-50, 100, 4 * self.config.hidden_size).view(1, 4, -1).to(matrix.weight)
        product = nn.functional.linear(state, matrix.weight, matrix.bias)
        return torch.allclose(run_head(head, state), product, rtol=1e-3)


def materialise(*modules: nn.Module) -> None:
    """Give views, which are built on meta, memory on the device that the model is being built on."""
    device = torch.get_default_device()
    if device.type != "meta":
        for module in modules:
            for view in [
                child for child in module.modules() if isinstance(child, PreTrainedModel) and child is not module
            ]:
                if any(tensor.is_meta for tensor in [*view.parameters(), *view.buffers()]):
                    view.to_empty(device=device)
                    initialise_buffers(view)


@torch.no_grad()
def initialise_buffers(view: PreTrainedModel) -> None:
    """Compute the buffers of a view (rotary frequencies, multipliers) as its family does; parameters stay."""
    parameters = list(view.parameters())
    for parameter in parameters:
        parameter._is_hf_initialized = True
    with init.guard_torch_init_functions():
        for module in view.modules():
            view._init_weights(module)
    for parameter in parameters:
        del parameter._is_hf_initialized


def collect_dtype_rules(model: PreTrainedModel, blueprints: list) -> None:
    """Dtype rules of the families, which transformers looks for in direct children only."""
    for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        found = {rule for b in blueprints if b is not None for rule in getattr(b.causal, name) or ()}
        setattr(model, name, set(getattr(model, name) or ()) | found)


def _neutralise(owner: nn.Module, names: tuple) -> None:
    """Put a plain function in the place of modules: calling an `nn.Identity` costs ten times as much."""
    for name in names:
        if owner._modules.get(name) is not None:
            del owner._modules[name]
            owner.__dict__[name] = same


def _model_class(mapping, config: PreTrainedConfig) -> type:
    found = mapping[type(config)]
    return found[0] if isinstance(found, (tuple, list)) else found


def find_layers(base: PreTrainedModel, config: PreTrainedConfig) -> str:
    for name, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return name
    raise ValueError(f"{config.model_type}: cannot be sliced, it has no list of {config.num_hidden_layers} layers.")


def owner_of(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, leaf = path.rpartition(".")
    return (root.get_submodule(parent) if parent else root), leaf


__all__ = ["ComponentBlueprint"]
