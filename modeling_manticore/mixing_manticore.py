"""Projectors, mixture weights, and the junctions at which the paths of one block hand over to those of the next."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast

from .cache_manticore import ManticoreCache, cache_bytes
from .configuration_manticore import ManticoreConfig
from .slicing_manticore import run_view


def pad(x: torch.Tensor, width: int) -> torch.Tensor:
    """Zero-pad the last axis of `x` to `width` (pad_D of the paper)."""
    return x if x.shape[-1] == width else nn.functional.pad(x, (0, width - x.shape[-1]))


def cut(x: torch.Tensor, width: int) -> torch.Tensor:
    """Keep the first `width` entries of the last axis of `x` (cut_d of the paper)."""
    return x if x.shape[-1] == width else x[..., :width]


def _keep_float32(module: nn.Module, fn, name: str) -> None:
    """Move `module.name` where `fn` moves it, but leave its values and dtype float32."""
    parameter = getattr(module, name)
    moved = fn(parameter.data)
    if moved.dtype != torch.float32:
        moved = moved.float() if parameter.is_meta else parameter.data.to(device=moved.device)
    if moved.is_meta != parameter.is_meta:
        setattr(module, name, nn.Parameter(moved, requires_grad=parameter.requires_grad))
        return
    parameter.data = moved
    if parameter.grad is not None:
        parameter.grad = parameter.grad.to(device=moved.device, dtype=torch.float32)


class Projector(nn.Module):
    """
    Linear map with bias between a component's hidden space and the stream, or between two components (a bridge).

    Under `gate="learned"` it has a scalar `gate` (float32 logit; g = sigmoid(gate), g = 1 being the identity).
    """

    def __init__(self, in_features: int, out_features: int, learned_gate: bool = False):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        if learned_gate:
            self.gate = nn.Parameter(torch.empty(1, dtype=torch.float32))

    def forward(
        self,
        x: torch.Tensor,
        bias_scale: float | torch.Tensor = 1.0,
        beside: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        y = `weight @ x + bias_scale * bias`, (..., in_features) -> (..., out_features), in the dtype of the weight.
        With `beside`, (1 - g) y + g beside; g is `gate`, or learned where that is None.

        Some families (mamba2) carry their residual in float32 between layers of a bfloat16 model.
        """
        x = x.to(self.weight.dtype)
        if isinstance(bias_scale, float) and bias_scale == 1.0:
            y = nn.functional.linear(x, self.weight, self.bias)
        else:
            y = nn.functional.linear(x, self.weight) + (bias_scale * self.bias).to(x.dtype)
        if beside is None:
            return y
        gate = self.strength() if gate is None else gate
        return (1 - gate) * y + gate * beside.to(y.dtype)

    def strength(self) -> torch.Tensor:
        """The learned g in (0, 1), a float32 scalar. (The parameter is a vector because FSDP takes no scalars.)"""
        return torch.sigmoid(self.gate)[0]

    def _apply(self, fn, recurse=True):
        gate = self._parameters.pop("gate", None)
        super()._apply(fn, recurse)
        if gate is not None:
            self.gate = gate
            _keep_float32(self, fn, "gate")
        return self

    def initialise(self, kind: str) -> None:
        """Starting values: a rectangular identity ("identity") or noise ("random"), no bias, half-open gate."""
        if kind == "identity":
            init.zeros_(self.weight)
            init.copy_(self.weight, torch.eye(self.out_features, self.in_features))
        else:
            init.normal_(self.weight, mean=0.0, std=self.in_features**-0.5)
        init.zeros_(self.bias)
        if hasattr(self, "gate"):
            init.zeros_(self.gate)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Mixture(nn.Module):
    """
    Mixture weights of one block: a point of the simplex over its paths, float32 in a model of any dtype.

    "softmax" (DARTS) and "gumbel_softmax" (DASH; noise in training only) keep `logits`, "simplex" (GAEA) the `weights`
    themselves. All start uniform.
    """

    def __init__(self, paths: int, kind: str, temperature: float = 1.0):
        super().__init__()
        self.kind, self.temperature, self.paths = kind, temperature, paths
        self.parameter_name = "weights" if kind == "simplex" else "logits"
        self.register_parameter(self.parameter_name, nn.Parameter(torch.empty(paths, dtype=torch.float32)))

    @property
    def parameter(self) -> nn.Parameter:
        """The one trainable vector, shape (paths,), float32."""
        return getattr(self, self.parameter_name)

    def forward(self) -> torch.Tensor:
        """The weights that the forward pass uses, shape (paths,), float32."""
        if self.kind == "gumbel_softmax" and self.training:
            return nn.functional.gumbel_softmax(self.logits, tau=self.temperature)
        return self.weights_without_noise()

    def weights_without_noise(self) -> torch.Tensor:
        """The point of the simplex itself, shape (paths,), float32."""
        return self.weights.clone() if self.kind == "simplex" else torch.softmax(self.logits / self.temperature, dim=0)

    @torch.no_grad()
    def set(self, weights: torch.Tensor) -> None:
        """Move to a point of the simplex. Logits become temperature * log(max(a, 1e-30)): finite, never frozen."""
        parameter = self.parameter
        value = weights if self.kind == "simplex" else self.temperature * weights.clamp_min(1e-30).log()
        value = value.to(device=parameter.device, dtype=parameter.dtype)
        if hasattr(parameter, "full_tensor"):
            value = type(parameter.data).from_local(value, parameter.device_mesh, run_check=False)
            value = value.redistribute(placements=parameter.placements)
        parameter.copy_(value)

    def initialise(self) -> None:
        """Starting values: uniform weights."""
        value = 1.0 / self.paths if self.kind == "simplex" else 0.0
        init.copy_(self.parameter, torch.full((self.paths,), value))

    def _apply(self, fn, recurse=True):
        _keep_float32(self, fn, self.parameter_name)
        return self

    def extra_repr(self) -> str:
        return f"paths={self.paths}, kind={self.kind!r}"


