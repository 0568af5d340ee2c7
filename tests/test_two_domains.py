"""
`benchmarks/two_domains.py` and `three_components.py` in tiny sizes: all kinds of units, going on from the results file
alone, and that the tables are computed from the units.
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import _domain_plan  # noqa: E402
import _domain_run  # noqa: E402
import three_components  # noqa: E402
import two_domains  # noqa: E402
from _domain_report import CHOSEN, Report, described  # noqa: E402
from _domain_units import half_of, work  # noqa: E402

from modeling_manticore.experiments.units import Ledger, run_units  # noqa: E402


PAIR = "gpt_neox prose, mamba2 code"
SEEDS = [0, 1]
TINY = _domain_run.SMOKE | {"layers": 2, "extra_tokens": 1408, "extra_rows": 4, "scored_rows": 2, "state_size": 8}
TINY |= {"component_tokens": {"gpt_neox": 256, "mamba2": 256}, "test_documents": 3}


def plan_of(**changes):
    setting = replace(two_domains.SETTING, **TINY)
    return _domain_plan.Plan(setting, {PAIR: two_domains.PAIRS[PAIR]}, SEEDS, from_scratch_seeds=1, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished plan with its ledger, and the units in the order in which they ran."""
    folder = tmp_path_factory.mktemp("domains")
    plan, ledger, order = plan_of(), Ledger(folder / "cache", folder / "units.jsonl"), []
    assert run_units(plan, work, ledger, tell=lambda unit, record: order.append(unit)) is True
    return plan, ledger, order


def test_all_kinds_of_units_run_once(finished):
    plan, ledger, order = finished
    assert len({unit.digest for unit in order}) == len(order) == len({unit.digest for unit in plan(ledger)})
    counts = {kind: sum(unit.kind == kind for unit in order) for kind in {unit.kind for unit in order}}
    # Two seeds; two rates on the first and the better one on the second, so three trainings of a row.
    expected = {"texts": 1, "component": 4 + 2, "search": 2, "continued": 6, "hybrid": 6, "dropped": 6, "mixture": 6}
    assert counts == expected | {"ensemble": 4}
    estimated = plan.estimate(ledger)
    assert sum(row[0] for row in estimated.values()) == sum(row[1] for row in estimated.values()) == len(order)
    assert sum(row[2] for row in estimated.values()) == 0.0


def test_the_estimate_of_an_empty_ledger_counts_what_will_run(finished, tmp_path):
    plan, _, order = finished
    empty = Ledger(tmp_path / "cache", tmp_path / "units.jsonl")
    rows = plan.estimate(empty)
    assert sum(row[0] for row in rows.values()) == len(order)
    assert sum(row[1] for row in rows.values()) == 0 and all(row[2] > 0 for row in rows.values())
    assert not (tmp_path / "units.jsonl").exists()


def test_it_goes_on_from_the_lines_alone_and_repeats_to_the_bit(finished, tmp_path):
    plan, ledger, _ = finished
    lost = plan.final(ledger, PAIR, plan.models(PAIR)[2], seed=1)
    lines = [line for line in ledger.lines.read_text().splitlines() if json.loads(line)["digest"] != lost.digest]
    (tmp_path / "units.jsonl").write_text("".join(line + "\n" for line in lines))
    elsewhere, again = Ledger(tmp_path / "cache", tmp_path / "units.jsonl"), []
    assert run_units(plan, work, elsewhere, tell=lambda unit, record: again.append(unit)) is True
    # The weights that the lost unit needs were gone, so their units ran again; the others did not.
    assert [unit.kind for unit in again] == ["texts", "component", "component", "hybrid"]
    assert again[-1].digest == lost.digest
    for key in ("nats", "search", "tokens", "parameters"):
        assert elsewhere.get(lost)[key] == ledger.get(lost)[key]
    assert Report(plan, elsewhere).results() == Report(plan, ledger).results()


