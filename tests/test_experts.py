"""Mixtures of experts keep their router loss: that of the uncut model, over the layers that the hybrid has."""

import pytest
import torch
from family_checks import chain, gradients
from tiny import component, scanned, tokens

from modeling_manticore import ManticoreForCausalLM, discretize


FAMILIES = ("jamba", "granitemoehybrid", "qwen3_next")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", [0, 4])
@torch.no_grad()
def test_a_chain_has_the_router_loss_of_the_uncut_model(family, padding):
    model, ids = scanned(component(family)), tokens()
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    hybrid = chain(model, [0, 1, model.config.num_hidden_layers])
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": ids}
    expected = model(**inputs, output_router_logits=True)
    found = hybrid(**inputs, output_router_logits=True)
    assert len(found.router_logits) == len(expected.router_logits) > 0
    assert all(torch.equal(a, b) for a, b in zip(found.router_logits, expected.router_logits))
    assert torch.equal(found.aux_loss, expected.aux_loss) and found.aux_loss > 0
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-6, rtol=0)
    plain = hybrid(**inputs)
    assert plain.aux_loss is None and plain.router_logits is None and plain.loss < found.loss


def test_the_configuration_of_a_component_switches_it_on():
    experts, plain = component("jamba"), component("llama", 1)
    experts.config.output_router_logits = True
    experts.config.router_aux_loss_coef = 0.5
    supernet = ManticoreForCausalLM.from_components([experts, plain], num_blocks=2)
    ids = tokens()
    out = supernet(ids, labels=ids)
    off = supernet(ids, labels=ids, output_router_logits=False)
    torch.testing.assert_close(out.loss - off.loss, 0.5 * out.aux_loss)
    half = discretize(supernet, [0, 1])
    assert 0 < len(half(ids).router_logits) < len(out.router_logits)
    assert discretize(supernet, [1, 1])(ids, output_router_logits=True).aux_loss is None
    gates = [name for name in gradients(half, ids) if "router" in name]
    assert gates and all(gradients(half, ids)[name].abs().sum() > 0 for name in gates)


@torch.no_grad()
def test_with_a_cache_the_mask_is_that_of_the_new_tokens():
    hybrid, ids = chain(component("granitemoehybrid"), [0, 2, 4]), tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    whole = hybrid(ids, attention_mask=mask, output_router_logits=True)
    cache = hybrid(ids[:, :8], attention_mask=mask[:, :8], use_cache=True).past_key_values
    rest = hybrid(ids[:, 8:], attention_mask=mask, past_key_values=cache, output_router_logits=True)
    for part, full in zip(rest.router_logits, whole.router_logits):
        torch.testing.assert_close(part.view(2, 4, -1), full.view(2, 12, -1)[:, 8:], atol=1e-5, rtol=0)
    assert torch.isfinite(rest.aux_loss)
