"""Pages of searches and comparisons, from the values that their JSON files hold and the hybrid's configuration."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..hub.cards import architecture
from .charts import line_chart, scatter_chart
from .page import MOST_FRAMES, MOST_ROWS, Page, Picture, Table


COSTS = {
    "parameters": ("parameters (M)", 1e6),
    "cache_bytes_per_token": ("KV cache (kB per token)", 1e3),
    "flops_per_token": ("MFLOPs per token", 1e6),
}
NAMES = {
    "attention_blocks": "attention blocks",
    "parameters": "parameters",
    "cache_bytes_per_token": "KV bytes per token",
    "flops_per_token": "FLOPs per token",
}
FORMATS = {"FLOPs per token": ",.0f", "probability": ".3g", "MFLOPs per token": ",.2f"}


def search_page(values: Mapping[str, Any], config: Any, recipe: Any = None) -> Page:
    """
    The page of a gradient search.

    Args:
        values: `SearchReport.to_dict()`.
        config: of the supernet; without one there is no picture.
        recipe: how it was started; by default the report's arguments.
    """
    weights = [block["weights"] for block in values["blocks"]]
    kept = (values["discretized"] or {}).get("choice") or values["choice_within_limits"] or values["choice"]
    course = values["course"] or [{"step": values["steps"], "weights": weights}]
    frames = [(f"step {entry['step']:,}", entry["weights"], None) for entry in course]
    if course[-1]["weights"] != weights:
        frames.append((f"step {values['steps']:,}, as it ended", weights, None))
    rows, table = values["candidates"], None
    if rows:
        columns = ["choice", "probability", "-ln probability", *NAMES.values(), "within limits", "slices"]
        table = Table(columns, [_likely(row) for row in rows], FORMATS | {"FLOPs per token": ",.0f"})
    effort, found = values["effort"], values["discretized"] or {}
    facts = {"strategy": values["strategy"], "steps": f"{values['steps']:,}"}
    facts["tokens"] = f"{effort['tokens'] + effort['search_tokens']:,}"
    facts["seconds"] = f"{effort['seconds']:,.1f}"
    facts |= {f"lowest {name}": f"{best['value']:.4f} nats" for name, best in values["best_evaluation"].items()}
    facts |= {f"{name} alone, held out": f"{loss:.4f} nats" for name, loss in values.get("alone", {}).items()}
    if "loss" in found:
        facts |= {"supernet, held out": f"{found['supernet_loss']:.4f} nats"}
        facts |= {"kept hybrid, held out": f"{found['loss']:.4f} nats"}
    entropies = {
        f"block {b}": [(entry["step"], _entropy(entry["weights"][b])) for entry in course]
        for b, block in enumerate(weights)
        if len(block) > 1
    }
    slices = found.get("slices") or values["slices"]
    return Page(
        title=f"Search by {values['strategy']}",
        lead=f"After {values['steps']:,} steps: {_commas(kept)}, that is {slices}"
        f" (largest weights {_commas(values['choice'])}, probability {values['probability']:.2g}).",
        facts=facts,
        pictures=[] if config is None else [Picture(config, frames, kept, title="Supernet, kept paths framed")],
        charts={
            "Losses": line_chart(dict(values["losses"]), "step", "loss (nats)"),
            "Entropy of the mixture": line_chart(entropies, "step", "entropy (nats)"),
        },
        fronts=_fronts(rows, lambda row: -math.log(max(row["probability"], 1e-300)), "-ln probability"),
        components=components_table(config),
        blocks=_blocks(config, values["blocks"], weights, kept),
        candidates=table,
        candidates_note="The likeliest hybrids under the mixture weights; lower is likelier in the charts.",
        tables=_budgets(values),
        recipe=recipe or {"strategy": values["strategy"]} | values["arguments"],
        sources=["search.json"],
    )


def stitch_page(values: Mapping[str, Any], config: Any, recipe: Any = None) -> Page:
    """
    The page of a comparison of discrete hybrids; arguments as of `search_page`.

    Args:
        values: `StitchReport.to_dict()`.
    """
    rows = values["candidates"][:MOST_ROWS]
    shares = sorted({share for row in rows for share in row["tuned"]}, key=float)
    columns = ["rank", "choice", "loss", *(f"after {100 * float(s):g} %" for s in shares), *NAMES.values(), "slices"]
    content = [
        [rank, _commas(row["choice"]), row["loss"], *(row["tuned"].get(s) for s in shares)]
        + [row[kind] for kind in NAMES]
        + [row["slices"]]
        for rank, row in enumerate(rows, 1)
    ]
    best, frames = rows[0], []
    if config is not None:
        for rank, row in enumerate(rows[:MOST_FRAMES], 1):
            one_hot = [[float(p == kept) for p in range(len(b))] for kept, b in zip(row["choice"], config.blocks)]
            frames.append((f"rank {rank}: loss {row['loss']:.4f}", one_hot, row["choice"]))
    share = max(best["tuned"], key=float, default=None)
    told = f"{best['loss']:.4f} nats without training"
    told += f", {best['tuned'][share]:.4f} after {100 * float(share):g} % of the token budget" if share else ""
    count = len(values["candidates"])
    taken = [
        [sum(row["choice"][b] == p for row in rows[: values["keep"]]) / len(rows[: values["keep"]]) for p in range(n)]
        for b, n in enumerate([len(block) for block in config.blocks] if config is not None else [])
    ]
    tables = {}
    if values["fits"]:
        fits = [[name, fit] for name, fit in values["fits"].items()]
        tables["Held-out fit of the bridges"] = Table(["bridge", "fit"], fits)
    return Page(
        title="Comparison of discrete hybrids",
        lead=f"Best of {count:,}: {_commas(best['choice'])}, that is {best['slices']}; {told}.",
        facts={
            "hybrids scored": f"{count:,} ({values['method']})",
            "bridges": values["order"],
            "context of the FLOPs": f"{values['context']:,} tokens",
        }
        | {f"seconds of {name}": f"{value:,.1f}" for name, value in values["seconds"].items()},
        pictures=[]
        if config is None
        else [Picture(config, frames, start=0, title="Candidates in the supernet", of="candidates")],
        fronts=_fronts(rows, lambda row: row["loss"], "loss (nats)"),
        components=components_table(config),
        blocks=_blocks(config, None, taken, best["choice"], f"share of the best {len(rows[: values['keep']])}"),
        candidates=Table(columns, content, FORMATS),
        candidates_note=_cut(count) + "Loss: nats per token, held out, without training. Lower left is better.",
        tables=_limit_table(values["limits"], {"best": best}) | tables,
        recipe=recipe or {name: values[name] for name in ("method", "order", "keep", "context", "limits")},
        sources=["stitch.json"],
    )


def sweep_page(values: Mapping[str, Any], config: Any, recipe: Any = None) -> Page:
    """
    The page of a grid over mixture weights; arguments as of `search_page`.

    Args:
        values: `SweepReport.to_dict()`.
    """
    points = values["points"]
    frames = [(f"rank {i}: loss {p['loss']:.4f}", p["weights"], None) for i, p in enumerate(points[:MOST_FRAMES], 1)]
    blocks = range(len(points[0]["weights"]))
    content = [[i, p["loss"], *map(_point, p["weights"])] for i, p in enumerate(points[:MOST_ROWS], 1)]
    charts = {}
    for b in blocks:
        lowest: dict[float, int] = {}
        for row, p in enumerate(points[:MOST_ROWS]):
            lowest.setdefault(p["weights"][b][0], row)
        dots = [(p["weights"][b][0], p["loss"], row, _told(p)) for row, p in enumerate(points[:MOST_ROWS])]
        line = [lowest[x] for x in sorted(lowest)]
        charts[f"Block {b}"] = scatter_chart(dots, line, "weight of the first path", "loss (nats)")
    return Page(
        title="Sweep over mixture weights",
        lead=f"Best of {len(points):,} points: loss {points[0]['loss']:.4f} nats per token at "
        f"{' | '.join(map(_point, points[0]['weights']))}.",
        facts={"points": f"{len(points):,}", "divisions": str(values["divisions"])},
        pictures=[] if config is None else [Picture(config, frames, start=0, title="Supernet", of="candidates")],
        fronts=charts,
        components=components_table(config),
        blocks=_blocks(config, None, points[0]["weights"], None, "weight at the best point"),
        candidates=Table(["rank", "loss", *(f"block {b}" for b in blocks)], content),
        candidates_note=_cut(len(points))
        + "The line joins the lowest loss at every weight of the block's first path.",
        recipe=recipe or {"strategy": "sweep", "divisions": values["divisions"]},
        sources=["sweep.json"],
    )


def programming_page(values: Mapping[str, Any], config: Any, recipe: Any = None) -> Page:
    """
    The page of a search on MAD tasks; arguments as of `search_page`.

    Args:
        values: the fields of `ProgrammingReport`, and its `choice` and `course` (as of `search_page`).
    """
    weights, metrics = values["weights"], values["metrics"]
    frames = [(f"step {entry['step']:,}", entry["weights"], None) for entry in values["course"]]
    if not frames or frames[-1][1] != weights:
        frames.append((f"step {values['steps']:,}, as it ended", weights, None))
    course = {
        name: {task: [(e["step"], e[name]) for e in entries] for task, entries in metrics.items()}
        for name in ("accuracy", "loss")
    }
    rows = [
        [task, weight, metrics[task][0]["accuracy"], metrics[task][-1]["accuracy"], metrics[task][-1]["loss"]]
        for task, weight in values["tasks"].items()
    ]
    names = [{"paths": paths} for paths in values["paths"]]
    return Page(
        title=f"Search on MAD tasks by {values['strategy']}",
        lead=f"After {values['steps']:,} steps on {', '.join(values['tasks'])}: "
        f"largest weights {_commas(values['choice'])}.",
        facts={
            "strategy": values["strategy"],
            "steps": f"{values['steps']:,}",
            "seconds": f"{values['seconds']:,.1f}",
            "processor seconds": f"{values['processor_seconds']:,.1f}",
            "seed": str(values["seed"]),
            "components train": "yes" if values["train_components"] else "no",
        },
        pictures=[]
        if config is None
        else [Picture(config, frames, values["choice"], title="Supernet, largest weights framed")],
        charts={
            "Accuracy": line_chart(course["accuracy"], "step", "accuracy"),
            "Losses": line_chart(course["loss"], "step", "loss (nats)"),
        },
        components=components_table(config),
        blocks=_blocks(config, names, weights, values["choice"]),
        tables={"Tasks": Table(["task", "weight", "accuracy before", "accuracy after", "loss after"], rows)},
        recipe=recipe or {name: values[name] for name in ("strategy", "steps", "seed", "tasks", "settings")},
        sources=["programming.json"],
    )


# ---------------------------------------------------------------------- parts that pages share
def components_table(config: Any) -> Table | None:
    """One row a component; None without a configuration."""
    if config is None:
        return None
    rows = [
        [c["name"], c["family"], c["layers"], c["width"], c["used"] or "none", c["revision"]]
        for c in architecture(config)["components"]
    ]
    return Table(["component", "family", "layers", "width", "layers used", "revision"], rows)


def _blocks(
    config: Any,
    named: Sequence[Mapping] | None,
    weights: Sequence[Sequence[float]],
    kept: Sequence[int] | None,
    what: str = "mixture weights",
) -> Table | None:
    """Block, joint before it, paths with their numbers, kept path."""
    facts = [] if config is None else architecture(config)["blocks"]
    blocks = named or facts
    if not blocks:
        return None
    rows = []
    for b, block in enumerate(blocks):
        numbers = ", ".join(f"{name} {weight:.3f}" for name, weight in zip(block["paths"], weights[b]))
        joint = [facts[b]["joint"]] if facts else []
        rows.append([b, *joint, numbers, *([] if kept is None else [block["paths"][kept[b]]])])
    columns = ["block", *(["joint before it"] if facts else []), what, *([] if kept is None else ["kept"])]
    return Table(columns, rows)


def _fronts(rows: Sequence[Mapping], height: Callable[[Mapping], float], label: str) -> dict[str, str]:
    """A chart for every cost in which candidates differ, with its Pareto front."""
    charts = {}
    for kind, (name, scale) in COSTS.items():
        if len({row[kind] for row in rows}) < 2:
            continue
        dots = [(row[kind] / scale, height(row), i, f"{_commas(row['choice'])}") for i, row in enumerate(rows)]
        front: list[int] = []
        for i in sorted(range(len(rows)), key=lambda i: dots[i][:2]):
            if not front or dots[i][1] < dots[front[-1]][1]:
                front.append(i)
        charts[f"{label} and {name}"] = scatter_chart(dots, front, name, label)
    return charts


def _likely(row: Mapping[str, Any]) -> list[Any]:
    surprise = -math.log(max(row["probability"], 1e-300))
    within = {True: "yes", False: "no", None: "no limits"}[row["within_limits"]]
    costs = [row[kind] for kind in NAMES]
    return [_commas(row["choice"]), row["probability"], surprise, *costs, within, row["slices"]]


def _budgets(values: Mapping[str, Any]) -> dict[str, Table]:
    costs = values["costs"] | ({"kept": values["discretized"]["costs"]} if values["discretized"] else {})
    return _limit_table(values["limits"], {name.replace("_", " "): cost for name, cost in costs.items()})


def _limit_table(limits: Mapping[str, float], costs: Mapping[str, Mapping[str, float]]) -> dict[str, Table]:
    rows = [[name, *(cost[kind] for cost in costs.values()), limits.get(kind)] for kind, name in NAMES.items()]
    whole = [[int(v) if isinstance(v, float) and v.is_integer() else v for v in row] for row in rows]
    if "min_components" in limits:
        whole.append(["components, at least", *[None] * len(costs), limits["min_components"]])
    return {"Costs and limits": Table(["cost", *costs, "limit"], whole)}


def _entropy(point: Sequence[float]) -> float:
    return -sum(a * math.log(a) for a in point if a > 0)


def _commas(choice: Sequence[int]) -> str:
    return ",".join(map(str, choice))


def _point(weights: Sequence[float]) -> str:
    return " ".join(f"{a:.2f}" for a in weights)


def _told(point: Mapping[str, Any]) -> str:
    return f"{' | '.join(map(_point, point['weights']))}: {point['loss']:.4f}"


def _cut(count: int) -> str:
    return f"The first {MOST_ROWS:,} of {count:,}. " if count > MOST_ROWS else ""
