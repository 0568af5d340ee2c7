"""Saving is all or nothing: stale shards go, foreign files stay, a failure leaves what was there."""

import json
import os
import re
import subprocess
import sys
import tempfile
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import component, tokens
from transformers import AutoModelForCausalLM, GenerationConfig
from travelling import TRAVELLING

from modeling_manticore import ManticoreForCausalLM
from modeling_manticore.hub.contents import stale_pattern


CODE = set(TRAVELLING)


@pytest.fixture(scope="module")
def model():
    model = ManticoreForCausalLM.from_components([component("gpt_neox"), component("mamba2")], num_blocks=2)
    model.generation_config = GenerationConfig(max_new_tokens=7)
    return model


def test_what_is_written(model, tmp_path):
    model.save_pretrained(tmp_path / "hybrid")
    assert {file.name for file in (tmp_path / "hybrid").iterdir()} == CODE | {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert [file.name for file in tmp_path.iterdir()] == ["hybrid"]
    auto_map = json.loads((tmp_path / "hybrid" / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_manticore.ManticoreConfig",
        "AutoModel": "modeling_manticore.ManticoreModel",
        "AutoModelForCausalLM": "modeling_manticore.ManticoreForCausalLM",
        "AutoModelForSequenceClassification": "modeling_manticore.ManticoreForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_manticore.ManticoreForTokenClassification",
    }
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid").generation_config.max_new_tokens == 7


def test_a_fresh_model_generates_by_what_its_whole_configuration_says(model):
    config = deepcopy(model.config)
    config.eos_token_id, config.pad_token_id, config.num_beams = [3, 5], 7, 3
    made = ManticoreForCausalLM(config).generation_config
    assert type(made) is GenerationConfig and made.to_dict() == GenerationConfig.from_model_config(config).to_dict()
    assert made.eos_token_id == [3, 5] and made.pad_token_id == 7


def test_stale_shards_go_and_foreign_files_stay(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "other.safetensors").write_bytes(b"mine")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.glob("model*.safetensors*")} == {"model.safetensors"}
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (tmp_path / "other.safetensors").read_bytes() == b"mine"
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens()).logits, model(tokens()).logits)


def test_weights_of_another_name_or_variant_stay(tmp_path):
    model = ManticoreForCausalLM.from_components([component("gpt_neox"), component("llama")], num_blocks=2)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = {file.name for file in tmp_path.glob("model*.safetensors*")}
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    assert len(list(tmp_path.glob("model.fp16-*"))) > 2 and (tmp_path / "model.safetensors.index.fp16.json").exists()
    model.save_pretrained(tmp_path, variant="fp16")
    assert {file.name for file in tmp_path.glob("model*.safetensors*")} == shards | {"model.fp16.safetensors"}
    logits = model(tokens()).logits
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.glob("model*.safetensors*")} == shards | {"model.fp16.safetensors"}
    (tmp_path / "adapter_config.json").unlink()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens()).logits, logits)


def test_a_repository_loses_only_earlier_files_of_the_weights_that_are_pushed():
    shard, index = "model-00001-of-00002.safetensors", "model.safetensors.index.json"
    there = [shard, index, "model.safetensors", "model.fp16.safetensors", "adapter_model.safetensors", "x/" + shard]

    def gone(*pushed):
        return [path for path in there if path not in pushed and re.fullmatch(stale_pattern(pushed), path)]

    assert gone("model.safetensors", "config.json") == [shard, index]
    assert gone(shard, index) == ["model.safetensors"]
    assert gone("x/model.safetensors") == ["x/" + shard]
    assert gone("model.fp16-00001-of-00002.safetensors") == ["model.fp16.safetensors"]
    assert gone("adapter_model.safetensors") == gone("config.json") == []


@pytest.mark.parametrize("used", [False, True])
def test_a_folder_that_exists_is_filled_and_not_replaced(model, tmp_path, monkeypatch, used):
    """It may be the current one, behind a link, a mount, or in a folder that only others may write to."""
    folder, link = tmp_path / "parent" / "here", tmp_path / "link"
    folder.mkdir(parents=True)
    if used:
        (folder / "notes.txt").write_text("mine")
    folder.chmod(0o2775)
    before = folder.stat()
    monkeypatch.chdir(folder)
    made = []
    really = tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *a, **k: made.append(really(*a, **k)) or made[-1])
    model.save_pretrained(".")
    after = folder.stat()
    assert os.getcwd() == str(folder) and (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    link.symlink_to(folder)
    model.save_pretrained(link)
    assert link.is_symlink() and [Path(name).parent for name in made] == [folder, folder]
    assert sorted(path.name for path in folder.iterdir() if path.name[0] == ".") == []
    assert torch.equal(AutoModelForCausalLM.from_pretrained(".")(tokens()).logits, model(tokens()).logits)


def test_what_killed_saves_left_beside_and_in_a_folder_goes(model, tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    left = f".hybrid.{int(dead.stdout)}.abc"
    for place in (tmp_path, tmp_path / "hybrid"):
        (place / left).mkdir(parents=True)
    model.save_pretrained(tmp_path / "hybrid")
    assert not list(tmp_path.rglob(".*"))


def test_a_long_name(model, tmp_path):
    model.save_pretrained(tmp_path / ("n" * 250))
    assert (tmp_path / ("n" * 250) / "config.json").is_file()


def test_a_failure_leaves_the_folder_as_it_was(model, tmp_path, monkeypatch):
    folder = tmp_path / "hybrid"
    model.save_pretrained(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["hybrid"]


def test_only_the_main_process_writes(model, tmp_path):
    model.save_pretrained(tmp_path / "hybrid", is_main_process=False)
    assert not (tmp_path / "hybrid").exists()


def test_a_given_state_dict_is_what_is_saved(model, tmp_path):
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    assert all(not tensor.any() for tensor in load_file(tmp_path / "model.safetensors").values())


def test_a_file_in_the_way_is_refused(model, tmp_path):
    (tmp_path / "hybrid").write_text("mine")
    with pytest.raises(ValueError, match="save_directory: got the file"):
        model.save_pretrained(tmp_path / "hybrid")
    assert (tmp_path / "hybrid").read_text() == "mine"