@dataclass(frozen=True)
class End:
    """One side of a junction: a stem, path or head. `position` is the component's layer at which the state stands."""

    component: int
    width: int
    position: tuple


class Boundary(NamedTuple):
    """
    What one block hands to the next. `states[j]` is v_j, (batch, tokens, d_j), None where path j was skipped;
    `projected[j]` its gated image in the stream, (batch, tokens, D), or None where no one needs it; `stream` is
    their sum where it is asked for. A tuple, so that hooks around a block (FSDP, device maps) find the tensors in it.
    """

    states: list
    projected: list
    weights: list
    stream: torch.Tensor | None = None

    def keep(self, positions: int | torch.Tensor) -> "Boundary":
        """The last `positions` tokens only (0: all), or the tokens at the given indices."""
        if isinstance(positions, int) and positions == 0:
            return self
        index = slice(-positions, None) if isinstance(positions, int) else positions
        parts = ([None if x is None else x[:, index] for x in xs] for xs in (self.states, self.projected))
        return Boundary(*parts, self.weights)


@dataclass
class ManticoreModelOutput(BaseModelOutputWithPast):
    """
    Output of the trunk; `boundary` is what the last block hands to the heads, `block_weights` the weights used;
    `aux_loss` balances the experts of all components, `router_loss` is what of it enters a training loss.
    """

    boundary: Boundary | None = None
    block_weights: list | None = None
    router_logits: tuple | None = None
    aux_loss: torch.Tensor | None = None
    router_loss: torch.Tensor | None = None


