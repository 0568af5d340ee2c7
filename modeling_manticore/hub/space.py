"""A Gradio Space in which a hybrid can be tried: filled in from its configuration, written to a folder or pushed."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import CommitInfo
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..building.names import check_name
from ..configuration_manticore import ManticoreConfig
from .card_check import REPO_ID
from .contents import clean_files, local_paths, refuse_local_paths, sorted_out
from .picture import component_names, draw_hybrid
from .staging import staging_folder
from .transfer import PATIENCE, call, check_token


TEMPLATE = Path(__file__).parents[1] / "spaces"
PLAIN = ("app.py", "requirements.txt")
SDK_VERSION = "6.31.0"  # of gradio, with which the app was tested
MODEL = "model"  # the folder of the Space with the hybrid, where it was given as a folder


def write_space(source: str | Path, folder: str | Path, *, revision: str | None = None, **calling: Any) -> Path:
    """
    Write the files of a Space: `app.py`, `space.json`, `hybrid.svg` (where matplotlib is installed), `README.md`,
    `requirements.txt`, and, of a hybrid in a folder, a copy in `model`.

    Args:
        source: repository of the hybrid, or the folder of a saved one.
        folder: where it is written; new or empty.
        revision: branch, tag or commit of the repository; the Space is pinned to the commit it is now.
        calling: `token`, `patience` and `environment` of `transfer.call`.

    Returns:
        The folder.

    Raises:
        ValueError: names the field; before anything is written.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"output_folder: got {str(folder)!r}, allowed is a folder that is new or empty.")
    config, commit = _configuration(source, revision, calling)
    local = Path(source).is_dir()
    settings = _settings(config, str(source), commit, local, keep_local=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        staged.mkdir()
        _fill_in(staged, config, settings)
        if local:
            files, _ = sorted_out(Path(source))
            for name, file in files.items():
                (staged / MODEL / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, staged / MODEL / name)
        if folder.is_dir():
            folder.rmdir()
        os.replace(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return folder


def push_space(
    source: str | Path,
    to: str | None = None,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    allow_local_sources: bool = False,
    patience: float = PATIENCE,
    environment: dict[str, str] | None = None,
) -> CommitInfo:
    """
    Push a Space for a hybrid, by the rules of `push_hybrid`: one commit or none, tried again where the connection
    fails, no local paths, looked at afterwards.

    Args:
        source, revision: as of `write_space`. A hybrid in a folder is pushed along, into `model` of the Space.
        to: the Space; by default the hybrid's name with "-space".
        private: of a new Space. token, patience, environment: as of `push_hybrid`.
        allow_local_sources: write 'local' in place of local paths in the hybrid's files, which are refused otherwise.

    Raises:
        ValueError: names the field, before anything is sent; `HubError` where the Hub or the connection is at fault.
    """
    check_name(str(source), f"repo ({source})")
    local = Path(source).is_dir()
    name = to or f"{Path(source).resolve().name if local else source}-space"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"to: got {name!r}, allowed is 'name' or 'owner/name' ({error}).") from error
    calling = {"token": token, "patience": patience, "environment": environment}
    check_token(token, environment)
    config, commit = _configuration(source, revision, calling)
    settings = _settings(config, str(source), commit, local, keep_local=False)
    refuse_local_paths(list(local_paths(settings, "space.json")))
    with staging_folder() as staged:
        (staged / "space").mkdir()
        _fill_in(staged / "space", config, settings)
        files = {file.name: file for file in (staged / "space").iterdir()}
        if local:
            found, _ = sorted_out(Path(source))
            cleaned = clean_files(found, staged / "cleaned", allow_local_sources)
            files |= {f"{MODEL}/{path}": file for path, file in cleaned.items()}
        request = {"repo_id": name, "repo_type": "space", "files": {path: str(file) for path, file in files.items()}}
        request |= {"kept": [], "stale": rf"{MODEL}/model(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?"}
        request |= {"private": private, "revision": None, "create_pr": False, "verify": True}
        request |= {"message": "Upload Space", "description": None}
        done = call("push", request, needs_token=True, **calling)
    info = CommitInfo(
        commit_url=done["url"],
        commit_message=request["message"],
        commit_description="",
        oid=done["commit"],
        _endpoint=done["endpoint"],
    )
    info.changed = done["changed"]
    return info


def _configuration(source: str | Path, revision: str | None, calling: dict) -> tuple[ManticoreConfig, str | None]:
    """The hybrid's configuration, and the commit of a repository."""
    folder, commit = Path(source), None
    if not folder.is_dir():
        check_name(str(source), f"repo ({source})")
        request = {"repo_id": str(source), "revision": revision, "patterns": ["config.json"]}
        found = call("fetch", request, **calling)
        folder, commit = Path(found["folder"]), found["commit"]
    elif revision is not None:
        raise ValueError(f"revision: got {revision!r} with the folder {str(source)!r}, allowed is with a repository.")
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"repo: {str(source)!r} has no config.json that can be read ({error}).") from error
    if not isinstance(settings, dict) or settings.get("model_type") != "manticore":
        raise ValueError(f"repo: got {str(source)!r}, which is no hybrid (its model_type is not 'manticore').")
    return ManticoreConfig.from_pretrained(folder), commit


def _settings(config: ManticoreConfig, source: str, commit: str | None, local: bool, keep_local: bool) -> dict:
    """What the app reads. Components without a source of theirs are left out; a local one is kept only locally."""
    names, components = component_names(config), []
    for k in config.used_components:
        place, folder = getattr(config.components[k], "source", None), False
        if isinstance(place, str) and keep_local and Path(place).is_dir():
            place, folder = str(Path(place).resolve()), True
        elif not isinstance(place, str) or not REPO_ID.fullmatch(place) or Path(place).is_dir():
            continue
        entry = {"name": names[k], "source": place}
        entry["revision"] = None if folder else getattr(config.components[k], "revision", None)
        components.append(entry)
    title = Path(source).resolve().name if local else source.split("/")[-1]
    kind = "discretized hybrid" if config.is_discretized else "supernet"
    used = [names[k] for k in config.used_components]
    return {
        "title": title,
        "text": f"A {kind} of {', '.join(used[:-1])}{' and ' if used[1:] else ''}{used[-1]} in {len(config.blocks)} "
        "blocks, made with modeling_manticore.",
        "hybrid": {"name": title, "source": MODEL if local else source, "revision": commit},
        "components": components,
    }


def _fill_in(folder: Path, config: ManticoreConfig, settings: dict[str, Any]) -> None:
    for name in PLAIN:
        shutil.copyfile(TEMPLATE / name, folder / name)
    (folder / "space.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    hybrid = settings["hybrid"]
    front = {"title": settings["title"], "emoji": "\N{LINK SYMBOL}", "sdk": "gradio", "sdk_version": SDK_VERSION}
    front |= {"app_file": "app.py", "pinned": False}
    models = [entry["source"] for entry in [hybrid, *settings["components"]] if REPO_ID.fullmatch(entry["source"])]
    front |= {"models": [name for name in models if name != MODEL]}
    text = jinja2.Template((TEMPLATE / "README.md").read_text(encoding="utf-8"), trim_blocks=True).render(
        front_matter=yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
        title=settings["title"],
        text=settings["text"],
        model=hybrid["source"],
        revision=hybrid["revision"],
        components=settings["components"],
    )
    (folder / "README.md").write_text(text.rstrip() + "\n", encoding="utf-8")
    try:
        draw_hybrid(config, folder / "hybrid.svg", page="hybrid")
    except ImportError:
        return
