"""Recipes: one YAML file says how one hybrid is made, from its components to its repository."""

import importlib.resources
from pathlib import Path
from typing import Any

from .checked import plain, read
from .recipe_schema import Recipe
from .safe_yaml import parse_yaml, read_yaml


def load_recipe(file: str | Path) -> Recipe:
    """
    A recipe out of a YAML file, or a shipped one by its name (`shipped_recipes`). Only read and checked: nothing is
    loaded, downloaded or written.

    Raises:
        ValueError: names the file and the field, what was given and what is allowed.
    """
    path = Path(file)
    if path.suffix not in (".yaml", ".yml") and not path.exists() and str(file) in shipped_recipes():
        path = shipped_recipes()[str(file)]
    if path.suffix not in (".yaml", ".yml"):
        shipped = ", ".join(shipped_recipes())
        raise ValueError(f"recipe: got {str(file)!r}, allowed are .yaml files and the shipped {shipped}.")
    settings = read_yaml(path)
    try:
        return recipe_from_dict({"name": path.stem} | settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def recipe_from_text(text: str, name: str = "recipe") -> Recipe:
    """
    A recipe out of YAML text; `name` is its name if it has none.

    Raises:
        ValueError: names the field, what was given and what is allowed.
    """
    return recipe_from_dict({"name": name} | parse_yaml(text))


def recipe_from_dict(settings: dict[str, Any]) -> Recipe:
    """
    A recipe out of plain values.

    Raises:
        ValueError: names the field, what was given and what is allowed.
    """
    return read(Recipe, settings)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain values, without those that are the default: `recipe_from_dict` gives an equal recipe back."""
    return plain(recipe)


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    package = Path(str(importlib.resources.files("modeling_manticore")))
    folders = [package / "hub_configs", package.parent / "hub_configs"]  # in a wheel; in a clone
    folder = next((folder for folder in folders if folder.is_dir()), None)
    return {} if folder is None else {file.stem: file for file in sorted(folder.glob("*.yaml"))}
