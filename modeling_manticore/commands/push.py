"""`manticore push FOLDER REPO`: a saved hybrid or saved adapters -> the Hub, in one commit."""

import json
from dataclasses import dataclass, field

from .parsing import parse_options, positional_first, require_positive


@dataclass
class PushOptions:
    folder: str = field(metadata={"help": "Folder of the saved hybrid, or of saved adapters on one."})
    repo_id: str = field(metadata={"help": "Repository, name or owner/name; made if it does not exist."})
    card: str | None = field(
        default=None,
        metadata={"help": "Model card, a file (default: README.md in the folder, else the repository's)."},
    )
    base_model: str | None = field(default=None, metadata={"help": "For adapters: the repository of their hybrid."})
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})
    revision: str | None = field(default=None, metadata={"help": "Branch, made from main if need be (default: main)."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request."})
    commit_message: str = field(default="Upload hybrid", metadata={"help": "First line of the commit."})
    allow_local_sources: bool = field(
        default=False,
        metadata={"help": "Write 'local' in place of local paths and folders, which are otherwise refused."},
    )
    patience: int = field(default=60, metadata={"help": "Seconds without a sign of life after which it gives up."})
    json: bool = field(default=False, metadata={"help": "Print JSON instead of text."})


KINDS = (PushOptions,)


def run(arguments: list[str]) -> None:
    """
    Raises:
        ValueError: bad options, or the Hub or the connection is at fault. The token comes from the usual places.
    """
    arguments = positional_first(arguments, "folder", "repo_id")
    (options,) = parse_options(KINDS, arguments, "push")
    require_positive(options, "patience")

    from pathlib import Path

    from ..hub.push import push_folder

    info = push_folder(
        options.folder,
        options.repo_id,
        card=None if options.card is None else Path(options.card),
        base_model=options.base_model,
        private=options.private or None,
        revision=options.revision,
        create_pr=options.create_pr,
        commit_message=options.commit_message,
        allow_local_sources=options.allow_local_sources,
        patience=float(options.patience),
    )
    if options.json:
        told = {"repo_id": options.repo_id, "commit": info.oid, "url": str(info.commit_url)}
        told |= {"pull_request": info.pr_url, "changed": info.changed, "left_behind": info.left_behind}
        told |= {"short_card": info.short_card}
        print(json.dumps(told, indent=2))
        return
    if info.left_behind:
        print(f"Left behind: {', '.join(info.left_behind)}")
    print(f"{len(info.changed)} files changed." if info.changed else "Nothing differs from what is there; no commit.")
    if info.short_card:
        print(
            "README.md is a short card without licence and results: neither --card nor the folder has one. "
            "write_card of modeling_manticore.hub.cards writes a full one."
        )
    if info.pr_url:
        print(f"Pull request: {info.pr_url}")
    print(f"Commit {info.oid}: {info.commit_url}")
