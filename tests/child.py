"""Run code in a process where our package cannot be found and the caches are empty."""

import os
import subprocess
import sys
from pathlib import Path


PREAMBLE = """
import importlib.abc, importlib.util, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "modeling_manticore" or name.startswith("modeling_manticore."):
            raise ModuleNotFoundError("No module named 'modeling_manticore'", name="modeling_manticore")

sys.meta_path.insert(0, Absent())
try:
    import modeling_manticore
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package is importable")
"""


def run_without_package(code: str, folder: Path, timeout: int = 240, variables: dict | None = None) -> str:
    """Standard output of `code`, run in `folder` with a fresh HF_HOME, no input and further environment variables."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HF_HOME")}
    environment |= {"HF_HOME": str(folder / "hf_home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= variables or {}
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
