"""What may go into a repository: no pickles, no local paths, no code but ours."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import yaml

from ..saving_manticore import weights_of


PARTS = (
    "cache",
    "chunk_scan",
    "configuration",
    "forward",
    "hollow",
    "mixing",
    "modeling",
    "saving",
    "scan",
    "sharing",
    "slicing",
)
CARRIED = tuple(f"{name}_manticore.py" for name in PARTS)
PICKLES = (".bin", ".ckpt", ".dill", ".h5", ".joblib", ".keras", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth")
KINDS = "bpe cff csv gif jinja jpeg jpg json jsonl md model pdf png safetensors svg tiktoken txt vocab webp yaml yml"
ALLOWED = {f".{kind}" for kind in KINDS.split(" ")}
ALLOWED_NAMES = ("LICENSE", "NOTICE", "COPYING")
# Of the Trainer, and of search: of no use to whoever loads the model.
RUN_FILES = ("trainer_state.json", "strategy_state.json")
DESCRIPTIONS = ("config.json", "generation_config.json", "adapter_config.json")
MODEL_KEYS = ("base_model_name_or_path", "name_or_path", "repo", "source")

ABSOLUTE = re.compile(r"(?:~[\\/]|/|[A-Za-z]:[\\/]|\\\\|file://)[^\s]*[\w.]")
# In running text only what begins like a path of this or a usual machine; "/" has other uses there.
IN_TEXT = re.compile(
    r"(?<![\w.:/\\~@-])(?:file://|~[\w.-]*[\\/]|[A-Za-z]:[\\/]|\\\\(?=[\w.-]+\\)|/(?=([\w.+@-]+)/))"
    r"[\w.+@~/\\-]*[\w+@/\\-]"
)
PICTURE = re.compile(r"!\[[^\]]*\]\(\s*<?([^)\s>]+)|<img\b[^>]*?\bsrc\s*=\s*[\"']([^\"']+)", re.IGNORECASE)
PICTURE_KINDS = (".gif", ".jpeg", ".jpg", ".png", ".svg", ".webp")
ROOTS = (
    "Users Volumes builds content data data1 data2 dev etc export gpfs home kaggle lustre media mnt opt private proc"
    " project projects root run scratch srv storage tmp usr var work workdir workspace"
)
USUAL_ROOTS = frozenset(ROOTS.split(" "))


def is_pickle_name(path: str) -> bool:
    """Whether a file of this name may hold a pickle."""
    return PurePosixPath(path).suffix.lower() in PICKLES


def sorted_out(folder: Path, recursive: bool = False) -> tuple[dict[str, Path], list[str]]:
    """
    ({path in the repository: file}, names that stay here) of a folder. Code other than the files, pickles,
    hidden files, the run's own state and kinds of files that a model repository has no use for stay here.

    Raises:
        ValueError: a file holds a pickle under an innocent name.
    """
    files, left = {}, []
    for path in sorted(folder.rglob("*") if recursive else folder.iterdir()):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            continue
        parts = PurePosixPath(name).parts
        code = path.suffix == ".py" and name in CARRIED
        plain = path.suffix.lower() in ALLOWED or path.name.split(".")[0] in ALLOWED_NAMES
        hidden = any(part.startswith((".", "_")) for part in parts)
        if not path.is_file() or hidden or path.name in RUN_FILES or is_pickle_name(name) or not (code or plain):
            left.append(name)
            continue
        with open(path, "rb") as file:
            start = file.read(4)
        if (start[:1] == b"\x80" and start[1:2] <= b"\x05") or start == b"PK\x03\x04":
            raise ValueError(f"{name}: it holds a pickle or an archive under an innocent name; it is not pushed.")
        files[name] = path
    return files, left


def stale_pattern(paths: Iterable[str]) -> str:
    """A pattern of paths in a repository: whole, shards and index of all weights among the paths that are pushed."""
    patterns = set()
    for path in paths:
        folder, slash, name = path.rpartition("/")
        if name.endswith(".safetensors") and (found := weights_of(name)):
            base, variant = found[0], "" if found[1] is None else f".{found[1]}"
            start, variant = re.escape(folder + slash + base), re.escape(variant)
            patterns |= {
                rf"{start}{variant}(-\d{{5}}-of-\d{{5}})?\.safetensors",
                rf"{start}\.safetensors\.index{variant}\.json",
            }
    return "|".join(sorted(patterns)) or "(?!)"


def pictures_of(card: Path) -> dict[str, Path]:
    """
    {path in the repository: file} of the pictures that a card shows and that lie beside it or below. Others (of the
    web, or already in the repository) are not files here.
    """
    folder, found = card.parent.resolve(), {}
    for written in PICTURE.findall(card.read_text(encoding="utf-8")):
        name = PurePosixPath(unquote(written[0] or written[1]))
        file = (folder / name).resolve()
        if name.suffix.lower() in PICTURE_KINDS and file.is_file() and file.is_relative_to(folder):
            found[file.relative_to(folder).as_posix()] = file
    return found


# ------------------------------------------------------------------ local paths
def local_paths(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """(place, path) of every string in a nested value that is a local path (`is_local`)."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from local_paths(entry, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            yield from local_paths(entry, f"{where}[{index}]")
    elif isinstance(value, (str, Path)) and is_local(str(value), where.rpartition(".")[2]):
        yield where, str(value)


