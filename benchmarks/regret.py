"""
Does a search find the hybrid that is best after fine-tuning? All 8 discrete hybrids of two components and three
blocks are fine-tuned with one budget; every strategy's choice then has a rank among them and a regret in nats.

Three pairs of small trained components, several seeds. The learning rate of fine-tuning is tuned per pair on seed 0
(on the search split), the mixture's per gradient strategy and gate on seed 0 of the first pair (on the regret, which
favours these strategies). Hybrids closer than twice the seed noise of their fine-tuned loss are ties. Gradient
strategies run once for 400 steps; reported is the cheapest of 50, 100, 200, 400 at which the run's best rank is
reached, which nobody knows beforehand, and every step count beside it.

Finished units are kept in the work folder, so a killed run goes on and further seeds can be added. `--choices` adds
rows of strategies that ran elsewhere: a JSON list of {"strategy", "pair", "seed", "choice", "seconds"}, `pair` as in
the table, for components of `Workshop.components(PAIRS[pair], seed)`.
"""

import argparse
import copy
import itertools
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from statistics import mean, variance

import torch
from _components import TIME_NOTE, Shape, Store, Workshop, loss_of, train, work_folder
from _shared import quiet, shown, summary, write
from transformers import TrainerCallback

from modeling_manticore import HalvingOptions, ManticoreForCausalLM, calibrate, discretize, stitch
from modeling_manticore.search.mixture_kind import set_mixture_kind


PAIRS = {
    "gpt_neox(bible) mamba2(python)": [("gpt_neox", "bible"), ("mamba2", "python")],
    "gpt_neox(bible) gpt_neox(python)": [("gpt_neox", "bible"), ("gpt_neox", "python")],
    "llama(bible) mamba2(python)": [("llama", "bible"), ("mamba2", "python")],
}
BLOCKS = 3
CHOICES = [list(choice) for choice in itertools.product((0, 1), repeat=BLOCKS)]
TUNED = ([0, 0, 0], [1, 1, 1], [0, 1, 0])  # hybrids on which a pair's learning rate is chosen
REPEATED = ([0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 1, 0])  # hybrids whose fine-tuning is repeated for the noise
GATES = ("routed", "mixture")
GRADIENT = {
    "joint": ("softmax", {"strategy": "joint"}),
    "darts": ("softmax", {"strategy": "darts"}),
    "gaea on joint": ("simplex", {"strategy": "gaea"}),
    "gaea on darts": ("simplex", {"strategy": "gaea", "gaea_base": "darts"}),
    "dash": ("gumbel_softmax", {"strategy": "dash"}),
}
TRAINING_FREE = {  # name: (order of the bridges while scoring, halving)
    "stitch": ("parallel", False),
    "stitch in order": ("sequential", False),
    "stitch + halving": ("parallel", True),
    "stitch in order + halving": ("sequential", True),
}
RANK_TARGET, REGRET_TARGET, SECONDS_TARGET = 2, 0.02, 0.25


class Snapshots(TrainerCallback):
    """The argmax choice, the weights and the CPU seconds since this was made, after some of the steps."""

    def __init__(self, steps: list[int]):
        self.steps, self.found, self.began = steps, [], time.process_time()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            weights = [point.tolist() for point in model.mixture_weights()]
            self.found.append(
                {
                    "steps": state.global_step,
                    "choice": [point.index(max(point)) for point in weights],
                    "seconds": time.process_time() - self.began,
                    "weights": weights,
                }
            )


