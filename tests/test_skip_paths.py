"""Paths without a component: exact corners, the stream's mixture, costs, scores, decoding, and what is refused."""

import itertools
import math

import pytest
import torch
from tiny import component, tokens

from modeling_manticore import (
    Budget,
    ManticoreConfig,
    ManticoreForCausalLM,
    ManticoreTrainer,
    ManticoreTrainingArguments,
    calibrate,
    cost_table,
    discretize,
    expected_cost,
    stitch,
    sweep,
)
from modeling_manticore.building.costs import COST_KINDS
from modeling_manticore.building.discretize import usable_paths
from modeling_manticore.tasks.text import as_dataset


SKIP = {"component": None}
CALIBRATION, SCORED = tokens(32, 12, seed=3), tokens(8, 12, seed=4)


def path(k, start, stop):
    return {"component": k, "start": start, "stop": stop}


BETWEEN_HALVES = [[path(0, 0, 2), path(1, 0, 1)], [path(1, 1, 2), SKIP], [path(0, 2, 4), path(1, 2, 3)]]
TWO_IN_A_ROW = [
    [path(0, 0, 1), path(1, 0, 1), SKIP],
    [SKIP, path(1, 1, 2)],
    [path(0, 1, 2), SKIP],
    [path(0, 2, 4), path(1, 2, 3), SKIP],
]
LONE_NEIGHBOURS = [[path(0, 0, 2)], [path(1, 0, 2), SKIP], [SKIP], [path(1, 2, 3), path(0, 2, 4), path(0, 3, 4)]]
LONE_TARGET = [[path(0, 0, 2)], [SKIP, path(0, 2, 3)], [path(1, 2, 3)]]
LAYOUTS = {
    "between_halves": BETWEEN_HALVES,
    "two_in_a_row": TWO_IN_A_ROW,
    "lone_neighbours": LONE_NEIGHBOURS,
    "lone_target": LONE_TARGET,
}


def compose(blocks=BETWEEN_HALVES, families=("llama", "mamba2"), **options):
    parts = [component(f, i, initializer_range=0.1) for i, f in enumerate(families)]
    return ManticoreForCausalLM.from_components(parts, blocks=blocks, **options)


def one_hot(model, choice):
    return [[float(p == q) for p in range(len(block))] for block, q in zip(model.config.blocks, choice)]


def choices_of(model):
    return list(itertools.product(*usable_paths(model)))


@pytest.mark.parametrize("blocks", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("gate", ["routed", "mixture", "none", "learned"])
@pytest.mark.parametrize("project_ends", [True, False])
@torch.no_grad()
def test_every_corner_is_the_discretized_hybrid(blocks, gate, project_ends):
    model = compose(blocks, gate=gate, project_ends=project_ends, projector_init="random").double()
    ids = tokens()
    for choice in choices_of(model):
        if gate in ("none", "learned") and not project_ends:
            continue  # plain ends pad and cut, bridges at the ends do not: not the same by design
        hybrid = discretize(model, list(choice), refit=False)
        kept = [model.config.blocks[b][p] for b, p in enumerate(choice) if model.config.blocks[b][p] != SKIP]
        assert hybrid.config.is_discretized and all(SKIP not in block for block in hybrid.config.blocks)
        if gate == "routed" or len({p["component"] for p in kept}) == 1 and gate == "mixture":
            model.set_mixture_weights(one_hot(model, choice))
            torch.testing.assert_close(model(ids).logits, hybrid(ids).logits, atol=1e-5, rtol=0, check_dtype=False)


@torch.no_grad()
def test_a_component_that_goes_on_behind_a_skipped_block_is_exact():
    model, uncut = compose(projector_init="random"), component("llama", 0, initializer_range=0.1)
    model.set_mixture_weights(one_hot(model, [0, 1, 0]))
    torch.testing.assert_close(model(tokens()).logits, uncut(tokens()).logits, atol=1e-6, rtol=0)
    assert discretize(model).config.blocks == [[path(0, 0, 4)]]


@torch.no_grad()
def test_the_stream_is_the_mixture_of_what_a_block_adds_and_what_reached_it():
    model = compose(gate="none", projector_init="random").double()
    ends = [[0.3, 0.7], None, [0.6, 0.4]]
    streams = {}
    for share in (0.0, 0.25, 1.0):
        model.set_mixture_weights([ends[0], [1 - share, share], ends[2]])
        streams[share] = model(tokens(), output_hidden_states=True).hidden_states
    before, alone, mixed = streams[0.0][1], streams[0.0][2], streams[0.25][2]
    torch.testing.assert_close(mixed, 0.75 * alone + 0.25 * before, atol=1e-6, rtol=0)  # weights are float32
    torch.testing.assert_close(streams[1.0][2], before, atol=1e-12, rtol=0)
    assert len(streams[1.0]) == 4 and not torch.allclose(alone, before)


@pytest.mark.parametrize("blocks", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("gate", ["routed", "mixture"])
@torch.no_grad()
def test_decoding_saving_and_padding(blocks, gate, tmp_path):
    model = compose(blocks, gate=gate, projector_init="random")
    model.set_mixture_weights([torch.arange(1.0, len(b) + 1) / sum(range(len(b) + 1)) for b in blocks])
    ids = tokens(2, 10)
    full = model(ids).logits
    cache = model(ids[:, :6], use_cache=True).past_key_values
    steps = [model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(6, 10)]
    torch.testing.assert_close(torch.cat(steps, 1), full[:, 6:], atol=1e-5, rtol=0)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)], 1)
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 3:], full, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path)
    again = ManticoreForCausalLM.from_pretrained(tmp_path)
    assert again.config.blocks == blocks and torch.equal(again(ids).logits, full)
    assert "skip" in again.describe() and model.generate(ids, max_new_tokens=3).shape == (2, 13)


