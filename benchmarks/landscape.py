"""
The loss over the grid of mixture weights (the figure of arXiv 2406.00894), with what each strategy finds drawn on it.

A gpt_neox (bible) and a mamba2 (python), one and two blocks, the routed gate and the paper's. The supernet is
calibrated and then frozen; every grid point is scored on test rows. `stitch` chooses a corner. The gradient strategies
search in a copy whose components stay frozen and whose projectors train, at two learning rates of the mixture; the
weights with the lower loss on search rows are drawn, and scored in the supernet of the grid.
Finished units are kept in the work folder, so a killed run goes on and further seeds can be added.
"""

import argparse
import copy
from dataclasses import asdict
from functools import partial
from statistics import mean

import torch
from _components import Shape, Store, Workshop, loss_of, train, work_folder
from _shared import RESULTS, quiet, shown, summary, write
from matplotlib.figure import Figure
from transformers import PreTrainedModel, set_seed

from modeling_manticore import ManticoreForCausalLM, calibrate, stitch, sweep
from modeling_manticore.search import suit_mixture


COMPONENTS = [("gpt_neox", "bible"), ("mamba2", "python")]
GATES = ("routed", "mixture")
BLOCKS = (1, 2)
STRATEGIES = {
    "joint": {"strategy": "joint"},
    "darts": {"strategy": "darts"},
    "gaea": {"strategy": "gaea"},
    "dash": {"strategy": "dash"},
}
MARKERS = {"stitch": "*", "joint": "o", "darts": "s", "gaea": "^", "dash": "D"}


class Landscape:
    """One gate and number of blocks with one seed."""

    def __init__(self, workshop: Workshop, given: argparse.Namespace, gate: str, blocks: int, seed: int):
        self.workshop, self.store, self.given = workshop, workshop.store, given
        self.gate, self.blocks, self.seed = gate, blocks, seed
        self.same = {"shape": asdict(workshop.shape), "gate": gate, "blocks": blocks, "seed": seed}
        self.same |= {"calibration_rows": given.calibration_rows, "test_rows": given.test_rows}
        self.test = workshop.mixed("test", given.test_rows, seed=0)
        self.search = workshop.mixed("search", given.test_rows, seed=0)
        self.train = workshop.mixed("train", given.train_rows, seed=900 + seed)

    def measured(self) -> dict:
        """The grid and the strategies' points."""
        divisions = {"divisions": self.given.divisions[self.blocks]}
        found = self.store.once("landscape_grid", self.same | divisions, self._grid)
        found["strategies"] = {"stitch": self.store.once("landscape_stitch", self.same, self._stitch)}
        for name, options in STRATEGIES.items():
            tried = []
            for rate in self.given.mixture_rates:
                settings = self.same | options | {"steps": self.given.steps, "mixture_rate": rate}
                settings |= {"train_rows": self.given.train_rows, "learning_rate": self.given.learning_rate}
                search = partial(self._searched, {"mixture_learning_rate": rate} | options)
                tried.append(self.store.once("landscape_search", settings, search))
            found["strategies"][name] = min(tried, key=lambda point: point["search_loss"])
        return found

    def supernet(self) -> PreTrainedModel:
        """Calibrated."""
        set_seed(800 + self.seed)
        model = ManticoreForCausalLM.from_components(
            self.workshop.components(COMPONENTS, self.seed), num_blocks=self.blocks, gate=self.gate
        )
        calibrate(model, self.train[: self.given.calibration_rows], progress=False)
        return model.eval()

    def _grid(self) -> dict:
        report = sweep(self.supernet(), self.test, divisions=self.given.divisions[self.blocks], progress=False)
        return {"points": [asdict(point) for point in report.points]}

    def _stitch(self) -> dict:
        model = self.supernet()
        report = stitch(model, self.train[: self.given.calibration_rows], self.search, progress=False)
        return self._point(model, [[float(k == chosen) for k in range(2)] for chosen in report.best.choice])

    def _searched(self, options: dict) -> dict:
        frozen = self.supernet()
        searching = copy.deepcopy(frozen)
        suit_mixture(searching, options["strategy"])
        half = len(self.train) // 2
        train(
            searching,
            self.train[:half],
            search_rows=self.train[half:] if options["strategy"] == "darts" else None,
            steps=self.given.steps,
            rows_per_step=8,
            learning_rate=self.given.learning_rate,
            seed=self.seed,
            stage="search",
            train_components=False,
            **options,
        )
        return self._point(frozen, [point.tolist() for point in searching.mixture_weights()])

    def _point(self, model: PreTrainedModel, weights: list) -> dict:
        model.set_mixture_weights(weights)
        return {"weights": weights, "loss": loss_of(model, self.test), "search_loss": loss_of(model, self.search)}


