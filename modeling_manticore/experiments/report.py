"""RESULTS.md: what the paper claims, what was measured, and whether it holds, out of experiments and their runs."""

import os
from dataclasses import asdict
from pathlib import Path

from .claims import judge
from .records import write_whole
from .results import Results
from .schema import Experiment
from .tables import choice_table, cost_table, difference_table, measured_table, table


HEADING = """# Results

Made by `manticore report` out of the experiment files and the runs beside them; not written by hand. "Holds" is
computed from the numbers: "not refuted" says that what is claimed lies within the intervals, though means say
otherwise, "not decided" that an interval contains the bound (or that runs are missing). Intervals are 95 % Student
intervals over seeds; differences are paired by seed.
"""


def write_report(experiments: list[Experiment], output: Path, pictures: bool = True) -> str:
    """
    Write the report, and a picture `NAME.svg` beside the runs of every experiment that has some. Returns the text.

    Raises:
        ValueError: two experiments of one name, or runs or JSON results that cannot be read, before anything is
            written.
    """
    names = [experiment.name for experiment in experiments]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"experiments: got {', '.join(map(repr, twice))} twice, allowed is one file of a name.")
    everything = [Results(experiment) for experiment in experiments]
    sections = [section(results, output.parent if pictures else None) for results in everything]
    rows = [row for results in everything for row in _claim_rows(results, with_name=True)]
    overview = table(["experiment", "the paper claims", "we measured", "holds"], rows) if rows else ""
    text = "\n\n".join([HEADING.strip(), *([overview] if overview else []), *sections]) + "\n"
    if pictures:
        from .plots import draw

        for results in everything:
            if results.has_final_runs:
                draw(results, _picture(results))
    write_whole(output, text)
    return text


def section(results: Results, folder: Path | None) -> str:
    """
    One experiment: its claims, tables and costs.

    Args:
        folder: where the report will be, for the way to the picture; None leaves the picture out.
    """
    experiment = results.experiment
    parts = [f"## {experiment.title}"]
    if experiment.description:
        parts.append(experiment.description.strip())
    claims = _claim_rows(results)
    if claims:
        parts.append(table(["the paper claims", "we measured", "holds"], claims))
    if experiment.models and not results.lines:
        parts.append(f"Not run yet: `make bench NAME={experiment.name}`.")
    elif experiment.models and not results.has_final_runs:
        parts.append(f"Begun, {len(results.lines)} runs that compare learning rates; nothing is tested yet.")
    elif experiment.models:
        parts.append(_budget(results))
        told = [column for column in results.columns if results.tested(column.task)]
        left_out = [column.name for column in told if not results.learned_by_anyone(column)]
        if left_out:
            parts.append(
                f"Learned by nobody (no model's interval is above the frequency baseline by {_margin(experiment)}), "
                f"and so left out of every count: {', '.join(left_out)}."
            )
        if folder is not None:
            way = Path(os.path.relpath(_picture(results), folder or Path("."))).as_posix()
            parts.append(f"![{experiment.title}]({way})")
        parts += ["On test rows:", measured_table(results)]
        if results.components:
            parts += ["Minus the best component (chosen on validation rows); better is above 0:"]
            parts.append(difference_table(results))
        chosen = choice_table(results)
        if chosen is not None:
            names = ", ".join(f"{k} {name}" for k, name in enumerate(_searched_families(experiment)))
            parts += [f"What the searches chose, a digit for every block ({names}), and how often:", chosen]
        parts += [
            "Costs, means over tasks and seeds; a learning rate with * is at the end of the grid, one with † was "
            "chosen among runs of which none was above the guess by frequency:"
        ]
        parts.append(cost_table(results))
        parts.append(_made_by(results))
    return "\n\n".join(parts)


def _claim_rows(results: Results, with_name: bool = False) -> list[list[str]]:
    rows = []
    for claim in results.experiment.claims:
        verdict = judge(claim, results)
        name = [results.experiment.name] * with_name
        rows.append([*name, " ".join(claim.paper.split()), verdict.measured, verdict.word])
    return rows


def _budget(results: Results) -> str:
    training = results.experiment.training
    rates = ", ".join(f"{rate:g}" for rate in training.learning_rates)
    text = f"Every model: batches of {training.batch_size} rows, at most {training.steps} steps"
    if training.stop_at is not None:
        text += f", ended at {100 * training.stop_at:g} % validation accuracy"
    seeds = len(training.seeds)
    text += f"; {seeds} {'seed' if seeds == 1 else 'seeds'} (data, weights and order). "
    if len(training.learning_rates) > 1:
        steps = min(training.tuning_steps, training.steps)
        text += f"Learning rates {rates} compared on validation rows at {steps} steps on seed {training.seeds[0]}."
    else:
        text += f"Learning rate {rates}."
    for task in results.experiment.tasks:
        own = {name.replace("_", " "): value for name, value in asdict(task.budget).items() if value is not None}
        if own:
            text += f" On {task.name}: " + ", ".join(f"{name} {value}" for name, value in own.items()) + "."
    return text


def _made_by(results: Results) -> str:
    commits = sorted({_short_commit(line["git_commit"]) for line in results.lines})
    versions = sorted({", ".join(f"{k} {v}" for k, v in line["versions"].items()) for line in results.lines})
    hours = sum(line["cpu_seconds"] for line in results.lines) / 3600
    text = f"{len(results.lines)} runs, {hours:.2f} hours of processor time; commit {', '.join(commits)}; "
    text += "; ".join(versions) + "."
    if results.outdated:
        text += f" {results.outdated} older runs with other settings are left out."
    return text


def _short_commit(commit: str | None) -> str:
    return "unknown" if commit is None else commit[:12] + "+" * commit.endswith("+")


def _margin(experiment: Experiment) -> str:
    return f"{100 * experiment.learned_margin:g} points"


def _searched_families(experiment: Experiment) -> list[str]:
    model = next(model for model in experiment.models if model.kind == "searched")
    return model.sources or experiment.families_of(model)


def _picture(results: Results) -> Path:
    return Path(results.experiment.output) / f"{results.experiment.name}.svg"
