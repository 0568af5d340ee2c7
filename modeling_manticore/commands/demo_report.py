"""The demo's table: as text, as JSON, and as two plots."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass
class Row:
    """One line of the table. `losses` are mean nats per token, by domain; `seconds` is what this step itself took."""

    name: str
    losses: dict[str, float]
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
    """The table and everything needed to read it."""
    content = facts | {"rows": [asdict(row) | {"mean": row.mean} for row in rows]}
    file.write_text(json.dumps(content, indent=2) + "\n")


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
