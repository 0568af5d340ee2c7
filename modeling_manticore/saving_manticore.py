"""Saving a checkpoint beside or over what a folder has, so that a kill never leaves a part of it that loads."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


WEIGHTS = re.compile(
    r"(?P<base>\w+?)(\.(?P<variant>.+?))?(-\d{5}-of-\d{5})?\.safetensors(\.index(\.(?P<of>.+))?\.json)?", re.ASCII
)


@contextmanager
def staged(save_directory: str | os.PathLike, keep: bool = True) -> Iterator[str]:
    """
    The name of a folder to write a checkpoint to. On leaving without an error it becomes `save_directory`, at once;
    where that exists, the files are moved into it one by one: weights, then their index, then the configuration. Other
    files stay, but for shards and indices of the weights that were saved.

    The folder lies beside one that does not exist, and inside one that does: that may be a mount, the current folder,
    behind a link, or the only place that its owner may write to, and keeps its mode.

    Args:
        keep: False on processes that do not save; nothing of theirs is kept.
    """
    target = os.path.realpath(save_directory)
    parent = os.path.dirname(target)
    os.makedirs(parent, exist_ok=True)
    place = (target if os.path.isdir(target) else parent) if keep else None
    with tempfile.TemporaryDirectory(dir=place, prefix=f"{staging_prefix(target)}{os.getpid()}.") as folder:
        made = os.path.join(folder, "made")
        yield made
        if keep:
            _move(made, target)


def staging_prefix(target: str | os.PathLike) -> str:
    """What the name of a folder in which a checkpoint is written first begins with, before the process id."""
    return f".{os.path.basename(target)[:50]}."


def _move(made: str, target: str) -> None:
    if not os.path.isdir(target):
        os.rename(made, target)
        return
    fresh = sorted(os.listdir(made), key=lambda name: (_rank(name), name))
    for name in fresh:
        os.replace(os.path.join(made, name), os.path.join(target, name))
    saved = {weights_of(name) for name in fresh if _rank(name) == 0}
    for name in os.listdir(target):
        if name not in fresh and weights_of(name) in saved:
            os.remove(os.path.join(target, name))


def _rank(name: str) -> int:
    if name.endswith(".safetensors"):
        return 0
    return 1 if ".safetensors.index." in name else 2 + (name == "config.json")


def weights_of(name: str) -> tuple[str, str | None] | None:
    """("model", "fp16") for the whole, a shard and the index of that variant; None for what is no weights."""
    found = WEIGHTS.fullmatch(name)
    return (found["base"], found["variant"] or found["of"]) if found else None


__all__ = ["staged", "staging_prefix", "weights_of"]
