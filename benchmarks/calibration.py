"""
Bridges in closed form against bridges by gradient descent, the components frozen.

Two discretized hybrids, halves and six alternating slices, of two pairs: a gpt_neox (bible) and a mamba2 (python) on
mixed text, of which each knows one half, and both families of one domain (python) on text of that domain. Ridge
regressions read N tokens or a part of them. Gradient descent (stage "projectors", AdamW, its own linear decay for
every budget) starts from identity, from random and from the ridge's solution, and gets a quarter of N up to 10 N, each
token once, and 30 N where 10 N are not enough. Its learning rate is chosen on seed 0 by the loss on the search split,
at a quarter of N, at N and at 3 N; larger budgets take the last. "Times fewer tokens" is the largest budget at which
descent is still behind, over the tokens that the regressions read.

Finished units are kept in the work folder, so a killed run goes on and further seeds can be added.
"""

import argparse
import itertools
import time
from dataclasses import asdict

import torch
from _components import TIME_NOTE, Shape, Store, Workshop, loss_of, train, work_folder
from _shared import quiet, shown, summary, write
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from modeling_manticore import ManticoreForCausalLM, calibrate
from modeling_manticore.tasks.text import interleave


PAIRS = {
    "two domains": [("gpt_neox", "bible"), ("mamba2", "python")],
    "one domain": [("gpt_neox", "python"), ("mamba2", "python")],
}
HYBRIDS = ("halves", "alternating")
ORDERS = ("parallel", "sequential")
STARTS = ("identity", "random", "ridge")
TARGET = 5


