"""
Every family against its uncut model, cell by cell: the largest difference, float32, tiny random models. Writes
`docs/families.md` and `results/families.json`; an error where a cell exceeds the bound.
"""

import inspect
import json
import sys
from pathlib import Path

import torch
from _shared import RESULTS, quiet, versions, write


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from family_checks import BOUND, CELLS, measure_family  # noqa: E402  (needs the path above)
from tiny import FAMILIES  # noqa: E402

from modeling_manticore import cache_manticore, configuration_manticore, slicing_manticore  # noqa: E402


PAGE = """# Families

Each row is a tiny random model of the family, cut evenly and unevenly into slices, against the same model uncut: the
largest difference in float32, {bound:g} allowed. Written by `python benchmarks/families.py` with {versions}.

{explanation}

| family | {cells} |
|---|{rules}
{rows}

## Others

{count} more families passed the same comparison (full forward, and with a cache in pieces of one and several tokens)
in `python benchmarks/other_families.py`, which tries every causal language model of transformers that a common tiny
configuration can make: {others}. They are not part of the tests.

## Refused

| family | reason |
|---|---|
{refused}

Quantized checkpoints and adapters are refused as components, with what to do in the message. Every family is checked
when a hybrid is composed: its base model without layers must be the identity on `inputs_embeds`, have no parameters
outside its layers and final norm, and run that norm once. {more} were refused by that check among those tried above.
What it cannot see is a layer that reads more than its hidden states, which is why families are refused by name.

## Where a hybrid differs from the uncut family

- {one_token}: the uncut models restart their recurrence from zero when several tokens meet a filled cache. A hybrid
  feeds their slices one token at a time there, so that continuing equals a full forward pass.
- {on_modules}: the uncut model keeps its states on its modules, where beams cannot be reordered. A hybrid keeps them
  in its cache.
- Mixers in the manner of Mamba-2 with limited time steps (nemotron_h): the uncut models forget the limits for single
  tokens. A hybrid keeps to them, so that decoding equals a full forward pass.
- {leaks}: the uncut model lets left padding into its convolution. A hybrid does not, so that a padded row equals the
  row alone.
- Positions follow the attention mask where none are given, for every family.

## Adding a family

1. Add a tiny configuration to `FAMILIES` in `tests/tiny.py` and run `pytest tests/test_families.py`.
2. If composing refuses it, look at what its base model does outside its layers and add the name to the table it
   belongs to at the top of `modeling_manticore/slicing_manticore.py` (`FINAL_NORMS`, `BEFORE_FIRST`, `AFTER_LAST`,
   `LEARNED_POSITIONS`, `UNIT_FACTORS`, `ONE_TOKEN_AT_A_TIME`) or `cache_manticore.py` (`STATE_ON_MODULES`,
   `PADDING_LEAKS`). No other code should need to know the family.
3. If its layers read anything but their hidden states, add it to `REFUSED_FAMILIES` in
   `modeling_manticore/configuration_manticore.py` with the reason.
4. Run `python benchmarks/families.py`, which rewrites this page.
"""


def main() -> None:
    """Measure, print the table, write the page and the results."""
    quiet()
    torch.set_num_threads(1)
    found = {}
    for family in FAMILIES:
        found[family] = measure_family(family)
        print(f"{family:<22}", "  ".join(f"{cell} {value:.1e}" for cell, value in found[family].items()), flush=True)
    others = json.loads((RESULTS / "other_families.json").read_text())
    more = [family for family, cells in others["found"].items() if "refused" in cells]
    worst = max(value for cells in found.values() for value in cells.values())
    explanation = inspect.cleandoc(measure_family.__doc__).partition("float32. ")[2]
    page = PAGE.format(
        bound=BOUND,
        versions=" and ".join(f"{name} {version}" for name, version in versions("torch", "transformers").items()),
        explanation="- " + explanation.replace("\n", " ").replace(". ", ".\n- "),
        cells=" | ".join(cell.replace("_", " ") for cell in CELLS),
        rules="---|" * len(CELLS),
        rows="\n".join(f"| {name} | " + " | ".join(_shown(v) for v in c.values()) + " |" for name, c in found.items()),
        refused="\n".join(f"| {k} | {reason} |" for k, reason in configuration_manticore.REFUSED_FAMILIES.items()),
        count=len(others["right"]),
        others=", ".join(others["right"]),
        more=", ".join(sorted(set(more) - configuration_manticore.REFUSED_FAMILIES.keys())),
        one_token=", ".join(slicing_manticore.ONE_TOKEN_AT_A_TIME),
        on_modules=", ".join(cache_manticore.STATE_ON_MODULES),
        leaks=", ".join(cache_manticore.PADDING_LEAKS),
    )
    (ROOT / "docs" / "families.md").write_text(page, encoding="utf-8")
    write("families", {"bound": BOUND, "largest": worst, "families": found})
    if worst > BOUND:
        raise SystemExit(f"a cell differs by {worst:.1e}, allowed is {BOUND:g}")


def _shown(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}"


if __name__ == "__main__":
    main()
