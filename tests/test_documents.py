"""
What a reader is told: every snippet and command is run, every link leads somewhere, every quoted error is one that the
package raises. Components are tiny; the Hub is the one on the loopback interface.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from command_runs import six_layer_components
from loopback import LoopbackHub
from snippets import NOT_CODE, ROOT, RUNNERS, blocks_of, run

from modeling_manticore.experiments.tasks import TASKS
from modeling_manticore.search import STRATEGIES


DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("model_cards/*.md")]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCUMENTS)}
BLOCKS = {name: blocks_of(text) for name, text in TEXTS.items()}
RUN = {name for name, blocks in BLOCKS.items() if any(block.language in RUNNERS for block in blocks)}
# Run in a process of its own, whose Hub is the loopback one. The card is the one that README.md's snippets write.
ON_THE_HUB = {"README.md", "docs/howto/hub.md", "model_cards/hybrid.md"}
# Fences that are not run, for the reason that stands before them.
NOT_RUN = {"docs/experiments.md": 1, "docs/howto/cluster.md": 2}
REPOSITORIES = {"EleutherAI/pythia-410m": "a-gpt-neox", "state-spaces/mamba-370m-hf": "a-mamba2"}
CARD = "---\nlicense: apache-2.0\n---\n\n# A component\n"
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCES = re.compile(r"^```.*?^```$", flags=re.MULTILINE | re.DOTALL)
MESSAGE = re.compile(r"^\| (`+)(.+?)\1 \|", flags=re.MULTILINE)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What documents suppose: two components of six layers, a text, experiment files."""
    folder = six_layer_components(tmp_path_factory.mktemp("world"))
    experiments = ROOT / "benchmarks" / "experiments"
    shutil.copytree(experiments, folder / "benchmarks" / "experiments")
    for name in ("my.yaml", "e1.yaml"):
        shutil.copy(experiments / "smoke.yaml", folder / name)
    return folder


@pytest.mark.parametrize("name", sorted(RUN - ON_THE_HUB))
def test_snippets_and_commands(name, world, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    with patch.dict(STRATEGIES), patch.dict(TASKS):
        run(ROOT / name, shutil.copytree(world, tmp_path / "folder"), {})


@pytest.mark.timeout(900)
def test_snippets_and_commands_of_the_hub(world, tmp_path):
    for name in ("README.md", "hub.md"):
        shutil.copytree(world, tmp_path / name)
    card = tmp_path / "README.md" / "my-hybrid" / "README.md"
    with LoopbackHub(tmp_path / "hub") as hub:
        for name, folder in REPOSITORIES.items():
            repository = hub.store.create(name)
            files = {file.name: hub.store.put(file.read_bytes()) for file in (world / folder).iterdir()}
            files["README.md"] = hub.store.put(CARD.encode())
            repository.commit("main", files, "files", repository.branches["main"])
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= hub.environment(tmp_path / "cache") | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, Path(__file__).with_name("snippets.py"), tmp_path]
            + [ROOT / "README.md", card, ROOT / "docs" / "howto" / "hub.md"],
            env=environment | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=870,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        pushed = {name for name, repository in hub.store.repositories.items() if len(repository.history()) > 1}
    assert pushed - set(REPOSITORIES) == {"me/my-hybrid", "me/my-own-hybrid"}
    for words in ("held-out fit", "perplexity", "In the beginning", "byte for byte", "no commit"):
        assert words in done.stdout
    assert "python" in {block.language for block in blocks_of(card.read_text(encoding="utf-8"))}


def test_every_fence_is_run_or_says_why_not():
    languages = {block.language for blocks in BLOCKS.values() for block in blocks}
    assert languages <= NOT_CODE | set(RUNNERS)
    marked = {name: sum(block.reason is not None for block in blocks) for name, blocks in BLOCKS.items()}
    assert {name: count for name, count in marked.items() if count} == NOT_RUN
    for name, text in TEXTS.items():
        assert text.count("```") == 2 * len(BLOCKS[name]), f"{name}: a fence that no pattern sees"
        assert "\n\n    " not in FENCES.sub("", text), f"{name}: indented code, which nothing runs"


def test_readme_begins_with_what_can_be_tried():
    commands = {line for block in BLOCKS["README.md"] if block.language == "bash" for line in block.code.splitlines()}
    assert {"make demo", "make test", "make docs"} <= commands


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", FENCES.sub("", TEXTS[name]))):
        if target.startswith(("https://", "{{")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), f"{name}: {target}"
        if anchor and "." not in anchor:  # names with dots are the reference's, which the strict build checks
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
                target
            )


def messages_in_the_source() -> list[str]:
    """The constant text of everything that is raised, with a NUL where a value stands."""
    found = []
    for file in (ROOT / "modeling_manticore").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                found.append(constant_text(node.exc.args[0]))
            if isinstance(node, ast.Return) and isinstance(node.value, ast.List):
                found += map(constant_text, node.value.elts)  # problems of a plan
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Failure":
                found.append("\0: " + constant_text(node.args[-1]))  # raised by the parent of the process that failed
    return found


def constant_text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(constant_text(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return constant_text(node.left) + constant_text(node.right)
    return "\0"


def test_quoted_errors_are_those_of_the_package():
    raised = messages_in_the_source()
    quoted = [message for _, message in MESSAGE.findall(TEXTS["docs/troubleshooting.md"])]
    assert len(quoted) > 40
    for message in quoted:
        ways = (message, re.sub(r"^\S+: ", "\0: ", message))  # the field in front may be a value, too
        patterns = [re.compile(".*?".join(map(re.escape, way.split("…"))), flags=re.DOTALL) for way in ways]
        assert any(pattern.search(text) for pattern in patterns for text in raised), message