class Run:
    """One pair of components with one seed: what is measured of it, each in the store."""

    def __init__(self, workshop: Workshop, given: argparse.Namespace, pair: str, seed: int):
        self.workshop, self.store, self.given = workshop, workshop.store, given
        self.pair, self.seed = pair, seed
        self.same = {"shape": asdict(workshop.shape), "pair": pair, "seed": seed, "tokens": given.tokens}
        self.same |= {"calibration_rows": given.calibration_rows}
        self.calibration = workshop.mixed("train", given.calibration_rows, seed=100 + seed)
        self.scored = workshop.mixed("search", given.scored_rows, seed=0)
        self.test = workshop.mixed("test", given.test_rows, seed=0)
        self._supernets: dict = {}

    @property
    def folders(self) -> list[str]:
        return self.workshop.components(PAIRS[self.pair], self.seed)

    def supernet(self, gate: str) -> tuple[ManticoreForCausalLM, float]:
        """A copy of the calibrated supernet at uniform weights, and the CPU seconds that calibration took."""
        if gate not in self._supernets:
            model = ManticoreForCausalLM.from_components(self.folders, num_blocks=BLOCKS, gate=gate)
            started = time.process_time()
            calibrate(model, self.calibration, progress=False)
            self._supernets[gate] = model, time.process_time() - started
        model, seconds = self._supernets[gate]
        return copy.deepcopy(model), seconds

    def train_rows(self, order: int) -> torch.LongTensor:
        return self.workshop.mixed("train", self.given.train_rows, seed=200 + order)

    def fine_tuned(self, choice: list[int], rate: float, repeat: int = 0) -> dict:
        """Losses of a calibrated hybrid before and after fine-tuning, in an order of seed and repeat."""

        def make() -> dict:
            model, _ = self.supernet("routed")
            hybrid = discretize(model, choice, calibration=self.calibration, progress=False)
            before = loss_of(hybrid, self.test)
            started, order = time.process_time(), 10 * self.seed + repeat
            train(
                hybrid,
                self.train_rows(order),
                steps=round(self.given.tokens / (self.given.rows * self.workshop.shape.length)),
                rows_per_step=self.given.rows,
                learning_rate=rate,
                seed=order,
            )
            seconds = time.process_time() - started
            losses = {"test": loss_of(hybrid, self.test), "search": loss_of(hybrid, self.scored)}
            return losses | {"before": before, "seconds": seconds}

        settings = self.same | {"choice": choice, "rate": rate, "repeat": repeat, "rows": self.given.rows}
        return self.store.once("fine_tuned", settings, make)

    def training_free(self, name: str, rate: float) -> dict:
        """What a variant of `stitch` chooses, and its CPU seconds."""
        order, halving = TRAINING_FREE[name]

        def make() -> dict:
            model, _ = self.supernet("routed")
            options = HalvingOptions(
                tokens=self.given.tokens,
                train_texts=self.train_rows(10 * self.seed + 9),
                learning_rate=rate,
                batch_size=self.given.rows,
                seed=10 * self.seed + 9,
            )
            started = time.process_time()
            report = stitch(
                model,
                self.calibration,
                self.scored,
                order=order,
                halving=options if halving else False,
                progress=False,
            )
            seconds = time.process_time() - started
            scores = {"".join(map(str, c.choice)): [c.loss, c.tuned] for c in report.candidates}
            return {"choice": report.best.choice, "seconds": seconds, "scores": scores}

        settings = self.same | {"strategy": name, "rate": rate, "rows": self.given.rows}
        return self.store.once("training_free", settings | {"scored_rows": self.given.scored_rows}, make)

    def trajectory(self, name: str, gate: str, mixture_rate: float) -> dict:
        """Snapshots of one gradient search from the calibrated supernet."""
        kind, options = GRADIENT[name]
        alternating = "darts" in name

        def make() -> dict:
            model, calibration = self.supernet(gate)
            set_mixture_kind(model, kind)
            snapshots = Snapshots(self.given.steps)
            train(
                model,
                self.train_rows(10 * self.seed + 8),
                steps=max(self.given.steps),
                rows_per_step=self.given.search_rows_per_step,
                learning_rate=self.given.search_rate,
                seed=10 * self.seed + 8,
                schedule="constant",
                warmup=0.0,
                callbacks=[snapshots],
                search_rows=self.workshop.mixed("search", self.given.train_rows, 1) if alternating else None,
                stage="search",
                mixture_learning_rate=mixture_rate,
                **options,
            )
            return {"calibration_seconds": calibration, "snapshots": snapshots.found}

        settings = self.same | {"strategy": name, "gate": gate, "mixture_rate": mixture_rate}
        settings |= {
            "steps": self.given.steps,
            "rows": self.given.search_rows_per_step,
            "rate": self.given.search_rate,
        }
        return self.store.once("trajectory", settings, make)


def judged(truth: dict[str, float], tie: float, choice: list[int]) -> dict:
    """Rank (1 + the number of hybrids that are better by more than `tie`), and regret in nats."""
    loss = truth["".join(map(str, choice))]
    better = sum(other < loss - tie for other in truth.values())
    return {"choice": choice, "rank": 1 + better, "regret": loss - min(truth.values())}


def best_of_course(found: dict, truth: dict[str, float], tie: float) -> dict:
    """The cheapest snapshot at the best rank of a trajectory, and all of them; calibration's seconds are in all."""
    rows = [snapshot | judged(truth, tie, snapshot["choice"]) for snapshot in found["snapshots"]]
    rows = [row | {"seconds": row["seconds"] + found["calibration_seconds"]} for row in rows]
    return min(rows, key=lambda row: (row["rank"], row["steps"])) | {"course": rows}


