"""Push a hybrid to the Hub: everything in a temporary folder first, then one commit, then a look at what is there."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitInfo, ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import nn
from transformers import PreTrainedTokenizerBase

from .contents import (
    clean_files,
    is_local,
    local_paths,
    paths_in_text,
    pictures_of,
    refuse_local_paths,
    sorted_out,
    stale_pattern,
)
from .short_card import short_card
from .staging import staging_folder
from .transfer import PATIENCE, call, check_token


CARD, RECIPE, RESULTS = "README.md", "recipe.yaml", "results.json"
PLACEHOLDER = "[More Information Needed]"  # of the cards that PEFT writes at every save


def push_hybrid(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    repo_id: str,
    *,
    recipe: Mapping | str | Path | None = None,
    results: Mapping | None = None,
    card: str | Path | ModelCard | None = None,
    tags: list[str] | None = None,
    base_model: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload hybrid",
    commit_description: str | None = None,
    token: str | bool | None = None,
    allow_local_sources: bool = False,
    verify: bool = True,
    patience: float = PATIENCE,
    environment: dict[str, str] | None = None,
    **saving: Any,
) -> CommitInfo:
    """
    Push a hybrid, or adapters on one, with its code, tokenizer and card.

    One commit on top of the branch's head, or none where the repository already holds the very same files: pushing
    again after a push of which no answer came adds nothing. Old shards of ours go in the same commit; other files of
    the repository stay. Where the connection fails it is tried again.

    Args:
        model: a hybrid, or a `PeftModel` on one (then its adapters).
        tokenizer: of the hybrid; None leaves the repository's as it is.
        repo_id: `name` or `owner/name`; made if it does not exist.
        recipe: how it was made: a mapping, or a YAML file. It becomes recipe.yaml.
        results: measured results, JSON values. They become results.json.
        card: the model card: text, a file, or a `ModelCard`. The pictures that a file shows from its own folder go
            along. By default the card in the repository stays, and a new repository gets a short one with what the
            configuration says.
        tags: further tags for the short card.
        base_model: for adapters, the repository of the hybrid they are for.
        private: of a new repository. revision: a branch, made from main if need be. create_pr: as a pull request.
        token: as everywhere in huggingface_hub. It is in no message.
        allow_local_sources: write 'local' in place of absolute local paths, which are refused otherwise.
        verify: compare the hashes that the Hub states (SHA-256 of large files, git's of small ones) with the files.
            The weights are not downloaded again.
        patience: seconds without a sign of progress after which the push is given up.
        environment: variables for the process that talks to the Hub, in place of this process's.
        saving: further arguments of `save_pretrained`.

    Returns:
        The commit: `oid` is what to pin as `revision`, `pr_url` the pull request, `changed` the files in it,
        `short_card` whether a card of ours is among them.

    Raises:
        ValueError: names the field; raised before anything is saved or sent. (`HubError`, which is one, where the
            Hub or the connection is at fault; the repository is then as it was, or has the whole commit.)
    """
    adapters = getattr(model, "peft_config", None)
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or getattr(config, "model_type", None) != "manticore":
        raise ValueError(f"model: got {type(model).__name__}, allowed is a hybrid, or a PeftModel on one.")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"tokenizer: got {type(tokenizer).__name__}, allowed is a tokenizer or None.")
    if base_model is not None and adapters is None:
        raise ValueError("base_model: got one for a whole hybrid, allowed is only for adapters.")
    options = {"private": private, "revision": revision, "create_pr": create_pr, "message": commit_message}
    options |= {"description": commit_description, "verify": verify}
    _check_options(repo_id, options, base_model)
    recipe, text = _recipe(recipe), _card(card)
    results = _results(results)
    check_token(token, environment)
    if not allow_local_sources:
        refuse_local_paths(local_sources(model, base_model) + list(local_paths(recipe, "recipe")))
        refuse_local_paths([("card", path) for path in paths_in_text(text or "")])

    with staging_folder() as folder:
        model.save_pretrained(folder / "model", **saving)
        if adapters is not None:  # PEFT writes a card of its own
            (folder / "model" / CARD).unlink(missing_ok=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder / "model")
        if recipe is not None:
            (folder / "model" / RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
        if results is not None:
            (folder / "model" / RESULTS).write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
        if text is not None:
            (folder / "model" / CARD).write_text(text, encoding="utf-8")
        files, left = sorted_out(folder / "model", recursive=True)
        return _send(
            folder,
            _pictures(card) | files,
            left,
            repo_id,
            options,
            tags=tags,
            base_model=base_model,
            allow_local_sources=allow_local_sources,
            calling={"token": token, "patience": patience, "environment": environment},
        )


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    card: str | Path | ModelCard | None = None,
    places: tuple[str, ...] = ("",),
    base_model: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload hybrid",
    commit_description: str | None = None,
    token: str | bool | None = None,
    allow_local_sources: bool = False,
    verify: bool = True,
    patience: float = PATIENCE,
    environment: dict[str, str] | None = None,
) -> CommitInfo:
    """
    Push a saved hybrid, or saved adapters, as `push_hybrid` pushes one in memory. Of the folder's files (not of its
    sub-folders) pickles, the Trainer's state, code that is not ours, hidden files and unknown kinds stay behind.

    Args:
        places: folders of the repository that get the files; "" is its root.

    Returns, Raises:
        As `push_hybrid`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder: got {str(folder)!r}, allowed is the folder of a saved hybrid.")
    options = {"private": private, "revision": revision, "create_pr": create_pr, "message": commit_message}
    options |= {"description": commit_description, "verify": verify}
    _check_options(repo_id, options, base_model)
    text = _card(card)
    check_token(token, environment)
    files, left = sorted_out(folder)
    if not _describes_hybrid(folder, files):
        raise ValueError(
            f"folder: got {str(folder)!r}, allowed is one with the config.json of a hybrid or an adapter_config.json."
        )
    if CARD in files and text is None and PLACEHOLDER in files[CARD].read_text(encoding="utf-8"):
        del files[CARD]
    with staging_folder() as staged:
        if text is not None:
            files[CARD] = staged / "given.md"
            files[CARD].write_text(text, encoding="utf-8")
        return _send(
            staged,
            files | _pictures(card),
            left,
            repo_id,
            options,
            places=places,
            base_model=base_model,
            allow_local_sources=allow_local_sources,
            calling={"token": token, "patience": patience, "environment": environment},
        )


