"""
Do mixture weights that were searched on MAD tasks choose the hybrid that is best on text, and are they close to
weights that were searched on that text?

Components, pairs, seeds and the ground truth are those of `benchmarks/regret.py`: the test losses of all 8 fine-tuned
hybrids, and the weights that its gradient strategies found on text, are read from its work folder (run it first; pairs
and seeds that are not finished there are left out). For each of them `program` runs on the same calibrated supernets:
on in-context recall, and on a weighted set of three tasks (recall, copying, facts: the cheapest three). Reported after
100 and 200 steps: rank and regret of the argmax, the distance of the weights to those of the text searches (mean over
blocks of half the L1 distance: 0 equal, 1 disjoint), the share of blocks with the same argmax, and the test loss of
the calibrated supernet with these weights, untrained. The searches on text stand beside it, and a random choice
(expected rank and regret) with uniform weights (their distance, the loss of the supernet).

Finished units are kept in the work folder, so a killed run goes on. `--choices FILE` writes the choices in the form
that `benchmarks/regret.py --choices` adds to its table.
"""

import argparse
import copy
import json
import math
import time
from collections import Counter
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from statistics import mean, variance

import torch
from _components import TIME_NOTE, Shape, Store, Workshop, loss_of, work_folder
from _shared import quiet, shown, summary, write
from regret import BLOCKS, CHOICES, PAIRS, TUNED, judged

from modeling_manticore import ManticoreForCausalLM, calibrate, program


STEPS = (100, 200)
BATCH, LENGTH, ROWS = 8, 64, 1600
RECALL = {"in-context-recall": 1.0}
THREE = {"in-context-recall": 2.0, "selective-copying": 1.0, "memorization": 1.0}
SETTINGS = {
    "in-context-recall": {"sequence_length": LENGTH},
    "selective-copying": {"sequence_length": LENGTH, "copies": 16},
    "memorization": {"sequence_length": 32},
}
VARIANTS = {  # name: (tasks, learning rate of the mixture, whether the components train)
    "recall": (RECALL, 0.1, False),
    "recall, slow mixture": (RECALL, 0.01, False),
    "recall, components train": (RECALL, 0.1, True),
    "three tasks": (THREE, 0.1, False),
    "three tasks, slow mixture": (THREE, 0.01, False),
    "three tasks, components train": (THREE, 0.1, True),
}
TEXT = ("joint, routed", "darts, routed")
SEARCHED, RANDOM = "joint, routed on text, 200 steps", "random, uniform"


class Truth:
    """What the work folder of `benchmarks/regret.py` has for components of one shape."""

    def __init__(self, store: Store, shape: Shape, tokens: int):
        self.units = {"fine_tuned": [], "trajectory": []}
        for kind, units in self.units.items():
            for file in sorted((store.folder / kind).glob("*.json")):
                unit = json.loads(file.read_text())
                settings = unit["settings"]
                if settings["shape"] == asdict(shape) and settings["tokens"] == tokens:
                    units.append((settings, unit["result"]))

    def rate(self, pair: str) -> float | None:
        """The learning rate of fine-tuning that `regret.py` chose: the lowest mean search loss on seed 0."""
        by_rate: dict = {}
        for settings, result in self.units["fine_tuned"]:
            if (settings["pair"], settings["seed"], settings["repeat"]) == (pair, 0, 0) and settings[
                "choice"
            ] in TUNED:
                by_rate.setdefault(settings["rate"], []).append(result["search"])
        means = {rate: mean(losses) for rate, losses in by_rate.items() if len(losses) == len(TUNED)}
        return min(means, key=means.get, default=None)

    def losses(self, pair: str, seed: int) -> dict[str, float] | None:
        """Test loss of all hybrids after fine-tuning, or None if some are missing."""
        found = {}
        for settings, result in self.units["fine_tuned"]:
            key = settings["pair"], settings["seed"], settings["repeat"], settings["rate"]
            if key == (pair, seed, 0, self.rate(pair)):
                found["".join(map(str, settings["choice"]))] = result["test"]
        return found if len(found) == len(CHOICES) else None

    def noise(self, pair: str) -> float:
        """Standard deviation over the order of the fine-tuning rows, from the hybrids that were repeated."""
        groups: dict = {}
        for settings, result in self.units["fine_tuned"]:
            if (settings["pair"], settings["rate"]) == (pair, self.rate(pair)):
                groups.setdefault((settings["seed"], *settings["choice"]), []).append(result["test"])
        spreads = [variance(losses) for losses in groups.values() if len(losses) > 1]
        return math.sqrt(mean(spreads)) if spreads else 0.0

    def text_weights(self, pair: str, seed: int, name: str) -> list[dict]:
        """Snapshots of a search on text at the mixture rate that most runs have; seconds with calibration."""
        strategy, gate = name.rsplit(", ", 1)
        same = [(s, r) for s, r in self.units["trajectory"] if (s["strategy"], s["gate"]) == (strategy, gate)]
        rates = Counter(s["mixture_rate"] for s, _ in same)
        own = [(s, r) for s, r in same if (s["pair"], s["seed"]) == (pair, seed)]
        found = max(own, key=lambda unit: rates[unit[0]["mixture_rate"]], default=None)
        if found is None:
            return []
        return [s | {"seconds": s["seconds"] + found[1]["calibration_seconds"]} for s in found[1]["snapshots"]]


