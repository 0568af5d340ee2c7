"""Projectors, mixture weights, and the junctions at which the paths of one block hand over to those of the next."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .cache_manticore import ManticoreCache
from .configuration_manticore import ManticoreConfig
from .forward_manticore import cut, pad, weighted_sum
from .sharing_manticore import SliceLayers, Tables, is_watched
from .slicing_manticore import run_view


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
            y = nn.functional.linear(x, self.weight, (bias_scale * self.bias).to(x.dtype))
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
    What one block hands to the next. `states[j]` is v_j, (batch, tokens, d_j), None where path j did not run;
    `projected[j]` its gated image in the stream, (batch, tokens, D), or None where no one needs it; `stream` is
    their sum where it is asked for. Behind the paths of the block follows what its skip path passes through. A tuple,
    so that hooks around a block (FSDP, device maps) find the tensors in it.
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


class Junction:
    """
    The plan of one junction, derived from the configuration alone (design: stems are block 0, heads block B + 1).

    Two single sides meet in a bridge, d_source -> d_target, or directly where the target continues the source. Else
    every source of a multi-path side has an out-projector d -> D, and every target an in-projector D -> d, as far as
    the gate uses them. A single source needs no out-projector: its state is padded. A skip path is no end of its own:
    what reaches its block is, with its weight, among the sources behind it too.

    Args:
        own: so many sources are the block's own; the others came through its skip path.
        paths: number of paths of the two blocks that meet here, skip paths included; one path has no gate.
        onward: the junction behind a target block with a skip path: the sources are sources there too.
    """

    def __init__(
        self,
        sources: list[End],
        targets: list[End],
        config: ManticoreConfig,
        is_end: bool,
        own: int | None = None,
        paths: tuple[int, int] | None = None,
        onward: "Junction | None" = None,
    ):
        self.sources, self.targets, self.onward = sources, targets, onward
        self.own = len(sources) if own is None else own
        self.gated = [count > 1 for count in paths or (len(sources), len(targets))]
        self.gate, self.width = config.gate, config.hidden_size
        self.single = len(sources) == 1 and len(targets) == 1
        self.direct = [
            [source.component == t.component and source.position == t.position for source in sources] for t in targets
        ]
        self.fixed = is_end and not config.project_ends and not self.single
        routed = self.gate == "routed"
        later = onward is not None and onward.has_out and self.gate != "mixture"  # where a lone source is padded
        self.has_out = not self.fixed and (len(sources) > 1 or later)
        self.has_in = [
            not self.fixed and not all(direct) if (routed or self.single) else not self.fixed for direct in self.direct
        ]

    @property
    def name(self) -> str:
        """How the two sides are joined, for a printed account."""
        if self.single:
            ends = f"{self.sources[0].width} -> {self.targets[0].width}"
            return f"bridge {ends}" if self.has_in[0] else "continues"
        return (f"gate {self.gate}" + ", plain" * self.fixed) if self.targets else "passes through"

    def out_projectors(self) -> list[Projector | None]:
        """Fresh out-projectors, one per source of the block itself."""
        learned = self.gate == "learned" and self.gated[0]
        return [Projector(s.width, self.width, learned) if self.has_out else None for s in self.sources[: self.own]]

    def in_projectors(self) -> list[Projector | None]:
        """Fresh in-projectors, one per target; a bridge maps from the source's own width."""
        learned = self.gate == "learned" and self.gated[1] and not self.single
        width = self.sources[0].width if self.single else self.width
        return [Projector(width, t.width, learned) if has else None for t, has in zip(self.targets, self.has_in)]

    def emit(
        self, states: list, weights: list, projectors: list, need_stream: bool, passed: Boundary | None = None, share=0
    ) -> Boundary:
        """
        Source side: gated images in the stream, (1 - g) W_out v + g pad(v), where needed; then what a skip path of
        weight `share` lets through.
        """
        everyone = need_stream or self.onward is not None or not (self.single or self.gate == "routed")
        used = [everyone or not (self.single or all(row[j] for row in self.direct)) for j in range(len(states))]
        projected = [
            self._image(state, weight, projector) if wanted and state is not None else None
            for state, weight, projector, wanted in zip(states, weights, projectors, used)
        ]
        if passed is not None:
            states, projected = states + list(passed.states), projected + list(passed.projected)
            weights = weights + [share * weight for weight in passed.weights]
        return Boundary(states, projected, weights, weighted_sum(weights, projected) if need_stream else None)

    def _image(self, state, weight, projector):
        padded = pad(state, self.width)
        if projector is None:
            return padded
        if self.gate in ("routed", "none") or not self.gated[0]:
            return projector(state)
        return projector(state, beside=padded, gate=None if self.gate == "learned" else weight)

    def receive(self, boundary: Boundary, projectors: list, gates: list, training: bool) -> list:
        """Target side: u_k for every target, (batch, tokens, d_k), None for those that do not run."""
        if self.single:
            state = boundary.states[0]
            return [projectors[0](state) if projectors[0] is not None else state]
        wanted = targets_that_run(gates, training)
        if self.gate == "routed" or not self.targets:
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
        there = [j for j, state in enumerate(boundary.states) if state is not None]
        own, rest = [j for j in there if direct[j]], [j for j in there if not direct[j]]
        weights, total = boundary.weights, None
        if rest:
            others = weighted_sum([weights[j] for j in rest], [boundary.projected[j] for j in rest], always=True)
            own_weight = sum((weights[j] for j, same in enumerate(direct) if same), 0.0)
            total = cut(others, width) if projector is None else projector(others, 1.0 - own_weight)
        if own:
            states = [boundary.states[j] for j in own]
            total = weighted_sum([weights[j] for j in own], states, always=True, beside=total)
        return total

    def _gated(self, stream, width, projector, gate):
        """u = (1 - g) W_in(h) + g cut(h)."""
        if projector is None:
            return cut(stream, width)
        if self.gate == "none" or not self.gated[1]:
            return projector(stream)
        return projector(stream, beside=cut(stream, width), gate=None if self.gate == "learned" else gate)


