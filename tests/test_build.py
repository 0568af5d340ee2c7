"""Builds: stages leave whole folders, are skipped if nothing changed, go on after a stop; shipped recipes dry-run."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from command_runs import component_folders
from safetensors.torch import load_file
from standins import substitute
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_manticore.commands import main
from modeling_manticore.hub import build as building
from modeling_manticore.hub import stages
from modeling_manticore.hub.build import build
from modeling_manticore.hub.recipes import load_recipe, recipe_from_dict, shipped_recipes


SETTINGS = {
    "name": "tiny",
    "components": [{"folder": "gpt_neox"}, {"folder": "mamba2"}],
    "num_blocks": 2,
    "calibration": {"texts": ["text.txt"], "rows": 24, "row_length": 16},
    "search": {"strategy": "stitch", "texts": ["text.txt"], "rows": 24, "row_length": 16},
    "finetune": {"texts": ["text.txt"], "rows": 24, "row_length": 16, "steps": 2, "batch_size": 2},
    "evaluation": {"texts": ["held-out.txt"], "rows": 8, "row_length": 16},
}
RUN = ["compose", "calibrate", "search", "discretize", "finetune", "evaluate"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = component_folders(tmp_path_factory.mktemp("parts"))
    text = (root / "text.txt").read_text()
    (root / "held-out.txt").write_text(text[-4000:])
    (root / "text.txt").write_text(text[:-4000])
    return root


@pytest.fixture
def folder(parts, tmp_path, monkeypatch):
    for name in ("gpt_neox", "mamba2", "text.txt", "held-out.txt"):
        os.symlink(parts / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def changed(**sections):
    return recipe_from_dict(SETTINGS | {name: SETTINGS.get(name, {}) | own for name, own in sections.items()})


def ran(capsys):
    """Names of the stages that a build says it ran."""
    lines = capsys.readouterr().out.splitlines()
    return [line.split()[1].rstrip(":") for line in lines if line.endswith(": running")]


@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_shipped_recipes_dry_run(name, tmp_path_factory, monkeypatch, capsys):
    root = tmp_path_factory.getbasetemp() / "dry"
    root.mkdir(exist_ok=True)
    monkeypatch.chdir(root)
    recipe = substitute(load_recipe(name), root)
    before = sorted(root.rglob("*"))
    assert build(recipe, dry_run=True) is None
    assert sorted(root.rglob("*")) == before
    printed = capsys.readouterr().out
    assert "compose: to do" in printed and "evaluate: to do" in printed
    assert "push: not run, publishing.repo_id is not set" in printed


def test_from_components_to_a_measured_hybrid_and_again(folder, capsys):
    place = build(recipe_from_dict(SETTINGS))
    assert ran(capsys) == RUN
    assert str(place) == "runs/tiny/finetune/model"
    hybrid = AutoModelForCausalLM.from_pretrained(place)
    assert hybrid.config.is_discretized and AutoTokenizer.from_pretrained(place)
    choice = json.loads((folder / "runs/tiny/search/choice.json").read_text())["choice"]
    assert len(choice) == 2
    results = json.loads((folder / "runs/tiny/evaluate/results.json").read_text())
    assert 0 < results["texts"]["held-out.txt"]["loss"] < 20
    for found, name in zip(results["components"], ("gpt_neox", "mamba2"), strict=True):
        assert main(["evaluate", name, "--texts", "held-out.txt", "--rows", "8", "--row_length", "16", "--json"]) == 0
        alone = json.loads(capsys.readouterr().out)["texts"]["held-out.txt"]
        assert found["name"] == name and alone.items() <= found["texts"]["held-out.txt"].items()
    weights = load_file(place / "model.safetensors")
    page = (folder / "runs/tiny/report.html").read_text()
    loss = f"<dt>loss on held-out.txt</dt><dd>{results['texts']['held-out.txt']['loss']:.4f} nats</dd>"
    for told in ("Build of tiny", "Candidates in the supernet", "The hybrid", loss):
        assert told in page
    assert all(f"<td>{stage}</td>" in page for stage in RUN) and "held-out.txt" in page and "picture1-box-0-0" in page
    assert all(f"<td>{name}</td>" in page for name in ("the hybrid", "gpt_neox alone", "mamba2 alone"))

    assert build(recipe_from_dict(SETTINGS)) == place and ran(capsys) == []
    assert not list((folder / "runs/tiny").glob(".*"))

    build(changed(finetune={"steps": 3}))
    assert ran(capsys) == ["finetune", "evaluate"]
    build(recipe_from_dict(SETTINGS))  # back: deterministic
    assert ran(capsys) == ["finetune", "evaluate"]
    again = load_file(place / "model.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)

    build(recipe_from_dict(SETTINGS), from_stage="discretize")
    assert ran(capsys) == ["discretize", "finetune", "evaluate"]

    shard = folder / "runs/tiny/discretize/model/model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    build(recipe_from_dict(SETTINGS), dry_run=True)
    assert ran(capsys) == []
    build(recipe_from_dict(SETTINGS))
    assert ran(capsys) == ["discretize", "finetune", "evaluate"]

    licensed = [entry | {"license": "mit", "license_reason": "mine"} for entry in SETTINGS["components"]]
    build(recipe_from_dict(SETTINGS | {"components": licensed}), dry_run=True)
    assert ": to do" not in capsys.readouterr().out  # only the card tells licences

    (folder / "text.txt").unlink()
    (folder / "text.txt").write_text((folder / "held-out.txt").read_text() * 3)
    build(recipe_from_dict(SETTINGS), dry_run=True)
    printed = capsys.readouterr().out
    assert "compose: done before" in printed and "calibrate: to do" in printed and "finetune: to do" in printed


def test_a_build_that_stops_goes_on(folder, capsys, monkeypatch):
    settings = SETTINGS | {"search": {"strategy": "none", "choice": [1, 0]}}
    recipe = recipe_from_dict(settings)
    real = stages.keep_paths

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "keep_paths", stop)
    with pytest.raises(KeyboardInterrupt):
        build(recipe)
    assert ran(capsys) == ["compose", "calibrate", "search", "discretize"]
    assert sorted(path.name for path in (folder / "runs/tiny").iterdir()) == ["calibrate", "compose", "search"]

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    stale = folder / f"runs/tiny/.discretize.partial-{gone.pid}"
    (stale / "model").mkdir(parents=True)
    alive = folder / f"runs/tiny/.discretize.partial-{os.getppid()}"
    alive.mkdir()
    monkeypatch.setattr(stages, "keep_paths", real)
    build(recipe)
    assert ran(capsys) == ["discretize", "finetune", "evaluate"]
    assert not stale.exists() and alive.exists()


def test_by_gradient_with_a_teacher(folder, capsys):
    search = {"strategy": "darts", "steps": 2, "batch_size": 2, "rows": 36}
    recipe = changed(search=search | {"limits": {"max_attention_blocks": 1}}, finetune={"teacher": ["gpt_neox"]})
    place = build(recipe)
    assert ran(capsys) == RUN
    assert (folder / "runs/tiny/search/report/search.json").is_file()
    choice = json.loads((folder / "runs/tiny/search/choice.json").read_text())["choice"]
    assert choice != [0, 0] and AutoModelForCausalLM.from_pretrained(place).config.is_discretized


def test_from_scratch(folder, capsys):
    settings = {"name": "fresh", "finetune": SETTINGS["finetune"], "evaluation": SETTINGS["evaluation"]}
    settings["tokenizer"] = {"train_texts": ["text.txt"], "vocab_size": 280}
    settings["components"] = [
        {"config": {"model_type": "mamba2", "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 8}},
        {"config": {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}},
    ]
    settings["components"][0]["config"] |= {"n_groups": 1, "state_size": 8, "expand": 2, "chunk_size": 4}
    settings["components"][1]["config"] |= {"intermediate_size": 64}
    order = [(0, 0, 1), (1, 0, 1), (0, 1, 2)]
    settings["blocks"] = [[{"component": k, "start": i, "stop": j}] for k, i, j in order]
    hybrid = AutoModelForCausalLM.from_pretrained(build(recipe_from_dict(settings)))
    printed = capsys.readouterr().out
    assert f"{sum(p.numel() for p in hybrid.parameters()):,}" in printed and "calibrate: not run" in printed
    assert hybrid.config.vocab_size == 280 and len(hybrid.config.blocks) == 3


def test_nothing_is_written_for_what_cannot_be_built(folder):
    for recipe in (changed(calibration={"row_length": 4096}), recipe_from_dict(SETTINGS | {"num_blocks": 9})):
        with pytest.raises(ValueError, match="cannot be built"):
            build(recipe)
    with pytest.raises(ValueError, match="from_stage: got 'x'"):
        build(recipe_from_dict(SETTINGS), from_stage="x")
    assert not (folder / "runs").exists()


def test_card_and_push_come_last(folder, capsys, monkeypatch):
    """With stand-ins for the two stages, whose modules have tests of their own."""
    made = []

    def stand_in(name):
        def run(work, place):
            made.append((name, str(work.model_folder)))
            (place / "README.md").write_text(name)

        return run

    chain = [
        stages.Stage(s.name, s.sections, stand_in(s.name), lambda recipe: None) if s.name in ("card", "push") else s
        for s in building.STAGES
    ]
    monkeypatch.setattr(building, "STAGES", chain)
    small = {name: own for name, own in SETTINGS.items() if name not in ("finetune", "search", "evaluation")}
    recipe = recipe_from_dict(small)
    build(recipe)
    assert ran(capsys) == ["compose", "calibrate", "card", "push"]
    assert made == [("card", "runs/tiny/calibrate/model"), ("push", "runs/tiny/calibrate/model")]
    build(recipe)
    assert ran(capsys) == [] and len(made) == 2


def test_a_push_that_fails_leaves_the_page(folder, monkeypatch):
    """And local components are refused before anything is written, unless they are allowed."""
    pushed = []

    def card(work, place):
        (place / "README.md").write_text("card")

    def push(work, place):
        pushed.append((work.recipe.publishing.allow_local_sources, (folder / "runs/tiny/report.html").read_text()))
        raise ValueError("the Hub is away")

    own = {"card": card, "push": push}
    chain = [stages.Stage(s.name, s.sections, own.get(s.name, s.run), s.missing) for s in building.STAGES]
    monkeypatch.setattr(building, "STAGES", chain)
    small = {name: own for name, own in SETTINGS.items() if name not in ("finetune", "search", "evaluation")}
    small["components"] = [entry | {"license": "mit", "license_reason": "ours"} for entry in small["components"]]
    recipe = recipe_from_dict(small | {"publishing": {"repo_id": "me/tiny"}})
    with pytest.raises(ValueError, match=r"publishing.allow_local_sources: got false.*'gpt_neox'"):
        build(recipe)
    assert not (folder / "runs").exists()
    with pytest.raises(ValueError, match="the Hub is away"):
        build(recipe, allow_local_sources=True)
    assert pushed[0][0] and "not finished" in pushed[0][1]
    assert "not finished" in (folder / "runs/tiny/report.html").read_text()


def test_the_command(folder, capsys):
    settings = {name: own for name, own in SETTINGS.items() if name in ("components", "num_blocks", "evaluation")}
    (folder / "mine.yaml").write_text(yaml.safe_dump(settings))
    assert main(["build", "mine.yaml", "--dry_run"]) == 0 and not (folder / "runs").exists()
    assert main(["build", "mine.yaml"]) == 0
    assert "The hybrid is in runs/mine/compose/model" in capsys.readouterr().out
    assert main(["build", "mine.yaml", "--from_stage", "nothing"]) == 2
