"""Costs of a choice against the hybrid it makes; expected costs; budgets against brute force."""

import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch
from tiny import FAMILIES, component, tokens

from modeling_manticore import (
    Budget,
    ManticoreForCausalLM,
    ManticoreForSequenceClassification,
    ManticoreTrainer,
    ManticoreTrainingArguments,
    cost_table,
    discretize,
    expected_cost,
)
from modeling_manticore.building.costs import COST_KINDS, CostTable, Terms, largest
from modeling_manticore.building.limits import argmax_under, check_feasible, smallest
from modeling_manticore.search.stitch import _beam
from modeling_manticore.tasks.text import as_dataset


def path(k, start, stop):
    return {"component": k, "start": start, "stop": stop}


def compose(*families, **options):
    return ManticoreForCausalLM.from_components([component(f, i) for i, f in enumerate(families)], **options)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mamba"])
def test_parameters_and_cache_are_those_of_the_discretized_hybrid(family):
    model = compose(family, "mamba", num_blocks=2)
    table = cost_table(model, context=16)
    for choice in itertools.product(range(2), repeat=2):
        hybrid = discretize(model, list(choice))
        costs = table.of(choice)
        assert costs["parameters"] == sum(p.numel() for p in hybrid.parameters())
        assert f"cache {costs['cache_bytes_per_token']:,} bytes per token" in hybrid.describe()
        assert costs["flops_per_token"] > 0
    assert table.of([1, 1])["attention_blocks"] == 0


def test_one_block_early_stops_and_classifiers():
    model = compose("mamba2", "llama", blocks=[[path(0, 0, 2), path(1, 1, 3), path(1, 0, 4)]])
    for choice in ([0], [1], [2]):
        assert cost_table(model).of(choice)["parameters"] == sum(
            p.numel() for p in discretize(model, choice).parameters()
        )
    blocks = [[path(0, 0, 2), path(1, 0, 1)], [path(0, 2, 4), path(1, 1, 3)]]
    config = compose("llama", "mamba", blocks=blocks).config
    config.num_labels = 3
    classifier = ManticoreForSequenceClassification(config)
    for choice in ([0, 0], [0, 1], [1, 0]):
        hybrid = discretize(classifier, choice)
        assert cost_table(classifier).of(choice)["parameters"] == sum(p.numel() for p in hybrid.parameters())


def test_flops_by_hand():
    model = compose("llama", "mamba", num_blocks=2)
    config = model.config.components[0]
    d, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    width = d // heads
    matrices = 2 * d * d + 2 * d * config.num_key_value_heads * width + 3 * d * inner
    for context in (8, 64):
        expected = 4 * (2 * matrices + 4 * heads * width * context) + 2 * d * config.vocab_size
        assert cost_table(model, context).of([0, 0])["flops_per_token"] == expected
    assert cost_table(model, 8).of([1, 1]) == cost_table(model, 64).of([1, 1])


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("kind", COST_KINDS)
def test_expected_cost_is_the_mean_over_choices_and_differentiable(kind, blocks):
    model = compose("llama", "mamba", num_blocks=blocks)
    table = cost_table(model)
    torch.manual_seed(0)
    model.set_mixture_weights([torch.rand(2).softmax(0) for _ in range(blocks)])
    points = [point.detach() for point in model.mixture_weights()]
    mean = sum(
        math.prod(float(point[p]) for point, p in zip(points, choice)) * table.of(choice)[kind]
        for choice in itertools.product(range(2), repeat=blocks)
    )
    cost = expected_cost(model, kind)
    assert cost.item() == pytest.approx(mean, rel=1e-5)
    assert all(table.of(c)[kind] <= largest(table, kind) for c in itertools.product(range(2), repeat=blocks))
    cost.backward()
    assert all(torch.isfinite(b.mixture.parameter.grad).all() for b in model.model.blocks)
    assert any(b.mixture.parameter.grad.abs().sum() > 0 for b in model.model.blocks)
    with pytest.raises(ValueError, match="kind: got 'size'"):
        expected_cost(model, "size")


