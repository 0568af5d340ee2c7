"""Make a supernet or a discrete hybrid out of pretrained components."""

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from ..configuration_manticore import ManticoreConfig
from ..mixing_manticore import Mixture, Projector
from .partial import ComponentPart
from .sources import LOADING_OPTIONS, ComponentSource, component_sources
from .transplant import VocabularyPlan, plan_vocabulary, vocabulary_tensors
from .vocabulary import Transplant


logger = logging.get_logger(__name__)


def from_components(
    cls: type[PreTrainedModel],
    components: list,
    num_blocks: int | None = None,
    blocks: list | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    tokenizer_from: int = 0,
    tokenizers: list | None = None,
    pad_to_multiple_of: int | None = None,
    attn_implementation: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """
    Cut pretrained components into blocks and join them.

    Args:
        components: repository names, local folders (safetensors only) or models in memory (which are copied, not
            changed).
        num_blocks: cut every component evenly into so many blocks, side by side in a supernet; with `skip_paths=True`
            every block but the first and the last has a skip path too.
        blocks: or the explicit architecture, as in `ManticoreConfig`.
        dtype: of the hybrid; "auto" is the widest among the components.
        tokenizer_from: the component whose tokenizer, special tokens and generation settings the hybrid has. The
            embedding and head rows of components with another vocabulary are transplanted; `transplant_report` of the
            hybrid says how many were copied or averaged.
        tokenizers: for components without one (models in memory): a list with a tokenizer, name, folder or None each.
        pad_to_multiple_of: pad the vocabulary to a multiple of this; padding has the lowest logits there are, so that
            its probability is 0.
        attn_implementation: as in transformers, for the components that have attention.
        **options: `revision`, `subfolder`, `variant`, `token`, `cache_dir`, `local_files_only`, `trust_remote_code`
            (one value, or a list with one per component); anything else goes to `ManticoreConfig`.

    Returns:
        A hybrid on the CPU in evaluation mode, with fresh projectors and uniform mixture weights. Every path owns its
        layers.

    Raises:
        ValueError: names what is wrong; nothing is loaded by then, except where the weights are at fault.
    """
    if (num_blocks is None) == (blocks is None):
        raise ValueError("num_blocks, blocks: give exactly one of the two.")
    loading = {key: options.pop(key) for key in LOADING_OPTIONS if key in options}
    if options.get("skip_paths") and blocks is not None:
        raise ValueError("skip_paths: got True with blocks, allowed is False: list {'component': None} in blocks.")
    unknown = set(options) - {"skip_paths"} - set(ManticoreConfig.__dataclass_fields__)
    if unknown:
        raise ValueError(f"{sorted(unknown)[0]}: unknown option of from_components.")
    sources = component_sources(components, loading)
    plan = plan_vocabulary(sources, tokenizer_from, tokenizers, pad_to_multiple_of)
    config = _configuration(sources, plan, num_blocks, blocks, tokenizer_from, options)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    dtype = _common_dtype(sources) if dtype == "auto" else _dtype(dtype)
    owned = [source.model is None for source in sources]
    model = assemble(cls, config, dtype, lambda k, part: sources[k].load(dtype, part), owned, plan.transplants)
    if model.can_generate():
        given = plan.generation_config(sources[tokenizer_from].generation_config())
        model.generation_config = _without_refused(given, model._is_stateful)
    model.transplant_report = plan.report
    return model


def _without_refused(settings: GenerationConfig, is_stateful: bool) -> GenerationConfig:
    """A component's settings without caches and assistants that hybrids refuse, so that `generate` needs no others."""
    refused = ["prompt_lookup_num_tokens", "assistant_early_exit"] if is_stateful else []
    refused += ["cache_implementation"] if settings.cache_implementation not in (None, "dynamic") else []
    for name in refused:
        if getattr(settings, name) is not None:
            logger.warning(f"generation_config: {name}={getattr(settings, name)!r} is left out, hybrids refuse it.")
            setattr(settings, name, None)
    return settings


def assemble(
    cls: type[PreTrainedModel],
    config: ManticoreConfig,
    dtype: torch.dtype,
    load: Callable[[int, ComponentPart], PreTrainedModel],
    owned: list[bool],
    transplants: dict[int, Transplant],
) -> PreTrainedModel:
    """
    Build the hybrid on meta and fill it with one component after the other. From disk only what the hybrid uses is
    read, so that memory holds the hybrid; where the dtype stays, its tensors are the files mapped into memory.

    Args:
        load: component index and the part of it that is used -> the component.
        owned: whether a component's tensors may be moved instead of copied.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = cls(config)
    finally:
        torch.set_default_dtype(default)
    for k in config.used_components:
        component = load(k, ComponentPart.of(config, k, heads=hasattr(model, "heads")))
        fill_from_component(model, k, component, owned[k], transplants.get(k))
        del component
    initialise_joints(model)
    model.tie_weights()
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise ValueError(f"components: they have no values for {left[:5]}.")
    return model.eval()


@torch.no_grad()
def fill_from_component(
    model: PreTrainedModel, k: int, component: PreTrainedModel, move: bool, transplant: Transplant | None = None
) -> None:
    """
    Give the views of component k their tensors: moved at the first use if `move`, copied else; those with one row per
    token through `transplant`.
    """
    base = getattr(component, component.base_model_prefix)
    taken = set()
    kept_dtypes = model._get_dtype_plan(model.dtype)  # what the families keep in float32, as when loading
    trunk, config = model.trunk, model.config
    pairs = [(trunk.stems[str(k)], base)] if str(k) in trunk.stems else []
    for block, paths in zip(trunk.blocks, config.blocks):
        pairs += [(path.slice, base) for path, spec in zip(block.paths, paths) if spec["component"] == k]
    if str(k) in getattr(model, "heads", {}):
        pairs.append((model.heads[str(k)], component))
    for view, source in pairs:
        tensors = dict(source.named_parameters(remove_duplicate=False)) | dict(
            source.named_buffers(remove_duplicate=False)
        )
        by_token = vocabulary_tensors(view) if transplant is not None else ()
        for name, old in [*view.named_parameters(), *view.named_buffers()]:
            kept = [dtype for rule, dtype in kept_dtypes.items() if re.search(rf"(^|\.){rule}(\.|$)", name)]
            value = tensors[name].detach()
            if name in by_token:
                value = transplant.rows(value, len(old))
            if value.shape != old.shape:
                raise ValueError(
                    f"components[{k}]: its {name} has the shape {tuple(value.shape)}, allowed is {tuple(old.shape)}: "
                    "it depends on the vocabulary in a way that cannot be transplanted."
                )
            value = value.to(kept[0] if kept else old.dtype)
            fresh = move and value.data_ptr() not in taken
            taken.add(value.data_ptr())
            set_tensor(view, name, value if fresh and value is not tensors[name] else value.clone(), old)


def set_tensor(module: nn.Module, name: str, value: torch.Tensor, old: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    if isinstance(old, nn.Parameter):
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=old.requires_grad)
    else:
        owner._buffers[leaf] = value


def initialise_joints(model: PreTrainedModel) -> None:
    """Materialise and initialise projectors, mixtures and everything else that comes from no component."""
    for module in model.modules():
        if isinstance(module, (Projector, Mixture)) or (
            isinstance(module, nn.Linear) and module.weight.is_meta and not _inside_component(model, module)
        ):
            module.to_empty(device="cpu")
            with torch.no_grad():
                model._init_weights(module)


def _inside_component(model: PreTrainedModel, module: nn.Module) -> bool:
    return any(
        module is child
        for view in model.modules()
        if isinstance(view, PreTrainedModel) and view is not model and view is not model.trunk
        for child in view.modules()
    )


def _configuration(
    sources: list[ComponentSource], plan: VocabularyPlan, num_blocks, blocks, tokenizer_from, options
) -> ManticoreConfig:
    configs = []
    for source in sources:
        config = copy.deepcopy(source.config)
        config.source, config.revision = source.name, source.revision
        plan.apply(source.index, config)
        configs.append(config)
    options["tokenizer_from"] = tokenizer_from
    skip_paths = options.pop("skip_paths", False)
    if num_blocks is not None:
        return ManticoreConfig.from_partition(configs, num_blocks, skip_paths, **options)
    return ManticoreConfig(components=configs, blocks=blocks, **options)


def _common_dtype(sources: list[ComponentSource]) -> torch.dtype:
    dtype = sources[0].dtype
    for source in sources[1:]:
        dtype = torch.promote_types(dtype, source.dtype)
    if any(source.dtype != dtype for source in sources):
        logger.warning(f"dtype='auto': the hybrid is {dtype}, the widest of {[str(s.dtype) for s in sources]}.")
    return dtype


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype: got {dtype!r}, allowed are 'auto' and floating-point dtypes such as 'bfloat16'.")
    return found
