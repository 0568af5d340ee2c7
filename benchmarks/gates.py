"""
Which gate, ends, projectors and calibration are best after equal budgets? One factor at a time around the package's
default, then the best two crossed, on two pairs of small trained components and several seeds; then what was added
after a look at these, to see which part of the paper's setting makes its hybrids good.

Every run: compose, calibrate (or not), joint search, then two hybrids cut from it, one as the search says and one
fixed for all variants, each fine-tuned with the same tokens. Every variant's learning rate (of search and fine-tuning)
is the best of one grid on seed 0, by the loss on the search split. Reported are differences to the default in the same
pair and seed, with 95 % intervals; no correction is made for the number of comparisons.

`positions_on_entry` is not in the package and emulated here: where a GPT-2 slice begins behind a bridge, the bridge is
fitted to the component's own state without its position embeddings, which are then added, and trained.

Finished units are kept in the work folder, so a killed run goes on and further seeds can be added.
"""

import argparse
from dataclasses import asdict
from statistics import mean

import torch
from _components import DOMAINS, TIME_NOTE, Shape, Store, Workshop, loss_of, train, work_folder
from _shared import quiet, shown, summary, write
from torch import nn
from transformers import PreTrainedModel, set_seed

from modeling_manticore import ManticoreForCausalLM, calibrate, discretize
from modeling_manticore.building.calibrate import Problem, _bridge_steps, _fit
from modeling_manticore.building.states import ComponentStates
from modeling_manticore.building.texts import batches_of
from modeling_manticore.mixing_manticore import junctions
from modeling_manticore.search.slices import token_count
from modeling_manticore.tasks.text import interleave


BLOCKS = 3
PAIRS = {
    "gpt_neox(bible) mamba2(python)": ([("gpt_neox", "bible"), ("mamba2", "python")], [0, 1, 0]),
    "gpt2(bible) mamba2(python)": ([("gpt2", "bible"), ("mamba2", "python")], [1, 0, 1]),
}
# Only for what the first two showed: is it so as well where both components know the text?
ONE_DOMAIN = {"gpt_neox(python) mamba2(python)": ([("gpt_neox", "python"), ("mamba2", "python")], [0, 1, 0])}
DEFAULT = {
    "gate": "routed",
    "calibrated": True,
    "projector_init": "identity",
    "project_ends": True,
    "bridges": "sequential",  # of the discretized hybrid; "parallel", or None: the supernet's own, not fitted again
    "positions_on_entry": False,
}
SINGLE = {
    "gate mixture": {"gate": "mixture"},
    "gate none": {"gate": "none"},
    "gate learned": {"gate": "learned"},
    "not calibrated, identity": {"calibrated": False},
    "not calibrated, random": {"calibrated": False, "projector_init": "random"},
    "plain ends": {"project_ends": False},
    "bridges parallel": {"bridges": "parallel"},
    "bridges not fitted again": {"bridges": None},
    "positions on entry": {"positions_on_entry": True},
}
PAPER = {"gate": "mixture", "calibrated": False, "project_ends": False, "bridges": None}
# Added after the first columns were seen: which part of the paper's setting is it?
UNFITTED = {"calibrated": False, "bridges": None}
FURTHER = {
    "not calibrated, bridges not fitted": UNFITTED,
    "not calibrated, bridges not fitted, plain ends": UNFITTED | {"project_ends": False},
    "learned, not calibrated, bridges not fitted, plain ends": UNFITTED | {"project_ends": False, "gate": "learned"},
    "mixture, not calibrated, bridges not fitted": UNFITTED | {"gate": "mixture"},
}
MEANS = {"mean": "", "mean_on_search_split": "_on_search_split"}  # over both hybrids
LOSSES = ("supernet", "fixed_before", "fixed", "searched", "mean")