class Programs:
    """Programming runs on the supernets of one work folder, each in the store."""

    def __init__(self, given: argparse.Namespace):
        self.given = given
        self.shape = Shape(**given.shape)
        self.store = Store(work_folder(given.work, "small_components"))
        self.workshop = Workshop(self.shape, self.store)
        self._supernets: dict = {}

    def supernet(self, pair: str, seed: int) -> tuple[ManticoreForCausalLM, float]:
        """A copy of the calibrated supernet at uniform weights, and the CPU seconds of its calibration."""
        if (pair, seed) not in self._supernets:
            folders = self.workshop.components(PAIRS[pair], seed)
            model = ManticoreForCausalLM.from_components(folders, num_blocks=BLOCKS, gate="routed")
            started = time.process_time()
            calibrate(model, self.workshop.mixed("train", self.given.calibration_rows, 100 + seed), progress=False)
            self._supernets = {(pair, seed): (model, time.process_time() - started)}
        model, seconds = self._supernets[pair, seed]
        return copy.deepcopy(model), seconds

    def programmed(self, name: str, pair: str, seed: int) -> dict:
        """Weights after some of the steps, accuracy on the tasks, and CPU seconds of the whole."""
        tasks, mixture_rate, train_components = VARIANTS[name]

        def make() -> dict:
            model, calibration = self.supernet(pair, seed)
            report = program(
                model,
                tasks,
                settings={task: SETTINGS[task] for task in tasks},
                steps=max(self.given.steps),
                batch_size=BATCH,
                rows=ROWS,
                validation_rows=128,
                learning_rate=self.given.rate,
                mixture_learning_rate=mixture_rate,
                train_components=train_components,
                eval_steps=max(self.given.steps),
                seed=seed,
                progress=False,
                lr_scheduler_type="constant",
                logging_steps=min(self.given.steps),
            )
            course = {
                step: [[dict(points)[step] for _, points in sorted(report.course[b].items())] for b in range(BLOCKS)]
                for step in self.given.steps
            }
            seconds = {"calibration_seconds": calibration, "program_seconds": report.processor_seconds}
            return {"weights": course, "metrics": report.metrics} | seconds

        settings = {"shape": asdict(self.shape), "pair": pair, "seed": seed, "variant": name, "tasks": tasks}
        settings |= {"calibration_rows": self.given.calibration_rows, "steps": self.given.steps, "batch": BATCH}
        settings |= {"rate": self.given.rate, "mixture_rate": mixture_rate, "settings": SETTINGS}
        found = self.store.once("programmed", settings, make)
        return found | {"weights": {int(step): weights for step, weights in found["weights"].items()}}

    def loss_on_text(self, pair: str, seed: int, weights: list[list[float]]) -> float:
        """Test loss of the calibrated supernet with these mixture weights, nats."""

        def make() -> dict:
            model, _ = self.supernet(pair, seed)
            model.set_mixture_weights(weights)
            return {"loss": loss_of(model, self.workshop.mixed("test", 256))}

        settings = {"shape": asdict(self.shape), "pair": pair, "seed": seed, "weights": weights}
        settings |= {"calibration_rows": self.given.calibration_rows, "test_rows": 256}
        return self.store.once("weights_on_text", settings, make)["loss"]


