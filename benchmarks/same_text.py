"""
Two components of the same text, joined before any training: a gpt_neox and a mamba2 on the King James Bible.

Three questions, each over several seeds (data split, initial weights, order): how far a calibrated hybrid is from the
better component; whether calibrating bridges in order beats calibrating them all at once; and what the loss does on
the way from uniform mixture weights to a corner, under each gate.
"""

import argparse

import torch
from _shared import quiet, shown, summary, write
from transformers import AutoModelForCausalLM

from modeling_manticore import ManticoreForCausalLM, calibrate, discretize
from modeling_manticore.commands.demo import DemoOptions
from modeling_manticore.commands.demo_components import own_components, pack_domains, read_splits
from modeling_manticore.commands.models import measure
from modeling_manticore.tasks.text import interleave


CHAINS = {
    "A3 B3": [(0, 0, 3), (1, 3, 6)],
    "B3 A3": [(1, 0, 3), (0, 3, 6)],
    "A2 B2 A2": [(0, 0, 2), (1, 2, 4), (0, 4, 6)],
    "B2 A2 B2": [(1, 0, 2), (0, 2, 4), (1, 4, 6)],
    "ABABAB": [(b % 2, b, b + 1) for b in range(6)],
    "BABABA": [(1 - b % 2, b, b + 1) for b in range(6)],
}
GATES = ("mixture", "none", "routed")
STEPS = [0.0, 0.25, 0.5, 0.75, 0.9, 1.0]


def run(seed: int, steps: int, calibration_rows: int) -> dict:
    """All figures of one seed."""
    options = DemoOptions(texts=["bible", "bible"], domains=["A", "B"], seed=seed, component_steps=steps)
    splits = read_splits(options)
    components, tokenizer = own_components(options, splits)
    domain = pack_domains(splits, tokenizer, options)[0]
    test = domain.test[:128]
    text = interleave([domain.train], calibration_rows, seed)
    folders = [component.folder for component in components]
    uncut = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]

    def loss(model) -> float:
        return measure(model, test)["loss"]

    found = {"components": [loss(model) for model in uncut], "chains": {}, "landscape": {}}
    for name, slices in CHAINS.items():
        blocks = [[{"component": k, "start": start, "stop": stop}] for k, start, stop in slices]
        hybrid = ManticoreForCausalLM.from_components(folders, blocks=blocks)
        row = {"identity": loss(hybrid)}
        for order in ("parallel", "sequential"):
            calibrate(hybrid, text, order=order, components=uncut, progress=False)
            row[order] = loss(hybrid)
        found["chains"][name] = row
        print(f"seed {seed}  {name:<9}", {key: round(value, 3) for key, value in row.items()}, flush=True)
    for gate in GATES:
        model = ManticoreForCausalLM.from_components(folders, num_blocks=2, gate=gate)
        calibrate(model, text, progress=False)
        found["landscape"][gate] = {}
        for corner in ([0, 1], [1, 0], [1, 1]):
            way = []
            for t in STEPS:
                ends = torch.nn.functional.one_hot(torch.tensor(corner), 2).float()
                model.set_mixture_weights(list((1 - t) * 0.5 + t * ends))
                way.append(loss(model))
            name = " ".join("AB"[k] for k in corner)
            found["landscape"][gate][name] = way
            print(f"seed {seed}  {gate:<8} to {name}", [round(value, 3) for value in way], flush=True)
        del model
    model = discretize(ManticoreForCausalLM.from_components(folders, num_blocks=2), [1, 1], refit=False)
    found["pure_corner_minus_component"] = loss(model) - found["components"][1]
    return found


def main() -> None:
    """Print the tables and write `results/same_text.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--component_steps", type=int, default=450)
    parser.add_argument("--calibration_rows", type=int, default=256)
    options = parser.parse_args()
    quiet()
    runs = [run(seed, options.component_steps, options.calibration_rows) for seed in range(options.seeds)]

    results = {"settings": vars(options), "runs": runs, "summary": {}}
    best = [min(found["components"]) for found in runs]
    print(
        f"\ncomponents: A {shown([r['components'][0] for r in runs])}, B {shown([r['components'][1] for r in runs])}"
    )
    print(
        f"{'chain':<9}  {'identity':>16}  {'parallel':>16}  {'in order':>16}  {'in order - parallel':>20}  behind best"
    )
    for name in CHAINS:
        rows = [found["chains"][name] for found in runs]
        columns = {key: [row[key] for row in rows] for key in ("identity", "parallel", "sequential")}
        gain = [row["sequential"] - row["parallel"] for row in rows]
        behind = [row["sequential"] - b for row, b in zip(rows, best)]
        cells = "  ".join(f"{shown(values):>16}" for values in columns.values())
        print(f"{name:<9}  {cells}  {shown(gain):>20}  {shown(behind)}")
        results["summary"][name] = {key: summary(values) for key, values in columns.items()} | {
            "in_order_minus_parallel": summary(gain),
            "behind_better_component": summary(behind),
        }
    print("\nfrom uniform weights to a corner:", *(f"{t:>8.2f}" for t in STEPS))
    for gate in GATES:
        for corner in runs[0]["landscape"][gate]:
            ways = [[found["landscape"][gate][corner][i] for found in runs] for i in range(len(STEPS))]
            print(f"  {gate:<8} to {corner:<20}", *(f"{summary(values)['mean']:8.3f}" for values in ways))
            results["summary"][f"{gate} to {corner}"] = [summary(values) for values in ways]
    write("same_text", results)


if __name__ == "__main__":
    main()
