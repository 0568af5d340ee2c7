"""Only what a hybrid uses is read from disk, nothing is copied that need not be, and the tensors are the same."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, component, tokens
from transformers import AutoModelForCausalLM

from modeling_manticore import ManticoreForCausalLM
from modeling_manticore.building.partial import ComponentPart, partial_class


def path(k, start, stop):
    return {"component": k, "start": start, "stop": stop}


@pytest.mark.parametrize("index, family", list(enumerate(FAMILIES)))
def test_a_part_from_disk_is_the_part_of_the_whole(index, family, tmp_path):
    first, dtype = index % 2 == 0, ("float32", "bfloat16")[index // 2 % 2]
    blocks = [[path(0, 0, 1)], [path(1, 1, 3)]] if first else [[path(1, 0, 2)], [path(0, 2, 3)]]
    parts = [component(family, 1), component("mamba2", 2)]
    folders = [tmp_path / "first", tmp_path / "second"]
    for part, folder in zip(parts, folders):
        part.save_pretrained(folder)
    found = ManticoreForCausalLM.from_components(folders, blocks=blocks, dtype=dtype)
    read_whole = [AutoModelForCausalLM.from_pretrained(f, dtype=dtype) for f in folders]
    whole = ManticoreForCausalLM.from_components(read_whole, blocks=blocks, dtype=dtype)
    sides = [dict(model.named_buffers()) | model.state_dict() for model in (found, whole)]
    assert sides[0].keys() == sides[1].keys()
    for name, tensor in sides[0].items():
        assert tensor.dtype == sides[1][name].dtype and torch.equal(tensor, sides[1][name]), name


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_not_used_has_no_parameters(tied, tmp_path):
    uncut = component("llama", 0, tie_word_embeddings=tied)
    uncut.save_pretrained(tmp_path)
    layer = sum(p.numel() for p in uncut.model.layers[0].parameters())
    table, norm = uncut.model.embed_tokens.weight.numel(), uncut.model.norm.weight.numel()
    for stem, head in ((True, True), (True, False), (False, True), (False, False)):
        part = partial_class(uncut.config, ComponentPart(frozenset({1, 2}), stem, head))
        model, info = part.from_pretrained(tmp_path, output_loading_info=True)
        tables = (1 if tied else 2) if stem and head else int(stem) + int(head)
        assert sum(p.numel() for p in model.parameters()) == 2 * layer + norm + tables * table
        assert not info["missing_keys"]
        if head:
            assert torch.equal(model.lm_head.weight, uncut.lm_head.weight)


def test_shards_of_unused_layers_are_not_needed(tmp_path):
    """Their absence is noticed only where a layer in them is used."""
    folder, other = tmp_path / "sharded", tmp_path / "other"
    uncut = component("llama", 0, tie_word_embeddings=False)
    uncut.save_pretrained(folder, max_shard_size="20KB")
    component("mamba2", 1).save_pretrained(other)
    blocks = [[path(0, 0, 1)], [path(1, 1, 3)]]
    expected = ManticoreForCausalLM.from_components([folder, other], blocks=blocks)
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    used = {
        shard
        for key, shard in weight_map.items()
        if not key.startswith(tuple(f"model.layers.{i}." for i in (1, 2, 3)))
    }
    unused = set(weight_map.values()) - used
    assert len(unused) > 2
    for shard in unused:
        data = bytearray((folder / shard).read_bytes())
        length = 8 + int.from_bytes(data[:8], "little")
        data[length:] = b"\xff" * (len(data) - length)  # all values not a number: reading one would show
        (folder / shard).write_bytes(data)
    found = ManticoreForCausalLM.from_components([folder, other], blocks=blocks)
    assert torch.equal(found(tokens()).logits, expected(tokens()).logits)


@pytest.mark.parametrize("case", ["same dtype", "converted, many shards"])
def test_memory_of_building(case):
    """
    240 MB each; `benchmarks/building_memory.py` measures 400. With less the 10 MB or so that loading takes whatever it
    loads are beyond the bound.
    """
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    import building_memory

    found = building_memory.measure(240, building_memory.CASES[case])
    assert found["private"] <= found["bound"] and found["file"] <= found["file_bound"], found
