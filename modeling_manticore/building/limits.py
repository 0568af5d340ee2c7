"""The best choice under hard limits, exactly: dynamic programming over blocks with undominated labels."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from .costs import Budget, CostTable, Terms


Allowed = list[Sequence[int]]  # the path indices that each block may use


def best_choice(
    table: CostTable, budget: Budget | None, score: Terms, allowed: Allowed | None = None
) -> list[int] | None:
    """
    argmax of an additive score over all choices within the budget, or None if there is none; of equal ones any.

    Partial choices with the same first and last component path, and the same components while those are too few,
    differ from here on by what they have spent and scored alone, so only those are kept that no other beats in both.
    Exact whatever the limits; for few distinct costs a block (cuts of equal size) the number of labels stays small.

    Args:
        score: its `nodes`, `edges`, `ends` as in `Terms`; -inf forbids.
        allowed: path indices that each block may use; by default all.
    """
    limits = {} if budget is None else budget.limits()
    terms = [table.terms[kind] for kind in limits]
    paths = [range(n) for n in table.paths] if allowed is None else allowed
    rest = [_least_rest(term, paths) for term in terms]
    bounds = list(limits.values())
    wanted = 1 if budget is None else budget.min_components or 1
    labels: dict[tuple, list] = {}  # first path, last block with a component, path there, components while too few
    for p in paths[0]:
        labels[p, 0, p, _seen(frozenset(), table.components[0][p], wanted)] = [
            (tuple(float(t.nodes[0][p]) for t in terms), float(score.nodes[0][p]), (p,))
        ]
    for b in range(1, len(paths)):
        grown: dict[tuple, list] = {}
        for (first, at, p, seen), entries in labels.items():
            for q in paths[b]:
                skipped = q == table.skips[b]
                now = _seen(seen, table.components[b][q], wanted)
                state = (first, at, p, now) if skipped else (first, b, q, now)
                step = [float(t.nodes[b][q] + (0 if skipped else t.edges[at, b][p, q])) for t in terms]
                gain = float(score.nodes[b][q] + (0 if skipped else score.edges[at, b][p, q]))
                for spent, value, choice in entries:
                    cost = tuple(s + c for s, c in zip(spent, step))
                    if all(c + r[b] <= limit for c, r, limit in zip(cost, rest, bounds)):
                        grown.setdefault(state, []).append((cost, value + gain, (*choice, q)))
        labels = {state: _undominated(entries) for state, entries in grown.items()}
    best, best_value = None, -math.inf
    for (first, _, last, seen), entries in labels.items():
        for spent, value, choice in entries:
            cost = [s + float(t.ends[first, last]) for s, t in zip(spent, terms)]
            value = value + float(score.ends[first, last])
            enough = seen is None and all(c <= limit for c, limit in zip(cost, bounds))
            if enough and value > best_value:
                best, best_value = list(choice), value
    return best


def _seen(seen: frozenset | None, component: int | None, wanted: int) -> frozenset | None:
    """The components so far; None where they are as many as are wanted."""
    if seen is None:
        return None
    seen = seen if component is None else seen | {component}
    return None if len(seen) >= wanted else seen


def smallest(table: CostTable, kind: str, budget: Budget | None = None, allowed: Allowed | None = None) -> int | None:
    """The least cost of a kind over the choices within a budget (None: over all); None if no choice is within it."""
    terms = table.terms[kind]
    choice = best_choice(table, budget, terms.map(torch.neg), allowed)
    return None if choice is None else table.of(choice)[kind]


def check_feasible(table: CostTable, budget: Budget | None, allowed: Allowed | None = None) -> None:
    """
    Raises:
        ValueError: no choice is within the budget; for every limit at fault, the smallest feasible value, given the
            other limits (of min_components the largest).
    """
    if budget is None or best_choice(table, budget, zeros_like(table), allowed) is not None:
        return
    limits, wanted = budget.limits(), budget.min_components
    for fewer in range(wanted or 1, 0, -1):  # as many as there are, whatever they cost
        if best_choice(table, Budget(min_components=fewer), zeros_like(table), allowed) is not None:
            break
    if wanted is not None and fewer < wanted:
        raise ValueError(f"min_components: got {wanted}, the largest feasible value is {fewer}.")
    alone = {kind: smallest(table, kind, Budget(min_components=wanted), allowed) for kind in limits}
    faults = [
        f"max_{kind}: got {limit}, the smallest feasible value is {alone[kind]}"
        for kind, limit in limits.items()
        if alone[kind] > limit
    ]
    if not faults:
        for kind, limit in limits.items():
            kept = {f"max_{other}": value for other, value in limits.items() if other != kind}
            others = Budget(**kept, min_components=wanted)
            least = smallest(table, kind, others, allowed)
            if least is not None:
                faults.append(
                    f"max_{kind}: got {limit}, the smallest feasible value under the other limits is {least}"
                )
    if not faults:  # three or more limits, of which no two can be met together
        faults = [
            f"max_{kind}: got {limit}, the smallest feasible value alone is {alone[kind]}"
            for kind, limit in limits.items()
        ]
    of = "" if wanted in (None, 1) else f" of {wanted} components"
    raise ValueError(f"budget: no discrete hybrid{of} is within it; " + "; ".join(faults) + ".")


def argmax_under(
    table: CostTable, weights: list[torch.Tensor], budget: Budget | None, allowed: Allowed | None = None
) -> list[int]:
    """
    The choice of the largest product of mixture weights within the budget. Weights of exactly 0 count as 1e-300.

    Raises:
        ValueError: no choice is within the budget; names the smallest feasible value.
    """
    check_feasible(table, budget, allowed)
    nodes = [point.detach().double().cpu().clamp_min(1e-300).log() for point in weights]
    plain = zeros_like(table)
    return best_choice(table, budget, replace(plain, nodes=nodes), allowed)


def zeros_like(table: CostTable) -> Terms:
    """The score that likes every choice alike."""
    return next(iter(table.terms.values())).map(torch.zeros_like)


def _least_rest(terms: Terms, paths: Allowed) -> list[float]:
    """A lower bound, after each block, of what the later blocks and the ends add."""
    rest = [float(terms.ends.min())]
    for b in range(len(paths) - 1, 0, -1):
        into = [edge for (_, after), edge in terms.edges.items() if after == b]
        bridges = {q: 0.0 if q == terms.skips[b] else min(float(edge[:, q].min()) for edge in into) for q in paths[b]}
        least = min(float(terms.nodes[b][q]) + bridges[q] for q in paths[b])
        rest.append(rest[-1] + least)
    return rest[::-1]


def _undominated(entries: list) -> list:
    """Labels (costs, value, choice) that no other label beats or equals in every cost and in value."""
    kept: list = []
    for entry in sorted(entries, key=lambda e: (-e[1], e[0])):
        if not any(all(a <= b for a, b in zip(other[0], entry[0])) for other in kept):
            kept.append(entry)
    return kept
