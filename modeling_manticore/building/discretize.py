"""From a supernet to a hybrid with one path per block: select, merge, bridge."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..configuration_manticore import ManticoreConfig
from ..mixing_manticore import Junction, Projector, junctions
from .calibrate import ORDERS, calibrate, in_projectors_of, out_projectors_of
from .compose import set_tensor
from .costs import Budget, cost_table
from .limits import argmax_under
from .sources import refuse_adapters
from .texts import batches_of


logger = logging.get_logger(__name__)


def discretize(
    model: PreTrainedModel,
    choice: str | list[int] = "argmax",
    calibration: Any = None,
    *,
    refit: bool = True,
    tokenizer: Any = None,
    order: str = "sequential",
    batch_size: int = 8,
    progress: bool = True,
    budget: Budget | None = None,
) -> PreTrainedModel:
    """
    Keep one path per block; a block whose skip path is kept goes.

    Consecutive slices of one component that continue each other are merged and need no bridge. Every other junction
    gets one linear bridge: the supernet's own W_in W_out at the corner (`refit=False`, or no calibration text), or
    fitted directly on `calibration` with the supernet's components as targets.

    Args:
        choice: "argmax", or the index of the kept path for every block; of a component in the first and last block.
        calibration: text as for `calibrate`.
        budget: hard limits. "argmax" then maximises the product of mixture weights among the choices within them.

    Returns:
        A new hybrid that owns its tensors; `model` is left as it is. Nothing of the unselected layers, stems and heads
        is in it.

    Raises:
        ValueError: the choice does not fit the blocks or the budget (names the smallest feasible value), or bad
            calibration text, or adapters that are not merged; before anything is built.
    """
    refuse_adapters("model", model)
    config = model.config
    chosen = _choice(model, choice, budget)
    if order not in ORDERS:
        raise ValueError(f"order: got {order!r}, allowed are {', '.join(map(repr, ORDERS))}.")
    if not isinstance(refit, bool):
        raise ValueError(f"refit: got {refit!r}, allowed are True and False.")
    batches_wanted = refit and calibration is not None
    if batches_wanted:
        batches_of(calibration, model, tokenizer, batch_size, field="calibration")
    target, groups = merged(config, chosen)
    if len(target.used_components) == 1 and len(config.used_components) > 1:
        own = config.blocks[0][chosen[0]]["component"]
        logger.warning(
            f"component {own} wins every block: the result is a cut of that component alone. For a hybrid of two or "
            "more, search again with min_components=2 (of `Budget`; --min_components 2), or give the path of every "
            "block as `choice`; `stitch` tells what each choice costs in loss."
        )
    hybrid = _select(model, target, groups, chosen)
    if batches_wanted:
        calibrate(
            hybrid,
            calibration,
            tokenizer,
            order=order,
            batch_size=batch_size,
            progress=progress,
            components=model,
        )
    return hybrid


def component_alone(model: PreTrainedModel, k: int) -> PreTrainedModel | None:
    """
    Component k out of a supernet, whole and without a bridge, as it is there; None where no choice of paths is its
    layers from the first to the last.
    """
    config, chosen, reached = model.config, [], 0
    for block, usable in zip(config.blocks, usable_paths(model)):
        fitting = [p for p in usable if block[p]["component"] == k and block[p]["start"] == reached]
        if not fitting:
            return None
        chosen.append(fitting[0])
        reached = block[fitting[0]]["stop"]
    if reached != config.depth(k):
        return None
    target, groups = merged(config, chosen)
    return _select(model, target, groups, chosen)


def _choice(model: PreTrainedModel, choice: Any, budget: Budget | None) -> list[int]:
    if budget is not None and not isinstance(budget, Budget):
        raise ValueError(f"budget: got {type(budget).__name__}, allowed is a Budget or None.")
    blocks = model.config.blocks
    if isinstance(choice, str):
        if choice != "argmax":
            raise ValueError(f"choice: got {choice!r}, allowed are 'argmax' and one path index per block.")
        if budget is not None:
            return argmax_under(cost_table(model), model.mixture_weights(), budget, usable_paths(model))
        paths = usable_paths(model)
        points = [point.tolist() for point in model.mixture_weights()]
        return [max(own or range(len(point)), key=point.__getitem__) for own, point in zip(paths, points)]
    if not isinstance(choice, (list, tuple)) or len(choice) != len(blocks):
        raise ValueError(
            f"choice: got {choice!r}, allowed are 'argmax' and one path index for each of {len(blocks)} blocks."
        )
    for b, (p, block) in enumerate(zip(choice, blocks)):
        if isinstance(p, bool) or not isinstance(p, int) or not 0 <= p < len(block):
            raise ValueError(f"choice[{b}]: got {p!r}, allowed is 0..{len(block) - 1}.")
        if b in (0, len(blocks) - 1) and block[p]["component"] is None:
            raise ValueError(
                f"choice[{b}]: got the skip path {p}, allowed are {model.config.real_paths(b)}: a hybrid begins and "
                "ends with a component."
            )
    if budget is not None:
        table = cost_table(model)
        costs, own = table.of(choice), table.components_of(choice)
        if len(own) < (budget.min_components or 1):
            raise ValueError(
                f"choice: got {list(choice)} of the components {own} alone, allowed are at least "
                f"{budget.min_components} components (min_components)."
            )
        for kind, limit in budget.limits().items():
            if costs[kind] > limit:
                raise ValueError(f"choice: got {list(choice)} with {costs[kind]} {kind}, allowed are at most {limit}.")
    return list(choice)


def usable_paths(model: PreTrainedModel) -> list[list[int]]:
    """
    Path indices that each block may keep: all, but no skip path in the first and the last block, and in the last those
    of components that have a head.
    """
    paths = [list(range(len(block))) for block in model.config.blocks]
    for end in {0, len(paths) - 1}:
        paths[end] = model.config.real_paths(end)
    if hasattr(model, "heads"):
        last = model.config.blocks[-1]
        paths[-1] = [p for p in paths[-1] if str(last[p]["component"]) in model.heads]
    return paths


def merged(config: ManticoreConfig, chosen: list[int]) -> tuple[ManticoreConfig, list[list[int]]]:
    """The new configuration, and the blocks of the old one that each of its blocks was merged from."""
    paths, groups = [], []
    for b, p in enumerate(chosen):
        path = config.blocks[b][p]
        if path["component"] is None:
            continue
        if paths and paths[-1]["component"] == path["component"] and paths[-1]["stop"] == path["start"]:
            paths[-1]["stop"] = path["stop"]
            groups[-1].append(b)
        else:
            paths.append(dict(path))
            groups.append([b])
    used = sorted({path["component"] for path in paths})
    keep = used if config.tokenizer_from in used else sorted([*used, config.tokenizer_from])
    for path in paths:
        path["component"] = keep.index(path["component"])
    fields = config.to_dict()
    for derived in (
        "num_hidden_layers",
        "max_position_embeddings",
        "tie_word_embeddings",
        "model_type",
        "transformers_version",
    ):
        fields.pop(derived, None)
    fields["components"] = [config.components[k] for k in keep]
    fields["blocks"] = [[path] for path in paths]
    fields["tokenizer_from"] = keep.index(config.tokenizer_from)
    fields["head_mixture"] = "last"
    target = ManticoreConfig(**fields)
    target.kept_components = keep
    return target, groups


@torch.no_grad()
def _select(
    model: PreTrainedModel, target: ManticoreConfig, groups: list[list[int]], chosen: list[int]
) -> PreTrainedModel:
    keep = target.kept_components
    del target.kept_components
    default = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        with torch.device("meta"):
            hybrid = type(model)(target)
    finally:
        torch.set_default_dtype(default)
    trunk = hybrid.trunk
    for key, stem in trunk.stems.items():
        _fill(stem, _pool(model, keep[int(key)]))
    for block, group in zip(trunk.blocks, groups):
        k = keep[target.blocks[block.index][0]["component"]]
        pool = _pool(model, k)
        for b in group:
            pool |= _tensors(model.trunk.blocks[b].paths[chosen[b]].slice)
        _fill(block.paths[0].slice, pool)
    for key, head in getattr(hybrid, "heads", {}).items():
        k = keep[int(key)]
        if str(k) not in model.heads:
            raise ValueError(
                f"choice: component {k} is chosen for the last block, but the supernet has no head of it."
            )
        base = head.base_model_prefix + "."
        pool = {base + name: tensor for name, tensor in _pool(model, k).items()}
        _fill(head, pool | _tensors(model.heads[str(k)]))
    _fill_rest(hybrid, model)
    _compose_bridges(hybrid, model, groups, chosen, keep)
    hybrid.tie_weights()
    if model.can_generate():
        hybrid.generation_config = copy.deepcopy(model.generation_config)
    hybrid.transplant_report = getattr(model, "transplant_report", None)
    return hybrid.to(model.device).eval()


def _pool(model: PreTrainedModel, k: int) -> dict[str, torch.Tensor]:
    """All tensors of component k outside its layers, by their name in the base model, from whichever view has them."""
    trunk, config = model.trunk, model.config
    pool: dict[str, torch.Tensor] = {}
    for block, specs in zip(trunk.blocks, config.blocks):
        for path, spec in zip(block.paths, specs):
            if spec["component"] == k:
                pool |= _tensors(path.slice)
    if str(k) in getattr(model, "heads", {}):
        head = model.heads[str(k)]
        pool |= _tensors(getattr(head, head.base_model_prefix))
    if str(k) in trunk.stems:
        pool |= _tensors(trunk.stems[str(k)])
    return pool


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def _fill(view: nn.Module, pool: dict[str, torch.Tensor]) -> None:
    for name, old in [*view.named_parameters(), *view.named_buffers()]:
        if name not in pool:
            raise ValueError(f"choice: {name} is in no path, stem or head of the supernet.")
        set_tensor(view, name, pool[name].detach().clone(), old)


def _fill_rest(hybrid: PreTrainedModel, model: PreTrainedModel) -> None:
    """Tensors that are of no component, such as a classifier; bridges get their memory here and their values later."""
    own = _tensors(model)
    for name, old in [*hybrid.named_parameters(), *hybrid.named_buffers()]:
        if old.is_meta and name in own and own[name].shape == old.shape:
            set_tensor(hybrid, name, own[name].detach().clone(), old)
    for module in hybrid.modules():
        if isinstance(module, Projector) and any(parameter.is_meta for parameter in module.parameters()):
            module.to_empty(device=model.device)


def _compose_bridges(hybrid, model, groups, chosen, keep) -> None:
    """Every bridge as the supernet's corner has it: W_in W_out of the two chosen paths, inside their gates."""
    plan = junctions(model.config)
    firsts, lasts = [group[0] for group in groups], [group[-1] for group in groups]
    for index, junction in enumerate(junctions(hybrid.config)):
        pair = in_projectors_of(hybrid, index)[0] if in_projectors_of(hybrid, index) else None
        if pair is None:
            continue
        source, target = keep[junction.sources[0].component], keep[junction.targets[0].component]
        if index > 0:
            left = (lasts[index - 1] + 1, model.config.real_paths(lasts[index - 1]).index(chosen[lasts[index - 1]]))
        else:
            left = (0, model.config.stem_components.index(source))
        if index < len(groups):
            right = (firsts[index], model.config.real_paths(firsts[index]).index(chosen[firsts[index]]))
        else:
            right = (len(chosen), model.config.head_components.index(target))
        weight, bias = corner_map(model, plan, left, right)
        pair[1].weight.copy_(weight)
        pair[1].bias.copy_(bias)