def facts_of(found: dict) -> dict:
    """The grid's lowest point and lowest corner, and how far above the lowest point every strategy is."""
    points = found["points"]
    corners = [p for p in points if all(max(block) == 1 for block in p["weights"])]
    least, corner = min(points, key=lambda p: p["loss"]), min(corners, key=lambda p: p["loss"])
    facts = {"least": least["loss"], "least corner": corner["loss"], "gain of mixing": corner["loss"] - least["loss"]}
    return facts | {name: point["loss"] - least["loss"] for name, point in found["strategies"].items()}


def draw(found: dict[tuple, dict]) -> None:
    """`results/landscape.svg`: the first seed; curves for one block, maps for two."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    panels = figure.subplots(len(BLOCKS), len(GATES))
    for row, blocks in enumerate(BLOCKS):
        for column, gate in enumerate(GATES):
            axis, one = panels[row, column], found[gate, blocks, 0]
            first = [[block[0] for block in point["weights"]] for point in one["points"]]
            losses = [point["loss"] for point in one["points"]]
            if blocks == 1:
                pairs = sorted(zip([w for (w,) in first], losses))
                axis.plot(*zip(*pairs), color="0.5")
                axis.set_ylabel("loss (nats)")
            else:
                size = round(len(losses) ** 0.5)
                ordered = [loss for _, loss in sorted(zip(first, losses))]
                grid = torch.tensor(ordered).view(size, size).T
                drawn = axis.imshow(grid, origin="lower", extent=(0, 1, 0, 1), cmap="viridis_r", aspect="auto")
                figure.colorbar(drawn, ax=axis, label="loss (nats)")
                axis.set_ylabel("weight of the gpt_neox in block 1")
            for name, point in one["strategies"].items():
                at = [block[0] for block in point["weights"]] + [point["loss"]]
                axis.plot(
                    at[0],
                    at[1],
                    MARKERS[name],
                    color="black",
                    fillstyle="none",
                    label=name,
                    markersize=10,
                    clip_on=False,
                )
            axis.set(title=f"gate {gate}, {blocks} block(s)", xlabel="weight of the gpt_neox in block 0")
    panels[0, 0].legend(frameon=False)
    figure.savefig(RESULTS / "landscape.svg")


def main() -> None:
    """Print the table, write `results/landscape.json` and draw `results/landscape.svg`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100, help="of every search")
    parser.add_argument("--work", help="folder of finished units (default: in the cache folder)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny sizes, one seed, nothing written")
    given = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    given.calibration_rows, given.test_rows, given.train_rows = 256, 128, 1600
    given.divisions, given.mixture_rates, given.learning_rate = {1: 20, 2: 8}, [0.1, 1.0], 3e-3
    shape = {}
    if given.quick:
        shape = {"width": 32, "layers": 2, "component_tokens": 20_000}
        given.seeds, given.steps, given.divisions, given.test_rows = 1, 2, {1: 2, 2: 2}, 16
    workshop = Workshop(Shape(**shape), Store(work_folder(given.work, "small_components")))
    kinds = [(gate, blocks) for blocks in BLOCKS for gate in GATES]
    found = {
        (*kind, seed): Landscape(workshop, given, *kind, seed).measured()
        for seed in range(given.seeds)
        for kind in kinds
    }
    table = {}
    for gate, blocks in kinds:
        facts = [facts_of(found[gate, blocks, seed]) for seed in range(given.seeds)]
        print(f"\ngate {gate}, {blocks} block(s), nats; strategies: above the least of the grid")
        for name in facts[0]:
            print(f"  {name:<16} {shown([fact[name] for fact in facts])}")
        table[f"{gate}, {blocks}"] = {name: summary([fact[name] for fact in facts]) for name in facts[0]}
    gains = [value["gain of mixing"]["mean"] for value in table.values()]
    print(f"\nA mixture is below every corner by {mean(gains):.3f} nats in the mean of the four.")
    if not given.quick:
        settings = {key: value for key, value in vars(given).items() if key not in ("work", "quick")}
        runs = [
            {"gate": gate, "blocks": blocks, "seed": seed} | value for (gate, blocks, seed), value in found.items()
        ]
        write("landscape", {"settings": settings | {"shape": asdict(workshop.shape)}, "table": table, "runs": runs})
        draw(found)


if __name__ == "__main__":
    main()
