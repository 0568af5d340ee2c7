"""The console script: compose, train, discretize, evaluate one after the other; bad options; help."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from command_runs import component_folders, options
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_manticore.commands import COMMANDS, main


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two component folders with one tokenizer, and a text."""
    return component_folders(tmp_path_factory.mktemp("commands"))


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
    assert (Path(searched) / "report" / "mixture_weights.png").is_file()
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

    taught = settings | {"model": cut, "output_dir": tmp_path / "taught", "stage": "distill"}
    assert not main(["train"] + options(teacher=["0", parts[1]], **taught))
    assert "held-out loss" in capsys.readouterr().out

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
    assert {"stitch.json", "halving.json", "pareto.png", "blocks.png", "components.png", "report.html"} == {
        path.name for path in (Path(first) / "report").iterdir()
    }
    page = (Path(first) / "report" / "report.html").read_text()
    assert "halving_tokens: 1000" in page and "max_attention_blocks: 1" in page and "text.txt" in page
    assert not main(["search"] + options(output_folder=second, strategy="sweep", divisions=2, **settings))
    assert "9 points, 2 divisions" in capsys.readouterr().out
    searched = AutoModelForCausalLM.from_pretrained(second)
    assert not searched.config.is_discretized and (Path(second) / "report" / "sweep.json").is_file()
    fourth = str(tmp_path / "fourth")
    words = options(strategy="mad", tasks=["memorization=2", "in-context-recall"], program_steps=3, task_length=8)
    assert not main(["search"] + words + options(output_folder=fourth, max_attention_blocks=1, **settings))
    assert f"The hybrid is in {fourth}" in capsys.readouterr().out
    report = json.loads((Path(fourth) / "report" / "programming.json").read_text())
    assert report["tasks"]["memorization"] == pytest.approx(2 / 3) and report["steps"] == 3
    assert AutoModelForCausalLM.from_pretrained(fourth).config.is_discretized
    settings = {"model": second, "texts": [text], "rows": 24, "row_length": 32, "output_folder": third}
    assert not main(["search"] + options(limit=1, beam=1, score_texts=[text], **settings))
    assert "(beam, bridges parallel)" in capsys.readouterr().out


SEARCH = ["search", "--model", "m", "--texts", "a", "--output_folder", "x"]
ERRORS = {
    "nothing": ([], "command: got nothing, allowed are demo, plan"),
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
    "no_folder": (["discretize", "--model", "/nowhere/at/all", "--output_folder", "x"], "(/nowhere/at/all): there is"),
    "row": (["evaluate", "--model", "m", "--texts", "bible", "--row_length", "1"], "row_length: got 1"),
    "stage": (["train", "--model", "m", "--train_texts", "bible", "--stage", "all"], "stage: got 'all'"),
    "search_model": (["search", "--texts", "a", "--output_folder", "x"], "model, components: give exactly one"),
    "search_blocks": (
        ["search", "--components", "a", "b", "--texts", "a", "--output_folder", "x"],
        "num_blocks: got None",
    ),
    "strategy": (
        [*SEARCH, "--strategy", "evolve"],
        "strategy: got 'evolve', allowed are 'stitch', 'sweep', 'joint', 'gaea', 'dash', 'darts'",
    ),
    "search_gradient": (
        [*SEARCH, "--strategy", "gaea", "--gaea_base", "x"],
        "gaea_base: got 'x'",
    ),
    "search_halving": (
        [*SEARCH, "--strategy", "dash", "--halving"],
        "halving: got True with strategy 'dash'",
    ),
    "search_limits": (
        [
            "search",
            "--model",
            "m",
            "--texts",
            "a",
            "--output_folder",
            "x",
            "--strategy",
            "sweep",
            "--max_parameters",
            "5",
        ],
        "max_parameters: given with strategy 'sweep'",
    ),
    "search_order": ([*SEARCH, "--order", "a"], "order: got"),
    "search_texts": (
        [
            "search",
            "--model",
            "m",
            "--texts",
            "a",
            "--output_folder",
            "x",
            "--strategy",
            "joint",
            "--search_texts",
            "b",
        ],
        "search_texts: got ['b'] with strategy='joint', which does not use them",
    ),
    "stitch_search_texts": (
        [*SEARCH, "--search_texts", "b"],
        "search_texts: given with strategy 'stitch'",
    ),
    "train_search_texts": (
        ["train", "--model", "m", "--train_texts", "a", "--search_texts", "b", "--stage", "finetune"],
        "search_texts: got ['b'] with stage='finetune'",
    ),
    "tasks": (
        ["search", "--model", "m", "--texts", "a", "--output_folder", "x", "--strategy", "mad", "--tasks", "copying"],
        "tasks: got 'copying', allowed are in-context-recall",
    ),
    "task_weight": (
        ["search", "--model", "m", "--texts", "a", "--output_folder", "x", "--tasks", "memorization=much"],
        "tasks: got 'memorization=much', allowed are TASK and TASK=WEIGHT",
    ),
    "limit": (
        [*SEARCH, "--max_parameters", "-5"],
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
    kinds = [value for name, value in vars(module).items() if name.endswith("Options") and name != "Options"]
    assert kinds
    for field in (field for kind in kinds for field in fields(kind)):
        assert field.metadata["help"] and f"--{field.name}" in printed


def test_scripts_are_the_commands():
    scripts = {path.stem: path for path in (ROOT / "scripts").glob("*.py")}
    renamed = {"demo": "quickstart", "mad": "run_mad", "experiment": "run_experiment"}
    commands = {renamed.get(name, name): name for name in COMMANDS}
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
