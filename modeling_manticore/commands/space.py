"""`manticore space REPO`: a Gradio Space in which a hybrid can be tried, filled in and pushed."""

import json
from dataclasses import dataclass, field

from .parsing import parse_options, positional_first, require, require_positive


@dataclass
class SpaceOptions:
    repo: str = field(metadata={"help": "Repository of the hybrid, or folder of a saved one, which goes along."})
    to: str | None = field(
        default=None, metadata={"help": "Space, name or owner/name (default: the hybrid's name with -space)."}
    )
    revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the hybrid that the Space runs (default: main)."}
    )
    private: bool = field(default=False, metadata={"help": "Make a new Space private."})
    output_folder: str | None = field(
        default=None, metadata={"help": "Write the Space there instead of pushing it, to run it on this machine."}
    )
    allow_local_sources: bool = field(
        default=False,
        metadata={"help": "Write 'local' in place of local paths and folders, which are otherwise refused."},
    )
    patience: int = field(default=60, metadata={"help": "Seconds without a sign of life after which it gives up."})
    json: bool = field(default=False, metadata={"help": "Print JSON instead of text."})


KINDS = (SpaceOptions,)


def run(arguments: list[str]) -> None:
    """
    Raises:
        ValueError: bad options, no hybrid, or the Hub or the connection is at fault.
    """
    (options,) = parse_options(KINDS, positional_first(arguments, "repo"), "space")
    require_positive(options, "patience")
    require(
        options.output_folder is None or options.to is None,
        "to, output_folder: give at most one of the two; a folder is not pushed.",
    )

    from ..hub.space import push_space, write_space

    if options.output_folder is not None:
        folder = write_space(options.repo, options.output_folder, revision=options.revision)
        if options.json:
            print(json.dumps({"folder": str(folder)}, indent=2))
            return
        print(f"The Space is in {folder}; it needs the extra `space`: python {folder / 'app.py'}")
        return
    info = push_space(
        options.repo,
        options.to,
        revision=options.revision,
        private=options.private or None,
        allow_local_sources=options.allow_local_sources,
        patience=float(options.patience),
    )
    if options.json:
        print(json.dumps({"commit": info.oid, "url": str(info.commit_url), "changed": info.changed}, indent=2))
        return
    print(f"{len(info.changed)} files changed." if info.changed else "Nothing differs from what is there; no commit.")
    print(f"Commit {info.oid}: {info.commit_url}")