def test_budgets_are_equal_with_all_that_the_search_took(finished):
    plan, ledger, _ = finished
    extra, step = plan.setting.extra_tokens, plan.setting.extra_rows * plan.setting.length
    for seed in SEEDS:
        search = ledger.get(plan.search(PAIR, seed))
        assert search["tried"] == 4 and sorted(c["choice"] for c in search["candidates"]) == [[0, 1], [1, 0]]
        assert all(c["tuned"] is not None for c in search["candidates"])
        assert search["choice"] == min(search["candidates"], key=lambda c: c["tuned"])["choice"]
        for model in plan.models(PAIR):
            record = ledger.get(plan.final(ledger, PAIR, model, seed))
            spent = record["tokens"] + record.get("calibration_tokens", 0)
            spent += sum(search["spent"].values()) if model.searched else 0
            if model.kind == "mixture":
                spent += plan.setting.calibration_rows * plan.setting.length
            assert extra - step < spent <= extra, model.name


def test_sizes_are_those_that_the_issue_asks_for():
    sizes = [_domain_plan.count_of(family, three_components.SETTING) for family in ("gpt_neox", "mamba2", "llama")]
    assert max(sizes) / min(sizes) < 1.03
    assert two_domains.SETTING.domains == {"prose": ["bible", "shakespeare"], "code": ["python"]}
    roles = {component for pair in two_domains.PAIRS.values() for component in pair}
    assert roles == {(family, domain) for family in ("gpt_neox", "mamba2") for domain in ("prose", "code")}


def test_the_rate_is_the_best_on_search_rows_of_the_first_seed(finished):
    plan, ledger, _ = finished
    for model in plan.models(PAIR):
        losses = {
            rate: ledger.get(plan.trained(ledger, PAIR, model, rate, 0))["search"] for rate in plan.setting.rates
        }
        assert plan.rate(ledger, PAIR, model) == min(losses, key=losses.get)
        assert plan.final(ledger, PAIR, model, 1).settings["rate"] == min(losses, key=losses.get)


def test_differences_recomputed_from_the_lines(finished):
    stats = pytest.importorskip("scipy.stats")
    plan, ledger, _ = finished
    lines = [json.loads(line) for line in ledger.lines.read_text().splitlines()]
    sizes = next(line["record"]["test_bytes"] for line in lines if line["kind"] == "texts")

    def bits(record):
        return np.mean([sum(record["nats"][d]) / sum(sizes[d]) / math.log(2) for d in ("prose", "code")])

    found = []
    for seed in SEEDS:
        own = [line for line in lines if line["settings"].get("seed") == seed]
        choice = next(line["record"]["choice"] for line in own if line["kind"] == "search")
        hybrid = plan.rate(ledger, PAIR, next(m for m in plan.models(PAIR) if m.settings.get("choice") == choice))
        chosen = [
            line["record"]
            for line in own
            if (line["kind"], line["settings"].get("choice"), line["settings"].get("rate"))
            == ("hybrid", choice, hybrid)
        ]
        rates = {m.components[0][0]: plan.rate(ledger, PAIR, m) for m in plan.models(PAIR) if m.kind == "continued"}
        rivals = [
            line["record"]
            for line in own
            if line["kind"] == "continued" and line["settings"]["rate"] == rates[line["label"].split()[-1]]
        ]
        assert len(chosen) == 1 and len(rivals) == 2
        found.append(bits(chosen[0]) - bits(min(rivals, key=lambda record: record["search"])))
    row = Report(plan, ledger).results()["difference"][PAIR][CHOSEN]["mixture"]["bits_per_byte"]
    assert row["values"] == pytest.approx(found) and row["mean"] == pytest.approx(np.mean(found))
    low, high = stats.t.interval(0.95, 1, np.mean(found), stats.sem(found))
    assert (row["low"], row["high"]) == pytest.approx((low, high))
    everything = Report(plan, ledger).results()["difference"]["all pairs"][CHOSEN]["mixture"]["bits_per_byte"]
    assert everything["values"] == pytest.approx(found)  # the mean over one pair


