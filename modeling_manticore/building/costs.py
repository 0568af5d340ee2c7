"""
What a discrete hybrid of a supernet costs, without building it, and the limits that a user may set.

Every cost of a choice p_1 .. p_B (one path index per block) is a sum over blocks, neighbours and the two ends,

    cost(p) = sum_b node_b[p_b] + sum_b,c edge_b,c[p_b, p_c] + ends[p_1, p_B]

(slices with the stem, the head and their bridges; bridges between neighbours b < c, which have nothing but skip paths
kept between them; a matrix that stem and head share). So the expectation under mixture weights a_b, paths drawn
independently, is the same sum of sum_p a_b,p node_b[p] and so on: exact, and differentiable in the mixture weights. In
the first and last block, where a skip path is never kept, the weights are renormalised without it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from ..cache_manticore import cache_bytes
from ..mixing_manticore import End, Junction, Projector, junctions


COST_KINDS = ("attention_blocks", "parameters", "cache_bytes_per_token", "flops_per_token")
DEFAULT_CONTEXT = 2048
STATE_FLOPS = (
    6  # of a recurrent state's entry per token: decay, input, read-out, a multiplication and an addition each
)


@dataclass(frozen=True)
class Budget:
    """
    Hard limits of a discrete hybrid; None is no limit.

    Args:
        max_attention_blocks: blocks of the supernet whose kept path has a layer that caches keys and values.
        max_parameters: parameters of the discretized hybrid, shared matrices counted once.
        max_cache_bytes_per_token: bytes that keys and values of full attention grow by per token.
        max_flops_per_token: floating-point operations of one token's forward pass at the context of the cost table.
        min_components: different components that must have a kept path; 2 forbids a cut of one component alone.

    Raises:
        ValueError: a limit is not a number >= 0, or min_components no integer >= 1.
    """

    max_attention_blocks: int | None = None
    max_parameters: int | None = None
    max_cache_bytes_per_token: int | None = None
    max_flops_per_token: float | None = None
    min_components: int | None = None

    def __post_init__(self):
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf")
            ):
                raise ValueError(f"{entry.name}: got {value!r}, allowed is None or a finite number >= 0.")
        least = self.min_components
        if least is not None and (not isinstance(least, int) or least < 1):
            raise ValueError(f"min_components: got {least!r}, allowed is None or an integer >= 1.")

    def limits(self) -> dict[str, float]:
        """Cost kind -> upper limit, of those that are set."""
        values = {kind: getattr(self, f"max_{kind}") for kind in COST_KINDS}
        return {kind: value for kind, value in values.items() if value is not None}

    def stated(self) -> dict[str, float]:
        """`limits`, and min_components where it is set: what reports tell."""
        least = {} if self.min_components is None else {"min_components": self.min_components}
        return self.limits() | least

    def allows(self, costs: dict[str, float]) -> bool:
        """Whether costs (kind -> value) are within every upper limit; `CostTable.within` looks at all of a choice."""
        return all(costs[kind] <= limit for kind, limit in self.limits().items())


@dataclass
class Terms:
    """
    One additive function of a choice: `nodes[b]` (P_b,), `edges[b, c]` (P_b, P_c) for blocks b < c between which all
    may be skipped, `ends` (P_1, P_B), float64; `skips[b]` is the index of the skip path of a block, or None.
    """

    nodes: list[torch.Tensor]
    edges: dict[tuple[int, int], torch.Tensor]
    ends: torch.Tensor
    skips: list[int | None]

    def of(self, choice: Sequence[int]) -> float:
        """The value of one choice."""
        total = sum(float(node[p]) for node, p in zip(self.nodes, choice))
        kept = [b for b, p in enumerate(choice) if p != self.skips[b]]
        total += sum(float(self.edges[b, c][choice[b], choice[c]]) for b, c in zip(kept, kept[1:]))
        return total + float(self.ends[choice[0], choice[-1]])

    def expected(self, weights: list[torch.Tensor]) -> torch.Tensor:
        """The expectation, a scalar, when the path of block b is drawn from `weights[b]` (P_b,), independently."""
        last = len(weights) - 1
        weights = [self._without_skip(b, a) if b in (0, last) else a for b, a in enumerate(weights)]
        terms = [a @ node.to(a) for a, node in zip(weights, self.nodes)]
        for (b, c), edge in self.edges.items():
            term = weights[b] @ edge.to(weights[b]) @ weights[c]
            for m in range(b + 1, c):
                term = term * weights[m][self.skips[m]]
            terms.append(term)
        first, last = weights[0], weights[-1]
        terms.append(
            first @ self.ends.to(first) @ last if len(weights) > 1 else first @ self.ends.to(first).diagonal()
        )
        return torch.stack(terms).sum()

    def _without_skip(self, b: int, weights: torch.Tensor) -> torch.Tensor:
        if self.skips[b] is None:
            return weights
        real = torch.arange(len(weights), device=weights.device) != self.skips[b]
        return weights * real / (weights * real).sum()

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Terms":
        """The terms with every tensor changed."""
        edges = {pair: change(edge) for pair, edge in self.edges.items()}
        return Terms([change(node) for node in self.nodes], edges, change(self.ends), self.skips)


@dataclass
class CostTable:
    """
    The costs of all choices of a supernet: `terms[kind]` for the four kinds; the component of every path of every
    block, None of a skip path.
    """

    context: int
    terms: dict[str, Terms]
    components: list[list[int | None]]

    @property
    def paths(self) -> list[int]:
        """Number of paths of every block."""
        return [len(node) for node in self.terms["parameters"].nodes]

    @property
    def skips(self) -> list[int | None]:
        """The skip path of every block, or None."""
        return self.terms["parameters"].skips

    def of(self, choice: Sequence[int]) -> dict[str, float]:
        """
        Costs of a choice (one path index per block): attention blocks, parameters, KV-cache bytes per token, FLOPs per
        token. The first three are exact integers.
        """
        costs = {kind: terms.of(choice) for kind, terms in self.terms.items()}
        return {kind: round(value) for kind, value in costs.items()}

    def components_of(self, choice: Sequence[int]) -> list[int]:
        """The different components that a choice keeps a path of, rising."""
        return sorted({own[p] for own, p in zip(self.components, choice)} - {None})

    def within(self, choice: Sequence[int], budget: Budget | None) -> bool:
        """Whether a choice meets a budget; any meets None."""
        if budget is None:
            return True
        return len(self.components_of(choice)) >= (budget.min_components or 1) and budget.allows(self.of(choice))


def cost_table(model: PreTrainedModel, context: int | None = None) -> CostTable:
    """
    Count what every path, bridge, stem and head of a supernet costs.

    FLOPs of a token are those at the end of a context of `context` tokens: 2 per entry of every matrix that multiplies
    (of experts, the share that is active), 4 * heads * head width * tokens attended to in an attention layer, and 6
    per entry of the state of a recurrent layer where its configuration tells the size. Norms and activations are left
    out.

    Args:
        context: tokens; by default the model's own limit, at most 2048.

    Raises:
        ValueError: the context is not a positive integer within the model's limit.
    """
    config = model.config
    allowed = config.max_position_embeddings
    context = min(allowed or DEFAULT_CONTEXT, DEFAULT_CONTEXT) if context is None else context
    if isinstance(context, bool) or not isinstance(context, int) or context < 1 or (allowed and context > allowed):
        limit = f"1..{allowed}" if allowed else "a positive integer"
        raise ValueError(f"context: got {context!r}, allowed is {limit}.")
    plan = junctions(config)
    terms = {kind: _empty(config) for kind in COST_KINDS}
    _add_slices(model, terms, context)
    for b, c in terms["parameters"].edges:
        for p, source in zip(config.real_paths(b), plan[b + 1].sources):
            for q, target in zip(config.real_paths(c), plan[c].targets):
                _add_bridge(terms, source, target, config, lambda t, b=b, c=c, p=p, q=q: (t.edges[b, c], (p, q)))
    _add_ends(model, terms, plan)
    return CostTable(context, terms, [[path["component"] for path in block] for block in config.blocks])


def expected_cost(
    model: PreTrainedModel, kind: str, table: CostTable | None = None, weights: list[torch.Tensor] | None = None
) -> torch.Tensor:
    """
    Expected cost, a float32 scalar, of the hybrid whose path in block b is drawn from the mixture weights a_b;
    differentiable in them. Divide by `largest(table, kind)` for a term without units.

    Args:
        table: the model's `cost_table`, if it is already there.
        weights: B points of the simplex in place of the model's own.

    Raises:
        ValueError: there is no cost of that kind.
    """
    check_kind(kind)
    table = cost_table(model) if table is None else table
    own = [block.mixture_weights() for block in model.trunk.blocks] if weights is None else weights
    return table.terms[kind].expected(own)


def running_flops(model: PreTrainedModel, context: int) -> int:
    """
    FLOPs of one token through a model as it stands, every path of a supernet and every projector included, counted as
    in `cost_table`; of a discretized hybrid it is the same number.
    """
    terms = {kind: _empty(model.config) for kind in COST_KINDS}
    _add_slices(model, terms, context)
    total = sum(float(node.sum()) for node in terms["flops_per_token"].nodes)
    total += sum(_stem_flops(stem) for stem in model.trunk.stems.values())
    for k, head in getattr(model, "heads", {}).items():
        total += _matrix_flops(head, model.config.components[int(k)])
    return round(total + sum(2 * m.weight.numel() for m in model.modules() if isinstance(m, Projector)))


def largest(table: CostTable, kind: str) -> float:
    """An upper bound of the costs of all choices: the dearest path of every block and the dearest bridges."""
    terms = table.terms[kind]
    total = sum(float(part.max()) for part in [*terms.nodes, terms.ends])
    for c in range(1, len(terms.nodes)):
        total += max(float(edge.max()) for (_, after), edge in terms.edges.items() if after == c)
    return max(1.0, total)


def check_kind(kind: Any, field: str = "kind") -> None:
    """
    Raises:
        ValueError: there is no cost of that kind.
    """
    if kind not in COST_KINDS:
        raise ValueError(f"{field}: got {kind!r}, allowed are {', '.join(map(repr, COST_KINDS))}.")


def _empty(config) -> Terms:
    zeros, paths = {"dtype": torch.float64}, [len(block) for block in config.blocks]
    skips = [config.skip_path(b) for b in range(len(paths))]
    edges = {}
    for c in range(1, len(paths)):
        for b in reversed(range(c)):
            edges[b, c] = torch.zeros(paths[b], paths[c], **zeros)
            if skips[b] is None:
                break
    return Terms([torch.zeros(n, **zeros) for n in paths], edges, torch.zeros(paths[0], paths[-1], **zeros), skips)


def _add_slices(model: PreTrainedModel, terms: dict[str, Terms], context: int) -> None:
    config = model.config
    for b, block in enumerate(model.trunk.blocks):
        for p in block.real:
            path, spec = block.paths[p], config.blocks[b][p]
            component = config.components[spec["component"]]
            layers = DynamicCache(config=component).layers[spec["start"] : spec["stop"]]
            flops = _matrix_flops(path.slice, component)
            flops += sum(
                _attention_flops(layer, component, context) + _state_flops(layer, component) for layer in layers
            )
            terms["attention_blocks"].nodes[b][p] += any(_caches_keys(layer) for layer in layers)
            terms["parameters"].nodes[b][p] += count(path.slice)
            terms["cache_bytes_per_token"].nodes[b][p] += cache_bytes(config, spec, model.dtype.itemsize)
            terms["flops_per_token"].nodes[b][p] += round(flops)


def _add_ends(model: PreTrainedModel, terms: dict[str, Terms], plan: list[Junction]) -> None:
    """Stems, heads, the bridges to and from them, shared matrices, and parameters of no component (a classifier)."""
    config, trunk = model.config, model.trunk
    heads = getattr(model, "heads", {})
    last = len(config.blocks) - 1
    own = count(model) - count(trunk) if not heads else 0
    stems = {source.component: source for source in plan[0].sources}
    for p, target in zip(config.real_paths(0), plan[0].targets):
        k = target.component
        terms["parameters"].nodes[0][p] += count(trunk.stems[str(k)]) + own
        terms["flops_per_token"].nodes[0][p] += _stem_flops(trunk.stems[str(k)])
        _add_bridge(terms, stems[k], target, config, lambda t, p=p: (t.nodes[0], p))
    for p, source in zip(config.real_paths(last), plan[last + 1].sources):
        k = source.component
        if str(k) not in heads:
            continue
        head, component = heads[str(k)], config.components[k]
        terms["parameters"].nodes[last][p] += count(head)
        terms["flops_per_token"].nodes[last][p] += round(_matrix_flops(head, component))
        end = End(k, component.hidden_size, (config.depth(k), not config.norm_in_head(k)))
        _add_bridge(terms, source, end, config, lambda t, p=p: (t.nodes[last], p))
        for q, first in enumerate(config.blocks[0]):
            if first["component"] == k:
                shared = {id(x) for x in trunk.stems[str(k)].parameters()}
                terms["parameters"].ends[q, p] -= sum(x.numel() for x in head.parameters() if id(x) in shared)


def _add_bridge(terms: dict[str, Terms], source: End, target: End, config, place) -> None:
    """Add the bridge between two ends, if they need one: a matrix (d_target, d_source) and a bias (d_target,)."""
    if Junction([source], [target], config, False).has_in[0]:
        matrix = source.width * target.width
        for kind, value in (("parameters", matrix + target.width), ("flops_per_token", 2 * matrix)):
            tensor, index = place(terms[kind])
            tensor[index] += value


def count(module: nn.Module) -> int:
    """Parameters of a module, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _matrix_flops(module: nn.Module, component) -> float:
    """2 per entry of everything that multiplies a token's state; of experts, the active share."""
    total = 0.0
    experts = next(
        (n for f in ("num_experts", "num_local_experts", "n_routed_experts") if (n := getattr(component, f, None))),
        None,
    )
    active = getattr(component, "num_experts_per_tok", None)
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2:
            continue
        share = 1.0
        if experts and active and "experts" in name and "shared" not in name and parameter.ndim == 3:
            share = active / experts
        total += 2 * share * parameter.numel()
    return total