def is_local(text: str, key: str = "") -> bool:
    """Whether a string is an absolute local path; under keys that name a model, also a relative folder that exists."""
    if key == "_name_or_path":  # where transformers loaded it from, which is not written
        return False
    if ABSOLUTE.fullmatch(text) and len(text) > 2:
        return True
    return key in MODEL_KEYS and text != "" and (text.startswith((".", "~")) or Path(text).is_dir())


def paths_in_text(text: str) -> list[str]:
    """Absolute local paths in running text, such as a model card."""
    found = []
    for match in IN_TEXT.finditer(text):
        root = match[1]
        linked = text[max(match.start() - 2, 0) : match.start()] == "]("
        known = root in USUAL_ROOTS or (root is not None and Path("/", root).is_dir())
        if root is None or (Path(match[0]).exists() if linked else known):  # links may be relative to the Hub's site
            found.append(match[0])
    return found


def without_local_paths(value: Any, key: str = "") -> Any:
    """The nested value with 'local' in place of every local path."""
    if isinstance(value, dict):
        return {name: without_local_paths(entry, str(name)) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_local_paths(entry, key) for entry in value]
    return "local" if isinstance(value, (str, Path)) and is_local(str(value), key) else value


def refuse_local_paths(found: list[tuple[str, str]]) -> None:
    """
    Raises:
        ValueError: there are any; the message names the first places.
    """
    if found:
        places = "; ".join(f"{where} is {path!r}" for where, path in found[:3])
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"allow_local_sources: got False, but {places}{more}. A local path means nothing to others: give the "
            "repositories' names, or allow it, and 'local' is written instead."
        )


def cleaned_text(text: str) -> str:
    """Running text with 'local' in place of every absolute local path."""
    for path in sorted(set(paths_in_text(text)), key=len, reverse=True):
        text = text.replace(path, "local")
    return text


def without_origins(config: Any) -> Any:
    """
    A configuration in which only the top has an auto map (a component's would name code that is not here), and which
    does not say where transformers loaded it from.
    """
    if not isinstance(config, dict):
        return config

    def cut(value):
        if isinstance(value, dict):
            return {key: cut(entry) for key, entry in value.items() if key not in ("auto_map", "_name_or_path")}
        return [cut(entry) for entry in value] if isinstance(value, list) else value

    top = {key: value for key, value in config.items() if key == "auto_map"}
    return cut(config) | top


def clean_files(files: dict[str, Path], folder: Path, allow_local_sources: bool) -> dict[str, Path]:
    """
    Look for local paths in the files that describe the model, and write cleaned copies to `folder` where they are
    allowed ('local' stands there then) and where nested auto maps are dropped.

    Raises:
        ValueError: a local path, and they are not allowed; a description that cannot be read.
    """
    found, cleaned = [], dict(files)
    for name, path in files.items():
        base, suffix = PurePosixPath(name).name, path.suffix.lower()
        if suffix == ".md":
            text = path.read_text(encoding="utf-8")
            places = [(name, local) for local in paths_in_text(text)]
            better = cleaned_text(text)
        elif base in DESCRIPTIONS or suffix in (".yaml", ".yml"):
            text = _parsed(yaml.safe_load if suffix != ".json" else json.loads, name, path)
            places = list(local_paths(text, name))
            better = without_local_paths(without_origins(text) if base == "config.json" else text)
        else:
            continue
        found += places
        if better != text:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            target.write_text(better if suffix == ".md" else _dumped(better, suffix), encoding="utf-8")
            cleaned[name] = target
    if not allow_local_sources:
        refuse_local_paths(found)
    return cleaned


def _dumped(value: Any, suffix: str) -> str:
    if suffix == ".json":
        return json.dumps(value, indent=2) + "\n"
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def _parsed(parse, name: str, path: Path) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{name}: it cannot be read ({' '.join(str(error).split())[:200]}).") from error
