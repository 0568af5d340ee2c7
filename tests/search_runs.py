"""What the tests of the gradient strategies share: a tiny supernet, rows, a run in a process of its own."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import torch
from transformers import GPTNeoXConfig, Mamba2Config, TrainerCallback

from modeling_manticore import ManticoreConfig, ManticoreForCausalLM, ManticoreTrainer, ManticoreTrainingArguments


STEPS, VOCABULARY, LENGTH = 10, 48, 12
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["modeling_manticore.search", "transformers.models.gpt_neox.modeling_gpt_neox"])

# Name of a variant: (mixture, arguments)
VARIANTS = {
    "darts": ("softmax", {"strategy": "darts"}),
    "gaea_joint": ("simplex", {"strategy": "gaea", "mixture_learning_rate": 0.5}),
    "gaea_darts": ("simplex", {"strategy": "gaea", "gaea_base": "darts", "mixture_learning_rate": 0.5}),
    "dash": ("gumbel_softmax", {"strategy": "dash", "temperature_start": 2.0, "temperature_end": 0.2}),
}


def supernet(mixture: str, dropout: float = 0.0, blocks: int = 2, **options) -> ManticoreForCausalLM:
    """A supernet of two families, the same for the same arguments."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.2}
    neox = GPTNeoXConfig(**sizes, num_attention_heads=2, intermediate_size=32, hidden_dropout=dropout)
    mamba = Mamba2Config(**sizes, num_heads=4, head_dim=8, state_size=4, n_groups=1, chunk_size=8, expand=2)
    torch.manual_seed(0)
    return ManticoreForCausalLM(ManticoreConfig.from_partition([neox, mamba], blocks, mixture=mixture, **options))


def rows(count: int, seed: int) -> list[dict]:
    """Random rows; every third has labels on its second half only, so that rows weigh differently."""
    ids = torch.randint(0, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[::3, : LENGTH // 2] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels)]


def arguments(folder: Path, **options) -> ManticoreTrainingArguments:
    """Quiet arguments of a short search."""
    plain = {"stage": "search", "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    plain |= {"mixture_learning_rate": 0.05, "logging_steps": 1, "save_strategy": "no", "report_to": []}
    return ManticoreTrainingArguments(
        output_dir=str(folder), **(plain | {"disable_tqdm": True, "use_cpu": True} | options)
    )


def trainer_of(variant: str, folder: Path, callbacks=(), dropout: float = 0.0, **options) -> ManticoreTrainer:
    """A trainer of a variant, with rows for every split it wants."""
    mixture, own = VARIANTS[variant]
    search = {"search_dataset": rows(7, 5)} if "darts" in variant else {}
    args = arguments(folder, **(own | options))
    model = supernet(mixture, dropout)
    return ManticoreTrainer(model, args, None, rows(24, 1), rows(4, 2), callbacks=list(callbacks), **search)


class KillAtStep(TrainerCallback):
    """SIGKILL to this very process, before a step's gradients or after them."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.step % 2:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(variant: str, folder: Path, kill_step: int | None, resume: bool) -> None:
    """One process: train, and write the final weights, the logs and the strategy's state."""
    torch.set_num_threads(1)
    callbacks = [] if kill_step is None else [KillAtStep(kill_step)]
    options = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps"}
    options |= {"eval_steps": 3, "save_total_limit": 2}
    trainer = trainer_of(variant, folder, callbacks, dropout=0.2, **options)
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model(str(folder / "final"))
    (folder / "final" / "history.json").write_text(json.dumps(trainer.state.log_history))


def finish(variant: str, folder: Path, kill_step: int | None = None, resume: bool = False) -> int:
    """Exit code of a run in a process of its own."""
    process = PROCESSES.Process(target=run, args=(variant, folder, kill_step, resume))
    process.start()
    process.join(120)
    return process.exitcode
