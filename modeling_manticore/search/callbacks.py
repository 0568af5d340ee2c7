"""The callback through which the Trainer's loop calls a search strategy, shows the best choice, and reports it."""

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from ..progress import nobody_watches, progress_bar
from .history import points_in
from .search_report import best_choice_of, probability_of, report_of


if TYPE_CHECKING:
    from .trainer import ManticoreTrainer


REPORT_DIR = "report"


class TrainingLines(TrainerCallback):
    """A training's progress as lines with rate, remaining time and the last loss, where nobody watches a terminal."""

    def __init__(self, label: str):
        self.label, self.bar = label, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = progress_bar(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.label,
            unit="step",
            show=state.is_world_process_zero,
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is not None and "loss" in (logs or {}):
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.3f}", refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
        self.bar = None


def plain_without_terminal(trainer: "ManticoreTrainer", label: str) -> None:
    """Lines now and then in place of the Trainer's bars and printed dictionaries, where nobody watches a terminal."""
    if nobody_watches():
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(TrainingLines(label))


class StrategyCallback(TrainerCallback):
    """
    Calls the hooks of `trainer.strategy` around every optimizer step, logs the mixture before the first, shows the
    best choice so far behind the progress bar, and writes the folder `report` into `output_dir` after the last.
    """

    def __init__(self, trainer: "ManticoreTrainer"):
        self.trainer = trainer

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

    def on_log(self, args, state, control, logs=None, **kwargs):
        callbacks, hybrid = self.trainer.callback_handler.callbacks, self.trainer.hybrid
        bars = [c.training_bar for c in callbacks if isinstance(c, ProgressCallback) and c.training_bar is not None]
        weights = points_in(logs or {}, [len(block) for block in hybrid.config.blocks])
        if not bars or weights is None:
            return
        budget = self.trainer.budget
        table = None if budget is None else self.trainer.cost_table()
        choice = best_choice_of(hybrid, weights, table, budget)
        words = f"best {','.join(map(str, choice))} (p {probability_of(weights, choice):.2g})"
        for bar in bars:
            bar.set_postfix_str(words, refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        report = report_of(self.trainer, self.trainer.cost_table())
        self.trainer.search_report = report
        if args.should_save:
            report.save(Path(args.output_dir, REPORT_DIR), state.log_history)
