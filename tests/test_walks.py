"""Blocks that continue each other run as one walk over their layers, unless somebody watches one of them."""

import copy
import pickle

import pytest
import torch
from test_sharing import hybrid, padded_prefill_and_steps, same
from tiny import FAMILIES, tokens
from torch import nn
from transformers import DynamicCache

from modeling_manticore import (
    ManticoreCache,
    mixing_manticore,
    modeling_manticore,
    sharing_manticore,
    slicing_manticore,
)


THREE = [(0, 0, 1), (0, 1, 2), (0, 2, 3)]


def one_by_one(model, monkeypatch, run=padded_prefill_and_steps):
    """What `run` gives where no two blocks run together."""
    with monkeypatch.context() as patch:
        patch.setattr(modeling_manticore, "walks", lambda blocks, chains, kind: [[b] for b in range(len(blocks))])
        return run(model)


@pytest.fixture
def lent(monkeypatch):
    """How many layers were lent to each slice that ran, in order."""
    found, run = [], mixing_manticore.run_view

    def noted(*args, **kwargs):
        found.append(len(kwargs["lent"]))
        return run(*args, **kwargs)

    monkeypatch.setattr(mixing_manticore, "run_view", noted)
    return found


@torch.no_grad()
def logits_of(model, **options):
    return model(tokens(2, 6), **options).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_together_and_one_by_one(family, monkeypatch, lent):
    model = hybrid([family, "gpt_neox"], [(1, 0, 1), *THREE, (1, 1, 2), (1, 2, 4)])
    found = padded_prefill_and_steps(model)
    assert lent == [0, 2, 1] * 5
    assert same(found, one_by_one(model, monkeypatch))
    assert lent[15:] == [0] * 30


def test_only_blocks_that_continue_each_other_run_together(lent):
    for paths, expected in (
        (THREE, [2]),
        ([(0, 0, 1), (0, 2, 3), (0, 3, 4)], [0, 1]),  # layer 1 is left out
        ([(0, 0, 2), (0, 1, 3)], [0, 0]),  # it runs twice
        ([(0, 0, 1), (1, 1, 2), (0, 2, 3), (0, 3, 4)], [0, 0, 1]),
    ):
        lent.clear()
        logits_of(hybrid(["llama", "llama"], paths))
        assert lent == expected


def test_a_cache_goes_on_either_way_and_can_be_reordered_and_cropped(monkeypatch):
    model = hybrid(["llama", "mamba2"], [*THREE, (0, 3, 4)])
    ids = tokens(2, 9)

    @torch.no_grad()
    def go_on(model, cache=None, begin=0):
        cache = copy.deepcopy(cache)
        out = model(ids[:, begin : begin + 6], past_key_values=cache, use_cache=True)
        out.past_key_values.reorder_cache(torch.tensor([1, 0]))
        out.past_key_values.crop(-2)
        return out.logits, out.past_key_values

    first, cache = go_on(model)
    alone, cache_of_blocks = one_by_one(model, monkeypatch, go_on)
    assert torch.equal(first, alone)
    expected = one_by_one(model, monkeypatch, lambda m: go_on(m, cache_of_blocks, 4))[0]
    for filled in (cache, cache_of_blocks):
        assert torch.equal(go_on(model, filled, 4)[0], expected)
        assert torch.equal(one_by_one(model, monkeypatch, lambda m, c=filled: go_on(m, c, 4))[0], expected)


def owner_of_layers(block):
    return block.paths[0].owner_and_layers()[0]


