"""Training-free search: every score is that of the hybrid that `discretize` makes; beam, budget, halving, sweep."""

import json

import pytest
import torch
from tiny import component, tokens

from modeling_manticore import Budget, HalvingOptions, ManticoreForCausalLM, cost_table, discretize, stitch, sweep
from modeling_manticore.search import halving as halving_module
from modeling_manticore.search.slices import held_out_loss
from modeling_manticore.search.sweep import simplex_grid


CALIBRATION, SCORED = tokens(32, 12, seed=3), tokens(8, 12, seed=4)


def path(k, start, stop):
    return {"component": k, "start": start, "stop": stop}


def compose(*families, **options):
    return ManticoreForCausalLM.from_components([component(f, i) for i, f in enumerate(families)], **options)


SUPERNETS = {
    "two": (("gpt_neox", "mamba2"), {"num_blocks": 3}),
    "mixture_gate": (("llama", "mamba"), {"num_blocks": 2, "gate": "mixture", "project_ends": False}),
    "positions_and_cap": (("gpt2", "gemma2"), {"num_blocks": 2}),
    "projected": (("opt_projected", "falcon_mamba"), {"num_blocks": 2}),
    "uneven": (
        ("gpt_neox", "mamba2"),
        {
            "blocks": [
                [path(0, 0, 2), path(1, 0, 1), path(0, 1, 3)],
                [path(0, 2, 3), path(1, 1, 3), path(0, 2, 4)],
                [path(0, 3, 4), path(1, 1, 2), path(0, 0, 1), path(1, 0, 3)],
            ]
        },
    ),
}


