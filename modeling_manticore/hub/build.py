"""From a recipe to a hybrid: stages that each leave a folder, so that a run that stops goes on where it stopped."""

import hashlib
import json
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..pages.of_builds import build_page
from ..pages.page import PAGE_NAME
from .plan import plan
from .recipe_schema import ComponentRecipe, Recipe
from .recipes import recipe_to_dict
from .stages import STAGES, Stage, Work
from .staging import is_alive


RECORD = "stage.json"
PARTIAL = re.compile(r"\.([a-z]+)\.partial-(\d+)")


def build(
    recipe: Recipe,
    *,
    dry_run: bool = False,
    from_stage: str | None = None,
    cache_folder: str | None = None,
    allow_local_sources: bool = False,
) -> Path | None:
    """
    Make the hybrid of a recipe in `recipe.folder`, one folder a stage, and `report.html` that shows it. `stage.json`
    in each has the hash of the stage's inputs: the hash of the stage before, the recipe's section, the texts' and
    components' contents, and the version of this package. A stage whose folder is whole and has the same hash is
    skipped.

    Args:
        dry_run: plan, and print which stages would run; nothing is written.
        from_stage: run from this stage on again.
        cache_folder: where texts are kept.
        allow_local_sources: as if the recipe's `publishing` had it.

    Returns:
        The folder of the finished hybrid; None after a dry run.

    Raises:
        ValueError: the recipe cannot be built; names all problems, before any work.
    """
    names = [stage.name for stage in STAGES]
    if from_stage is not None and from_stage not in names:
        raise ValueError(f"from_stage: got {from_stage!r}, allowed are {', '.join(names)}.")
    if allow_local_sources and recipe.publishing is not None:
        recipe = replace(recipe, publishing=replace(recipe.publishing, allow_local_sources=True))
    made = plan(recipe)
    made.check()
    print(made)
    folder = Path(recipe.folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_folder: got the file {recipe.folder!r}, allowed is a folder.")
    licenses = [None if entry["license"] == "unknown" else entry["license"] for entry in made.components]
    work = Work(recipe, folder, cache_folder, [entry["revision"] for entry in made.components], licenses)
    if not dry_run:
        _remove_stale(folder)
    before, forced, stopped = "", False, False
    told: list[tuple[str, str, float | None]] = []
    for number, stage in enumerate(STAGES, 1):
        label = f"[{number}/{len(STAGES)}] {stage.name}"
        reason = stage.why_not(recipe)
        if reason is not None:
            print(f"{label}: not run, {reason}")
            told.append((stage.name, f"not run, {reason}", None))
            continue
        forced = forced or stage.name == from_stage
        before = _hash(stage, work, before)
        place = folder / stage.name
        if not forced and not stopped and _is_valid(place, before):
            print(f"{label}: done before")
            work.finished(stage.name)
            told.append((stage.name, "done before", None))
            continue
        stopped = True  # what comes after a stage that runs has other inputs
        if dry_run:
            print(f"{label}: to do")
            continue
        if stage.name == "push":  # which may fail for reasons that are not ours
            _write_page(folder, work, [*told, (stage.name, "not finished", None)])
        print(f"{label}: running", flush=True)
        started = time.perf_counter()
        _run(stage, work, place, before)
        work.finished(stage.name)
        told.append((stage.name, "done", time.perf_counter() - started))
    if dry_run:
        return None
    if stopped or not (folder / PAGE_NAME).is_file():
        _write_page(folder, work, told)
    print(f"The report is {folder / PAGE_NAME}")
    print(f"The hybrid is in {work.model_folder}")
    return work.model_folder


def _write_page(folder: Path, work: Work, told: list[tuple[str, str, float | None]]) -> None:
    build_page(folder, work.model_folder, told, recipe_to_dict(work.recipe)).write(folder)


def _run(stage: Stage, work: Work, place: Path, key: str) -> None:
    """Into a sibling, which is moved into place when it is whole."""
    partial = place.with_name(f".{stage.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        stage.run(work, partial)
        files = {str(file.relative_to(partial)): file.stat().st_size for file in _files(partial)}
        (partial / RECORD).write_text(json.dumps({"inputs": key, "files": files}, indent=2) + "\n")
        if place.exists():
            shutil.rmtree(place)
        os.replace(partial, place)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def _is_valid(place: Path, key: str) -> bool:
    """Whether a stage's folder was made of these inputs and has all its files in their size."""
    try:
        record = json.loads((place / RECORD).read_text())
        files = {str(file.relative_to(place)): file.stat().st_size for file in _files(place)}
    except (OSError, json.JSONDecodeError):
        return False
    files.pop(RECORD, None)
    return isinstance(record, dict) and record.get("inputs") == key and record.get("files") == files


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _remove_stale(folder: Path) -> None:
    """What a process that is no more left half-made."""
    for path in folder.iterdir() if folder.is_dir() else ():
        found = PARTIAL.fullmatch(path.name)
        if found and not is_alive(int(found[2])):
            shutil.rmtree(path)


def _hash(stage: Stage, work: Work, before: str) -> str:
    from .. import __version__

    recipe = recipe_to_dict(work.recipe)
    inputs = {
        "before": before,
        "stage": stage.name,
        "version": __version__,
        "section": {name: _section(recipe, name) for name in stage.sections},
        "texts": {name: _content(Path(name)) for name in stage.texts(work.recipe)},
    }
    if stage.name == "card":
        inputs["licences"] = [work.licenses, [entry.license_reason for entry in work.recipe.components]]
    if not before:
        inputs["components"] = [
            _component(entry, revision) for entry, revision in zip(work.recipe.components, work.revisions)
        ]
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _section(recipe: dict[str, Any], name: str) -> Any:
    """A section; components without their licences, which change the card and nothing before it."""
    if name != "components":
        return recipe.get(name)
    entries = [entry if isinstance(entry, dict) else {"repo": entry} for entry in recipe[name]]
    return [
        {key: value for key, value in entry.items() if key not in ("license", "license_reason")} for entry in entries
    ]


def _component(entry: ComponentRecipe, revision: str | None) -> Any:
    if entry.folder is None:
        return [entry.repo, revision]
    kept = (".safetensors", ".json", ".model", ".txt", ".jinja", ".py")
    files = [file for file in _files(Path(entry.folder)) if file.suffix in kept]
    stats = [(file.name, file.stat()) for file in files]
    return [[name, found.st_size, found.st_mtime_ns] for name, found in stats]


def _content(path: Path) -> str | None:
    """A hash of a text file's or folder's contents; None of a built-in text."""
    if not path.exists():
        return None
    digest = hashlib.sha256()
    for file in _files(path) if path.is_dir() else [path]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