def corner_map(model: PreTrainedModel, plan: list[Junction], source: tuple[int, int], target: tuple[int, int]):
    """
    Weight (d_target, d_source) and bias (d_target,), float64, of the map from source to target at the corner where
    both have weight 1, and skip paths between them (equations of design 3 with a = 1).

    Args:
        plan: the junctions of the model.
        source: (junction that it is an own source of, index there). target: (junction before it, index there).
    """
    before, after = plan[source[0]], plan[target[0]]
    out, into = out_projectors_of(model, source[0])[source[1]], in_projectors_of(model, target[0])[target[1]]
    if after.single:
        return into[1].weight.double(), into[1].bias.double()
    d_in, d_out = before.sources[source[1]].width, after.targets[target[1]].width
    shape = {"device": model.device, "dtype": torch.float64}
    out_weight, out_bias = _gated_map(before.gate, out, torch.eye(before.width, d_in, **shape), before.gated[0])
    in_weight, in_bias = _gated_map(after.gate, into, torch.eye(d_out, after.width, **shape), after.gated[1])
    return in_weight @ out_weight, in_weight @ out_bias + in_bias


def _gated_map(gate: str, named, plain: torch.Tensor, gated: bool):
    """(1 - g) W + g P with its bias, P padding or cutting; g = 1 at a corner of "mixture"."""
    if named is None:
        return plain, plain.new_zeros(plain.shape[0])
    projector = named[1]
    weight, bias = projector.weight.double(), projector.bias.double()
    if not gated or gate in ("routed", "none"):
        return weight, bias
    strength = projector.strength() if gate == "learned" else 1.0
    return (1 - strength) * weight + strength * plain, (1 - strength) * bias
