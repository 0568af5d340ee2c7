"""The command line that `two_domains.py` and `three_components.py` share."""

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from _components import work_folder
from _domain_plan import Plan, Setting
from _domain_report import Report
from _domain_units import work
from _shared import RESULTS, opened_ledger, quiet, write

from modeling_manticore.experiments.units import Ledger, Unit, run_units


WORK = "domains"
# Of a rehearsal: everything in seconds, on text that needs no network. Its numbers mean nothing.
SMOKE: dict = {
    "domains": {"prose": ["topics"], "code": ["python"]},
    "characters": 60_000,
    "vocabulary": 300,
    "length": 32,
    "test_documents": 4,
    "document_characters": 100,
    "width": 32,
    "layers": 3,
    "state_size": 16,
    "component_tokens": {"gpt_neox": 512, "mamba2": 512, "llama": 512},
    "component_rows": 8,
    "extra_tokens": 6144,
    "rates": (1e-3, 3e-3),
    "calibration_rows": 4,
    "scored_rows": 4,
    "search_rows": 4,
    "beam": 2,
    "limit": 8,
}


def options(description: str, seeds: int) -> argparse.ArgumentParser:
    """The options of both scripts."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry_run", action="store_true", help="print what is to be done, and do nothing")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes; what is finished is kept")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--work", help="folder of records and weights (default: in the package's cache folder)")
    parser.add_argument("--results", default=str(RESULTS), help="folder of the finished units' lines and the JSON")
    parser.add_argument("--smoke", action="store_true", help="a rehearsal with tiny sizes and another results file")
    return parser


def run(
    name: str, given: argparse.Namespace, setting: Setting, plan_of: Callable[[Setting], Plan], others: tuple = ()
) -> bool:
    """
    Do what is left of a plan, print its table and write `NAME.json`.

    Args:
        others: names of scripts whose finished units count here too.

    Returns:
        whether all is done.
    """
    quiet()
    if given.smoke:
        setting, name = replace(setting, **SMOKE), f"{name}_smoke"
        others = tuple(f"{other}_smoke" for other in others)
    results = Path(given.results)
    lines = results / f"{name}.jsonl"
    ledger = opened_ledger(work_folder(given.work, WORK), lines, [results / f"{other}.jsonl" for other in others])
    plan = plan_of(setting)
    show_plan(plan, ledger, given.workers)
    if given.dry_run:
        return False
    done = run_units(plan, work, ledger, given.workers, given.minutes, _tell)
    report = Report(plan, ledger)
    print(report)
    if len(report.seeds) > 1:  # claims read intervals
        write(name, {"settings": asdict(setting), "complete": done} | report.results(), results)
    if not done:
        print("not all is done: start it again to go on")
    return done


def show_plan(plan: Plan, ledger: Ledger, workers: int) -> None:
    """Print how many units there are, how many are finished, and the hours of the rest."""
    rows = plan.estimate(ledger)
    print(f"{'units':<28}{'all':>6}{'finished':>10}{'hours left':>12}")
    for label, (count, finished, hours) in rows.items():
        print(f"{label:<28}{count:>6}{finished:>10}{hours:>12.2f}")
    count, finished, hours = map(sum, zip(*rows.values()))
    print(f"{'all':<28}{count:>6}{finished:>10}{hours:>12.2f}  hours of processor time left", flush=True)
    print(f"about {hours / workers:.1f} hours with {workers} workers on as many free cores", flush=True)


def _tell(unit: Unit, record: dict) -> None:
    told = {
        key: unit.settings[key]
        for key in ("seed", "rate", "domain", "kept", "weights", "choice")
        if key in unit.settings
    }
    told |= {key: record[key] for key in ("search", "choice") if key in record}
    print(f"{record['cpu_seconds']:7.1f} s  {unit.label:<24} {told}", flush=True)