def slices(hybrid: str, layers: int) -> list:
    """The blocks of a hybrid, for `from_components`."""
    if hybrid == "halves":
        cuts = [(0, 0, layers // 2), (1, layers // 2, layers)]
    else:
        cuts = [(b % 2, b, b + 1) for b in range(layers)]
    return [[{"component": k, "start": start, "stop": stop}] for k, start, stop in cuts]


class Run:
    """One hybrid of one pair with one seed: what is measured of it, each in the store."""

    def __init__(self, workshop: Workshop, given: argparse.Namespace, pair: str, hybrid: str, seed: int):
        self.workshop, self.store, self.given = workshop, workshop.store, given
        self.components, self.hybrid, self.seed = PAIRS[pair], hybrid, seed
        self.same = {"shape": asdict(workshop.shape), "pair": pair, "hybrid": hybrid, "seed": seed}
        self.same |= {"unit_rows": given.unit_rows}
        self.test = self.text("test", given.test_rows, 0)
        self.search = self.text("search", given.test_rows // 2, 0)

    def text(self, part: str, count: int, seed: int) -> torch.LongTensor:
        """Rows of the domains of the pair."""
        domains = sorted({domain for _, domain in self.components})
        return interleave([self.workshop.rows[domain][part] for domain in domains], count, seed)

    def model(self, start: str) -> PreTrainedModel:
        """The hybrid with identity or random bridges, or with those of ridge regressions in order."""
        set_seed(300 + self.seed)
        folders = self.workshop.components(self.components, self.seed)
        model = ManticoreForCausalLM.from_components(
            folders,
            blocks=slices(self.hybrid, self.workshop.shape.layers),
            projector_init="random" if start == "random" else "identity",
        )
        if start == "ridge":
            self.calibrate(model, "sequential", 1.0)
        return model

    def calibrate(self, model: PreTrainedModel, order: str, share: float) -> None:
        """Ridge regressions on a share of the N tokens."""
        folders = self.workshop.components(self.components, self.seed)
        uncut = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
        rows = self.rows(1)[: round(share * self.given.unit_rows)]
        calibrate(model, rows, order=order, components=uncut, progress=False)

    def rows(self, multiple: float) -> torch.LongTensor:
        """So many times N tokens. (30 N of one domain are more than there are; a fifth is read twice.)"""
        return self.text("train", round(multiple * self.given.unit_rows), 400 + self.seed)

    def at_start(self, start: str) -> dict:
        """Test loss before any training."""
        settings = self.same | {"start": start}
        return self.store.once("bridges_start", settings, lambda: {"test": loss_of(self.model(start), self.test)})

    def ridge(self, order: str, share: float) -> dict:
        """Test loss after ridge regressions, and their CPU seconds."""

        def make() -> dict:
            model = self.model("identity")
            started = time.process_time()
            self.calibrate(model, order, share)
            return {"seconds": time.process_time() - started, "test": loss_of(model, self.test)}

        return self.store.once("bridges_ridge", self.same | {"order": order, "share": share}, make)

    def descent(self, start: str, multiple: float, rate: float) -> dict:
        """Losses after gradient descent on the bridges alone, and its CPU seconds."""

        def make() -> dict:
            model = self.model(start)
            rows = self.rows(multiple)
            started = time.process_time()
            train(
                model,
                rows,
                steps=len(rows) // self.given.rows_per_step,
                rows_per_step=self.given.rows_per_step,
                learning_rate=rate,
                seed=self.seed,
                stage="projectors",
            )
            seconds = time.process_time() - started
            return {"test": loss_of(model, self.test), "search": loss_of(model, self.search), "seconds": seconds}

        settings = self.same | {"start": start, "multiple": multiple, "rate": rate, "rows": self.given.rows_per_step}
        return self.store.once("bridges_descent", settings, make)


def behind(course: dict[float, dict], goal: float, share: float) -> dict:
    """The first budget (times N) of a descent that reaches a loss, None if none does, and the last one before it."""
    first = next((multiple for multiple, found in course.items() if found["test"] <= goal), None)
    before = max((m for m in course if first is None or m < first), default=0)
    return {"first": first, "last_behind": before, "times_fewer_tokens_above": before / share}


class Benchmark:
    """All runs, the learning rates, and the table."""

    def __init__(self, given: argparse.Namespace):
        self.given = given
        self.workshop = Workshop(Shape(**given.shape), Store(work_folder(given.work, "small_components")))
        self.rates: dict[str, dict] = {}

    def rate(self, pair: str, hybrid: str, start: str, multiple: float) -> float:
        """The best learning rate on seed 0, at the largest tuned budget up to this one."""
        at = max(m for m in self.given.tuned_at if m <= multiple)
        run = Run(self.workshop, self.given, pair, hybrid, 0)
        losses = {rate: run.descent(start, at, rate)["search"] for rate in self.given.rates}
        self.rates[f"{pair}, {hybrid}, from {start}, at {at} N"] = losses
        return min(losses, key=losses.get)

    def measured(self, pair: str, hybrid: str, seed: int) -> dict:
        """All figures of one hybrid and seed."""
        run = Run(self.workshop, self.given, pair, hybrid, seed)
        found = {
            "pair": pair,
            "hybrid": hybrid,
            "seed": seed,
            "step_0": {s: run.at_start(s)["test"] for s in STARTS[:2]},
        }
        found["ridge"] = {
            f"{order}, {share:g} N": run.ridge(order, share) | {"share": share}
            for order in ORDERS
            for share in self.given.shares
        }
        goals = {order: found["ridge"][f"{order}, 1 N"]["test"] for order in ORDERS}
        found["descent"] = {}
        for start in STARTS:
            course = {}
            for multiple in self.given.multiples:
                reached = any(c["test"] <= min(goals.values()) for c in course.values())
                if start == "ridge" and multiple not in self.given.from_ridge or multiple > 10 and reached:
                    continue
                course[multiple] = run.descent(start, multiple, self.rate(pair, hybrid, start, multiple))
            found["descent"][start] = course
        found["reached"] = {
            f"{name}, from {start}": behind(found["descent"][start], ridge["test"], ridge["share"])
            for name, ridge in found["ridge"].items()
            for start in STARTS[:2]
        }
        return found

    def work(self) -> None:
        """Seed by seed; the table and the JSON after every seed."""
        runs = []
        for seed in range(self.given.seeds):
            runs += [self.measured(pair, hybrid, seed) for pair in PAIRS for hybrid in HYBRIDS]
            self.report(runs)

    def report(self, runs: list[dict]) -> None:
        """Print and write what there is."""
        table = {}
        for pair, hybrid in itertools.product(PAIRS, HYBRIDS):
            own = [found for found in runs if (found["pair"], found["hybrid"]) == (pair, hybrid)]
            rows = {f"{start}, step 0": [f["step_0"][start] for f in own] for start in STARTS[:2]}
            rows |= {f"ridge {name}": [f["ridge"][name]["test"] for f in own] for name in own[0]["ridge"]}
            seconds = {f"ridge {name}": [f["ridge"][name]["seconds"] for f in own] for name in own[0]["ridge"]}
            for start in STARTS:
                for multiple in sorted({m for f in own for m in f["descent"][start]}):
                    with_it = [f["descent"][start][multiple] for f in own if multiple in f["descent"][start]]
                    rows[f"descent from {start}, {multiple:g} N"] = [c["test"] for c in with_it]
                    seconds[f"descent from {start}, {multiple:g} N"] = [c["seconds"] for c in with_it]
            print(f"\n{pair}, {hybrid}: test loss in nats, CPU seconds")
            for name, values in rows.items():
                print(f"  {name:<32} {shown(values):>16}  {shown(seconds[name]) if name in seconds else ''}")
            fewer = {name: [f["reached"][name]["times_fewer_tokens_above"] for f in own] for name in own[0]["reached"]}
            for name, values in fewer.items():
                met = "met" if min(values) >= TARGET else "not met"
                print(f"  tokens of ridge {name}: more than {values} times fewer, target {TARGET} {met}")
            table[f"{pair}, {hybrid}"] = {
                "loss": {name: summary(values) for name, values in rows.items()},
                "seconds": {name: summary(values) for name, values in seconds.items()},
                "times_fewer_tokens_above": fewer,
                "target_met": {name: min(values) >= TARGET for name, values in fewer.items()},
            }
        given = {key: value for key, value in vars(self.given).items() if key not in ("work", "quick")}
        results = {"settings": given | {"shape": asdict(self.workshop.shape)}, "seconds_are": TIME_NOTE}
        results["tokens_N"] = self.given.unit_rows * self.workshop.shape.length
        results |= {"search_loss_by_learning_rate": self.rates, "table": table, "runs": runs}
        if not self.given.quick:
            write("calibration", results)


def main() -> None:
    """Print the table and write `results/calibration.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--unit_rows", type=int, default=512, help="N, in rows")
    parser.add_argument("--rows_per_step", type=int, default=8)
    parser.add_argument("--work", help="folder of finished units (default: in the cache folder)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny sizes, one seed")
    given = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    given.shape, given.multiples, given.from_ridge, given.tuned_at = (
        {},
        [0.25, 0.5, 1, 3, 5, 10, 30],
        [1, 3, 10],
        [0.25, 1, 3],
    )
    given.rates, given.test_rows, given.shares = [3e-3, 1e-2, 3e-2], 512, [0.0625, 0.25, 1.0]
    if given.quick:
        given.shape = {"width": 32, "layers": 4, "component_tokens": 20_000}
        given.seeds, given.unit_rows, given.test_rows, given.rates = 1, 32, 16, [1e-3, 1e-2]
    Benchmark(given).work()


if __name__ == "__main__":
    main()
