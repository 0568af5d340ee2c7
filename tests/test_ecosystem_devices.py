"""Device maps: CPU and disk offload give the same logits, blocks stay whole, and tensors follow their modules."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, infer_auto_device_map
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from safetensors.torch import load_file
from tiny import VOCAB, component, tokens
from transformers import AutoModelForCausalLM

from modeling_manticore import ManticoreForCausalLM, discretize


def supernet(*families, **options):
    options = {"num_blocks": 3} | options
    return ManticoreForCausalLM.from_components([component(f, i) for i, f in enumerate(families)], **options)


HYBRIDS = {
    "untied supernet": lambda: supernet("gpt_neox", "mamba2"),
    "tied supernet": lambda: supernet("gpt2", "mamba", gate="learned"),
    "discretized": lambda: discretize(supernet("llama", "falcon_mamba"), [0, 1, 0]),
}


@pytest.fixture(scope="module", params=HYBRIDS.values(), ids=HYBRIDS)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    model = request.param()
    model.save_pretrained(folder)
    with torch.no_grad():
        out = model(tokens()[:, :8], use_cache=True)
        last = model(tokens()[:, 8:9], past_key_values=out.past_key_values, use_cache=True)
    return folder, torch.cat([out.logits, last.logits], 1)


@torch.no_grad()
def assert_equal_logits(model, expected):
    out = model(tokens()[:, :8], use_cache=True)
    last = model(tokens()[:, 8:9], past_key_values=out.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([out.logits, last.logits], 1), expected, atol=1e-6, rtol=0)
    options = {"attention_mask": torch.ones_like(tokens()), "pad_token_id": 0, "eos_token_id": None}
    assert model.generate(tokens(), max_new_tokens=2, **options).shape == (2, 14)


def test_one_device(saved):
    folder, expected = saved
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert_equal_logits(model, expected)


def blocks_on_disk(folder, offload):
    """The hybrid with its blocks but the first on disk."""
    names = [name for name, _ in AutoModelForCausalLM.from_pretrained(folder).named_children()]
    device_map = {"model.stems": "cpu", "model.stem_projectors": "cpu", "model.blocks.0": "cpu"}
    device_map |= {"model.blocks.1": "disk", "model.blocks.2": "disk"}
    device_map |= {name: "cpu" for name in names if name != "model"}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=offload)
    assert model.hf_device_map == device_map
    assert all(p.is_meta for p in model.model.blocks[1:].parameters())
    return model


def test_blocks_on_disk(saved, tmp_path):
    folder, expected = saved
    assert_equal_logits(blocks_on_disk(folder, tmp_path), expected)


@pytest.mark.parametrize("share", [0.8, 0.95])
def test_auto_with_too_little_memory(saved, share, tmp_path):
    folder, expected = saved
    whole = AutoModelForCausalLM.from_pretrained(folder)
    size = sum(p.numel() * p.element_size() for p in whole.parameters())
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": int(size * share)}, offload_folder=tmp_path / "offload"
    )
    assert set(map(str, model.hf_device_map.values())) == {"cpu", "disk"}
    for name in model.hf_device_map:  # no place inside a block
        assert not name.startswith("model.blocks.") or name.removeprefix("model.blocks.").isdigit()
    assert_equal_logits(model, expected)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_accelerate_offload(saved, offload, tmp_path):
    folder, expected = saved
    model = AutoModelForCausalLM.from_pretrained(folder)
    if offload == "cpu":
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, tmp_path, execution_device="cpu")
    assert all(p.is_meta for p in model.model.blocks.parameters())
    assert_equal_logits(model, expected)


def test_an_offloaded_model_is_saved_whole(saved, tmp_path):
    folder, _ = saved
    model = blocks_on_disk(folder, tmp_path / "offload")
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_maps_do_not_split_blocks(saved):
    model = AutoModelForCausalLM.from_pretrained(saved[0])
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    found = infer_auto_device_map(
        model, {0: int(0.8 * size), "cpu": 10**9}, no_split_module_classes=list(model._no_split_modules)
    )
    assert len(set(found.values())) == 2
    for name in found:
        assert not name.startswith("model.blocks.") or name.removeprefix("model.blocks.").isdigit()


@pytest.mark.parametrize("gate", ["routed", "mixture", "learned", "none"])
def test_tensors_follow_their_modules_to_a_second_device(gate):
    """
    The second device is meta, which takes no part in an operation with the CPU; modules move to it from the last one
    backwards, as a device map lays them out. (Attention looks into its mask, which has no values there.)
    """
    model = supernet("mamba2", "falcon_mamba", gate=gate).train()
    units = [*model.model.stems.values(), *model.model.stem_projectors.values(), *model.model.blocks]
    units += [*model.heads.values(), *model.head_projectors.values()]
    if gate == "mixture":  # stem projectors need the first block's weights, and nothing comes back from meta
        units = units[units.index(model.model.blocks[1]) :]
    for unit in reversed(units):
        unit.to("meta")
        add_hook_to_module(unit, AlignDevicesHook(execution_device=torch.device("meta"), place_submodules=False))
        assert model(tokens()).logits.shape == (2, 12, VOCAB)
    assert model(tokens()).logits.is_meta
