"""
Kernels come through transformers' own switches: mamba-ssm and causal-conv1d where they are installed, attention as
asked for. What needs a CUDA device is marked `cuda` and skipped without one.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny import component, tokens
from transformers import AutoModelForCausalLM

from modeling_manticore import ManticoreForCausalLM, discretize


on_cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a CUDA device")]
KERNELS = {
    "mamba_ssm/ops/selective_scan_interface.py": ("selective_scan_fn", "mamba_inner_fn"),
    "mamba_ssm/ops/triton/selective_state_update.py": ("selective_state_update",),
    "mamba_ssm/ops/triton/ssd_combined.py": ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"),
    "causal_conv1d/__init__.py": ("causal_conv1d_fn", "causal_conv1d_update"),
}
CHILD = """
import sys
import torch
from tiny import component, tokens
from modeling_manticore import ManticoreForCausalLM, discretize

family, path = sys.argv[1], [0, 0]
alone = component(family, 0)
hybrid = discretize(ManticoreForCausalLM.from_components([alone, component("gpt2", 1)], num_blocks=2), path)
for model in (alone, hybrid):
    for training in (False, True):
        try:
            model.train(training)(tokens(), use_cache=False)
            print("no kernel")
        except RuntimeError as error:
            print(error)
"""


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_installed_kernels_are_called_as_by_the_uncut_model(family, tmp_path):
    """Their place is taken by functions that tell their name and fail."""
    for file, names in KERNELS.items():
        target = tmp_path / file
        target.parent.mkdir(parents=True, exist_ok=True)
        for folder in target.relative_to(tmp_path).parents:
            (tmp_path / folder / "__init__.py").touch()
        bodies = (f"def {name}(*args, **kwargs):\n    raise RuntimeError('{name}')\n" for name in names)
        target.write_text("\n\n".join(bodies))
    (tmp_path / "__init__.py").unlink()
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", CHILD, family],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path, here, here.parent)))},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    called = done.stdout.split("\n")[:4]
    known = {name for names in KERNELS.values() for name in names}
    assert called[:2] == called[2:] and set(called) <= known, called


def attention(model) -> list:
    return [part._attn_implementation for part in model.config.components]


@pytest.mark.parametrize("asked", ["eager", "sdpa", "flex_attention"])
def test_attention_reaches_the_components(asked, tmp_path):
    parts = [component("llama", 0), component("gpt_neox", 1), component("mamba", 2)]
    model = ManticoreForCausalLM.from_components(parts, num_blocks=2, attn_implementation=asked)
    assert attention(model)[:2] == [asked, asked]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=asked)
    layers = [m for m in loaded.modules() if hasattr(m, "q_proj") or hasattr(m, "query_key_value")]
    assert attention(loaded)[:2] == [asked, asked] and layers
    assert {layer.config._attn_implementation for layer in layers} == {asked}  # what the layers look at when they run


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="it is about its absence")
def test_flash_attention_is_asked_of_transformers(tmp_path):
    model = ManticoreForCausalLM.from_components([component("llama", 0), component("mamba", 1)], num_blocks=2)
    with pytest.raises((ImportError, ValueError), match="[Ff]lash"):
        model.set_attn_implementation("flash_attention_2")
    assert attention(model)[0] == "sdpa"


def hybrid(*families):
    parts = [component(family, k) for k, family in enumerate(families)]
    return discretize(ManticoreForCausalLM.from_components(parts, num_blocks=2), [0, 1])


class TestOnCuda:
    pytestmark = on_cuda

    @pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_mamba"])
    def test_states_and_attention_equal_the_cpu(self, family):
        model = hybrid("llama", family)
        with torch.no_grad():
            expected = model(tokens()).logits
            found = model.cuda()(tokens().cuda()).logits.cpu()
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)

    def test_training_and_decoding(self):
        model = hybrid("llama", "mamba").cuda().train()
        ids = tokens().cuda()
        model(ids, labels=ids).loss.backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
        assert any(p.grad is not None for p in model.parameters())
        kept = model.eval().generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
        again = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, use_cache=False)
        assert torch.equal(kept, again)

    @pytest.mark.skipif(find_spec("mamba_ssm") is None, reason="it needs a CUDA device and mamba-ssm")
    @pytest.mark.parametrize("family", ["mamba", "mamba2"])
    def test_kernels_equal_the_uncut_model(self, family):
        alone = component(family, 0).cuda()
        parts = [alone, component("gpt2", 1).cuda()]
        model = discretize(ManticoreForCausalLM.from_components(parts, num_blocks=2), [0, 0])
        with torch.no_grad():
            assert torch.equal(model(tokens().cuda()).logits, alone(tokens().cuda()).logits)

    @pytest.mark.skipif(find_spec("flash_attn") is None, reason="it needs a CUDA device and flash-attn")
    def test_flash_attention_equals_sdpa(self):
        model = hybrid("llama", "mamba2").cuda().bfloat16()
        with torch.no_grad():
            expected = model(tokens().cuda()).logits
            model.set_attn_implementation("flash_attention_2")
            assert attention(model)[0] == "flash_attention_2"
            found = model(tokens().cuda()).logits
        assert ((found - expected).float().norm() / expected.float().norm()).item() < 0.02
