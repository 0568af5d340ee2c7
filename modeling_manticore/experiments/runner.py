"""Runs of an experiment in parallel processes, those that are in the cache excepted."""

import multiprocessing
import os
import tempfile
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..processes import small_process
from ..tasks.text import cache_folder
from .jobs import Chain, Job, chains_of, shard_of
from .records import Cache, entry_of, finite, lines_file, read_file, read_lines, write_lines
from .schema import Experiment, check_tasks
from .tasks import TASKS, TaskFailed


# What launchers set: the processes of a grid are independent, none may wait for another's.
DISTRIBUTED = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    *("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
DEVICES = "CUDA_VISIBLE_DEVICES"
Work = Callable[[dict[str, Any]], dict[str, Any]]
PROCESS = small_process(threads=1)


class RunFailed(RuntimeError):
    """A run ended with an exception; the message has its name and the traceback."""


def run_experiment(
    experiment: Experiment,
    workers: int | None = None,
    shard: tuple[int, int] = (1, 1),
    cache: str | os.PathLike | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """
    Run what is neither in the cache nor in the lines that `experiment.output` has already, and write one JSON line a
    run there, again after every run. Lines that are of no run of this grid (the file was changed since) stay behind
    them.

    Args:
        workers: processes of one thread each; by default the experiment's. One runs in this process.
        shard: (i, n): only the i-th of n parts of the grid.
        cache: folder of finished runs; by default `experiments` in the package's cache folder.

    Returns:
        the records of the runs.

    Raises:
        ValueError: bad tasks, workers or shard, or a folder that cannot be written to, before anything runs.
        RunFailed: a run ended with an exception. Those that were running besides are finished and kept.
    """
    index, count = shard
    if not 1 <= index <= count:
        raise ValueError(f"shard: got {index}/{count}, allowed is i/n with 1 <= i <= n.")
    workers = experiment.workers if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers: got {workers}, allowed is a positive integer.")
    if not experiment.models:
        raise ValueError(f"experiment: {experiment.name!r} has no models and tasks, so there is nothing to run.")
    check_tasks(experiment)
    _require_folder("cache", _place_of(cache))
    _require_folder("output", Path(experiment.output))
    output = lines_file(experiment.output, experiment.name, shard)
    others = read_file(output)
    grid = _Grid(shard_of(chains_of(experiment), index, count), _finished(experiment, cache))
    with ExitStack() as stack:
        stack.enter_context(_environment())
        bar = stack.enter_context(tqdm(total=grid.count, unit="run", desc=experiment.name, disable=not progress))
        pool = stack.enter_context(_Workers(workers) if workers > 1 else _ThisProcess())
        grid.start()

        def tell(job: Job | None) -> None:
            bar.update(len(grid.records) - bar.n)
            if job is not None:
                found = grid.records[job]["validation"]
                bar.set_postfix_str(f"{job.task}, {job.model}: {_shown(job, found)}")
                write_lines(output, _lines(experiment, grid, others))

        tell(None)
        _work(grid, pool, tell)
    write_lines(output, _lines(experiment, grid, others))
    return _lines(experiment, grid, [])


def finished_runs(
    experiment: Experiment, shard: tuple[int, int] = (1, 1), cache: str | os.PathLike | None = None
) -> tuple[int, int]:
    """How many runs are in the cache or in the experiment's lines already, and how many there are."""
    grid = _Grid(shard_of(chains_of(experiment), *shard), _finished(experiment, cache))
    grid.start()
    return len(grid.records), grid.count


class _Finished:
    """What has been run: here (the cache), or where the lines of the experiment come from (perhaps a clone)."""

    def __init__(self, cache: Cache, lines: dict[str, dict]):
        self._cache, self._lines = cache, lines

    def get(self, digest: str) -> dict[str, Any] | None:
        """The settings and the record of a run, or None."""
        return self._cache.get(digest) or self._lines.get(digest)

    def put(self, digest: str, entry: dict[str, Any]) -> None:
        """Keep a run in the cache."""
        self._cache.put(digest, entry)


def _place_of(cache: str | os.PathLike | None) -> Path:
    return cache_folder() / "experiments" if cache is None else Path(cache)


def _require_folder(field: str, folder: Path) -> None:
    """
    Raises:
        ValueError: it cannot be made, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{field}: got {str(folder)!r} ({error.strerror}), allowed is a folder that can be written to."
        ) from error


def _finished(experiment: Experiment, cache: str | os.PathLike | None) -> _Finished:
    store = Cache(_place_of(cache))
    lines = read_lines(experiment.output, experiment.name)
    return _Finished(store, {line["digest"]: entry_of(line) for line in lines})


class _Grid:
    """The chains, how far each is, and what may run now."""

    def __init__(self, chains: list[Chain], cache: _Finished):
        self.chains, self.cache = chains, cache
        self.count = sum(chain.count for chain in chains)
        self.records: dict[Job, dict] = {}
        self.ready: deque[Job] = deque()
        self._open: list[tuple[Any, list[Job]]] = []

    def start(self) -> None:
        """Go as far as finished runs go."""
        for chain in self.chains:
            steps = chain.jobs()
            self._take(steps, next(steps))

    def finished(self, job: Job, record: dict) -> None:
        """Keep a record, and see what it allows."""
        record = finite(record)
        self.cache.put(job.digest, {"settings": job.settings, "record": record})
        self.records[job] = record
        for entry in [entry for entry in self._open if all(own in self.records for own in entry[1])]:
            self._open.remove(entry)
            self._advance(*entry)

    def _take(self, steps, batch: list[Job]) -> None:
        for job in batch:
            kept = self.cache.get(job.digest)
            if kept is None:
                self.ready.append(job)
            else:
                self.records[job] = kept["record"]
        if all(job in self.records for job in batch):
            self._advance(steps, batch)
        else:
            self._open.append((steps, batch))

    def _advance(self, steps, batch: list[Job]) -> None:
        try:
            following = steps.send([self.records[job] for job in batch])
        except StopIteration:
            return
        self._take(steps, following)


def _work(grid: _Grid, pool, tell: Callable[[Job], None]) -> None:
    """
    Raises:
        RunFailed: a run ended with an exception.
    """
    failure = None
    while pool.busy or (grid.ready and failure is None):
        while grid.ready and pool.free and failure is None:
            pool.submit(grid.ready.popleft())
        for job, record, error in pool.done():
            if error is None:
                grid.finished(job, record)
                tell(job)
            else:
                failure = failure or f"{job.task}, {job.model}, seed {job.settings['seed']} failed:\n{error}"
    if failure is not None:
        raise RunFailed(failure)


class _ThisProcess:
    """One run at a time, here, on one thread. `work` makes a record of a job's settings; by default `training.run`."""

    def __init__(self, work: Work | None = None):
        self._job: Job | None = None
        self._work = work

    def __enter__(self):
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        return self

    def __exit__(self, *error):
        torch.set_num_threads(self._threads)

    @property
    def busy(self) -> bool:
        return self._job is not None

    @property
    def free(self) -> bool:
        return self._job is None

    def submit(self, job: Job) -> None:
        self._job = job

    def done(self, timeout: float | None = None) -> Iterator[tuple[Job, dict | None, str | None]]:
        job, self._job = self._job, None
        yield job, *_answer(self._work, job.settings)


class _Workers:
    """
    Processes that live as long as the grid. One whose parent is gone ends after its run: a pipe that has no other end
    raises EOFError. `work`, a function of a module, makes a record of a job's settings; by default `training.run`.
    """

    def __init__(self, count: int, work: Work | None = None):
        self._count, self._work = count, work

    def __enter__(self):
        context = multiprocessing.get_context("spawn")
        self._idle: list[Connection] = []
        self._running: dict[Connection, Job] = {}
        self._processes = {}
        for _ in range(self._count):
            own, other = context.Pipe()
            process = context.Process(target=_serve, args=(other, self._work), daemon=True)
            process.start()
            other.close()
            self._idle.append(own)
            self._processes[own] = process
        return self

    def __exit__(self, *error):
        """Idle ones end by themselves, with whatever they clean up; those in a run are stopped in it."""
        for connection, process in self._processes.items():
            if connection in self._idle:
                connection.close()
            else:
                process.terminate()
        for process in self._processes.values():
            process.join()

    @property
    def busy(self) -> bool:
        return bool(self._running)

    @property
    def free(self) -> bool:
        return bool(self._idle)

    def submit(self, job: Job) -> None:
        connection = self._idle.pop()
        connection.send(job.settings)
        self._running[connection] = job

    def done(self, timeout: float | None = None) -> Iterator[tuple[Job, dict | None, str | None]]:
        """Those that ended, as soon as there is one, or none after so many seconds."""
        for connection in wait(list(self._running), timeout):
            job = self._running.pop(connection)
            try:
                record, error = connection.recv()
            except EOFError:
                yield job, None, "its process ended (out of memory, or killed)."
                continue
            self._idle.append(connection)
            yield job, record, error


def _serve(connection: Connection, work: Work | None) -> None:
    """What a worker process does: settings in, (record, None) or (None, traceback) out, until the parent is gone."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    while True:
        try:
            settings = connection.recv()
        except EOFError:
            return
        connection.send(_answer(work, settings))


def _end_with_parent() -> None:
    """A worker whose parent was killed would finish its run, for hours perhaps, beside those of the next start."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _answer(work: Work | None, settings: dict) -> tuple[dict | None, str | None]:
    """The record, or the traceback, which `_work` raises when the other runs have ended."""
    if work is None:
        from .training import run as work

    try:
        return work(settings), None
    except TaskFailed as error:
        return None, str(error)
    except Exception:
        return None, traceback.format_exc()


@contextmanager
def _environment() -> Iterator[None]:
    """One thread a process, of a launcher nothing but the process's own GPU; as before afterwards."""
    names = (*DISTRIBUTED, *PROCESS, DEVICES)
    before = {name: os.environ[name] for name in names if name in os.environ}
    if "LOCAL_RANK" in before and torch.cuda.device_count() > 1:
        local, devices = int(before["LOCAL_RANK"]), before.get(DEVICES, "").split(",")
        os.environ[DEVICES] = devices[local % len(devices)] or str(local % torch.cuda.device_count())
    for name in DISTRIBUTED:
        os.environ.pop(name, None)
    os.environ.update(PROCESS)
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


def _lines(experiment: Experiment, grid: _Grid, others: list[dict]) -> list[dict]:
    """One line a run of the grid in the file's order, and then those of `others` that are of no such run."""
    lines = []
    for job, record in grid.records.items():
        names = {"experiment": experiment.name, "model": job.model, "task": job.task, "phase": job.phase}
        told = {key: job.settings[key] for key in ("learning_rate", "seed", "steps")}
        lines.append(names | told | {"digest": job.digest} | record | {"settings": job.settings})
    own = {(line["digest"], line["model"], line["task"]) for line in lines}
    left = [line for line in others if (line["digest"], line["model"], line["task"]) not in own]
    return sorted(lines, key=lambda line: _place(experiment, line)) + left


def _place(experiment: Experiment, line: dict) -> tuple:
    tasks = [task.name for task in experiment.tasks]
    models = [model.name for model in experiment.models]
    return (
        *(tasks.index(line["task"]), models.index(line["model"]), line["phase"] == "final"),
        *(line["learning_rate"], line["seed"]),
    )


def _shown(job: Job, found: dict) -> str:
    value = found[TASKS[job.settings["task"]["task"]].measure]
    return "-" if value is None else f"{value:.3f}"
