"""Cached generation against a full forward, left padding against single rows, beams against no cache."""

import copy

import pytest
import torch
from tiny import component, tokens
from transformers import DynamicCache

from modeling_manticore import ManticoreForCausalLM, discretize


def path(k, start, stop):
    return {"component": k, "start": start, "stop": stop}


def supernet(*families, **options):
    return ManticoreForCausalLM.from_components([component(f, i) for i, f in enumerate(families)], **options)


HYBRIDS = {
    "gpt_neox+mamba": lambda: supernet("gpt_neox", "mamba", num_blocks=2),
    "gpt2+mamba2": lambda: supernet("gpt2", "mamba2", num_blocks=3, gate="mixture"),
    "gemma3+falcon_mamba": lambda: supernet("gemma3_text", "falcon_mamba", num_blocks=2, project_ends=False),
    "opt+qwen3+mamba2": lambda: supernet("opt", "qwen3", "mamba2", num_blocks=2),
    "discretized gpt_neox-mamba": lambda: discretize(supernet("gpt_neox", "mamba", num_blocks=2), [0, 1]),
    "discretized mamba2-llama-mamba2": lambda: discretize(supernet("mamba2", "llama", num_blocks=3), [0, 1, 0]),
    "overlapping": lambda: supernet("qwen2", "mamba2", blocks=[[path(0, 0, 3)], [path(1, 0, 2)], [path(0, 1, 4)]]),
    "repeated": lambda: supernet("gpt_neo", "mamba", blocks=[[path(1, 0, 2)], [path(1, 0, 2)], [path(0, 0, 4)]]),
}


@pytest.fixture(params=HYBRIDS, scope="module")
def hybrid(request):
    return HYBRIDS[request.param]()


@torch.no_grad()
def test_prefill_and_decode_equal_a_full_forward(hybrid):
    ids = tokens()
    expected = hybrid(ids).logits
    for steps in (range(6, 13), (6, 9, 12)):
        out, parts = None, []
        for start, stop in zip((0, *steps), steps):
            cache = None if out is None else out.past_key_values
            out = hybrid(ids[:, start:stop], past_key_values=cache, use_cache=True)
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_left_padded_batch_equals_each_row_alone(hybrid):
    ids = tokens(3, 12)
    lengths = (12, 9, 5)
    mask = torch.stack([(torch.arange(12) >= 12 - length).long() for length in lengths])
    out = hybrid(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
    last = hybrid(ids[:, -1:], attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
    for row, length in enumerate(lengths):
        alone = hybrid(ids[row : row + 1, 12 - length :]).logits[0]
        torch.testing.assert_close(out.logits[row, 12 - length :], alone[:-1], atol=1e-4, rtol=0)
        torch.testing.assert_close(last.logits[row, 0], alone[-1], atol=1e-4, rtol=0)


@torch.no_grad()
def test_beam_search_equals_beam_search_without_a_cache(hybrid):
    options = {
        "max_new_tokens": 6,
        "num_beams": 3,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "return_dict_in_generate": True,
        "output_scores": True,
        "attention_mask": torch.ones(2, 8, dtype=torch.long),
    }
    cached = hybrid.generate(tokens(2, 8), use_cache=True, **options)
    plain = hybrid.generate(tokens(2, 8), use_cache=False, **options)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(cached.sequences_scores, plain.sequences_scores, atol=1e-4, rtol=0)


def test_foreign_caches_attentions_and_far_positions_are_refused():
    hybrid = HYBRIDS["gpt2+mamba2"]()
    with pytest.raises(ValueError, match="past_key_values: got DynamicCache"):
        hybrid(tokens(), past_key_values=DynamicCache(config=hybrid.config.components[0]))
    with pytest.raises(ValueError, match="output_attentions"):
        hybrid(tokens(), output_attentions=True)
    with pytest.raises(ValueError, match="64 learned positions"):
        hybrid(tokens(1, 65))
    with pytest.raises(ValueError, match="cache_implementation: got 'static'"):
        hybrid.generate(tokens(), max_new_tokens=2, cache_implementation="static")


@torch.no_grad()
def test_the_cache_is_taken_by_its_new_name_too():
    hybrid, ids = HYBRIDS["gpt_neox+mamba"](), tokens()
    first = hybrid(ids[:, :6], use_cache=True)
    caches = [first.past_key_values, copy.deepcopy(first.past_key_values)]
    old = hybrid(ids[:, 6:7], past_key_values=caches[0]).logits
    assert torch.equal(hybrid(ids[:, 6:7], cache=caches[1]).logits, old) and caches[1].get_seq_length() == 7
    with pytest.raises(ValueError, match="cache: got one beside past_key_values"):
        hybrid(ids[:, 7:8], cache=caches[0], past_key_values=caches[1])


def test_settings_that_hybrids_refuse_are_not_taken_over_from_a_component():
    given = component("llama")
    given.generation_config.update(cache_implementation="hybrid", prompt_lookup_num_tokens=3, max_new_tokens=2)
    ids = {"input_ids": tokens()[:1], "attention_mask": torch.ones_like(tokens()[:1]), "pad_token_id": 0}
    recurrent = ManticoreForCausalLM.from_components([given, component("mamba2")], num_blocks=2)
    settings = recurrent.generation_config
    assert settings.cache_implementation is None and settings.prompt_lookup_num_tokens is None
    assert recurrent.generate(**ids).shape[1] == tokens().shape[1] + 2
    plain = ManticoreForCausalLM.from_components([given, component("gpt_neox")], num_blocks=2)
    assert plain.generation_config.prompt_lookup_num_tokens == given.generation_config.prompt_lookup_num_tokens == 3
    assert plain.generate(**ids).shape[1] == tokens().shape[1] + 2
