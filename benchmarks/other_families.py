"""
Causal language models of transformers beyond those in `tests/tiny.py`: each that a common tiny configuration can make
is cut into slices and held against itself uncut, full forward and with a cache, or is refused with a reason. An error
where one is accepted and wrong. Writes `results/other_families.json`, which `families.py` puts on its page.
"""

import signal
import sys
from pathlib import Path

import torch
from _shared import quiet, write
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from family_checks import chain, largest, run, run_in_steps  # noqa: E402  (needs the path above)
from tiny import FAMILIES, VOCAB, tokens  # noqa: E402


FULL_BOUND, CACHE_BOUND = 1e-6, 2e-5
LARGEST, SECONDS = 3_000_000, 60
SHAPE = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
MLA = {  # multi-head latent attention
    "num_key_value_heads": 4,
    "head_dim": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
OPTIONAL = {"head_dim": 8, "sliding_window": 4, "n_group": 1, "topk_group": 1}


class TooSlow(BaseException):
    """A family took longer than it may."""


def tiny(kind: type[PreTrainedConfig]) -> torch.nn.Module | None:
    """A tiny model of the family, None where this shape is not enough to make one."""
    known = dir(kind)
    for shape in (SHAPE | OPTIONAL, SHAPE, SHAPE | {"num_key_value_heads": 4}, SHAPE | MLA):
        try:
            config = kind(**{name: value for name, value in shape.items() if name in known})
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if size > LARGEST:
                continue
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval()
            run(model, tokens(), torch.ones_like(tokens()))
            return model
        except Exception:  # a shape that does not fit fails in whatever way the family likes
            continue
    return None


@torch.no_grad()
def outcome(model: torch.nn.Module) -> dict:
    """{"full": difference, "cache": difference}, or {"refused": reason}."""
    ids = tokens()
    mask, depth = torch.ones_like(ids), model.config.num_hidden_layers
    try:
        hybrid = chain(model, [0, 1, depth])
    except ValueError as error:
        return {"refused": str(error)}
    full = run(model, ids, mask)[0]
    return {
        "full": largest(run(hybrid, ids, mask)[0], full),
        "cache": largest(run_in_steps(hybrid, ids, mask, (6, 7, 8, 12)), full),
    }


def main() -> None:
    """Try every family, print and write what came out."""
    quiet()
    torch.set_num_threads(1)

    def stop(*_):
        raise TooSlow

    signal.signal(signal.SIGALRM, stop)
    tried = {FAMILIES[name]().model_type for name in FAMILIES}
    found, untried = {}, []
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        family = kind.model_type
        if family in tried or family in found or family == "manticore":
            continue
        signal.alarm(SECONDS)
        try:
            model = tiny(kind)
            if model is None:
                untried.append(family)
            else:
                found[family] = outcome(model)
                print(f"{family:<24}", found[family], flush=True)
        except TooSlow:
            untried.append(family)
        finally:
            signal.alarm(0)
    wrong = {
        family: cells
        for family, cells in found.items()
        if "refused" not in cells and (cells["full"] > FULL_BOUND or cells["cache"] > CACHE_BOUND)
    }
    right = sorted(family for family, cells in found.items() if "refused" not in cells and family not in wrong)
    print(f"{len(right)} right, {len(found) - len(right) - len(wrong)} refused, {len(untried)} not tried")
    bounds = {"full": FULL_BOUND, "cache": CACHE_BOUND}
    write("other_families", {"bounds": bounds, "right": right, "found": found, "not_tried": sorted(untried)})
    if wrong:
        raise SystemExit(f"accepted and wrong: {wrong}")


if __name__ == "__main__":
    main()
