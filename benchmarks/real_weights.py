"""
Real weights (E7): SmolLM2-135M with layer 15, or layers 10, 15 and 20, given a Mamba-2 in place of their attention.

The layer's norms and MLP are kept; the Mamba-2 is fitted to the attention's output on the teacher's own states, then
the whole model is trained end to end on a few tokens, for several seeds of that step. Beside it, with the same tokens
and learning rate: the teacher continued, the same layers dropped, the same layers replaced by a closed-form linear map
(which may change in the end-to-end step), and the same layers without their attention, but with their MLP. Loss on
held-out Bible and Shakespeare, which are surely in SmolLM2's own training, and on a changelog newer than it. The share
of the gap is (dropped - hybrid) / (dropped - teacher), in nats, all three trained with the same tokens, or none of
them trained.

Every finished unit is a line of benchmarks/results/real_weights.jsonl, which is committed, and is not run again. As
soon as the teacher, the dropped layers and the Mamba-2 are finished, real_weights_<preset>.json has their tables.
Weights, fitted mixers and linear maps stay in the work folder (`--work`): where it is gone, they are made anew as soon
as a unit that needs them is missing. A fit that is killed goes on from its last checkpoint.
"""

import argparse
import math
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from _components import work_folder
from _real_weights_data import NOTES, TEXTS
from _real_weights_units import PRESETS, VARIANTS, Preset, Units, work
from _shared import RESULTS, opened_ledger, parsed, quiet, shown, summary, write

from modeling_manticore.experiments.units import Ledger, Unit, missing, run_units


STAGES = ("before", "after")
COMPARED = ("teacher", "dropped", "mamba2")  # a share of the gap needs these; the others are beside it


def complete(preset: Preset, ledger: Ledger) -> tuple[str, ...]:
    """Variants of which every unit is finished."""
    units = {variant: Units(preset).all((variant,)) for variant in VARIANTS}
    return tuple(variant for variant in VARIANTS if all(ledger.get(unit) is not None for unit in units[variant]))


def losses_of(preset: Preset, ledger: Ledger, variants: tuple[str, ...]) -> dict:
    """(variant, layers, stage) -> text -> losses, one a seed; "all" is the mean of the texts."""
    found: dict = {}
    for unit in Units(preset).all(variants):
        if unit.kind != "measure":
            continue
        texts = ledger.get(unit)["texts"]
        one = {name: texts[name]["loss"] for name in TEXTS} | {"all": mean(texts[name]["loss"] for name in TEXTS)}
        stage = STAGES["seed" in unit.settings]
        kept = found.setdefault((unit.settings["variant"], tuple(unit.settings["layers"]), stage), {})
        for name, loss in one.items():
            kept.setdefault(name, []).append(loss)
    return found


def share_of_gap(dropped: list[float], own: list[float], teacher: list[float]) -> list[float]:
    """(dropped - own) / (dropped - teacher), seed by seed: 0 where dropping would do as well, 1 at the teacher."""
    return [(d - o) / (d - t) for d, o, t in zip(dropped, own, teacher, strict=True)]


def table_of(preset: Preset, ledger: Ledger, variants: tuple[str, ...]) -> dict:
    """Losses, shares of the gap, cache and parameters of finished variants, for each set of layers."""
    losses, units, table = losses_of(preset, ledger, variants), Units(preset), {}
    replacing = [variant for variant in variants if variant not in ("teacher", "dropped")]
    for layers in preset.replaced:
        entry: dict = {"loss": {}, "perplexity": {}, "share": {}, "gain_over": {}}
        for stage in STAGES:
            rows = {v: losses[v, () if v == "teacher" else layers, stage] for v in variants}
            entry["loss"][stage] = {v: {text: summary(x) for text, x in row.items()} for v, row in rows.items()}
            entry["perplexity"][stage] = {
                v: {text: summary([math.exp(loss) for loss in row[text]]) for text in TEXTS} for v, row in rows.items()
            }
            entry["share"][stage] = {
                v: {t: summary(share_of_gap(rows["dropped"][t], rows[v][t], rows["teacher"][t])) for t in rows[v]}
                for v in replacing
            }
            entry["gain_over"][stage] = {
                v: {t: _gain(rows[v][t], rows["mamba2"][t]) for t in rows[v]} for v in replacing if v != "mamba2"
            }
        facts = {v: ledger.get(units.measured(v, () if v == "teacher" else layers)) for v in variants}
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


