"""PEFT: where adapters go, what is trained and saved beside them, merging, reloading, modules they do not reach."""

import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from tiny import FAMILIES, component, tokens
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from modeling_manticore import (
    ManticoreForCausalLM,
    ManticoreForSequenceClassification,
    ManticoreTrainer,
    ManticoreTrainingArguments,
    discretize,
    lora_config,
)


LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
MAMBA_IN_A_HYBRID = LLAMA | {"in_proj"}
PROJECTIONS = {
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "gpt2_scaled_by_layer": {"c_attn", "c_proj", "c_fc"},
    "gpt_neo": {"q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"},
    "gpt_neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "gptj": {"q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "opt_projected": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "bloom": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "falcon": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "falcon_alibi": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "olmo2": LLAMA,
    "smollm3": LLAMA,
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "lfm2": {"q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"},
    "jamba": LLAMA | {"in_proj", "x_proj", "out_proj"},
    "bamba": MAMBA_IN_A_HYBRID,
    "falcon_h1": MAMBA_IN_A_HYBRID,
    "nemotron_h": LLAMA - {"gate_proj"},  # in_proj is corrected: the configuration limits its time steps
    "granitemoehybrid": (LLAMA | {"in_proj", "input_linear", "output_linear"}) - {"gate_proj", "up_proj", "down_proj"},
    "qwen3_next": (LLAMA | {"in_proj_qkvz", "in_proj_ba", "out_proj", "shared_expert_gate"}),
    "recurrent_gemma": LLAMA | {"linear_y", "linear_out"},  # linear_x is corrected: padding would leak
    "mamba": {"in_proj"},
    "mamba2": {"in_proj"},
    "falcon_mamba": {"in_proj"},
}
PAIRS = [("gpt_neox", "mamba2"), ("gpt2", "falcon_mamba"), ("gemma3_text", "mamba")]


def supernet(*families, **options):
    families = families or PAIRS[0]
    options = {"num_blocks": 2} | options
    return ManticoreForCausalLM.from_components([component(f, i) for i, f in enumerate(families)], **options)


def rows(count=16, seed=3):
    return [{"input_ids": row, "labels": row} for row in tokens(count, 10, seed)]


def arguments(folder, kind=ManticoreTrainingArguments, **options):
    plain = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none"}
    plain |= {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    return kind(output_dir=str(folder), **(plain | options))


def leaves(config, component_index):
    marker = f".paths.{component_index}.slice."
    return {name.rpartition(".")[2] for name in config.target_modules if marker in name}


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_go_on_every_projection_that_is_called(family):
    model = supernet(family, "llama")
    config = lora_config(model)
    assert leaves(config, 0) == PROJECTIONS[family] and leaves(config, 1) == LLAMA
    assert all(".slice." in name for name in config.target_modules)
    if family == "nemotron_h":
        return
    for layer in range(model.config.components[0].num_hidden_layers):  # every layer of both slices
        assert any(f".{layer}." in name.partition(".paths.0.slice.")[2] for name in config.target_modules)


def test_experts_are_left_out_and_said(monkeypatch):
    said = []
    monkeypatch.setattr("modeling_manticore.search.adapters.logger.warning", said.append)
    lora_config(supernet("jamba", "llama"))
    assert len(said) == 1 and "4 expert matrices get no adapter" in said[0] and "experts.gate_up_proj" in said[0]


def test_projectors_and_mixtures_are_trained_whole():
    model = supernet()
    config = lora_config(model, r=3)
    whole = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ("in_projector", "out_projector")}
    whole |= {f"{side}.{k}" for side in ("model.stem_projectors", "head_projectors") for k in "01"}
    assert set(config.modules_to_save) == whole | {"model.blocks.0.mixture", "model.blocks.1.mixture"}
    assert config.r == 3 and config.task_type == "CAUSAL_LM"
    assert lora_config(discretize(supernet(), [0, 0])).modules_to_save is None


