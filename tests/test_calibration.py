"""Calibration against a float64 least-squares reference; masks, dtypes, warnings, both orders."""

import logging

import pytest
import torch
from tiny import VOCAB, component, tokens
from torch.nn import functional

from modeling_manticore import ManticoreForCausalLM, calibrate, discretize
from modeling_manticore.building.ridge import STRENGTHS, Moments, Regression


def path(k, start, stop):
    return {"component": k, "start": start, "stop": stop}


def compose(*families, **options):
    return ManticoreForCausalLM.from_components([component(f, i) for i, f in enumerate(families)], **options)


def input_of_layer(model, i, ids):
    """What reaches layer i of an uncut component (its `hidden_states` are counted otherwise in the mambas)."""
    base = getattr(model, model.base_model_prefix)
    layer, seen = (base.h if hasattr(base, "h") else base.layers)[i], []
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    model(ids)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("strength", STRENGTHS)
def test_streamed_ridge_equals_least_squares_of_all_data(strength):
    torch.manual_seed(0)
    x = torch.randn(500, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64) + 3
    y = x @ torch.randn(7, 5, dtype=torch.float64) + torch.randn(500, 5, dtype=torch.float64) - 2
    moments = Moments(7, 5, torch.device("cpu"))
    for part_x, part_y in zip(x.split(64), y.split(64)):
        moments.add(part_x, part_y)
    weight, bias = moments.solve(strength)
    # The same problem as ordinary least squares on centred data with sqrt(penalty) rows added.
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    penalty = strength * (centred_x**2).sum(0).mean()
    rows = torch.cat([centred_x, penalty.sqrt() * torch.eye(7, dtype=torch.float64)])
    targets = torch.cat([centred_y, torch.zeros(7, 5, dtype=torch.float64)])
    reference = torch.linalg.lstsq(rows, targets).solution.T
    torch.testing.assert_close(weight, reference, atol=1e-9, rtol=0)
    torch.testing.assert_close(bias, y.mean(0) - reference @ x.mean(0), atol=1e-9, rtol=0)
    residual = y - x @ weight.T - bias
    expected = 1 - (residual**2).sum() / (centred_y**2).sum()
    assert moments.fit(weight, bias) == pytest.approx(expected.item(), abs=1e-9)


def test_strength_is_the_one_with_the_best_held_out_fit():
    torch.manual_seed(0)
    regression = Regression(30, 3, torch.device("cpu"))
    plane = torch.randn(30, 3)
    parts = {}
    for held_out, count in ((False, 40), (True, 400)):
        x = torch.randn(count, 30)
        parts[held_out] = (x, x @ plane + 8 * torch.randn(count, 3))
        regression.add(*parts[held_out], held_out=held_out)
    solution = regression.solve()
    scores = {}
    for strength in STRENGTHS:
        weight, bias = regression.parts[False].solve(strength)
        x, y = (t.double() for t in parts[True])
        scores[strength] = -((y - x @ weight.T - bias) ** 2).sum().item()
    assert solution.strength == max(scores, key=scores.get) == 1e-1
    assert solution.tokens == 440