@pytest.mark.parametrize("blocks", LAYOUTS.values(), ids=LAYOUTS)
def test_costs_are_those_of_the_discretized_hybrid(blocks):
    model = compose(blocks)
    table = cost_table(model, context=16)
    for choice in choices_of(model):
        hybrid = discretize(model, list(choice))
        assert table.of(choice)["parameters"] == sum(p.numel() for p in hybrid.parameters())
        own = cost_table(hybrid, context=16).of([0] * len(hybrid.config.blocks))
        for kind in ("cache_bytes_per_token", "flops_per_token"):
            assert table.of(choice)[kind] == own[kind]
    torch.manual_seed(0)
    weights = [torch.rand(len(block)).softmax(0) for block in blocks]
    kept = [
        torch.zeros(len(w)).index_fill(0, torch.tensor(own), 1.0) * w for w, own in zip(weights, usable_paths(model))
    ]
    kept = [w / w.sum() for w in kept]
    for kind in COST_KINDS:
        mean = sum(
            math.prod(float(w[p]) for w, p in zip(kept, choice)) * table.of(choice)[kind]
            for choice in choices_of(model)
        )
        assert expected_cost(model, kind, table, weights).item() == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("order", ["parallel", "sequential"])
@pytest.mark.parametrize("blocks", [BETWEEN_HALVES, TWO_IN_A_ROW], ids=["between_halves", "two_in_a_row"])
def test_scores_are_the_losses_of_the_discretized_hybrids(blocks, order):
    model = compose(blocks)
    report = stitch(model, CALIBRATION, SCORED, order=order, progress=False)
    assert sorted(tuple(c.choice) for c in report.candidates) == sorted(choices_of(model))
    for candidate in report.candidates:
        hybrid = discretize(model, candidate.choice, calibration=CALIBRATION, order=order, progress=False)
        with torch.no_grad():
            assert candidate.loss == pytest.approx(hybrid(SCORED, labels=SCORED).loss.item(), abs=1e-5)


def test_budgets_beam_and_sweep_may_drop_depth():
    model = compose(TWO_IN_A_ROW)
    table = cost_table(model)
    least = min(table.of(choice)["parameters"] for choice in choices_of(model))
    chosen = discretize(model, budget=Budget(max_parameters=least))
    assert sum(p.numel() for p in chosen.parameters()) == least
    report = stitch(model, CALIBRATION, SCORED, limit=1, beam=2, budget=Budget(max_parameters=least), progress=False)
    assert report.method == "beam" and {c.parameters for c in report.candidates} == {least}
    points = sweep(compose(LONE_TARGET), SCORED, divisions=2, progress=False).points
    assert len(points) == 3 and all(math.isfinite(point.loss) for point in points)
    assert len(sweep(compose([[path(0, 0, 2), SKIP], [path(1, 1, 3), SKIP]]), SCORED, divisions=2).points) == 4


