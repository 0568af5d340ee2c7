"""
E2. Does a hybrid of a prose component and a code component beat the better of them, each given the same extra tokens?

GPT-NeoX and Mamba-2 of equal size are trained on English prose (the King James Bible and Shakespeare) and on code
(Python's standard library), both families in both roles, for at least ten minutes each; anew with every seed. Then
every model gets the same number of further tokens, half prose and half code: each component continued; both orders of
the halves (one component's lower half, bridged to the other's upper half), of which `stitch` with halving chooses one
(calibration, scoring and halving are paid from the same tokens, counting all text that goes through a model); a half
of a component alone (layer dropping); the supernet at uniform and at random mixture weights (twice the size). Beside
them, without any or with twice the tokens, the mean of both components' probabilities; and, on some seeds, a component
with exactly the hybrid's parameters, trained from scratch on both domains with as many tokens as a component and its
further ones.

Learning rates are compared on search rows of the first seed, by model, and the best goes on to the others (halving
itself trains at the middle of the grid). Bits per byte and nats a token on test documents of prose, of code,
and their mean (the mixture). The better component is chosen on search rows in every seed. Differences are paired by
seed, with Student's interval, and a sign-flip p where there are six; the bootstrap over documents of every run stands
beside it.

Finished units are kept in the cache folder and in `results/two_domains.jsonl`; a start reads both and goes on.
"""

from _domain_plan import Plan, Setting
from _domain_run import options, run
from _shared import parsed


# Tokens of eleven minutes of one thread, with another process beside it: 11,500 and 4,600 tokens a second.
SETTING = Setting(
    component_tokens={"gpt_neox": 7_500_000, "mamba2": 3_100_000},
    speeds={"gpt_neox": 11_500, "mamba2": 4_600},
)
PAIRS = {
    "gpt_neox prose, mamba2 code": (("gpt_neox", "prose"), ("mamba2", "code")),
    "mamba2 prose, gpt_neox code": (("mamba2", "prose"), ("gpt_neox", "code")),
}


def main(words: list[str] | None = None) -> bool:
    """Do what is left, print the tables and write `results/two_domains.json`."""
    parser = options(__doc__, seeds=6)
    parser.add_argument(
        "--from_scratch_seeds", type=int, default=3, help="seeds with components trained on everything"
    )
    given = parsed(parser, words)
    if given.from_scratch_seeds < 0:
        parser.error(f"from_scratch_seeds: got {given.from_scratch_seeds}, allowed is at least 0")

    def plan_of(setting: Setting) -> Plan:
        return Plan(setting, PAIRS, list(range(given.seeds)), from_scratch_seeds=given.from_scratch_seeds)

    return run("two_domains", given, SETTING, plan_of)


if __name__ == "__main__":
    main()
