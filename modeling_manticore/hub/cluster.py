"""What training a hybrid takes on several GPUs: memory of each under FSDP2, and the bytes that move in a step."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from .activations import Activations, activation_bytes


MASTER, COMPUTE = torch.float32.itemsize, torch.bfloat16.itemsize  # of accelerate's `mixed_precision: bf16`


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP gathers together, `freed` where it gives them back between forward and backward."""

    name: str
    parameters: list[nn.Parameter]
    freed: bool = True

    @property
    def numbers(self) -> int:
        """Numbers in its parameters."""
        return sum(parameter.numel() for parameter in self.parameters)

    def share(self, gpus: int) -> int:
        """Numbers of the largest share: rows are dealt out whole, and transfers are filled up to it."""
        return sum(-(-parameter.shape[0] // gpus) * parameter[0].numel() for parameter in self.parameters)


@dataclass(frozen=True)
class ClusterNeeds:
    """
    Bytes of one GPU out of so many, and what it receives in a step.

    Weights, gradients and both of Adam's moments are float32. `gathered` is the most that is whole at one time, in
    bfloat16: units that are not freed, the two largest others (one computes, the next arrives) and the gradient of
    the largest; on one GPU the copies of all weights that mixed precision makes. `activations` are those of the batch
    (None where they cannot be counted), `checkpointed` with the inputs of layers kept and one layer computed again.
    `all_gather_forward` and so on are received by each GPU; it sends as much.
    """

    gpus: int
    weights: int
    gradients: int
    adam: int
    gathered: int
    activations: int | None
    checkpointed: int | None
    all_gather_forward: int
    all_gather_backward: int
    reduce_scatter: int

    @property
    def moved(self) -> int:
        """Bytes that a GPU receives in a step."""
        return self.all_gather_forward + self.all_gather_backward + self.reduce_scatter

    def total(self, checkpoints: bool) -> int | None:
        """Bytes of memory, with or without checkpoints."""
        activations = self.checkpointed if checkpoints else self.activations
        held = self.weights + self.gradients + self.adam + self.gathered
        return None if activations is None else held + activations

    def row(self) -> dict:
        """For JSON."""
        return {**vars(self), "moved": self.moved, "total": self.total(False), "total_checkpointed": self.total(True)}


def fsdp_units(model: PreTrainedModel) -> list[Unit]:
    """
    The units that accelerate makes of a model under FSDP2 with TRANSFORMER_BASED_WRAP: the modules of the classes that
    the model names, the first embedding, the last matrix, and the rest. Those two and the rest follow accelerate 1.15
    (`fsdp2_prepare_model`); a tied matrix stands at the end.
    """
    taken: set[int] = set()

    def unit(name: str, module: nn.Module, freed: bool = True) -> list[Unit]:
        own = [p for p in module.parameters() if id(p) not in taken]
        taken.update(map(id, own))
        return [Unit(name, own, freed)] if own else []

    wrapped = [
        (n, m) for n, m in model.named_modules() if m is not model and type(m).__name__ in model._no_split_modules
    ]
    units = [found for name, module in reversed(wrapped) for found in unit(name, module)]  # inner ones first
    stem, head = model.get_input_embeddings(), model.get_output_embeddings()
    if stem is not None and (head is None or stem.weight is not head.weight):
        units += unit("embedding", stem)
    if head is not None:
        units += unit("head", head, freed=False)
    return units + unit("rest", model, freed=False)


def cluster_needs(
    units: list[Unit], gpus: int, activations: Activations | None = None, batch_size: int = 1
) -> ClusterNeeds:
    """
    What every GPU of so many needs.

    Args:
        activations: of one sequence. batch_size: sequences of a step on each GPU.
    """
    held = sum(unit.share(gpus) for unit in units)
    everything, freed = units, [unit for unit in units if unit.freed]
    if gpus == 1:
        gathered = COMPUTE * sum(unit.numbers for unit in everything)
    else:
        sizes = sorted((unit.share(gpus) * gpus for unit in freed), reverse=True)
        kept = sum(unit.share(gpus) * gpus for unit in everything if not unit.freed)
        gathered = COMPUTE * (kept + sum(sizes[:2]) + sum(sizes[:1]))
    others = COMPUTE * (gpus - 1)
    return ClusterNeeds(
        gpus=gpus,
        weights=MASTER * held,
        gradients=MASTER * held,
        adam=2 * MASTER * held,
        gathered=gathered,
        activations=None if activations is None else batch_size * activations.full,
        checkpointed=None if activations is None else batch_size * activations.checkpointed,
        all_gather_forward=others * held,
        all_gather_backward=others * sum(unit.share(gpus) for unit in freed),
        reduce_scatter=others * held,
    )


@dataclass(frozen=True)
class ClusterPlan:
    """A model on several numbers of GPUs. `largest_unit` and `unit_bytes`: what FSDP gathers at once, in bfloat16."""

    tokens: int
    batch_size: int
    parameters: int
    largest_unit: str
    unit_bytes: int
    needs: list[ClusterNeeds]

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return {**vars(self), "needs": [needs.row() for needs in self.needs]}


def cluster_plan(model: PreTrainedModel, gpus: list[int], tokens: int, batch_size: int = 1) -> ClusterPlan:
    """
    What training all of a hybrid takes with accelerate's mixed precision in bfloat16.

    Args:
        model: on the meta device. gpus: numbers of GPUs, 1 without FSDP. tokens: of a sequence.
        batch_size: sequences of a step on each GPU.

    Raises:
        ValueError: a number is not a positive integer.
    """
    for field, values in (("gpus", gpus), ("row_length", [tokens]), ("batch_size", [batch_size])):
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field}: got {value!r}, allowed is a positive integer.")
    units = fsdp_units(model)
    kept = activation_bytes(copy.deepcopy(model).to(torch.bfloat16), tokens)
    largest = max(units, key=lambda unit: unit.numbers)
    return ClusterPlan(
        tokens=tokens,
        batch_size=batch_size,
        parameters=sum(unit.numbers for unit in units),
        largest_unit=largest.name,
        unit_bytes=COMPUTE * largest.numbers,
        needs=[cluster_needs(units, count, kept, batch_size) for count in gpus],
    )


def cluster_table(name: str, plan: ClusterPlan) -> list[str]:
    """Lines of text; GB are 10^9 bytes."""
    lines = [
        f"  training the {name} ({plan.parameters:,} parameters) with FSDP, bfloat16 over float32, AdamW, "
        f"{plan.batch_size} x {plan.tokens} tokens a GPU; GB of each GPU:"
    ]
    heads = (
        "GPUs",
        "weights",
        "gradients",
        "Adam",
        "gathered",
        "activations",
        "all",
        "checkpointed",
        "all",
        "moved/step",
    )
    lines.append("  " + "".join(f"{head:>13}" for head in heads))
    for needs in plan.needs:
        row = needs.row()
        names = ("weights", "gradients", "adam", "gathered", "activations", "total", "checkpointed")
        cells = [str(needs.gpus)] + [_gigabytes(row[key]) for key in (*names, "total_checkpointed", "moved")]
        lines.append("  " + "".join(f"{cell:>13}" for cell in cells))
    lines.append(
        f"  largest unit of FSDP: {plan.largest_unit}, {_gigabytes(plan.unit_bytes)} GB; more blocks, smaller units"
    )
    return lines


def _gigabytes(number: int | None) -> str:
    if number is None:
        return "unknown"
    return f"{number / 1e9:.2f}" if number < 1e10 else f"{number / 1e9:,.1f}"
