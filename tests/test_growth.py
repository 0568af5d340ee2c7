"""What `benchmarks/growing.py` measures: points at small sizes, slopes, peaks, children that fail, the picture."""

import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import growing  # noqa: E402


def test_slopes():
    assert growing.slope([1, 2, 4], [3.0, 6.0, 12.0]) == pytest.approx(1)
    assert growing.slope([1, 2, 4], [5.0, 5.0, 5.0]) == pytest.approx(0)
    assert growing.slope([1, 10], [1.0, 100.0]) == pytest.approx(2)
    assert growing.slope([1, 2], [0.0, 1.0]) is None and growing.slope([1], [1.0]) is None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel's mark of the peak is Linux's")
def test_peaks():
    with growing.Peak() as large:
        torch.ones(2**24)
    with growing.Peak() as small:
        pass
    assert 0.9 * 2**26 < large.bytes < 1.3 * 2**26 and small.bytes < 2**22 and large.seconds > 0


def test_a_point_of_sizes():
    small, large = (growing.child({"width": width, "blocks": 2}) for width in (32, 64))
    assert small["hybrids"] == 4 and large["parameters"] > 2 * small["parameters"]
    assert all(found[key] > 0 for found in (small, large) for key in ("build_seconds", "search_seconds"))
    found = growing.curves("parameters", [{"given": {}, "found": small}, {"given": {}, "found": large}])
    assert found["x"] == [small["parameters"], large["parameters"]] and "decode_seconds" in found["slopes"]


def test_points_of_context_have_one_size_of_cache():
    points = [{"given": {"context": n}, "found": growing.child({"context": n})} for n in (64, 128)]
    found = growing.curves("context", points)
    assert found["slopes"]["cache_bytes"] == pytest.approx(0) and found["y"]["prefill_seconds"][0] > 0


def test_one_training_process():
    found = growing.child({"processes": 1, "kind": "none", "rank": 0, "file": "", "steps": 1})
    assert found["tokens_per_second"] > 0 and found["weight_bytes"] > 2**20


def test_efficiency():
    points = [
        {"given": {"processes": n, "kind": kind}, "found": {"tokens_per_second": speed}}
        for n, kind, speed in ((1, "none", 100.0), (2, "ddp", 180.0))
    ]
    assert growing.curves("processes", points) == {"efficiency": {"ddp": 0.9}}


def test_a_failing_child_is_told():
    with pytest.raises(RuntimeError, match="no_such"):
        growing.point("components", {"no_such": 1}, steps=1)


def test_the_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(growing, "RESULTS", tmp_path)
    y = {"build_seconds": [1.0, 2.0], "build_bytes": [1, 2]}
    curves = {"x": [1, 2], "y": y, "slopes": {"build_seconds": 1.0, "build_bytes": None}}
    assert growing.draw({"blocks": {"curves": curves}, "processes": {}}).read_text().count("</svg>") == 1
