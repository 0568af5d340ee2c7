"""Dataclasses read from plain values, exactly: unknown names, wrong types and values out of range are ValueErrors."""

import difflib
import math
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any


MOST_ITEMS = 1024
MOST_CHARACTERS = 20_000
NAMES = {str: "text", int: "an integer", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Limits:
    """
    What a field allows beyond its type. `least` and `most` bound numbers, and for lists the number of entries; `above`
    is an open bound; `check` (value, place) raises a ValueError.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    choices: tuple | None = None
    check: Callable[[Any, str], None] | None = None


def checked(default: Any = MISSING, **limits: Any) -> Any:
    """A dataclass field with `Limits`; without a default it is required."""
    metadata = {"limits": Limits(**limits)}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def read(kind: type, value: Any, where: str = "") -> Any:
    """
    An instance of a dataclass out of a mapping of its fields' names.

    Args:
        where: the place of the mapping, for messages.

    Raises:
        ValueError: names the field, what was given and what is allowed.
    """
    place = where or "the recipe"
    if not isinstance(value, dict):
        raise ValueError(f"{place}: got {_shown(value)}, allowed is a mapping.")
    known, found = _fields(kind), {}
    for key in value:
        if key not in known:
            close = difflib.get_close_matches(str(key)[:80], known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"allowed are {', '.join(known)}."
            raise ValueError(f"{_at(where, str(key)[:80])}: there is no such field; {hint}")
    for name, (entry, hint) in known.items():
        if name in value:
            found[name] = convert(hint, value[name], _at(where, name), entry.metadata.get("limits", Limits()))
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise ValueError(f"{_at(where, name)}: it is missing.")
    made = kind(**found)
    if hasattr(made, "validate"):
        made.validate(where)
    return made


def convert(hint: Any, value: Any, where: str, limits: Limits = Limits()) -> Any:
    """
    A value as the type of a field says: None only where it is optional, integers for floats, nothing else converted.

    Raises:
        ValueError: names the place.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        kinds = [kind for kind in arguments if kind is not type(None)]
        if value is None and len(kinds) < len(arguments):
            return None
        fitting = [kind for kind in kinds if _fits(kind, value)]
        if not fitting:
            allowed = " or ".join(_named(kind) for kind in kinds)
            raise ValueError(f"{where}: got {_shown(value)}, allowed is {allowed}.")
        return convert(fitting[0], value, where, limits)
    if not _fits(hint, value):
        raise ValueError(f"{where}: got {_shown(value)}, allowed is {_named(hint)}.")
    if is_dataclass(hint):
        return read(hint, value, where)
    if origin is list:
        most = MOST_ITEMS if limits.most is None else limits.most
        least = limits.least or 0
        if not least <= len(value) <= most:
            raise ValueError(f"{where}: got {len(value)} entries, allowed are {least}..{most}.")
        inner = Limits(check=limits.check)
        return [convert(arguments[0], entry, f"{where}[{i}]", inner) for i, entry in enumerate(value)]
    if hint is float:
        value = float(value)
    _check(value, where, limits)
    return value


def _check(value: Any, where: str, limits: Limits) -> None:
    if isinstance(value, str) and (len(value) > MOST_CHARACTERS or "\0" in value):
        raise ValueError(f"{where}: got {len(value)} characters, allowed are {MOST_CHARACTERS} without a NUL.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: got {value}, allowed is a finite number.")
    if limits.choices is not None and value not in limits.choices:
        raise ValueError(f"{where}: got {_shown(value)}, allowed are {', '.join(map(repr, limits.choices))}.")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high, above = limits.least, limits.most, limits.above
        outside = (low is not None and value < low) or (high is not None and value > high)
        if outside or (above is not None and value <= above):
            bounds = [f"at least {low}"] * (low is not None) + [f"above {above}"] * (above is not None)
            bounds += [f"at most {high}"] * (high is not None)
            raise ValueError(f"{where}: got {value}, allowed is {' and '.join(bounds)}.")
    if limits.check is not None:
        limits.check(value, where)


def plain(value: Any) -> Any:
    """A dataclass as plain values, without the fields that have their default."""
    if is_dataclass(value):
        kept = {}
        for entry in fields(value):
            own = getattr(value, entry.name)
            default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
            if own != default or default is MISSING:
                kept[entry.name] = plain(own)
        return kept
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    return value


def _fits(kind: Any, value: Any) -> bool:
    origin = typing.get_origin(kind)
    if kind is Any:
        return True
    if origin is list:
        return isinstance(value, list)
    if origin is dict or is_dataclass(kind):
        return isinstance(value, dict)
    if kind in (int, float):
        allowed = (int,) if kind is int else (int, float)
        return isinstance(value, allowed) and not isinstance(value, bool)
    return isinstance(value, kind)


def _named(kind: Any) -> str:
    if is_dataclass(kind) or typing.get_origin(kind) is dict:
        return "a mapping"
    return "a list" if typing.get_origin(kind) is list else NAMES.get(kind, str(kind))


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _at(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


@cache
def _fields(kind: type) -> dict[str, tuple[Field, Any]]:
    hints = typing.get_type_hints(kind)
    return {entry.name: (entry, hints[entry.name]) for entry in fields(kind)}
