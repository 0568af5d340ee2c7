"""One search run, for test_resume: FOLDER [--kill-at STEP | --kill-inside STEP] [--resume]."""

import argparse
import os
import signal

import torch
import transformers
from datasets import Dataset
from tiny import FAMILIES, tokens

from modeling_manticore import (
    ManticoreConfig,
    ManticoreForCausalLM,
    ManticoreTrainer,
    ManticoreTrainingArguments,
)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Killer(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            die()


parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("--kill-at", type=int, default=-1)
parser.add_argument("--kill-inside", type=int, default=-1)
parser.add_argument("--resume", action="store_true")
options = parser.parse_args()

torch.set_num_threads(1)
torch.manual_seed(0)
parts = [FAMILIES["gpt_neox"](), FAMILIES["mamba2"]()]
parts[0].hidden_dropout = 0.1
model = ManticoreForCausalLM(ManticoreConfig.from_partition(parts, 2, mixture="gumbel_softmax"))
rows = tokens(64, 16).tolist()
data = Dataset.from_dict({"input_ids": rows, "labels": rows})
arguments = ManticoreTrainingArguments(
    output_dir=options.folder,
    stage="search",
    max_steps=10,
    save_steps=2,
    save_total_limit=2,
    logging_steps=1,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=1e-3,
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
)
trainer = ManticoreTrainer(model=model, args=arguments, train_dataset=data, callbacks=[Killer(options.kill_at)])
if options.kill_inside >= 0:
    save = trainer._save_optimizer_and_scheduler

    def killed_save(output_dir):
        if trainer.state.global_step == options.kill_inside:
            die()
        save(output_dir)

    trainer._save_optimizer_and_scheduler = killed_save
trainer.train(resume_from_checkpoint=options.resume)
model.save_pretrained(os.path.join(options.folder, "final"))