def _send(
    staged: Path,
    files: dict[str, Path],
    left: list[str],
    repo_id: str,
    options: dict[str, Any],
    *,
    places: tuple[str, ...] = ("",),
    tags: list[str] | None = None,
    base_model: str | None = None,
    allow_local_sources: bool = False,
    calling: dict[str, Any],
) -> CommitInfo:
    """The common part: clean descriptions, add a short card, one call."""
    if base_model is not None and "adapter_config.json" in files:
        settings = json.loads(files["adapter_config.json"].read_text(encoding="utf-8"))
        files["adapter_config.json"] = staged / "adapter_config.json"
        text = json.dumps(settings | {"base_model_name_or_path": base_model}, indent=2, sort_keys=True)
        files["adapter_config.json"].write_text(text + "\n", encoding="utf-8")
    files = clean_files(files, staged / "cleaned", allow_local_sources)
    kept = []
    if CARD not in files:
        files[CARD] = staged / "short.md"
        files[CARD].write_text(short_card(repo_id, files, tags or []), encoding="utf-8")
        kept = [CARD]
    sent = {f"{place}/{name}".lstrip("/"): str(path) for place in places for name, path in files.items()}
    request = {"repo_id": repo_id, "files": sent, "kept": kept, "stale": stale_pattern(sent)} | options
    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError(f"folder: it has no safetensors file (left behind: {left[:5]}).")
    done = call("push", request, needs_token=True, **calling)
    info = CommitInfo(
        commit_url=done["url"],
        commit_message=options["message"],
        commit_description=options["description"] or "",
        oid=done["commit"],
        pr_url=done["pull_request"],
        _endpoint=done["endpoint"],
    )
    info.changed, info.left_behind = done["changed"], left
    info.short_card = bool(kept) and any(name.endswith(CARD) for name in done["changed"])
    return info


