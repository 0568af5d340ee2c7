"""The command of the speed benchmark: what it runs, what it keeps, and how it ends."""

import json
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import speed  # noqa: E402


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
