"""
Slow tests of the libraries that hybrids work with, as a table: item, status, seconds, version.

    python benchmarks/ecosystem.py          # what `make test` leaves out
    python benchmarks/ecosystem.py --all    # everything in tests/test_ecosystem_*.py
"""

import os
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from _shared import quiet, write


ROOT = Path(__file__).parents[1]
LIBRARIES = {"lm_eval": "lm-eval", "peft": "peft", "trl": "trl", "compile": "torch", "int8": "torchao"}
LIBRARIES |= {"devices": "accelerate", "distributed": "accelerate"}  # by test file; the others are of transformers


class Collector:
    """A pytest plugin that keeps one row per test."""

    def __init__(self):
        self.rows = {}

    def pytest_runtest_logreport(self, report) -> None:
        file, _, name = report.nodeid.partition("::")
        library = LIBRARIES.get(Path(file).stem.removeprefix("test_ecosystem_"), "transformers")
        row = self.rows.setdefault(
            report.nodeid,
            {"item": name, "library": f"{library} {version(library)}", "status": "passed", "seconds": 0.0},
        )
        row["seconds"] = round(row["seconds"] + report.duration, 2)
        if report.outcome != "passed":
            row["status"] = report.outcome


def main(arguments: list[str]) -> int:
    """Run, print, write; 0 if every test passed."""
    if arguments not in ([], ["--all"]):
        raise SystemExit(f"got {' '.join(arguments)}, allowed is --all or nothing")
    quiet()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))  # the tests import this checkout
    collector = Collector()
    files = sorted(str(file) for file in (ROOT / "tests").glob("test_ecosystem_*.py"))
    chosen = [] if arguments else ["-m", "slow"]
    code = pytest.main(["-q", "-p", "no:cacheprovider", *chosen, *files], plugins=[collector])
    rows = list(collector.rows.values())
    width = max((len(row["item"]) for row in rows), default=4)
    print(f"\n{'item':{width}}  status   seconds  library")
    for row in rows:
        print(f"{row['item']:{width}}  {row['status']:7}  {row['seconds']:7.1f}  {row['library']}")
    write("ecosystem", {"rows": rows})
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
