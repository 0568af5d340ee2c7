"""
Real weights (E7): SmolLM2-135M with layer 15, or layers 10, 15 and 20, given a Mamba-2 in place of their attention.

The layer's norms and MLP are kept; the Mamba-2 is fitted to the attention's output on the teacher's own states, then
the whole model is trained end to end on a few tokens, for several seeds of that step. Beside it, with the same tokens
and learning rate: the teacher continued, the same layers dropped, the same layers replaced by a closed-form linear map
(which may change in the end-to-end step), and the same layers without their attention, but with their MLP. Loss on
held-out Bible and Shakespeare, which are surely in SmolLM2's own training, and on a changelog newer than it. The share
of the gap is (dropped - hybrid) / (dropped - teacher), in nats, all three trained with the same tokens, or none of
them trained.

Every finished unit is a line of benchmarks/results/real_weights.jsonl, which is committed, and is not run again.
Fitted mixers and linear maps stay in the work folder (`--work`): where it is gone, they are fitted anew as soon as a
unit that needs them is missing. A fit that is stopped goes on from its last checkpoint.
"""

import argparse
import json
import math
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import torch
from _components import work_folder
from _ledger import Ledger
from _real_weights_data import NOTES, TEXTS
from _real_weights_fit import OutOfTime
from _real_weights_units import PRESETS, VARIANTS, Bench, Preset, Unit, do, estimate, units
from _shared import RESULTS, quiet, shown, summary, versions, write


STAGES = ("before", "after")


class Run:
    """What is missing of a preset, done in order until it is done or the time is over."""

    def __init__(self, preset: Preset, ledger: Ledger, bench: Bench, workers: int, minutes: float | None):
        self.preset, self.ledger, self.bench, self.workers = preset, ledger, bench, workers
        self.until = float("inf") if minutes is None else time.monotonic() + 60 * minutes
        self.made_by = versions("torch", "transformers")

    def missing(self) -> list[Unit]:
        """Units without a line in the ledger; the fit also where its files are gone and something needs them."""
        left = [unit for unit in units(self.preset) if self.ledger.find(unit.settings(self.preset)) is None]
        needed = any(unit.variant == "mamba2" for unit in left) and not self.bench.is_fitted()
        return left if Unit("fit") in left or not needed else [Unit("fit"), *left]

    def all(self) -> bool:
        """Do what is missing; whether everything is done now."""
        todo = self.missing()
        if todo and todo[0].kind == "fit":
            todo.pop(0)
            try:
                self._fit()
            except OutOfTime as stopped:
                print(f"{stopped}: the next run goes on from there.")
                return False
        if self.workers == 1:
            for unit in todo:
                if not self._fits(unit):
                    return False
                self._record(unit, *do(unit, self.bench.folder, self.preset, 1, self.bench))
            return True
        return self._in_processes(todo)

    def _fit(self) -> None:
        torch.set_num_threads(self.workers)
        result = self.bench.fit(lambda: time.monotonic() > self.until)
        unit = Unit("fit")
        if self.ledger.find(unit.settings(self.preset)) is None:
            self._record(unit, result, result.pop("seconds"))

    def _in_processes(self, todo: list[Unit]) -> bool:
        waiting, running, complete = list(todo), {}, True
        with ProcessPoolExecutor(self.workers, mp_context=get_context("spawn")) as pool:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    if not self._fits(waiting[0]):
                        waiting, complete = [], False
                        break
                    unit = waiting.pop(0)
                    running[pool.submit(do, unit, self.bench.folder, self.preset, 1)] = unit
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    self._record(running.pop(future), *future.result())
        return complete

    def _fits(self, unit: Unit) -> bool:
        """Whether a unit can be expected to end in time."""
        seconds = estimate(unit, self.preset, self.ledger)
        if time.monotonic() + seconds <= self.until:
            return True
        print(f"{unit} takes about {seconds / 60:.0f} minutes, too long for what is left: stopped before it.")
        return False

    def _record(self, unit: Unit, result: dict, seconds: dict) -> None:
        self.ledger.add(unit.settings(self.preset), result, seconds, self.made_by)
        losses = "  ".join(f"{name} {entry['loss']:.3f}" for name, entry in result.get("texts", {}).items())
        told = losses or "  ".join(f"layer {layer} R2 {r2:.3f}" for layer, r2 in result["explained"].items())
        print(f"{seconds['cpu']:7.0f} s  {unit}  {told}", flush=True)


def losses_of(preset: Preset, ledger: Ledger) -> dict:
    """(variant, layers, stage) -> text -> losses, one a seed; "all" is the mean of the texts."""
    found: dict = {}
    for unit in units(preset)[1:]:
        texts = ledger.find(unit.settings(preset))["result"]["texts"]
        one = {name: texts[name]["loss"] for name in TEXTS} | {"all": mean(texts[name]["loss"] for name in TEXTS)}
        kept = found.setdefault((unit.variant, unit.layers, STAGES[unit.seed is not None]), {})
        for name, loss in one.items():
            kept.setdefault(name, []).append(loss)
    return found


def share_of_gap(dropped: list[float], own: list[float], teacher: list[float]) -> list[float]:
    """(dropped - own) / (dropped - teacher), seed by seed: 0 where dropping would do as well, 1 at the teacher."""
    return [(d - o) / (d - t) for d, o, t in zip(dropped, own, teacher, strict=True)]


