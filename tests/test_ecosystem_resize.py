"""resize_token_embeddings with tied, untied and several heads: old logits stay, new tokens train, generate, reload."""

import pytest
import torch
from tiny import VOCAB, component, tokens
from transformers import AutoModelForCausalLM

from modeling_manticore import ManticoreForCausalLM, discretize


def supernet(*families):
    return ManticoreForCausalLM.from_components([component(f, i) for i, f in enumerate(families)], num_blocks=2)


HYBRIDS = {
    "untied": lambda: supernet("gpt_neox", "llama"),
    "tied": lambda: supernet("gpt2", "mamba"),
    "three heads": lambda: supernet("gemma3_text", "qwen3", "mamba2"),
    "head without its stem": lambda: discretize(supernet("gpt2", "mamba"), [0, 1]),
    "tied, discretized": lambda: discretize(supernet("gpt2", "mamba"), [1, 1]),
}


def matrices(model):
    """Every matrix with one row per token, by where it is."""
    found = {f"stem {k}": stem.get_input_embeddings().weight for k, stem in model.model.stems.items()}
    return found | {f"head {k}": head.get_output_embeddings().weight for k, head in model.heads.items()}


def assert_tied(model):
    found = matrices(model)
    tied = {k for k in model.heads if f"stem {k}" in found and found[f"head {k}"] is found[f"stem {k}"]}
    assert tied == {str(k) for k in model.config.tied_components}


@pytest.mark.parametrize("build", HYBRIDS.values(), ids=HYBRIDS)
@torch.no_grad()
def test_larger(build, tmp_path):
    model = build()
    before = model(tokens()).logits
    assert model.resize_token_embeddings(VOCAB + 3, pad_to_multiple_of=8) is model.get_input_embeddings()
    assert model.config.vocab_size == VOCAB + 8
    assert {len(matrix) for matrix in matrices(model).values()} == {VOCAB + 8}
    assert_tied(model)
    ids = torch.cat([tokens(), torch.tensor([[VOCAB, VOCAB + 7], [VOCAB + 2, 3]])], 1)
    after = model(ids).logits
    torch.testing.assert_close(after[:, : before.shape[1], :VOCAB], before, atol=1e-5, rtol=0)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    expected = model(made.sequences).logits[:, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(made.logits, 1), expected, atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(ids).logits, after)
    assert_tied(loaded)


@pytest.mark.parametrize("build", HYBRIDS.values(), ids=HYBRIDS)
@torch.no_grad()
def test_smaller(build):
    model, ids = build(), tokens() % (VOCAB - 14)
    before = model(ids).logits
    model.resize_token_embeddings(VOCAB - 14)
    torch.testing.assert_close(model(ids).logits, before[..., : VOCAB - 14], atol=1e-5, rtol=0)
    assert_tied(model)


@pytest.mark.parametrize("build", HYBRIDS.values(), ids=HYBRIDS)
def test_new_tokens_train(build):
    model = build().train()
    model.resize_token_embeddings(VOCAB + 2)
    before = {name: matrix.detach().clone() for name, matrix in matrices(model).items()}
    ids = torch.tensor([[1, VOCAB, 2, VOCAB + 1, 3, VOCAB]])
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for name, matrix in matrices(model).items():
        assert (matrix[VOCAB:] - before[name][VOCAB:]).abs().amax(1).min() > 0, name


def test_a_supernet_is_discretized_after_resizing():
    model = supernet("gpt2", "mamba")
    model.resize_token_embeddings(VOCAB + 2)
    hybrid = discretize(model, [0, 1])
    assert hybrid.config.vocab_size == VOCAB + 2
    with torch.no_grad():
        assert hybrid(tokens()).logits.shape[-1] == VOCAB + 2
