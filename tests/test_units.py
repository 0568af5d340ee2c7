"""Units of work that need each other's files: order, resuming from the repository's lines, deadlines, failures."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import modeling_manticore.experiments.units as units_module
from modeling_manticore.experiments.runner import RunFailed, _Workers
from modeling_manticore.experiments.units import Ledger, Unit, missing, run_units


def work(task):
    """Sums its own number and what its needs wrote; counts its runs in a file."""
    settings = task["settings"]
    if settings.get("fails"):
        raise RuntimeError("it fails")
    time.sleep(settings.get("seconds", 0))
    found = [int((Path(folder) / "sum.safetensors").read_text()) for folder in task["needs"].values()]
    total = settings["number"] + sum(found)
    with open(settings["log"], "a", encoding="utf-8") as log:
        log.write(f"{settings['number']}\n")
    if task["folder"] is not None:
        (Path(task["folder"]) / "sum.safetensors").write_text(str(total + settings.get("drift", 0)))
    return {"sum": total}


def chain(tmp_path, **changes):
    """1 <- 2 <- 3; only the first two leave files."""
    log = str(tmp_path / "log")
    first = Unit("sum", {"number": 1, "log": log} | changes, label="first", leaves_files=True)
    second = Unit("sum", {"number": 2, "log": log}, {"a": first}, label="second", leaves_files=True)
    return [first, second, Unit("sum", {"number": 3, "log": log}, {"b": second, "a": first}, label="third")]


def runs(tmp_path):
    file = tmp_path / "log"
    return file.read_text().split() if file.is_file() else []


def test_needs_come_first_and_nothing_runs_twice(tmp_path):
    units = chain(tmp_path)
    ledger = Ledger(tmp_path / "cache", tmp_path / "lines.jsonl")
    assert run_units(lambda ledger: [units[2]], work, ledger) is True
    assert runs(tmp_path) == ["1", "2", "3"]
    assert ledger.get(units[2])["sum"] == 3 + 1 + (2 + 1)
    assert run_units(lambda ledger: units, work, Ledger(tmp_path / "cache", tmp_path / "lines.jsonl")) is True
    assert runs(tmp_path) == ["1", "2", "3"]
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == ["first", "second", "third"]
    assert all(line["record"]["cpu_seconds"] >= 0 and line["record"]["versions"]["torch"] for line in lines)


def test_the_lines_alone_are_enough_and_files_that_are_gone_are_made_again(tmp_path):
    units = chain(tmp_path)
    run_units(lambda ledger: units[:2], work, Ledger(tmp_path / "cache", tmp_path / "lines.jsonl"))
    elsewhere = Ledger(tmp_path / "another", tmp_path / "lines.jsonl")
    assert run_units(lambda ledger: units[:2], work, elsewhere) is True
    assert runs(tmp_path) == ["1", "2"]
    assert run_units(lambda ledger: units, work, elsewhere) is True
    assert runs(tmp_path) == ["1", "2", "1", "2", "3"]
    # And the cache alone: a line that is lost comes back.
    (tmp_path / "lines.jsonl").unlink()
    again = Ledger(tmp_path / "cache", tmp_path / "lines.jsonl")
    assert again.get(units[0])["sum"] == 1 and "first" in (tmp_path / "lines.jsonl").read_text()


def test_files_without_a_line_are_made_again(tmp_path):
    units = chain(tmp_path)
    run_units(lambda ledger: units, work, Ledger(tmp_path / "cache", tmp_path / "lines.jsonl"))
    kept = tmp_path / "another" / "files"
    shutil.copytree(tmp_path / "cache" / "files", kept)
    assert run_units(lambda ledger: units, work, Ledger(kept.parent, tmp_path / "other.jsonl")) is True
    assert runs(tmp_path) == ["1", "2", "3"] * 2
    assert sorted(folder.name for folder in kept.iterdir()) == sorted(unit.digest for unit in units[:2])


def test_lines_of_another_script_count_and_stay_there(tmp_path):
    units = chain(tmp_path)
    run_units(lambda ledger: units[:1], work, Ledger(tmp_path / "cache", tmp_path / "first.jsonl"))
    ledger = Ledger(tmp_path / "another", tmp_path / "second.jsonl", [tmp_path / "first.jsonl"])
    run_units(lambda ledger: units[:1], work, ledger)
    assert runs(tmp_path) == ["1"] and not (tmp_path / "second.jsonl").exists()


def long_work(task):
    """Counts to three in its checkpoints' folder; dies the first time at two."""
    folder = Path(task["unfinished"])
    folder.mkdir(parents=True, exist_ok=True)
    count = len(list(folder.iterdir()))
    before = {"cpu": 100.0 * count, "wall": 200.0 * count}
    while count < 3:
        if task["settings"]["dies"] and count == 2:
            raise RuntimeError("killed")
        (folder / str(count)).write_text("")
        count += 1
    return {"count": count, "earlier_seconds": before}