@pytest.mark.parametrize("families", [("gpt_neox", "mamba2"), ("mamba", "gpt2"), ("llama", "falcon_mamba")])
@torch.no_grad()
def test_a_bridge_is_the_regression_between_the_uncut_components(families):
    first, second = (component(family, i) for i, family in enumerate(families))
    hybrid = ManticoreForCausalLM.from_components([first, second], blocks=[[path(0, 0, 2)], [path(1, 1, 3)]])
    ids = tokens(64, 16)
    report = calibrate(hybrid, ids, batch_size=8, progress=False, components=[first, second])
    fit = next(f for f in report.fits if f.projector == "blocks.1.paths.0.in_projector")
    x, y = (input_of_layer(model, i, ids).flatten(0, 1).double() for model, i in ((first, 2), (second, 1)))
    centred = x - x.mean(0)
    penalty = fit.strength * (centred**2).sum(0).mean() * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(centred.T @ centred + penalty, centred.T @ (y - y.mean(0))).T
    bridge = hybrid.model.blocks[1].paths[0].in_projector
    torch.testing.assert_close(bridge.weight.double(), weight, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(bridge.bias.double(), y.mean(0) - weight @ x.mean(0), atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_padding_plays_no_part():
    first = compose("gpt_neox", "mamba2", num_blocks=2)
    second = compose("gpt_neox", "mamba2", num_blocks=2)
    ids = tokens(32, 12)
    calibrate(first, [row[:length] for row, length in zip(ids, [12, 7] * 16)], progress=False)
    noisy = ids.clone()
    mask = torch.ones_like(ids)
    noisy[1::2, 7:] = 5
    mask[1::2, 7:] = 0
    rows = {"input_ids": noisy.tolist(), "attention_mask": mask.tolist()}
    from datasets import Dataset

    calibrate(second, Dataset.from_dict(rows), progress=False)
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("gate", ["routed", "mixture", "none", "learned"])
@pytest.mark.parametrize("families", [("gpt_neox", "mamba2"), ("opt", "qwen3", "mamba2")])
def test_the_report_names_every_fitted_projector(gate, families):
    model = compose(*families, num_blocks=2, gate=gate)
    report = calibrate(model, tokens(64, 16), progress=False)
    names = {name.rpartition(".")[0].removeprefix("model.") for name, _ in model.named_parameters()}
    for fit in report.fits:
        assert fit.projector in names and fit.projector in str(report)
        assert fit.tokens == report.tokens == 64 * 16
        assert fit.strength in STRENGTHS and fit.fit <= 1
    again = {name: tensor.clone() for name, tensor in model.state_dict().items() if "projector" in name}
    calibrate(model, tokens(64, 16), progress=False)
    for name, tensor in again.items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("families", [("gpt_neox", "mamba2"), ("llama", "falcon_mamba")])
def test_components_that_share_a_space_calibrate_to_no_loss(families):
    """Two copies of one model: every joint can be fitted exactly, so any mixed choice is the model again."""
    one = component(families[0])
    model = ManticoreForCausalLM.from_components([one, one], num_blocks=2, projector_init="random")
    ids = tokens(128, 24, seed=5)
    calibrate(model, ids, progress=False)
    hybrid = discretize(model, [0, 1], calibration=ids)
    with torch.no_grad():
        expected, found = one(ids).logits, hybrid(ids).logits
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert functional.cross_entropy(found.flatten(0, 1), expected.softmax(-1).flatten(0, 1)) < (
        functional.cross_entropy(expected.flatten(0, 1), expected.softmax(-1).flatten(0, 1)) + 0.01
    )


def test_both_orders_agree_on_one_bridge_and_differ_on_two():
    whole = compose("gpt_neox", "mamba2", num_blocks=2)

    def bridges(blocks, order):
        hybrid = compose("gpt_neox", "mamba2", blocks=blocks)
        report = calibrate(hybrid, tokens(64, 16), order=order, progress=False, components=whole)
        assert report.order == order
        return {name: p for name, p in hybrid.named_parameters() if "projector" in name}

    one = [[path(0, 0, 2)], [path(1, 1, 3)]]
    first, second = bridges(one, "sequential"), bridges(one, "parallel")
    for name, bridge in first.items():
        torch.testing.assert_close(second[name], bridge, atol=1e-6, rtol=1e-5)
    two = [[path(0, 0, 2)], [path(1, 1, 2)], [path(0, 3, 4)]]
    first, second = bridges(two, "sequential"), bridges(two, "parallel")
    assert not torch.allclose(
        first["model.blocks.2.paths.0.in_projector.weight"], second["model.blocks.2.paths.0.in_projector.weight"]
    )


def test_16_bit_hybrids_calibrate_in_float64():
    exact = compose("gpt_neox", "mamba2", num_blocks=2)
    rounded = compose("gpt_neox", "mamba2", num_blocks=2, dtype=torch.bfloat16)
    for model in (exact, rounded):
        calibrate(model, tokens(64, 16), progress=False)
    for name, tensor in exact.state_dict().items():
        if "projector.weight" in name:
            found = rounded.state_dict()[name]
            assert found.dtype == torch.bfloat16
            assert (found.float() - tensor).norm() < 0.25 * tensor.norm() + 1e-3, name


def test_too_little_text_is_warned_of(caplog):
    model = compose("gpt_neox", "mamba2", num_blocks=2)
    logger = logging.getLogger("modeling_manticore.building.calibrate")
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.WARNING)
    try:
        calibrate(model, tokens(4, 12), progress=False)
        assert "and 5 more: calibrated on 48 tokens, fewer than 20 times the width 32; use at least 640" in caplog.text
        assert len({record.getMessage() for record in caplog.records}) == 1
        caplog.clear()
        calibrate(model, tokens(64, 12), progress=False)
        assert not caplog.text
    finally:
        logger.removeHandler(caplog.handler)


def test_training_mode_and_other_weights_are_left_alone():
    model = compose("gpt2", "mamba2", num_blocks=2).train()
    before = {n: t.clone() for n, t in model.state_dict().items() if "projector" not in n}
    calibrate(model, tokens(32, 12) % VOCAB, progress=False)
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
