"""Saving is all or nothing: stale shards go, foreign files stay, a failure leaves what was there."""

import json
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file
from tiny import component, tokens
from transformers import AutoModelForCausalLM, GenerationConfig
from travelling import TRAVELLING

from modeling_manticore import ManticoreForCausalLM


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
