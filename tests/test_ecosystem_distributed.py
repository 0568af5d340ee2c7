"""Two processes of `accelerate launch`: DDP and FSDP2 equal one process with the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import component, tokens
from transformers import AutoModelForCausalLM

from modeling_manticore import ManticoreForCausalLM, discretize
from modeling_manticore.search import set_mixture_kind


pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SGD = ['optim="sgd"', "learning_rate=0.1"]  # under Adam a gradient that is rounding noise moves a weight by the rate
FSDP = {
    "fsdp_version": "2",
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_state_dict_type": "FULL_STATE_DICT",
    "fsdp_reshard_after_forward": "true",
    "fsdp_cpu_ram_efficient_loading": "true",
}


def launch(model, output, *words, fsdp=None, processes=2, script="distributed_run.py"):
    """What the run saw; `fsdp` are the settings that differ from `FSDP`, None is DDP."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--dynamo_backend", "no"]
    command += ["--mixed_precision", "no", "--main_process_port", "0", "--num_processes", str(processes)]
    if processes == 1:
        command += ["--cpu"]
    elif fsdp is None:
        command += ["--multi_gpu"]  # what makes accelerate start processes itself; for `--cpu` it needs MPI
    else:
        words = ("--fsdp", *words)
        command += ["--use_fsdp", *(word for key, value in (FSDP | fsdp).items() for word in (f"--{key}", value))]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name(script)), str(model), str(output), str(4 // processes)] + [*words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return torch.load(output / "seen.pt") if (output / "seen.pt").exists() else None


def assert_same_logs(one, two):
    kept = [
        [
            {k: v for k, v in row.items() if k in ("loss", "grad_norm") or k.startswith(("mixture/", "distill/"))}
            for row in run["log"]
        ]
        for run in (one, two)
    ]
    assert len(kept[0]) == len(kept[1]) and any("loss" in row for row in kept[0])
    for row, other in zip(*kept):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-5)


def assert_same_weights(one, two):
    first, second = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert set(first) <= set(second)  # FSDP gathers both names of a tied matrix
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-5, rtol=0, msg=name)


HYBRIDS = {
    "supernet": lambda: ManticoreForCausalLM.from_components(
        [component("gpt_neox"), component("mamba2", 1)], num_blocks=2
    ),
    "learned gates": lambda: ManticoreForCausalLM.from_components(
        [component("llama"), component("mamba2", 1)], num_blocks=2, gate="learned"
    ),
    "tied": lambda: ManticoreForCausalLM.from_components(
        [component("gemma3_text"), component("mamba", 1)], num_blocks=2
    ),
    "discretized": lambda: discretize(
        ManticoreForCausalLM.from_components([component("gpt_neox"), component("mamba2", 1)], num_blocks=2), [0, 1]
    ),
}


@pytest.mark.parametrize("kind", ["supernet", "learned gates", "tied", "discretized"])
def test_two_processes_equal_one(kind, tmp_path):
    HYBRIDS[kind]().save_pretrained(tmp_path / "model")
    words = SGD if kind == "discretized" else [*SGD, 'stage="search"', "mixture_learning_rate=0.1"]
    one = launch(tmp_path / "model", tmp_path / "one", *words, processes=1)
    assert one["wrapped"] == "ManticoreForCausalLM"
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "one"))
    assert all((before[name] - after[name]).abs().max() > 1e-4 for name in after if "mixture" in name)
    for name, options in (("DistributedDataParallel", {}), ("FSDPManticoreForCausalLM", {"fsdp": {}})):
        two = launch(tmp_path / "model", tmp_path / name, *words, **options)
        assert two["wrapped"] == name
        assert_same_logs(one, two)
        assert_same_weights(tmp_path / "one", tmp_path / name)
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.no_grad():
            torch.testing.assert_close(loaded(tokens()).logits, two["logits"], atol=1e-5, rtol=0)


