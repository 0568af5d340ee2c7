"""Slices of one forward pass share masks and rotary tables, exactly where these are equal."""

import copy
import functools
import pickle

import pytest
import torch
from tiny import FAMILIES, tokens
from transformers.models.llama import modeling_llama

from modeling_manticore import ManticoreConfig, ManticoreForCausalLM, modeling_manticore, sharing_manticore
from modeling_manticore.slicing_manticore import run_view


def hybrid(families, paths, change=()):
    """A hybrid of fresh components, one path a block; `change` are (component, field, value)."""
    torch.manual_seed(0)
    components = [FAMILIES[family]() for family in families]
    for k, field, value in change:
        setattr(components[k], field, value)
    blocks = [[{"component": k, "start": start, "stop": stop}] for k, start, stop in paths]
    return ManticoreForCausalLM(ManticoreConfig(components=components, blocks=blocks)).eval()


@torch.no_grad()
def padded_prefill_and_steps(model):
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    logits, cache = [model(ids, attention_mask=mask, use_cache=False).logits], None
    for start, stop in ((0, 6), (6, 7), (7, 8), (8, 9)):
        out = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        logits.append(out.logits)
        cache = out.past_key_values
    return logits


def each_by_itself(model, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(modeling_manticore, "new_tables", lambda: None)
        return padded_prefill_and_steps(model)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_with_and_without(family, monkeypatch):
    model = hybrid([family, "gpt_neox"], [(0, 0, 2), (1, 0, 1), (0, 1, 3), (0, 0, 3)])
    assert same(padded_prefill_and_steps(model), each_by_itself(model, monkeypatch))


@pytest.fixture
def built(monkeypatch):
    """What the masks and rotary tables of llama were built for, in order."""
    calls, builder = [], modeling_llama.create_causal_mask
    rotary = modeling_llama.LlamaRotaryEmbedding.forward
    sharing_manticore._lean.cache_clear()

    @functools.wraps(builder)
    def masks(**kwargs):
        calls.append("mask")
        return builder(**kwargs)

    @functools.wraps(rotary)
    def tables(self, *args, **kwargs):
        calls.append("table")
        return rotary(self, *args, **kwargs)

    monkeypatch.setattr(modeling_llama, "create_causal_mask", masks)
    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", tables)
    yield calls
    sharing_manticore._lean.cache_clear()


@torch.no_grad()
def test_masks_and_tables_are_built_once_a_token(built):
    model = hybrid(["llama", "mamba2"], [(0, 0, 1), (1, 0, 1), (0, 1, 2), (1, 1, 2), (0, 2, 4)])
    cache, mask = model(tokens(2, 6), use_cache=True).past_key_values, torch.ones(2, 10, dtype=torch.long)
    for t in range(6, 9):
        built.clear()
        model(tokens(2, 1), attention_mask=mask[:, : t + 1], past_key_values=cache, use_cache=True)
        # The first single token also finds out what stem and head, which have no layers, keep from then on.
        assert sorted(built) == ["mask", "table"] if t > 6 else len(built) <= 6


def test_layers_outside_a_slice_are_not_called(monkeypatch):
    model, calls = hybrid(["llama", "gemma2"], [(0, 0, 1), (1, 1, 2), (0, 2, 3), (1, 3, 4)]), []
    forward = sharing_manticore.PassThrough.forward
    monkeypatch.setattr(
        sharing_manticore.PassThrough, "forward", lambda self, *a, **k: calls.append(self) or forward(self, *a, **k)
    )
    padded_prefill_and_steps(model)
    slices = [stub for block in model.model.blocks for stub in block.modules()]
    assert calls and not [stub for stub in calls if any(stub is other for other in slices)]


@pytest.mark.parametrize(
    "family, field, value",
    [
        ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 50.0}),
        ("mistral", "sliding_window", 2),
        ("gemma2", "sliding_window", 2),
    ],
)
def test_components_that_differ_in_one_field_share_nothing(family, field, value, monkeypatch):
    model = hybrid([family, family], [(0, 0, 2), (1, 0, 2), (0, 2, 4), (1, 2, 4)], [(1, field, value)])
    expected = each_by_itself(model, monkeypatch)
    assert same(padded_prefill_and_steps(model), expected)

    def careless(self, key, inputs, build):  # the second of every key is the configuration
        key = key[0], *key[2:]
        self.kept.append(inputs)
        return self.found.setdefault(key, build())

    monkeypatch.setattr(sharing_manticore.Tables, "get", careless)
    assert not same(padded_prefill_and_steps(model), expected)


def test_modules_whose_tables_change_or_read_more_are_not_shared():
    plain = modeling_llama.LlamaRotaryEmbedding(FAMILIES["llama"]())
    assert sharing_manticore.is_pure_table(plain)
    for kind in ("dynamic", "longrope"):
        learning = copy.copy(plain)
        learning.rope_type = kind
        assert not sharing_manticore.is_pure_table(learning)

    class ReadsValues(modeling_llama.LlamaRotaryEmbedding):
        def forward(self, x, position_ids):
            return x.mean() * position_ids

    class HasWeights(modeling_llama.LlamaRotaryEmbedding):
        def __init__(self, config):
            super().__init__(config)
            self.scale = torch.nn.Parameter(torch.ones(()))

    for kind in (ReadsValues, HasWeights):
        assert not sharing_manticore.is_pure_table(kind(FAMILIES["llama"]()))


def test_copies_share_among_themselves():
    model = hybrid(["llama", "gpt_neox"], [(0, 0, 2), (1, 0, 2), (0, 2, 4)])
    expected = padded_prefill_and_steps(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        kinds = [type(module) for module in other.modules()]
        assert kinds == [type(module) for module in model.modules()]
        assert sum(hasattr(kind, "shares_tables") for kind in kinds) == 10  # five views with a rotary module each
        assert same(padded_prefill_and_steps(other), expected)


@torch.no_grad()
def test_a_shallow_copy_runs_its_own_layers():
    model = hybrid(["llama", "gpt_neox"], [(0, 0, 2), (1, 0, 2), (0, 2, 4)])
    view = model.model.blocks[0].paths[0].slice
    other = copy.copy(view)
    other._modules = view._modules | {"layers": torch.nn.ModuleList()}
    hidden, positions = torch.randn(1, 3, 32), torch.arange(3)[None]
    assert torch.equal(run_view(other, inputs_embeds=hidden, position_ids=positions), hidden)
    assert not torch.equal(run_view(view, inputs_embeds=hidden, position_ids=positions), hidden)


@torch.no_grad()
def test_tables_do_not_outlive_their_pass():
    model = hybrid(["llama", "gpt_neox"], [(0, 0, 2), (1, 0, 2), (0, 2, 4)])
    mask = torch.ones(1, 8, dtype=torch.long)
    for cut in (2, 5, 0):
        ids, now = tokens(1, 8), mask.clone()
        now[:, :cut] = 0
        out = model(ids, attention_mask=now, use_cache=False).logits[:, cut:]
        torch.testing.assert_close(out, model(ids[:, cut:], use_cache=False).logits, atol=1e-5, rtol=0)
