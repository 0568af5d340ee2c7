"""Save, and load in this process: equal logits, no missing key, equal bytes at the second save."""

import pytest
import torch
from tiny import component, tokens
from transformers import AutoModelForCausalLM

from modeling_manticore import ManticoreForCausalLM


PAIRS = {"untied": ("gpt_neox", "mamba2"), "tied": ("gpt2", "mamba"), "mixed": ("llama", "falcon_mamba")}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@torch.no_grad()
def test_round_trip(pair, shard, tmp_path):
    model = ManticoreForCausalLM.from_components([component(family) for family in pair], num_blocks=2)
    model.save_pretrained(tmp_path / "first", max_shard_size=shard)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    loaded.save_pretrained(tmp_path / "second", max_shard_size=shard)
    first, second = (sorted((tmp_path / name).glob("*.safetensors")) for name in ("first", "second"))
    assert [file.name for file in first] == [file.name for file in second]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second))
