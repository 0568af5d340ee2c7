"""Grids of runs: schema, order, cache, resumption, shards, builders."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from modeling_manticore.commands import main
from modeling_manticore.commands.experiment import shard_from
from modeling_manticore.experiments.jobs import best_of, chains_of, shard_of
from modeling_manticore.experiments.records import read_lines
from modeling_manticore.experiments.runner import RunFailed, finished_runs, run_experiment
from modeling_manticore.experiments.schema import check_tasks, load_experiment


ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "benchmarks" / "experiments"
SMOKE = EXPERIMENTS / "smoke.yaml"


def smoke(folder: Path):
    """The smoke experiment with its results in a folder."""
    experiment = load_experiment(SMOKE)
    experiment.output = str(folder)
    return experiment


def fake_run(settings: dict) -> dict:
    """A record without training: the largest rate is the best."""
    accuracy = settings["learning_rate"] * 10
    measured = {"accuracy": accuracy, "loss": 1.0}
    found = {"validation": measured, "test": measured, "also_tested": {}, "choice": [0, 1], "parameters": 100}
    found |= {"weights": [[0.9, 0.1], [0.2, 0.8]], "cpu_seconds": 1.0, "baseline": 0.1, "also_baseline": {}}
    return found | {
        "tokens": 10,
        "flops_per_token": 10,
        "cache_bytes_per_token": 0,
        "versions": {},
        "git_commit": None,
    }


@pytest.fixture
def untrained(monkeypatch):
    """Runs that are counted and not trained; the settings that were run."""
    ran = []

    def run(settings):
        ran.append(settings)
        return fake_run(settings)

    monkeypatch.setattr("modeling_manticore.experiments.training.run", run)
    return ran


BAD = {
    "learning_rates: [1e-3, 1e-2]|learning_rates: [0]": "training.learning_rates[0]: got 0.0, allowed is a number",
    "steps: 4|steps: many": "training.steps: got 'many', allowed is an integer",
    "seeds: [0, 1]|seeds: [1, 1]": "training.seeds: it has an entry twice",
    "kind: searched|kind: serched": "models[2].kind: got 'serched'",
    "of: Manticore searched|of: Transformer": "models[3].of: got 'Transformer', allowed are 'Manticore searched'",
    "family: mamba2|family: mamba3": "models[1].family: got 'mamba3'",
    "kind: component, family: mamba2|kind: component": "models[1].family: it is missing, 'component' needs it",
    "kind: searched|kind: searched, weights: random": "models[2].weights: got it for 'searched'",
    "name: compression|name: memorization": "tasks[1].name: 'memorization' is given twice",
    "against: best component|against: nobody": "claims[0].against: got 'nobody'",
    "test: at_least|test: number": "claims[0].file: it is missing, the test 'number' needs it",
    "blocks: 2|blocks: 3": "shape.blocks: got 3, allowed is at most layers, 2",
    "test: at_least|test: at_least\n    share: 0.5": "claims[0].share: got it for the test 'at_least'",
    "    task: mad/compression|    also_tested: [{name: x}, {name: x}]\n    task: mad/compression": (
        "tasks[1].also_tested[1].name: 'x' is given twice"
    ),
    "workers: 1|workerz: 1": "workerz: there is no such field; did you mean 'workers'?",
}


@pytest.mark.parametrize("change, message", BAD.items(), ids=BAD)
def test_bad_experiments_name_the_field(change, message, tmp_path):
    before, after = change.split("|")
    text = SMOKE.read_text()
    assert before in text
    file = tmp_path / "bad.yaml"
    file.write_text(text.replace(before, after, 1))
    with pytest.raises(ValueError) as error:
        load_experiment(file)
    assert message in str(error.value) and "bad.yaml" in str(error.value)


COMPRESSION = SMOKE.read_text().partition("- name: compression\n    ")[2].partition("\nmodels:")[0]


@pytest.mark.parametrize(
    "before, after, message",
    [
        ("task: mad/compression", "task: mad/compresion", "tasks[1].task: got 'mad/compresion'"),
        ("vocab_size: 4,", "vocabulary: 4,", "tasks[1]: options.vocabulary: there is no such option"),
        ("vocab_size: 4,", "vocab_size: 1,", "tasks[1]: vocab_size: got 1"),
        *(
            (COMPRESSION, f"task: {task}", message)
            for task, message in {
                "mqar\n    options: {num_pairs: 40, sequence_length: 30}": "tasks[1]: sequence_length: got 30",
                "mqar\n    options: {longer: 2}": "tasks[1]: longer: got 2, allowed is a list",
                "mqar\n    also_tested: [{name: x, split: test_2x}]": (
                    "tasks[1].also_tested[0].split: got 'test_2x', allowed are train, validation, test."
                ),
                "listops\n    options: {rows: [5, 0, 3]}": "tasks[1]: rows (validation): got 0",
                "pathfinder\n    options: {dash: 0}": "tasks[1]: dash: got 0",
                "image\n    options: {folder: nowhere}": "tasks[1]: folder: got 'nowhere', allowed is a folder",
                "image": "tasks[1]: options.folder: it is missing, 'image' needs it.",
                "text-classification\n    options: {folder: ., validation: 1}": "tasks[1]: validation: got 1",
                "snippets-standin\n    options: {sequence_length: 0}": "tasks[1]: sequence_length: got 0",
                "text\n    options: {texts: [python], tokenizer: /nowhere}": "tasks[1]: tokenizer: got '/nowhere'",
            }.items()
        ),
    ],
)
def test_bad_tasks_name_the_field_before_anything_runs(before, after, message, tmp_path, capsys):
    file = tmp_path / "bad.yaml"
    assert before in SMOKE.read_text()
    file.write_text(SMOKE.read_text().replace(before, after))
    for words in ([], ["--dry_run"]):
        places = ["--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
        assert main(["experiment", str(file), *places, *words]) == 2
        assert f"{file}: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


def test_every_shipped_experiment_is_valid():
    files = sorted(EXPERIMENTS.glob("*.yaml"))
    assert {"e1_mad", "e8_long_recall", "smoke"} <= {file.stem for file in files}
    for file in files:
        experiment = load_experiment(file)
        assert experiment.name == file.stem and experiment.claims
        for model in experiment.models:
            assert any(model in chain.models for chain in chains_of(experiment))
    check_tasks(load_experiment(EXPERIMENTS / "e1_mad.yaml"))


def test_e1_is_what_the_issue_says():
    experiment = load_experiment(EXPERIMENTS / "e1_mad.yaml")
    training, shape = experiment.training, experiment.shape
    assert (shape.hidden_size, shape.layers, shape.blocks) == (64, 2, 2)
    assert (training.learning_rates, training.tuning_steps, training.steps) == ([5e-4, 2e-3, 5e-3], 500, 1500)
    assert (training.seeds, training.batch_size, training.stop_at) == ([0, 1, 2], 64, 0.995)
    lengths = [entry.options["sequence_length"] for entry in experiment.tasks]
    assert lengths == [64, 64, 64, 96, 32, 32] and {e.options["train_rows"] for e in experiment.tasks} == {3200}
    assert len(experiment.models) == 6 and sum(chain.count for chain in chains_of(experiment)) == 6 * 6 * 6


def test_rates_are_chosen_on_validation_of_the_first_seed_and_only_final_runs_are_tested(untrained, tmp_path):
    lines = run_experiment(smoke(tmp_path), cache=tmp_path / "cache", progress=False)
    assert len(lines) == len(untrained) == 2 * 4 * (2 + 2)
    for settings in untrained:
        assert settings["tested"] == (settings["steps"] == 4)
        if settings["tested"]:
            assert settings["learning_rate"] == 0.01
        else:
            assert settings["seed"] == 0 and settings["steps"] == 2
    discretized = [settings for settings in untrained if settings["model"]["kind"] == "discretized"]
    assert all(s["choice"] == [0, 1] and s["supernet"]["kind"] == "searched" for s in discretized)
    # One search a seed serves both rows: the searched model is trained once for each seed.
    searched = [s for s in untrained if s["model"]["kind"] == "searched" and s["tested"]]
    assert Counter(s["seed"] for s in searched) == {0: 2, 1: 2}


def test_best_of_looks_at_validation_alone_and_loss_breaks_ties():
    task = load_experiment(SMOKE).tasks[0]
    entries = [(0.9, 0.5), (0.9, 0.4), (0.8, 0.1), (0.9, None)]
    records = [{"validation": {"accuracy": a, "loss": loss}, "test": {"accuracy": 1 - a}} for a, loss in entries]
    assert best_of(records, task) == 1


def test_finished_runs_are_never_redone_and_settings_decide(untrained, tmp_path):
    experiment = smoke(tmp_path / "out")
    first = run_experiment(experiment, cache=tmp_path / "cache", progress=False)
    untrained.clear()
    assert run_experiment(experiment, cache=tmp_path / "cache", progress=False) == first and not untrained
    assert finished_runs(experiment, cache=tmp_path / "cache") == (32, 32)
    experiment.models[0].name = "another name in the table"
    run_experiment(experiment, cache=tmp_path / "cache", progress=False)
    assert not untrained
    experiment.training.batch_size = 4
    run_experiment(experiment, cache=tmp_path / "cache", progress=False)
    assert len(untrained) == 32


def test_a_grid_goes_on_where_only_its_lines_are_left(untrained, tmp_path):
    experiment = smoke(tmp_path / "out")
    whole = run_experiment(experiment, cache=tmp_path / "cache", progress=False)
    file = tmp_path / "out" / f"{experiment.name}.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["task"] == whole[0]["task"]]
    assert 0 < len(kept) < len(lines)
    file.write_text("".join(kept))
    untrained.clear()
    assert finished_runs(experiment, cache=tmp_path / "empty") == (len(kept), len(whole))
    assert run_experiment(experiment, cache=tmp_path / "empty", progress=False) == whole
    assert len(untrained) == len(whole) - len(kept)
    assert file.read_text() == "".join(lines)


def test_shards_together_are_the_whole(untrained, tmp_path):
    experiment = smoke(tmp_path / "parts")
    chains = chains_of(experiment)
    for count in (1, 2, 3, 7):
        parts = [shard_of(chains, index, count) for index in range(1, count + 1)]
        assert sorted(map(id, sum(parts, []))) == sorted(map(id, chains))
    for index in (1, 2, 3):
        run_experiment(experiment, shard=(index, 3), cache=tmp_path / str(index), progress=False)
    whole = run_experiment(smoke(tmp_path / "whole"), cache=tmp_path / "cache", progress=False)
    parts = read_lines(tmp_path / "parts", "smoke")
    assert {line["digest"] for line in parts} == {line["digest"] for line in whole} and len(parts) == len(whole)
    assert len(list((tmp_path / "parts").glob("smoke.shard-*-of-3.jsonl"))) == 3


def test_shard_of_a_job_array_and_of_a_launcher():
    assert shard_from("2/4", {}) == (2, 4)
    assert shard_from(None, {"RANK": "1", "WORLD_SIZE": "4"}) == (2, 4) and shard_from(None, {}) == (1, 1)
    assert shard_from(None, {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "3"}) == (1, 3)
    assert shard_from("2/4", {"RANK": "0", "WORLD_SIZE": "9"}) == (2, 4)
    for given in ("0/4", "5/4", "1", "a/b", "1/0"):
        with pytest.raises(ValueError, match="shard: got"):
            shard_from(given, {})


def test_runs_know_nothing_of_a_launcher(untrained, monkeypatch, tmp_path):
    seen = []

    def run(settings):
        seen.append({name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")})
        return fake_run(settings)

    monkeypatch.setattr("modeling_manticore.experiments.training.run", run)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("OMP_NUM_THREADS", "5")):
        monkeypatch.setenv(name, value)
    run_experiment(smoke(tmp_path), shard=(1, 8), cache=tmp_path / "cache", progress=False)
    assert seen and all(entry == {"RANK": None, "WORLD_SIZE": None, "OMP_NUM_THREADS": "1"} for entry in seen)
    assert (os.environ["RANK"], os.environ["OMP_NUM_THREADS"]) == ("1", "5")


def test_a_failed_run_ends_the_grid_with_its_name_and_keeps_the_others(monkeypatch, tmp_path):
    def run(settings):
        if settings["model"]["kind"] == "discretized":
            raise RuntimeError("out of luck")
        return fake_run(settings)

    monkeypatch.setattr("modeling_manticore.experiments.training.run", run)
    with pytest.raises(RunFailed, match="(?s)Manticore discretized, seed 0 failed.*out of luck"):
        run_experiment(smoke(tmp_path), cache=tmp_path / "cache", progress=False)
    assert finished_runs(smoke(tmp_path), cache=tmp_path / "cache")[0] > 0


def small(tmp_path: Path, models: str = "Transformer", seeds: str = "[0, 1]") -> Path:
    """A file with one task and some models."""
    text = SMOKE.read_text()
    head, tasks = text.split("tasks:\n")
    head = head.replace("[1e-3, 1e-2]", "[1e-2]").replace("seeds: [0, 1]", f"seeds: {seeds}")
    first = "  - name" + tasks.split("  - name")[1]
    rows = [line for line in tasks.split("models:\n")[1].split("claims:")[0].splitlines() if models in line]
    file = tmp_path / "smoke.yaml"
    file.write_text(head + "tasks:\n" + first + "models:\n" + "\n".join(rows) + "\n")
    return file


def test_a_killed_grid_leaves_nothing_half_written_and_is_continued(tmp_path):
    file, cache = small(tmp_path, seeds="[0, 1, 2, 3]"), tmp_path / "cache"
    command = ["experiment", str(file), "--cache", str(cache), "--output", str(tmp_path / "out")]
    started = subprocess.Popen(
        [sys.executable, "-c", CHILD, *command, "--workers", "2"],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 240
    while not list(cache.glob("*.json")) and time.monotonic() < deadline:
        assert started.poll() is None
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.wait()
    kept = {entry: entry.stat().st_mtime_ns for entry in cache.glob("*.json")}
    assert 1 <= len(kept) < 4
    assert all(json.loads(entry.read_text())["record"]["test"] for entry in kept)
    assert len(read_lines(tmp_path / "out", "smoke")) <= len(kept)
    assert main(command) == 0
    lines = read_lines(tmp_path / "out", "smoke")
    assert [line["seed"] for line in lines] == [0, 1, 2, 3]
    assert all(entry.stat().st_mtime_ns == then for entry, then in kept.items())


CHILD = "import sys; from modeling_manticore.commands import main; sys.exit(main(sys.argv[1:]))"


def test_a_task_may_have_a_budget_of_its_own_and_what_others_published_decides_no_run(untrained, tmp_path):
    plain = smoke(tmp_path / "plain")
    file = tmp_path / "own.yaml"
    own = "budget: {tuning_steps: 1, steps: 3, batch_size: 4, group_by_length: true}\n    "
    published = "published: {difference: another setting, accuracies: {S4: 59.6}}\n    "
    text = SMOKE.read_text()
    assert text.count("    options: {vocab_size: 4,") == 1
    file.write_text(text.replace("options: {vocab_size: 4,", own + published + "options: {vocab_size: 4,"))
    changed = load_experiment(file)
    changed.output = str(tmp_path / "own")
    run_experiment(plain, cache=tmp_path / "cache", progress=False)
    untrained.clear()
    run_experiment(changed, cache=tmp_path / "cache", progress=False)
    assert len(untrained) == 16 and {s["task"]["task"] for s in untrained} == {"mad/compression"}
    assert {s["steps"] for s in untrained} == {1, 3}
    assert all(s["training"]["batch_size"] == 4 and s["training"]["group_by_length"] for s in untrained)
    # Fields that came later are in no run that does not use them: those in caches still count.
    job = next(iter(chains_of(plain)[0].jobs()))[0]
    assert set(job.settings["task"]) == {"task", "options", "also_tested"}
    assert "group_by_length" not in job.settings["training"]


@pytest.mark.parametrize(
    "fields, message",
    [
        ("budget: {steps: 0}", "tasks[0].budget.steps: got 0"),
        ("budget: {seeds: [1]}", "tasks[0].budget.seeds: there is no such field"),
        ("published: {accuracies: {S4: 1.0}}", "tasks[0].published.difference: it is missing"),
        ("published: {difference: d, accuracies: {S4: 590}}", "tasks[0].published.accuracies.S4: got 590"),
        ("published: {difference: d, accuracies: {S4: high}}", "tasks[0].published.accuracies.S4: got 'high'"),
    ],
)
def test_bad_budgets_and_published_numbers_name_the_field(fields, message, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(SMOKE.read_text().replace("    options:", f"    {fields}\n    options:", 1))
    with pytest.raises(ValueError) as error:
        load_experiment(file)
    assert message in str(error.value)


def test_splits_beside_test_are_known_before_anything_runs():
    experiment = load_experiment(EXPERIMENTS / "e8_long_recall.yaml")
    check_tasks(experiment)
    assert [extra.split for extra in experiment.tasks[0].also_tested] == ["test_2x", "test_4x"]


def test_data_that_cannot_be_made_is_said_in_a_line(tmp_path):
    file = tmp_path / "bad.yaml"
    (tmp_path / "empty").mkdir()
    file.write_text(
        SMOKE.read_text().replace(COMPRESSION, f"task: image\n    options: {{folder: {tmp_path / 'empty'}}}")
    )
    with pytest.raises(RunFailed) as error:
        run_experiment(load_experiment(file), cache=tmp_path / "cache", progress=False)
    assert "the task 'image' cannot be made: folder: got" in str(error.value) and "Traceback" not in str(error.value)


def test_lines_of_another_grid_stay_in_the_file(untrained, tmp_path):
    experiment = smoke(tmp_path)
    run_experiment(experiment, cache=tmp_path / "cache", progress=False)
    before = read_lines(tmp_path, experiment.name)
    experiment.training.steps = 5
    own = run_experiment(experiment, cache=tmp_path / "cache", progress=False)
    kept = read_lines(tmp_path, experiment.name)
    assert len(own) < len(kept) and {line["digest"] for line in before} <= {line["digest"] for line in kept}
    run_experiment(experiment, cache=tmp_path / "cache", progress=False)
    assert read_lines(tmp_path, experiment.name) == kept


@pytest.mark.parametrize("field", ["output", "cache"])
def test_folders_that_cannot_be_written_to_are_found_out_first(field, untrained, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    places = {"output": tmp_path / "out", "cache": tmp_path / "cache"}
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        words = [f"--{name}={bad if name == field else place}" for name, place in places.items()]
        assert main(["experiment", str(SMOKE), *words]) == 2
        assert f"{field}: got" in capsys.readouterr().err and not untrained


def test_a_launcher_that_tells_no_numbers_is_refused():
    assert shard_from(None, {"RANK": "1", "WORLD_SIZE": "4"}) == (2, 4)
    for rank in ("x", "4", "-1"):
        with pytest.raises(ValueError, match="RANK, WORLD_SIZE: got"):
            shard_from(None, {"RANK": rank, "WORLD_SIZE": "4"})
