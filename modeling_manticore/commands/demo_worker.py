"""One training job of the demo in a process of its own: python -m modeling_manticore.commands.demo_worker JOB.json"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from .. import ManticoreTrainer, ManticoreTrainingArguments
from ..tasks.text import as_dataset
from .demo_jobs import PROGRESS


class ProgressLines(TrainerCallback):
    """Tells the parent process about every step, as lines of JSON on standard output."""

    def on_step_end(self, args, state, control, **kwargs):
        print(PROGRESS + json.dumps({"step": state.global_step}), flush=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            print(PROGRESS + json.dumps({"loss": float(logs["loss"])}), flush=True)


def work(job: dict) -> None:
    """
    Train the model of `job["model"]` on the rows of `job["rows"]` and write `job["output"]`: the model, `history.json`
    (the log), `result.json` (seconds), and, where `job["probe"]` gives rows, their logits before saving.
    """
    torch.set_num_threads(job["threads"])
    set_seed(job["seed"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    rows = load_file(job["rows"])["rows"]
    hybrid = model.config.model_type == "manticore"
    settings = {
        "output_dir": job["output"],
        "per_device_train_batch_size": job["batch_size"],
        "max_steps": job["steps"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, job["steps"] // 20),
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "logging_steps": max(1, job["steps"] // 30),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": job["seed"],
    }
    if hybrid:
        args = ManticoreTrainingArguments(stage=job["stage"], **settings, **job["search_options"])
    else:
        args = TrainingArguments(**settings)
    trainer = (ManticoreTrainer if hybrid else Trainer)(
        model=model, args=args, train_dataset=as_dataset(rows), callbacks=[ProgressLines()]
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    output = Path(job["output"])
    if job["probe"] is not None:
        model.eval()
        with torch.inference_mode():
            logits = model.cpu()(input_ids=load_file(job["probe"])["rows"], use_cache=False).logits
        save_file({"logits": logits.contiguous()}, output / "probe.safetensors")
    model.save_pretrained(output)
    (output / "history.json").write_text(json.dumps(trainer.state.log_history, indent=2) + "\n")
    (output / "result.json").write_text(json.dumps({"seconds": seconds}) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    work(json.loads(Path(sys.argv[1]).read_text()))