def stream_of(boundary: Boundary) -> torch.Tensor:
    """h = sum_j a_j projected_j, (batch, tokens, D); one tensor, for whoever reads it or goes on from it."""
    return weighted_sum(boundary.weights, boundary.projected) if boundary.stream is None else boundary.stream


def targets_that_run(weights: list, training: bool) -> list[bool]:
    """In evaluation not those of weight exactly 0; in a compiled graph, which cannot depend on the weights, all."""
    if training or torch.compiler.is_compiling():
        return [True] * len(weights)
    return [not isinstance(a, torch.Tensor) or bool(a != 0) for a in weights]


def junctions(config: ManticoreConfig) -> list[Junction]:
    """The B + 1 junctions of a hybrid: stems -> block 1, block b -> block b + 1, block B -> heads."""

    def end(component: int, position: tuple) -> End:
        return End(component, config.components[component].hidden_size, position)

    def exit_of(b: int, p: int) -> End:
        path = config.blocks[b][p]
        return end(path["component"], (path["stop"], config.ends_component(b, p)))

    stems = [end(k, (0, False)) for k in config.stem_components]
    heads = [end(k, (config.depth(k), not config.norm_in_head(k))) for k in config.head_components]
    own, targets = [stems], []
    for b, block in enumerate(config.blocks):
        targets.append([end(block[p]["component"], (block[p]["start"], False)) for p in config.real_paths(b)])
        own.append([exit_of(b, p) for p in config.real_paths(b)])
    sources, counts = [stems], [len(stems), *map(len, config.blocks), len(heads)]
    for b, ends in enumerate(own[1:]):
        sources.append(ends if config.skip_path(b) is None else ends + sources[-1])
    plan: list[Junction] = []
    for i in reversed(range(len(own))):
        onward = plan[0] if plan and config.skip_path(i) is not None else None
        ends = sources[i], [*targets, heads][i]
        plan.insert(
            0, Junction(*ends, config, i in (0, len(targets)), len(own[i]), (counts[i], counts[i + 1]), onward)
        )
    return plan


class ManticorePath(nn.Module):
    """One slice with its in-projector and out-projector, where the junctions on its two sides need them."""

    def __init__(self, view: PreTrainedModel, layers_name: str, before: Projector | None, after: Projector | None):
        super().__init__()
        self.slice, self.layers_path = view, layers_name.split(".")
        self.in_projector = before
        self.out_projector = after

    def owner_and_layers(self) -> tuple[nn.Module, SliceLayers]:
        """(What owns the layers in the component's own code, the layers.)"""
        owner, layers = None, self._modules["slice"]  # found for every token: attributes of modules are slow to ask
        for name in self.layers_path:
            owner, layers = layers, layers._modules[name]
        return owner, layers


