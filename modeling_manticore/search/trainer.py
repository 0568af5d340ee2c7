"""The HF Trainer for hybrids: stages, search strategies, mixture weights in the logs, checkpoints that are whole."""

import json
import os
import shutil
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from .arguments import ManticoreTrainingArguments
from .history import mixture_logs, plot_mixtures
from .stages import frozen_for, mixture_parameters
from .strategy import make_strategy


STAGING_DIR = ".incomplete-checkpoint"
STRATEGY_STATE_NAME = "strategy_state.json"
PLOT_NAME = "mixture_weights.png"


class ManticoreTrainer(Trainer):
    """
    Trains a hybrid in one of three stages (`ManticoreTrainingArguments.stage`).

    Checkpoints are written to a staging folder and renamed when complete, so that a killed run leaves only whole ones
    and `train(resume_from_checkpoint=True)` continues as if never interrupted. In stage "search" weights and entropy
    of every block are in the logs and, at the end, in `mixture_weights.png`. Which parameters train is set for the
    duration of `train` only.

    Raises:
        ValueError: stage "search" for a hybrid with nothing to search, or a strategy that does not fit it.
    """

    def __init__(self, model=None, args: ManticoreTrainingArguments | None = None, **kwargs):
        if args is None:
            args = ManticoreTrainingArguments(output_dir="manticore_trainer")
        self.strategy = make_strategy(args.strategy) if args.stage == "search" else None
        if model is not None and self.strategy is not None:
            hybrid = _hybrid(model)
            if all(len(block) == 1 for block in hybrid.config.blocks):
                raise ValueError(
                    "stage: got 'search', but every block of this hybrid has one path; allowed is 'finetune'."
                )
            self.strategy.check(hybrid)
        super().__init__(model=model, args=args, **kwargs)
        if self.label_smoother is not None and _hybrid(self.model).can_generate():
            self.label_smoother = ShiftedLabelSmoother(epsilon=args.label_smoothing_factor)
        if self.strategy is not None:
            self.add_callback(_StrategyCallback(self))

    def train(self, *args, **kwargs):
        """As in transformers; freezes what the stage does not train while it runs."""
        if self.args.should_save:
            shutil.rmtree(Path(self.args.output_dir, STAGING_DIR), ignore_errors=True)
        with frozen_for(self.model, self.args.stage, self.args.train_components):
            result = super().train(*args, **kwargs)
        if self.strategy is not None and self.args.should_save:
            plot_mixtures(self.state.log_history, Path(self.args.output_dir, PLOT_NAME), _path_names(self.model))
        return result

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As in transformers, with mixture weights and learned gates in a group of their own."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model) if model is not None else super().create_optimizer()
        if not fresh:
            return optimizer
        own = {id(p): p for p in mixture_parameters(self.model) if p.requires_grad}
        if own:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in own]
            kept = list(own.values())
            if self.strategy is not None:
                kept = self.strategy.optimizer_parameters(kept)
            if kept:
                group = {"params": kept, "lr": self.args.mixture_learning_rate, "weight_decay": 0.0}
                optimizer.add_param_group(group)
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in transformers; in stage "search" with the mixture weights."""
        if self.strategy is not None:
            logs |= mixture_logs(_hybrid(self.model))
        super().log(logs, start_time)

    def _get_output_dir(self, trial) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, STAGING_DIR) if getattr(self, "_staging", False) else run_dir

    def _save_checkpoint(self, model, trial) -> None:
        run_dir = self._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged, final = Path(run_dir, STAGING_DIR, name), Path(run_dir, name)
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        if self.args.should_save:
            best = self.state.best_global_step
            if best and (best == self.state.global_step or Path(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{best}").exists()):
                self.state.best_model_checkpoint = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{best}")
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
            if self.strategy is not None:
                (staged / STRATEGY_STATE_NAME).write_text(json.dumps(self.strategy.state_dict(), indent=2) + "\n")
            if final.exists():
                shutil.rmtree(final)
            os.replace(staged, final)
            shutil.rmtree(staged.parent)
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self._reads_own_checkpoints():
            _reload(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._reads_own_checkpoints():
            _reload(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _reads_own_checkpoints(self) -> bool:
        """Whether the whole hybrid is in this process: no adapter, no sharding by FSDP or DeepSpeed."""
        return hasattr(self.model, "trunk") and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.strategy is not None:
            file = Path(checkpoint, STRATEGY_STATE_NAME)
            if file.is_file():
                self.strategy.load_state_dict(json.loads(file.read_text()))


class ShiftedLabelSmoother(LabelSmoother):
    """Label smoothing for a causal model; the Trainer shifts labels only for classes of its own library."""

    def __call__(self, model_output, labels, shift_labels: bool = True, **kwargs):
        return super().__call__(model_output, labels, shift_labels=True, **kwargs)


class _StrategyCallback(TrainerCallback):
    def __init__(self, trainer: ManticoreTrainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.strategy.before_step(_hybrid(self.trainer.model), state.global_step, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.strategy.after_step(_hybrid(self.trainer.model), state.global_step, state.max_steps)


def _reload(model, checkpoint: str) -> None:
    """Read weights as `from_pretrained` does: on disk some families' tensors have the names of their first release."""
    model.load_state_dict(type(model).from_pretrained(checkpoint, dtype=model.dtype).state_dict())


def _hybrid(model):
    """The hybrid inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _path_names(model) -> list[list[str]]:
    config = _hybrid(model).config
    types = [component.model_type for component in config.components]
    return [[f"{types[p['component']]} {p['start']}:{p['stop']}" for p in block] for block in config.blocks]
