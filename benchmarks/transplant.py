"""
Transplanted vocabularies: two components with tokenizers of their own (a GPT-NeoX on the Bible, a Llama on Python
source) joined under the tokenizer of one of them. Bits per byte on held-out Python source after transplanting and
calibration on C tokens of such text, without any gradient, against the transplanted component with fresh embeddings
and head trained alone on 10 C tokens (those alone, or the whole); targets of calibration on the component's own tokens
against targets on the transplanted ids. What is done is kept in the work folder, part by part.
"""

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable
from functools import partial
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
TARGETS = ("own", "transplanted")
PARTS = ("hybrids", "trunk", "whole")


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
        count = options.calibration_tokens // options.length
        self.calibration = {
            d: [t.decode(r) for r in self.rows["python", d][:count]] for d, t in self.tokenizers.items()
        }

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

    def hybrids(self, seed: int, speaker: str, work: Path) -> dict:
        """Bits per byte of everything made without a gradient, under the tokenizer of one component."""
        pair = [self.component(domain, seed, work) for domain in DOMAINS]
        tokenizers = [self.tokenizers[domain] for domain in DOMAINS]
        s = DOMAINS.index(speaker)
        o, held_out = 1 - s, (self.held_out[speaker], self.lengths[speaker])
        native = self.held_out[DOMAINS[o]], self.lengths[DOMAINS[o]]
        result: dict = {
            f"{DOMAINS[o]}, own tokenizer": bits_per_byte(pair[o], *native),
            f"{speaker}, own tokenizer": bits_per_byte(pair[s], *held_out),
        }
        for places in ([(o, 0, 4)], [(s, 0, 2), (o, 2, 4)], [(o, 0, 2), (s, 2, 4)], [(s, 0, 1), (o, 1, 3), (s, 3, 4)]):
            name = "-".join(DOMAINS[k] for k, _, _ in places)
            blocks = [[{"component": k, "start": start, "stop": stop}] for k, start, stop in places]
            options = {"blocks": blocks, "tokenizers": tokenizers, "tokenizer_from": s}
            own = any(k == o for k, _, _ in places[1:])  # else no bridge leads into the transplanted component
            for targets in TARGETS if own else TARGETS[1:]:
                model = ManticoreForCausalLM.from_components(pair, **options)
                if len(blocks) > 1:
                    known = {"components": pair, "tokenizers": tokenizers, "targets": targets, "progress": False}
                    report = calibrate(model, self.calibration[speaker], tokenizers[s], **known)
                    result.setdefault("matched", report.matched.get(o))
                label = f"{name}, {targets} targets" if own else name
                result[label] = bits_per_byte(model, *held_out)
        result["rows"] = model.transplant_report.components[o].counts
        return result

    def fresh(self, seed: int, speaker: str, work: Path, whole: bool) -> dict:
        """Bits per byte of the other component with an untrained vocabulary, trained alone on 10 C tokens."""
        options, other = self.options, DOMAINS[1 - DOMAINS.index(speaker)]
        name = f"{other}, fresh vocabulary, {'whole' if whole else 'frozen trunk'}"
        model = with_fresh_vocabulary(self.component(other, seed, work), seed)
        matrices = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
        for p in model.parameters():
            p.requires_grad_(whole or any(p is matrix for matrix in matrices))
        budget = 10 * options.calibration_tokens
        rows = self.rows["python", speaker][: budget // options.length]
        train(model, rows, budget, options, f"{name}, seed {seed}", seed)
        return {name: bits_per_byte(model, self.held_out[speaker], self.lengths[speaker])}

    def part(self, name: str, seed: int, speaker: str, work: Path) -> dict:
        """One of `PARTS`."""
        if name == "hybrids":
            return self.hybrids(seed, speaker, work)
        return self.fresh(seed, speaker, work, whole=name == "whole")


def kept(file: Path, make: Callable[[], dict]) -> dict:
    """What the file holds; made and written first where there is none."""
    if not file.is_file():
        found = make()
        file.with_suffix(".new").write_text(json.dumps(found))
        os.replace(file.with_suffix(".new"), file)
    return json.loads(file.read_text())


def table(speaker: str, runs: list[dict]) -> dict:
    """Print and return the figures under one component's tokenizer."""
    numbers = [key for key, value in runs[0].items() if isinstance(value, float) and key != "matched"]
    bases = [key for key in numbers if "fresh vocabulary" in key]
    print(f"tokenizer of {speaker}: bits per byte on held-out Python source, {len(runs)} seeds")
    print(f"  rows {runs[0]['rows']}, tokens matched {runs[0]['matched']:.1%}")
    width = max(map(len, numbers))
    print(f"  {'':{width}s} bits per byte, and as multiple of: " + "; ".join(bases))
    result = {}
    for key in numbers:
        ratios = {base: [run[key] / run[base] for run in runs] for base in bases}
        shares = "" if key in bases else "  ".join(f"{shown(ratio):>16s}" for ratio in ratios.values())
        print(f"  {key:{width}s} {shown([run[key] for run in runs]):>16s}  {shares}")
        result[key] = {"bits_per_byte": summary([run[key] for run in runs])} | {
            f"as multiple of {base}": summary(ratio) for base, ratio in ratios.items()
        }
    return {"figures": result, "rows": [r["rows"] for r in runs], "matched": [r["matched"] for r in runs]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokenizers", nargs="+", default=list(DOMAINS), choices=DOMAINS, help="whose, one by one")
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
    bench: list[Bench] = []

    def measure(part: str, seed: int, speaker: str) -> dict:
        if not bench:
            bench.append(Bench(options))
        return bench[0].part(part, seed, speaker, work)

    results = {}
    for speaker in options.tokenizers:
        runs = []
        for seed in options.seeds:
            run = {}
            for part in PARTS:
                file = work / f"{part}-{speaker}-{seed}.json"
                run |= kept(file, partial(measure, part, seed, speaker))
            runs.append(run)
        results[speaker] = table(speaker, runs)
    write("transplant", {"calibration_tokens": options.calibration_tokens, "tokenizer_of": results})


if __name__ == "__main__":
    main()
