"""`manticore report`: out of experiments' runs tables with intervals, pictures, and what holds of what is claimed."""

from dataclasses import dataclass, field
from pathlib import Path

from .parsing import parse_options, require


FOLDER = "benchmarks/experiments"


@dataclass
class ReportOptions:
    experiments: list[str] | None = field(
        default=None,
        metadata={"help": f"Files of experiments (default: those of {FOLDER} that are evidence)."},
    )
    output_file: str = field(default="RESULTS.md", metadata={"help": "The report, Markdown."})
    pictures: bool = field(default=True, metadata={"help": "Also draw them, beside the runs."})


KINDS = (ReportOptions,)


def run(arguments: list[str]) -> None:
    """
    Raises:
        ValueError: bad options, or a file that is no experiment or no result.
    """
    words = []
    while len(words) < len(arguments) and not arguments[len(words)].startswith("-"):
        words.append(arguments[len(words)])
    flags = (["--experiments", *words] if words else []) + arguments[len(words) :]
    (options,) = parse_options(KINDS, flags, "report")
    output = Path(options.output_file)
    require(not output.is_dir(), f"output_file: got the folder {output}, allowed is a file.")
    files = options.experiments or sorted(map(str, Path(FOLDER).glob("*.yaml")))
    require(bool(files), f"experiments: got nothing and {FOLDER} has no .yaml file, allowed are experiment files.")

    from ..experiments.report import write_report
    from ..experiments.schema import load_experiment

    experiments = [load_experiment(file) for file in files]
    if options.experiments is None:
        experiments = [experiment for experiment in experiments if experiment.evidence]
    write_report(experiments, output, options.pictures)
    print(f"{len(experiments)} experiments in {output}")
