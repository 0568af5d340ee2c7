"""What a family must hold, cell by cell: a component cut into slices against the same component uncut."""

import tempfile
from pathlib import Path

import torch
from tiny import component, tokens
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from modeling_manticore import ManticoreForCausalLM
from modeling_manticore.slicing_manticore import find_layers


CELLS = ("full", "left_padding", "decode", "beams", "save_load", "gradients")
BOUND = 1e-5
PROMPT, NEW_TOKENS, BEAMS = 8, 4, 3


def chain(model: PreTrainedModel, cuts: list[int]) -> ManticoreForCausalLM:
    """The model as a hybrid of its own consecutive slices."""
    blocks = [[{"component": 0, "start": a, "stop": b}] for a, b in zip(cuts, cuts[1:])]
    return ManticoreForCausalLM.from_components([model], blocks=blocks)


def run(model: PreTrainedModel, ids, mask, cache=None, use_cache=False):
    """(logits, cache) of a component or a hybrid, under the positions that a hybrid derives from the mask."""
    options = {"attention_mask": mask, "use_cache": use_cache}
    if model.config.model_type not in ("mamba", "mamba2", "falcon_mamba"):
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    elif ids.shape[1] == 1:
        options["attention_mask"] = None  # a recurrent state has forgotten what was padding
    if cache is not None:
        options["cache_params" if "mamba" in model.config.model_type else "past_key_values"] = cache
    out = model(ids, **options)
    return out.logits, getattr(out, "past_key_values", None) or getattr(out, "cache_params", None)


def run_in_steps(model: PreTrainedModel, ids, mask, steps) -> torch.Tensor:
    """Logits of a forward pass in pieces that end at `steps`, with a cache."""
    cache, parts = None, []
    if model.config.model_type != "manticore":
        cache = DynamicCache(config=model.config)  # recurrent_gemma does not hand out the one it makes
    for start, stop in zip((0, *steps), steps):
        logits, found = run(model, ids[:, start:stop], mask[:, :stop], cache, use_cache=True)
        cache = cache if cache is not None else found
        parts.append(logits)
    return torch.cat(parts, 1)


@torch.no_grad()
def rows_alone(model: PreTrainedModel, ids, mask) -> torch.Tensor:
    """Logits of each row without its padding, by itself; zero at padding."""
    found = torch.zeros(*ids.shape, model.config.vocab_size)
    for row, live in enumerate(mask.bool()):
        alone = ids[row : row + 1, live]
        found[row, live] = run(model, alone, torch.ones_like(alone))[0][0]
    return found


def beam_search(model: PreTrainedModel, ids, mask=None, use_cache: bool = True):
    """Beam search with its scores, and none of the special tokens."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=NEW_TOKENS,
        num_beams=BEAMS,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
        return_dict_in_generate=True,
        output_scores=True,
    )


def gradients(model: PreTrainedModel, ids) -> dict[str, torch.Tensor]:
    """Gradient of the language-model loss for every parameter that has one."""
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference, infinite where a value is not a number."""
    difference = (a - b).abs().max().item()
    return difference if difference == difference else float("inf")


def measure_family(family: str) -> dict[str, float]:
    """
    The largest difference in every cell, over an even and an uneven cut, float32. full: logits. left_padding: logits
    of a padded batch against each row of the uncut model alone. decode: logits of prefill and single tokens against
    the uncut model's full forward pass. beams: scores of a beam search with a cache against the uncut model's without,
    infinite if the sequences differ. save_load: logits before saving and after loading. gradients: of every parameter,
    relative to its largest.
    """
    model, ids = component(family), tokens()
    mask = torch.ones_like(ids)
    padded = mask.clone()
    padded[0, :4] = 0
    depth = model.config.num_hidden_layers
    worst = dict.fromkeys(CELLS, 0.0)

    def note(cell: str, difference: float) -> None:
        worst[cell] = max(worst[cell], difference)

    with torch.no_grad():
        full, alone = run(model, ids, mask)[0], rows_alone(model, ids, padded)
        steps = range(PROMPT, ids.shape[1] + 1)
        beams = beam_search(model, ids[:, :PROMPT], use_cache=False)
    grads = gradients(model, ids)
    for cuts in ([0, depth // 2, depth], [0, 1, depth]):
        hybrid = chain(model, cuts)
        with torch.no_grad():
            logits = run(hybrid, ids, mask)[0]
            note("full", largest(logits, full))
            note("left_padding", largest(run(hybrid, ids, padded)[0][padded.bool()], alone[padded.bool()]))
            note("decode", largest(run_in_steps(hybrid, ids, mask, steps), full))
            found = beam_search(hybrid, ids[:, :PROMPT])
            same = torch.equal(found.sequences, beams.sequences)
            note("beams", largest(found.sequences_scores, beams.sequences_scores) if same else float("inf"))
            with tempfile.TemporaryDirectory() as folder:
                hybrid.save_pretrained(folder)
                loaded = AutoModelForCausalLM.from_pretrained(Path(folder))
                note("save_load", largest(run(loaded, ids, mask)[0], logits))
        note("gradients", _gradient_difference(model, hybrid, grads, ids))
    return worst


def _gradient_difference(model, hybrid, expected: dict[str, torch.Tensor], ids) -> float:
    base, layers = model.base_model_prefix, find_layers(getattr(model, model.base_model_prefix), model.config)
    found, worst = gradients(hybrid, ids), 0.0
    tied = hybrid.all_tied_weights_keys
    for name, gradient in found.items():
        part, _, inner = name.partition(".slice.") if ".slice." in name else name.partition(".0.")
        uncut = inner if part == "heads" else f"{base}.{inner}"
        assert name not in tied and uncut in expected, name
        scale = expected[uncut].abs().max().item() or 1.0
        worst = max(worst, largest(gradient, expected[uncut]) / scale)
    count = sum(f"{base}.{layers}." in name for name in expected)
    assert count == sum(f".slice.{layers}." in name for name in found) and len(found) == len(expected)
    return worst