def report(name: str, preset: Preset, ledger: Ledger, variants: tuple[str, ...]) -> dict:
    """Print the tables of a preset's finished variants; what `results/real_weights_<preset>.json` holds."""
    table = table_of(preset, ledger, variants)
    for layers, entry in table.items():
        for stage in STAGES:
            print(f"\nlayers {layers}, {stage} the end-to-end step: perplexity, mean loss in nats, share of the gap")
            for variant in variants:
                cells = [f"{text} {shown(entry['perplexity'][stage][variant][text]['values'])}" for text in TEXTS]
                cells += [f"loss {shown(entry['loss'][stage][variant]['all']['values'])}"]
                share = entry["share"][stage].get(variant)
                cells += [f"share {shown(share['all']['values'])}"] if share else []
                print(f"  {variant:12} " + "  ".join(cells))
        for variant, gain in entry["gain_over"]["after"].items():
            print(f"  mamba2 better than {variant} by {shown(gain['all']['values'])} nats after the step")
        print(f"  key-value bytes saved: {entry['cache_saved']:.1%}")
    units = Units(preset)
    records = [ledger.get(unit) for unit in units.all(variants)]
    seconds = {kind: sum(record[f"{kind}_seconds"] for record in records) for kind in ("cpu", "wall")}
    names = ("explained", "tokens", "parameters_of_a_mixer")
    fit = {name: ledger.get(units.fit)[name] for name in names}
    facts = {"preset": name, "settings": asdict(preset), "notes": NOTES, "unfinished": _without(variants)}
    return facts | {"table": table, "fit": fit, "seconds": seconds}


def _without(variants: tuple[str, ...]) -> list[str]:
    return [variant for variant in VARIANTS if variant not in variants]


def show_plan(units: list[Unit], ledger: Ledger, workers: int) -> None:
    """Print what is to be done and how long it takes."""
    todo = missing(units, ledger)
    for unit in todo:
        print(f"{ledger.seconds(unit) / 60:7.1f} min  {_named(unit)}")
    hours = sum(map(ledger.seconds, todo)) / 3600
    told = f"about {hours / workers:.1f} with {workers} workers"
    print(f"{len(todo)} units and {hours:.1f} hours of one processor to go, {told}", flush=True)


def _named(unit: Unit) -> str:
    layers, seed = unit.settings.get("layers", []), unit.settings.get("seed")
    words = [unit.settings.get("variant", unit.kind), "+".join(map(str, layers))]
    words += [] if seed is None else [f"trained end to end, seed {seed}"]
    return ", ".join(filter(None, words))


def _tell(unit: Unit, record: dict) -> None:
    losses = [f"{name} {entry['loss']:.3f}" for name, entry in record.get("texts", {}).items()]
    explained = [f"layer {layer} R2 {r2:.3f}" for layer, r2 in record.get("explained", {}).items()]
    print(f"{record['cpu_seconds']:7.0f} s  {_named(unit)}  " + "  ".join(losses + explained), flush=True)


def main(words: list[str] | None = None) -> bool:
    """Do what is missing, then print and write (`real_weights_<preset>.json`) the tables of what is finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        default="full",
        help="full: the tokens of the protocol, hours; short: a fraction of them; smoke: too few to say anything",
    )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="work on these only, for now"
    )
    parser.add_argument("--minutes", type=float, help="stop after so many minutes; what is finished is kept")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--work", help="folder of weights, fits and maps (default: in the package's cache folder)")
    parser.add_argument("--results", default=str(RESULTS), help="folder of the finished units' lines and the JSON")
    parser.add_argument("--dry_run", action="store_true", help="print what is to be done, and do nothing")
    given = parsed(parser, words)
    quiet()
    preset, results = PRESETS[given.preset], Path(given.results)
    ledger = opened_ledger(work_folder(given.work, "real_weights"), results / "real_weights.jsonl")
    units = Units(preset).all(tuple(given.variants))
    show_plan(units, ledger, given.workers)
    if given.dry_run:
        return False
    run_units(lambda ledger: units, work, ledger, given.workers, given.minutes, _tell)
    variants = complete(preset, ledger)
    if set(COMPARED) <= set(variants):
        write(f"real_weights_{given.preset}", report(given.preset, preset, ledger, variants), results)
    if unfinished := _without(variants):
        print(f"not all is done, {', '.join(unfinished)} to come: start it again to go on")
    return not unfinished


if __name__ == "__main__":
    main()
