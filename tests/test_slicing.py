"""Chained slices are the uncut model: every family, even and uneven cuts, padding, prefill and decode."""

import pytest
import torch
from tiny import FAMILIES, component, tokens

from modeling_manticore import ManticoreForCausalLM


def chain(model, cuts):
    blocks = [[{"component": 0, "start": a, "stop": b}] for a, b in zip(cuts, cuts[1:])]
    return ManticoreForCausalLM.from_components([model], blocks=blocks)


def uncut_logits(model, ids, mask):
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    recurrent = "mamba" in model.config.model_type
    return model(ids, attention_mask=mask, **({} if recurrent else {"position_ids": positions})).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", [0, 4])
@torch.no_grad()
def test_chained_slices_are_the_uncut_model(family, padding):
    model, ids = component(family), tokens()
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    live, depth = mask.bool(), model.config.num_hidden_layers
    expected = uncut_logits(model, ids, mask)
    for cuts in ([0, depth], [0, depth // 2, depth], [0, 1, depth], [0, 1, 2, depth]):
        hybrid = chain(model, cuts)
        assert torch.equal(hybrid(ids, attention_mask=mask).logits[live], expected[live])
        for steps in ([8, 9, 10, 11, 12], [6, 12]):
            out = hybrid(ids[:, : steps[0]], attention_mask=mask[:, : steps[0]], use_cache=True)
            parts = [out.logits]
            for start, stop in zip(steps, steps[1:]):
                out = hybrid(
                    ids[:, start:stop],
                    attention_mask=mask[:, :stop],
                    past_key_values=out.past_key_values,
                    use_cache=True,
                )
                parts.append(out.logits)
            torch.testing.assert_close(torch.cat(parts, 1)[live], expected[live], atol=5e-5, rtol=0)
