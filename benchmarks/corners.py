"""
Corners on the demo's trained components: a pure corner is the component, under "routed" a mixed corner is the
discretized hybrid. Largest difference of a logit: pure corners in float32, mixed ones in float64 and float32. (A mixed
corner has two linear maps where the hybrid has their product; with random projectors their rounding differs.) The
component's Mamba layers run the scan of hybrids, too; how far that is from transformers' own is reported beside. Run
`manticore demo` (or this) once to train the components.
"""

import argparse
import itertools

import torch
from _shared import quiet, write
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from modeling_manticore import ManticoreForCausalLM, calibrate, discretize
from modeling_manticore.commands.demo import DemoOptions
from modeling_manticore.commands.demo_components import own_components, pack_domains, read_splits
from modeling_manticore.scan_manticore import use_own_scan
from modeling_manticore.tasks.text import interleave


TOLERANCE = 1e-5


def main() -> None:
    """Print the table and write `results/corners.json`; an error where a difference exceeds the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4, help="test rows of each domain")
    given = parser.parse_args()
    quiet()
    options = DemoOptions()
    splits = read_splits(options)
    components, tokenizer = own_components(options, splits)
    domains = pack_domains(splits, tokenizer, options)
    ids = torch.cat([domain.test[: given.rows] for domain in domains])
    text = interleave([domain.search for domain in domains], 64, 0)
    logging.set_verbosity(logging.CRITICAL)  # "one component wins every block": meant here
    folders = [component.folder for component in components]
    uncut = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]

    rows = []
    with torch.inference_mode():
        theirs = [model(input_ids=ids).logits for model in uncut]
        for model in uncut:
            use_own_scan(model)
        expected = [model(input_ids=ids).logits for model in uncut]
        scan = max((one - other).abs().max().item() for one, other in zip(theirs, expected))
        for blocks, gate, ends, init in itertools.product(
            (1, 2, 3, 6), ("routed", "mixture"), (True, False), ("random", "calibrated")
        ):
            model = ManticoreForCausalLM.from_components(
                folders, num_blocks=blocks, gate=gate, project_ends=ends, projector_init="random"
            )
            if init == "calibrated":
                calibrate(model, text, progress=False)
            row = {
                "blocks": blocks,
                "gate": gate,
                "project_ends": ends,
                "projectors": init,
                "mixed": 0.0,
                "mixed_float32": 0.0,
                "corners": 0,
            }
            pure = []
            for k in range(2):
                model.set_mixture_weights([[float(p == k) for p in range(2)]] * blocks)
                pure.append((model(input_ids=ids).logits - expected[k]).abs().max().item())
            row["pure"] = max(pure)
            if gate == "routed":
                choices = list(itertools.product(range(2), repeat=blocks))
                row["corners"] = len(choices)
                for name, dtype in (("mixed_float32", torch.float32), ("mixed", torch.float64)):
                    model.to(dtype)
                    for choice in choices:
                        model.set_mixture_weights([[float(p == k) for p in range(2)] for k in choice])
                        hybrid = discretize(model, list(choice), refit=False)
                        difference = (model(input_ids=ids).logits - hybrid(input_ids=ids).logits).abs().max().item()
                        row[name] = max(row[name], difference)
            rows.append(row)
            print(row, flush=True)
    worst = max(max(row["pure"], row["mixed"]) for row in rows)
    scale = max(logits.abs().max().item() for logits in expected)
    rounded = max(row["mixed_float32"] for row in rows)
    print(f"largest difference {worst:.2e}; of mixed corners in float32 {rounded:.2e}; largest logit {scale:.1f}")
    print(f"the scan's code and transformers' differ by {scan:.2e}")
    found = {"largest_difference": worst, "largest_mixed_float32": rounded, "largest_logit": scale, "scan": scan}
    write("corners", {"rows": rows, **found, "tolerance": TOLERANCE})
    if worst > TOLERANCE:
        raise SystemExit(f"corners differ by {worst:.2e}, allowed is {TOLERANCE}")


if __name__ == "__main__":
    main()
