"""A seeded sample of the random hybrids; all of them run in `benchmarks/random_hybrids.py`."""

import random

import pytest
from random_hybrids import BOUNDS, PAIRS, TRIPLES, all_draws, measure_hybrid
from tiny import FAMILIES


DRAWS = all_draws()
SAMPLE = random.Random(0).sample(DRAWS, 8)


@pytest.mark.parametrize("draw", SAMPLE, ids=lambda draw: draw.name.replace(" ", "-"))
def test_a_random_hybrid_holds(draw):
    found = measure_hybrid(draw.build())
    assert {"decode", "left_padding", "beams", "save_load"} <= found.keys()
    assert all(value <= BOUNDS[cell] for cell, value in found.items()), found


def test_the_draws_cover_every_family_and_both_kinds():
    assert len(DRAWS) == PAIRS + TRIPLES
    assert {family for draw in DRAWS for family in draw.families} == set(FAMILIES)
    assert {all(len(block) == 1 for block in draw.blocks) for draw in DRAWS} == {True, False}
    assert len({tuple(draw.families) for draw in DRAWS}) > 45
