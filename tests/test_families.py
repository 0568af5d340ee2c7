"""Every family in every cell of its table, and the page that shows the table."""

import pytest
from family_checks import BOUND, CELLS, measure_family
from tiny import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cell_is_within_the_bound(family):
    cells = measure_family(family)
    assert tuple(cells) == CELLS
    assert all(value <= BOUND for value in cells.values()), cells
