"""
E6. Three components of three families in six blocks: is the hybrid that the search makes of them better than the best
of the three?

As `two_domains.py`, whose components, text and seeds are used again (its finished units count here): GPT-NeoX of
prose, Mamba-2 of code, and Llama of prose, six layers each, in six blocks of one layer. Of the 729 hybrids `stitch`
scores some by beam search; the best four are fine-tuned a little, and the winner gets what is left of the tokens. All
text that goes through a model in the search is paid from them, as often as it does, so the budget is twice that of
`two_domains.py`. Compared with each component continued, the mean of their probabilities, and the supernet at uniform
and random mixture weights, in the same way.

Finished units are kept in the cache folder and in `results/three_components.jsonl`; a start reads both and goes on.
"""

from dataclasses import replace

import two_domains
from _domain_plan import Plan, Setting
from _domain_run import options, run
from _shared import parsed


SETTING = replace(
    two_domains.SETTING,
    component_tokens=two_domains.SETTING.component_tokens | {"llama": 6_900_000},
    speeds=two_domains.SETTING.speeds | {"llama": 10_400},
    extra_tokens=2 * two_domains.SETTING.extra_tokens,
    calibration_rows=24,
    scored_rows=8,
    halved=4,
    halving_share=0.03,
    beam=3,
)
TRIPLES = {"gpt_neox prose, mamba2 code, llama prose": (("gpt_neox", "prose"), ("mamba2", "code"), ("llama", "prose"))}
BLOCKS = 6


def main(words: list[str] | None = None) -> bool:
    """Do what is left, print the table and write `results/three_components.json`."""
    given = parsed(options(__doc__, seeds=3), words)

    def plan_of(setting: Setting) -> Plan:
        blocks = min(BLOCKS, setting.layers)
        return Plan(setting, TRIPLES, list(range(given.seeds)), blocks, drops=False, orders=False)

    return run("three_components", given, SETTING, plan_of, others=("two_domains",))


if __name__ == "__main__":
    main()
