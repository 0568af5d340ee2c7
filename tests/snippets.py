"""
The Python snippets and shell commands of a document, and how they are run: in the order in which they stand, in one
folder and one namespace. `python snippets.py FOLDER DOCUMENT ...` runs documents in a process of its own, each in the
folder FOLDER/<name of the document>.
"""

import os
import re
import shlex
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: (.+) -->\n$")
NOT_CODE = {"", "text", "math", "bibtex"}
# Fewer steps than a reader would take.
SMALLER = ((r"steps=100\b", "steps=3"), (r"steps(:| )\s*20\b", r"steps\1 2"))
COMMIT = "the full commit hash from the repository's history"  # the words of a card that its reader replaces


@dataclass(frozen=True)
class Block:
    """One fence of a document: the line it stands on, its language and text, and why it is not run (None: it is)."""

    line: int
    language: str
    code: str
    reason: str | None


def blocks_of(text: str) -> list[Block]:
    """All fences of a document."""
    found = []
    for match in FENCE.finditer(text):
        marked = NOT_RUN.search(text[: match.start()])
        line = text[: match.start()].count("\n") + 1
        found.append(Block(line, *match.groups(), marked[1] if marked else None))
    return found


def run(document: Path, folder: Path, names: dict) -> None:
    """
    Run a document's snippets and commands in a folder (the working folder meanwhile); `names` are known to the
    snippets. YAML whose first line is a comment with a file name is written to that file.

    Raises:
        RuntimeError: one failed; says which.
    """
    before = Path.cwd()
    os.chdir(folder)
    try:
        for block in blocks_of(document.read_text(encoding="utf-8")):
            if block.language in NOT_CODE or block.reason is not None:
                continue
            code = block.code.replace(COMMIT, "main")
            for pattern, smaller in SMALLER:
                code = re.sub(pattern, smaller, code)
            try:
                RUNNERS[block.language](code, names)
            except BaseException as error:
                raise RuntimeError(f"{document.name}, line {block.line}: {error!r}") from error
    finally:
        os.chdir(before)


def _python(code: str, names: dict) -> None:
    exec(compile(code, "snippet", "exec"), names)


def _yaml(code: str, names: dict) -> None:
    first = code.splitlines()[0]
    assert first.startswith("# ") and first.endswith(".yaml"), "its first line is no comment with the file's name"
    Path(first.removeprefix("# ")).write_text(code, encoding="utf-8")


def _shell(code: str, names: dict) -> None:
    from modeling_manticore.commands import main

    for line in code.splitlines():
        words = shlex.split(os.path.expandvars(line), comments=True)
        if words[0] == "make":
            subprocess.run([*words, "-n"], cwd=ROOT, check=True, capture_output=True, timeout=60)
            continue
        assert words[0] == "manticore", f"{words[0]}: only make and manticore are run"
        if words[1] == "experiment" and "--dry_run" not in words:
            words.append("--dry_run")
        assert main(words[1:]) == 0, f"{line}: its exit code is not 0"


RUNNERS = {"python": _python, "bash": _shell, "yaml": _yaml}


def main(folder: str, *documents: str) -> int:
    """Run documents; 1 where one failed, with its traceback."""
    for name in documents:
        try:
            run(Path(name), Path(folder, Path(name).name), {})
        except RuntimeError:
            traceback.print_exc()
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
