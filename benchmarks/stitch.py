"""
Seconds of a training-free search: per candidate, against the plain evaluation of the hybrid on the same text, and
against making that hybrid first. Components are untrained (the time does not depend on their weights).
"""

import argparse
import time

import torch
from _shared import quiet, shown, summary, write
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, GPTNeoXConfig, Mamba2Config

from modeling_manticore import ManticoreForCausalLM, discretize, stitch
from modeling_manticore.building.texts import batches_of
from modeling_manticore.search.slices import held_out_loss


def components(vocabulary: int) -> list:
    """A GPT-NeoX and a Mamba-2 of six layers, width 192."""
    attention = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=768,
        max_position_embeddings=512,
    )
    state = Mamba2Config(
        vocab_size=vocabulary,
        hidden_size=192,
        num_hidden_layers=6,
        num_heads=12,
        head_dim=32,
        n_groups=1,
        state_size=32,
    )
    torch.manual_seed(0)
    return [AutoModelForCausalLM.from_config(config).eval() for config in (attention, state)]


def once(blocks: int, options: argparse.Namespace, seed: int) -> dict:
    """Seconds of one search with so many blocks, and of four of its hybrids by the plain way."""
    model = ManticoreForCausalLM.from_components(components(options.vocabulary), num_blocks=blocks)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, options.vocabulary, (options.rows * 2, options.length), generator=generator)
    calibration, scored = rows.split(options.rows)
    batches = batches_of(scored, model)
    plain, made, worst = [], [], 0.0
    report = stitch(model, calibration, scored, progress=False)
    for candidate in report.candidates[:: max(1, len(report.candidates) // 4)]:
        started = time.perf_counter()
        hybrid = discretize(model, candidate.choice, calibration=calibration, order="parallel", progress=False)
        made.append(time.perf_counter() - started)
        started = time.perf_counter()
        worst = max(worst, abs(held_out_loss(hybrid, batches) - candidate.loss))
        plain.append(time.perf_counter() - started)
    count = len(report.candidates)
    return {
        "hybrids": count,
        "calibration": report.seconds["calibration"],
        "scoring_per_hybrid": report.seconds["scoring"] / count,
        "evaluation_of_a_hybrid": sum(plain) / len(plain),
        "making_a_hybrid": sum(made) / len(made),
        "largest_difference_of_loss": worst,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[3, 6])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    quiet()
    results = {}
    for blocks in options.blocks:
        runs = [once(blocks, options, seed) for seed in tqdm(range(options.repeats), desc=f"{blocks} blocks")]
        results[str(blocks)] = {key: summary([run[key] for run in runs]) for key in runs[0]}
        results[str(blocks)]["hybrids"] = runs[0]["hybrids"]
        print(f"{blocks} blocks, {runs[0]['hybrids']} hybrids, seconds:")
        for key in runs[0]:
            if key != "hybrids":
                print(f"  {key.replace('_', ' '):28s} {shown([run[key] for run in runs])}")
    write("stitch", {"rows": options.rows, "length": options.length, "blocks": results})


if __name__ == "__main__":
    main()
