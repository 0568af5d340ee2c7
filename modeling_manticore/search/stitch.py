"""Training-free search: calibrate bridges in closed form, score discrete hybrids on held-out text, rank them."""

import itertools
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ..building.calibrate import ORDERS
from ..building.costs import Budget, CostTable, cost_table
from ..building.discretize import usable_paths
from ..building.limits import best_choice, check_feasible, zeros_like
from ..building.states import Batch
from ..building.texts import batches_of
from ..progress import progress_bar
from .halving import HalvingOptions, halve
from .history import path_owners
from .slices import Choice, SliceRunner
from .stitch_report import Candidate, StitchReport, slices_of


logger = logging.get_logger(__name__)


def stitch(
    model: PreTrainedModel,
    calibration_texts: Any,
    score_texts: Any,
    tokenizer: Any = None,
    *,
    limit: int = 256,
    beam: int = 8,
    keep: int = 5,
    order: str = "parallel",
    budget: Budget | None = None,
    halving: bool | HalvingOptions = False,
    folder: str | Path | None = None,
    batch_size: int = 8,
    context: int | None = None,
    progress: bool = True,
) -> StitchReport:
    """
    Search the discrete hybrids of a supernet without training.

    Bridges between the components are ridge regressions on `calibration_texts`; every candidate's score is its loss on
    `score_texts`, equal to that of `discretize(model, choice, calibration=calibration_texts, order=order)`.

    While the product over blocks of the number of paths is at most `limit`, all choices are scored. Beyond, a beam
    search goes through the blocks. A prefix is worth the lowest loss among the hybrids scored so far that begin with
    it, an upper bound of the best there is: it is finished with every path of the next block, and from there each time
    with the path that continues the last one (else of the same component, else the first). So prefixes of any depth
    are compared by whole hybrids, and every hybrid scored on the way is a candidate. With a budget a finish that is
    outside is replaced by the one within that keeps most of it.

    A score at step 0 is not the loss after fine-tuning; `halving` trains the best ones a little and ranks again.

    Args:
        model: a supernet with heads that holds its components whole (or knows where they came from); it is not
            changed.
        calibration_texts, score_texts: as for `calibrate`; they must not be the same.
        limit: the most choices that are all scored. beam: prefixes kept at every block beyond.
        keep: candidates that the printed table shows.
        order: bridges from the components' own states ("parallel", all at once) or from the hybrid's own, one after
            the other ("sequential": better scores, a regression per branch instead of per pair).
        budget: hard limits; nothing outside is scored.
        halving: True or options: short fine-tuning of the best half and the best quarter.
        folder: of the report; there, halving keeps its results and continues from them.
        context: tokens at which FLOPs per token are counted (see `cost_table`).

    Returns:
        Candidates, best first, with loss and costs.

    Raises:
        ValueError: names the field, what was given and what is allowed, before any work; an infeasible budget names
            the smallest feasible value.
    """
    _check(model, limit, beam, keep, order, budget, folder)
    options = None
    if halving is not False:
        options = HalvingOptions() if halving is True else halving
        if not isinstance(options, HalvingOptions):
            raise ValueError(f"halving: got {type(halving).__name__}, allowed are True, False and HalvingOptions.")
    if score_texts is calibration_texts:
        raise ValueError("score_texts: got the calibration_texts themselves, allowed are held-out texts.")
    calibration = batches_of(calibration_texts, model, tokenizer, batch_size, field="calibration_texts")
    scored = batches_of(score_texts, model, tokenizer, batch_size, field="score_texts")
    _warn_of_overlap(calibration, scored)
    table, paths = cost_table(model, context), usable_paths(model)
    check_feasible(table, budget, paths)
    runner = SliceRunner(model, paths)
    runner.states.check(runner.components_needed())

    started = time.perf_counter()
    was_training = model.training
    model.eval()
    try:
        fits = runner.fit_bridges(calibration, progress) if order == "parallel" else {}
        calibrated = time.perf_counter()
        scorer = _Scorer(runner, calibration, scored, order, progress)
        if math.prod(map(len, paths)) <= limit:
            method = "exhaustive"
            choices = itertools.product(*paths)
            scorer.score([c for c in choices if table.within(c, budget)])
        else:
            method = "beam"
            _beam(scorer, table, paths, budget, beam)
    finally:
        model.train(was_training)
    seconds = {"calibration": calibrated - started, "scoring": time.perf_counter() - calibrated}
    candidates = [
        Candidate(list(choice), slices_of(model.config, choice), loss, **table.of(choice))
        for choice, loss in scorer.losses.items()
    ]
    owners = path_owners(model.config)
    limits = {} if budget is None else budget.stated()
    report = StitchReport(method, order, keep, table.context, candidates, fits, seconds, owners, limits, model.config)
    report.sort()
    if options is not None:
        started = time.perf_counter()
        halve(model, report, calibration, scored, options, folder, progress)
        report.seconds["halving"] = time.perf_counter() - started
    if folder is not None:
        report.save(folder)
    return report


