"""A discretized hybrid holds exactly its layers, one stem, one head and its bridges; so does its file."""

import pytest
from safetensors import safe_open
from tiny import component

from modeling_manticore import ManticoreForCausalLM, discretize


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def layers(model, family):
    base = getattr(model, model.base_model_prefix)
    return base.h if family == "gpt2" else base.layers


CASES = {
    "mixed": (("gpt_neox", "mamba2"), [0, 1]),
    "mixed_back": (("gpt_neox", "mamba2"), [1, 0]),
    "alternating": (("gpt_neox", "mamba2"), [0, 1, 0]),
    "pure_tied": (("mamba", "gpt_neox"), [0, 0]),
    "stem_only_tied": (("mamba", "gpt_neox"), [0, 1]),
    "head_only_tied": (("gpt_neox", "mamba"), [0, 1]),
}


@pytest.mark.parametrize("families, choice", CASES.values(), ids=CASES)
def test_size(families, choice, tmp_path):
    parts = [component(family) for family in families]
    supernet = ManticoreForCausalLM.from_components(parts, num_blocks=len(choice))
    hybrid = discretize(supernet, choice)

    expected, previous = 0, None
    for spec_block, k in zip(supernet.config.blocks, choice):
        spec = spec_block[k]
        expected += sum(count(layer) for layer in layers(parts[k], families[k])[spec["start"] : spec["stop"]])
        width = parts[k].config.hidden_size
        if previous is not None and previous != k:
            expected += parts[previous].config.hidden_size * width + width
        previous = k
    first, last = parts[choice[0]], parts[choice[-1]]
    expected += count(first.get_input_embeddings())
    base = getattr(last, last.base_model_prefix)
    expected += count(base.norm_f if hasattr(base, "norm_f") else base.final_layer_norm)
    shared = choice[0] == choice[-1] and last.config.tie_word_embeddings
    expected += 0 if shared else last.get_output_embeddings().weight.numel()
    if any(k != choice[-1] for k in choice):
        ended = [
            k for b, k in enumerate(choice[:-1]) if supernet.config.blocks[b][k]["stop"] == supernet.config.depth(k)
        ]
        assert not ended
    assert count(hybrid) == expected
    assert f"parameters {expected:,}" in hybrid.describe()

    hybrid.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = list(file.keys())
        sizes = [file.get_tensor(name).numel() for name in names]
    assert sum(sizes) == expected
    merged = 1 + sum(a != b for a, b in zip(choice, choice[1:]))
    assert {name.split(".")[2] for name in names if name.startswith("model.blocks.")} == {
        str(b) for b in range(merged)
    }
    assert not any("mixture" in name or "out_projector" in name for name in names)
