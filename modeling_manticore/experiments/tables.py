"""Markdown tables of an experiment's results."""

from ..hub.numbers import number
from .intervals import Interval, sign_flip_p
from .results import Column, Results


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; bars inside cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def measured_table(results: Results) -> str:
    """
    Mean and 95 % t-interval over seeds: models x columns, with the frequency baseline below, and then what others
    published, which was measured in another setting.
    """
    rows = [[model, *(_measured(results, column, model) for column in results.columns)] for model in results.models]
    baselines = [results.baseline(column) for column in results.columns]
    if any(value is not None for value in baselines):
        rows.append(["*guess by frequency*", *("-" if v is None else f"{100 * v:.1f}" for v in baselines)])
    return table(["", *map(_head, results.columns)], rows + _published(results))


def difference_table(results: Results) -> str:
    """Every model minus the best component (on validation rows), paired by seed; better is above 0."""
    rivals = {column: results.best_component(column) for column in results.columns}
    rows = [["*best component*", *(rivals[column] or "-" for column in results.columns)]]
    for model in results.models:
        cells = []
        for column in results.columns:
            rival = rivals[column]
            found = None if rival in (None, model) else results.difference(column, model, rival)
            if found is None or not results.learned_by_anyone(column):
                cells.append("-")
                continue
            p = sign_flip_p(results.differences(column, model, rival)) if found.n <= 16 else None
            cells.append(_shown(found, column, "+") + ("" if p is None else f", p = {p:.3f}"))
        rows.append([model, *cells])
    return table(["", *map(_head, results.columns)], rows)


def cost_table(results: Results) -> str:
    """What every model costs, means over tasks and seeds, and its learning rates."""
    head = [
        "",
        "parameters",
        "forward FLOPs a token",
        "KV bytes a token",
        "tokens seen",
        "and in its search",
        "CPU s a run",
        "rates",
    ]
    rows = []
    for model in results.experiment.models:
        fields = ("parameters", "flops_per_token", "cache_bytes_per_token", "tokens", "cpu_seconds")
        numbers = [results.mean_of(name, model.name) for name in fields]
        numbers.insert(4, results.mean_of("tokens", model.of) if model.kind == "discretized" else None)
        cells = ["-" if value is None else number(round(value)) for value in numbers]
        rows.append([model.name, *cells, _rates(results, model.name)])
    return table(head, rows)


def choice_table(results: Results) -> str | None:
    """What the searches chose, a digit for every block; None without a search."""
    models = results.experiment.models
    searched = [m.name for m in models if m.kind == "searched" or m.max_attention_blocks is not None]
    if not searched:
        return None
    rows = []
    for name in searched:
        cells = []
        for task in results.experiment.tasks:
            found = results.choices(task.name, name)
            cells.append(", ".join(f"{choice} x{count}" for choice, count in sorted(found.items())) or "-")
        rows.append([name, *cells])
    return table(["", *(task.name for task in results.experiment.tasks)], rows)


def _published(results: Results) -> list[list[str]]:
    """A row for each model of others, and one of what differs from our setting; none where nothing is published."""
    found = {task.name: task.published for task in results.experiment.tasks if task.published is not None}
    if not found:
        return []
    own = [None if column.extra is not None else found.get(column.task) for column in results.columns]
    models = dict.fromkeys(model for published in found.values() for model in published.accuracies)
    rows = []
    for model in models:
        values = [None if published is None else published.accuracies.get(model) for published in own]
        rows.append([f"*published: {model}*", *("-" if value is None else f"{value:g}" for value in values)])
    differences = ("-" if published is None else " ".join(published.difference.split()) for published in own)
    return [*rows, ["*the published setting*", *differences]]


def _head(column: Column) -> str:
    return f"{column.name}, {'accuracy %' if column.greater_is_better else 'nats'}"


def _measured(results: Results, column: Column, model: str) -> str:
    found = results.interval(column, model)
    if found is None:
        return "-"
    text = _shown(found, column)
    if not results.is_complete(column, model):
        text += f" ({found.n} of {len(results.experiment.training.seeds)} seeds)"
    return text if results.learned(column, model) else f"{text}, not learned"


def _shown(found: Interval, column: Column, sign: str = "") -> str:
    scale, digits = (100, 1) if column.greater_is_better else (1, 3)
    text = f"{scale * found.mean:{sign}.{digits}f}"
    return text if found.half_width is None else f"{text} ± {scale * found.half_width:.{digits}f}"


def _rates(results: Results, model: str) -> str:
    """
    By task; * where it is the smallest or largest of the grid, so that a wider one might be better, † where no rate
    was above the frequency baseline.
    """
    grid = sorted(results.experiment.training.learning_rates)
    told = []
    for task in results.experiment.tasks:
        rates = results.rates(task.name, model)
        edges = {rate: "*" * (len(grid) > 1 and rate in (grid[0], grid[-1])) for rate in rates}
        chance = "†" * results.chosen_by_chance(task.name, model)
        told.append("/".join(f"{rate:g}{edge}{chance}" for rate, edge in edges.items()))
    return ", ".join(text or "-" for text in told) or "-"
