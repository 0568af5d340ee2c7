"""
Time and peak memory of `from_pretrained`: a hybrid against a native model of the same bytes, in child processes that
take turns. A child has done its imports and forks for every measurement; the fork loads once, and then again. So
"first" is the first load of a process, and what imports take is reported beside and is no part of it.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from _speed_forward import Settings
from _speed_shapes import Shape, half_and_half, make, one_slice
from _timing import REFERENCE, Ratio, ratio_of


TIME_BOUND, MEMORY_BOUND = 1.15, 1.10
FIRST, AGAIN = "first load", "load again"


def status(field: str) -> int:
    """Bytes that the kernel says of this process under a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def serve(folders: list[str]) -> None:
    """In the child: import, say how long that took, and for every line on stdin load once in a fork."""
    began = time.perf_counter()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    kinds = {json.loads(Path(folder, "config.json").read_text())["model_type"] for folder in folders}
    if "manticore" in kinds:
        import modeling_manticore

        assert modeling_manticore.ManticoreForCausalLM
    for folder in folders:  # the class of the model and those of its components, imported when first asked for
        config = AutoConfig.from_pretrained(folder)
        for part in [config, *getattr(config, "components", [])]:
            AutoModelForCausalLM._model_mapping[type(part)]
    print(json.dumps({"import": time.perf_counter() - began}), flush=True)
    for _ in sys.stdin:
        process = os.fork()
        if process == 0:
            print(json.dumps(load(folders, AutoModelForCausalLM.from_pretrained)), flush=True)
            os._exit(0)
        if os.waitpid(process, 0)[1] != 0:
            raise SystemExit("the process that loads ended with an error")


def load(folders: list[str], from_pretrained: Callable) -> dict[str, float]:
    """In the fork: the first load of its life and the second; seconds by both clocks, bytes and the first's peak."""
    found: dict[str, float] = {}
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    for name in (FIRST, AGAIN):
        began = time.perf_counter(), time.process_time()
        models = [from_pretrained(folder) for folder in folders]
        found[f"{name} wall"] = time.perf_counter() - began[0]
        found[f"{name} processor"] = time.process_time() - began[1]
        if name == FIRST:
            found["peak"] = status("VmHWM") - before
            found["bytes"] = sum(p.numel() * p.element_size() for model in models for p in model.parameters())
        del models
    return found


class Loader:
    """A process that has done its imports and loads models on demand, each time in a fork of itself."""

    def __init__(self, folders: list[Path]):
        command = [sys.executable, __file__, *map(str, folders)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, **pipes)
        self.import_seconds = self._line()["import"]

    def _line(self) -> dict[str, float]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that loads ended early: {self.process.stderr.read()[-2000:]}")
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
    loaders = {side: Loader(folders) for side, folders in sides.items()}
    runs: dict[str, list] = {"measured": [], REFERENCE: [], "again": []}
    order, began = random.Random(0), time.monotonic()
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


if __name__ == "__main__":
    serve(sys.argv[1:])
