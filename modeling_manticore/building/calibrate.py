"""Projectors in closed form: ridge regressions between hidden states, with no gradient step (design, section 4)."""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..forward_manticore import pad
from ..mixing_manticore import Junction, Projector, junctions
from ..progress import progress_bar
from .alignment import align_batches
from .ridge import Regression
from .states import Batch, ComponentStates, block_and_head_gates, boundaries, stem_and_block_gates
from .texts import batches_of


logger = logging.get_logger(__name__)

ORDERS = ("sequential", "parallel")
TARGETS = ("own", "transplanted")
HELD_OUT_EVERY = 8
TOKENS_PER_WIDTH = 20
SMALLEST_SHARE = 1e-3  # a projector whose gate leaves it less than this says nothing and is left alone


@dataclass
class ProjectorFit:
    """Fit of one projector: R^2 on held-out tokens, the ridge strength chosen, and the tokens used."""

    projector: str
    fit: float
    strength: float
    tokens: int


@dataclass
class CalibrationReport:
    """
    What `calibrate` did: one `ProjectorFit` per fitted projector, the tokens read, and the share of them at which a
    component with another tokenizer has a token that ends there too, where its own tokens gave the targets.
    """

    order: str
    tokens: int = 0
    fits: list[ProjectorFit] = field(default_factory=list)
    matched: dict[int, float] = field(default_factory=dict)

    def __str__(self) -> str:
        width = max([len(fit.projector) for fit in self.fits] + [len("projector")])
        lines = [f"{'projector':<{width}}  held-out fit  strength  tokens"]
        lines += [f"{f.projector:<{width}}  {f.fit:12.4f}  {f.strength:8.0e}  {f.tokens:6d}" for f in self.fits]
        lines += [f"component {k}: {share:.1%} of the tokens matched" for k, share in self.matched.items()]
        return "\n".join(lines)


@dataclass
class Problem:
    """
    One projector to fit: `pair` gives its input and target states of a batch, (batch, tokens, width) each. Only the
    tokens count that component `aligned_with` has matched, if one is named.
    """

    name: str
    projector: Projector
    pair: Callable[[Any], tuple[torch.Tensor, torch.Tensor]]
    aligned_with: int | None = None


def calibrate(
    model: PreTrainedModel,
    texts: Any,
    tokenizer: Any = None,
    *,
    order: str = "sequential",
    batch_size: int = 8,
    progress: bool = True,
    components: PreTrainedModel | list[PreTrainedModel] | None = None,
    tokenizers: list | None = None,
    targets: str | None = None,
) -> CalibrationReport:
    """
    Fit all projectors of a hybrid by ridge regression on ordinary text, in place.

    In a supernet the stream becomes the hidden space of a reference component (the widest, then the first):
    out-projectors map each component's states to the reference's at the same boundary, in-projectors back, each inside
    its gated formula at the current mixture weights. In a discretized hybrid each bridge maps the states of the hybrid
    itself, all earlier bridges in place, to the next component's own states (`order="sequential"`, a pass each), or
    the previous component's own states (`order="parallel"`, one pass in all).

    Args:
        texts: LongTensor (rows, tokens), rows of ids, strings, or a `datasets.Dataset`; a few hundred rows.
        tokenizer: for strings; by default that of the hybrid's tokenizer component.
        components: the uncut components (a list of models, or a supernet of them), for a hybrid that holds them in
            part only; by default those are loaded from their recorded sources.
        tokenizers: of the components, for those whose vocabulary was transplanted: a list with a tokenizer, name,
            folder or None each; by default those of their recorded sources.
        targets: what a component whose vocabulary was transplanted says the target is: "own", its states when it reads
            the text in its own tokenization (strings only), at the positions where tokens of both end at one byte; or
            "transplanted", its states on the hybrid's tokens. By default "own" where the texts are strings and the
            uncut component and its tokenizer are given or recorded.

    Returns:
        The held-out fit and chosen strength of every projector. Memory holds the activations of one batch only.

    Raises:
        ValueError: bad texts or options, or component states that cannot be had. Nothing has been changed then.
    """
    if order not in ORDERS:
        raise ValueError(f"order: got {order!r}, allowed are {', '.join(map(repr, ORDERS))}.")
    if targets is not None and targets not in TARGETS:
        raise ValueError(f"targets: got {targets!r}, allowed are {', '.join(map(repr, TARGETS))} and None.")
    count = len(model.config.components)
    if tokenizers is not None and (not isinstance(tokenizers, (list, tuple)) or len(tokenizers) != count):
        given = len(tokenizers) if isinstance(tokenizers, (list, tuple)) else type(tokenizers).__name__
        raise ValueError(f"tokenizers: got {given}, allowed is a list of {count}, one per component.")
    batches = batches_of(texts, model, tokenizer, batch_size)
    uncut = list(components) if isinstance(components, (list, tuple)) else None
    supernet = components if uncut is None else None
    states = ComponentStates(model.config, [model] if supernet is None else [supernet, model], uncut, tokenizers)
    plan = junctions(model.config)
    sequential = order == "sequential" and model.config.is_discretized
    joined = [j for j in plan if any(j.has_in) or j.has_out]
    wanted = {end.component for j in joined for end in j.targets}
    inputs = set() if sequential else {end.component for j in joined for end in j.sources}
    if not sequential and any(not j.single for j in joined):
        wanted.add(_reference(model.config))
        inputs.add(_reference(model.config))
    report = CalibrationReport("sequential" if sequential else "parallel")
    reads_own = {k for k in wanted if states.is_transplanted(k)} if targets != "transplanted" else set()
    if targets is None:
        reads_own = {k for k in reads_own if batches[0].texts is not None and states.can_read_own(k, tokenizer)}
    report.matched = align_batches(batches, states, reads_own, tokenizer)
    states.check(inputs | {k for k in wanted if k not in report.matched})
    report.tokens = sum(batch.tokens(batch.input_ids[..., None]).shape[0] for batch in batches)
    was_training = model.training
    model.eval()
    try:
        if sequential:
            steps = _bridge_steps(model, plan, states, report.matched)
        else:
            steps = [_parallel_problems(model, plan, states, report.matched)]
        for problems in steps:
            if problems:
                report.fits += _fit(problems, batches, report.tokens, progress)
    finally:
        model.train(was_training)
    return report


