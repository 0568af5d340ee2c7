"""Which parameters train in which stage.

projectors: projectors and their gates only.
search:     mixture weights, projectors and, by default, the components.
finetune:   everything but the mixture weights.
"""

from contextlib import contextmanager

from torch import nn

from ..mixing_manticore import Mixture, Projector


STAGES = ("projectors", "search", "finetune")


def mixture_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Mixture weights and learned gates: few, float32, with a learning rate of their own and no weight decay."""
    found = []
    for module in model.modules():
        if isinstance(module, Mixture):
            found.append(module.parameter)
        elif isinstance(module, Projector) and hasattr(module, "gate"):
            found.append(module.gate)
    return found


def trainable_ids(model: nn.Module, stage: str, train_components: bool) -> set[int]:
    """Identities of the parameters that `stage` trains."""
    mixtures = {id(m.parameter) for m in model.modules() if isinstance(m, Mixture)}
    projectors = {id(p) for m in model.modules() if isinstance(m, Projector) for p in m.parameters()}
    if stage == "projectors":
        return projectors
    everything = {id(p) for p in model.parameters()}
    if stage == "finetune":
        return everything - mixtures
    return everything if train_components else mixtures | projectors


@contextmanager
def frozen_for(model: nn.Module, stage: str, train_components: bool = True):
    """
    Freeze what `stage` does not train. Parameters that were frozen before stay so; all flags are restored at the end.

    Raises:
        ValueError: nothing is left to train.
    """
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    wanted = trainable_ids(model, stage, train_components)
    if not any(p.requires_grad and id(p) in wanted for p in model.parameters()):
        raise ValueError(f"stage: got {stage!r}, but this model has nothing that it trains.")
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in wanted)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
