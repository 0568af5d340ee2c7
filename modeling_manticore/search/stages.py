"""
Which parameters train in which stage.

    projectors  projectors only, with their learned gates; components and mixture weights stand still
    search      mixture weights, projectors and, unless `train_components` is off, components
    finetune    everything but the mixture weights
    distill     the same, with a teacher (`search/distill.py`)

A parameter trains if its stage trains it and it was not frozen before: what a user or PEFT froze stays frozen. All
`requires_grad` flags are as before when training ends, also when it ends with an error. Outside stage "search" mixture
weights are constants, so Gumbel noise is off.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import extract_model_from_parallel
from torch import nn

from ..mixing_manticore import Mixture, Projector
from ..modeling_manticore import ManticoreModel


STAGES = ("projectors", "search", "finetune", "distill")


def unwrap(model: nn.Module) -> nn.Module:
    """
    The hybrid inside wrappers (DDP, torch.compile, PEFT), or the model itself.

    Raises:
        ValueError: there is no hybrid in it.
    """
    inner = extract_model_from_parallel(model, keep_torch_compile=False) if isinstance(model, nn.Module) else model
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    if getattr(getattr(inner, "config", None), "model_type", None) != "manticore":
        raise ValueError(
            f"model: got {type(inner).__name__}, allowed is a hybrid such as ManticoreForCausalLM (make one with "
            "ManticoreForCausalLM.from_components)."
        )
    return inner


def is_a(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` is a `kind`, also when its class was read from a checkpoint's own copy of our files."""
    if isinstance(module, kind):
        return True
    file = kind.__module__.rsplit(".", 1)[-1]
    return any(c.__name__ == kind.__name__ and c.__module__.rsplit(".", 1)[-1] == file for c in type(module).__mro__)


def mixture_modules(model: nn.Module) -> list[nn.Module]:
    """Every `Mixture` of the model, in the order of the blocks."""
    return [module for module in model.modules() if is_a(module, Mixture)]


def mixture_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Mixture weights and learned gates: few, float32, with a learning rate of their own and no weight decay."""
    gates = [m.gate for m in model.modules() if is_a(m, Projector) and hasattr(m, "gate")]
    return [module.parameter for module in mixture_modules(model)] + gates


def trainable_ids(model: nn.Module, stage: str, train_components: bool) -> set[int]:
    """Identities of the parameters that `stage` trains, whether frozen now or not."""
    mixtures = {id(module.parameter) for module in mixture_modules(model)}
    projectors = {id(p) for m in model.modules() if is_a(m, Projector) for p in m.parameters()}
    if stage == "projectors":
        return projectors
    everything = {id(p) for p in model.parameters()}
    if stage in ("finetune", "distill"):
        return everything - mixtures
    return everything if train_components else mixtures | projectors


def check_stage(model: nn.Module, stage: str, train_components: bool = True) -> None:
    """
    Raises:
        ValueError: `model` is not a hybrid, or has nothing that `stage` trains.
    """
    hybrid = unwrap(model)
    if is_a(hybrid, ManticoreModel):
        raise ValueError(
            "model: got ManticoreModel, which has no head and no loss; allowed is ManticoreForCausalLM, "
            "ManticoreForSequenceClassification or ManticoreForTokenClassification."
        )
    if stage == "search":
        if not mixture_modules(hybrid):
            raise ValueError(
                "stage: got 'search', but every block of this hybrid has one path (it is discretized), so there is no "
                "mixture to search; allowed are 'finetune' and 'projectors'."
            )
        if not any(module.parameter.requires_grad for module in mixture_modules(hybrid)):
            raise ValueError(
                "stage: got 'search', but all mixture weights are frozen; allowed is a hybrid whose mixture weights "
                "require gradients (under PEFT: modules_to_save=['mixture'], so that adapters keep them too)."
            )
    wanted = trainable_ids(model, stage, train_components)
    if not any(p.requires_grad and id(p) in wanted for p in model.parameters()):
        raise ValueError(
            f"stage: got {stage!r}, but this hybrid has no unfrozen parameter that it trains; allowed is a stage that "
            f"has one, of {', '.join(map(repr, STAGES))}."
        )


@contextmanager
def frozen_for(model: nn.Module, stage: str, train_components: bool = True) -> Iterator[None]:
    """Freeze what `stage` does not train, and switch Gumbel noise off outside "search". Undone at the end."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    wanted = trainable_ids(model, stage, train_components)
    quiet = [] if stage == "search" else mixture_modules(model)
    handles = [module.register_forward_pre_hook(_without_noise) for module in quiet]
    try:
        for parameter, flag in flags:
            parameter.requires_grad_(flag and id(parameter) in wanted)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for handle in handles:
            handle.remove()
        for module in quiet:
            module.train(model.training)


def _without_noise(module: nn.Module, inputs: tuple) -> None:
    module.eval()
