"""Random hybrids of random families, sizes, cuts and gates, and what each of them must hold."""

import itertools
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from family_checks import NEW_TOKENS, PROMPT, beam_search, gradients, largest, run_in_steps
from tiny import FAMILIES, VOCAB, component, tokens
from torch.func import functional_call, jvp
from transformers import AutoModelForCausalLM

from modeling_manticore import ManticoreForCausalLM


PAIRS, TRIPLES = 40, 10
BOUNDS = {"decode": 5e-5, "left_padding": 5e-5, "beams": 1e-5, "save_load": 0.0, "gradients": 1e-6}
CUSTOM_BACKWARD = ("bloom", "recurrent_gemma")  # functions that cannot be differentiated forward


@dataclass
class Draw:
    """A hybrid to be made: families with their widths, blocks as in the configuration, and how they are joined."""

    seed: int
    families: list[str]
    widths: list[int]
    blocks: list[list[dict]]
    options: dict

    @property
    def name(self) -> str:
        """Families and number of blocks, for a table."""
        kind = "discrete" if all(len(block) == 1 for block in self.blocks) else "supernet"
        return f"{'+'.join(self.families)} {kind} {len(self.blocks)}"

    def build(self) -> ManticoreForCausalLM:
        """The hybrid, with random mixture weights."""
        parts = [component(f, self.seed + k, width) for k, (f, width) in enumerate(zip(self.families, self.widths))]
        model = ManticoreForCausalLM.from_components(parts, blocks=self.blocks, **self.options)
        generator = torch.Generator().manual_seed(self.seed)
        weights = [torch.rand(len(block), generator=generator) + 0.2 for block in self.blocks]
        model.set_mixture_weights([w / w.sum() for w in weights])
        return model


def draw(seed: int, count: int) -> Draw:
    """The seed-th random hybrid of `count` different families (one of them in turn); every other one is discrete."""
    dice = random.Random(1000 * count + seed)
    in_turn = random.Random(count).sample(sorted(FAMILIES), len(FAMILIES))[seed % len(FAMILIES)]
    families = [in_turn, *dice.sample(sorted(FAMILIES.keys() - {in_turn}), count - 1)]
    dice.shuffle(families)
    widths = [dice.choice([16, 32, 48]) for _ in families]
    depths = [component(f, 0, width).config.num_hidden_layers for f, width in zip(families, widths)]
    num_blocks = dice.randint(2, 3)
    blocks = [[] for _ in range(num_blocks)]
    for k, depth in enumerate(depths):
        cuts = [0, *sorted(dice.sample(range(1, depth), num_blocks - 1)), depth]
        for b, (start, stop) in enumerate(zip(cuts, cuts[1:])):
            blocks[b].append({"component": k, "start": start, "stop": stop})
    if seed % 2:
        chosen = [dice.randrange(count) for _ in blocks]
        chosen[-1] = next(k for k in itertools.chain([chosen[-1]], range(count)) if k != chosen[0])
        blocks = [[block[k]] for block, k in zip(blocks, chosen)]
    options = {
        "gate": dice.choice(["routed", "mixture", "none", "learned"]),
        "project_ends": dice.random() < 0.7,
        "head_mixture": "last" if seed % 2 else dice.choice(["last", "first"]),
        "hidden_size": max(widths) + dice.choice([0, 0, 8]),
        "projector_init": dice.choice(["identity", "random"]),
    }
    if dice.random() < 0.4:  # a skip path: beside others anywhere, alone only between blocks
        if seed % 2:
            blocks.insert(dice.randint(1, num_blocks - 1), [{"component": None}])
        else:
            block = dice.choice(blocks)
            block.insert(dice.randint(0, len(block)), {"component": None})
    return Draw(seed, families, widths, blocks, options)


def all_draws() -> list[Draw]:
    """The 40 pairs, then the 10 triples."""
    return [draw(seed, 2) for seed in range(PAIRS)] + [draw(seed, 3) for seed in range(TRIPLES)]


def measure_hybrid(hybrid: ManticoreForCausalLM) -> dict[str, float]:
    """
    The largest difference in every cell, float32. decode: logits of prefill, single tokens and several tokens on a
    filled cache against a full forward pass. left_padding: every step of a padded batch's greedy generation against
    each row alone. beams: scores of a beam search with and without a cache, infinite if the sequences differ.
    save_load: logits before saving and after loading. gradients: a directional derivative of the loss, by backward
    against forward differentiation in float64, relative; no such cell with families of a custom backward.
    """
    ids = tokens()
    full_mask = torch.ones_like(ids)
    found = {}
    with torch.no_grad():
        full = hybrid(ids).logits
        parts = [run_in_steps(hybrid, ids, full_mask, steps) for steps in (range(PROMPT, 13), (5, 9, 12))]
        found["decode"] = max(largest(part, full) for part in parts)
        found["left_padding"] = _padded_generation(hybrid)
        with_cache, without = (beam_search(hybrid, ids[:, :PROMPT], use_cache=flag) for flag in (True, False))
        same = torch.equal(with_cache.sequences, without.sequences)
        found["beams"] = largest(with_cache.sequences_scores, without.sequences_scores) if same else float("inf")
        with tempfile.TemporaryDirectory() as folder:
            hybrid.save_pretrained(folder, max_shard_size="50KB")
            found["save_load"] = largest(AutoModelForCausalLM.from_pretrained(Path(folder))(ids).logits, full)
    if not any(part.model_type in CUSTOM_BACKWARD for part in hybrid.config.components):
        found["gradients"] = _derivative_error(hybrid, ids % (VOCAB - 3) + 3)  # embeddings of padding have no gradient
    else:
        assert gradients(hybrid, ids).keys() == dict(hybrid.named_parameters()).keys()
    return found


def _padded_generation(hybrid) -> float:
    ids, lengths = tokens(3, PROMPT), (PROMPT, 6, 3)
    mask = torch.stack([(torch.arange(PROMPT) >= PROMPT - length).long() for length in lengths])
    options = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    batch = hybrid.generate(ids, attention_mask=mask, **options)
    worst = 0.0
    for row, length in enumerate(lengths):
        live = batch.sequences[row : row + 1, PROMPT - length : -1]
        alone = hybrid(live).logits[0, length - 1 :]
        worst = max(worst, largest(torch.stack([step[row] for step in batch.logits]), alone))
    return worst


def _derivative_error(hybrid, ids) -> float:
    """|g.u - dL(p; u)| / |g.u|: backward against forward differentiation along u, the gradient with random scales."""
    for part in hybrid.config.components:
        part._experts_implementation = "eager"  # the grouped one knows no float64
    hybrid.double().set_attn_implementation("eager")  # sdpa cannot be differentiated forward
    grads = gradients(hybrid, ids)
    parameters = dict(hybrid.named_parameters())
    assert grads.keys() == parameters.keys() and all(torch.isfinite(g).all() for g in grads.values())
    generator = torch.Generator().manual_seed(0)
    direction = {n: g / (g.norm() + 1e-12) * torch.rand((), generator=generator) for n, g in grads.items()}
    backward = sum((grads[name] * u).sum() for name, u in direction.items()).item()
    tangents = {name: direction[name].to(parameter.dtype) for name, parameter in parameters.items()}

    def loss(values: dict) -> torch.Tensor:
        return functional_call(hybrid, values, (ids,), {"labels": ids}).loss

    forward = jvp(loss, ({name: p.detach() for name, p in parameters.items()},), (tangents,))[1].item()
    return abs(backward - forward) / abs(backward)