@pytest.mark.parametrize("which", [lambda b: b, lambda b: b.paths[0].slice, owner_of_layers])
def test_who_is_watched_is_called(which, lent):
    model = hybrid(["opt"], THREE)  # its layers belong to a decoder inside the base model
    expected, calls = logits_of(model), []
    watched = which(model.model.blocks[1])
    for watch in (watched.register_forward_hook, watched.register_forward_pre_hook):
        lent.clear()
        handle = watch(lambda *_: calls.append(1))
        assert torch.equal(logits_of(model), expected) and lent == [0, 0, 0]
        handle.remove()
    assert len(calls) == 2
    forward = watched.forward
    watched.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)  # as device maps do
    assert torch.equal(logits_of(model), expected) and len(calls) == 3
    del watched.forward
    lent.clear()
    assert torch.equal(logits_of(model), expected) and lent == [2]


def test_who_watches_all_modules_meets_every_block(lent):
    model, calls = hybrid(["llama"], THREE), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(module))
    logits_of(model)
    handle.remove()
    assert lent == [0, 0, 0] and all(any(block is called for called in calls) for block in model.model.blocks)


def test_a_wrapped_block_is_called(lent):
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls = inner, 0

        def __getattr__(self, name):
            return super().__getattr__(name) if name in ("inner", "calls") else getattr(self.inner, name)

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.inner(*args, **kwargs)

    model = hybrid(["llama"], THREE)
    expected = logits_of(model)
    wrapper = model.model.blocks[1] = Wrapper(model.model.blocks[1])
    lent.clear()
    assert torch.equal(logits_of(model), expected)
    assert wrapper.calls == 1 and lent == [0, 0, 0]


def test_boundaries_routers_and_training_need_every_block(lent):
    model = hybrid(["granitemoehybrid"], THREE)
    logits_of(model)
    states = model(tokens(2, 6), output_hidden_states=[1]).hidden_states
    model(tokens(2, 6), output_router_logits=True)
    model.train()(tokens(2, 6))
    assert lent == [2] + [0] * 9 and states[1] is not None


def test_changed_layers_are_the_ones_that_run(lent):
    model = hybrid(["llama"], THREE)
    before = logits_of(model)
    layers = model.model.blocks[0].paths[0].owner_and_layers()[1]
    layers[0].mlp = nn.Identity()
    assert not torch.equal(logits_of(model), before)
    layers._modules["0"] = copy.deepcopy(model.model.blocks[1].paths[0].owner_and_layers()[1][1])
    assert logits_of(model).isfinite().all() and lent == [2, 2, 2]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_base_of_a_head_without_a_norm_gives_what_it_gets(family):
    """With tables it does not run, without them it does: the logits are the same bits."""
    model = hybrid([family], THREE[:1] + [(0, 1, FAMILIES[family]().num_hidden_layers)])
    (head,) = model.heads.values()
    state = torch.randn(2, 5, FAMILIES[family]().hidden_size)
    found = slicing_manticore.run_head(head, state, sharing_manticore.Tables())
    assert torch.equal(found, slicing_manticore.run_head(head, state))
    assert same(padded_prefill_and_steps(pickle.loads(pickle.dumps(model))), padded_prefill_and_steps(model))


@pytest.mark.parametrize(
    "paths",
    [THREE, [(0, 0, 2), (0, 1, 3)], [(0, 2, 4), (0, 0, 2), (0, 0, 3)], [(0, 3, 4)] * 3, [(0, 2, 4), (1, 0, 2)]],
)
def test_every_path_has_cache_layers_of_its_own(paths):
    """Of the kinds that the component's own cache has there, however often a layer is used."""
    config = hybrid(["gemma3_text", "jamba"], paths).config
    cache, complete = ManticoreCache(config), [DynamicCache(config=c).layers for c in config.components]
    assert len({id(layer) for layer in cache.layers}) == len(cache.layers) == sum(b - a for _, a, b in paths)
    for b, (k, start, stop) in enumerate(paths):
        view = cache.view(b, 0)
        assert [type(layer) for layer in view.layers[start:stop]] == [type(x) for x in complete[k][start:stop]]
        own = {id(layer) for layer in cache.layers}
        assert [id(layer) in own for layer in view.layers] == [start <= i < stop for i in range(len(complete[k]))]
