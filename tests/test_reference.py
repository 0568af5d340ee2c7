"""Every public name has a docstring and is in the reference."""

import inspect
import re
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
from snippets import ROOT

import modeling_manticore
from modeling_manticore import search


PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md")}
DOCUMENTED = [name for page in PAGES.values() for name in re.findall(r"^::: (\S+)$", page, flags=re.MULTILINE)]
TABLES = {"STAGES", "STRATEGIES"}  # values, told of in strategies.md


def resolved(name: str) -> Any:
    """The module, class or function of a dotted name."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def public(thing: Any) -> dict[str, Any]:
    """Public classes and functions of a module, public methods and properties that a class defines itself."""
    if isinstance(thing, ModuleType):
        return {
            name: value
            for name, value in vars(thing).items()
            if not name.startswith("_")
            and (inspect.isclass(value) or inspect.isfunction(value))
            and value.__module__ == thing.__name__
        }
    if inspect.isclass(thing):
        return {
            name: value
            for name, value in vars(thing).items()
            if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property | classmethod))
        }
    return {}


def without_docstring(name: str, thing: Any) -> list[str]:
    """Names in `thing`, itself among them, that have no docstring of their own or of what they override."""
    found = [] if inspect.getdoc(thing) else [name]
    if inspect.isclass(thing):
        if thing.__doc__ is None or thing.__doc__.startswith(f"{thing.__name__}("):  # what dataclasses write
            found = [name]
        return found + [f"{name}.{key}" for key in public(thing) if not inspect.getdoc(getattr(thing, key))]
    return found + [part for key, value in public(thing).items() for part in without_docstring(f"{name}.{key}", value)]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_what_is_documented_has_docstrings(name):
    assert without_docstring(name, resolved(name)) == []


@pytest.mark.parametrize("module", [modeling_manticore, search], ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_reference(module):
    listed = set(DOCUMENTED) | {f"{name}.{key}" for name in DOCUMENTED for key in public(resolved(name))}
    for name in set(module.__all__) - TABLES:
        thing = getattr(module, name)
        assert f"{thing.__module__}.{thing.__qualname__}" in listed, name
    assert all(f"`{name}`" in PAGES["strategies.md"] for name in TABLES)


def test_lazy_names_are_public_names():
    assert set(modeling_manticore._HOMES) == {*modeling_manticore.__all__}
    for name in modeling_manticore.__all__:
        assert getattr(modeling_manticore, name) is not None


def test_nothing_is_documented_twice():
    assert len(DOCUMENTED) == len(set(DOCUMENTED))


def test_a_missing_docstring_is_found():
    class Undocumented:
        """It has one."""

        def method(self):
            pass

    assert without_docstring("x", Undocumented) == ["x.method"]
    assert without_docstring("f", lambda: None) == ["f"]
