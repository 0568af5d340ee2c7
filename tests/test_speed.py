"""
A quick form of the speed benchmark, on a shape at which passes cost more than calling them does. A ratio fails only
where the lower end of its interval is beyond the bound in two runs; `make bench-speed` measures the rest.
"""

import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import _speed_decode as decoding  # noqa: E402
import _speed_forward as passes  # noqa: E402
from _speed_shapes import (  # noqa: E402
    Shape,
    half_and_half,
    one_layer_slices,
    one_slice,
    tokens,
)


# Bounds hold where layers are wide enough: narrower ones, and more blocks, leave a larger share to what joins slices.
QUICK = Shape("quick", 384, 4, 512, 2, 128, blocks=2)
STATES = Shape("quick states", 128, 2, 512, 1, 128, state_contexts=(256, 2048), steps=16)
DECODING = Shape("quick decoding", 512, 6, 512, 1, 128, contexts=(256,), wide_contexts=(), steps=8)
SETTINGS = passes.Settings(seconds=0.5, fewest=7)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def beyond_twice(measure, shape: Shape = QUICK, settings: passes.Settings = SETTINGS) -> list[tuple]:
    """Bounds that fail in two runs, with both intervals; the second runs only where the first has failures."""
    failed = {row["name"]: row["interval"] for row in measure(shape, settings) if row.get("fails")}
    if not failed:
        return []
    again = {row["name"]: row["interval"] for row in measure(shape, settings) if row.get("fails")}
    return [(name, failed[name], again[name]) for name in failed if name in again]


@pytest.fixture
def three_pairs(monkeypatch):
    """One of each kind."""
    chosen = {"one slice": one_slice, "half and half": half_and_half, "one-layer slices": one_layer_slices}
    monkeypatch.setattr(passes, "PAIRS", chosen)
    monkeypatch.setattr(decoding, "PAIRS", chosen)


def test_a_forward_pass_costs_what_the_native_model_costs(three_pairs):
    assert beyond_twice(passes.discretized_forward) == []


@pytest.mark.parametrize("measure", [passes.supernet_forward, passes.supernet_training])
def test_a_supernet_costs_what_its_components_cost(measure, monkeypatch):
    monkeypatch.setattr(passes, "SUPERNETS", {"": passes.SUPERNET_BOUND})
    assert beyond_twice(measure) == []


def test_decoding_costs_what_the_native_model_costs(three_pairs):
    assert beyond_twice(decoding.decode, DECODING) == []


def test_decoding_without_attention_costs_the_same_at_any_context():
    assert beyond_twice(decoding.decode_of_states, STATES) == []


def test_a_slower_model_is_found(monkeypatch):
    """One that takes twice the time: the bounds can fail."""
    forward = passes.forward_work

    def slowed(model, ids):
        work = forward(model, ids)
        if model.config.model_type != "manticore":
            return work
        return passes.Work(lambda: (work.run(), work.run()))

    monkeypatch.setattr(passes, "forward_work", slowed)
    monkeypatch.setattr(passes, "PAIRS", {"one slice": one_slice})
    ((name, first, second),) = beyond_twice(passes.discretized_forward, STATES, passes.Settings(seconds=0, fewest=5))
    assert name == "forward, one slice" and min(*first, *second) > passes.FORWARD_BOUND


class TestThePairs:
    shape = Shape("least", 32, 4, 64, 2, 24)

    @pytest.mark.parametrize("name", passes.PAIRS)
    def test_both_are_the_same_function(self, name):
        pair = passes.PAIRS[name](self.shape)
        ids = tokens(self.shape, 2, 90)
        assert passes.must_agree(pair, ids) < 1e-4
        ours, _, difference = decoding.pair_of_decoders(pair, ids, 64)
        assert difference < 1e-4
        attention = {"one slice": 4, "one-layer slices": 4}.get(name, 2)
        assert decoding.key_value_bytes(pair, 2, ours, self.shape) == attention * 2 * 32 * 4

    def test_models_that_differ_are_refused(self):
        pair = one_slice(self.shape)
        pair.native.lm_head.weight.data[3, 0] += 1
        with pytest.raises(RuntimeError, match="differ by"):
            passes.must_agree(pair, tokens(self.shape, 1, 8))