def distance(first: list[list[float]], second: list[list[float]]) -> list[float]:
    """Of every block, half the L1 distance between two points of the simplex."""
    return [sum(abs(a - b) for a, b in zip(*points)) / 2 for points in zip(first, second)]


def agreement(first: list[list[float]], second: list[list[float]]) -> float:
    """The share of blocks with the same argmax."""
    return mean(argmax(a) == argmax(b) for a, b in zip(first, second))


def argmax(point: list[float]) -> int:
    """Index of the largest weight."""
    return point.index(max(point))


def measured(programs: Programs, truth: Truth, pair: str, seed: int) -> dict:
    """Rows of one pair and seed: every variant of `program`, every search on text, at every step."""
    losses, tie = truth.losses(pair, seed), 2 * truth.noise(pair)
    text = {}
    for name in TEXT:
        for snapshot in truth.text_weights(pair, seed, name):
            text[f"{name} on text, {snapshot['steps']} steps"] = snapshot["weights"], snapshot["seconds"]
    own = {}
    for name in VARIANTS:
        found = programs.programmed(name, pair, seed)
        for step, weights in found["weights"].items():
            share = found["program_seconds"] * step / max(found["weights"])
            own[f"mad {name}, {step} steps"] = weights, found["calibration_seconds"] + share
    rows = {}
    for name, (weights, seconds) in (own | text).items():
        rows[name] = judged(losses, tie, [argmax(point) for point in weights]) | {
            "seconds": seconds,
            "weights": weights,
            "supernet_loss": programs.loss_on_text(pair, seed, weights),
        }
        # Against the searches on text at their last step, but not against itself.
        ends = {key.split(" on ")[0]: value[0] for key, value in text.items()}
        for key, end in ends.items():
            if not name.startswith(key):
                blocks = distance(weights, end)
                rows[name] |= {f"to {key}": mean(blocks), f"to {key}, blocks": blocks}
                rows[name][f"agrees with {key}"] = agreement(weights, end)
    uniform = [[0.5, 0.5]] * BLOCKS
    random = [judged(losses, tie, choice) for choice in CHOICES]
    rows[RANDOM] = {key: mean(row[key] for row in random) for key in ("rank", "regret")}
    rows[RANDOM] |= {"seconds": 0.0, "supernet_loss": programs.loss_on_text(pair, seed, uniform)}
    rows[RANDOM] |= {f"agrees with {key}": 0.5 for key in ends} | {
        f"to {key}": mean(distance(uniform, end)) for key, end in ends.items()
    }
    return {"pair": pair, "seed": seed, "truth": losses, "tie": tie, "rows": rows}


def table_of(runs: list[dict]) -> dict:
    """Means and intervals over pairs and seeds, printed."""
    names = list(dict.fromkeys(name for run in runs for name in run["rows"]))
    texts = [name.split(",")[0] for name in TEXT]
    columns = [
        "rank",
        "regret",
        "seconds",
        "supernet_loss",
        *(f"to {name}" for name in TEXT),
        *(f"agrees with {n}" for n in TEXT),
    ]
    heads = [
        "rank of 8",
        "regret, nats",
        "CPU seconds",
        "supernet loss",
        *(f"to {t}" for t in texts),
        *(f"agrees {t}" for t in texts),
    ]
    print(f"\n{len(runs)} runs (pairs x seeds); mean +- 95 % interval over them")
    print(f"{'':<44}" + "".join(f"{head:>18}" for head in heads))
    table = {}
    for name in names:
        rows = [run["rows"][name] for run in runs if name in run["rows"]]
        table[name] = {"runs": len(rows)}
        cells = []
        for column in columns:
            values = [row[column] for row in rows if column in row]
            if values:
                table[name][column] = summary(values)
            cells.append(shown(values) if values else "-")
        print(f"{name:<44}" + "".join(f"{cell:>18}" for cell in cells))
    return table


