"""Names of models and texts that are not there: told at once, with the name nearby that may have been meant."""

import difflib
import os
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def check_name(name: str, where: str) -> None:
    """
    Refuse what is neither a folder here nor can be a repository of the Hub, before anybody asks the Hub for it.

    Args:
        name: of a model or tokenizer. where: the field, for messages.

    Raises:
        ValueError: there is no such folder.
    """
    if Path(name).is_dir():
        return
    if Path(name).is_file():
        raise ValueError(f"{where}: it is a file, allowed are folders and repositories.")
    if name.startswith((".", "~", os.sep)) or name.endswith(("/", os.sep)) or not _is_repository(name):
        raise ValueError(f"{where}: there is no such folder{hint(name)}")


def not_here(name: str) -> str:
    """For the message of the Hub's refusal: that there is no folder of this name either."""
    return f"There is no folder {name!r} here either{hint(name)}"


def hint(name: str) -> str:
    """The end of a sentence: `; did you mean 'x'?` of the entry nearby with the most similar name, else its stop."""
    path = Path(name).expanduser()
    try:
        there = sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("."))
    except OSError:  # no such folder above, or it may not be read: nothing to compare with
        return "."
    close = difflib.get_close_matches(path.name, there, n=1, cutoff=0.7)
    return f"; did you mean {str(Path(name).parent / close[0])!r}?" if close else "."


def _is_repository(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
