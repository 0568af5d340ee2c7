"""Chained slices are the uncut model: every family, even and uneven cuts, padding, prefill and decode; head views."""

import pytest
import torch
from tiny import FAMILIES, component, tokens
from transformers import DynamicCache

from modeling_manticore import ManticoreConfig, ManticoreForCausalLM
from modeling_manticore.slicing_manticore import PADDING_LEAKS, ComponentBlueprint, run_view


def chain(model, cuts):
    blocks = [[{"component": 0, "start": a, "stop": b}] for a, b in zip(cuts, cuts[1:])]
    return ManticoreForCausalLM.from_components([model], blocks=blocks)


def even_and_uneven_cuts(depth):
    return [0, depth], [0, depth // 2, depth], [0, 1, depth], [0, 1, 2, depth]


def run(model, ids, mask, cache=None, use_cache=False):
    """A component or a hybrid under the positions that a hybrid derives from the mask."""
    options = {"attention_mask": mask, "use_cache": use_cache}
    if model.config.model_type not in ("mamba", "mamba2", "falcon_mamba"):
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    elif ids.shape[1] == 1:
        options["attention_mask"] = None  # a recurrent state has forgotten what was padding
    if cache is not None:
        options["cache_params" if "mamba" in model.config.model_type else "past_key_values"] = cache
    out = model(ids, **options)
    return out.logits, getattr(out, "past_key_values", None) or getattr(out, "cache_params", None)


def run_in_steps(model, ids, mask, steps):
    cache, parts = None, []
    if model.config.model_type != "manticore":
        cache = DynamicCache(config=model.config)  # recurrent_gemma does not hand out the one it makes
    for start, stop in zip((0, *steps), steps):
        logits, found = run(model, ids[:, start:stop], mask[:, :stop], cache, use_cache=True)
        cache = cache if cache is not None else found
        parts.append(logits)
    return torch.cat(parts, 1)


def reference(model, ids, mask, steps):
    """(full forward, in steps) of the uncut model; row by row without padding where it lets padding leak."""
    if model.config.model_type not in PADDING_LEAKS or mask.all():
        return run(model, ids, mask)[0], run_in_steps(model, ids, mask, steps)
    full, stepped = torch.zeros(*ids.shape, model.config.vocab_size), torch.zeros(*ids.shape, model.config.vocab_size)
    for row, live in enumerate(mask.bool()):
        alone = ids[row : row + 1, live]
        full[row, live] = run(model, alone, torch.ones_like(alone))[0][0]
        offset = ids.shape[1] - alone.shape[1]
        stepped[row, live] = run_in_steps(model, alone, torch.ones_like(alone), [s - offset for s in steps])[0]
    return full, stepped


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", [0, 4])
@torch.no_grad()
def test_chained_slices_are_the_uncut_model(family, padding):
    model, ids = component(family), tokens()
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    live = mask.bool()
    full, decoded = reference(model, ids, mask, range(8, 13))
    exact = 0 if padding == 0 or model.config.model_type not in PADDING_LEAKS else 1e-5
    for cuts in even_and_uneven_cuts(model.config.num_hidden_layers):
        hybrid = chain(model, cuts)
        torch.testing.assert_close(run(hybrid, ids, mask)[0][live], full[live], atol=exact, rtol=0)
        found = run_in_steps(hybrid, ids, mask, range(8, 13))
        torch.testing.assert_close(found[live], decoded[live], atol=1e-6 + exact, rtol=0)
        # Several tokens on a filled cache: some uncut families are wrong there, so against the full forward.
        torch.testing.assert_close(run_in_steps(hybrid, ids, mask, (6, 12))[live], full[live], atol=5e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", [True, False])
@torch.no_grad()
def test_a_head_view_gives_the_uncut_logits(family, norm):
    model, ids = component(family), tokens()
    blueprint = ComponentBlueprint(ManticoreConfig.from_partition([model.config], 1).components[0])
    parts = torch.nn.ModuleDict(
        {
            "stem": blueprint.view(0, 0, stem=True),
            "slice": blueprint.view(0, model.config.num_hidden_layers, tail=not norm),
            "head": blueprint.head(norm=norm),
        }
    )
    parts.to_empty(device="cpu").eval()
    prefix = model.base_model_prefix + "."
    base = {name.removeprefix(prefix): tensor for name, tensor in model.state_dict().items() if prefix in name}
    buffers = {name.removeprefix(prefix): tensor for name, tensor in model.named_buffers() if prefix in name}
    fill(parts["stem"], base | buffers)
    fill(parts["slice"], base | buffers)
    fill(parts["head"], dict(model.state_dict()) | dict(model.named_buffers()))
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    hidden = run_view(parts["stem"], input_ids=ids, position_ids=positions)
    hidden = run_view(parts["slice"], inputs_embeds=hidden, position_ids=positions)
    logits = parts["head"](inputs_embeds=hidden, use_cache=False).logits
    assert torch.equal(logits, run(model, ids, torch.ones_like(ids))[0])


def fill(view, tensors):
    """Copy every tensor of a view that is still there from the uncut model, by its own name."""
    for name, tensor in [*view.named_parameters(), *view.named_buffers()]:
        tensor.copy_(tensors[name])
