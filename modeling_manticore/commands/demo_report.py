"""The demo's table: as text, as JSON, as two plots, and as the model card of its hybrid."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


LEVEL, HALF_WIDTH = 0.95, 1.96  # confidence of intervals, and their half width in standard errors


@dataclass
class Row:
    """
    One line of the table. `losses` are mean nats per token, by domain, `standard_errors` theirs over test rows;
    `seconds` is what this step itself took.
    """

    name: str
    losses: dict[str, float]
    standard_errors: dict[str, float | None]
    parameters: int
    seconds: float | None
    steps: int = 0
    learning_rate: float | None = None
    note: str = ""

    @property
    def mean(self) -> float:
        """Mean loss over the domains."""
        return sum(self.losses.values()) / len(self.losses)


def table(rows: list[Row]) -> str:
    """All rows as aligned text."""
    domains = list(rows[0].losses)
    header = ["model", *domains, "mean", "parameters", "seconds", ""]
    cells = [
        [
            row.name,
            *(f"{row.losses[domain]:.3f}" for domain in domains),
            f"{row.mean:.3f}",
            f"{row.parameters:,}",
            "-" if row.seconds is None else f"{row.seconds:.1f}",
            row.note,
        ]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]

    def render(line: list[str]) -> str:
        words = [line[0].ljust(widths[0]), *(word.rjust(w) for word, w in zip(line[1:-1], widths[1:-1])), line[-1]]
        return "  ".join(words).rstrip()

    rule = "  ".join("-" * width for width in widths[:-1])
    return "\n".join([render(header), rule, *map(render, cells)])


def write_json(file: Path, rows: list[Row], **facts) -> None:
    """The table and everything needed to read it; an interval for every loss that has a standard error."""
    content = facts | {"level": LEVEL, "rows": []}
    for row in rows:
        intervals = {
            name: [row.losses[name] - HALF_WIDTH * error, row.losses[name] + HALF_WIDTH * error]
            for name, error in row.standard_errors.items()
            if error is not None
        }
        content["rows"].append(asdict(row) | {"mean": row.mean, "intervals": intervals})
    file.write_text(json.dumps(content, indent=2) + "\n")


def card_arguments(table: dict[str, Any]) -> dict[str, Any]:
    """
    Arguments of `write_card` for the demo's hybrid, from the table's JSON alone: its results beside those of the
    models that were fine-tuned on the same tokens, the search, and the settings as a recipe.
    """
    settings, results = table["settings"], []
    for row in table["rows"]:
        if row["name"] != table["kept"] and not row["name"].endswith(", fine-tuned"):
            continue
        for domain, loss in row["losses"].items():
            results.append(
                {
                    "model": None if row["name"] == table["kept"] else row["name"],
                    "dataset": domain,
                    "split": "test",
                    "metric": "loss",
                    "value": loss,
                    "interval": row["intervals"].get(domain),
                    "level": table["level"],
                    "over": f"{settings['eval_rows']} test rows at most",
                    "tokens": table["tokens"],
                }
            )
    recipe = {
        "components": [component["name"] for component in table["hybrid"]["components"]],
        "num_blocks": settings["num_blocks"],
        "gate": settings["gate"],
        "datasets": settings["texts"],
        "row_length": settings["row_length"],
        "batch_size": settings["batch_size"],
        "seed": settings["seed"],
        "calibration": {"rows": settings["calibration_rows"]},
        "search": {
            "strategy": "joint",
            "steps": settings["search_steps"],
            "learning_rate": settings["search_learning_rate"],
            "mixture_learning_rate": settings["mixture_learning_rate"],
        },
        "finetuning": {"steps": settings["steps"], "learning_rate": settings["learning_rate"]},
        "publishing": {
            "license": "unknown",
            "license_reason": "a demonstration; whoever shares it decides.",
            "limits": [f"Made by `manticore demo` in {table['total_seconds']:.3f} seconds to show how, not for use."],
        },
    }
    search = {"strategy": "joint", "choice": table["searched_choice"], "blocks": table["blocks"]}
    return {"recipe": recipe, "results": results, "report": search, "versions": table["versions"]}


def plot_losses(file: Path, rows: list[Row], histories: dict[str, list[dict]]) -> None:
    """Left: test loss of every row by domain. Right: training loss against the step of every fine-tuned model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, curves) = plt.subplots(1, 2, figsize=(13, 0.36 * len(rows) + 1.6), width_ratios=[3, 2])
    domains = list(rows[0].losses)
    height = 0.8 / len(domains)
    for d, domain in enumerate(domains):
        places = [i + (d - (len(domains) - 1) / 2) * height for i in range(len(rows))]
        bars.barh(places, [row.losses[domain] for row in rows], height, label=domain)
    bars.set_yticks(range(len(rows)), [row.name for row in rows], fontsize="small")
    bars.invert_yaxis()
    bars.set(xlabel="test loss (nats per token)", xlim=(max(0.0, min(min(r.losses.values()) for r in rows) - 1), None))
    bars.legend(frameon=False)
    for name, history in histories.items():
        points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
        curves.plot([step for step, _ in points], [loss for _, loss in points], label=name)
    curves.set(xlabel="step", ylabel="training loss (both domains)")
    curves.legend(fontsize="x-small", frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)
