"""The callback through which the Trainer's loop calls a search strategy, and which draws the course of the mixture."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback
from transformers.utils import logging

from .history import path_names, plot_mixtures


if TYPE_CHECKING:
    from .trainer import ManticoreTrainer


logger = logging.get_logger(__name__)

PLOT_NAME = "mixture_weights.png"


class StrategyCallback(TrainerCallback):
    """
    Calls the hooks of `trainer.strategy` around every optimizer step, logs the mixture before the first, and writes
    `mixture_weights.png` into `output_dir` after the last.
    """

    def __init__(self, trainer: "ManticoreTrainer"):
        self.trainer = trainer
        self.can_draw = importlib.util.find_spec("matplotlib") is not None
        if not self.can_draw:
            logger.warning(f"matplotlib is not installed: {PLOT_NAME} will not be drawn.")

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.strategy.begin(self.trainer)
        if state.global_step == 0:
            self.trainer.log({})

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.strategy.before_step(self.trainer)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.strategy.before_update(self.trainer)

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.strategy.after_step(self.trainer)

    def on_train_end(self, args, state, control, **kwargs):
        if self.can_draw and args.should_save:
            plot_mixtures(state.log_history, Path(args.output_dir, PLOT_NAME), path_names(self.trainer.hybrid))
