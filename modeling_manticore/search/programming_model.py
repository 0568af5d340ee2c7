"""A supernet for another vocabulary: the blocks of a given one between fresh token embeddings and LM heads."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from ..building.compose import set_tensor


SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@torch.no_grad()
def with_fresh_ends(
    model: PreTrainedModel, vocab_size: int, *, train_components: bool = False, seed: int = 0
) -> PreTrainedModel:
    """
    A second supernet with the layout, slices, projectors and mixture weights of `model`, and with token embeddings and
    LM heads of its own vocabulary, initialised as each component's family does it. What else a stem or a head has
    (positions, scales, a final norm) is the model's. `model` is not changed: slices that do not train share its
    memory, everything else is a copy.

    Args:
        vocab_size: of the new stems and heads. No token is special there.
        train_components: slices are copies that may train; else they are frozen.
        seed: of the new embeddings and heads.

    Raises:
        ValueError: the model has tensors that its configuration does not explain (adapters), weights elsewhere than on
            one device, or tensors of the vocabulary's size besides embeddings and heads.
    """
    _check_plain(model)
    config = copy.deepcopy(model.config)
    config.vocab_size, config.use_cache = vocab_size, False
    for part in (config, *config.components):
        for name in SPECIAL_TOKENS:
            setattr(part, name, None)
    default = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        with torch.device("meta"):
            fresh = type(model)(config)
    finally:
        torch.set_default_dtype(default)
    given = _tensors(model)
    unknown = sorted(set(given) ^ set(_tensors(fresh)))
    if unknown:
        raise ValueError(
            f"model: got a hybrid with {unknown[0]!r}, which is not as its configuration says; allowed is one without "
            "adapters or other changes."
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        new = {id(tensor) for view, module in _ends(fresh) for tensor in _initialised(view, module, model.device)}
    slices = {id(p) for block in fresh.trunk.blocks for i in block.real for p in block.paths[i].slice.parameters()}
    for name, old in _tensors(fresh).items():
        if id(old) in new:
            continue
        value = given[name].detach()
        if value.shape != old.shape:
            raise ValueError(
                f"model: {name} depends on the vocabulary and is neither an embedding nor an LM head; a hybrid with "
                "such a component cannot be programmed."
            )
        frozen = id(old) in slices and not train_components
        set_tensor(fresh, name, value if frozen else value.clone(), old)
        if isinstance(old, nn.Parameter):
            fresh.get_parameter(name).requires_grad_(given[name].requires_grad and not frozen)
    fresh.tie_weights()
    return fresh.eval()


def _check_plain(model: PreTrainedModel) -> None:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        raise ValueError(
            f"model: got weights on {', '.join(sorted(map(str, devices)))}, allowed is a hybrid on one device, not "
            "offloaded."
        )


def _ends(model: PreTrainedModel) -> list[tuple[PreTrainedModel, nn.Module]]:
    """Every embedding and LM head, with the view of the component that it is in."""
    embeddings = [(stem, stem.get_input_embeddings()) for stem in model.trunk.stems.values()]
    return embeddings + [(head, head.get_output_embeddings()) for head in model.heads.values()]


def _initialised(view: PreTrainedModel, module: nn.Module, device: torch.device) -> list[torch.Tensor]:
    """The module's tensors, on the device, with the values that the view's family gives them."""
    for name, old in _tensors(module).items():
        set_tensor(module, name, torch.empty_like(old, device=device), old)
    view._init_weights(module)
    return list(_tensors(module).values())


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