@torch.no_grad()
def _fit(problems: list[Problem], batches: list[Batch], tokens: int, progress: bool) -> list[ProjectorFit]:
    """One pass over the text for all given projectors, then solve and write them."""
    _warn_of_little_text(problems, tokens)
    regressions = [Regression(p.in_features, p.out_features, p.weight.device) for p in (q.projector for q in problems)]
    every = min(HELD_OUT_EVERY, len(batches))
    for i, batch in enumerate(progress_bar(batches, desc="calibrating", unit="batch", show=progress, leave=False)):
        memory: dict = {}
        for problem, regression in zip(problems, regressions):
            x, y = (batch.tokens(side, problem.aligned_with) for side in problem.pair((batch, memory)))
            regression.add(x, y, held_out=i % every == every - 1)
    fits = []
    for problem, regression in zip(problems, regressions):
        solution = regression.solve()
        problem.projector.weight.copy_(solution.weight)
        problem.projector.bias.copy_(solution.bias)
        fits.append(ProjectorFit(problem.name, solution.fit, solution.strength, solution.tokens))
    return fits


def _warn_of_little_text(problems: list[Problem], tokens: int) -> None:
    short = [problem for problem in problems if tokens < TOKENS_PER_WIDTH * problem.projector.in_features]
    if short:
        width = max(problem.projector.in_features for problem in short)
        others = f" and {len(short) - 1} more" if len(short) > 1 else ""
        logger.warning(
            f"{short[0].name}{others}: calibrated on {tokens} tokens, fewer than {TOKENS_PER_WIDTH} times the width "
            f"{width}; use at least {TOKENS_PER_WIDTH * width} tokens of text."
        )


def _bridge_steps(
    model: PreTrainedModel, plan: list[Junction], states: ComponentStates, aligned: Collection[int]
) -> Iterator[list[Problem]]:
    """Bridges in order of depth: from the hybrid's own state to the next component's own state."""
    for index, junction in enumerate(plan):
        if not any(junction.has_in):
            continue
        target = junction.targets[0]

        def pair(given, index=index, target=target):
            batch, _ = given
            run = states.run_own if target.component in batch.own else states.run
            for i, boundary in enumerate(boundaries(model, batch)):
                if i == index:
                    position = target.position
                    return boundary.states[0], run(target.component, batch, [position])[position]

        name, projector = in_projectors_of(model, index)[0]
        yield [Problem(name, projector, pair, target.component if target.component in aligned else None)]