def test_long_work_goes_on_from_its_checkpoints_which_then_go(tmp_path):
    ledger = Ledger(tmp_path / "cache", tmp_path / "lines.jsonl")
    settings = {"dies": True}
    unit = Unit("count", settings, label="long")
    with pytest.raises(RunFailed, match="long failed:[\\s\\S]*killed"):
        run_units(lambda ledger: [unit], long_work, ledger)
    assert len(list(ledger.unfinished(unit).iterdir())) == 2 and ledger.get(unit) is None
    settings["dies"] = False
    assert run_units(lambda ledger: [unit], long_work, ledger) is True
    record = ledger.get(unit)
    assert record["count"] == 3 and not ledger.unfinished(unit).exists() and "earlier_seconds" not in record
    assert 200 <= record["cpu_seconds"] < 300 and 400 <= record["wall_seconds"] < 500


def test_what_is_missing_is_told_with_what_it_needs(tmp_path):
    units = chain(tmp_path)
    ledger = Ledger(tmp_path / "cache", tmp_path / "lines.jsonl")
    assert missing([units[2]], ledger) == units
    run_units(lambda ledger: units, work, ledger)
    assert missing(units, ledger) == []
    lines = (tmp_path / "lines.jsonl").read_text().splitlines()
    (tmp_path / "lines.jsonl").write_text("\n".join(lines[:2]) + "\n")
    elsewhere = Ledger(tmp_path / "another", tmp_path / "lines.jsonl")
    assert missing([units[2]], elsewhere) == units  # records without files
    assert missing(units[:2], elsewhere) == []


def test_settings_and_needs_decide_the_digest_and_labels_do_not(tmp_path):
    first, second, third = chain(tmp_path)
    other = chain(tmp_path, drift=1)
    assert third.digest != other[2].digest and second.digest != other[1].digest
    assert Unit("sum", first.settings, label="other", estimate=9.0).digest == first.digest


@pytest.mark.parametrize("must_repeat", [False, True])
def test_files_that_come_out_differently_are_said_or_refused(must_repeat, tmp_path, capsys):
    first, *_ = chain(tmp_path)
    first = Unit("sum", first.settings, label="first", leaves_files=True, must_repeat=must_repeat)
    last = Unit("sum", {"number": 5, "log": str(tmp_path / "log")}, {"a": first})
    ledger = Ledger(tmp_path / "cache", tmp_path / "lines.jsonl")
    run_units(lambda ledger: [first], work, ledger)
    line = json.loads((tmp_path / "lines.jsonl").read_text())
    line["record"]["fingerprint"] = "of another machine"
    (tmp_path / "lines.jsonl").write_text(json.dumps(line) + "\n")
    ledger = Ledger(tmp_path / "another", tmp_path / "lines.jsonl")
    if must_repeat:
        with pytest.raises(RunFailed, match="cannot be continued here"):
            run_units(lambda ledger: [last], work, ledger)
        assert not ledger.files(first).exists()
    else:
        assert run_units(lambda ledger: [last], work, ledger) is True
        assert "of another machine" in capsys.readouterr().out
        assert ledger.get(first)["fingerprint"] == "of another machine"