def table_of(preset: Preset, ledger: Ledger) -> dict:
    """Losses, shares of the gap, cache and parameters, for each set of layers."""
    losses, table = losses_of(preset, ledger), {}
    for layers in preset.replaced:
        entry: dict = {"loss": {}, "perplexity": {}, "share": {}, "gain_over": {}}
        for stage in STAGES:
            rows = {v: losses[v, () if v == "teacher" else layers, stage] for v in VARIANTS}
            entry["loss"][stage] = {v: {text: summary(x) for text, x in row.items()} for v, row in rows.items()}
            entry["perplexity"][stage] = {
                v: {text: summary([math.exp(loss) for loss in row[text]]) for text in TEXTS} for v, row in rows.items()
            }
            entry["share"][stage] = {
                v: {t: summary(share_of_gap(rows["dropped"][t], rows[v][t], rows["teacher"][t])) for t in rows[v]}
                for v in VARIANTS[2:]
            }
            entry["gain_over"][stage] = {
                v: {t: _gain(rows[v][t], rows["mamba2"][t]) for t in rows[v]} for v in VARIANTS[2:-1]
            }
        facts = {v: _facts(preset, ledger, v, () if v == "teacher" else layers) for v in VARIANTS}
        entry["parameters"] = {v: fact["parameters"] for v, fact in facts.items()}
        entry["cache_bytes_per_token"] = {v: fact["cache_bytes_per_token"] for v, fact in facts.items()}
        whole = entry["cache_bytes_per_token"]["teacher"]
        entry["cache_saved"] = 1 - entry["cache_bytes_per_token"]["mamba2"] / whole
        table["+".join(map(str, layers))] = entry
    return table


def _gain(other: list[float], own: list[float]) -> dict:
    """Nats by which a hybrid is better than another variant, paired by seed, with the lower end of the interval."""
    found = summary([x - y for x, y in zip(other, own, strict=True)])
    return found | {"low": None if found["half_width"] is None else found["mean"] - found["half_width"]}


def _facts(preset: Preset, ledger: Ledger, variant: str, layers: tuple[int, ...]) -> dict:
    return ledger.find(Unit("evaluate", variant, layers).settings(preset))["result"]


def report(name: str, preset: Preset, ledger: Ledger) -> dict:
    """Print the tables of a finished preset; what `results/real_weights.json` holds."""
    table = table_of(preset, ledger)
    for layers, entry in table.items():
        for stage in STAGES:
            print(f"\nlayers {layers}, {stage} the end-to-end step: perplexity, mean loss in nats, share of the gap")
            for variant in VARIANTS:
                cells = [f"{text} {shown(entry['perplexity'][stage][variant][text]['values'])}" for text in TEXTS]
                cells += [f"loss {shown(entry['loss'][stage][variant]['all']['values'])}"]
                share = entry["share"][stage].get(variant)
                cells += [f"share {shown(share['all']['values'])}"] if share else []
                print(f"  {variant:12} " + "  ".join(cells))
        for variant, gain in entry["gain_over"]["after"].items():
            print(f"  mamba2 better than {variant} by {shown(gain['all']['values'])} nats after the step")
        print(f"  key-value bytes saved: {entry['cache_saved']:.1%}")
    lines = [(unit, ledger.find(unit.settings(preset))) for unit in units(preset)]
    seconds = {kind: sum(line["seconds"][kind] for _, line in lines) for kind in ("cpu", "wall")}
    fit = lines[0][1]["result"]
    return {"preset": name, "settings": asdict(preset), "notes": NOTES, "table": table, "fit": fit, "seconds": seconds}


def plan(preset: Preset, ledger: Ledger, run: Run) -> None:
    """Print what is to be done and how long it takes."""
    todo, total = run.missing(), 0.0
    for unit in units(preset):
        seconds = estimate(unit, preset, ledger) if unit in todo else 0.0
        total += seconds
        print(f"{seconds / 60:7.1f} min  {unit}" + ("" if unit in todo else "  (done)"))
    hours = total / 3600
    print(f"{hours:.1f} CPU hours to go, about {hours / run.workers:.1f} hours with {run.workers} worker(s)")


def main() -> None:
    """Do what is missing; once all is there, print the tables and write `results/real_weights.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        default="short",
        help="full: the tokens of the protocol, hours; short: a fraction of them; smoke: too few to say anything",
    )
    parser.add_argument("--minutes", type=float, help="start nothing that is not expected to end in so many minutes")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side (threads of the fit)")
    parser.add_argument("--work", help="folder of downloads, fits and maps (default: in the cache folder)")
    parser.add_argument("--ledger", help="file of finished units (default: benchmarks/results/real_weights.jsonl)")
    parser.add_argument("--dry_run", action="store_true", help="print the plan with estimated hours, and do nothing")
    given = parser.parse_args()
    if given.workers < 1 or (given.minutes is not None and not given.minutes > 0):
        parser.error(f"workers, minutes: got {given.workers}, {given.minutes}, allowed are at least 1, above 0")
    quiet()
    preset, ledger = PRESETS[given.preset], Ledger(given.ledger or RESULTS / "real_weights.jsonl")
    folder = work_folder(given.work, "real_weights")
    if given.dry_run:
        fit_files = Bench(folder, preset, folder, {})  # reads nothing
        plan(preset, ledger, Run(preset, ledger, fit_files, given.workers, None))
        return
    torch.set_num_threads(given.workers)
    if not Run(preset, ledger, Bench(folder, preset), given.workers, given.minutes).all():
        return
    results = report(given.preset, preset, ledger)
    written = RESULTS / "real_weights.json"
    full = written.is_file() and json.loads(written.read_text())["preset"] == "full"
    if given.ledger is None and (given.preset == "full" or not full):
        write("real_weights", results)
    elif given.ledger is not None:
        Path(given.ledger).with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
