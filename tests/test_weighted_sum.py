"""The weighted sum of paths and logits: against products and sums in float64, and as far as autograd goes."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from modeling_manticore.forward_manticore import weighted_sum


def terms(dtype, count=3, gradient=True, seed=0):
    """(weights, values (2, 5, 7), one more value) of the simplex and noise."""
    draws = torch.Generator().manual_seed(seed)
    point = torch.softmax(torch.randn(count, generator=draws, dtype=torch.float64), 0).to(dtype)
    values = torch.randn(count + 1, 2, 5, 7, generator=draws, dtype=torch.float64).to(dtype)
    weights, values = list(point.unbind()), list(values.unbind())
    leaves = [t.detach().clone().requires_grad_(gradient) for t in weights + values]
    return leaves[:count], leaves[count:-1], leaves[-1]


def naive(weights, values, beside=None):
    total = 0 if beside is None else beside
    for a, x in zip(weights, values):
        total = total + a * x
    return total


@pytest.mark.parametrize("with_beside", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_values_and_slopes_are_those_of_products_and_sums(count, with_beside):
    slope = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = {}
    for name, dtype, function in (
        ("exact", torch.float64, naive),
        ("ours", torch.float32, lambda a, x, beside: weighted_sum(a, x, always=True, beside=beside)),
    ):
        weights, values, beside = terms(dtype, count)
        output = function(weights, values, beside if with_beside else None)
        leaves = weights + values + [beside] * with_beside
        found[name] = [output, *torch.autograd.grad(output, leaves, slope.to(dtype))]
    for ours, exact in zip(found["ours"], found["exact"], strict=True):
        assert ours.dtype == torch.float32 and ours.shape == exact.shape
        torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=2e-6)


def test_gradients_of_gradients_forward_ones_and_rows_of_a_batch():
    weights, values, beside = terms(torch.float64, 2)

    def function(*tensors):
        return weighted_sum(list(tensors[:2]), list(tensors[2:4]), beside=tensors[4])

    leaves = (*weights, *values, beside)
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)
    tangents = tuple(torch.randn_like(leaf) for leaf in leaves)
    output, along = torch.func.jvp(function, leaves, tangents)
    assert torch.equal(output, naive(weights, values, beside))
    by_hand = tangents[4] + sum(tangents[j] * values[j] + weights[j] * tangents[2 + j] for j in range(2))
    torch.testing.assert_close(along, by_hand)
    mapped = torch.func.vmap(function, in_dims=(None, None, 0, 0, 0))(*leaves)
    torch.testing.assert_close(mapped, naive(weights, values, beside))


def test_what_is_not_there_and_what_does_not_fit():
    weights, values, _ = terms(torch.float32, 3, gradient=False)
    assert weighted_sum(weights[:1], values[:1]) is values[0]
    assert torch.equal(weighted_sum(weights, [None, values[1], None]), weights[1] * values[1])
    half = [x.bfloat16() for x in values]  # weights stay float32: the sum is in the states' dtype
    assert (
        torch.equal(weighted_sum(weights, half), naive(weights, half))
        and weighted_sum(weights, half).dtype == torch.bfloat16
    )
    mixed = weighted_sum(weights, [values[0], half[1], values[2]])
    assert torch.equal(mixed, naive(weights, [values[0], half[1], values[2]])) and mixed.dtype == torch.float32
    assert torch.equal(weighted_sum([1.0, 2.0], values[:2]), values[0] + 2 * values[1])
    above = weighted_sum(weights[:1], half[:1], always=True, beside=values[1])  # the higher precision stays
    assert above.dtype == torch.float32 and torch.equal(above, values[1] + weights[0] * half[0])


def test_a_compiled_graph_takes_the_plain_products():
    weights, values, _ = terms(torch.float32, 2, gradient=False)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(weighted_sum, backend=keep, fullgraph=True)
    torch.testing.assert_close(compiled(weights, values), naive(weights, values))
    assert len(graphs) == 1


def test_checkpointed_sums_ask_for_what_they_saved_once():
    found = []
    for checkpointed in (False, True):
        weights, values, beside = terms(torch.float32, 2)

        def function(*tensors):
            return weighted_sum(list(tensors[:2]), list(tensors[2:4]), beside=tensors[4]).tanh()

        leaves = (*weights, *values, beside)
        output = checkpoint(function, *leaves, use_reentrant=False) if checkpointed else function(*leaves)
        found.append(torch.autograd.grad(output.square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
