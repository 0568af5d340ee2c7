"""What `benchmarks/scan.py` measures with: turns, ratios, the plain loop, and that each variant runs its own scan."""

import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from test_scan import inputs, ours, plain, worst

from modeling_manticore import scan_manticore


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import _scan_timing  # noqa: E402
import scan  # noqa: E402


def test_turns_and_budget():
    calls = []
    runs = {
        "cheap": lambda: calls.append("cheap"),
        "dear": lambda: (calls.append("dear"), time.sleep(0.02)),
    }
    seconds = _scan_timing.take_turns(runs, rounds=9, budget=0.05, least=2)["wall"]
    assert len(seconds["cheap"]) == calls.count("cheap") == 9
    assert 2 <= len(seconds["dear"]) == calls.count("dear") <= 3
    assert calls[:2] != calls[2:4] or calls[2:4] != calls[4:6]  # the order changes
    assert len(_scan_timing.take_turns(runs, rounds=4, budget=0.0, least=4)["wall"]["dear"]) == 4


def test_ratios():
    found = _scan_timing.ratio([2.0, 4.0, 6.0, 100.0], [1.0, 2.0, 2.0])
    assert found["median"] == 2.0 and found["rounds"] == 3 and found["interval"] == [2.0, 3.0]
    assert _scan_timing.half_width(found) == 0.5 and _scan_timing.shown(found) == "2.00 [2.00, 3.00]"


def test_the_plain_loop_is_the_recurrence():
    given = inputs(9)
    given["initial_state"] = torch.zeros_like(given["initial_state"])
    own = {name: value for name, value in given.items() if name != "initial_state"}
    found = scan.plain_scan(**own, delta_softplus=True, return_last_state=True)
    assert worst(found, plain(**given)) < 1e-13 and worst(ours(given), found) < 1e-13


def test_gradients_and_gradcheck(monkeypatch):
    monkeypatch.setitem(scan.SHAPES, "tiny", {"hidden_size": 16, "num_hidden_layers": 2})
    found = scan.gradients("tiny", scan.Setting(2, 20, 1), Namespace())
    assert found["met"] and 0 < found["worst"] < 1e-5 and any("A_log" in name for name in found["errors"])
    assert scan.gradcheck()


def test_each_variant_runs_its_own_scan(monkeypatch):
    pytest.importorskip("mambapy")
    monkeypatch.setitem(scan.SHAPES, "tiny", {"hidden_size": 16, "num_hidden_layers": 1})
    calls = []
    import mambapy.pscan

    for name, module, function in (("ours", scan_manticore, "selective_scan"), ("mambapy", mambapy.pscan, "pscan")):
        plain_function = getattr(module, function)
        monkeypatch.setattr(
            module, function, lambda *a, _name=name, _f=plain_function, **k: (calls.append(_name), _f(*a, **k))[1]
        )
    ids, logits = torch.arange(32)[None], {}
    for variant in scan.VARIANTS:
        del calls[:]
        with torch.no_grad():
            logits[variant] = scan.model_of("tiny", variant)(ids, use_cache=False).logits
        assert calls == {"stock": [], "mambapy": ["mambapy"]}.get(variant, ["ours"])
        torch.testing.assert_close(logits[variant], logits["ours"], atol=1e-5, rtol=0)


def test_a_setting_and_its_verdicts(monkeypatch, capsys):
    pytest.importorskip("mambapy")
    monkeypatch.setitem(scan.SHAPES, "tiny", {"hidden_size": 16, "num_hidden_layers": 1})
    setting, options = scan.Setting(1, 20, 0.01), Namespace(rounds=2, budget=1.0, least=2)
    found = scan.steps("tiny", setting, options)
    assert found["met"]["stock"] and set(found["step"]["wall"]["seconds"]) == set(scan.VARIANTS)
    assert not scan.steps("tiny", scan.Setting(1, 20, 1e6), options)["met"]["stock"]
    scan.report("steps", "tiny", setting, found)
    assert "times ours, 2 rounds" in capsys.readouterr().out