@pytest.mark.parametrize("families", PAIRS, ids="+".join)
@pytest.mark.parametrize("stock", [True, False], ids=["Trainer", "ManticoreTrainer"])
def test_what_is_saved_is_what_is_trained(families, stock, tmp_path):
    supernet(*families).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, lora_config(base, r=2))
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    if stock:
        trainer = Trainer(adapted, arguments(tmp_path / "run", TrainingArguments), train_dataset=rows())
    else:
        trainer = ManticoreTrainer(adapted, arguments(tmp_path / "run", stage="search"), train_dataset=rows())
    trainer.train()
    changed = {name for name, p in adapted.named_parameters() if not torch.equal(before[name], p)}
    assert changed == {name for name, p in adapted.named_parameters() if p.requires_grad}

    adapted.save_pretrained(tmp_path / "adapter")
    assert {file.suffix for file in (tmp_path / "adapter").iterdir()} <= {".safetensors", ".json", ".md"}
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    names = {name.replace(".default", "").replace(".modules_to_save", "") for name in changed}
    assert {name.replace(".modules_to_save", "") for name in saved} == names
    assert not any(part in name for name in saved for part in ("stems.", "heads."))

    adapted.eval()
    with torch.no_grad():
        expected = adapted(tokens()).logits
        again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        assert torch.equal(again(tokens()).logits, expected)
        assert (
            expected - again.get_base_model().from_pretrained(tmp_path / "base")(tokens()).logits
        ).abs().max() > 0.1
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(tokens()).logits, expected, atol=1e-5, rtol=1e-5)
        merged.save_pretrained(tmp_path / "merged")
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert torch.equal(reloaded(tokens()).logits, merged(tokens()).logits)


STAGES = {
    "projectors": lambda name: "projector" in name,
    "search": lambda name: True,
    "finetune": lambda name: "mixture" not in name,
}


@pytest.mark.parametrize("stage", STAGES)
def test_stages_train_their_part_of_an_adapter(stage, tmp_path):
    model = supernet()
    adapted = get_peft_model(model, lora_config(model, r=2))
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    ManticoreTrainer(adapted, arguments(tmp_path, stage=stage), train_dataset=rows()).train()
    changed = {name for name, p in adapted.named_parameters() if not torch.equal(before[name], p)}
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert changed == {name for name in trainable if STAGES[stage](name)}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_of_adapters_under_checkpointing(reentrant):
    def gradients(checkpointing):
        torch.manual_seed(0)
        model = supernet()
        adapted = get_peft_model(model, lora_config(model, r=2, modules_to_save=None, init_lora_weights=False))
        if checkpointing:
            adapted.gradient_checkpointing_enable({"use_reentrant": reentrant})
            adapted.enable_input_require_grads()
        adapted.train()(tokens(), labels=tokens()).loss.backward()
        return {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert any(".paths.1." in name for name in plain) and all(g is not None for g in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("families", [("opt_projected", "mamba2"), ("gpt_neo", "mamba")], ids="+".join)
def test_all_linear_is_the_slices(families):
    model = supernet(*families)
    config = lora_config(model, target_modules="all-linear", r=2)
    wanted = set(config.target_modules)
    assert wanted == lora_config(model).target_modules
    adapted = get_peft_model(model, config)
    touched = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert touched == {f"base_model.model.{name}" for name in wanted}
    assert all(".slice." in name for name in touched) and any(name.endswith("in_proj") for name in touched)


def test_all_linear_of_peft_itself_takes_heads_and_stems():
    """Why `lora_config` reads it differently; when PEFT learns of several heads, this test says so."""
    model = supernet("opt_projected", "mamba2")
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2))
    touched = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert any(".heads.1." in name for name in touched) and any(".stems.0." in name for name in touched)
    assert not any("projectors." in name or "_projector" in name for name in touched)


BYPASSED = {"mamba": "dt_proj", "falcon_mamba": "x_proj", "mamba2": "out_proj"}


@pytest.mark.parametrize("family, name", BYPASSED.items(), ids=BYPASSED)
@pytest.mark.parametrize("as_list", [True, False], ids=["list", "regex"])
def test_modules_that_a_kernel_bypasses_are_refused(family, name, as_list):
    targets = ["in_proj", name] if as_list else f".*{name}"
    with pytest.raises(ValueError, match=f"target_modules: got '.*{name}' and 2 more; .*Mixer reads the weight"):
        lora_config(supernet("gpt_neox", family), target_modules=targets)


CORRECTED = {"nemotron_h": "in_proj", "recurrent_gemma": "linear_x"}
CORRECTED = {family: name for family, name in CORRECTED.items() if family in FAMILIES}


@pytest.mark.parametrize("family, name", CORRECTED.items(), ids=CORRECTED)
def test_modules_that_a_hybrid_corrects_are_refused(family, name, tmp_path):
    with pytest.raises(ValueError, match=f"{name}.*the hybrid corrects the output of this module"):
        lora_config(supernet("gpt_neox", family), target_modules=[name])
    adapted = get_peft_model(supernet("gpt_neox", family), LoraConfig(target_modules=[name]))
    with pytest.raises(ValueError, match=f"{name}.*the hybrid corrects the output of this module"):
        ManticoreTrainer(adapted, arguments(tmp_path / "run"), train_dataset=rows())