def _parallel_problems(
    model: PreTrainedModel, plan: list[Junction], states: ComponentStates, aligned: Collection[int]
) -> list[Problem]:
    """
    Every projector from the components' own states, all in one pass; identity where nothing has to be mapped. Inputs
    are states on the hybrid's tokens; so are targets, but for components in `aligned`.
    """
    config = model.config
    reference = _reference(config)
    wanted: dict[tuple[int, bool], set] = {}

    def own(component: int, position: tuple, target: bool = False):
        key = component, target and component in aligned
        wanted.setdefault(key, set()).add(position)

        def read(given):
            batch, memory = given
            if key not in memory:
                memory[key] = (states.run_own if key[1] else states.run)(component, batch, wanted[key])
            return memory[key][position]

        return read

    def fit_to(component: int) -> int | None:
        return component if component in aligned else None

    problems = []
    source_gates, target_gates = stem_and_block_gates(model), block_and_head_gates(model)
    for index, junction in enumerate(plan):
        position = _reference_position(config, reference, index)
        outs, ins = out_projectors_of(model, index), in_projectors_of(model, index)
        for j, source in enumerate(junction.sources[: junction.own]):
            if outs[j] is None:
                continue
            if (source.component, source.position) == (reference, position):
                _set_identity(outs[j][1])
                continue
            gate = _gate(junction, outs[j][1], source_gates[index][j], gated=junction.gated[0])
            if 1 - gate >= SMALLEST_SHARE:
                read, target = own(source.component, source.position), own(reference, position, target=True)
                pair = _ungated(read, target, gate, junction.width)
                problems.append(Problem(*outs[j], pair, fit_to(reference)))
        stream = (
            own(reference, position)
            if junction.has_out and not junction.single
            else own(junction.sources[0].component, junction.sources[0].position)
        )
        for t, target in enumerate(junction.targets):
            if ins[t] is None:
                continue
            at_reference = (target.component, target.position) == (reference, position)
            if junction.has_out and not junction.single and at_reference:
                _set_identity(ins[t][1])
                continue
            gate = _gate(junction, ins[t][1], target_gates[index][t], gated=junction.gated[1] and not junction.single)
            if 1 - gate >= SMALLEST_SHARE:
                width = ins[t][1].in_features
                wished = own(target.component, target.position, target=True)
                pair = _ungated(_padded(stream, width), wished, gate, target.width)
                problems.append(Problem(*ins[t], pair, fit_to(target.component)))
    return problems


def _ungated(read: Callable, target: Callable, gate: float, width: int) -> Callable:
    """Solve (1 - g) W x + g shape(x) = y for W: the pair (x, (y - g shape(x)) / (1 - g)), y padded to `width`."""

    def pair(given):
        x, y = read(given), pad(target(given), width)
        if gate:
            shaped = pad(x, width)[..., :width]
            y = (y - gate * shaped) / (1 - gate)
        return x, y

    return pair


def _padded(read: Callable, width: int) -> Callable:
    return lambda given: pad(read(given), width)


def _gate(junction: Junction, projector: Projector, weight: float, gated: bool) -> float:
    if not gated or junction.gate in ("routed", "none"):
        return 0.0
    return projector.strength().item() if junction.gate == "learned" else float(weight)


def _reference(config) -> int:
    """The component whose hidden space the stream takes: the widest, then the first."""
    return max(config.used_components, key=lambda k: (config.components[k].hidden_size, -k))


def _reference_position(config, reference: int, boundary: int) -> tuple[int, bool]:
    """Where the reference component stands at a boundary (0: after the stems, b: after block b)."""
    depth, blocks = config.depth(reference), len(config.blocks)
    if boundary > 0:
        for p in config.real_paths(boundary - 1):
            path = config.blocks[boundary - 1][p]
            if path["component"] == reference:
                return path["stop"], config.ends_component(boundary - 1, p)
    layer = math.floor(depth * boundary / blocks + 0.5)
    return layer, layer == depth and not config.norm_in_head(reference)


@torch.no_grad()
def _set_identity(projector: Projector) -> None:
    projector.weight.copy_(torch.eye(projector.out_features, projector.in_features))
    projector.bias.zero_()


def in_projectors_of(model: PreTrainedModel, junction: int) -> list[tuple[str, Projector] | None]:
    """(name, module) of the in-projectors of a junction, None where a target has none."""
    config = model.config
    if junction < len(config.blocks):
        block = model.trunk.blocks[junction]
        found = [(f"blocks.{junction}.paths.{p}.in_projector", block.paths[p].in_projector) for p in block.real]
    else:
        table = getattr(model, "head_projectors", {})
        found = [(f"head_projectors.{k}", table[str(k)] if str(k) in table else None) for k in config.head_components]
    return [pair if pair[1] is not None else None for pair in found]


def out_projectors_of(model: PreTrainedModel, junction: int) -> list[tuple[str, Projector] | None]:
    """(name, module) of the out-projectors of a junction's own sources, None where one has none."""
    trunk = model.trunk
    if junction == 0:
        found = [
            (f"stem_projectors.{k}", trunk.stem_projectors[str(k)] if str(k) in trunk.stem_projectors else None)
            for k in model.config.stem_components
        ]
    else:
        block = trunk.blocks[junction - 1]
        found = [(f"blocks.{junction - 1}.paths.{p}.out_projector", block.paths[p].out_projector) for p in block.real]
    return [pair if pair[1] is not None else None for pair in found]
