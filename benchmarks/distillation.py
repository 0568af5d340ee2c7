"""
Half of a Transformer's attention, and nearly its quality? A hybrid learns from labels alone, or from the Transformer.

The teacher is the demo's GPT-NeoX, trained on for `--teacher_steps` so that it is the one good model; the cheaper one
is the demo's Mamba-2 as it is, on the same text, so that no difference of domains plays a part. The hybrid alternates
their layers (three of six with attention), its bridges calibrated in order. Then every arm trains it from there on the
same tokens in the same order: labels alone, the teacher alone (w = 1), and half of each (w = 0.5), at temperature 1,
fixed in advance. The learning rate of every arm is chosen from one grid, on the first seed, by the loss on labels of a
split that is neither trained nor tested on. A seed is another data split, other initial weights and another order, for
the components as well.

Finished parts are kept in `--work`, so the script may be stopped and started again.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

import torch
from _shared import quiet, shown, summary, write
from torch.nn import functional
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from modeling_manticore import (
    ManticoreForCausalLM,
    ManticoreTrainer,
    ManticoreTrainingArguments,
    calibrate,
    cost_table,
)
from modeling_manticore.commands.demo import DemoOptions
from modeling_manticore.commands.demo_components import own_components, pack_domains, read_splits
from modeling_manticore.commands.models import measure
from modeling_manticore.tasks.text import as_dataset, cache_folder, interleave


CHAIN = [[{"component": b % 2, "start": b, "stop": b + 1}] for b in range(6)]
ARMS = {"labels": 0.0, "distilled w=1": 1.0, "distilled w=0.5": 0.5}
RATES = [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]
COMPONENT_STEPS, COMPONENT_RATE, BATCH = 450, 3e-3, 8


def settings(folder: Path, steps: int, rate: float, seed: int) -> dict:
    """Those of the demo, for every training here."""
    return {
        "output_dir": str(folder / "trainer"),
        "per_device_train_batch_size": BATCH,
        "max_steps": steps,
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, steps // 20),
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "logging_steps": max(1, steps // 20),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": seed,
    }


def keep_model(model, folder: Path) -> None:
    """Save a model so that it is there whole or not at all."""
    part = folder.with_name(f".{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    os.replace(part, folder)


def keep(found: dict, file: Path) -> dict:
    """Write a result so that it is there whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found, indent=2) + "\n")
    os.replace(part, file)
    return found


@torch.inference_mode()
def compare(model, teacher, rows: torch.LongTensor) -> dict:
    """Loss on labels (nats), share of places with the teacher's likeliest token, and KL(teacher || model) in nats."""
    model.eval()
    same, loss, kl, count = 0, 0.0, 0.0, 0
    for batch in rows.split(16):
        said, answer = (m(input_ids=batch, use_cache=False).logits[:, :-1].float() for m in (teacher, model))
        same += (said.argmax(-1) == answer.argmax(-1)).sum().item()
        log_p, log_q = said.log_softmax(-1).flatten(0, 1), answer.log_softmax(-1).flatten(0, 1)
        kl += functional.kl_div(log_q, log_p, log_target=True, reduction="sum").item()
        loss += functional.nll_loss(log_q, batch[:, 1:].flatten(), reduction="sum").item()
        count += batch[:, 1:].numel()
    return {"loss": loss / count, "agreement": same / count, "kl": kl / count}


