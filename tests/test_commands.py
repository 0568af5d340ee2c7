"""The console script: compose, train, discretize, evaluate one after the other; bad options; help."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_manticore.commands import COMMANDS, main
from modeling_manticore.tasks.text import help_topics, train_tokenizer


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two component folders with one tokenizer, and a text."""
    root = tmp_path_factory.mktemp("commands")
    texts = help_topics()[:12]
    tokenizer = train_tokenizer(texts, 300)
    for family in ("gpt_neox", "mamba2"):
        torch.manual_seed(0)
        config = FAMILIES[family]()
        config.vocab_size = len(tokenizer)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / family)
        tokenizer.save_pretrained(root / family)
    (root / "text.txt").write_text("\n".join(texts)[:20_000])
    return root


def options(**settings):
    words = []
    for key, value in settings.items():
        words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return words


def test_the_whole_path(folders, tmp_path, capsys):
    text, rows = str(folders / "text.txt"), {"row_length": 32, "batch_size": 4}
    supernet, searched, cut = (str(tmp_path / name) for name in ("supernet", "searched", "cut"))
    parts = [str(folders / "gpt_neox"), str(folders / "mamba2")]
    assert not main(
        ["compose"]
        + options(components=parts, output_folder=supernet, num_blocks=2, calibration_texts=[text], **rows)
        + options(calibration_rows=24)
    )
    printed = capsys.readouterr().out
    assert "supernet of" in printed and "held-out fit" in printed and f"The supernet is in {supernet}" in printed
    assert len(AutoTokenizer.from_pretrained(supernet)) == 300

    settings = {"model": supernet, "train_texts": [text], "row_length": 32, "rows": 40, "max_steps": 2}
    settings |= {"output_dir": searched, "stage": "search", "report_to": "none", "per_device_train_batch_size": 4}
    settings |= {"mixture_learning_rate": 0.5, "logging_steps": 1, "use_cpu": True}
    recipe = tmp_path / "search.yaml"
    recipe.write_text(json.dumps(settings))  # JSON is YAML
    assert not main(["train", str(recipe), "--max_steps", "3"])
    assert "held-out loss" in capsys.readouterr().out
    assert (Path(searched) / "mixture_weights.png").is_file()
    before, after = (AutoModelForCausalLM.from_pretrained(name) for name in (supernet, searched))
    assert not torch.equal(before.mixture_weights()[0], after.mixture_weights()[0])

    for choice, blocks in (("0,1", 2), ("argmax", None)):
        assert not main(
            ["discretize"]
            + options(model=searched, output_folder=cut, choice=choice, calibration_texts=[text], **rows)
            + options(calibration_rows=24)
        )
        hybrid = AutoModelForCausalLM.from_pretrained(cut)
        assert hybrid.config.is_discretized and blocks in (None, len(hybrid.config.blocks))
        assert f"The hybrid is in {cut}" in capsys.readouterr().out

    numbers = tmp_path / "numbers" / "numbers.json"
    assert not main(["evaluate"] + options(model=cut, texts=[text], rows=8, output_file=numbers, **rows))
    assert "perplexity" in capsys.readouterr().out
    result = json.loads(numbers.read_text())["texts"][text]
    assert result["tokens"] == 8 * 31 and 0 < result["loss"] < 20 and 0 <= result["accuracy"] <= 1


def test_search(folders, tmp_path, capsys):
    text = str(folders / "text.txt")
    settings = {"components": [str(folders / "gpt_neox"), str(folders / "mamba2")], "num_blocks": 2, "texts": [text]}
    settings |= {"rows": 24, "row_length": 32, "batch_size": 4}
    first, second, third = (str(tmp_path / name) for name in ("first", "second", "third"))
    assert not main(
        ["search"]
        + options(output_folder=first, halving=True, halving_tokens=1000, max_attention_blocks=1, **settings)
    )
    printed = capsys.readouterr().out
    assert "hybrids scored (exhaustive, bridges parallel)" in printed and f"The hybrid is in {first}" in printed
    hybrid = AutoModelForCausalLM.from_pretrained(first)
    assert hybrid.config.is_discretized
    report = json.loads((Path(first) / "report" / "stitch.json").read_text())
    assert len(report["candidates"]) == 3 and "0.15" in report["candidates"][0]["tuned"]
    assert {"stitch.json", "halving.json", "pareto.png", "blocks.png"} == {
        path.name for path in (Path(first) / "report").iterdir()
    }
    assert not main(["search"] + options(output_folder=second, strategy="sweep", divisions=2, **settings))
    assert "9 points, 2 divisions" in capsys.readouterr().out
    searched = AutoModelForCausalLM.from_pretrained(second)
    assert not searched.config.is_discretized and (Path(second) / "report" / "sweep.json").is_file()
    settings = {"model": second, "texts": [text], "rows": 24, "row_length": 32, "output_folder": third}
    assert not main(["search"] + options(limit=1, beam=1, score_texts=[text], **settings))
    assert "(beam, bridges parallel)" in capsys.readouterr().out


