"""
Transplanted vocabularies: two components with tokenizers of their own (a GPT-NeoX on the Bible, a Llama on Python
source), joined under the first one's. Bits per byte on held-out Python source after transplanting and calibration on C
tokens, without any gradient, against the Llama with fresh embeddings and head trained alone on 10 C tokens; targets of
calibration on the component's own tokens against targets on the transplanted ids. What is done is kept in the work
folder, seed by seed.
"""

import argparse
import json
import math
import os
import random
import time
from pathlib import Path

import torch
from _shared import quiet, shown, summary, write
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from modeling_manticore import ManticoreForCausalLM, calibrate
from modeling_manticore.building.vocabulary import Vocabulary
from modeling_manticore.tasks.text import cache_folder, corpus, pack, split, train_tokenizer


DOMAINS = ("bible", "python")
HYBRIDS = {  # of the Bible's GPT-NeoX (0) and the Python Llama (1), both of four layers
    "python": [(1, 0, 4)],
    "bible-python": [(0, 0, 2), (1, 2, 4)],
    "python-bible": [(1, 0, 2), (0, 2, 4)],
    "bible-python-bible": [(0, 0, 1), (1, 1, 3), (0, 3, 4)],
}
TARGETS = ("own", "transplanted")


def configuration(domain: str, options: argparse.Namespace):
    shape = {
        "vocab_size": options.vocabulary,
        "hidden_size": options.width,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 4 * options.width,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GPTNeoXConfig(**shape) if domain == "bible" else LlamaConfig(**shape)


def train(model, rows: torch.LongTensor, tokens: int, options: argparse.Namespace, label: str, seed: int) -> float:
    """Train what requires a gradient on so many tokens of the rows, in place. Returns CPU seconds."""
    started = time.process_time()
    generator = torch.Generator().manual_seed(seed)
    steps = max(1, tokens // (options.batch_size * options.length))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in tqdm(range(steps), desc=label, leave=False, mininterval=20):
        batch = rows[torch.randint(0, len(rows), (options.batch_size,), generator=generator)]
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return time.process_time() - started


@torch.inference_mode()
def bits_per_byte(model, rows: torch.LongTensor, lengths: torch.Tensor) -> float:
    """Bits of all predicted tokens over the bytes they stand for; `lengths` are the bytes of every token."""
    bits = count = 0.0
    for batch in rows.split(16):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        bits += loss.item() / math.log(2)
        count += lengths[batch[:, 1:]].sum().item()
    return bits / count


def with_fresh_vocabulary(model, seed: int):
    """A copy of a component with untrained embeddings and head of the same size."""
    torch.manual_seed(seed)
    fresh = AutoModelForCausalLM.from_config(model.config)
    own = {n: t for n, t in model.state_dict().items() if t.shape[:1] != (model.config.vocab_size,)}
    fresh.load_state_dict(own, strict=False)
    return fresh


class Bench:
    """Texts and tokenizers, the same for all seeds."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.splits = {}
        for domain in DOMAINS:
            documents = corpus(domain, options.cache_folder)
            random.Random(0).shuffle(documents)
            while sum(map(len, documents)) > options.characters:
                documents.pop()
            self.splits[domain] = split(documents, seed=0)
        self.tokenizers = {d: train_tokenizer(s.train, options.vocabulary) for d, s in self.splits.items()}
        self.rows = {
            (domain, speaker): pack(self.tokenizers[speaker], self.splits[domain].train, options.length)
            for domain, speaker in (("bible", "bible"), ("python", "python"), ("python", "bible"))
        }
        self.held_out = {d: pack(t, self.splits["python"].test, options.length) for d, t in self.tokenizers.items()}
        self.held_out = {d: rows[: options.held_out_rows] for d, rows in self.held_out.items()}
        self.lengths = {
            d: torch.tensor([len(content or b"") for content in Vocabulary(t).contents])
            for d, t in self.tokenizers.items()
        }
        decode = self.tokenizers["bible"].decode
        chosen = self.rows["python", "bible"][: options.calibration_tokens // options.length]
        self.calibration = [decode(row) for row in chosen]

    def component(self, domain: str, seed: int, work: Path):
        """A component trained on its domain with its own tokenizer; kept in the work folder."""
        folder = work / f"{domain}-{seed}"
        if not folder.is_dir():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(configuration(domain, self.options))
            tokens = self.options.component_tokens
            train(model, self.rows[domain, domain], tokens, self.options, f"{domain} {seed}", seed)
            model.save_pretrained(folder.with_suffix(".new"))
            os.replace(folder.with_suffix(".new"), folder)
        return AutoModelForCausalLM.from_pretrained(folder).eval()

    def measure(self, seed: int, work: Path) -> dict:
        """All figures of one seed."""
        options = self.options
        pair = [self.component(domain, seed, work) for domain in DOMAINS]
        speakers = [self.tokenizers[domain] for domain in DOMAINS]
        held_out = self.held_out["bible"], self.lengths["bible"]
        result: dict = {"own tokenizer": bits_per_byte(pair[1], self.held_out["python"], self.lengths["python"])}
        result["other component"] = bits_per_byte(pair[0], *held_out)
        for name, paths in HYBRIDS.items():
            blocks = [[{"component": k, "start": start, "stop": stop}] for k, start, stop in paths]
            for targets in TARGETS if len(blocks) > 1 else TARGETS[:1]:
                model = ManticoreForCausalLM.from_components(pair, blocks=blocks, tokenizers=speakers)
                counts = model.transplant_report.components[1].counts
                if len(blocks) > 1:
                    report = calibrate(
                        model,
                        self.calibration,
                        speakers[0],
                        components=pair,
                        tokenizers=speakers,
                        targets=targets,
                        progress=False,
                    )
                    result.setdefault("matched", {})[name] = report.matched.get(1, result.get("matched", {}).get(name))
                label = name if len(blocks) == 1 else f"{name}, {targets} targets"
                result[label] = bits_per_byte(model, *held_out)
        result["rows"] = counts
        for kind in ("frozen trunk", "whole"):
            fresh = with_fresh_vocabulary(pair[1], seed)
            matrices = [fresh.get_input_embeddings().weight, fresh.get_output_embeddings().weight]
            for p in fresh.parameters():
                p.requires_grad_(kind == "whole" or any(p is matrix for matrix in matrices))
            budget = 10 * options.calibration_tokens
            rows = self.rows["python", "bible"][: budget // options.length]
            train(fresh, rows, budget, options, f"fresh, {kind} {seed}", seed)
            result[f"fresh, {kind}"] = bits_per_byte(fresh, *held_out)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--characters", type=int, default=4_000_000, help="of each domain")
    parser.add_argument("--component-tokens", type=int, default=600_000)
    parser.add_argument("--calibration-tokens", type=int, default=32_768, help="C")
    parser.add_argument("--held-out-rows", type=int, default=200)
    parser.add_argument("--cache-folder")
    parser.add_argument("--work-folder", help="default: in the cache folder")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    work = Path(options.work_folder or cache_folder(options.cache_folder) / "benchmarks" / "transplant")
    work.mkdir(parents=True, exist_ok=True)
    bench, runs = None, []
    for seed in options.seeds:
        kept = work / f"result-{seed}.json"
        if not kept.is_file():
            bench = Bench(options) if bench is None else bench
            found = bench.measure(seed, work)
            kept.with_suffix(".new").write_text(json.dumps(found))
            os.replace(kept.with_suffix(".new"), kept)
        runs.append(json.loads(kept.read_text()))
    figures = [key for key, value in runs[0].items() if isinstance(value, float)]
    results = {key: summary([run[key] for run in runs]) for key in figures}
    print(f"bits per byte on held-out Python source, {len(runs)} seeds:")
    for key in figures:
        print(f"  {key:44s} {shown([run[key] for run in runs])}")
    ratios = {}
    for key in figures[2:-2]:
        for base in figures[-2:]:
            ratios[f"{key} / {base}"] = summary([run[key] / run[base] for run in runs])
            print(f"  {key} / {base}: {shown([run[key] / run[base] for run in runs])}")
    print(f"  rows {runs[0]['rows']}, matched {runs[0]['matched']}")
    write(
        "transplant",
        {
            "calibration_tokens": options.calibration_tokens,
            "bits_per_byte": results,
            "ratios": ratios,
            "rows": [run["rows"] for run in runs],
            "matched": [run["matched"] for run in runs],
        },
    )


if __name__ == "__main__":
    main()
