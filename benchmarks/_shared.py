"""What the benchmark scripts share: intervals over seeds, and results as JSON with what made them."""

import argparse
import json
import math
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev

import torch
from transformers.utils import logging

from modeling_manticore.experiments.units import Ledger


RESULTS = Path(__file__).parent / "results"
STUDENT = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
}  # two-sided 95 %, by sample size


def quiet() -> None:
    """Neither progress bars nor hints of transformers between the lines of a table."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def parsed(parser: argparse.ArgumentParser, words: list[str] | None) -> argparse.Namespace:
    """The options; numbers of processes, seeds and minutes must be above 0 (those that are named so)."""
    given = parser.parse_args(words)
    for name in ("workers", "seeds", "minutes"):
        value = getattr(given, name, None)
        if value is not None and not value > 0:
            parser.error(f"{name}: got {value}, allowed is a number above 0")
    return given


def opened_ledger(folder: Path, lines: Path, others: list[Path] | None = None) -> Ledger:
    """The finished units; a file that is broken ends the program with a line."""
    try:
        return Ledger(folder, lines, others or [])
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


def summary(values: list[float]) -> dict:
    """Mean, 95 % interval (Student's t) and the values themselves."""
    half = STUDENT[len(values)] * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": mean(values), "half_width": half, "values": values}


def shown(values: list[float]) -> str:
    """`mean +- half width` in three digits."""
    found = summary(values)
    return f"{found['mean']:.3f}" + ("" if found["half_width"] is None else f" +- {found['half_width']:.3f}")


def versions(*packages: str) -> dict[str, str]:
    """Installed version of each package."""
    return {package: version(package) for package in packages}


def write(name: str, results: dict, folder: Path = RESULTS) -> None:
    """Write `results/NAME.json`, or that in another folder, with the command and the versions."""
    made_by = {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "versions": {"python": platform.python_version()} | versions("torch", "transformers"),
        "threads": torch.get_num_threads(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(json.dumps({"made_by": made_by} | results, indent=2) + "\n")
    print(f"written: {os.path.relpath(file, Path(__file__).parents[1])}")
