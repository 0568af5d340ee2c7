"""
Work that is no run of a grid: units that need each other's files, done in parallel processes, each once.

A unit is known by what decides its result: its kind, its settings and the units it needs. Its record is kept twice, in
a cache folder and as a line of a results file that belongs to the repository, and a start reads both, so that work
goes on where only the repository is left. What else it leaves (weights) is in the cache folder alone; where a later
unit needs files that are gone, the unit that makes them runs again.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from .records import Cache, finite, write_lines
from .runner import RunFailed, _environment, _ThisProcess, _Workers
from .training import _versions, git_commit


@dataclass(frozen=True)
class Unit:
    """
    A piece of work.

    Attributes:
        kind: what the work function does with it.
        settings: plain values, all that decides the result beside `needs`.
        needs: units whose files it reads, by the name under which it asks for them.
        label: units of one label take about the same time. `estimate`: seconds of processor time, while none is known.
        leaves_files: weights and the like, for other units.
        must_repeat: where its files are made again they must be the same, else nothing that follows is comparable.
    """

    kind: str
    settings: dict[str, Any] = field(hash=False)
    needs: dict[str, "Unit"] = field(default_factory=dict, hash=False)
    label: str = ""
    estimate: float = field(default=0.0, compare=False)
    leaves_files: bool = False
    must_repeat: bool = False

    @cached_property
    def digest(self) -> str:
        """20 hexadecimal digits of kind, settings and needs."""
        told = [self.kind, self.settings, {name: unit.digest for name, unit in self.needs.items()}]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:20]


class Ledger:
    """
    Records of finished units, and folders of what they left.

    Args:
        folder: the cache, one file a record and one folder a unit's files.
        lines: JSON lines of all records, in the repository.
        others: further such files, which are only read.

    Raises:
        ValueError: a line that is no record.
    """

    def __init__(self, folder: str | Path, lines: str | Path, others: Iterable[str | Path] = ()):
        self.folder, self.lines = Path(folder), Path(lines)
        self._cache = Cache(self.folder / "records")
        self._own = _read(self.lines)
        self._others = {digest: line for file in others for digest, line in _read(Path(file)).items()}

    def get(self, unit: Unit) -> dict[str, Any] | None:
        """The record, or None. One that only the cache has becomes a line."""
        line = self._own.get(unit.digest) or self._others.get(unit.digest)
        if line is None:
            line = self._cache.get(unit.digest)
            if line is None:
                return None
            self._keep(line)
        return line["record"]

    def put(self, unit: Unit, record: dict[str, Any]) -> None:
        """Keep a record in the cache and in the file of lines."""
        needs = {name: needed.digest for name, needed in unit.needs.items()}
        line = {"digest": unit.digest, "kind": unit.kind, "label": unit.label, "settings": unit.settings}
        line = finite(line | {"needs": needs, "record": record})
        self._cache.put(unit.digest, line)
        self._keep(line)

    def files(self, unit: Unit) -> Path:
        """The folder of what a unit left; it is there whole or not at all."""
        return self.folder / "files" / unit.digest

    def unfinished(self, unit: Unit) -> Path:
        """Where the work keeps what it would go on from; gone when the unit is finished."""
        return self.folder / "unfinished" / unit.digest

    def has(self, unit: Unit) -> bool:
        """Whether a unit that needs this one can run."""
        return self.get(unit) is not None and (not unit.leaves_files or self.files(unit).is_dir())

    def seconds(self, unit: Unit) -> float:
        """Processor time that a unit takes: the mean of finished ones of its label, else its estimate."""
        lines = [*self._own.values(), *self._others.values()]
        found = [line["record"]["cpu_seconds"] for line in lines if line["label"] == unit.label]
        return fmean(found) if found else unit.estimate

    def _keep(self, line: dict) -> None:
        self._own[line["digest"]] = line
        write_lines(self.lines, list(self._own.values()))


def run_units(
    plan: Callable[[Ledger], list[Unit]],
    work: Callable[[dict[str, Any]], dict[str, Any]],
    ledger: Ledger,
    workers: int = 1,
    minutes: float | None = None,
    tell: Callable[[Unit, dict], None] | None = None,
) -> bool:
    """
    Do what a plan asks for and the ledger does not have.

    Args:
        plan: all units that are known by now, first the most urgent; asked again whenever one is finished.
        work: a function of a module: {"kind", "settings", "needs": {name: folder}, "folder", "unfinished"} -> record.
            It writes files into `folder`, which is None where the unit leaves none. Long work keeps checkpoints in
            `unfinished`, a folder that it makes, and goes on from them after a kill; the seconds that it took until
            then are the record's `earlier_seconds` ({"cpu", "wall"}), and count.
        workers: processes of one thread each. One works in this process.
        minutes: nothing is begun that will probably not be finished by then, and (with several workers) what is
            running then is given up.
        tell: called with every unit that is finished, and its record.

    Returns:
        whether all is done.

    Raises:
        ValueError: workers or minutes are no positive number.
        RunFailed: a unit ended with an exception, or files made again are others where that matters. What was running
            besides is finished and kept.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"workers: got {workers!r}, allowed is a positive integer.")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes: got {minutes!r}, allowed is a positive number.")
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    running: dict[str, _Task] = {}
    failure = None
    with ExitStack() as stack:
        stack.enter_context(_environment())
        doing = partial(_timed, work)
        pool = stack.enter_context(_Workers(workers, doing) if workers > 1 else _ThisProcess(doing))
        while True:
            while pool.free and failure is None:
                left = None if deadline is None else deadline - time.monotonic()
                unit = _next(plan(ledger), ledger, running, left)
                if unit is None:
                    break
                running[unit.digest] = task = _Task(unit, ledger)
                pool.submit(task)
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not pool.busy or (left == 0.0 and workers > 1):
                break
            for task, record, error in pool.done(left):
                del running[task.unit.digest]
                error = error or _kept(task.unit, record, ledger)
                if error is not None:
                    failure = failure or f"{task.unit.label or task.unit.kind} failed:\n{error}"
                elif tell is not None:
                    tell(task.unit, record)
    if failure is not None:
        raise RunFailed(failure)
    return all(ledger.get(unit) is not None for unit in plan(ledger))


