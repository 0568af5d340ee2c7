"""
Which release wrote a checkpoint: `manticore_version` and `manticore_files`, the SHA-256 of the files that travel
with it, stand in its configuration. `verify` compares them with the files in a repository and with this release.
"""

import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from ..building.names import check_name
from ..saving_manticore import staging_prefix
from .contents import CARRIED, is_pickle_name
from .staging import remove_stale
from .transfer import call


PUSH_ARGUMENTS = (
    "repo_id",
    "commit_message",
    "commit_description",
    "private",
    "token",
    "revision",
    "create_pr",
    "tags",
)
PACKAGE = Path(__file__).parents[1]


@functools.cache
def installed_files() -> dict[str, str]:
    """{name: SHA-256} of those files of this release."""
    return {name: hashlib.sha256((PACKAGE / name).read_bytes()).hexdigest() for name in CARRIED}


def stamp(config: PreTrainedConfig) -> None:
    """Write version and hashes into a configuration."""
    from .. import __version__

    config.manticore_version, config.manticore_files = __version__, dict(installed_files())


def stamped(save_pretrained):
    """
    `save_pretrained` of the models with the stamp, for use where this package is installed. What a killed run of ours
    left beside the target, or in it, goes first, and `push_to_hub=True` pushes as `model.push_to_hub` does.
    """

    @functools.wraps(save_pretrained)
    def save(self: PreTrainedModel, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs) -> None:
        stamp(self.config)
        push = kwargs.pop("push_to_hub", False)
        pushing = {name: kwargs.pop(name) for name in PUSH_ARGUMENTS if name in kwargs} if push else {}
        if is_main_process:
            target = Path(os.path.realpath(save_directory))
            for place in (target.parent, target):
                remove_stale(place, staging_prefix(target))
        save_pretrained(self, save_directory, is_main_process=is_main_process, **kwargs)
        if push and is_main_process:
            repo = pushing.pop("repo_id", None) or Path(os.path.abspath(os.fspath(save_directory))).name
            self.push_to_hub(repo, **pushing, **kwargs)

    return save


@dataclass(frozen=True)
class Verification:
    """What `verify` found. `problems` is empty when the code is that of the installed release, byte for byte."""

    source: str
    commit: str | None
    version: str | None
    problems: tuple[str, ...]

    def __str__(self) -> str:
        where = f"{self.source} at {self.commit}" if self.commit else self.source
        if not self.problems:
            return f"{where}: the code is that of modeling_manticore {self.version}, byte for byte."
        return "\n".join([f"{where}: not verified.", *(f"  - {problem}" for problem in self.problems)])


def verify(source: str, *, revision: str | None = None, token: str | bool | None = None, **calling) -> Verification:
    """
    Compare the code in a repository (or a local folder) with the hashes in its configuration and with this release.
    Only the configuration and the code are downloaded; nothing of it is run.

    Args:
        source: repository or local folder.
        revision: branch, tag or commit. The commit that was looked at is in the result: pin that.
        calling: `patience` and `environment` of `transfer.call`.

    Raises:
        ValueError: it cannot be read, or is no hybrid.
    """
    commit = None
    if Path(source).is_dir():
        folder = Path(source)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    else:
        check_name(str(source), f"source ({source})")
        request = {"repo_id": source, "revision": revision, "patterns": ["config.json", "*.py"]}
        found = call("fetch", request, token=token, **calling)
        folder, commit, names = Path(found["folder"]), found["commit"], found["files"]
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"source: {source!r} has no config.json that can be read ({error}).") from error
    if not isinstance(config, dict) or config.get("model_type") != "manticore":
        raise ValueError(f"source: got {source!r}, which is no hybrid (its model_type is not 'manticore').")
    version = config.get("manticore_version")
    problems = [*_problems(folder, names, config)]
    return Verification(source, commit, version if isinstance(version, str) else None, tuple(problems))


def _problems(folder: Path, names: list[str], config: dict):
    from .. import __version__

    stated, version = config.get("manticore_files"), config.get("manticore_version")
    if not isinstance(stated, dict) or not isinstance(version, str):
        yield "its configuration states no manticore_version and manticore_files; it was saved without the package."
        stated = {}
    elif version != __version__:
        yield f"it was written by modeling_manticore {version}, installed is {__version__}; install that one."
    for name in CARRIED:
        if name not in names:
            yield f"{name} is missing."
            continue
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if stated and found != stated.get(name):
            yield f"{name} is not the file whose hash its configuration states."
        if found != installed_files()[name] and version == __version__:
            yield f"{name} differs from that of the installed release."
    for name in names:
        if name.endswith(".py") and name not in CARRIED:
            yield f"{name} is code that no release puts there."
    for name in names:
        if is_pickle_name(name):
            yield f"{name} is of a kind that may hold pickled code."
    for where, value in _auto_maps(config, ""):
        targets = value.values() if isinstance(value, dict) else [value]
        if where or not all(isinstance(t, str) and f"{t.split('.')[0]}.py" in CARRIED for t in targets):
            yield f"auto_map{f' in {where}' if where else ''} points at other code: {value}."


def _auto_maps(value, where: str):
    """(place, auto_map) of every one in a configuration."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if key == "auto_map":
                yield where, entry
            else:
                yield from _auto_maps(entry, f"{where}.{key}" if where else key)
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _auto_maps(entry, f"{where}[{index}]")