class Benchmark:
    """All runs, what is tuned once, and the table."""

    def __init__(self, given: argparse.Namespace):
        shape = Shape(**given.shape)
        self.given = given
        self.workshop = Workshop(shape, Store(work_folder(given.work, "small_components")))
        self.pairs = list(PAIRS)[: given.pairs]
        self.rates, self.noise, self.mixture_rates = {}, {}, {}

    def run(self, pair: str, seed: int) -> Run:
        return Run(self.workshop, self.given, pair, seed)

    def tune(self, pair: str) -> None:
        """The learning rate of a pair, and the standard deviation over the order of its fine-tuning rows."""
        run = self.run(pair, 0)
        table = {
            rate: {"".join(map(str, c)): run.fine_tuned(c, rate)["search"] for c in TUNED} for rate in self.given.rates
        }
        self.rates[pair] = min(table, key=lambda rate: mean(table[rate].values()))
        own = {name: min(table, key=lambda rate: table[rate][name]) for name in next(iter(table.values()))}
        print(f"{pair}: learning rate {self.rates[pair]}, best of single hybrids {own}", flush=True)
        spreads = []
        for choice in REPEATED:
            repeats = range(self.given.repeats + 1)
            losses = [run.fine_tuned(choice, self.rates[pair], repeat)["test"] for repeat in repeats]
            spreads.append(variance(losses))
        self.noise[pair] = math.sqrt(mean(spreads))
        self.tuning = getattr(self, "tuning", {}) | {pair: {"search_loss_by_rate": table, "best_of_single": own}}

    def truth(self, pair: str, seed: int) -> dict[str, float]:
        """Test loss of all hybrids after fine-tuning."""
        run = self.run(pair, seed)
        return {"".join(map(str, c)): run.fine_tuned(c, self.rates[pair])["test"] for c in CHOICES}

    def tune_mixtures(self) -> None:
        """The mixture's learning rate of every gradient strategy under every gate, on seed 0 of the first pair."""
        pair = self.pairs[0]
        run, truth = self.run(pair, 0), self.truth(pair, 0)
        for name, gate in itertools.product(GRADIENT, GATES):
            rows = {
                rate: best_of_course(run.trajectory(name, gate, rate), truth, 2 * self.noise[pair])
                for rate in self.given.mixture_rates
            }
            keys = {rate: (r["rank"], r["course"][-1]["rank"], r["steps"], r["regret"]) for rate, r in rows.items()}
            self.mixture_rates[f"{name}, {gate}"] = min(keys, key=keys.get)

    def measured(self, pair: str, seed: int) -> dict:
        """Truth and every strategy's row of one run."""
        run, truth, tie = self.run(pair, seed), self.truth(pair, seed), 2 * self.noise[pair]
        rows = {}
        for name in TRAINING_FREE:
            found = run.training_free(name, self.rates[pair])
            rows[name] = judged(truth, tie, found["choice"]) | {"seconds": found["seconds"], "scores": found["scores"]}
        for name, gate in itertools.product(GRADIENT, GATES):
            key = f"{name}, {gate}"
            rows[key] = best_of_course(run.trajectory(name, gate, self.mixture_rates[key]), truth, tie)
        for entry in self.given.entries:
            if (entry["pair"], entry["seed"]) == (pair, seed):
                rows[entry["strategy"]] = judged(truth, tie, entry["choice"]) | {"seconds": entry["seconds"]}
        random = [judged(truth, tie, choice) for choice in CHOICES]
        rows["random (expected)"] = {"rank": mean(r["rank"] for r in random), "seconds": 0.0}
        rows["random (expected)"]["regret"] = mean(r["regret"] for r in random)
        for k, name in enumerate("AB"):
            rows[f"pure {name}"] = judged(truth, tie, [k] * BLOCKS) | {"seconds": 0.0}
        before = {"".join(map(str, c)): run.fine_tuned(c, self.rates[pair])["before"] for c in CHOICES}
        components = [json.loads((Path(f) / "trained.json").read_text())["losses"] for f in run.folders]
        return {
            "pair": pair,
            "seed": seed,
            "components": components,
            "truth": truth,
            "calibrated_before": before,
            "rows": rows,
        }

    def work(self) -> None:
        """Seed by seed; the table and the JSON after every seed."""
        runs = []
        for seed in range(self.given.seeds):
            for pair in self.pairs:
                if seed == 0:
                    self.tune(pair)
                    if pair == self.pairs[0]:
                        self.tune_mixtures()
                runs.append(self.measured(pair, seed))
                print(f"done: {pair}, seed {seed}", flush=True)
            self.report(runs)

    def report(self, runs: list[dict]) -> None:
        """Print and write what there is."""
        names = list(dict.fromkeys(name for found in runs for name in found["rows"]))
        table, by_pair = {}, {}
        names_of_columns = f"{'strategy':<26} {'rank of 8':>16} {'regret, nats':>18} {'CPU seconds':>18}"
        print(f"\n{names_of_columns}  rank, regret at {self.given.steps} steps")
        for name in names:
            rows = [found["rows"][name] for found in runs if name in found["rows"]]
            columns = {key: [row[key] for row in rows] for key in ("rank", "regret", "seconds")}
            table[name] = {key: summary(values) for key, values in columns.items()} | {"runs": len(rows)}
            table[name]["worst_rank"] = max(columns["rank"])
            cells = f"{shown(columns['rank']):>16} {shown(columns['regret']):>18} {shown(columns['seconds']):>18}"
            if "course" in rows[0]:
                table[name]["steps"] = [row["steps"] for row in rows]
                table[name]["at_steps"] = at = {
                    steps: {key: summary([row["course"][i][key] for row in rows]) for key in columns}
                    for i, steps in enumerate(self.given.steps)
                }
                cells += "  " + "  ".join(f"{v['rank']['mean']:.2f} {v['regret']['mean']:.3f}" for v in at.values())
            print(f"{name:<26} {cells}")
            for pair in self.pairs:
                own = [found["rows"][name] for found in runs if name in found["rows"] and found["pair"] == pair]
                if own:
                    keys = ("rank", "regret", "seconds")
                    by_pair.setdefault(pair, {})[name] = {key: summary([row[key] for row in own]) for key in keys}
        targets = self.targets(table)
        for name, verdict in targets.items():
            print(f"{name}: {verdict}")
        given = {key: value for key, value in vars(self.given).items() if key not in ("work", "entries", "quick")}
        tuned = {"learning_rate": self.rates, "mixture_learning_rate": self.mixture_rates, "tables": self.tuning}
        results = {"settings": given | {"shape": asdict(self.workshop.shape)}, "seconds_are": TIME_NOTE}
        results |= {"seed_noise": self.noise, "ties": "closer than 2 x seed_noise", "tuned_on_seed_0": tuned}
        results |= {"targets": targets, "table": table, "by_pair": by_pair, "runs": runs}
        if not self.given.quick:
            write("regret", results)

    def targets(self, table: dict) -> dict:
        """Each target with its figures and whether it is met."""
        gradient = {name: row for name, row in table.items() if "steps" in row}
        best = min(gradient, key=lambda name: (gradient[name]["rank"]["mean"], gradient[name]["regret"]["mean"]))
        found = {}
        for name in (*[name for name in TRAINING_FREE if "halving" in name], best):
            row = table[name]
            found[f"{name}: within the best {RANK_TARGET} of 8 in every run"] = {
                "worst_rank": row["worst_rank"],
                "mean_rank": row["rank"]["mean"],
                "met": row["worst_rank"] <= RANK_TARGET,
            }
            found[f"{name}: mean regret at most {REGRET_TARGET} nats"] = {
                "regret": row["regret"]["mean"],
                "met": row["regret"]["mean"] <= REGRET_TARGET,
            }
        cheapest = min(gradient, key=lambda name: gradient[name]["seconds"]["mean"])
        for name in [name for name in TRAINING_FREE if "halving" in name]:
            ratio = table[name]["seconds"]["mean"] / gradient[cheapest]["seconds"]["mean"]
            found[f"{name}: seconds over those of the cheapest gradient strategy ({cheapest})"] = {
                "ratio": ratio,
                "limit": SECONDS_TARGET,
                "met": ratio < SECONDS_TARGET,
            }
        return found


