"""Temporary folders with the process's number in their names, so that a later run can remove what a kill left."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


PREFIX = "manticore-push."


@contextmanager
def staging_folder() -> Iterator[Path]:
    """An empty folder that is gone afterwards. Folders of dead processes of ours go first."""
    parent = Path(tempfile.gettempdir())
    remove_stale(parent, PREFIX)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f"{PREFIX}{os.getpid()}.") as folder:
        yield Path(folder)


def remove_stale(parent: Path, prefix: str) -> None:
    """Remove folders `{prefix}{pid}.*` in `parent` that are the user's own and whose process is dead."""
    if os.name != "posix" or not parent.is_dir():
        return
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.\w+")
    for entry in os.scandir(parent):
        match = pattern.fullmatch(entry.name)
        if match is None or not entry.is_dir(follow_symlinks=False) or is_alive(int(match[1])):
            continue
        if entry.stat().st_uid == os.getuid():
            shutil.rmtree(entry.path, ignore_errors=True)


def is_alive(pid: int) -> bool:
    """Whether there is a process of this number, whoever's."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