def test_nothing_is_begun_that_would_not_be_finished(tmp_path):
    log = str(tmp_path / "log")
    slow = Unit("sum", {"number": 1, "log": log}, label="slow", estimate=3600.0)
    quick = Unit("sum", {"number": 2, "log": log}, label="quick", estimate=0.0)
    ledger = Ledger(tmp_path / "cache", tmp_path / "lines.jsonl")
    assert run_units(lambda ledger: [slow, quick], work, ledger, minutes=1.0) is False
    assert runs(tmp_path) == ["2"] and ledger.get(slow) is None
    assert ledger.seconds(slow) == 3600.0
    assert run_units(lambda ledger: [slow, quick], work, ledger) is True
    assert ledger.seconds(slow) == pytest.approx(ledger.get(slow)["cpu_seconds"])


def test_two_workers_stop_in_time_and_keep_what_is_finished(tmp_path, monkeypatch):
    log = str(tmp_path / "log")
    units = [
        Unit("sum", {"number": 1, "log": log, "seconds": 600}),
        Unit("sum", {"number": 2, "log": log}, leaves_files=True),
    ]
    ledger = Ledger(tmp_path / "cache", tmp_path / "lines.jsonl")
    finished = []
    # The clock is past the deadline as soon as one unit is finished, however long the processes take to start.
    monkeypatch.setattr(units_module.time, "monotonic", lambda: 7200.0 * len(finished))

    def tell(unit, record):
        finished.append(unit.digest)

    assert run_units(lambda ledger: units, work, ledger, workers=2, minutes=60, tell=tell) is False
    assert finished == [units[1].digest] and ledger.has(units[1]) and ledger.get(units[0]) is None


def test_a_failure_is_raised_after_the_rest_is_kept(tmp_path):
    log = str(tmp_path / "log")
    good = Unit("sum", {"number": 1, "log": log})
    bad = Unit("sum", {"number": 2, "log": log, "fails": True}, label="bad one")
    ledger = Ledger(tmp_path / "cache", tmp_path / "lines.jsonl")
    with pytest.raises(RunFailed, match="bad one failed(.|\n)*it fails"):
        run_units(lambda ledger: [good, bad], work, ledger)
    assert ledger.get(good) is not None and ledger.get(bad) is None
    assert not list((tmp_path / "cache").rglob(".unfinished-*"))


def test_bad_arguments_and_broken_lines(tmp_path):
    ledger = Ledger(tmp_path / "cache", tmp_path / "lines.jsonl")
    with pytest.raises(ValueError, match="workers: got 0"):
        run_units(lambda ledger: [], work, ledger, workers=0)
    with pytest.raises(ValueError, match="minutes: got 0"):
        run_units(lambda ledger: [], work, ledger, minutes=0)
    (tmp_path / "lines.jsonl").write_text('{"digest": "x"}\n')
    with pytest.raises(ValueError, match="line 1 is no finished unit"):
        Ledger(tmp_path / "cache", tmp_path / "lines.jsonl")


PARENT = """
import time
from types import SimpleNamespace
from modeling_manticore.experiments.runner import _Workers

if __name__ == "__main__":
    with _Workers(2, time.sleep) as workers:
        workers.submit(SimpleNamespace(settings=600))
        time.sleep(1)
        print(*(process.pid for process in workers._processes.values()), flush=True)
        time.sleep(600)
"""


def is_alive(process):
    try:
        return "State:\tZ" not in (process / "status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="it looks at processes in /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(tmp_path / "parent.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        workers = [Path("/proc", pid) for pid in parent.stdout.readline().split()]
        time.sleep(10)  # they import before they work
        assert len(workers) == 2 and all(map(is_alive, workers))
        parent.kill()
        deadline = time.monotonic() + 30
        while any(map(is_alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not any(map(is_alive, workers))


def test_idle_workers_end_by_themselves_and_those_in_a_run_are_stopped_in_it():
    with _Workers(2, time.sleep) as workers:
        workers.submit(SimpleNamespace(settings=600))
    assert sorted(process.exitcode for process in workers._processes.values()) == [-signal.SIGTERM, 0]
