"""`manticore search` and `manticore train` with gradient strategies: splits, limits, reports, the help."""

import json
from pathlib import Path

import pytest
import torch
from command_runs import component_folders, options
from transformers import AutoModelForCausalLM

from modeling_manticore import ManticoreTrainer
from modeling_manticore.commands import main, search


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two component folders with one tokenizer, and a text."""
    return component_folders(tmp_path_factory.mktemp("commands"))


@pytest.fixture(scope="module")
def supernet(folders):
    """A saved supernet of both, with softmax mixtures."""
    parts = [str(folders / name) for name in ("gpt_neox", "mamba2")]
    assert not main(["compose"] + options(components=parts, output_folder=folders / "supernet", num_blocks=2))
    return str(folders / "supernet")


@pytest.fixture
def trainers(monkeypatch):
    """Every trainer that a command makes."""
    made, construct = [], ManticoreTrainer.__init__

    def spy(self, *given, **named):
        construct(self, *given, **named)
        made.append(self)

    monkeypatch.setattr(ManticoreTrainer, "__init__", spy)
    return made


def row_set(dataset):
    return {tuple(row) for row in dataset["input_ids"]}


STRATEGIES = {
    "joint": ({}, "softmax", False),
    "darts": ({"mixture_learning_rate": 0.3}, "softmax", True),
    "gaea": ({"gaea_base": "darts"}, "simplex", True),
    "dash": ({"temperature_end": 0.5, "cost_weight": 0.5, "cost_kind": "attention_blocks"}, "gumbel_softmax", False),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_search_by_gradient(strategy, supernet, folders, tmp_path, capsys, trainers):
    own, mixture, splits = STRATEGIES[strategy]
    settings = {"model": supernet, "texts": [folders / "text.txt"], "output_folder": tmp_path / "found", "rows": 24}
    settings |= {"row_length": 32, "batch_size": 4, "steps": 3, "max_attention_blocks": 1, "strategy": strategy}
    assert not main(["search"] + options(**settings, **own))
    printed = capsys.readouterr().out
    assert (
        f"The hybrid is in {tmp_path / 'found'}" in printed and "within the limits (attention_blocks <= 1)" in printed
    )
    assert ("8 of 24 training rows are held out for the mixture weights" in printed) == splits
    assert (f"parametrised as {mixture!r} for {strategy}" in printed) == (mixture != "softmax")
    (trainer,) = trainers
    assert trainer.args.mixture_learning_rate == own.get("mixture_learning_rate", 0.1)
    assert all(getattr(trainer.args, name) == value for name, value in own.items())
    parts = [row_set(trainer.train_dataset), row_set(trainer.eval_dataset)]
    parts += [row_set(trainer.search_dataset)] if splits else []
    assert sum(map(len, parts)) == len(set.union(*parts)) == 32
    report = json.loads((tmp_path / "found" / "report" / "search.json").read_text())
    assert report["strategy"] == strategy and report["steps"] == 3 and report["limits"] == {"attention_blocks": 1}
    kept = report["discretized"]
    assert kept["costs"]["attention_blocks"] <= 1 and kept["choice"] == report["choice_within_limits"]
    assert f"hybrid {kept['loss']:.4f} nats" in printed and report["best_evaluation"]["eval_loss"]["step"] in (1, 2, 3)
    assert {p.name for p in (tmp_path / "found" / "report").iterdir()} == {
        "search.json",
        "hybrid.png",
        "mixture_heatmap.png",
        "mixture_weights.png",
        "report.html",
    }
    hybrid = AutoModelForCausalLM.from_pretrained(tmp_path / "found").eval()
    assert hybrid.config.is_discretized
    ids = torch.tensor(trainer.eval_dataset["input_ids"])
    with torch.no_grad():
        assert hybrid(ids, labels=ids).loss.item() == pytest.approx(kept["loss"], abs=1e-4)
        for name, loss in report["alone"].items():
            component = AutoModelForCausalLM.from_pretrained(folders / name).eval()
            assert component(ids, labels=ids).loss.item() == pytest.approx(loss, abs=1e-4)
            assert f"{name} {loss:.4f}" in printed
    assert list(report["alone"]) == ["gpt_neox", "mamba2"]


@pytest.mark.parametrize(
    "words, fitted",
    [
        ([], None),
        (["--no_train_components"], "sequential"),
        (["--order", "parallel"], "parallel"),
        (["--calibrate", "true"], "sequential"),
        (["--no_train_components", "--calibrate", "false"], None),
    ],
)
def test_search_of_components_calibrates_only_what_training_does_not_replace(
    words, fitted, folders, tmp_path, capsys, trainers
):
    settings = {"components": [folders / "gpt_neox", folders / "mamba2"], "num_blocks": 2, "steps": 1, "batch_size": 4}
    settings |= {"texts": [folders / "text.txt"], "row_length": 32, "strategy": "joint", "output_folder": tmp_path}
    assert not main(["search"] + options(**settings) + words)
    printed = capsys.readouterr().out
    assert ("held-out fit" in printed) == (fitted is not None) and "largest weights: " in printed
    assert json.loads((tmp_path / "report" / "search.json").read_text())["discretized"]["order"] == fitted
    assert (
        trainers[0].args.train_components == ("--no_train_components" not in words)
        and len(trainers[0].train_dataset) > 3 * len(trainers[0].eval_dataset) - 4
    )


def test_infeasible_limits_train_nothing(supernet, folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ManticoreTrainer, "train", lambda *given, **named: pytest.fail("it trained"))
    settings = {"model": supernet, "texts": [folders / "text.txt"], "output_folder": tmp_path / "found", "rows": 24}
    assert main(["search"] + options(**settings, row_length=32, strategy="dash", max_parameters=5)) == 2
    assert "max_parameters: got 5, the smallest feasible value is" in capsys.readouterr().err
    assert not (tmp_path / "found").exists()


@pytest.mark.parametrize("given", [True, False])
def test_train_with_a_search_split(given, supernet, folders, tmp_path, capsys, trainers):
    lines = (folders / "text.txt").read_text().splitlines()
    train, searched = tmp_path / "train.txt", tmp_path / "search.txt"
    train.write_text("\n".join(lines[: len(lines) // 2]))
    searched.write_text("\n".join(lines[len(lines) // 2 :]))
    settings = {"model": supernet, "train_texts": train, "row_length": 32, "rows": 40, "max_steps": 2}
    settings |= {"output_dir": tmp_path / "out", "stage": "search", "strategy": "gaea", "gaea_base": "darts"}
    settings |= {"report_to": "none", "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}
    settings |= {"search_texts": searched} if given else {}
    assert not main(["train"] + options(**settings))
    (trainer,) = trainers
    parts = [row_set(data) for data in (trainer.train_dataset, trainer.eval_dataset, trainer.search_dataset)]
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert [len(part) for part in parts] == ([36, 4, 40] if given else [24, 4, 12])
    assert ("12 of 36 training rows are held out" in capsys.readouterr().out) != given
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.mixture == "simplex"
    assert (tmp_path / "out" / "report" / "search.json").is_file()


def test_the_training_text_is_no_search_text(supernet, folders, tmp_path, capsys):
    settings = {"model": supernet, "train_texts": folders / "text.txt", "search_texts": folders / "text.txt"}
    settings |= {"output_dir": tmp_path / "out", "stage": "search", "strategy": "darts", "row_length": 32, "rows": 40}
    assert main(["train"] + options(**settings, use_cpu=True, report_to="none")) == 2
    assert "search_dataset: 36 of its 40 rows are also in train_dataset" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_discretize_within_limits(supernet, tmp_path, capsys):
    settings = {"model": supernet, "output_folder": tmp_path / "cut"}
    assert not main(["discretize"] + options(**settings, max_attention_blocks=0))
    assert "mamba2" in capsys.readouterr().out
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path / "cut").config.blocks) == 1
    assert main(["discretize"] + options(**settings, choice="0,0", max_attention_blocks=1)) == 2
    assert "choice: got [0, 0] with 2 attention_blocks, allowed are at most 1" in capsys.readouterr().err


def test_the_help_fits_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["search", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for name, strategy in search.STRATEGIES.items():
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert strategy.text in line and line.endswith(strategy.cost) and strategy.cost
    assert search.RUNNERS.keys() == search.STRATEGIES.keys()
    assert not any("--no_" in line for line in lines)
    assert Path(search.__file__).read_text().count("\n") < 450
