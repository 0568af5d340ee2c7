"""The command of the speed benchmark: what it runs, what it keeps, and how it ends."""

import json
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import _speed_parallel  # noqa: E402
import _speed_profile  # noqa: E402
import speed  # noqa: E402
from _speed_forward import Settings  # noqa: E402
from _speed_shapes import Shape  # noqa: E402


LEAST = Shape("least", 32, 4, 64, 1, 24, contexts=(16,), wide_contexts=(16,), blocks=2, steps=4)
ONCE = Settings(seconds=0, fewest=2)
IN_TEST_SPEED = ("discretized forward", "supernet forward", "supernet training", "decode of states")


def row(ratio: float, **more) -> dict:
    """A row whose interval is a point."""
    interval = [ratio, ratio]
    common = {"again": 1.0, "again_interval": [1.0, 1.0], "seconds": ratio, "reference_seconds": 1.0, "bound": 1.05}
    return (
        common
        | {"name": "a row", "ratio": ratio, "interval": interval, "met": ratio < 1.05, "fails": ratio > 1.05}
        | more
    )


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs the command with one measure that writes down its calls; `found` is the ratio it reports."""

    class Bench:
        file, calls, found = tmp_path / "results" / "speed.json", [], 1.0

        def __call__(self, *arguments: str) -> None:
            monkeypatch.setattr(sys, "argv", ["speed.py", "--file", str(self.file), *arguments])
            speed.main()

        def measure(self, shape, settings) -> list[dict]:
            self.calls.append(shape.name)
            if self.found is None:
                raise RuntimeError("stopped")
            return [row(self.found, series="one", tokens=256, milliseconds_per_token=2.0)]

    made = Bench()
    made.calls = []
    monkeypatch.setattr(speed, "MEASURES", {"a measure": made.measure})
    monkeypatch.setattr(speed, "WITHOUT_SHAPE", {})
    monkeypatch.setattr(speed, "fix_threads", lambda count: None)
    return made


def test_results_table_and_picture_are_written(bench, capsys):
    bench("--shapes", "small", "--rounds", "3")
    found = json.loads(bench.file.read_text())["shapes"]["small"]["a-measure"]
    assert found["settings"]["fewest"] == 3 and found["machine"]["commit"] and found["rows"][0]["ratio"] == 1.0
    assert "1.000 [ 1.000,  1.000]" in (shown := capsys.readouterr().out) and "1.05 met" in shown
    assert bench.file.with_suffix(".svg").read_text().startswith("<?xml")


def test_a_stopped_run_goes_on(bench):
    bench("--shapes", "tiny")
    bench.found = None
    with pytest.raises(RuntimeError, match="stopped"):
        bench("--resume")
    assert bench.calls == ["tiny", "small"]
    bench.found = 1.0
    bench("--resume")
    assert bench.calls == ["tiny", "small", "small", "100m"]
    assert list(json.loads(bench.file.read_text())["shapes"]) == ["tiny", "small", "100m"]


def test_other_settings_are_measured_again(bench):
    bench("--shapes", "tiny")
    bench("--shapes", "tiny", "--resume", "--rounds", "9")
    assert bench.calls == ["tiny", "tiny"]


def test_no_measure_begins_after_the_minutes(bench, capsys):
    bench("--minutes", "0")
    assert bench.calls == [] and "--resume goes on from here" in capsys.readouterr().out


def test_a_failed_bound_is_an_error_where_bounds_are_promised(bench):
    bench.found = 1.2
    bench("--shapes", "tiny")
    with pytest.raises(SystemExit, match="beyond the bound: small, a row"):
        bench("--shapes", "small")


@pytest.mark.parametrize(
    "arguments", [("--rounds", "1"), ("--threads", "0"), ("--shapes", "huge"), ("--measures", "x")]
)
def test_bad_options_are_refused(bench, arguments, capsys):
    with pytest.raises(SystemExit):
        bench(*arguments)
    assert bench.calls == [] and f"{arguments[0]}: " in capsys.readouterr().err


class TestMeasures:
    """Each on a shape that says nothing of speed."""

    def rows(self, measure) -> list[dict]:
        """The rows of a measure, which must be JSON and have names of their own."""
        rows = json.loads(json.dumps(measure(LEAST, ONCE)))
        assert rows and len({row["name"] for row in rows}) == len(rows)
        for found in rows:
            if "ratio" in found:
                assert found["interval"][0] <= found["ratio"] <= found["interval"][1]
                assert found["ratio"] > 0 and found["rounds"] == 2
        return rows

    def test_decode_has_both_batches_and_the_fixed_cost(self):
        rows = self.rows(speed.MEASURES["decode"])
        assert {"decode, one slice, batch 16, 16", "decode, one-layer slices, batch 1, 16"} < {r["name"] for r in rows}
        for found in rows:
            extra = found["milliseconds_per_token"] - found["native_milliseconds_per_token"]
            name = found["name"].split(", ")[1]
            slices = 1 if name == "one slice" else 2 if name.startswith("half") else 4
            assert found["extra_milliseconds_per_token_and_slice"] == pytest.approx(extra / slices)

    def test_prefill_and_stitch_are_bounded(self):
        assert len(self.rows(speed.MEASURES["prefill"])) == 6
        (found,) = self.rows(speed.MEASURES["stitch"])
        assert found["candidates"] == 8 and found["bound"] == 1.2

    @pytest.mark.parametrize("name", ["calibration", "hooks training", "hooks generation"])
    def test_others_are_reported_without_a_bound(self, name, monkeypatch):
        monkeypatch.setattr(_speed_parallel, "GENERATED", 8)
        (found,) = self.rows(speed.MEASURES[name])
        assert "bound" not in found

    def test_profiles_are_small_tables(self, monkeypatch, tmp_path):
        monkeypatch.setattr(_speed_profile, "FOLDER", tmp_path)
        rows = self.rows(speed.MEASURES["profiles"])
        for found in rows:
            table = (tmp_path / found["file"]).read_text()
            assert "aten::" in table and "Self CPU" in table and len(table) < 10_000
            assert found["operators"] > 20 and found["milliseconds"] > 0

    def test_data_generation_needs_no_shape(self):
        rows = speed.WITHOUT_SHAPE["data generation"](ONCE)
        assert [found["milliseconds_of_1000_rows"] > 0 for found in rows] == [True] * 4

    @pytest.mark.slow
    def test_loading_compares_the_same_bytes(self):
        rows = {found["name"]: found for found in self.rows(speed.MEASURES["loading"])}
        sizes = rows["first load, one slice"]["bytes"]
        assert sizes["measured"] == sizes["reference"] > 0
        assert rows["peak memory, one slice"]["peak_bytes"] > sizes["measured"] / 2
        assert rows["load again, half and half"]["bound"] == 1.15

    def test_every_measure_is_tried(self):
        reported = {"calibration", "hooks training", "hooks generation", "profiles"}
        tried = reported | {"decode", "prefill", "stitch", "loading", "compiled decode"}
        assert tried | set(IN_TEST_SPEED) == set(speed.MEASURES)