class Junction:
    """
    The plan of one junction, derived from the configuration alone (design: stems are block 0, heads block B + 1).

    Two single sides meet in a bridge, d_source -> d_target, or directly where the target continues the source. Else
    every source of a multi-path side has an out-projector d -> D, and every target an in-projector D -> d, as far as
    the gate uses them. A single source needs no out-projector: its state is padded.
    """

    def __init__(self, sources: list[End], targets: list[End], config: ManticoreConfig, is_end: bool):
        self.sources, self.targets = sources, targets
        self.gate, self.width = config.gate, config.hidden_size
        self.single = len(sources) == 1 and len(targets) == 1
        self.direct = [
            [source.component == t.component and source.position == t.position for source in sources] for t in targets
        ]
        self.fixed = is_end and not config.project_ends and not self.single
        routed = self.gate == "routed"
        self.has_out = not self.fixed and len(sources) > 1
        self.has_in = [
            not self.fixed and not all(direct) if (routed or self.single) else not self.fixed for direct in self.direct
        ]

    def out_projectors(self) -> list[Projector | None]:
        """Fresh out-projectors, one per source."""
        learned = self.gate == "learned"
        return [Projector(s.width, self.width, learned) if self.has_out else None for s in self.sources]

    def in_projectors(self) -> list[Projector | None]:
        """Fresh in-projectors, one per target; a bridge maps from the source's own width."""
        learned = self.gate == "learned" and len(self.targets) > 1
        width = self.sources[0].width if self.single else self.width
        return [Projector(width, t.width, learned) if has else None for t, has in zip(self.targets, self.has_in)]

    def emit(self, states: list, weights: list, projectors: list, need_stream: bool) -> Boundary:
        """Source side: gated images in the stream, (1 - g) W_out v + g pad(v), for whoever needs them."""
        projected = [None] * len(states)
        if need_stream or not self.single:
            used = [
                need_stream or any(not row[j] for row in self.direct) or self.gate != "routed"
                for j in range(len(states))
            ]
            projected = [
                None if state is None or not wanted else self._image(state, weight, projector)
                for state, weight, projector, wanted in zip(states, weights, projectors, used)
            ]
        return Boundary(states, projected, weights, weighted_sum(weights, projected) if need_stream else None)

    def _image(self, state, weight, projector):
        padded = pad(state, self.width)
        if projector is None:
            return padded
        if self.gate in ("routed", "none"):
            return projector(state)
        return projector(state, beside=padded, gate=None if self.gate == "learned" else weight)

    def receive(self, boundary: Boundary, projectors: list, gates: list, training: bool) -> list:
        """Target side: u_k for every target, (batch, tokens, d_k), None for those that do not run."""
        if self.single:
            state = boundary.states[0]
            return [projectors[0](state) if projectors[0] is not None else state]
        wanted = targets_that_run(gates, training)
        if self.gate == "routed":
            return [
                self._routed(boundary, self.direct[t], self.targets[t].width, projectors[t]) if wanted[t] else None
                for t in range(len(self.targets))
            ]
        stream = stream_of(boundary)
        return [
            self._gated(stream, self.targets[t].width, projectors[t], gates[t]) if wanted[t] else None
            for t in range(len(self.targets))
        ]

    def _routed(self, boundary, direct, width, projector):
        """u = sum_direct a_j v_j + A sum_others a_j W_out_j(v_j) + (1 - sum_direct a_j) c."""
        total, others, own_weight = None, None, 0.0
        for j, state in enumerate(boundary.states):
            if direct[j]:
                own_weight = own_weight + boundary.weights[j]
            if state is None:
                continue
            term = boundary.weights[j] * (state if direct[j] else boundary.projected[j])
            if direct[j]:
                total = term if total is None else total + term
            else:
                others = term if others is None else others + term
        if others is not None:
            routed = cut(others, width) if projector is None else projector(others, 1.0 - own_weight)
            total = routed if total is None else total.to(routed.device) + routed
        return total

    def _gated(self, stream, width, projector, gate):
        """u = (1 - g) W_in(h) + g cut(h)."""
        if projector is None:
            return cut(stream, width)
        if self.gate == "none" or len(self.targets) == 1:
            return projector(stream)
        return projector(stream, beside=cut(stream, width), gate=None if self.gate == "learned" else gate)


def stream_of(boundary: Boundary) -> torch.Tensor:
    """h = sum_j a_j projected_j, (batch, tokens, D); one tensor, for whoever reads it or goes on from it."""
    return weighted_sum(boundary.weights, boundary.projected) if boundary.stream is None else boundary.stream


def weighted_sum(weights: list, values: list) -> torch.Tensor:
    """sum_j a_j x_j of the x_j that are there, on the device of the last: a device map may have parted them."""
    if len(values) == 1:
        return values[0]
    terms = [(a, x) for a, x in zip(weights, values) if x is not None]
    place = terms[-1][1].device
    terms = [a.to(place) * x.to(place) for a, x in terms]
    return sum(terms[1:], terms[0])


def targets_that_run(weights: list, training: bool) -> list[bool]:
    """In evaluation not those of weight exactly 0; in a compiled graph, which cannot depend on the weights, all."""
    if training or torch.compiler.is_compiling():
        return [True] * len(weights)
    return [not isinstance(a, torch.Tensor) or bool(a != 0) for a in weights]


def junctions(config: ManticoreConfig) -> list[Junction]:
    """The B + 1 junctions of a hybrid: stems -> block 1, block b -> block b + 1, block B -> heads."""

    def end(component: int, position: tuple) -> End:
        return End(component, config.components[component].hidden_size, position)

    def finish(b: int, p: int) -> tuple:
        return (config.blocks[b][p]["stop"], config.ends_component(b, p))

    stems = [end(k, (0, False)) for k in config.stem_components]
    heads = [end(k, (config.depth(k), not config.norm_in_head(k))) for k in config.head_components]
    entries = [[end(path["component"], (path["start"], False)) for path in block] for block in config.blocks]
    exits = [
        [end(path["component"], finish(b, p)) for p, path in enumerate(block)] for b, block in enumerate(config.blocks)
    ]
    sources, targets = [stems] + exits, entries + [heads]
    last = len(sources) - 1
    return [Junction(sources[i], targets[i], config, i in (0, last)) for i in range(len(sources))]


