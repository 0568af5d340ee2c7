"""
Xet with a folder as its storage: hf_xet accepts `local:///folder` where a storage server's address is expected.

The client writes contents and an index (MDB shards) into the folder; the Hub reads the index to learn which contents
are there, and hands the folder's address out with its tokens. A folder's database takes one process at a time, so
every repository has a folder, and contents are read in a process of their own, and only for clients without Xet.
"""

import hashlib
import subprocess
import sys
import time
from pathlib import Path

from .faults import HubError


LIFETIME = 3600  # seconds
RECORD = 48  # bytes
FETCH = """
import sys, hf_xet
address, key, size, target, expires = sys.argv[1:]
group = hf_xet.XetSession().new_file_download_group(endpoint=address, token="t", token_expiry_unix_secs=int(expires))
with group as files:
    files.start_download_file(hf_xet.XetFileInfo(key, int(size)), target)
"""


def token(handler, name: str, revision: str) -> None:
    """GET /api/models/{name}/xet-read-token or xet-write-token/{revision}."""
    handler.repository(name, write="xet-write-token" in handler.path)
    if handler.hub.xet_folder is None:
        raise HubError(404, message="Xet is not enabled")
    address, expires = f"local://{handler.hub.xet_place(name)}", int(time.time()) + LIFETIME
    headers = {
        "X-Xet-Cas-Url": address,
        "X-Xet-Access-Token": "t",
        "X-Xet-Token-Expiration": str(expires),
    }
    handler.answer({"casUrl": address, "exp": expires, "accessToken": "t"}, headers=headers)


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """{SHA-256: (Xet hash, size in bytes)} of the files in the folder, read from its shards."""
    found = {}
    for shard in folder.rglob("shards/*.mdb"):
        data, place = shard.read_bytes(), RECORD
        while data[place : place + 32] != b"\xff" * 32:
            key = _hash_text(data[place : place + 32])
            flags = int.from_bytes(data[place + 32 : place + 36], "little")
            segments = int.from_bytes(data[place + 36 : place + 40], "little")
            place += RECORD
            size = sum(
                int.from_bytes(data[place + RECORD * i + 36 : place + RECORD * i + 40], "little")
                for i in range(segments)
            )
            place += RECORD * segments * (2 if flags >> 31 & 1 else 1)
            if flags >> 30 & 1:
                found[_hash_text(data[place : place + 32])] = (key, size)
                place += RECORD
    return found


def _hash_text(data: bytes) -> str:
    """Xet writes a hash as four little-endian numbers of 64 bits."""
    return "".join(f"{int.from_bytes(data[i : i + 8], 'little'):016x}" for i in range(0, 32, 8))


def fetch(folder: Path, key: str, size: int, sha256: str, target: Path) -> None:
    """
    Copy one content out of the folder.

    Raises:
        HubError: it is not there, or not what its SHA-256 says.
    """
    expires = str(int(time.time()) + LIFETIME)
    words = [sys.executable, "-c", FETCH, f"local://{folder}", key, str(size), str(target), expires]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode or hashlib.sha256(target.read_bytes()).hexdigest() != sha256:
        target.unlink(missing_ok=True)
        raise HubError(500, message=f"Xet: {done.stderr[-300:]}")