ERRORS = {
    "nothing": ([], "command: got nothing, allowed are demo, compose"),
    "unknown": (["merge"], "command: got 'merge'"),
    "option": (["demo", "--stpes", "3"], "--stpes"),
    "value": (["demo", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
    "range": (["demo", "--steps", "0"], "steps: got 0, allowed is a positive integer"),
    "texts": (["demo", "--texts", "bible"], "texts: got 1, allowed are two or more"),
    "domains": (["demo", "--domains", "a", "a"], "domains: got"),
    "required": (["compose"], "--components"),
    "blocks": (["compose", "--components", "a", "b", "--output_folder", "x"], "give exactly one of the two"),
    "json": (
        ["compose", "--components", "a", "b", "--output_folder", "x", "--blocks", "[["],
        "blocks: it is not JSON",
    ),
    "choice": (["discretize", "--model", "m", "--output_folder", "x", "--choice", "a,b"], "choice: got 'a,b'"),
    "no_folder": (["discretize", "--model", "/nowhere/at/all", "--output_folder", "x"], "'/nowhere/at/all'"),
    "row": (["evaluate", "--model", "m", "--texts", "bible", "--row_length", "1"], "row_length: got 1"),
    "stage": (["train", "--model", "m", "--train_texts", "bible", "--stage", "all"], "stage: got 'all'"),
    "search_model": (["search", "--texts", "a", "--output_folder", "x"], "model, components: give exactly one"),
    "search_blocks": (
        ["search", "--components", "a", "b", "--texts", "a", "--output_folder", "x"],
        "num_blocks: got None",
    ),
    "strategy": (
        ["search", "--model", "m", "--texts", "a", "--output_folder", "x", "--strategy", "joint"],
        "strategy: 'joint' trains the supernet: manticore train --stage search --strategy joint",
    ),
    "limit": (
        ["search", "--model", "m", "--texts", "a", "--output_folder", "x", "--max_parameters", "-5"],
        "max_parameters: got -5",
    ),
    "recipe": (["train", "absent.yaml"], "absent.yaml: it cannot be read"),
    "kind": (["train", "recipe.toml"], "allowed as the positional argument is a .yaml, .yml or .json"),
}


@pytest.mark.parametrize("words, message", ERRORS.values(), ids=ERRORS)
def test_bad_options_get_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.startswith("manticore: error: ") and message in printed
    assert not any(tmp_path.iterdir())


BAD_RECIPES = {
    "no_mapping": ("- 1", "it holds list, allowed is a mapping"),
    "syntax": ("a: [", "it is not valid yaml"),
    "misspelled": ("modle: x", "'modle' is no option; did you mean 'model'?"),
}


@pytest.mark.parametrize("content, message", BAD_RECIPES.values(), ids=BAD_RECIPES)
def test_bad_recipes(content, message, capsys, tmp_path):
    (tmp_path / "recipe.yaml").write_text(content)
    assert main(["evaluate", str(tmp_path / "recipe.yaml")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_complete(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: manticore {command}" in printed and COMMANDS.keys() >= {command}
    from importlib import import_module

    module = import_module(f"modeling_manticore.commands.{command}")
    kind = next(value for name, value in vars(module).items() if name.endswith("Options") and name != "Options")
    for field in kind.__dataclass_fields__.values():
        assert field.metadata["help"] and f"--{field.name}" in printed


def test_scripts_are_the_commands():
    scripts = {path.stem: path for path in (ROOT / "scripts").glob("*.py")}
    names = ("compose", "train", "search", "discretize", "evaluate", "push", "verify")
    commands = {"quickstart": "demo", "run_mad": "mad"} | {name: name for name in names}
    assert scripts.keys() == commands.keys()
    done = subprocess.run(
        [sys.executable, scripts["quickstart"], "--help"], capture_output=True, text=True, timeout=120, check=True
    )
    assert "usage: manticore demo" in done.stdout
    for name, path in scripts.items():
        assert f'main(["{commands[name]}", *sys.argv[1:]])' in path.read_text()


def test_general_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed and text in printed for name, text in COMMANDS.items())
