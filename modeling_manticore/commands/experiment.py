"""`manticore experiment`: run a grid of models, tasks, learning rates and seeds, resumable and cached by content."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from .parsing import parse_options, require


# Rank and number of processes as torchrun (and accelerate on GPUs), Open MPI, and MPICH and Intel MPI tell them.
LAUNCHERS = (("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))


@dataclass
class ExperimentOptions:
    experiment: str = field(metadata={"help": "A .yaml file; docs/experiments.md says what is in it."})
    workers: int | None = field(
        default=None, metadata={"help": "Processes of one thread each, in place of the file's number."}
    )
    shard: str | None = field(
        default=None,
        metadata={
            "help": "Of the form i/n: only the i-th of n parts of the grid, for a job array. Processes of torchrun, "
            "mpirun and accelerate launch take their own parts without it."
        },
    )
    cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder of finished runs (default: manticore/experiments in $XDG_CACHE_HOME, else in ~/.cache)."
        },
    )
    output: str | None = field(default=None, metadata={"help": "Folder of results, in place of the file's."})
    dry_run: bool = field(default=False, metadata={"help": "Say what would run and what is finished; run nothing."})


KINDS = (ExperimentOptions,)


def run(arguments: list[str]) -> None:
    """
    Raises:
        ValueError: bad options, or the file is no experiment.
    """
    (options,) = parse_options(KINDS, experiment_first(arguments), "experiment")
    require(
        options.workers is None or options.workers >= 1,
        f"workers: got {options.workers}, allowed is a positive integer.",
    )
    shard = shard_from(options.shard, os.environ)

    for name in ("output", "cache"):
        given = getattr(options, name)
        require(given is None or not Path(given).is_file(), f"{name}: got the file {given!r}, allowed is a folder.")

    from ..experiments.schema import check_tasks, load_experiment

    experiment = load_experiment(options.experiment)
    if options.output is not None:
        experiment.output = options.output
    try:
        check_tasks(experiment)
    except ValueError as error:
        raise ValueError(f"{options.experiment}: {error}") from error

    from ..experiments.runner import finished_runs, run_experiment

    if options.dry_run:
        done, count = finished_runs(experiment, shard, options.cache)
        print(f"{experiment.name}: {count} runs, {done} of them finished")
        return
    lines = run_experiment(experiment, options.workers, shard, options.cache)
    hours = sum(line["cpu_seconds"] for line in lines) / 3600
    print(f"{experiment.name}: {len(lines)} runs, {hours:.2f} hours of processor time, in {experiment.output}")


def experiment_first(arguments: list[str]) -> list[str]:
    """Arguments in which the first word, where it is no flag, is the experiment's file."""
    if arguments and not arguments[0].startswith("-"):
        return [f"--experiment={arguments[0]}", *arguments[1:]]
    return arguments


def shard_from(given: str | None, environment) -> tuple[int, int]:
    """
    (i, n) of "i/n", else of a launcher's rank and number of processes in the environment, else (1, 1).

    Raises:
        ValueError: it is something else.
    """
    if given is None:
        for rank, size in LAUNCHERS:
            if rank in environment and size in environment:
                given = environment[rank], environment[size]
                require(
                    all(re.fullmatch(r"\d{1,6}", word) for word in given) and int(given[0]) < int(given[1]),
                    f"{rank}, {size}: got {given[0]!r} and {given[1]!r} in the environment, allowed are a rank and a "
                    "larger number of processes.",
                )
                return int(given[0]) + 1, int(given[1])
        return 1, 1
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", given)
    require(
        found is not None and 1 <= int(found[1]) <= int(found[2]),
        f"shard: got {given!r}, allowed is i/n with 1 <= i <= n, such as 2/4.",
    )
    return int(found[1]), int(found[2])
