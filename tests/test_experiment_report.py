"""Intervals against references, verdicts that follow the data, and the report."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from modeling_manticore.commands import main
from modeling_manticore.experiments.claims import judge
from modeling_manticore.experiments.intervals import interval, paired, sign_flip_p, t_quantile
from modeling_manticore.experiments.jobs import chains_of, shared_settings
from modeling_manticore.experiments.records import write_lines
from modeling_manticore.experiments.report import section, write_report
from modeling_manticore.experiments.results import Results
from modeling_manticore.experiments.schema import BEST, Budget, Claim, Published, load_experiment
from modeling_manticore.experiments.tables import cost_table, difference_table, measured_table


SMOKE = Path(__file__).parents[1] / "benchmarks" / "experiments" / "smoke.yaml"
SEEDS = list(range(6))
GOOD = {"Transformer": 0.7, "Mamba-2": 0.8, "Manticore searched": 0.9, "Manticore discretized": 0.9}
FREE = np.random.default_rng(0).normal(0, 0.01, (4, 6))


def experiment_in(folder: Path, seeds: list[int] = SEEDS):
    experiment = load_experiment(SMOKE)
    experiment.output, experiment.training.seeds = str(folder), seeds
    return experiment


def lines_of(experiment, accuracies: dict[str, dict[str, float]], validation: dict | None = None) -> list[dict]:
    """Final runs with these accuracies, task by model, and noise of the seed."""
    lines = []
    for task in experiment.tasks:
        for m, model in enumerate(experiment.models):
            for s, seed in enumerate(experiment.training.seeds):
                accuracy = accuracies[task.name][model.name] + float(FREE[m, s % 6])
                seen = accuracy if validation is None else validation[model.name]
                lines.append(
                    {
                        **{"model": model.name, "task": task.name, "phase": "final", "seed": seed, "steps": 4},
                        **{"digest": f"{task.name}{model.name}{seed}", "learning_rate": 1e-2, "baseline": 0.25},
                        **{"validation": {"accuracy": seen, "loss": 1 - seen}, "also_tested": {}},
                        **{"test": {"accuracy": accuracy, "loss": 1 - accuracy}, "parameters": 1000, "tokens": 640},
                        "also_baseline": {},
                        **{"cache_bytes_per_token": {"Mamba-2": 0, "Manticore discretized": 256}.get(model.name, 512)},
                        **{
                            "flops_per_token": 2000,
                            "cpu_seconds": 36.0,
                            "git_commit": None,
                            "versions": {"torch": "2"},
                        },
                        "settings": shared_settings(experiment, task, model),
                        "choice": [0, 1] if model.kind == "searched" else None,
                    }
                )
    return json.loads(json.dumps(lines))


def judged(experiment, accuracies, **claim):
    fields = {"paper": "a claim", "test": "at_least", "model": "Manticore discretized", "against": BEST} | claim
    return judge(Claim(**fields), Results(experiment, lines_of(experiment, accuracies)))


def test_t_quantiles_and_intervals_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 4, 5, 9, 30, 101):
        for level in (0.5, 0.95, 0.999):
            assert t_quantile(freedom, level) == pytest.approx(stats.t.ppf(0.5 + level / 2, freedom), rel=1e-9)
    values = [0.3, 0.5, 0.1, 0.8]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    found = interval(values)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_the_paired_interval_contains_what_the_paired_t_test_does_not_reject():
    stats = pytest.importorskip("scipy.stats")
    first, second = [0.9, 0.8, 0.85, 0.7], [0.7, 0.75, 0.8, 0.72]
    found = paired(first, second)
    reference = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high))
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired([1.0, 2.0], [1.0])
    assert interval([1.0]).half_width is None


def test_sign_flips_against_every_pattern_written_out():
    differences = [0.3, -0.1, 0.2, 0.4, 0.05, 0.1, -0.2]
    patterns = np.array(list(itertools.product([-1, 1], repeat=7)))
    means = np.abs((patterns * differences).mean(axis=1))
    assert sign_flip_p(differences) == pytest.approx(np.mean(means >= abs(np.mean(differences)) - 1e-12))
    assert sign_flip_p([1.0] * 6) == 2 / 64
    assert sign_flip_p([1.0] * 5) is None


@pytest.mark.parametrize("test", ["at_least", "better"])
def test_a_verdict_flips_with_the_data(test, tmp_path):
    experiment = experiment_in(tmp_path)
    good = {"memorization": GOOD, "compression": GOOD}
    assert judged(experiment, good, test=test).holds is True
    worse = good | {"compression": GOOD | {"Manticore discretized": 0.6}}
    verdict = judged(experiment, worse, test=test)
    assert verdict.holds is False and verdict.measured.startswith("1 of 2") and verdict.word == "no"
    assert judged(experiment, worse, test=test, tasks=1).holds is True
    equal = {name: GOOD | {"Manticore discretized": 0.8} for name in good}
    assert judged(experiment, equal, test=test).holds is (test == "at_least")


def test_tasks_that_nobody_learned_are_left_out_and_said(tmp_path):
    experiment = experiment_in(tmp_path)
    chance = dict.fromkeys(GOOD, 0.25)
    verdict = judged(experiment, {"memorization": GOOD, "compression": chance})
    assert verdict.holds is True and "1 of 1" in verdict.measured
    assert "neither of the two learned it: compression" in verdict.measured
    assert judged(experiment, {"memorization": chance, "compression": chance}).holds is None
    # A hybrid at chance is not excused by its wide interval where a component learned the task.
    wide = {"memorization": GOOD, "compression": chance | {"Mamba-2": 0.31}}
    assert judged(experiment, wide).holds is False
    # Two models at chance are not compared because a third one learned the task.
    verdict = judged(experiment, wide, against="Transformer")
    assert verdict.holds is True and "1 of 1" in verdict.measured and "compression +" not in verdict.measured


def test_missing_runs_and_one_seed_decide_nothing(tmp_path):
    experiment = experiment_in(tmp_path)
    claim = Claim("a claim", "at_least", "Manticore discretized", BEST)
    lines = lines_of(experiment, {"memorization": GOOD, "compression": GOOD})
    assert judge(claim, Results(experiment, lines[:-1])).holds is None
    assert judge(claim, Results(experiment, [])).measured == "not run"
    single = experiment_in(tmp_path, [0])
    assert judged(single, {"memorization": GOOD, "compression": GOOD}).holds is None


def test_the_best_component_is_chosen_on_validation_rows(tmp_path):
    experiment = experiment_in(tmp_path)
    seen = {"Transformer": 0.9, "Mamba-2": 0.1, "Manticore searched": 0.5, "Manticore discretized": 0.5}
    lines = lines_of(experiment, {"memorization": GOOD, "compression": GOOD}, seen)
    results = Results(experiment, lines)
    assert [results.best_component(column) for column in results.columns] == ["Transformer", "Transformer"]


def test_cache_claims_need_the_accuracy_and_the_bytes(tmp_path):
    experiment = experiment_in(tmp_path)
    good = {"memorization": GOOD, "compression": GOOD}
    assert judged(experiment, good, test="cache", share=0.5).holds is True
    assert judged(experiment, good, test="cache", share=0.4).holds is False
    bad = {name: GOOD | {"Manticore discretized": 0.5} for name in good}
    assert judged(experiment, bad, test="cache", share=0.5).holds is False


def test_number_claims_read_a_json_file(tmp_path):
    experiment = experiment_in(tmp_path)
    claim = {"test": "number", "file": "other.json", "path": "table/0/mean", "at_most": 0.02}
    assert judged(experiment, {"memorization": GOOD, "compression": GOOD}, **claim).measured == "not run"
    for value, holds in ((0.01, True), (0.03, False)):
        (tmp_path / "other.json").write_text(json.dumps({"table": [{"mean": value}]}))
        assert judged(experiment, {"memorization": GOOD, "compression": GOOD}, **claim).holds is holds
        assert judged(experiment, {"memorization": GOOD, "compression": GOOD}, **claim).measured.startswith(
            f"{value} ("
        )
    row = {"mean": -0.2, "half_width": 0.15, "low": -0.35, "high": -0.05}
    (tmp_path / "other.json").write_text(json.dumps({"table": [row]}))
    for key, holds, shown in (
        ("mean", True, "-0.2 ± 0.15 (needed: at most -0.04)"),
        ("high", True, "-0.2 ± 0.15, upper end -0.05 (needed: at most -0.04)"),
        ("low", True, "-0.2 ± 0.15, lower end -0.35 (needed: at most -0.04)"),
        ("half_width", False, "0.15 (needed: at most -0.04)"),
    ):
        verdict = judged(
            experiment,
            {"memorization": GOOD, "compression": GOOD},
            **claim | {"path": f"table/0/{key}", "at_most": -0.04},
        )
        assert (verdict.holds, verdict.measured) == (holds, shown)
    with pytest.raises(ValueError, match="there is no 'table/7/mean'"):
        judged(experiment, {"memorization": GOOD, "compression": GOOD}, **claim | {"path": "table/7/mean"})


def test_tables_have_means_intervals_and_p(tmp_path):
    experiment = experiment_in(tmp_path)
    results = Results(
        experiment, lines_of(experiment, {"memorization": GOOD, "compression": dict.fromkeys(GOOD, 0.25)})
    )
    measured = measured_table(results).splitlines()
    expected = interval([0.8 + noise for noise in FREE[1]])
    assert f"| Mamba-2 | {100 * expected.mean:.1f} ± {100 * expected.half_width:.1f} |" in measured[3]
    assert measured[3].endswith("not learned |") and measured[-1] == "| *guess by frequency* | 25.0 | 25.0 |"
    differences = difference_table(results).splitlines()
    assert differences[2].startswith("| *best component* | Mamba-2 | ")
    assert "p = 0.031" in differences[-1] and differences[-1].endswith("| - |")


def test_the_report_is_made_of_files_and_follows_them(tmp_path, capsys):
    folder = tmp_path / "benchmarks" / "experiments"
    folder.mkdir(parents=True)
    file = folder / "smoke.yaml"
    file.write_text(SMOKE.read_text())
    experiment = load_experiment(file)
    output = tmp_path / "RESULTS.md"
    assert main(["report", str(file), "--output_file", str(output)]) == 0
    assert "Not run yet: `make bench NAME=smoke`" in output.read_text()
    verdicts = []
    for accuracy in (0.9, 0.5):
        scores = {name: GOOD | {"Manticore discretized": accuracy} for name in ("memorization", "compression")}
        results = Path(experiment.output)
        write_lines(results / "smoke.jsonl", lines_of(experiment, scores))
        assert main(["report", str(file), "--output_file", str(output)]) == 0
        text = output.read_text()
        (row,) = [line for line in text.splitlines() if line.startswith("| smoke |")]
        verdicts.append(row.split("|")[-2].strip())
        assert "benchmarks/results/smoke.svg" in text and (folder.parent / "results" / "smoke.svg").is_file()
        assert "| Manticore searched | 01 x2 | 01 x2 |" in text
    assert verdicts == ["yes", "no"]
    first = (folder.parent / "results" / "smoke.svg").read_bytes()
    write_report([load_experiment(file)], output)
    assert (folder.parent / "results" / "smoke.svg").read_bytes() == first


def test_broken_runs_are_named(tmp_path):
    experiment = experiment_in(tmp_path)
    (tmp_path / "smoke.jsonl").write_text('{"digest": 1}\n')
    with pytest.raises(ValueError, match="smoke.jsonl: line 1 is no run"):
        Results(experiment)


def test_published_numbers_stand_in_the_table_with_what_differs(tmp_path):
    experiment = experiment_in(tmp_path)
    experiment.tasks[0].published = Published("far more rows", {"S4": 59.6})
    experiment.tasks[1].published = Published("larger models", {"Transformer (LRA paper)": 36.37, "S4": 86.8})
    experiment.tasks[1].budget = Budget(steps=4, batch_size=8)
    results = Results(experiment, lines_of(experiment, dict.fromkeys(["memorization", "compression"], GOOD)))
    assert not results.outdated
    text = measured_table(results)
    assert "| *published: S4* | 59.6 | 86.8 |" in text
    assert "| *published: Transformer (LRA paper)* | - | 36.37 |" in text
    assert "| *the published setting* | far more rows | larger models |" in text
    assert "On compression: steps 4, batch size 8." in section(results, None)
    experiment.tasks[1].budget = Budget(steps=3)
    assert Results(experiment, results.lines).outdated == len(results.lines) / 2


def test_an_experiment_that_is_only_begun_says_so_and_judges_nothing(tmp_path):
    experiment = experiment_in(tmp_path)
    lines = []
    for job in next(chains_of(experiment)[0].jobs()):
        names = {"model": job.model, "task": job.task, "phase": job.phase, "digest": job.digest}
        told = {key: job.settings[key] for key in ("learning_rate", "seed", "steps")}
        measured = {"validation": {"accuracy": 0.1, "loss": 3.0}, "baseline": 0.2, "cpu_seconds": 1.0}
        measured |= {"versions": {}, "git_commit": None}
        lines.append(names | told | measured | {"settings": job.settings})
    write_lines(tmp_path / f"{experiment.name}.jsonl", lines)
    written = write_report([experiment], tmp_path / "RESULTS.md")
    assert f"Begun, {len(lines)} runs that compare learning rates; nothing is tested yet." in written
    assert "Learned by nobody" not in written and "unfinished" in written
    assert not list(tmp_path.glob("*.svg"))


def test_runs_of_a_changed_model_are_left_out_and_shards_do_not_bring_them_back(tmp_path):
    experiment = experiment_in(tmp_path)
    scores = dict.fromkeys(["memorization", "compression"], GOOD)
    old = lines_of(experiment, {name: GOOD | {"Transformer": 0.1} for name in scores})
    for line in old:
        line["digest"] += "old"
    write_lines(tmp_path / "smoke.shard-1-of-1.jsonl", old)
    experiment.models[0].family = "llama"
    results = Results(experiment)
    assert results.outdated == 2 * len(SEEDS) and not results.runs("memorization", "Transformer")
    write_lines(tmp_path / "smoke.jsonl", lines_of(experiment, scores))
    results = Results(experiment)
    found = results.interval(results.columns[0], "Transformer").mean
    assert found == pytest.approx(0.7 + FREE[0].mean())
    # What a search was in does not decide for others, but for what is made of it.
    experiment.models[2].gate = "mixture"
    assert {line["model"] for line in Results(experiment).lines} == {"Transformer", "Mamba-2"}


def test_of_several_final_runs_the_chosen_learning_rate_counts(tmp_path):
    experiment = experiment_in(tmp_path)
    lines = lines_of(experiment, dict.fromkeys(["memorization", "compression"], GOOD))
    other = [line | {"learning_rate": 1e-3, "digest": line["digest"] + "other"} for line in lines]
    for line in other:
        line["test"] = {"accuracy": 0.0, "loss": 9.0}
    compared = [
        line
        | {"phase": "tuning", "digest": f"{line['digest']}{rate}", "learning_rate": rate, "steps": 2}
        | {"validation": {"accuracy": accuracy, "loss": 1.0}}
        for line in lines
        if line["seed"] == 0
        for rate, accuracy in ((1e-3, 0.1), (1e-2, 0.2))
    ]
    results = Results(experiment, other + lines + compared)
    assert results.chosen_rate("memorization", "Mamba-2") == 1e-2
    assert results.rates("memorization", "Mamba-2") == [1e-2]
    assert results.interval(results.columns[0], "Mamba-2").mean == pytest.approx(0.8 + FREE[1].mean())
    # None of the two is above the baseline, 0.25.
    assert "0.01*†, 0.01*†" in cost_table(results)
    assert "†" not in cost_table(Results(experiment, lines))


def test_a_mean_on_the_wrong_side_is_not_refuted_at_best(tmp_path):
    experiment = experiment_in(tmp_path)
    close = dict.fromkeys(["memorization", "compression"], GOOD | {"Manticore discretized": 0.795})
    verdict = judged(experiment, close)
    assert (verdict.holds, verdict.word) == (True, "not refuted")
    assert "mean difference at least 0: 0" in verdict.measured
    ahead = dict.fromkeys(["memorization", "compression"], GOOD)
    assert judged(experiment, ahead).word == "yes"


def test_a_bound_inside_an_interval_is_not_decided(tmp_path):
    experiment = experiment_in(tmp_path)
    scores = dict.fromkeys(["memorization", "compression"], GOOD)
    claim = {"test": "number", "file": "other.json", "path": "mean"}
    for mean, half, holds in ((0.1, 0.2, None), (-0.1, 0.2, None), (-0.1, 0.05, True), (0.1, 0.05, False)):
        (tmp_path / "other.json").write_text(json.dumps({"mean": mean, "half_width": half}))
        assert judged(experiment, scores, **claim, at_most=0).holds is holds
        opposite = {None: None, True: False, False: True}[holds]
        assert judged(experiment, scores, **claim, at_least=0).holds is opposite
    (tmp_path / "other.json").write_text('{"mean": NaN, "half_width": 0.1}')
    with pytest.raises(ValueError, match="'mean' is nan, allowed is a number"):
        judged(experiment, scores, **claim, at_most=0)


def test_hybrids_of_one_component_alone_are_said(tmp_path):
    experiment = experiment_in(tmp_path)
    lines = lines_of(experiment, dict.fromkeys(["memorization", "compression"], GOOD))
    for line in lines:
        if line["model"] == "Manticore discretized":
            line["choice"] = [1, 1] if line["task"] == "compression" else [0, 1]
    claim = Claim("a claim", "at_least", "Manticore discretized", BEST)
    assert judge(claim, Results(experiment, lines)).measured.endswith("in 6 of 12 runs one component alone was chosen")


def test_two_experiments_of_one_name_are_refused(tmp_path):
    experiment = experiment_in(tmp_path)
    with pytest.raises(ValueError, match="experiments: got 'smoke' twice, allowed is one file of a name"):
        write_report([experiment, experiment], tmp_path / "RESULTS.md")
    assert not (tmp_path / "RESULTS.md").exists()