def _stem_flops(stem: PreTrainedModel) -> float:
    """Looking rows up costs nothing; projections of embeddings (opt-350m) do."""
    tables = {id(p) for m in stem.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return sum(2.0 * p.numel() for p in stem.parameters() if p.ndim == 2 and id(p) not in tables)


def _caches_keys(layer) -> bool:
    """Whether a cache layer of transformers holds keys and values: attention of any window."""
    name = type(layer).__name__
    return name.startswith("Dynamic") or "FullAttention" in name


def _attention_flops(layer, component, context: int) -> float:
    if not _caches_keys(layer):
        return 0.0
    window = getattr(layer, "sliding_window", None)
    heads = component.num_attention_heads
    width = getattr(component, "head_dim", None) or component.hidden_size // heads
    return 4.0 * heads * width * (min(context, window) if window else context)


def _state_flops(layer, component) -> float:
    """6 per entry of the state of a state-space layer; 0 where the configuration does not tell its size."""
    if "LinearAttention" not in type(layer).__name__:
        return 0.0
    state = next(
        (n for f in ("state_size", "mamba_d_state", "ssm_state_size") if (n := getattr(component, f, None))), None
    )
    heads = next((n for f in ("mamba_n_heads", "mamba_num_heads") if (n := getattr(component, f, None))), None)
    width = next(
        (n for f in ("mamba_d_head", "mamba_head_dim") if isinstance(n := getattr(component, f, None), int)), None
    )
    inner = heads * width if heads and width else _expansion(component) * component.hidden_size
    return STATE_FLOPS * float(inner) * state if state else 0.0


def _expansion(component) -> float:
    return next((n for f in ("expand", "mamba_expand") if (n := getattr(component, f, None))), 2)