class Run:
    """One pair with one seed."""

    def __init__(self, workshop: Workshop, given: argparse.Namespace, pair: str, seed: int):
        self.workshop, self.store, self.given = workshop, workshop.store, given
        self.pair, self.seed = pair, seed
        self.components, self.fixed = (PAIRS | ONE_DOMAIN)[pair]
        self.calibration = self.rows("train", given.calibration_rows, seed=500 + seed)
        self.search = self.rows("search", given.test_rows // 2, seed=0)
        self.test = self.rows("test", given.test_rows, seed=0)
        self.train = self.rows("train", given.train_rows, seed=600 + seed)
        self._searched: dict = {}

    def rows(self, part: str, count: int, seed: int) -> torch.LongTensor:
        """(count, length) rows of the components' domains in equal parts."""
        known = {domain for _, domain in self.components}
        return interleave([self.workshop.rows[domain][part] for domain in DOMAINS if domain in known], count, seed)

    def measured(self, variant: dict, rate: float) -> dict:
        """Losses of the searched supernet and of both hybrids."""
        if not self.concerns(variant):
            raise ValueError(f"variant: got {variant}, which changes nothing for {self.pair}.")
        budget = {key: getattr(self.given, key) for key in ("search_steps", "search_rows", "steps", "rows")}
        settings = {"shape": asdict(self.workshop.shape), "pair": self.pair, "seed": self.seed, "rate": rate}
        settings |= budget | {"calibration_rows": self.given.calibration_rows} | variant
        settings["mixture_rate"] = self.given.mixture_rate
        return self.store.once("gates", settings, lambda: self._measure(variant, rate))

    def concerns(self, variant: dict) -> bool:
        """Whether the variant differs from the default for this pair: only GPT-2 has positions to add."""
        return not variant["positions_on_entry"] or any(family == "gpt2" for family, _ in self.components)

    def _measure(self, variant: dict, rate: float) -> dict:
        supernet, loss = self.searched(variant, rate)
        choice = [int(point.argmax()) for point in supernet.mixture_weights()]
        found = {"supernet": loss, "choice": choice}
        found["weights"] = [point.tolist() for point in supernet.mixture_weights()]
        found |= {f"fixed{name}": value for name, value in self.tuned(supernet, self.fixed, variant, rate).items()}
        if choice == self.fixed:
            found |= {name.replace("fixed", "searched"): v for name, v in found.items() if name.startswith("fixed")}
        else:
            found |= {f"searched{name}": value for name, value in self.tuned(supernet, choice, variant, rate).items()}
        return found | {name: (found[f"fixed{e}"] + found[f"searched{e}"]) / 2 for name, e in MEANS.items()}

    def searched(self, variant: dict, rate: float) -> tuple[PreTrainedModel, float]:
        """The supernet after the joint search, and its test loss; kept for variants that differ after it only."""
        before = ("gate", "calibrated", "projector_init", "project_ends")
        if all(variant[name] == DEFAULT[name] for name in before):
            if rate not in self._searched:
                self._searched[rate] = self._search(variant, rate)
            return self._searched[rate]
        return self._search(variant, rate)

    def _search(self, variant: dict, rate: float) -> tuple[PreTrainedModel, float]:
        set_seed(700 + self.seed)
        model = ManticoreForCausalLM.from_components(
            self.workshop.components(self.components, self.seed),
            num_blocks=BLOCKS,
            gate=variant["gate"],
            projector_init=variant["projector_init"],
            project_ends=variant["project_ends"],
        )
        if variant["calibrated"]:
            calibrate(model, self.calibration, progress=False)
        train(
            model,
            self.train,
            steps=self.given.search_steps,
            rows_per_step=self.given.search_rows,
            learning_rate=rate,
            seed=2 * self.seed,
            stage="search",
            strategy="joint",
            mixture_learning_rate=self.given.mixture_rate,
        )
        return model, loss_of(model, self.test)

    def tuned(self, supernet: PreTrainedModel, choice: list[int], variant: dict, rate: float) -> dict:
        """Losses of one hybrid of the supernet before and after its fine-tuning."""
        if variant["bridges"] is None:
            hybrid = discretize(supernet, choice, refit=False)
        elif variant["positions_on_entry"]:
            hybrid = discretize(supernet, choice, refit=False)
            fit_with_positions(hybrid, supernet, self.calibration)
        else:
            order = variant["bridges"]
            hybrid = discretize(supernet, choice, calibration=self.calibration, order=order, progress=False)
        before = loss_of(hybrid, self.test)
        train(
            hybrid,
            self.train,
            steps=self.given.steps,
            rows_per_step=self.given.rows,
            learning_rate=rate,
            seed=2 * self.seed + 1,
        )
        return {"_before": before, "": loss_of(hybrid, self.test), "_on_search_split": loss_of(hybrid, self.search)}


def fit_with_positions(hybrid: PreTrainedModel, supernet: PreTrainedModel, rows: torch.LongTensor) -> None:
    """
    `calibrate(order="sequential")` in which a bridge into a GPT-2 slice is fitted to y - p and gives W x + c + p; p
    are the component's position embeddings (tokens, d), which become a parameter of the bridge. Rows have no padding.
    """
    batches, plan = batches_of(rows, hybrid), junctions(hybrid.config)
    states = ComponentStates(hybrid.config, [supernet, hybrid])
    joined = [junction for junction in plan if junction.has_in[0]]
    for problems, junction in zip(_bridge_steps(hybrid, plan, states, ()), joined, strict=True):
        (problem,), target = problems, junction.targets[0]
        table = None
        if target.position[0] > 0 and hybrid.config.components[target.component].model_type == "gpt2":
            table = supernet.trunk.stems[str(target.component)].wpe.weight.detach().clone()
            problem = without_positions(problem, table)
        _fit([problem], batches, token_count(batches), progress=False)
        if table is not None:
            problem.projector.register_parameter("positions", nn.Parameter(table))
            problem.projector.register_forward_hook(_add_positions)


def without_positions(problem: Problem, table: torch.Tensor) -> Problem:
    """The same regression with the position embeddings taken from its target."""

    def pair(given):
        x, y = problem.pair(given)
        return x, y - table[: y.shape[-2]]

    return Problem(problem.name, problem.projector, pair)


def _add_positions(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    return output + module.positions[: output.shape[-2]]


class Benchmark:
    """All runs, the learning rates, and the table."""

    def __init__(self, given: argparse.Namespace):
        self.given = given
        self.workshop = Workshop(Shape(**given.shape), Store(work_folder(given.work, "small_components")))
        self.pairs = list(PAIRS)[: given.pairs] if not given.quick else list(PAIRS)[-1:]
        self.runs = {(p, s): Run(self.workshop, given, p, s) for s in range(given.seeds) for p in self.pairs}
        self.beside = {
            (p, s): Run(self.workshop, given, p, s) for s in range(given.seeds) for p in ONE_DOMAIN if not given.quick
        }
        self.rates: dict[str, dict] = {}

    def measured(self, name: str, variant: dict, pair: str, seed: int) -> dict:
        """One variant with its learning rate."""
        runs = self.runs | self.beside
        run = runs[pair, 0]
        losses = {rate: run.measured(variant, rate)["mean_on_search_split"] for rate in self.given.rates}
        self.rates[f"{name}, {pair}"] = losses
        rate = min(losses, key=losses.get)
        return runs[pair, seed].measured(variant, rate) | {"rate": rate}

    def column(self, name: str, changes: dict) -> dict:
        """All runs of a variant that concerns them."""
        variant = DEFAULT | changes
        return {key: self.measured(name, variant, *key) for key, run in self.runs.items() if run.concerns(variant)}

    def work(self) -> None:
        """Variant by variant, then the best two crossed."""
        columns = {"default": self.column("default", {})}
        for name, changes in (SINGLE | {"the paper's": PAPER}).items():
            columns[name] = self.column(name, changes)
        columns = {name: column for name, column in columns.items() if column}
        worth = {name: mean(self.differences(columns, name)["mean"]) for name in SINGLE if name in columns}
        ranked = sorted(worth, key=worth.get)
        second = next(name for name in ranked[1:] if not set(SINGLE[name]) & set(SINGLE[ranked[0]]))
        crossed = f"{ranked[0]} x {second}"
        columns[crossed] = self.column(crossed, SINGLE[ranked[0]] | SINGLE[second])
        for name, changes in FURTHER.items():
            columns[name] = self.column(name, changes)
        self.report(columns, crossed, self.one_domain())

    def one_domain(self) -> dict:
        """Losses without calibration and fitting less those of the default, where both components know the text."""
        without = {key: self.measured("not fitted", DEFAULT | UNFITTED, *key) for key in self.beside}
        found = {key: self.measured("default", DEFAULT, *key) for key in self.beside}
        return {loss: [without[key][loss] - found[key][loss] for key in found] for loss in LOSSES if found}

    def differences(self, columns: dict, name: str) -> dict[str, list[float]]:
        """Losses less those of the default, run by run."""
        pairs = [(found, columns["default"][key]) for key, found in columns[name].items()]
        return {loss: [found[loss] - default[loss] for found, default in pairs] for loss in LOSSES}

    def report(self, columns: dict, crossed: str, one_domain: dict) -> None:
        """Print and write what there is."""
        default = columns["default"].values()
        print(f"\ndefault: { ({loss: shown([found[loss] for found in default]) for loss in LOSSES}) }")
        print(f"{'less the default, nats':<52} " + " ".join(f"{loss:>16}" for loss in LOSSES))
        table = {"default": {loss: summary([found[loss] for found in default]) for loss in LOSSES}}
        for name in list(columns)[1:]:
            values = self.differences(columns, name)
            print(f"{name:<52} " + " ".join(f"{shown(values[loss]):>16}" for loss in LOSSES))
            table[name] = {loss: summary(values[loss]) for loss in LOSSES}
            table[name]["by_pair"] = {
                pair: {
                    loss: mean(v for v, key in zip(values[loss], columns[name]) if key[0] == pair) for loss in LOSSES
                }
                for pair in self.pairs
                if any(key[0] == pair for key in columns[name])
            }
            found = table[name]["mean"]
            table[name]["verdict"] = verdict(found["mean"], found["half_width"])
        for name in list(columns)[1:]:
            print(f"{name}: {table[name]['verdict']}")
        if one_domain:
            print(f"{', '.join(ONE_DOMAIN)}: not calibrated, bridges not fitted, less the default")
            print(f"{'':<52} " + " ".join(f"{shown(one_domain[loss]):>16}" for loss in LOSSES))
        given = {key: value for key, value in vars(self.given).items() if key not in ("work", "quick")}
        results = {"settings": given | {"shape": asdict(self.workshop.shape)}, "seconds_are": TIME_NOTE}
        variants = SINGLE | {"the paper's": PAPER} | FURTHER
        results |= {"default": DEFAULT, "variants": variants, "crossed": crossed, "added_later": list(FURTHER)}
        results["one_domain_not_calibrated_not_fitted"] = {loss: summary(found) for loss, found in one_domain.items()}
        results |= {"loss_on_search_split_by_learning_rate": self.rates, "difference_to_default": table}
        runs = [{"variant": name, "pair": p, "seed": s} | f for name, c in columns.items() for (p, s), f in c.items()]
        if not self.given.quick:
            write("gates", results | {"runs": runs})


def verdict(difference: float, half_width: float | None) -> str:
    """What the mean of both hybrids' differences says."""
    if half_width is None or abs(difference) <= half_width:
        return "no difference beyond the noise"
    return "better than the default" if difference < 0 else "worse than the default"


def main() -> None:
    """Print the table and write `results/gates.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=len(PAIRS))
    parser.add_argument("--search_steps", type=int, default=100)
    parser.add_argument("--search_rows", type=int, default=8, help="a step of the search")
    parser.add_argument("--steps", type=int, default=80, help="of fine-tuning")
    parser.add_argument("--rows", type=int, default=16, help="a step of fine-tuning")
    parser.add_argument("--mixture_rate", type=float, default=0.1, help="learning rate of the mixture")
    parser.add_argument("--work", help="folder of finished units (default: in the cache folder)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny sizes, one pair, one seed")
    given = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    given.shape, given.rates = {}, [3e-3, 6e-3, 1.2e-2]
    given.calibration_rows, given.test_rows, given.train_rows = 512, 512, 8192
    if given.quick:
        given.shape = {"width": 32, "layers": 3, "component_tokens": 20_000}
        given.seeds, given.search_steps, given.steps, given.rates = 1, 2, 2, [1e-3, 3e-3]
        given.calibration_rows, given.test_rows, given.train_rows = 64, 16, 256
    Benchmark(given).work()


if __name__ == "__main__":
    main()
