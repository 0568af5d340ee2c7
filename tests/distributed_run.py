"""Trains a hybrid as one of the processes of `accelerate launch`; a child of tests/test_ecosystem_distributed.py.

distributed_run.py MODEL OUTPUT BATCH_OF_ONE_PROCESS [--stock] [--fsdp] [--resume] [trainer_argument=JSON ...]
`teacher=JSON` is the Trainer's teacher.
"""

import json
import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from tiny import tokens
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from modeling_manticore import ManticoreTrainer, ManticoreTrainingArguments


ROWS = [{"input_ids": row, "labels": row} for row in tokens(24, 10, seed=3)]
SEARCH = [{"input_ids": row, "labels": row} for row in tokens(14, 10, seed=4)]


def take_cpu_processes_for_devices() -> None:
    """accelerate 1.15 shards processes on accelerators only; those on CPU are DDP whatever its FSDP settings say."""
    plain = PartialState.__init__

    def init(self, cpu: bool = False, **kwargs) -> None:
        plain(self, cpu, **kwargs)
        if self.distributed_type is DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def main() -> None:
    folder, output, batch, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    if "--fsdp" in rest:
        take_cpu_processes_for_devices()
    stock = "--stock" in rest
    options = {"max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    options |= {"disable_tqdm": True, "use_cpu": True, "max_grad_norm": 1.0, "output_dir": output}
    options |= {"per_device_train_batch_size": int(batch), "lr_scheduler_type": "constant"}
    options |= {key: json.loads(value) for key, value in (word.split("=", 1) for word in rest if "=" in word)}
    teacher = options.pop("teacher", None)
    arguments = TrainingArguments(**options) if stock else ManticoreTrainingArguments(**options)
    model = AutoModelForCausalLM.from_pretrained(folder)
    data = {"train_dataset": ROWS} | ({} if teacher is None else {"teacher": teacher})
    if options.get("strategy") == "darts" or options.get("gaea_base") == "darts":
        data["search_dataset"] = SEARCH
    trainer = (Trainer if stock else ManticoreTrainer)(model=model, args=arguments, **data)
    trainer.train(resume_from_checkpoint="--resume" in rest or None)
    wrapped = type(trainer.model_wrapped).__name__
    trainer.save_model()
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=tokens()).logits
    if trainer.is_world_process_zero():
        torch.save({"logits": logits, "log": trainer.state.log_history, "wrapped": wrapped}, f"{output}/seen.pt")


if __name__ == "__main__":
    main()