def push_to_hub(
    self: nn.Module,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = "50GB",
    tags: list[str] | None = None,
    **options: Any,
) -> CommitInfo:
    """As in transformers, but by `push_hybrid` (its arguments are taken too): card and code stay, one commit."""
    return push_hybrid(
        self,
        None,
        repo_id,
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        max_shard_size=max_shard_size,
        tags=tags,
        **options,
    )


# ------------------------------------------------------------------ what is checked before any work
def local_sources(model: nn.Module, base_model: str | None = None) -> list[tuple[str, str]]:
    """(place, path) of every local path in the configuration of a hybrid and of the adapters on it."""
    found = list(local_paths(model.config.to_dict(), "config"))
    for name, adapter in getattr(model, "peft_config", {}).items():
        path = adapter.base_model_name_or_path
        if base_model is None and (not path or is_local(str(path), "base_model_name_or_path")):
            found.append((f"peft_config[{name!r}].base_model_name_or_path (give base_model=)", str(path)))
    return found


def _check_options(repo_id: str, options: dict[str, Any], base_model: str | None) -> None:
    for field, value in (("repo_id", repo_id), ("base_model", base_model)):
        if value is None and field == "base_model":
            continue
        try:
            validate_repo_id(value)
        except (HFValidationError, TypeError) as error:
            raise ValueError(f"{field}: got {value!r}, allowed is 'name' or 'owner/name' ({error}).") from error
    for field in ("create_pr", "verify"):
        if not isinstance(options[field], bool):
            raise ValueError(f"{field}: got {options[field]!r}, allowed are True and False.")
    if options["private"] not in (None, True, False):
        raise ValueError(f"private: got {options['private']!r}, allowed are True, False and None.")
    for field, name in (
        ("message", "commit_message"),
        ("revision", "revision"),
        ("description", "commit_description"),
    ):
        value = options[field]
        if (value is None and field == "message") or (value is not None and not (isinstance(value, str) and value)):
            raise ValueError(f"{name}: got {value!r}, allowed is a text.")


def _recipe(recipe: Any) -> dict | None:
    if recipe is None:
        return None
    if isinstance(recipe, (str, Path)):
        try:
            recipe = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"recipe: got {recipe!r}, which is no YAML file that can be read ({error}).") from error
    elif hasattr(recipe, "to_dict"):
        recipe = recipe.to_dict()
    if not isinstance(recipe, Mapping):
        raise ValueError(f"recipe: got {type(recipe).__name__}, allowed is a mapping or a YAML file with one.")
    return dict(recipe)


def _results(results: Any) -> dict | None:
    if results is None:
        return None
    try:
        if not isinstance(results, Mapping):
            raise TypeError(f"got {type(results).__name__}")
        json.dumps(dict(results), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"results: {error}; allowed is a mapping of JSON values without NaN.") from error
    return dict(results)


def _card(card: Any) -> str | None:
    if card is None or isinstance(card, str):
        text = card
    elif isinstance(card, Path):
        try:
            text = card.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"card: got {str(card)!r}, which cannot be read ({error}).") from error
    elif isinstance(card, ModelCard):
        text = str(card)
    else:
        raise ValueError(f"card: got {type(card).__name__}, allowed are a text, a Path and a ModelCard.")
    if text is not None and not text.startswith("---\n"):
        raise ValueError("card: it has no front matter; allowed is a text that begins with a line '---'.")
    return text


def _pictures(card: Any) -> dict[str, Path]:
    return pictures_of(card) if isinstance(card, Path) else {}


def _describes_hybrid(folder: Path, files: dict[str, Path]) -> bool:
    if "adapter_config.json" in files:
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "manticore"