def against(rival: str, runs: list[dict]) -> dict:
    """Regret of each variant minus that of another row, over runs (below 0 is better), and the most it is."""
    found = {}
    for name in (f"mad {variant}, {step} steps" for variant in VARIANTS for step in STEPS):
        rows = [(run["rows"][name], run["rows"][rival]) for run in runs if {name, rival} <= run["rows"].keys()]
        if rows:
            differences = [own["regret"] - other["regret"] for own, other in rows]
            found[name] = summary(differences) | {"most": max(differences)}
    return found


def between_seeds(runs: list[dict]) -> dict:
    """Distance of the weights of one variant between two seeds of one pair: what chance alone makes."""
    found = {}
    for name in dict.fromkeys(name for run in runs for name in run["rows"] if "weights" in run["rows"][name]):
        values = [
            mean(distance(a["rows"][name]["weights"], b["rows"][name]["weights"]))
            for a, b in combinations(runs, 2)
            if a["pair"] == b["pair"] and name in a["rows"] and name in b["rows"]
        ]
        if values:
            found[name] = summary(values) if len(values) < 11 else {"mean": mean(values), "values": values}
    return found


def main() -> None:
    """Print the table and write `results/programming.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=160_000, help="of fine-tuning a hybrid, as in regret.py")
    parser.add_argument("--rate", type=float, default=3e-3, help="of stems, heads, projectors (and components)")
    parser.add_argument("--work", help="folder of finished units (default: that of regret.py)")
    parser.add_argument("--choices", help="JSON file to write for regret.py")
    parser.add_argument("--quick", action="store_true", help="a smoke test on what `regret.py --quick` left")
    given = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    given.shape, given.steps, given.calibration_rows, name = {}, list(STEPS), 512, "programming"
    if given.quick:
        given.shape, name = {"width": 32, "layers": 3, "component_tokens": 20_000}, "programming_quick"
        given.seeds, given.tokens, given.calibration_rows = 1, 4_000, 64
    programs = Programs(given)
    truth = Truth(programs.store, programs.shape, given.tokens)
    wanted = [(pair, seed) for seed in range(given.seeds) for pair in PAIRS]
    known = [run for run in wanted if truth.losses(*run) is not None]
    if not known:
        raise SystemExit(f"no ground truth in {programs.store.folder}: run benchmarks/regret.py first")
    runs = [measured(programs, truth, *run) for run in known]
    table = table_of(runs)
    settings = {key: value for key, value in vars(given).items() if key not in ("work", "choices")}
    results = {"settings": settings | {"shape": asdict(programs.shape)}, "seconds_are": TIME_NOTE}
    results |= {"variants": VARIANTS, "task_settings": SETTINGS, "table": table, "missing": len(wanted) - len(known)}
    results |= {"regret_minus_random": against(RANDOM, runs), "regret_minus_searched": against(SEARCHED, runs)}
    results |= {"between_seeds": between_seeds(runs), "runs": runs}
    write(name, results)
    if given.choices:
        last = f", {max(STEPS)} steps"
        entries = [
            {"strategy": name.removesuffix(last), "pair": run["pair"], "seed": run["seed"]}
            | {key: row[key] for key in ("choice", "seconds")}
            for run in runs
            for name, row in run["rows"].items()
            if name.startswith("mad ") and name.endswith(last)
        ]
        Path(given.choices).write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