def test_calibration_and_search_move_it(tmp_path):
    twin = component("gpt2", 1)
    blocks = [[path(k, b, b + 1 + (b == 2)) for k in range(2)] + [SKIP] * (b == 1) for b in range(3)]
    twins = ManticoreForCausalLM.from_components([twin, twin], blocks=blocks, projector_init="random")
    twins.set_mixture_weights([[0.5, 0.5], [0.5, 0.5, 0.0], [0.5, 0.5]])
    with torch.no_grad():
        own = twin(SCORED).logits
        assert (twins(SCORED).logits - own).abs().max() > 1
        calibrate(twins, CALIBRATION, progress=False)
        torch.testing.assert_close(twins(SCORED).logits, own, atol=2e-2, rtol=0)
    model = compose(BETWEEN_HALVES, families=("gpt2", "mamba2"))
    for strategy in ("joint", "darts"):
        args = ManticoreTrainingArguments(
            output_dir=tmp_path / strategy,
            stage="search",
            strategy=strategy,
            max_steps=3,
            mixture_learning_rate=0.1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
        )
        data = {"search_dataset": as_dataset(SCORED)} if strategy == "darts" else {}
        trainer = ManticoreTrainer(model=model, args=args, train_dataset=as_dataset(CALIBRATION), **data)
        start = [point.clone() for point in model.mixture_weights()]
        trainer.train()
        assert all(not torch.equal(a, b) for a, b in zip(start, model.mixture_weights()))


def test_one_option_gives_every_inner_block_a_skip_path():
    config = ManticoreConfig.from_partition(
        [component("llama").config, component("mamba2").config], 3, skip_paths=True
    )
    assert [SKIP in block for block in config.blocks] == [False, True, False]
    parts = [component("llama"), component("mamba2")]
    model = ManticoreForCausalLM.from_components(parts, num_blocks=3, skip_paths=True)
    assert model.config.blocks == config.blocks
    with pytest.raises(ValueError, match="skip_paths: got True"):
        ManticoreForCausalLM.from_components(parts, blocks=LONE_TARGET, skip_paths=True)
    with pytest.raises(ValueError, match="skip_paths: got 2"):
        ManticoreForCausalLM.from_components(parts, num_blocks=3, skip_paths=2)


def test_argmax_never_begins_or_ends_with_a_skip_path():
    model = compose(TWO_IN_A_ROW)
    model.set_mixture_weights([[0.1, 0.2, 0.7], [0.9, 0.1], [0.2, 0.8], [0.3, 0.1, 0.6]])
    hybrid = discretize(model)
    assert [block[0]["component"] for block in hybrid.config.blocks] == [1, 0]


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"blocks\[0\]: got only a skip path"):
        compose([[SKIP], [path(0, 0, 4)]])
    with pytest.raises(ValueError, match=r"blocks\[1\]: got only a skip path"):
        compose([[path(0, 0, 4)], [SKIP]])
    with pytest.raises(ValueError, match=r"blocks\[1\]: got 2 skip paths"):
        compose([[path(0, 0, 2)], [SKIP, SKIP], [path(0, 2, 4)]])
    with pytest.raises(ValueError, match=r"blocks\[1\]\[0\].component: got None"):
        compose([[path(0, 0, 2)], [{"component": None, "start": 0, "stop": 1}], [path(0, 2, 4)]])
    model = compose(TWO_IN_A_ROW)
    with pytest.raises(ValueError, match=r"weights\[0\]: got all on a skip path"):
        model.set_mixture_weights(one_hot(model, [2, 0, 0, 0]))
    with pytest.raises(ValueError, match=r"choice\[3\]: got the skip path 2"):
        discretize(model, [0, 0, 0, 2])
