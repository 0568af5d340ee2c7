"""Corners of the simplex: a pure corner is the component, a mixed corner is the discretized hybrid."""

import itertools
import random

import pytest
import torch
from tiny import VOCAB, component, tokens

from modeling_manticore import ManticoreForCausalLM, calibrate, discretize


GROUPS = [("gpt_neox", "mamba"), ("gpt2", "mamba2"), ("llama", "falcon_mamba"), ("opt", "qwen3", "mamba2")]


def one_hot(choice, paths):
    return [[float(p == chosen) for p in range(paths)] for chosen in choice]


@pytest.mark.parametrize("families", GROUPS, ids="+".join)
@pytest.mark.parametrize("gate", ["routed", "mixture"])
@pytest.mark.parametrize("project_ends", [True, False])
@pytest.mark.parametrize("calibrated", [False, True])
@torch.no_grad()
def test_corners(families, gate, project_ends, calibrated):
    components = [component(f, seed, initializer_range=0.1, init_std=0.1) for seed, f in enumerate(families)]
    ids, text = tokens(), tokens(32, 12, seed=2)
    for num_blocks in (1, 2, 3):  # 3 is the shallowest depth
        model = ManticoreForCausalLM.from_components(
            components, num_blocks=num_blocks, gate=gate, project_ends=project_ends, projector_init="random"
        )
        if calibrated:
            calibrate(model, text % VOCAB, progress=False)
        for k, uncut in enumerate(components):
            model.set_mixture_weights(one_hot([k] * num_blocks, len(components)))
            torch.testing.assert_close(model(ids).logits, uncut(ids).logits, atol=1e-5, rtol=0)
        choices = list(itertools.product(range(len(components)), repeat=num_blocks))
        for choice in choices if gate == "routed" else random.Random(0).sample(choices, min(4, len(choices))):
            model.set_mixture_weights(one_hot(choice, len(components)))
            hybrid = discretize(model, list(choice), refit=False)
            torch.testing.assert_close(model(ids).logits, hybrid(ids).logits, atol=1e-5, rtol=0)


def test_the_shallowest_depth_is_among_the_block_counts():
    depths = [component(family).config.num_hidden_layers for group in GROUPS for family in group]
    assert min(depths) == 3
