"""A YAML reader for files that strangers write: plain mappings, lists and scalars, and nothing else."""

import math
import re
from pathlib import Path
from typing import Any

import yaml

from ..building.names import hint


MOST_BYTES = 2**20
MOST_NODES = 20_000
DEEPEST = 16
MOST_DIGITS = 18  # of an integer; all sizes and counts are far below
INTEGER = re.compile(r"[-+]?[0-9][0-9_]*")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
SPECIAL = re.compile(r"[-+]?\.?(inf|nan|infinity)", re.IGNORECASE)
WORDS = {"null": None, "~": None, "": None, "true": True, "false": False}
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(file: str | Path) -> dict[str, Any]:
    """
    The mapping in a YAML file.

    Raises:
        ValueError: the file cannot be read, is too large, or holds what `parse_yaml` refuses.
    """
    path = Path(file)
    try:
        with path.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path}: it cannot be read ({error.strerror}){hint(str(path))}") from error
    if len(content) > MOST_BYTES:
        raise ValueError(f"{path}: it is larger than {MOST_BYTES} bytes, which no recipe needs.")
    try:
        return parse_yaml(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: it is not UTF-8 ({error.reason} at byte {error.start}).") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_yaml(text: str) -> dict[str, Any]:
    """
    The mapping that a YAML text holds: keys are strings; values are strings, booleans (true, false), numbers (1e-4 is
    one, 010 and 1:30 are none), null, lists and mappings.

    Raises:
        ValueError: names the place. Refused are duplicate keys, tags, anchors and aliases, more than one document,
            deep nesting, NaN and infinity, integers of more than 18 digits, and very many entries.
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES} bytes.")
    try:
        events = _Events(text)
        events.expect(yaml.StreamStartEvent)
        if isinstance(events.peek, yaml.StreamEndEvent):
            raise ValueError("it is empty, allowed is a mapping.")
        start = events.expect(yaml.DocumentStartEvent)
        if start.tags:
            raise ValueError("it defines tags, allowed are plain values.")
        value = _node(events, "", 0)
        events.expect(yaml.DocumentEndEvent)
        if not isinstance(events.peek, yaml.StreamEndEvent):
            raise ValueError("it holds more than one document.")
    except yaml.YAMLError as error:
        raise ValueError(f"it is not valid YAML ({' '.join(str(error).split())[:300]}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, allowed is a mapping.")
    return value


class _Events:
    """The events of a text, one at a time, so that a refusal comes before the rest is read."""

    def __init__(self, text: str):
        self._events, self.count = yaml.parse(text, Loader=LOADER), 0
        self.peek: Any = next(self._events)

    def next(self) -> Any:
        event, self.count = self.peek, self.count + 1
        if self.count > MOST_NODES:
            raise ValueError(f"it has more than {MOST_NODES} entries, which no recipe needs.")
        self.peek = next(self._events, None)
        return event

    def expect(self, kind: type) -> Any:
        event = self.next()
        if not isinstance(event, kind):
            raise ValueError(f"got {type(event).__name__}, allowed is {kind.__name__}.")
        return event


def _node(events: _Events, where: str, depth: int) -> Any:
    event = events.next()
    what = where or "the file"
    if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
        raise ValueError(f"{what}: got an anchor or alias, allowed are values written out.")
    if event.tag is not None:
        raise ValueError(f"{what}: got the tag {event.tag[:80]!r}, allowed are plain values.")
    if depth > DEEPEST:
        raise ValueError(f"{where[:200]}: nested more than {DEEPEST} levels deep.")
    if isinstance(event, yaml.ScalarEvent):
        return scalar(event.value, what) if event.style in (None, "") else event.value
    if isinstance(event, yaml.SequenceStartEvent):
        values: list = []
        while not isinstance(events.peek, yaml.SequenceEndEvent):
            values.append(_node(events, f"{where}[{len(values)}]", depth + 1))
        events.next()
        return values
    mapping: dict[str, Any] = {}
    while not isinstance(events.peek, yaml.MappingEndEvent):
        key = _node(events, f"a key of {what}", depth + 1)
        if not isinstance(key, str):
            raise ValueError(f"{what}: got the key {str(key)[:80]!r}, allowed are strings.")
        place = f"{where}.{key[:80]}" if where else key[:80]
        if key in mapping:
            raise ValueError(f"{place}: it is given twice.")
        mapping[key] = _node(events, place, depth + 1)
    events.next()
    return mapping


def scalar(text: str, where: str) -> None | bool | int | float | str:
    """
    The value of a plain scalar.

    Raises:
        ValueError: a number that is not finite, or an integer of too many digits.
    """
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    if SPECIAL.fullmatch(text):
        raise ValueError(f"{where}: got {text}, allowed are finite numbers.")
    if len(text) > 64:
        if INTEGER.fullmatch(text) or FLOAT.fullmatch(text):
            raise ValueError(f"{where}: got a number of {len(text)} digits, allowed are {MOST_DIGITS}.")
        return text
    if INTEGER.fullmatch(text):
        digits = text.replace("_", "")
        if len(digits.lstrip("+-")) > MOST_DIGITS:
            raise ValueError(f"{where}: got {text}, allowed are integers of at most {MOST_DIGITS} digits.")
        if len(digits.lstrip("+-")) > 1 and digits.lstrip("+-").startswith("0"):
            return text  # a version or an identifier, not a number
        return int(digits)
    if FLOAT.fullmatch(text):
        number = float(text.replace("_", ""))
        if not math.isfinite(number):
            raise ValueError(f"{where}: got {text}, allowed are finite numbers.")
        return number
    return text
