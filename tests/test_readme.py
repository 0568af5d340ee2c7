"""Every snippet and command of the README is run, on tiny components, in the order in which it stands there."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES
from transformers import AutoModelForCausalLM

from modeling_manticore.commands import COMMANDS, main
from modeling_manticore.tasks.text import as_dataset, help_topics, pack, train_tokenizer


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with what the README supposes: two components of six layers, and a text."""
    folder = tmp_path_factory.mktemp("readme")
    texts = help_topics()[:30]
    tokenizer = train_tokenizer(texts, 300)
    for name, family in (("a-gpt-neox", "gpt_neox"), ("a-mamba2", "mamba2")):
        torch.manual_seed(0)
        config = FAMILIES[family]()
        config.vocab_size, config.num_hidden_layers = len(tokenizer), 6
        if hasattr(config, "max_position_embeddings"):
            config.max_position_embeddings = 2048
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    paragraphs = [line for text in texts for line in text.splitlines() if len(line) > 30][:300]
    (folder / "notes.txt").write_text("\n\n".join(paragraphs))
    for language, code in BLOCKS:
        if language == "yaml":
            (folder / code.splitlines()[0].removeprefix("# ")).write_text(code)
    rows = pack(tokenizer, paragraphs, 32)[:40]
    return folder, as_dataset(rows)


def test_python(folder, monkeypatch, capsys):
    folder, dataset = folder
    monkeypatch.chdir(folder)
    names = {"train_dataset": dataset}
    for snippet in [code for language, code in BLOCKS if language == "python"]:
        snippet = snippet.replace("steps=100", "steps=3")
        exec(compile(snippet, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "held-out fit" in printed and "In the beginning" in printed
    assert (folder / "my-hybrid" / "model.safetensors").is_file()


def test_commands(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder[0])
    lines = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines()]
    assert {"make demo", "make test"} <= set(lines)
    for line in lines:
        words = shlex.split(line)
        if words[0] == "make":
            subprocess.run([*words, "-n"], cwd=ROOT, check=True, capture_output=True, timeout=60)
        else:
            assert words[0] == "manticore" and words[1] in COMMANDS
            words = [word.replace("20", "2") if word == "20" else word for word in words]
            assert main(words[1:]) == 0, capsys.readouterr().err
    assert "perplexity" in capsys.readouterr().out


def test_every_language_is_covered():
    assert {language for language, _ in BLOCKS} <= {"", "python", "bash", "yaml"}
    assert len([code for language, code in BLOCKS if language == "python"]) >= 3
    assert README.count("```") == 2 * len(BLOCKS)
