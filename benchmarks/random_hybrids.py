"""
Hybrids of 40 random pairs and 10 random triples of the families, with random cuts, sizes, gates and mixture weights:
forward with and without a cache, left-padded generation, beams, save and load, gradients. Writes
`results/random_hybrids.json`; an error where a cell exceeds its bound.
"""

import sys
from pathlib import Path

import torch
from _shared import quiet, write


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from random_hybrids import BOUNDS, all_draws, measure_hybrid  # noqa: E402  (needs the path above)


def main() -> None:
    """Measure, print the table, write the results."""
    quiet()
    torch.set_num_threads(1)
    rows, bad = [], []
    for draw in all_draws():
        found = measure_hybrid(draw.build())
        rows.append({"name": draw.name, "seed": draw.seed, "widths": draw.widths, **draw.options, "cells": found})
        print(f"{draw.name:<52}", "  ".join(f"{cell} {value:.0e}" for cell, value in found.items()), flush=True)
        bad += [f"{draw.name} {cell}" for cell, value in found.items() if value > BOUNDS[cell]]
    largest = {cell: max(row["cells"].get(cell, 0.0) for row in rows) for cell in BOUNDS}
    print("largest:", "  ".join(f"{cell} {value:.1e}" for cell, value in largest.items()))
    write("random_hybrids", {"bounds": BOUNDS, "largest": largest, "hybrids": rows})
    if bad:
        raise SystemExit(f"beyond the bounds: {', '.join(bad)}")


if __name__ == "__main__":
    main()
