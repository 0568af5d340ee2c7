"""The statistics behind the speed benchmark: what is slower is found, what is the same passes."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from _timing import CLOCKS, Ratio, Work, compare, interval, machine, ratio_of, take_turns  # noqa: E402


def spin(seconds: float) -> Work:
    """Work that takes so much processor time, whatever else runs on the machine."""

    def run():
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    return Work(run)


def found(ratio: float, spread: float = 0.0, again_spread: float = 0.02) -> Ratio:
    """A ratio with an interval and an A/A interval of given half-widths."""
    ends = ratio - spread, ratio + spread
    return Ratio(ratio, *ends, 1.0, 1 - again_spread, 1 + again_spread, 1.0, 1.0, 9)


class TestComparisons:
    def test_a_function_that_is_slowed_down_is_found(self):
        ratio, both = compare(spin(0.012), spin(0.010), seconds=1)
        assert ratio.fails(1.05) and not ratio.meets(1.05)
        assert ratio.ratio == pytest.approx(1.2, abs=0.1)
        assert set(both) == set(CLOCKS)

    def test_real_work_that_is_done_twice_is_found(self):
        matrix = torch.rand(200, 200)
        once, twice = (Work(lambda n=n: [matrix @ matrix for _ in range(n)]) for n in (10, 20))
        ratio, _ = compare(twice, once, seconds=1)
        assert ratio.fails(1.3) and ratio.low < 2.5

    def test_the_same_work_passes(self):
        ratio, _ = compare(spin(0.010), spin(0.010), seconds=1)
        assert ratio.meets(1.05) and not ratio.fails(1.05)
        assert ratio.again == pytest.approx(1.0, abs=0.05)

    def test_pieces_of_one_side_are_added(self):
        ratio, _ = compare(spin(0.02), [spin(0.01), spin(0.005), spin(0.005)], seconds=1)
        assert ratio.ratio == pytest.approx(1.0, abs=0.1)

    def test_what_is_prepared_is_not_timed_and_fresh_every_time(self):
        made, used = [], []

        def prepare():
            spin(0.03).run()
            made.append(len(made))
            return made[-1]

        def run(given):
            used.append(given)
            spin(0.01).run()

        ratio, _ = compare(Work(run, prepare), spin(0.01), seconds=0, fewest=3)
        assert ratio.ratio == pytest.approx(1.0, abs=0.2)
        assert used == made and len(used) == 4  # a warm-up and three rounds

    def test_short_work_is_repeated_within_a_sample(self):
        calls = []
        taken = take_turns({"short": Work(lambda: calls.append(1))}, seconds=0, fewest=2)
        assert len(taken["wall"]["short"]) == 2 and len(calls) > 100

    def test_rounds_end_with_the_time_or_the_number(self):
        assert len(take_turns({"a": spin(0.01)}, seconds=0, fewest=3)["processor"]["a"]) == 3
        assert len(take_turns({"a": spin(0.01)}, seconds=60, fewest=2, most=4)["processor"]["a"]) == 4


class TestBounds:
    def test_a_bound_is_met_up_to_the_noise_of_the_run(self):
        assert found(1.02, 0.02).meets(1.03)  # 1.04 < 1.03 + 0.02
        assert not found(1.02, 0.03).meets(1.03)
        assert not found(1.02, 0.02, again_spread=0.005).meets(1.03)

    def test_a_bound_fails_only_beyond_the_interval(self):
        assert not found(1.10, 0.08).fails(1.03) and not found(1.10, 0.08).meets(1.03)
        assert found(1.10, 0.05).fails(1.03)

    def test_rows_say_how_the_bound_stands(self):
        row = found(1.10, 0.05).row(1.03)
        assert (row["bound"], row["met"], row["fails"]) == (1.03, False, True)
        assert row["again_half_width"] == pytest.approx(0.02)
        assert "bound" not in found(1.0).row()


class TestStatistics:
    def test_the_interval_covers_the_median_of_the_population(self):
        draws = np.random.default_rng(3)
        hits = 0
        for _ in range(200):
            low, high = interval(draws.lognormal(0.0, 0.1, 25), resamples=400)
            hits += low <= 1.0 <= high
        assert 180 <= hits <= 200

    def test_the_interval_shrinks_with_the_rounds(self):
        values = np.random.default_rng(0).normal(1, 0.1, 400)
        few, many = interval(values[:16]), interval(values)
        assert many[1] - many[0] < (few[1] - few[0]) / 2

    def test_one_round_is_paired_with_itself(self):
        """A machine that becomes twice as slow on the way changes no ratio."""
        speeds = np.linspace(1, 2, 20)
        ratio = ratio_of(1.1 * speeds, speeds, speeds)
        assert (ratio.ratio, ratio.low, ratio.high) == pytest.approx((1.1, 1.1, 1.1))
        assert ratio.noise == pytest.approx(0)

    def test_an_outlier_does_not_decide(self):
        measured, reference = [1.0] * 19 + [50.0], [1.0] * 20
        assert ratio_of(measured, reference, reference).high == pytest.approx(1.0)

    @pytest.mark.parametrize("lengths", [(3, 3, 2), (1, 1, 1)])
    def test_unequal_or_too_few_rounds_are_refused(self, lengths):
        with pytest.raises(ValueError, match="rounds: got"):
            ratio_of(*([1.0] * length for length in lengths))


def test_the_record_names_what_a_figure_depends_on():
    record = machine()
    assert record["cores"] and record["processor"] and record["versions"]["torch"] == torch.__version__
