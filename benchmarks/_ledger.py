"""Finished units of a long benchmark as JSON lines in a committed file, so that a later run does not repeat them."""

import json
import os
from pathlib import Path

from modeling_manticore.tasks.text import fingerprint


class Ledger:
    """
    One line a unit: its settings, its result and what it took. Lines are only ever added; units are told apart by all
    of their settings.

    Raises:
        ValueError: a line of the file is not such a unit.
    """

    def __init__(self, file: str | Path):
        self.file = Path(file)
        self.lines: dict[str, dict] = {}
        if self.file.is_file():
            for number, text in enumerate(self.file.read_text(encoding="utf-8").splitlines()):
                try:
                    line = json.loads(text)
                    if not {"cpu", "wall"} <= line["seconds"].keys() or "result" not in line:
                        raise KeyError("seconds, result")
                    self.lines[digest(line["settings"])] = line
                except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(f"{self.file}: line {number + 1} is no finished unit ({error!r}).") from error

    def find(self, settings: dict) -> dict | None:
        """The line of a unit, or None."""
        return self.lines.get(digest(settings))

    def add(self, settings: dict, result: dict, seconds: dict, made_by: dict) -> None:
        """Add a finished unit, flushed to the disk before this returns."""
        line = {"settings": settings, "result": result, "seconds": seconds, "made_by": made_by}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines[digest(settings)] = line


def digest(settings: dict) -> str:
    """A short hash of settings, whatever their order."""
    return fingerprint(json.dumps(settings, sort_keys=True))