class ManticoreBlock(nn.Module):
    """The paths that run side by side on one shared hidden state."""

    def __init__(self, config: ManticoreConfig, index: int, before: Junction, after: Junction, blueprints: list):
        super().__init__()
        self.index, self.before, self.after = index, before, after
        self.components = [path["component"] for path in config.blocks[index]]
        self.real, self.skip = config.real_paths(index), config.skip_path(index)
        entries, exits = iter(before.in_projectors()), iter(after.out_projectors())
        self.paths = nn.ModuleList()
        for p, path in enumerate(config.blocks[index]):
            if p == self.skip:
                self.paths.append(nn.Module())  # no component: the block passes on what reached it
                continue
            tail, blueprint = config.ends_component(index, p), blueprints[path["component"]]
            view = blueprint.view(path["start"], path["stop"], tail=tail)
            self.paths.append(ManticorePath(view, blueprint.layers_name, next(entries), next(exits)))
        count = len(self.paths)
        self.mixture = Mixture(count, config.mixture, config.mixture_temperature) if count > 1 else None
        self.is_between_single_sides = before.single and after.single and after.onward is None
        self.continues = index > 0 and before.name == "continues" and not any(before.gated)

    def mixture_weights(self) -> torch.Tensor:
        """
        The block's point of the simplex, shape (paths,), float32; [1.] for a block of one path. Where the model is
        sharded every process must ask, since the point is gathered.
        """
        if self.mixture is None:
            return torch.ones(1)
        point = self.mixture.weights_without_noise()
        return point.full_tensor() if hasattr(point, "full_tensor") else point

    def runs_alone(self) -> bool:
        """Whether this block of one path has to run by itself: somebody watches it."""
        path = self.paths._modules["0"]
        return is_watched(self) or is_watched(path._modules["slice"]) or is_watched(path.owner_and_layers()[0])

    def forward(
        self,
        boundary: Boundary,
        weights: list,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor,
        cache: ManticoreCache | None = None,
        need_stream: bool = False,
        routers: dict[int, list] | None = None,
        tables: Tables | None = None,
        begun: Sequence["ManticoreBlock"] = (),
    ) -> Boundary:
        """
        Boundary before the block -> boundary after it. Paths of weight exactly 0 are skipped in evaluation. `routers`
        collects the router logits of the components that are its keys; `tables` those of masks and rotary factors.
        `begun`: the blocks that this one continues, if their layers are to run here, too; then it is their boundary.
        """
        first, given = begun[0] if begun else self, (attention_mask, position_ids, cache, routers, tables, begun)
        if self.is_between_single_sides and first.before.single and not need_stream:
            bridge, state = first.paths._modules["0"].in_projector, boundary.states[0]
            return Boundary([self._run(0, state if bridge is None else bridge(state), *given)], [None], weights)
        paths, own = [self.paths[p] for p in self.real], [weights[p] for p in self.real]
        entries = [first.paths[p].in_projector for p in first.real]
        inputs, states = first.before.receive(boundary, entries, own, self.training), []
        for p, entry in zip(self.real, inputs):
            if cache is not None:
                cache.run_or_skip(self.index, p, entry is not None)
            states.append(None if entry is None else self._run(p, entry, *given))
        through = {} if self.skip is None else {"passed": boundary, "share": weights[self.skip]}
        return self.after.emit(states, own, [path.out_projector for path in paths], need_stream, **through)

    def _run(self, p, entry, attention_mask, position_ids, cache, routers, tables, begun):
        return run_view(
            self.paths._modules[str(p)].slice,
            inputs_embeds=entry,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=None if cache is None else cache.view(self.index, p, [block.index for block in begun]),
            router_logits=None if routers is None else routers.get(self.components[p]),
            tables=tables,
            lent=[layer for block in begun for layer in block.paths._modules["0"].owner_and_layers()[1].to_lend()],
        )


__all__ = ["Junction", "ManticoreBlock", "Mixture", "Projector"]