STRATEGIES = {
    "darts": ("softmax", ['strategy="darts"']),
    "gaea": ("simplex", ['strategy="gaea"']),
    "gaea on darts": ("simplex", ['strategy="gaea"', 'gaea_base="darts"']),
    "dash": ("gumbel_softmax", ['strategy="dash"']),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_on_two_processes_equal_one(name, tmp_path):
    mixture, words = STRATEGIES[name]
    model = HYBRIDS["supernet"]()
    set_mixture_kind(model, mixture)
    model.save_pretrained(tmp_path / "model")
    words = [*SGD, 'stage="search"', "mixture_learning_rate=0.1", *words]
    one = launch(tmp_path / "model", tmp_path / "one", *words, processes=1)
    two = launch(tmp_path / "model", tmp_path / "two", *words)
    assert two["wrapped"] == "DistributedDataParallel"
    assert_same_logs(one, two)
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    if name == "darts":
        with pytest.raises(AssertionError, match="strategy: got 'darts' under FSDP, allowed with it"):
            launch(tmp_path / "model", tmp_path / "sharded", *words, fsdp={})


def test_distillation_on_two_processes_equals_one(tmp_path):
    component("gpt_neox", 7).save_pretrained(tmp_path / "teacher")
    HYBRIDS["discretized"]().save_pretrained(tmp_path / "model")
    words = [*SGD, 'stage="distill"', "distill_weight=0.7", "hidden_weight=0.5"]
    words.append(f"teacher={json.dumps(str(tmp_path / 'teacher'))}")
    one = launch(tmp_path / "model", tmp_path / "one", *words, processes=1)
    assert one["log"][0]["distill/kl"] > 0 < one["log"][0]["distill/hidden"]
    for name, options in (("DistributedDataParallel", {}), ("FSDPManticoreForCausalLM", {"fsdp": {}})):
        two = launch(tmp_path / "model", tmp_path / name, *words, **options)
        assert two["wrapped"] == name
        assert_same_logs(one, two)
        assert_same_weights(tmp_path / "one", tmp_path / name)


def test_the_stock_trainer_trains_mixtures_too(tmp_path):
    HYBRIDS["supernet"]().save_pretrained(tmp_path / "model")
    one = launch(tmp_path / "model", tmp_path / "one", "--stock", *SGD, processes=1)
    two = launch(tmp_path / "model", tmp_path / "two", "--stock", *SGD)
    sharded = launch(tmp_path / "model", tmp_path / "sharded", "--stock", *SGD, fsdp={})
    for run, folder in ((two, "two"), (sharded, "sharded")):
        assert_same_logs(one, run)
        assert_same_weights(tmp_path / "one", tmp_path / folder)


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_fsdp_checkpoints_resume(kind, tmp_path):
    HYBRIDS["learned gates"]().save_pretrained(tmp_path / "model")
    words = ['stage="search"', 'save_strategy="steps"', "save_steps=2"]
    fsdp = {"fsdp_state_dict_type": kind}
    whole = launch(tmp_path / "model", tmp_path / "whole", *words, "max_steps=4", fsdp=fsdp)
    launch(tmp_path / "model", tmp_path / "part", *words, "max_steps=2", fsdp=fsdp)
    resumed = launch(tmp_path / "model", tmp_path / "part", *words, "max_steps=4", "--resume", fsdp=fsdp)
    torch.testing.assert_close(resumed["logits"], whole["logits"], atol=1e-5, rtol=0)
    if kind == "FULL_STATE_DICT":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "part" / "checkpoint-4").eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(tokens()).logits, whole["logits"], atol=1e-5, rtol=0)


def test_fsdp_of_a_16_bit_model(tmp_path):
    """Mixtures are units of their own, so that float32 beside bfloat16 is no obstacle."""
    HYBRIDS["supernet"]().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    one = launch(tmp_path / "model", tmp_path / "one", 'stage="search"', processes=1)
    two = launch(tmp_path / "model", tmp_path / "two", 'stage="search"', fsdp={})
    losses = [[row["loss"] for row in run["log"] if "loss" in row] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)
    saved = load_file(tmp_path / "two" / "model.safetensors")
    assert {t.dtype for n, t in saved.items() if "mixture" in n} == {torch.float32}
    assert {t.dtype for n, t in saved.items() if "in_projector" in n} == {torch.bfloat16}


def test_fsdp_of_a_16_bit_model_with_learned_gates_is_an_error_of_torch(tmp_path):
    """Gates are float32 inside a block. Load the model in float32 and train it in mixed precision."""
    HYBRIDS["learned gates"]().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    with pytest.raises(AssertionError, match="uniform original parameter dtype"):
        launch(tmp_path / "model", tmp_path / "two", fsdp={})


def test_fsdp_with_mixed_precision_and_activation_checkpointing(tmp_path):
    HYBRIDS["learned gates"]().save_pretrained(tmp_path / "model")
    plain = launch(tmp_path / "model", tmp_path / "plain", *SGD, fsdp={})
    recomputed = launch(tmp_path / "model", tmp_path / "again", *SGD, fsdp={"fsdp_activation_checkpointing": "true"})
    assert_same_logs(plain, recomputed)
    mixed = launch(tmp_path / "model", tmp_path / "mixed", *SGD, "bf16=true", fsdp={})
    losses = [[row["loss"] for row in run["log"] if "loss" in row] for run in (plain, mixed)]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)
    saved = load_file(tmp_path / "mixed" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