class Seed:
    """The teacher, the cheaper model and the calibrated hybrid of one seed, made once."""

    def __init__(self, seed: int, options, work: Path):
        self.seed, self.steps, self.work = seed, options.steps, work / f"seed{seed}"
        self.work.mkdir(parents=True, exist_ok=True)
        demo = DemoOptions(
            texts=["bible", "bible"], domains=["A", "B"], seed=seed, component_steps=COMPONENT_STEPS, workers=1
        )
        splits = read_splits(demo)
        components, tokenizer = own_components(demo, splits)
        self.rows = pack_domains(splits, tokenizer, demo)[0]
        self.test, self.held_out = self.rows.test[:128], self.rows.search[:128]
        teacher, hybrid = self.work / "teacher", self.work / "hybrid"
        if not teacher.is_dir():
            model = AutoModelForCausalLM.from_pretrained(components[0].folder)
            self._train(Trainer, model, TrainingArguments, options.teacher_steps, COMPONENT_RATE, seed + 1000)
            keep_model(model, teacher)
        self.teacher = AutoModelForCausalLM.from_pretrained(teacher).eval()
        self.cheap = AutoModelForCausalLM.from_pretrained(components[1].folder).eval()
        if not hybrid.is_dir():
            model = ManticoreForCausalLM.from_components([str(teacher), components[1].folder], blocks=CHAIN)
            text = interleave([self.rows.train], 256, seed)
            calibrate(model, text, components=[self.teacher, self.cheap], progress=False)
            keep_model(model, hybrid)
        self.hybrid = hybrid

    def _train(self, kind, model, arguments, steps, rate, seed, own=None, **more) -> float:
        set_seed(seed)
        args = arguments(**settings(self.work, steps, rate, seed), **(own or {}))
        trainer = kind(model=model, args=args, train_dataset=as_dataset(self.rows.train), **more)
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start

    def before(self) -> dict:
        """Figures before any arm has trained."""
        file = self.work / "before.json"
        if file.is_file():
            return json.loads(file.read_text())
        hybrid = AutoModelForCausalLM.from_pretrained(self.hybrid)
        whole = ManticoreForCausalLM.from_components([self.teacher], num_blocks=1)
        costs = {
            name: cost_table(model).of([0] * len(model.config.blocks))
            for name, model in (("teacher", whole), ("hybrid", hybrid))
        }
        models = {"teacher": self.teacher, "cheaper": self.cheap, "hybrid at step 0": hybrid}
        return keep({k: compare(m, self.teacher, self.test) for k, m in models.items()} | {"costs": costs}, file)

    def arm(self, name: str, rate: float) -> dict:
        """Train one arm at one learning rate."""
        file = self.work / f"{name.replace(' ', '_')}-{rate:g}.json"
        if file.is_file():
            return json.loads(file.read_text())
        model = AutoModelForCausalLM.from_pretrained(self.hybrid)
        weight = ARMS[name]
        own = {"stage": "distill", "distill_weight": weight} if weight else {"stage": "finetune"}
        more = {"teacher": self.teacher} if weight else {}
        seconds = self._train(
            ManticoreTrainer, model, ManticoreTrainingArguments, self.steps, rate, self.seed, own, **more
        )
        found = {"held_out_loss": measure(model.eval(), self.held_out)["loss"], "seconds": seconds}
        return keep(found | compare(model, self.teacher, self.test), file)


def main() -> None:
    """Print the table and write `results/distillation.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150, help="of every arm, each 8 rows of 128 tokens")
    parser.add_argument("--teacher_steps", type=int, default=600, help=f"after the demo's {COMPONENT_STEPS}")
    parser.add_argument("--work", default=None, help="folder of finished parts; default in the cache folder")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    work = cache_folder() / "distillation" if options.work is None else Path(options.work)
    work = work / f"steps{options.steps}-teacher{options.teacher_steps}"

    runs, rates = [], {}
    for number in range(options.seeds):
        seed = Seed(number, options, work)
        found = seed.before()
        print(f"seed {number}  before", {k: v for k, v in found.items() if k != "costs"}, flush=True)
        for name in ARMS:
            tried = RATES if number == 0 else [rates[name]]
            results = {rate: seed.arm(name, rate) for rate in tried}
            if number == 0:
                rates[name] = min(results, key=lambda rate: results[rate]["held_out_loss"])
                found["tuning"] = found.get("tuning", {}) | {
                    name: {f"{rate:g}": result["held_out_loss"] for rate, result in results.items()}
                }
            found[name] = results[rates[name]]
            print(f"seed {number}  {name:<16} at {rates[name]:g}", found[name], flush=True)
        runs.append(found)

    report = {"settings": vars(options) | {"work": None}, "tokens": options.steps * BATCH * 128, "rates": rates}
    report |= {
        "chain": "layers 0, 2, 4 of the GPT-NeoX and 1, 3, 5 of the Mamba-2, width 192, vocabulary 4096",
        "temperature": 1.0,
        "rate_grid": RATES,
        "rates_at_an_end_of_the_grid": [name for name, rate in rates.items() if rate in (RATES[0], RATES[-1])],
        "runs": runs,
        "summary": {},
        "paired": {},
    }
    rows = ["teacher", "cheaper", "hybrid at step 0", *ARMS]
    print(f"\n{'':<18}{'loss (nats)':>18}{'agreement':>18}{'KL to teacher':>18}")
    for row in rows:
        columns = {key: [run[row][key] for run in runs] for key in ("loss", "agreement", "kl")}
        report["summary"][row] = {key: summary(values) for key, values in columns.items()}
        print(f"{row:<18}" + "".join(f"{shown(values):>18}" for values in columns.values()))
    print("\npaired differences to labels alone")
    for row in list(ARMS)[1:]:
        gaps = {k: [run[row][k] - run["labels"][k] for run in runs] for k in ("loss", "agreement", "kl")}
        report["paired"][f"{row} - labels"] = {key: summary(values) for key, values in gaps.items()}
        print(f"{row:<18}" + "".join(f"{shown(values):>18}" for values in gaps.values()))
    before, after = (runs[0]["costs"][name]["cache_bytes_per_token"] for name in ("teacher", "hybrid"))
    report["cache_bytes_per_token"] = {"teacher": before, "hybrid": after}
    seconds = {name: summary([run[name]["seconds"] / options.steps for run in runs]) for name in ARMS}
    report["seconds_per_step"] = seconds
    print(f"\nkey-value bytes per token: teacher {before:,}, hybrid {after:,}")
    write("distillation", report)


if __name__ == "__main__":
    main()
