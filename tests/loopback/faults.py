"""Faults that a test asks of the loopback Hub."""

import math
import re
import threading
from dataclasses import dataclass


KINDS = {
    "drop": "the connection closes before the request is handled",
    "drop_after": "the request is handled, then the connection closes without an answer",
    "stall": "the request is never answered, the connection stays open",
    "error": "answered with status 500",
    "truncate": "a third of the promised bytes are sent, then the connection closes",
    "overtake": "before a commit is handled, somebody else commits to the same branch",
}


class HubError(Exception):
    """An answer that is an error: status, the Hub's X-Error-Code, a message, more headers."""

    def __init__(self, status: int, code: str | None = None, message: str = "", headers: dict | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}


@dataclass
class Fault:
    kind: str
    pattern: str
    left: float
    hits: int = 0


class Faults:
    """The faults that are in force, in the order in which they were added."""

    def __init__(self):
        self._lock, self._faults = threading.Lock(), []

    def add(self, kind: str, pattern: str, times: float = math.inf) -> Fault:
        """Ask for a fault at the next `times` requests whose "METHOD /path?query" has the pattern (`re.search`)."""
        if kind not in KINDS:
            raise ValueError(f"kind: got {kind!r}, allowed are {', '.join(KINDS)}.")
        fault = Fault(kind, pattern, times)
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Forget all faults."""
        with self._lock:
            self._faults.clear()

    def due(self, request: str) -> str | None:
        """The kind of the first fault that this request meets, counted as used, or None."""
        with self._lock:
            for fault in self._faults:
                if fault.left > 0 and re.search(fault.pattern, request):
                    fault.left -= 1
                    fault.hits += 1
                    return fault.kind
        return None
