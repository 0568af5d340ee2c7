"""Every family in every cell of its table, and the page that shows the table."""

import re
from pathlib import Path

import pytest
import torch
from family_checks import BOUND, CELLS, chain, measure_family
from tiny import FAMILIES, component, tokens
from transformers import AutoModelForCausalLM, NanoChatConfig

from modeling_manticore import ManticoreForCausalLM
from modeling_manticore.cache_manticore import PADDING_LEAKS, STATE_ON_MODULES
from modeling_manticore.configuration_manticore import REFUSED_FAMILIES
from modeling_manticore.slicing_manticore import ONE_TOKEN_AT_A_TIME


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cell_is_within_the_bound(family):
    cells = measure_family(family)
    assert tuple(cells) == CELLS
    assert all(value <= BOUND for value in cells.values()), cells


def test_the_page_shows_every_family_and_every_refusal():
    page = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \|", page, flags=re.MULTILINE)
    assert set(rows) == {"family", *FAMILIES, *REFUSED_FAMILIES}
    for table in (ONE_TOKEN_AT_A_TIME, STATE_ON_MODULES, PADDING_LEAKS):
        assert all(family in page for family in table)


def test_a_family_that_runs_its_final_norm_twice_is_refused():
    config = NanoChatConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    with pytest.raises(ValueError, match="nanochat: cannot be sliced, its final norm runs 2 times"):
        ManticoreForCausalLM.from_components([AutoModelForCausalLM.from_config(config)], num_blocks=2)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_bfloat16_hybrid_is_the_same_after_loading(family, tmp_path):
    """Also buffers have the dtype that loading gives them, when the components in memory are float32."""
    parts = [component(family), component("gpt2", 1)]
    hybrid = ManticoreForCausalLM.from_components(parts, num_blocks=2, dtype="bfloat16")
    hybrid.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == hybrid.dtype == torch.bfloat16
    assert {n: b.dtype for n, b in loaded.named_buffers()} == {n: b.dtype for n, b in hybrid.named_buffers()}
    logits = hybrid(tokens()).logits
    assert torch.isfinite(logits).all() and torch.equal(loaded(tokens()).logits, logits)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_cache_grows_by_the_bytes_that_the_description_says(family):
    model = component(family)
    hybrid = chain(model, [0, 1, model.config.num_hidden_layers])
    ids = tokens(1, getattr(model.config, "attention_window_size", 32) + 16)  # beyond every window

    def held(cache) -> int:
        pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
        return sum(t.numel() * t.element_size() for pair in pairs for t in pair if t is not None)

    cache = hybrid(ids[:, :-8], use_cache=True).past_key_values
    before = held(cache)
    hybrid(ids[:, -8:], past_key_values=cache, use_cache=True)
    assert f"cache {(held(cache) - before) // 8:,} bytes per token" in hybrid.describe()
