"""Finished runs on disk: one JSON file each in a cache, named after its settings, and JSON lines of an experiment."""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any


class Cache:
    """Records by the digest of their job. A record is there whole or not at all."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def get(self, digest: str) -> dict[str, Any] | None:
        """The record, or None."""
        file = self._file(digest)
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def put(self, digest: str, record: dict[str, Any]) -> None:
        """Write a record; numbers that are not finite become null."""
        write_whole(self._file(digest), json.dumps(finite(record), indent=1) + "\n")

    def _file(self, digest: str) -> Path:
        return self.folder / f"{digest}.json"


def finite(value: Any) -> Any:
    """Plain values with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(file: Path, text: str) -> None:
    """Write a sibling, then move it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, staged = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as opened:
            opened.write(text)
        os.chmod(staged, 0o644)
        os.replace(staged, file)
    except BaseException:
        Path(staged).unlink(missing_ok=True)
        raise


def lines_file(folder: str | Path, name: str, shard: tuple[int, int] = (1, 1)) -> Path:
    """Where the JSON lines of an experiment, or of one shard of it, are."""
    index, count = shard
    return Path(folder) / (f"{name}.jsonl" if count == 1 else f"{name}.shard-{index}-of-{count}.jsonl")


def write_lines(file: Path, records: list[dict[str, Any]]) -> None:
    """One JSON line a run, the whole file anew."""
    write_whole(file, "".join(json.dumps(record) + "\n" for record in records))


# What tables read of every run, and of one that was tested.
READ = (
    *("digest", "model", "task", "phase", "learning_rate", "seed", "steps", "settings"),
    *("validation", "baseline", "cpu_seconds", "versions", "git_commit"),
)
READ_OF_TESTED = (
    *("test", "also_tested", "also_baseline"),
    *("parameters", "tokens", "flops_per_token", "cache_bytes_per_token"),
)

# What a line says besides the record of its run.
TOLD = ("experiment", "model", "task", "phase", "learning_rate", "seed", "steps", "digest", "settings")


def entry_of(line: dict[str, Any]) -> dict[str, Any]:
    """The cache's entry for a line: its settings, and the record of its run."""
    record = {key: value for key, value in line.items() if key not in TOLD}
    return {"settings": line.get("settings"), "record": record}


def read_lines(folder: str | Path, name: str) -> list[dict[str, Any]]:
    """
    The runs of an experiment, of its own file and of its shards', each once.

    Raises:
        ValueError: names the file and the line that is no run.
    """
    folder = Path(folder)
    files = [lines_file(folder, name), *sorted(folder.glob(f"{name}.shard-*-of-*.jsonl"))]
    found: dict[tuple, dict] = {}
    for record in (record for file in files for record in read_file(file)):
        found.setdefault((record["digest"], record["model"], record["task"]), record)
    return list(found.values())


def read_file(file: Path) -> list[dict[str, Any]]:
    """
    The runs of one file, none where it is not there.

    Raises:
        ValueError: names the file and the line that is no run.
    """
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.is_file() else (), start=1):
        try:
            record = json.loads(line)
            for key in READ + READ_OF_TESTED * (record["phase"] == "final"):
                record[key]
            records.append(record)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: line {number} is no run ({error!r}).") from error
    return records
