"""Reports made without a search: the same content as a real one, for the tests of pages."""

import math

from transformers import GPTNeoXConfig, Mamba2Config

from modeling_manticore import ManticoreConfig
from modeling_manticore.search.history import path_owners
from modeling_manticore.search.programming_report import ProgrammingReport
from modeling_manticore.search.search_report import SearchReport
from modeling_manticore.search.stitch_report import Candidate, StitchReport, slices_of
from modeling_manticore.search.sweep import SweepPoint, SweepReport, simplex_grid


BLOCKS, STEPS = 4, 40


def config(names=("pythia-70m", "mamba2-130m")) -> ManticoreConfig:
    """Two components of eight layers in four blocks; the inner ones may be skipped."""
    neox = GPTNeoXConfig(vocab_size=48, hidden_size=16, num_hidden_layers=8, num_attention_heads=2)
    mamba = Mamba2Config(vocab_size=48, hidden_size=24, num_hidden_layers=8, num_heads=4, head_dim=12, n_groups=1)
    made = ManticoreConfig.from_partition([neox, mamba], BLOCKS)
    blocks = [[dict(path) for path in block] for block in made.blocks]
    for b in (1, 2):
        blocks[b].append({"component": None})
    made = ManticoreConfig(components=[neox, mamba], blocks=blocks)
    for component, name in zip(made.components, names):
        component.source = f"someone/{name}"
    return made


def costs(choice: list[int]) -> dict[str, int]:
    """Costs that attention raises and skipping lowers."""
    attention = choice.count(0)
    return {
        "attention_blocks": attention,
        "parameters": 9_000_000 + 1_310_720 * attention - 700_000 * choice.count(2),
        "cache_bytes_per_token": 2048 * attention,
        "flops_per_token": 18_000_000 + 2_500_000 * attention - 1_000_000 * choice.count(2),
    }


def choices(made: ManticoreConfig) -> list[list[int]]:
    """All choices."""
    found = [[]]
    for block in made.blocks:
        found = [[*choice, p] for choice in found for p in range(len(block))]
    return found


def loss_of(choice: list[int]) -> float:
    """A loss that favours attention late, in nats."""
    return 4.4 + sum(abs(p - (b % 2)) * (0.11 + 0.05 * b) for b, p in enumerate(choice)) - 0.02 * choice[-1]


def search_report(names=("pythia-70m", "mamba2-130m"), strategy="gaea") -> SearchReport:
    """A search of 40 steps that moves from even weights to a choice."""
    made = config(names)
    kept = [0, 1, 1, 0]
    owners = path_owners(made)
    labels = [
        [f"{names[p]}[{2 * b}:{2 * b + 2}]" if p < 2 else "skip" for p in range(len(block))]
        for b, block in enumerate(made.blocks)
    ]

    def weights(step: int) -> list[list[float]]:
        found = []
        for b, block in enumerate(made.blocks):
            pull = [math.exp(step / 12 * (p == kept[b]) - 0.2 * p * step / STEPS) for p in range(len(block))]
            found.append([value / sum(pull) for value in pull])
        return found

    last = weights(STEPS)
    blocks = [
        {
            "paths": labels[b],
            "components": owners[b],
            "weights": point,
            "entropy": -sum(a * math.log(a) for a in point),
        }
        for b, point in enumerate(last)
    ]
    likely = [
        {
            "choice": choice,
            "slices": slices_of(made, choice),
            "probability": math.prod(last[b][p] for b, p in enumerate(choice)),
            "within_limits": choice.count(0) <= 2,
        }
        | costs(choice)
        for choice in choices(made)
        if choice[0] < 2 and choice[-1] < 2
    ]
    likely.sort(key=lambda row: -row["probability"])
    return SearchReport(
        strategy=strategy,
        arguments={"max_steps": STEPS, "mixture_learning_rate": 0.1, "seed": 0, "gate": "routed"},
        steps=STEPS,
        effort={"tokens": 163_840, "search_tokens": 0, "seconds": 92.4},
        blocks=blocks,
        choice=kept,
        slices=slices_of(made, kept),
        probability=likely[0]["probability"],
        limits={"attention_blocks": 2.0},
        choice_within_limits=kept,
        costs={"expected": {k: v * 0.97 for k, v in costs(kept).items()}, "choice": costs(kept)},
        best_evaluation={"eval_loss": {"value": 4.512, "step": 40}},
        course=[{"step": step, "weights": weights(step)} for step in range(0, STEPS + 1, 2)],
        losses={
            "loss": [[step, 5.4 - 0.9 * step / STEPS + 0.08 * math.sin(step)] for step in range(2, STEPS + 1, 2)],
            "eval_loss": [[10, 5.1], [20, 4.8], [30, 4.6], [40, 4.512]],
        },
        candidates=likely[:30],
        config=made,
    )


def stitch_report() -> StitchReport:
    """All 36 hybrids of the configuration, the best fine-tuned a little."""
    made = config()
    candidates = [
        Candidate(choice, slices_of(made, choice), loss_of(choice), **costs(choice)) for choice in choices(made)
    ]
    candidates.sort(key=lambda c: c.loss)
    for i, candidate in enumerate(candidates[:8]):
        candidate.tuned = {"0.05": candidate.loss - 0.1} | ({"0.15": candidate.loss - 0.2 + 0.01 * i} if i < 4 else {})
    report = StitchReport(
        "exhaustive",
        "parallel",
        5,
        2048,
        candidates,
        {"0.0 > 1.1": 0.91, "1.1 > 2.0": 0.88},
        {"calibration": 3.2, "scoring": 11.9, "halving": 60.1},
        path_owners(made),
        {},
        made,
    )
    report.sort()
    return report


def sweep_report() -> SweepReport:
    """A grid of two blocks of two paths."""
    full = config()
    made = ManticoreConfig(components=full.components, blocks=[full.blocks[0], full.blocks[3]])
    made.blocks[0] = [{"component": 0, "start": 0, "stop": 4}, {"component": 1, "start": 0, "stop": 4}]
    made.blocks[1] = [{"component": 0, "start": 4, "stop": 8}, {"component": 1, "start": 4, "stop": 8}]
    points = [
        SweepPoint([list(one), list(two)], 4.5 + (one[0] - 0.3) ** 2 + 0.5 * (two[0] - 0.7) ** 2)
        for one in simplex_grid(2, 4)
        for two in simplex_grid(2, 4)
    ]
    return SweepReport(4, sorted(points, key=lambda p: p.loss), path_owners(made), made)


def programming_report() -> ProgrammingReport:
    """A search on two tasks."""
    found = search_report()
    logs = [
        {"step": entry["step"]}
        | {f"mixture/block_{b}/path_{p}": a for b, point in enumerate(entry["weights"]) for p, a in enumerate(point)}
        for entry in found.course
    ]
    metrics = {
        task: [{"step": s, "accuracy": low + 0.02 * s, "loss": 3.0 - 0.05 * s} for s in (0, 20, 40)]
        for task, low in (("in-context-recall", 0.1), ("memorization", 0.15))
    }
    return ProgrammingReport(
        tasks={"in-context-recall": 0.5, "memorization": 0.5},
        settings={task: {"sequence_length": 64} for task in metrics},
        strategy="joint",
        steps=STEPS,
        seed=0,
        train_components=False,
        weights=[block["weights"] for block in found.blocks],
        paths=[block["paths"] for block in found.blocks],
        metrics=metrics,
        seconds=41.5,
        processor_seconds=41.0,
        log_history=logs,
        config=found.config,
    )
