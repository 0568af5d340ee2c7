"""Bad input gets one clear ValueError before any work starts, and leaves no files."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, component, tokens
from transformers import PreTrainedTokenizerFast

from modeling_manticore import ManticoreConfig, ManticoreForCausalLM, calibrate, discretize


def path(k, start, stop):
    return {"component": k, "start": start, "stop": stop}


def config(**changes):
    options = {
        "components": [FAMILIES["gpt_neox"](), FAMILIES["mamba2"]()],
        "blocks": [[path(0, 0, 4), path(1, 0, 3)]],
    }
    return ManticoreConfig(**(options | changes))


NARROW = FAMILIES["gpt_neox"]()
NARROW.vocab_size = 32
QUANTIZED = FAMILIES["gpt_neox"]()
QUANTIZED.quantization_config = {"quant_method": "bitsandbytes"}

CONFIG_CASES = {
    "gate": ({"gate": "soft"}, "gate: got 'soft', allowed are 'routed'"),
    "mixture": ({"mixture": "dirichlet"}, "mixture: got 'dirichlet'"),
    "head_mixture": ({"head_mixture": "middle"}, "head_mixture: got 'middle'"),
    "projector_init": ({"projector_init": "ones"}, "projector_init: got 'ones'"),
    "project_ends": ({"project_ends": "yes"}, "project_ends: got 'yes'"),
    "temperature": ({"mixture_temperature": 0.0}, "mixture_temperature: got 0.0"),
    "temperature_type": ({"mixture_temperature": "hot"}, "mixture_temperature: got 'hot'"),
    "initializer_range": ({"initializer_range": -1.0}, "initializer_range: got -1.0"),
    "hidden_size": ({"hidden_size": 8}, "hidden_size: got 8, allowed is at least 32"),
    "hidden_size_zero": ({"hidden_size": 0}, "hidden_size: got 0"),
    "vocab_size": ({"vocab_size": 65}, r"components\[0\].vocab_size: got 64, allowed is 65"),
    "vocab_mismatch": ({"components": [FAMILIES["gpt2"](), NARROW]}, r"components\[1\].vocab_size: got 32"),
    "tokenizer_from": ({"tokenizer_from": 2}, "tokenizer_from: got 2, allowed is 0..1"),
    "no_blocks": ({"blocks": []}, "blocks: got an empty list"),
    "empty_block": ({"blocks": [[]]}, r"blocks\[0\]: got \[\]"),
    "blocks_type": ({"blocks": "all"}, "blocks: got str"),
    "block_type": ({"blocks": [path(0, 0, 4)]}, r"blocks\[0\]: got \{"),
    "path_key": ({"blocks": [[{"component": 0, "begin": 0, "stop": 4}]]}, r"blocks\[0\]\[0\]: got .*begin"),
    "path_type": ({"blocks": [[path(0, 0, 4.0)]]}, r"blocks\[0\]\[0\].stop: got 4.0"),
    "component_range": ({"blocks": [[path(0, 0, 4), path(2, 0, 3)]]}, r"blocks\[0\]\[1\].component: got 2"),
    "stop_beyond": ({"blocks": [[path(0, 0, 5)]]}, r"blocks\[0\]\[0\]: got layers \[0, 5\).*4, the depth"),
    "start_after_stop": ({"blocks": [[path(0, 2, 2)]]}, r"got layers \[2, 2\)"),
    "negative_start": ({"blocks": [[path(0, -1, 2)]]}, r"got layers \[-1, 2\)"),
    "no_components": ({"components": []}, "components: got an empty list"),
    "component_type": ({"components": [3]}, r"components\[0\]: got int"),
    "unknown_family": (
        {"components": [{"model_type": "perceptron"}]},
        r"components\[0\].model_type: got 'perceptron'",
    ),
    "no_family": ({"components": [{"hidden_size": 8}]}, r"components\[0\].model_type: got None"),
    "refused_family": ({"components": [{"model_type": "zamba2"}]}, "'zamba2' cannot be sliced: its layers read"),
    "refused_rwkv": ({"components": [{"model_type": "rwkv"}]}, "'rwkv' cannot be sliced"),
    "not_causal": ({"components": [{"model_type": "vit"}]}, "not a causal language model"),
    "nested_hybrid": ({"components": [{"model_type": "manticore"}]}, "a hybrid cannot be a component"),
    "quantized": ({"components": [QUANTIZED]}, r"components\[0\]: got a quantized checkpoint"),
}


@pytest.mark.parametrize("changes, message", CONFIG_CASES.values(), ids=CONFIG_CASES)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize("blocks", [0, 4, 2.0, True, None])
def test_bad_numbers_of_blocks(blocks):
    with pytest.raises(ValueError, match="num_blocks: got .* allowed is 1..3"):
        ManticoreConfig.from_partition([FAMILIES["gpt_neox"](), FAMILIES["mamba2"]()], blocks)


def test_a_model_of_an_empty_configuration_is_refused():
    with pytest.raises(ValueError, match="a hybrid needs components and blocks"):
        ManticoreForCausalLM(ManticoreConfig())


@pytest.fixture(scope="module")
def model():
    return ManticoreForCausalLM.from_components([component("gpt_neox"), component("mamba2")], num_blocks=2)


WEIGHT_CASES = {
    "too_few": ([[1, 0]], "weights: got 1 blocks, allowed is 2"),
    "shape": ([[1, 0], [1]], r"weights\[1\]: got shape \(1,\)"),
    "negative": ([[1, 0], [2, -1]], r"weights\[1\]: got \[2.0, -1.0\]"),
    "sum": ([[0.5, 0.4], [1, 0]], r"weights\[0\]: got"),
    "nan": ([[float("nan"), 1], [1, 0]], r"weights\[0\]: got"),
}


@pytest.mark.parametrize("weights, message", WEIGHT_CASES.values(), ids=WEIGHT_CASES)
def test_bad_mixture_weights_change_nothing(model, weights, message):
    before = [point.clone() for point in model.mixture_weights()]
    with pytest.raises(ValueError, match=message):
        model.set_mixture_weights(weights)
    assert all(torch.equal(a, b) for a, b in zip(before, model.mixture_weights()))


TEXT_CASES = {
    "none": (None, {}, "texts: got NoneType"),
    "empty": ([], {}, "texts: got list"),
    "floats": (torch.rand(4, 8), {}, r"texts: got a tensor \(4, 8\) of torch.float32"),
    "one_row": (tokens(1), {}, "texts: got 1 non-empty rows"),
    "vocabulary": (tokens() + 60, {}, r"texts\[\d\]: got token \d+, allowed is 0..63"),
    "negative": (tokens() - 60, {}, r"texts\[\d\]: got token -\d+"),
    "too_long": (tokens(2, 65), {}, r"texts\[0\]: got 65 tokens, allowed are at most 64"),
    "strings_without_tokenizer": (["a", "b"], {}, "texts: got strings, but no tokenizer"),
    "mixed": (["a", [1]], {}, "texts: its entries are neither"),
    "order": (tokens(), {"order": "random"}, "order: got 'random'"),
    "batch_size": (tokens(), {"batch_size": 0}, "batch_size: got 0"),
}


@pytest.mark.parametrize("texts, options, message", TEXT_CASES.values(), ids=TEXT_CASES)
def test_bad_calibration_changes_nothing(model, texts, options, message):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        calibrate(model, texts, progress=False, **options)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


CHOICE_CASES = {
    "word": ("best", {}, "choice: got 'best'"),
    "length": ([0], {}, "choice: got .* each of 2 blocks"),
    "range": ([0, 2], {}, r"choice\[1\]: got 2, allowed is 0..1"),
    "type": ([0, True], {}, r"choice\[1\]: got True"),
    "none": (None, {}, "choice: got None"),
    "refit": ([0, 1], {"refit": "no"}, "refit: got 'no'"),
    "order": ([0, 1], {"order": "both"}, "order: got 'both'"),
    "calibration": ([0, 1], {"calibration": []}, "calibration: got list"),
}


@pytest.mark.parametrize("choice, options, message", CHOICE_CASES.values(), ids=CHOICE_CASES)
def test_bad_choices(model, choice, options, message):
    with pytest.raises(ValueError, match=message):
        discretize(model, choice, **options)


def save(folder, **options):
    component("gpt_neox").save_pretrained(folder, **options)
    return folder


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def tokenizer(folder, words):
    from tokenizers import Tokenizer, models

    vocabulary = {word: i for i, word in enumerate(words)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    ).save_pretrained(folder)


def pickle_only(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def corrupt(folder):
    (folder / "model.safetensors").write_bytes(b"not a safetensors file at all")


FOLDER_CASES = {
    "missing": (lambda f: shutil.rmtree(f), r"components\[1\] .*no such folder"),
    "no_config": (lambda f: (f / "config.json").unlink(), r"components\[1\] .*it has no config.json"),
    "bad_config": (lambda f: (f / "config.json").write_text("{"), r"components\[1\] .*configuration cannot be read"),
    "no_weights": (lambda f: (f / "model.safetensors").unlink(), "it has no model.safetensors"),
    "pickle_only": (pickle_only, "it has pytorch_model.bin, which is not read because it may be pickle"),
    "corrupt": (corrupt, "model.safetensors is corrupt"),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "it is an adapter, not a model"),
    "vocabulary": (lambda f: edit_config(f, vocab_size=32), r"components\[1\].vocab_size: got 32"),
    "quantized": (lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}), "a quantized checkpoint"),
    "family": (lambda f: edit_config(f, model_type="rwkv"), "'rwkv' cannot be sliced"),
    "tensor_missing": (lambda f: rewrite(f, lambda t: t.pop("embed_out.weight")), "missing keys"),
}


@pytest.mark.parametrize("damage, message", FOLDER_CASES.values(), ids=FOLDER_CASES)
def test_bad_component_folders(damage, message, tmp_path):
    good, bad = save(tmp_path / "good"), save(tmp_path / "bad")
    damage(bad)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        ManticoreForCausalLM.from_components([str(good), str(bad)], num_blocks=2)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_shard_is_named(tmp_path):
    folder = save(tmp_path / "sharded", max_shard_size="20KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"the shard {shard.name} is missing"):
        ManticoreForCausalLM.from_components([str(folder)], num_blocks=2)


def test_different_vocabularies_without_a_tokenizer_are_refused(tmp_path):
    first, second = save(tmp_path / "first"), save(tmp_path / "second")
    edit_config(second, vocab_size=60)
    tokenizer(first, ["a", "b", "c"])
    with pytest.raises(
        ValueError, match=r"components\[1\].vocab_size: got 60, .* component 1 comes with no tokenizer"
    ):
        ManticoreForCausalLM.from_components([str(first), str(second)], num_blocks=2)


OPTION_CASES = {
    "both": ({"num_blocks": 2, "blocks": [[path(0, 0, 4)]]}, "num_blocks, blocks: give exactly one"),
    "neither": ({}, "num_blocks, blocks: give exactly one"),
    "unknown": ({"num_blocks": 2, "colour": 1}, "colour: unknown option"),
    "dtype": ({"num_blocks": 2, "dtype": "int8"}, "dtype: got 'int8'"),
    "revisions": ({"num_blocks": 2, "revision": ["a", "b"]}, "revision: got 2 values, allowed is one or 1"),
    "tokenizer_from": ({"num_blocks": 2, "tokenizer_from": 1}, "tokenizer_from: got 1"),
}


@pytest.mark.parametrize("options, message", OPTION_CASES.values(), ids=OPTION_CASES)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ManticoreForCausalLM.from_components([component("gpt_neox")], **options)


@pytest.mark.parametrize("components", [None, [], "one-name", [3]])
def test_bad_component_lists(components):
    with pytest.raises(ValueError, match="components"):
        ManticoreForCausalLM.from_components(components, num_blocks=1)