def random_table(draw: random.Random) -> CostTable:
    paths = [draw.randint(1, 3) for _ in range(draw.randint(1, 5))]
    inner = range(1, len(paths) - 1)
    skips = [draw.randrange(n) if b in inner and draw.random() < 0.5 else None for b, n in enumerate(paths)]

    def terms(top: int) -> Terms:
        def some(*shape):
            size = math.prod(shape)
            return torch.tensor([draw.randint(0, top) for _ in range(size)], dtype=torch.float64).view(*shape)

        nodes, ends, edges = [some(n) + top for n in paths], -some(paths[0], paths[-1]) / 4, {}
        for b, skip in enumerate(skips):
            if skip is not None:
                nodes[b][skip] = 0
        for c in range(1, len(paths)):
            for b in reversed(range(c)):
                edges[b, c] = some(paths[b], paths[c])
                if skips[b] is None:
                    break
        return Terms(nodes, edges, ends.floor(), skips)

    owners = [[None if p == skip else draw.randrange(3) for p in range(n)] for n, skip in zip(paths, skips)]
    return CostTable(16, {kind: terms(top) for kind, top in zip(COST_KINDS, (1, 40, 8, 1000))}, owners)


def meets(table, choice, costs, budget):
    """By hand: every upper limit, and as many different components as are wanted."""
    own = {table.components[b][p] for b, p in enumerate(choice)} - {None}
    return all(costs[k] <= v for k, v in budget.limits().items()) and len(own) >= (budget.min_components or 1)


def test_two_hundred_random_searches_under_random_limits():
    feasible = 0
    for seed in range(200):
        draw = random.Random(seed)
        table = random_table(draw)
        choices = list(itertools.product(*map(range, table.paths)))
        costs = {choice: table.of(choice) for choice in choices}
        limits = {}
        for kind in draw.sample(COST_KINDS, draw.randint(1, 4)):
            values = [cost[kind] for cost in costs.values()]
            limits[f"max_{kind}"] = max(0, draw.randint(min(values) - 1, max(values)))
        budget = Budget(**limits, min_components=draw.choice((None, 1, 2, 3)))
        weights = [torch.tensor([draw.random() for _ in range(n)]).softmax(0) for n in table.paths]
        value = {c: sum(math.log(float(a[p])) for a, p in zip(weights, c)) for c in choices}
        within = [c for c in choices if meets(table, c, costs[c], budget)]
        if not within:
            with pytest.raises(ValueError, match="the (smallest|largest) feasible value"):
                argmax_under(table, weights, budget)
            continue
        feasible += 1
        found = tuple(argmax_under(table, weights, budget))
        assert found in within and table.within(found, budget)
        assert value[found] == pytest.approx(max(value[c] for c in within), abs=1e-9)
        for kind in COST_KINDS:
            assert smallest(table, kind, budget) == min(costs[c][kind] for c in within)
    assert 40 < feasible < 200


def test_two_hundred_random_beams_under_random_limits():
    """Random losses: a beam as wide as the space finds the best within the limits, a narrow one stays within them."""
    checked = 0
    for seed in range(200):
        draw = random.Random(1000 + seed)
        table = random_table(draw)
        choices = list(itertools.product(*map(range, table.paths)))
        costs = {choice: table.of(choice) for choice in choices}
        kinds = draw.sample(COST_KINDS, draw.randint(1, 3))
        anchor = costs[draw.choice(choices)]  # so that something is within
        least = draw.choice((None, 1, 2))
        budget = Budget(**{f"max_{kind}": max(0, anchor[kind]) for kind in kinds}, min_components=least)
        within = [c for c in choices if meets(table, c, costs[c], budget)]
        if not within:
            continue
        checked += 1
        losses = {choice: draw.random() for choice in choices}
        paths = [list(range(n)) for n in table.paths]
        blocks = [[{"component": None if p == skip else p} for p in block] for block, skip in zip(paths, table.skips)]
        runner = SimpleNamespace(
            config=SimpleNamespace(blocks=blocks),
            last=lambda choice, skips=table.skips: [(b, p) for b, p in enumerate(choice) if p != skips[b]][-1],
            ends=lambda before, after: (before[1], after[1]),
            needs_bridge=lambda pair: pair[0] != pair[1],
        )
        for beam in (1, len(choices)):
            scored = {}
            scorer = SimpleNamespace(
                runner=runner,
                losses=scored,
                score=lambda new, scored=scored, losses=losses: scored.update({c: losses[c] for c in new}),
            )
            _beam(scorer, table, paths, budget, beam)
            assert scored and all(c in within for c in scored)
            if beam > 1:
                assert min(scored.values()) == min(losses[c] for c in within)
    assert checked > 150