class _Scorer:
    """Losses of choices, each computed once, under one progress bar with the best so far."""

    def __init__(self, runner: SliceRunner, calibration: list[Batch], scored: list[Batch], order: str, progress: bool):
        self.runner, self.calibration, self.scored = runner, calibration, scored
        self.order, self.progress = order, progress
        self.losses: dict[Choice, float] = {}

    def score(self, choices: list[Choice]) -> None:
        """Score the choices that are new."""
        new = [choice for choice in dict.fromkeys(choices) if choice not in self.losses]
        if not new:
            return
        parallel = self.order == "parallel"
        total = len(self.scored) if parallel else len(new)
        unit = "batch" if parallel else "hybrid"
        with progress_bar(total=total, desc=f"{len(new)} hybrids", unit=unit, show=self.progress, leave=False) as bar:

            def told(means: dict[Choice, float]) -> None:
                best = min(means, key=means.get)
                others = min(self.losses, key=self.losses.get, default=best)
                if self.losses.get(others, math.inf) < means[best]:
                    best, means = others, self.losses
                bar.set_postfix_str(f"best {','.join(map(str, best))} {means[best]:.3f}", refresh=False)
                bar.update()

            if parallel:
                found = self.runner.losses(new, self.scored, told)
            else:
                found = self.runner.losses_in_order(new, self.calibration, self.scored, told)
        self.losses |= found


def _beam(scorer: _Scorer, table: CostTable, paths: list[list[int]], budget: Budget | None, beam: int) -> None:
    prefixes: list[Choice] = [()]
    for depth in range(len(paths)):
        grown = [(*prefix, p) for prefix in prefixes for p in paths[depth]]
        finished = []
        for prefix in grown:
            nexts = paths[depth + 1] if depth + 1 < len(paths) else [None]
            for q in nexts:
                choice = _finish(scorer.runner, table, paths, budget, prefix if q is None else (*prefix, q))
                if choice is not None:
                    finished.append(choice)
        scorer.score(finished)
        worth = dict.fromkeys(grown, math.inf)
        for choice, loss in scorer.losses.items():
            prefix = choice[: depth + 1]
            if prefix in worth:
                worth[prefix] = min(worth[prefix], loss)
        alive = [prefix for prefix in grown if worth[prefix] < math.inf]
        prefixes = sorted(alive, key=worth.get)[:beam]


def _finish(
    runner: SliceRunner, table: CostTable, paths: list[list[int]], budget: Budget | None, prefix: Choice
) -> Choice | None:
    """The whole choice that goes on from a prefix as plainly as the budget allows; None if there is none within."""
    plain = list(prefix)
    while len(plain) < len(paths):
        plain.append(_next(runner, paths, plain))
    if table.within(plain, budget):
        return tuple(plain)
    zeros = zeros_like(table)
    likes = [node.clone() for node in zeros.nodes]
    for node, p in zip(likes, plain):
        node[p] = 1.0
    allowed = [[p] for p in prefix] + paths[len(prefix) :]
    found = best_choice(table, budget, replace(zeros, nodes=likes), allowed)
    return None if found is None else tuple(found)


def _next(runner: SliceRunner, paths: list[list[int]], prefix: list[int]) -> int:
    """The path of the next block that continues the last slice, else of its component, else the first of any."""
    blocks, depth, before = runner.config.blocks, len(prefix), runner.last(prefix)
    real = [q for q in paths[depth] if blocks[depth][q]["component"] is not None]
    for q in real:
        if not runner.needs_bridge(runner.ends(before, (depth, q))):
            return q
    component = blocks[before[0]][before[1]]["component"]
    same = [q for q in real if blocks[depth][q]["component"] == component]
    return (same or real or paths[depth])[0]


def _check(model, limit, beam, keep, order, budget, folder) -> None:
    if not hasattr(model, "heads") or getattr(model.config, "model_type", None) != "manticore":
        raise ValueError(f"model: got {type(model).__name__}, allowed is a supernet ManticoreForCausalLM.")
    if model.config.is_discretized:
        raise ValueError("model: got a discretized hybrid, in which nothing is left to choose; allowed is a supernet.")
    for name, value in (("limit", limit), ("beam", beam), ("keep", keep)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: got {value!r}, allowed is a positive integer.")
    if order not in ORDERS:
        raise ValueError(f"order: got {order!r}, allowed are {', '.join(map(repr, ORDERS))}.")
    if budget is not None and not isinstance(budget, Budget):
        raise ValueError(f"budget: got {type(budget).__name__}, allowed is a Budget or None.")
    if folder is not None and Path(folder).is_file():
        raise ValueError(f"folder: got the file {str(folder)!r}, allowed is a folder.")
    if not any(
        model.config.blocks[-1][p]["component"] in model.config.head_components for p in usable_paths(model)[-1]
    ):
        raise ValueError("model: no path of its last block has a head (head_mixture='first'); nothing can be scored.")


def _warn_of_overlap(calibration: list[Batch], scored: list[Batch]) -> None:
    rows = [{tuple(row.tolist()) for batch in batches for row in batch.input_ids} for batches in (calibration, scored)]
    shared = len(rows[0] & rows[1])
    if shared:
        logger.warning(f"score_texts: {shared} rows are also in calibration_texts; scores on them are too low.")