class ManticorePath(nn.Module):
    """One slice with its in-projector and out-projector, where the junctions on its two sides need them."""

    def __init__(self, view: PreTrainedModel, in_projector: Projector | None, out_projector: Projector | None):
        super().__init__()
        self.slice = view
        self.in_projector = in_projector
        self.out_projector = out_projector


class ManticoreBlock(nn.Module):
    """The paths that run side by side on one shared hidden state."""

    def __init__(self, config: ManticoreConfig, index: int, before: Junction, after: Junction, blueprints: list):
        super().__init__()
        self.index, self.before, self.after = index, before, after
        self.components = [path["component"] for path in config.blocks[index]]
        entries, exits = before.in_projectors(), after.out_projectors()
        self.paths = nn.ModuleList()
        for p, path in enumerate(config.blocks[index]):
            view = blueprints[path["component"]].view(
                path["start"], path["stop"], tail=config.ends_component(index, p)
            )
            self.paths.append(ManticorePath(view, entries[p], exits[p]))
        count = len(self.paths)
        self.mixture = Mixture(count, config.mixture, config.mixture_temperature) if count > 1 else None

    def mixture_weights(self) -> torch.Tensor:
        """
        The block's point of the simplex, shape (paths,), float32; [1.] for a block of one path. Where the model is
        sharded every process must ask, since the point is gathered.
        """
        if self.mixture is None:
            return torch.ones(1)
        point = self.mixture.weights_without_noise()
        return point.full_tensor() if hasattr(point, "full_tensor") else point

    def forward(
        self,
        boundary: Boundary,
        weights: list,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor,
        cache: ManticoreCache | None = None,
        need_stream: bool = False,
        routers: dict[int, list] | None = None,
    ) -> Boundary:
        """
        Boundary before the block -> boundary after it. Paths of weight exactly 0 are skipped in evaluation. `routers`
        collects the router logits of the components that are its keys.
        """
        inputs = self.before.receive(boundary, [path.in_projector for path in self.paths], weights, self.training)
        states = []
        for p, path in enumerate(self.paths):
            if cache is not None:
                cache.run_or_skip(self.index, p, inputs[p] is not None)
            if inputs[p] is None:
                states.append(None)
                continue
            view = None if cache is None else cache.view(self.index, p)
            states.append(
                run_view(
                    path.slice,
                    inputs_embeds=inputs[p],
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    cache=view,
                    router_logits=None if routers is None else routers.get(self.components[p]),
                )
            )
        return self.after.emit(states, weights, [path.out_projector for path in self.paths], need_stream)


def describe(config: ManticoreConfig, parameters: int, itemsize: int) -> str:
    """Slices, joints, parameters, key-value bytes per token and context of a hybrid, as lines of text."""
    names = [getattr(c, "source", None) or c.model_type for c in config.components]
    plan = junctions(config)
    lines = [f"{'discretized hybrid' if config.is_discretized else 'supernet'} of {', '.join(names)}"]
    lines.append("  stems: " + ", ".join(f"{names[k]} ({k})" for k in config.stem_components))
    for b, block in enumerate(config.blocks):
        slices = " | ".join(f"{names[p['component']]}[{p['start']}:{p['stop']}]" for p in block)
        lines.append(f"  block {b}: {slices}{_joint(plan[b])}")
    lines.append("  heads: " + ", ".join(f"{names[k]} ({k})" for k in config.head_components) + _joint(plan[-1]))
    lines.append(f"  stream {config.hidden_size}, vocabulary {config.vocab_size}, parameters {parameters:,}")
    cached = sum(cache_bytes(config, path, itemsize) for block in config.blocks for path in block)
    context = config.max_position_embeddings
    lines.append(f"  key-value cache {cached:,} bytes per token, context {context if context else 'unlimited'}")
    return "\n".join(lines)


def _joint(junction: Junction) -> str:
    if junction.single:
        source, target = junction.sources[0], junction.targets[0]
        return f"  (bridge {source.width} -> {target.width})" if junction.has_in[0] else "  (continues)"
    return f"  (gate {junction.gate}{', plain' if junction.fixed else ''})"


__all__ = ["Junction", "ManticoreBlock", "Mixture", "Projector"]