def test_the_rival_in_a_domain_is_the_component_of_that_domain(finished):
    plan, ledger, _ = finished
    report = Report(plan, ledger)
    for seed, records in report.runs[PAIR].items():
        for domain in ("prose", "code"):
            (rival,) = [name for name in records if f"({domain}) continued" in name]
            expected = report.value(records[CHOSEN], domain, "nats") - report.value(records[rival], domain, "nats")
            assert report.differences(CHOSEN, domain, "nats", PAIR)[seed] == pytest.approx(expected)


@pytest.mark.parametrize("words", [["--workers", "0"], ["--seeds", "0"], ["--minutes", "-1"]])
def test_numbers_that_must_be_positive_are(words, capsys):
    with pytest.raises(SystemExit) as error:
        two_domains.main([*words, "--dry_run"])
    assert error.value.code == 2 and f"{words[0][2:]}: got {words[1]}" in capsys.readouterr().err.replace(".0", "")


def test_a_broken_file_of_lines_ends_in_a_line(tmp_path):
    (tmp_path / "two_domains_smoke.jsonl").write_text("{}\n")
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    with pytest.raises(SystemExit, match="two_domains_smoke.jsonl: line 1 is no finished unit"):
        two_domains.main(["--smoke", "--dry_run", *places])


def test_the_bootstrap_is_around_the_difference_and_p_needs_six_seeds(finished):
    plan, ledger, _ = finished
    report = Report(plan, ledger)
    for seed, found in zip(SEEDS, report.results()["bootstrap_over_documents"][PAIR]):
        difference = report.differences(CHOSEN, "mixture", "bits_per_byte", PAIR)[seed]
        assert found["seed"] == seed and found["low"] <= difference <= found["high"]
    assert "sign_flip_p" not in described([1.0, 2.0]) and described([1.0] * 6)["sign_flip_p"] == 2 / 64
    assert described([1.0])["half_width"] is None


def test_seeds_that_are_not_finished_are_left_out(finished, tmp_path):
    plan, ledger, _ = finished
    kept = [line for line in ledger.lines.read_text().splitlines() if json.loads(line)["settings"].get("seed") != 1]
    (tmp_path / "units.jsonl").write_text("".join(line + "\n" for line in kept))
    report = Report(plan, Ledger(tmp_path / "cache", tmp_path / "units.jsonl"))
    assert report.seeds == [0] and report.results()["seeds"] == 1 and "1 of 2 seeds" in str(report)
    assert Report(plan, Ledger(tmp_path / "none", tmp_path / "none.jsonl")).results() == {"seeds": 0}


def test_half_of_a_model_keeps_its_first_or_last_layers():
    from transformers import AutoConfig, AutoModelForCausalLM

    setting = replace(two_domains.SETTING, **TINY | {"layers": 5})
    for family in ("gpt_neox", "mamba2"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**_domain_plan.config_of(family, setting)))
        own = model.state_dict()
        for kept, first, count in (("lower", 0, 2), ("upper", 2, 3)):
            half = half_of(model, kept)
            assert half.config.num_hidden_layers == count
            for name, tensor in half.state_dict().items():
                parts = name.split(".")
                if "layers" in parts:
                    place = parts.index("layers") + 1
                    parts[place] = str(int(parts[place]) + first)
                assert tensor.equal(own[".".join(parts)])


@pytest.mark.parametrize("script", [two_domains, three_components])
def test_a_dry_run_prints_the_plan_and_does_nothing(script, tmp_path, capsys):
    assert (
        script.main(["--dry_run", "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]) is False
    )
    shown = capsys.readouterr().out
    assert "hours of processor time left" in shown and "component mamba2" in shown
    assert not list((tmp_path / "work").iterdir()) and not (tmp_path / "results").exists()
