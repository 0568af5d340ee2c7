"""The range of transformers that `[project]` admits, proved: the fast tests on its newest and its oldest release.

    python benchmarks/transformers_versions.py [VERSION ...] [--environments DIR] [--tests PATH ...]

Each version gets an environment of its own with torch from `constraints.txt`, that transformers, and what the tests
need. Without versions: the oldest release that `pyproject.toml` admits and the newest that the index offers. Prints a
table, writes `results/transformers_versions.json`, and fails where a test does.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

import tomllib
from _shared import write
from packaging.requirements import Requirement
from packaging.version import Version


ROOT = Path(__file__).parents[1]
# What one release of transformers ties to itself; the other pins hold for all.
FREE = ("transformers", "huggingface_hub", "tokenizers", "safetensors")


def requirements() -> tuple[Requirement, list[str]]:
    """What `[project]` asks of transformers, and everything else that the package and its tests need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras, wanted, seen = project["optional-dependencies"], list(project["dependencies"]), set()
    queue = ["dev"]
    while queue:
        extra = queue.pop()
        seen.add(extra)
        for line in extras[extra]:
            requirement = Requirement(line)
            if requirement.name == project["name"]:
                queue += sorted(requirement.extras - seen)
            else:
                wanted.append(line)
    ours = next(Requirement(line) for line in wanted if Requirement(line).name == "transformers")
    others = [line for line in wanted if Requirement(line).name.replace("-", "_") not in FREE]
    return ours, sorted(set(others))


def releases(requirement: Requirement) -> list[Version]:
    """Releases on the index that the requirement admits, oldest first."""
    command = [sys.executable, "-m", "pip", "index", "versions", requirement.name]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"Available versions: (.*)", listed).group(1).split(", ")
    return sorted(Version(version) for version in found if requirement.specifier.contains(version))


def environment(version: str, folder: Path, others: list[str]) -> Path:
    """The Python of an environment with that transformers; one that is there already is used again."""
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pins = (ROOT / "constraints.txt").read_text().splitlines()
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(pin for pin in pins if not pin.startswith(FREE)) + "\n")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(constraints)]
        subprocess.run([*pip, "torch"], check=True)
        subprocess.run([*pip, f"transformers=={version}", *others], check=True)
        ready.touch()
    return python


def run_tests(python: Path, tests: list[str]) -> dict:
    """Counts, seconds and the names of failed tests."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", f"--junitxml={report}"]
        subprocess.run(
            [*command, "-m", "not slow and not cuda and not network", *tests],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
        )
        suite = ET.parse(report).getroot().find("testsuite")
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    return counts | {"seconds": round(float(suite.get("time"))), "failed": failed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*")
    parser.add_argument("--environments", type=Path, help="where environments are kept; by default they are not")
    parser.add_argument("--tests", nargs="*", default=["tests"])
    options = parser.parse_args()
    ours, others = requirements()
    admitted = releases(ours)
    versions = options.versions or [str(admitted[0]), str(admitted[-1])]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for version in versions:
            python = environment(version, (options.environments or Path(folder)) / version, others)
            results[version] = run_tests(python, options.tests)
    print(f"\ntransformers{ours.specifier} admits {admitted[0]} to {admitted[-1]}")
    print(f"{'version':>10} {'tests':>6} {'failed':>7} {'skipped':>8} {'seconds':>8}")
    for version, row in results.items():
        bad = row["failures"] + row["errors"]
        print(f"{version:>10} {row['tests']:6} {bad:7} {row['skipped']:8} {row['seconds']:8}")
        for name in row["failed"]:
            print(f"{'':>10} {name}")
    write("transformers_versions", {"range": str(ours.specifier), "tests": options.tests, "versions": results})
    sys.exit(any(row["failed"] for row in results.values()))


if __name__ == "__main__":
    main()