def test_an_adapter_on_a_bypassed_module_does_nothing(tmp_path):
    """The reason for the refusal, and a Trainer that refuses adapters made without `lora_config`."""
    model = supernet("gpt_neox", "mamba")
    with torch.no_grad():
        before = model(tokens()).logits
        config = LoraConfig(target_modules=["dt_proj"], r=2, init_lora_weights=False)
        adapted = get_peft_model(model, config).eval()
        assert torch.equal(adapted(tokens()).logits, before)
    adapted.get_base_model().model.blocks[0].mixture.requires_grad_(True)
    with pytest.raises(ValueError, match="target_modules: got '.*dt_proj'.*MambaMixer reads the weight"):
        ManticoreTrainer(adapted, arguments(tmp_path / "run"), train_dataset=rows())
    assert not any(tmp_path.iterdir())


def test_attention_of_the_same_name_may_be_adapted():
    config = lora_config(supernet("gpt_neo", "llama"), target_modules=["out_proj"])
    assert config.target_modules == {"out_proj"}


def test_a_classifier_saves_its_head(tmp_path):
    config = supernet().config
    config.num_labels, config.pad_token_id = 3, 0
    model = ManticoreForSequenceClassification(config)
    adapted = get_peft_model(model, lora_config(model, r=2))
    adapted.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.score.weight" in saved
    assert {name for name, p in adapted.named_parameters() if p.requires_grad and "score" in name}


BAD = {
    "no_hybrid": (lambda: component("llama"), {}, "model: got LlamaForCausalLM, allowed is a hybrid"),
    "field": (supernet, {"rank": 4}, "rank: there is no such field"),
    "kind": (supernet, {"target_modules": 3}, "target_modules: got 3, allowed are a list of names"),
    "empty": (supernet, {"target_modules": []}, r"target_modules: got \[\], allowed are"),
    "nothing": (supernet, {"target_modules": ["w_qkv"]}, r"target_modules: got \['w_qkv'\], which matches no module"),
    "adapted": (
        lambda: get_peft_model(model := supernet(), lora_config(model)),
        {},
        "model: got a hybrid with adapters",
    ),
}


@pytest.mark.parametrize("model, overrides, message", BAD.values(), ids=BAD)
def test_bad_input(model, overrides, message):
    with pytest.raises(ValueError, match=message):
        lora_config(model(), **overrides)


PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2, "num_attention_heads": 1}


def _added(model):
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    return model


@pytest.mark.parametrize(
    "adapted",
    [
        lambda model: get_peft_model(model, lora_config(model, r=2)),
        lambda model: get_peft_model(model, PromptTuningConfig(**PROMPT)),
        _added,
    ],
    ids=["lora", "prompt", "added"],
)
def test_a_hybrid_is_not_cut_out_from_under_its_adapters(adapted):
    with pytest.raises(ValueError, match=r"model: it has adapters. Merge them \(`merge_and_unload`\) or remove them"):
        discretize(adapted(supernet("llama", "gpt_neox")), [0, 1])


def test_merged_adapters_are_cut_with_their_hybrid():
    model = supernet("llama", "gpt_neox")
    adapted = get_peft_model(model, lora_config(model, r=2, init_lora_weights=False))
    assert discretize(adapted.merge_and_unload(), [0, 1]).config.is_discretized


def test_embeddings_are_adapted_by_the_name_of_their_stem():
    untied = component("llama", 0, tie_word_embeddings=False)
    model = ManticoreForCausalLM.from_components([untied, component("mamba2", 1)], num_blocks=2)
    targets = ["stems.0.embed_tokens", "q_proj"]
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets, init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    assert any("lora_embedding" in name for name, _ in adapted.named_parameters())
    with torch.no_grad():
        logits = adapted(input_ids=tokens()).logits
        torch.testing.assert_close(adapted.merge_and_unload()(tokens()).logits, logits)


def test_prompts_are_tuned_with_a_number_of_heads(tmp_path):
    adapted = get_peft_model(discretize(supernet("llama", "gpt_neox"), [0, 1]), PromptTuningConfig(**PROMPT))
    adapted(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in adapted.parameters() if p.requires_grad)


def test_the_package_does_not_import_peft():
    code = "import sys, modeling_manticore as m; assert 'lora_config' in m.__all__; print('peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"
