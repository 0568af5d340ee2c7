"""
Time and peak memory of `from_pretrained`: a hybrid against a native model of the same bytes, in child processes that
take turns. A child has done its imports and forks for every measurement; the fork loads once, and then again. So
"first" is the first load of a process, and what imports take is reported beside and is no part of it.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from _speed_forward import Settings
from _speed_load_child import AGAIN, FIRST
from _speed_shapes import Shape, half_and_half, make, one_slice
from _timing import REFERENCE, Ratio, ratio_of


TIME_BOUND, MEMORY_BOUND = 1.15, 1.10
CHILD = Path(__file__).with_name("_speed_load_child.py")


class Loader:
    """A process that has done its imports and loads models on demand, each time in a fork of itself."""

    def __init__(self, folders: list[Path], told: IO[str]):
        command = [sys.executable, str(CHILD), *map(str, folders)]
        self.told = told  # what it says on stderr: a pipe that nobody reads would fill up
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": told}
        self.process = subprocess.Popen(command, text=True, **pipes)
        self.import_seconds = self._line()["import"]

    def _line(self) -> dict[str, float]:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.told.seek(0)
            raise RuntimeError(f"the process that loads ended early: {self.told.read()[-2000:]}")
        return json.loads(line)

    def __call__(self) -> dict[str, float]:
        """Load once."""
        self.process.stdin.write("load\n")
        self.process.stdin.flush()
        return self._line()

    def close(self) -> None:
        """End the process."""
        self.process.communicate(timeout=60)


def loading(shape: Shape, settings: Settings) -> list[dict]:
    """
    A hybrid of one whole component against the component, the same bytes; and half a Transformer with half a
    state-space model against the two halves as native models, one loaded after the other.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, sides in stored(shape, Path(folder)).items():
            rows += _rows(name, sides, settings)
    return rows


def stored(shape: Shape, folder: Path) -> dict[str, dict[str, list[Path]]]:
    """case -> side -> folders to load; written here."""
    whole, halves = one_slice(shape), half_and_half(shape).hybrid
    layers = shape.layers // 2
    models = {
        "hybrid": whole.hybrid,
        "native": whole.native,
        "halves": halves,
        "attention": make(shape.attention(layers)),
        "state": make(shape.state(shape.layers - layers)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {
        "one slice": {"measured": [folder / "hybrid"], REFERENCE: [folder / "native"]},
        "half and half": {"measured": [folder / "halves"], REFERENCE: [folder / "attention", folder / "state"]},
    }


def _rows(name: str, sides: dict[str, list[Path]], settings: Settings) -> list[dict]:
    runs: dict[str, list] = {"measured": [], REFERENCE: [], "again": []}
    order = random.Random(0)
    with ExitStack() as files:
        loaders = {
            side: Loader(folders, files.enter_context(tempfile.TemporaryFile("w+"))) for side, folders in sides.items()
        }
        began = time.monotonic()
        while len(runs["again"]) < settings.fewest or time.monotonic() - began < settings.seconds:
            for side in order.sample(list(runs), len(runs)):
                runs[side].append(loaders[REFERENCE if side == "again" else side]())
        for loader in loaders.values():
            loader.close()

    def ratio(kind: str) -> Ratio:
        return ratio_of(*([run[kind] for run in found] for found in runs.values()))

    imports = {side: loader.import_seconds for side, loader in loaders.items()}
    sizes = {side: runs[side][0]["bytes"] for side in ("measured", REFERENCE)}
    rows = []
    for load in (FIRST, AGAIN):
        clocks = {clock: ratio(f"{load} {clock}") for clock in ("wall", "processor")}
        row = {"name": f"{load}, {name}"} | clocks[settings.clock].row(TIME_BOUND)
        row["clocks"] = {clock: {"ratio": r.ratio, "interval": [r.low, r.high]} for clock, r in clocks.items()}
        rows.append(row | {"import_seconds": imports, "bytes": sizes})
    peak = ratio("peak").row(MEMORY_BOUND)
    peak["peak_bytes"], peak["reference_peak_bytes"] = peak.pop("seconds"), peak.pop("reference_seconds")
    return [*rows, {"name": f"peak memory, {name}"} | peak | {"bytes": sizes}]