@pytest.mark.parametrize("order", ["parallel", "sequential"])
@pytest.mark.parametrize("families, options", SUPERNETS.values(), ids=SUPERNETS)
def test_every_score_is_the_loss_of_the_discretized_hybrid(families, options, order):
    model = compose(*families, **options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = stitch(model, CALIBRATION, SCORED, order=order, progress=False)
    assert report.method == "exhaustive"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    choices = [c.choice for c in report.candidates]
    assert len({tuple(c) for c in choices}) == len(choices) == torch.tensor(cost_table(model).paths).prod()
    assert [c.loss for c in report.candidates] == sorted(c.loss for c in report.candidates)
    for candidate in report.candidates:
        hybrid = discretize(model, candidate.choice, calibration=CALIBRATION, order=order, progress=False)
        with torch.no_grad():
            own = hybrid(SCORED, labels=SCORED).loss.item()
        assert candidate.loss == pytest.approx(own, abs=1e-5)
        assert candidate.parameters == sum(p.numel() for p in hybrid.parameters())
        assert f"cache {candidate.cache_bytes_per_token:,} bytes per token" in hybrid.describe()


def test_padding_and_bfloat16():
    model = compose("gpt_neox", "mamba2", num_blocks=2)
    rows = [row[:length] for row, length in zip(SCORED, [12, 7, 9, 12] * 2)]
    report = stitch(model, CALIBRATION, rows, batch_size=4, progress=False)
    for candidate in report.candidates:
        hybrid = discretize(
            model, candidate.choice, calibration=CALIBRATION, order="parallel", progress=False, batch_size=4
        )
        with torch.no_grad():
            losses = [hybrid(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows]
        assert candidate.loss == pytest.approx(float(sum(losses)) / sum(len(row) - 1 for row in rows), abs=1e-5)
    half = compose("gpt_neox", "mamba2", num_blocks=2, dtype="bfloat16")
    for candidate in stitch(half, CALIBRATION, SCORED, progress=False).candidates:
        hybrid = discretize(half, candidate.choice, calibration=CALIBRATION, order="parallel", progress=False)
        from modeling_manticore.building.texts import batches_of

        assert candidate.loss == pytest.approx(held_out_loss(hybrid, batches_of(SCORED, half)), abs=1e-5)


def test_a_supernet_whose_heads_are_of_the_first_block():
    blocks = [[path(0, 0, 2), path(0, 0, 1)], [path(0, 2, 4), path(1, 1, 3)]]
    model = compose("gpt_neox", "mamba2", blocks=blocks, head_mixture="first")
    report = stitch(model, CALIBRATION, SCORED, progress=False)
    assert {tuple(c.choice) for c in report.candidates} == {(0, 0), (1, 0)}


def test_slices_are_shared(monkeypatch):
    model = compose("gpt_neox", "mamba2", num_blocks=3)
    from modeling_manticore.search import slices

    calls = []
    run = slices.run_view
    monkeypatch.setattr(slices, "run_view", lambda view, **given: calls.append(view) or run(view, **given))
    report = stitch(model, CALIBRATION, SCORED, batch_size=4, progress=False)
    assert len(report.candidates) == 8
    assert len(calls) == 2 * (2 + 2 + 4 + 8)  # two batches; stems, and the nodes of a tree of depth three


def test_beam_finds_what_exhaustive_search_finds():
    model = compose("gpt_neox", "mamba2", num_blocks=3)
    everything = stitch(model, CALIBRATION, SCORED, progress=False)
    wide = stitch(model, CALIBRATION, SCORED, limit=7, beam=8, progress=False)
    assert wide.method == "beam" and len(wide.candidates) == 8
    for a, b in zip(everything.candidates, wide.candidates):
        assert a.choice == b.choice and a.loss == pytest.approx(b.loss, abs=1e-6)
    narrow = stitch(model, CALIBRATION, SCORED, limit=1, beam=1, progress=False)
    losses = {tuple(c.choice): c.loss for c in everything.candidates}
    assert len(narrow.candidates) <= 8
    for candidate in narrow.candidates:
        assert candidate.loss == pytest.approx(losses[tuple(candidate.choice)], abs=1e-6)
    assert {(0, 0, 0), (1, 1, 1)} <= {tuple(c.choice) for c in narrow.candidates}  # the plain finishes


@pytest.mark.parametrize("limit", [256, 1])
def test_nothing_outside_a_budget_is_scored(limit):
    model = compose("gpt_neox", "mamba2", num_blocks=3)
    budget = Budget(
        max_attention_blocks=1,
        max_parameters=stitch(model, CALIBRATION, SCORED, progress=False).best.parameters + 40_000,
    )
    report = stitch(model, CALIBRATION, SCORED, budget=budget, limit=limit, beam=2, progress=False)
    assert report.candidates
    for candidate in report.candidates:
        assert candidate.attention_blocks <= 1 and candidate.parameters <= budget.max_parameters
    with pytest.raises(ValueError, match="max_parameters: got 10, the smallest feasible value is"):
        stitch(model, CALIBRATION, SCORED, budget=Budget(max_parameters=10), progress=False)


@pytest.mark.parametrize("limit", [256, 1])
def test_a_hybrid_of_at_least_two_components(limit, tmp_path):
    model = compose("gpt_neox", "mamba2", num_blocks=2)
    budget = Budget(min_components=2)
    report = stitch(model, CALIBRATION, SCORED, budget=budget, limit=limit, folder=tmp_path, progress=False)
    assert sorted(c.choice for c in report.candidates) == [[0, 1], [1, 0]]
    assert "components, at least" in (tmp_path / "report.html").read_text()


def test_halving_ranks_again_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    model = compose("gpt_neox", "mamba2", num_blocks=2)
    options = HalvingOptions(tokens=2000, learning_rate=1e-3, batch_size=4)
    calls = []
    tune = halving_module._tuned_loss

    def stop_after(count):
        def wrapped(*given):
            if len(calls) == count:
                raise KeyboardInterrupt
            calls.append(given[1].choice)
            return tune(*given)

        return wrapped

    monkeypatch.setattr(halving_module, "_tuned_loss", stop_after(2))
    with pytest.raises(KeyboardInterrupt):
        stitch(model, CALIBRATION, SCORED, halving=options, folder=tmp_path, progress=False)
    monkeypatch.setattr(halving_module, "_tuned_loss", stop_after(3))
    report = stitch(model, CALIBRATION, SCORED, halving=options, folder=tmp_path, progress=False)
    assert len(calls) == 3  # two in the first rung, one in the second
    again = stitch(model, CALIBRATION, SCORED, halving=options, folder=tmp_path, progress=False)
    assert len(calls) == 3 and [c.tuned for c in again.candidates] == [c.tuned for c in report.candidates]
    monkeypatch.setattr(halving_module, "_tuned_loss", tune)
    fresh = stitch(model, CALIBRATION, SCORED, halving=options, progress=False)
    assert capsys.readouterr().out == ""
    assert [c.choice for c in fresh.candidates] == [c.choice for c in report.candidates]
    assert fresh.best.tuned == pytest.approx(report.best.tuned) and set(report.best.tuned) == {"0.05", "0.15"}
    assert [len(c.tuned) for c in report.candidates] == [2, 1, 0, 0]
    assert "after 5 %" in str(report) and "after 15 %" in str(report)
    with pytest.raises(ValueError, match="holds results of a search with another model"):
        stitch(model, CALIBRATION, SCORED, halving=HalvingOptions(tokens=3000), folder=tmp_path, progress=False)


def test_report_folder(tmp_path):
    model = compose("gpt_neox", "mamba2", num_blocks=2)
    report = stitch(model, CALIBRATION, SCORED, folder=tmp_path / "report", keep=2, progress=False)
    saved = json.loads((tmp_path / "report" / "stitch.json").read_text())
    assert [c["choice"] for c in saved["candidates"]] == [c.choice for c in report.candidates]
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == [
        "blocks.png",
        "components.png",
        "pareto.png",
        "report.html",
        "stitch.json",
    ]
    assert len(str(report).splitlines()) == 5 and report.best.slices in str(report)
    for kind in ("parameters", "cache_bytes_per_token", "flops_per_token"):
        front = report.pareto(kind)
        for c in report.candidates:
            beaten = any(getattr(f, kind) <= getattr(c, kind) and f.loss <= c.loss for f in front)
            assert beaten


def test_sweep(tmp_path):
    model = compose("gpt_neox", "mamba2", num_blocks=2)
    model.set_mixture_weights([[0.3, 0.7], [0.6, 0.4]])
    before = [point.clone() for point in model.mixture_weights()]
    report = sweep(model, SCORED, divisions=2, folder=tmp_path, progress=False)
    assert len(report.points) == 9 and report.best.loss == min(p.loss for p in report.points)
    assert all(torch.equal(a, b) for a, b in zip(before, model.mixture_weights()))
    model.set_mixture_weights(report.best.weights)
    with torch.no_grad():
        assert report.best.loss == pytest.approx(model(SCORED, labels=SCORED).loss.item(), abs=1e-5)
    assert (tmp_path / "sweep.json").is_file() and (tmp_path / "sweep.png").is_file()
    assert len(simplex_grid(3, 4)) == 15 and all(sum(p) == pytest.approx(1) for p in simplex_grid(3, 4))
    with pytest.raises(ValueError, match="divisions: got 40, a grid of 1681 points"):
        sweep(model, SCORED, divisions=40, progress=False)


BAD = {
    "limit": ({"limit": 0}, "limit: got 0"),
    "beam": ({"beam": True}, "beam: got True"),
    "order": ({"order": "deep"}, "order: got 'deep'"),
    "budget": ({"budget": 3}, "budget: got int"),
    "halving": ({"halving": 3}, "halving: got int"),
    "context": ({"context": 1000}, "context: got 1000, allowed is 1..64"),
}


@pytest.mark.parametrize("options, message", BAD.values(), ids=BAD)
def test_bad_options(options, message):
    model = compose("gpt_neox", "mamba2", num_blocks=2)
    with pytest.raises(ValueError, match=message):
        stitch(model, CALIBRATION, SCORED, progress=False, **options)


def test_bad_texts_and_models():
    model = compose("gpt_neox", "mamba2", num_blocks=2)
    with pytest.raises(ValueError, match="score_texts: got the calibration_texts themselves"):
        stitch(model, CALIBRATION, CALIBRATION, progress=False)
    with pytest.raises(ValueError, match="calibration_texts: got 0 non-empty rows"):
        stitch(model, CALIBRATION[:0], SCORED, progress=False)
    with pytest.raises(ValueError, match="model: got a discretized hybrid"):
        stitch(discretize(model, [0, 1]), CALIBRATION, SCORED, progress=False)
    for options in (
        *({"tokens": 0}, {"learning_rate": -1.0}, {"seed": 1.5}, {"warmup": 1.0}),
        *({"rungs": ()}, {"rungs": ((1.5, 0.05),)}, {"rungs": ((0.5,),)}),
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            HalvingOptions(**options)
