"""
LoRA adapters (PEFT) on a hybrid: which modules they can be put on, and what is trained and saved beside them.

Adapters go on the linear layers of the slices: attention, MLP and SSM projections, whatever a family calls them. Four
kinds of weights stay without:

    bypassed  layers whose owner reads `self.NAME.weight` in place of calling `self.NAME`, because a fused kernel wants
              the matrix (out_proj, x_proj, dt_proj of the Mambas). An adapter wraps the call, so it would be trained
              for nothing, or work on one device and not on the other. Found in the source of the owner's class, so
              there is no list of families to keep.
    corrected layers whose output a hook of the hybrid corrects (`correct_layer`): the correction would miss the
              adapter's part
    experts   of mixtures of experts, one three-dimensional parameter per matrix; PEFT's `target_parameters` names them
    ends      stems and heads
"""

import ast
import dataclasses
import functools
import inspect
import textwrap
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..building.sources import is_adapted
from ..mixing_manticore import ManticorePath, Mixture, Projector
from .stages import is_a, unwrap


if TYPE_CHECKING:
    from peft import LoraConfig


logger = logging.get_logger(__name__)

CORRECTIONS = "cache_manticore"  # the file whose hooks correct layers
SCAN = "scan_manticore"
TASK_TYPES = {
    "ManticoreModel": "FEATURE_EXTRACTION",
    "ManticoreForCausalLM": "CAUSAL_LM",
    "ManticoreForSequenceClassification": "SEQ_CLS",
    "ManticoreForTokenClassification": "TOKEN_CLS",
}
DESCRIPTIONS = ("dtype", "device", "shape")  # reading these of a weight does not bypass its module
SWITCHES = ("slow_but_exact",)  # of an owner that reads weights only where this attribute of its is true (bloom)


def lora_config(model: nn.Module, **overrides: Any) -> "LoraConfig":
    """
    A `peft.LoraConfig` for a hybrid, to be given to `peft.get_peft_model` or to a trainer.

    `target_modules` are the linear layers of all slices that an adapter reaches, by full name. `modules_to_save`,
    which are trained whole and saved with the adapter, are the projectors and the mixtures. Stems and heads stay.

    Args:
        model: the hybrid, before adapters are put on it.
        overrides: fields of `LoraConfig` in place of the ones above. `target_modules="all-linear"` means the linear
            layers of all slices here; PEFT's own reading of it takes the stems' and all but one of the heads' as well.

    Raises:
        ValueError: `model` is no hybrid or has adapters; there is no such field; `target_modules` matches nothing, or
            a module that an adapter does not reach.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    hybrid = unwrap(model)
    if any(is_adapted(module) for module in hybrid.modules()):
        raise ValueError("model: got a hybrid with adapters, allowed is one without (`merge_and_unload` them first).")
    fields = {field.name for field in dataclasses.fields(LoraConfig) if field.init}
    for name in overrides:
        if name not in fields:
            raise ValueError(f"{name}: there is no such field; allowed are those of peft.LoraConfig.")
    targets = overrides.pop("target_modules", None)
    named = isinstance(targets, (list, tuple, set)) and targets and all(isinstance(name, str) for name in targets)
    if targets is not None and not isinstance(targets, str) and not named:
        raise ValueError(
            f"target_modules: got {targets!r}, allowed are a list of names, a regular expression, 'all-linear' and "
            "None."
        )
    unreached = unreached_modules(hybrid)
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        targets = [name for name in _linear_layers(hybrid) if name not in unreached]
        _tell_of_experts(hybrid)
    options = {
        "task_type": TASK_TYPES.get(type(hybrid).__name__),
        "target_modules": targets,
        "modules_to_save": [n for n, m in hybrid.named_modules() if is_a(m, Projector) or is_a(m, Mixture)] or None,
    }
    config = LoraConfig(**(options | overrides))
    matched = [name for name, _ in hybrid.named_modules() if check_target_module_exists(config, name)]
    if not matched:
        raise ValueError(f"target_modules: got {targets!r}, which matches no module of this hybrid.")
    _refuse([name for name in matched if name in unreached], unreached)
    return config


def unreached_modules(hybrid: nn.Module) -> dict[str, str]:
    """{module of a slice that an adapter does not reach, or not exactly: the reason}."""
    return {
        f"{name}.{child}": reason
        for prefix, view in _slices(hybrid)
        for name, owner in view.named_modules(prefix=prefix)
        for child, reason in _unreached_children(owner).items()
    }


def check_adapters(model: nn.Module) -> None:
    """
    Raises:
        ValueError: an adapter sits where it is not reached; the message names the module.
    """
    found = {
        f"{name}.{child}": reason
        for name, owner in model.named_modules()
        if any(is_adapted(module) for module in owner.children())
        for child, reason in _unreached_children(owner).items()
        if is_adapted(owner._modules[child])
    }
    _refuse(list(found), found)


def _unreached_children(owner: nn.Module) -> dict[str, str]:
    found = {}
    if all(getattr(owner, name, True) for name in SWITCHES):
        reason = (
            f"{type(owner).__name__} reads the weight of this module and does not always call it (fused kernels need "
            "the matrix), so an adapter on it silently does nothing there"
        )
        found = {name: reason for name in weights_read(type(owner)) if owner._modules.get(name) is not None}
    for name, child in owner.named_children():
        hooks = getattr(child, "base_layer", child)._forward_hooks.values()
        if any(getattr(hook, "func", hook).__module__.endswith(CORRECTIONS) for hook in hooks):
            found[name] = (
                "the hybrid corrects the output of this module, and the correction would miss an adapter's part"
            )
    return found


@functools.cache
def weights_read(kind: type[nn.Module]) -> frozenset[str]:
    """Names NAME for which the code of a module class has `self.NAME.weight`, initialisation apart."""
    found = set()
    for base in kind.__mro__:
        if base.__module__.split(".")[0] in ("torch", "builtins"):
            break
        if base.__module__.endswith(SCAN):  # made of the next class, whose code it has
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and "init" not in n.name]
        nodes = [node for function in functions for node in ast.walk(function) if isinstance(node, ast.Attribute)]
        described = {id(node.value) for node in nodes if node.attr in DESCRIPTIONS}
        for node in nodes:
            owner = node.value.value if isinstance(node.value, ast.Attribute) else None
            if (
                node.attr == "weight"
                and isinstance(owner, ast.Name)
                and owner.id == "self"
                and id(node) not in described
            ):
                found.add(node.value.attr)
    return frozenset(found)


def _slices(hybrid: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(f"{name}.slice", path.slice) for name, path in hybrid.named_modules() if is_a(path, ManticorePath)]


def _linear_layers(hybrid: nn.Module) -> list[str]:
    return [
        name
        for prefix, view in _slices(hybrid)
        for name, module in view.named_modules(prefix=prefix)
        if isinstance(module, (nn.Linear, Conv1D))
    ]


def _tell_of_experts(hybrid: nn.Module) -> None:
    names = [
        f"{name}.{leaf}"
        for prefix, view in _slices(hybrid)
        for name, module in view.named_modules(prefix=prefix)
        if not isinstance(module, nn.modules.conv._ConvNd)
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    ]
    if names:
        logger.warning(
            f"{len(names)} expert matrices get no adapter, they are three-dimensional parameters and not modules: "
            f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}. PEFT's `target_parameters` can name them."
        )


def _refuse(names: list[str], reasons: dict[str, str]) -> None:
    if names:
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(
            f"target_modules: got {names[0]!r}{others}; {reasons[names[0]]}. Allowed are the other linear layers: "
            "leave target_modules out of `lora_config(model)` to get them all."
        )