def missing(units: Iterable[Unit], ledger: Ledger) -> list[Unit]:
    """What has to run until these are finished, each once, behind what it needs: units whose files are gone too."""
    found: dict[str, Unit] = {}

    def add(unit: Unit) -> None:
        for needed in unit.needs.values():
            if not ledger.has(needed):
                add(needed)
        found.setdefault(unit.digest, unit)

    for unit in units:
        if ledger.get(unit) is None:
            add(unit)
    return list(found.values())


class _Task:
    """What a pool takes: `settings` are sent to the process."""

    def __init__(self, unit: Unit, ledger: Ledger):
        self.unit = unit
        folders = {name: str(ledger.files(needed)) for name, needed in unit.needs.items()}
        self.settings = {
            "kind": unit.kind,
            "settings": unit.settings,
            "needs": folders,
            "folder": str(ledger.files(unit)) if unit.leaves_files else None,
            "unfinished": str(ledger.unfinished(unit)),
        }


def _next(units: list[Unit], ledger: Ledger, running: dict, left: float | None) -> Unit | None:
    """The first unit that can run now, and will be finished in the seconds that are left."""
    for unit in units:
        if ledger.get(unit) is not None:
            continue
        ready = _first_ready(unit, ledger, running)
        if ready is not None and (left is None or ledger.seconds(ready) <= left):
            return ready
    return None


def _first_ready(unit: Unit, ledger: Ledger, running: dict) -> Unit | None:
    """The unit, or one that it waits for; None while all of that is running."""
    if unit.digest in running:
        return None
    missing = [needed for needed in unit.needs.values() if not ledger.has(needed)]
    if not missing:
        return unit
    found = (_first_ready(needed, ledger, running) for needed in missing)
    return next((ready for ready in found if ready is not None), None)


def _kept(unit: Unit, record: dict, ledger: Ledger) -> str | None:
    """Keep a new record; of a unit that ran again for its files the old one stays. Returns what is wrong."""
    known = ledger.get(unit)
    if known is None:
        ledger.put(unit, record)
    shutil.rmtree(ledger.unfinished(unit), ignore_errors=True)
    if known is None or known["fingerprint"] == record["fingerprint"]:
        return None
    told = f"its files were made again and have the fingerprint {record['fingerprint']}, not {known['fingerprint']}"
    if unit.must_repeat:
        shutil.rmtree(ledger.files(unit))
        return f"{told}; what the results file has cannot be continued here."
    print(f"note: {unit.label or unit.kind}: {told}, as on another machine; the record stays.", flush=True)
    return None


def _timed(work: Callable[[dict], dict], task: dict[str, Any]) -> dict[str, Any]:
    """The record of the work with its times, versions, and a fingerprint of the files, which are moved into place."""
    clock, processor = time.perf_counter(), time.process_time()
    record = _in_place(work, task) if task["folder"] else work(task)
    earlier = record.pop("earlier_seconds", {"cpu": 0.0, "wall": 0.0})
    record["wall_seconds"] = earlier["wall"] + time.perf_counter() - clock
    record["cpu_seconds"] = earlier["cpu"] + time.process_time() - processor
    return record | {"versions": _versions(), "git_commit": git_commit(), "threads": torch.get_num_threads()}


def _in_place(work: Callable[[dict], dict], task: dict[str, Any]) -> dict[str, Any]:
    target = Path(task["folder"])
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unfinished-") as staged:
        made = Path(staged) / "made"
        made.mkdir()
        record = work(task | {"folder": str(made)})
        digest = hashlib.sha256()
        for file in sorted(made.rglob("*.safetensors")):
            digest.update(file.name.encode() + file.read_bytes())
        if target.is_dir():  # left by a ledger whose lines are not this one's
            os.replace(target, Path(staged) / "earlier")
        os.replace(made, target)
    return record | {"fingerprint": digest.hexdigest()[:16]}


def _read(file: Path) -> dict[str, dict]:
    """
    Raises:
        ValueError: names the file and the line.
    """
    found = {}
    if file.is_file():
        for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                line = json.loads(text)
                found[line["digest"]] = {key: line[key] for key in (*LINE, "record")}
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{file}: line {number} is no finished unit ({error!r}).") from error
    return found


LINE = ("digest", "kind", "label", "settings", "needs")
