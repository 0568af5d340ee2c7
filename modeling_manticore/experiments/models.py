"""The models and baselines that an experiment may name: a table from kinds to builders."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .. import Budget, ManticoreForCausalLM, calibrate, cost_table, discretize
from ..building.costs import count
from ..building.discretize import usable_paths
from ..building.limits import argmax_under
from ..scan_manticore import use_own_scan
from ..search.stages import mixture_modules
from ..tasks.mad.decoder import CompressionModel
from .architectures import (
    Sizes,
    alternating_config,
    chosen_config,
    component_config,
    on_meta,
    sized_component,
    supernet_config,
)
from .heads import ClassificationModel, LogitEnsemble
from .schema import ModelEntry, Shape


@dataclass
class Request:
    """
    Everything that decides what is built.

    Attributes:
        entry: the model's row in the experiment file; of a discretized hybrid the `supernet` it was searched in, too.
        families: of a hybrid from scratch.
        head: of the task, see `Task`.
        choice: of a discretized hybrid, the path of every block; set by `build` where it follows from `weights`.
        weights: of a search, for the best choice within `max_attention_blocks`.
        parameters: of "same_parameters".
        rows: (rows, length) token ids for calibrating a pretrained hybrid.
    """

    entry: ModelEntry
    shape: Shape
    sizes: Sizes
    head: str
    seed: int
    families: list[str]
    supernet: ModelEntry | None = None
    choice: list[int] | None = None
    weights: list[list[float]] | None = None
    parameters: int | None = None
    rows: torch.Tensor | None = None

    @property
    def layout(self) -> ModelEntry:
        """The entry that has the sizes of the supernet."""
        return self.supernet or self.entry


def build(request: Request) -> nn.Module:
    """
    The model of a request, with weights that follow from its seed.

    Raises:
        ValueError: pretrained components with a task that has no next token, or that cannot be loaded or joined.
    """
    state = torch.get_rng_state()
    torch.manual_seed(request.seed)
    try:
        return BUILDERS[request.entry.kind](request)
    finally:
        torch.set_rng_state(state)


def configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    """The configurations of what is inside a task's model."""
    if isinstance(model, LogitEnsemble):
        return [member.config for member in model.members]
    inner = model if isinstance(model, PreTrainedModel) else model.trunk
    return [inner.config]


def hybrid_in(model: nn.Module) -> PreTrainedModel | None:
    """The supernet inside a task's model, or None."""
    inner = model if isinstance(model, PreTrainedModel) else getattr(model, "trunk", None)
    return inner if inner is not None and mixture_modules(inner) else None


def choice_of(hybrid: PreTrainedModel) -> list[int]:
    """In every block the path of largest weight, among those that a discrete hybrid may keep there."""
    points = [point.tolist() for point in hybrid.mixture_weights()]
    return [max(paths, key=point.__getitem__) for paths, point in zip(usable_paths(hybrid), points)]


def _headed(config: PreTrainedConfig, request: Request) -> nn.Module:
    if request.head == "tokens":
        model = AutoModelForCausalLM.from_config(config)
        use_own_scan(model)  # components have what hybrids have, so that seconds compare
        return model
    trunk = AutoModel.from_config(config)
    use_own_scan(trunk)
    if request.head == "last_state":
        return CompressionModel(trunk, request.sizes.vocabulary, request.sizes.length)
    return ClassificationModel(trunk, request.sizes.classes)


def _components(request: Request, families: list[str]) -> list[PreTrainedConfig]:
    layout = request.layout
    return [
        component_config(family, request.shape, request.sizes, layout.hidden_size, layout.layers)
        for family in families
    ]


def _component(request: Request) -> nn.Module:
    (config,) = _components(request, [request.entry.family])
    return _headed(config, request)


def _supernet_config(request: Request) -> PreTrainedConfig:
    layout = request.layout
    components = _components(request, request.families)
    return supernet_config(components, layout.blocks or request.shape.blocks, layout.gate)


def _supernet(request: Request) -> nn.Module:
    return _pretrained_supernet(request) if request.layout.sources else _headed(_supernet_config(request), request)


def _pretrained_supernet(request: Request) -> PreTrainedModel:
    layout = request.layout
    options = {} if layout.gate is None else {"gate": layout.gate}
    sources = [_source(source, request) for source in layout.sources]
    model = ManticoreForCausalLM.from_components(sources, layout.blocks or request.shape.blocks, **options)
    calibrate(model, request.rows, progress=False)
    return model


def _discretized(request: Request) -> nn.Module:
    """Built anew: nothing of the search is left but its choice."""
    supernet = _pretrained_supernet(request) if request.layout.sources else on_meta(_supernet_config(request))
    if request.choice is None:
        budget = Budget(max_attention_blocks=request.entry.max_attention_blocks)
        points = [torch.tensor(point) for point in request.weights]
        request.choice = argmax_under(cost_table(supernet), points, budget, usable_paths(supernet))
    if request.layout.sources:
        return discretize(supernet, request.choice, request.rows, progress=False)
    return _headed(chosen_config(supernet.config, request.choice), request)


def _mixture(request: Request) -> nn.Module:
    """A supernet whose mixture weights stay as they are: uniform, or drawn from the simplex."""
    model = _supernet(request)
    hybrid = hybrid_in(model)
    if request.entry.weights == "random":
        draws = torch.Generator().manual_seed(request.seed)
        sizes = [len(point) for point in hybrid.mixture_weights()]
        points = [-torch.rand(size, generator=draws, dtype=torch.float64).log() for size in sizes]
        hybrid.set_mixture_weights([point / point.sum() for point in points])
    for module in mixture_modules(hybrid):
        module.parameter.requires_grad_(False)
    return model


def _alternating(request: Request) -> nn.Module:
    first = request.entry.kind == "mambaformer"
    return _headed(alternating_config(_components(request, request.families), first), request)


def _same_parameters(request: Request) -> nn.Module:
    entry = request.entry

    def parameters_of(config: PreTrainedConfig) -> int:
        with torch.device("meta"):
            return count(_headed(config, request))

    config = sized_component(
        entry.family, request.shape, request.sizes, request.parameters, entry.layers, parameters_of
    )
    return _headed(config, request)


def _continued(request: Request) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(_source(request.entry.source, request))


def _ensemble(request: Request) -> nn.Module:
    members = [_source(source, request) for source in request.entry.sources]
    return LogitEnsemble([AutoModelForCausalLM.from_pretrained(member) for member in members])


def _source(name: str, request: Request) -> str:
    """A folder or repository; `{seed}` in it is the run's."""
    return name.replace("{seed}", str(request.seed))


BUILDERS: dict[str, Callable[[Request], nn.Module]] = {
    "component": _component,
    "searched": _supernet,
    "discretized": _discretized,
    "mixture": _mixture,
    "mambaformer": _alternating,
    "striped": _alternating,
    "same_parameters": _same_parameters,
    "continued": _continued,
    "ensemble": _ensemble,
}