def test_infeasible_limits_name_the_smallest_value():
    model = compose("llama", "mamba", num_blocks=2)
    table = cost_table(model)
    least = min(table.of(c)["parameters"] for c in itertools.product(range(2), repeat=2))
    with pytest.raises(ValueError, match=f"max_parameters: got 5, the smallest feasible value is {least}"):
        discretize(model, budget=Budget(max_parameters=5))
    check_feasible(table, Budget(max_parameters=least))
    both = [table.of(c) for c in itertools.product(range(2), repeat=2)]
    without = min(c["parameters"] for c in both if c["attention_blocks"] == 0)
    if without > least:
        with pytest.raises(ValueError, match=f"under the other limits is {without}"):
            discretize(model, budget=Budget(max_parameters=least, max_attention_blocks=0))
    with pytest.raises(ValueError, match="max_parameters: got -1"):
        Budget(max_parameters=-1)
    with pytest.raises(ValueError, match="max_flops_per_token: got True"):
        Budget(max_flops_per_token=True)


def test_argmax_within_a_budget():
    model = compose("gpt_neox", "mamba2", num_blocks=3)
    model.set_mixture_weights([[0.6, 0.4], [0.9, 0.1], [0.8, 0.2]])
    assert discretize(model).config.blocks == discretize(model, [0, 0, 0]).config.blocks
    for blocks, choice in ((2, [1, 0, 0]), (1, [1, 0, 1]), (0, [1, 1, 1])):
        hybrid = discretize(model, budget=Budget(max_attention_blocks=blocks))
        assert hybrid.describe() == discretize(model, choice).describe()
    with pytest.raises(ValueError, match=r"choice: got \[0, 0, 1\] with 2 attention_blocks, allowed are at most 1"):
        discretize(model, [0, 0, 1], budget=Budget(max_attention_blocks=1))
    with pytest.raises(ValueError, match="budget: got dict"):
        discretize(model, budget={})


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_cost_term_draws_a_search_to_cheaper_paths(tmp_path, accumulation):
    def course(weight):
        model = compose("gpt_neox", "mamba2", num_blocks=2)
        args = ManticoreTrainingArguments(
            output_dir=str(tmp_path / str(weight)),
            stage="search",
            train_components=False,
            learning_rate=0.0,
            mixture_learning_rate=0.1,
            cost_weight=weight,
            cost_kind="attention_blocks",
            max_steps=8,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        ManticoreTrainer(model=model, args=args, train_dataset=as_dataset(tokens(32, 8))).train()
        return expected_cost(model, "attention_blocks").item()

    assert course(100.0) < 0.7 < course(0.0)


def test_the_cost_term_does_not_depend_on_accumulation(tmp_path):
    found = []
    for accumulation in (1, 4):
        model = compose("gpt_neox", "mamba2", num_blocks=2)
        args = ManticoreTrainingArguments(
            output_dir=str(tmp_path / str(accumulation)),
            stage="search",
            train_components=False,
            learning_rate=0.0,
            mixture_learning_rate=0.1,
            cost_weight=100.0,
            max_grad_norm=0.0,
            max_steps=1,
            optim="sgd",
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        ManticoreTrainer(model=model, args=args, train_dataset=as_dataset(tokens(8, 8))).train()
        found.append(torch.stack([block.mixture.logits.detach() for block in model.model.blocks]))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    assert found[0].abs().max() > 0.1


BAD = {"cost_weight": (-1.0, "cost_weight: got -1.0"), "cost_kind": ("size", "cost_kind: got 'size'")}


@pytest.mark.parametrize("field", BAD)
def test_bad_cost_arguments(field, tmp_path):
    value, message = BAD[field]
    with pytest.raises(ValueError, match=message):
        ManticoreTrainingArguments(output_dir=str(tmp_path), **{field: value})


def test_at_least_two_components_where_one_wins_every_block(caplog):
    model = compose("llama", "mamba", num_blocks=3)
    model.set_mixture_weights([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2]])
    alone = discretize(model)
    assert alone.config.used_components == [0]
    told = caplog.text
    assert "component 0 wins every block" in told and "min_components=2" in told and "--min_components 2" in told
    both = discretize(model, budget=Budget(min_components=2))
    assert [block[0]["component"] for block in both.config.blocks] == [0, 1, 0]
    with pytest.raises(ValueError, match=r"choice: got \[1, 1, 1\] of the components \[1\] alone"):
        discretize(model, [1, 1, 1], budget=Budget(min_components=2))
    with pytest.raises(ValueError, match="min_components: got 3, the largest feasible value is 2"):
        discretize(model, budget=Budget(min_components=3))
    for wrong in (0, True, 1.5):
        with pytest.raises(ValueError, match="min_components: got"):
            Budget(min_components=wrong)