def main() -> None:
    """Print the table and write `results/regret.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=len(PAIRS))
    parser.add_argument("--tokens", type=int, default=160_000, help="of fine-tuning a hybrid")
    parser.add_argument("--rows", type=int, default=16, help="a step of fine-tuning")
    parser.add_argument("--search_rows_per_step", type=int, default=4, help="a step of a gradient search")
    parser.add_argument("--search_rate", type=float, default=3e-3, help="of the weights in a gradient search")
    parser.add_argument("--repeats", type=int, default=2, help="further orders of some hybrids, for the noise")
    parser.add_argument("--work", help="folder of finished units (default: in the cache folder)")
    parser.add_argument("--choices", help="JSON file with choices of other strategies")
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny sizes, one pair, one seed")
    given = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    given.entries = json.loads(Path(given.choices).read_text()) if given.choices else []
    given.shape, given.steps = {}, [50, 100, 200, 400]
    given.rates, given.mixture_rates = [3e-3, 6e-3, 1.2e-2], [0.01, 0.1, 1.0]
    given.calibration_rows, given.scored_rows, given.test_rows, given.train_rows = 512, 256, 512, 8192
    if given.quick:
        given.shape = {"width": 32, "layers": 3, "component_tokens": 20_000}
        given.seeds, given.pairs, given.tokens, given.repeats = 1, 1, 4_000, 1
        given.steps, given.rates, given.mixture_rates = [1, 2], [1e-3, 3e-3], [0.1]
        given.calibration_rows, given.scored_rows, given.test_rows, given.train_rows = 64, 16, 16, 256
    Benchmark(given).work()


if __name__ == "__main__":
    main()
