"""The HF Trainer for hybrids: stages, search strategies, mixture weights in the logs, checkpoints that are whole."""

import functools
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, TrainOutput, sort_checkpoints
from transformers.utils.hub import hf_api

from ..building.costs import Budget, CostTable, cost_table, expected_cost, largest
from ..building.discretize import usable_paths
from ..building.limits import check_feasible
from .adapters import check_adapters
from .arguments import ManticoreTrainingArguments, check_datasets
from .callbacks import StrategyCallback
from .distill import Distiller, check_distillation
from .history import mixture_logs
from .search_data import check_disjoint_rows, check_search_dataset, is_same_split
from .search_report import Effort, tokens_in
from .stages import check_stage, frozen_for, mixture_parameters, unwrap
from .strategy import (
    STRATEGY_STATE_NAME,
    SearchStrategy,
    check_search_state,
    make_strategy,
    read_search_state,
    write_search_state,
)


STAGING_DIR = "_incomplete-checkpoint"  # the underscore keeps it out of every push
LOCAL_FILES = ["*.pt", "*.pth", "*.bin", TRAINER_STATE_NAME, STRATEGY_STATE_NAME]


class ManticoreTrainer(Trainer):
    """
    Trains a hybrid in one of four stages (`ManticoreTrainingArguments.stage`; `search/stages.py` says what each
    trains). Arguments are those of `transformers.Trainer`, and

        search_dataset   rows on which mixture weights learn, for the strategies that want a split of their own
                         ("darts", and "gaea" with gaea_base="darts"). Neither training nor evaluation data: what is
                         the same object is refused, here and in `evaluate`; rows that are also in one of the two are
                         counted and warned of, and refused when they are more than half.
        budget           hard limits (`Budget`) of the choice that stage "search" reports and shows. They do not bend
                         the search (`cost_weight` does); limits that no choice meets are refused.
        teacher          what the hybrid learns from in stage "distill", or in another one with `distill_weight` or
                         `hidden_weight`: a causal language model of the same vocabulary or where to load it, a list of
                         such (their uniform ensemble), the index of a component, "components" (all of them), or the
                         folder of `cache_teacher`. It is never changed and never saved.

    - Mixture weights and learned gates step with `mixture_learning_rate` and no weight decay. (An optimizer given
      through `optimizers` is used as it is.)
    - In stage "search" the weights and entropy of every block are in the logs from step 0 on, the best choice stands
      behind the progress bar, and when training ends `search_report` (a `SearchReport`) and the folder `report` in
      `output_dir` say what was found.
    - Checkpoints are written to a staging folder and renamed when complete, and renamed before they are deleted, so a
      run killed at any time leaves only whole ones; `train(resume_from_checkpoint=True)` continues from the last as if
      never interrupted. What a kill left in the staging folder goes at the next start.
    - Stages freeze parameters during `train` only; all `requires_grad` flags are restored when it ends.
    - Trainer files that are pickles (optimizer, scheduler, RNG, arguments) exist in checkpoints only; they are not
      pushed and not written by `save_model`.

    Raises:
        ValueError: arguments, model or data that do not fit together, before anything is written or trained.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset=None,
        eval_dataset=None,
        *,
        search_dataset=None,
        budget: Budget | None = None,
        teacher=None,
        **kwargs,
    ):
        args = ManticoreTrainingArguments(output_dir="manticore_trainer") if args is None else args
        if not isinstance(args, ManticoreTrainingArguments):
            raise ValueError(f"args: got {type(args).__name__}, allowed is ManticoreTrainingArguments.")
        self.strategy: SearchStrategy | None = make_strategy(args) if args.stage == "search" else None
        self._staging, self._cost_table, self.search_dataset = False, None, search_dataset
        self.budget, self.effort, self.search_report = _checked_budget(budget, args), Effort(), None
        self._teacher, self.distiller = teacher, None
        check_distillation(args, teacher)
        check_datasets(args, train_dataset, eval_dataset)
        needed = self.strategy is not None and self.strategy.uses_search_data()
        check_search_dataset(args, needed, search_dataset, train_dataset, eval_dataset)
        if model is not None:
            self._check_model(model, args)
        if needed:
            check_disjoint_rows(search_dataset, train_dataset, eval_dataset)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, **kwargs)
        if self.strategy is not None:
            self.add_callback(StrategyCallback(self))

    @property
    def hybrid(self) -> nn.Module:
        """The hybrid without wrappers (DDP, torch.compile, PEFT)."""
        return unwrap(self.model)

    def _check_model(self, model: nn.Module, args: ManticoreTrainingArguments) -> None:
        check_stage(model, args.stage, args.train_components)
        check_adapters(model)
        if self.strategy is not None:
            self.strategy.check(unwrap(model))
        if self.budget is not None:
            check_feasible(cost_table(unwrap(model)), self.budget, usable_paths(unwrap(model)))
        if self._teacher is not None:
            self.distiller = Distiller(args, self._teacher, unwrap(model))

    def cost_table(self) -> CostTable:
        """The costs of the hybrid's choices, counted once a training."""
        if self._cost_table is None:
            self._cost_table = cost_table(self.hybrid)
        return self._cost_table

    def call_model_init(self, trial=None) -> nn.Module:
        """As in transformers; the model is checked like one that is given."""
        model = super().call_model_init(trial)
        self._check_model(model, self.args)
        return model

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial=None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        As in transformers. `resume_from_checkpoint=True` means the last complete checkpoint of `output_dir`.

        Raises:
            ValueError: the checkpoint is incomplete, or of another stage or strategy.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = _last_complete_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            self._check_resumable(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint or None, trial, ignore_keys_for_eval)

    def _inner_training_loop(
        self, batch_size=None, args=None, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None
    ) -> TrainOutput:
        if self.args.should_save:
            shutil.rmtree(Path(self._get_output_dir(trial), STAGING_DIR), ignore_errors=True)
        if self.strategy is not None:
            self.strategy, self._cost_table = make_strategy(self.args), None
        self.effort, self.search_report = Effort(), None
        attached = nullcontext() if self.strategy is None else self.strategy.attached(self)
        with frozen_for(self.model, self.args.stage, self.args.train_components), attached:
            return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, trial, ignore_keys_for_eval)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in transformers, with mixture weights and learned gates in a group of their own."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        own = {id(p): p for p in mixture_parameters(self.model if model is None else model) if p.requires_grad}
        if fresh and own:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in own]
            stepped = list(own.values())
            if self.strategy is not None:
                stepped = self.strategy.optimizer_parameters(stepped)
            if stepped:
                optimizer.add_param_group(
                    {"params": stepped, "lr": self.args.mixture_learning_rate, "weight_decay": 0.0}
                )
        return optimizer

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """As in transformers; the batch's tokens are counted."""
        self.effort.tokens += tokens_in(inputs) * self.args.world_size
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """As in transformers; while training, with what a teacher and `cost_weight` (in a search) make of it."""
        if self.distiller is not None and model.training:
            loss, outputs = self.distiller.loss(self, super().compute_loss, model, inputs, num_items_in_batch)
            result = (loss, outputs) if return_outputs else loss
        else:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.strategy is None or not self.args.cost_weight or not model.training:
            return result
        kind, table = self.args.cost_kind, self.cost_table()
        term = self.args.cost_weight / largest(table, kind)
        per_item = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        if per_item or self.compute_loss_func is not None:  # else the Trainer divides
            term /= self.current_gradient_accumulation_steps
        loss = result[0] if return_outputs else result
        loss = loss + term * expected_cost(self.hybrid, kind, table).to(loss.device)
        return (loss, *result[1:]) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in transformers; while a search trains, what is logged has the mixture weights too (`logs` has not)."""
        mixture = {}
        if self.strategy is not None and self.is_in_train and not any(key.startswith("eval_") for key in logs):
            mixture = mixture_logs(self.hybrid) | self.strategy.logs()
        if self.distiller is not None and "loss" in logs:
            mixture |= self.distiller.logs(self)
        merged = logs | mixture
        super().log(merged, start_time)
        logs.update({key: value for key, value in merged.items() if key not in mixture})

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """
        As in transformers.

        Raises:
            ValueError: the rows are those on which mixture weights learn.
        """
        named = isinstance(eval_dataset, str) and isinstance(self.eval_dataset, dict)
        rows = self.eval_dataset.get(eval_dataset) if named else eval_dataset
        if is_same_split(self.search_dataset, rows):
            raise ValueError("eval_dataset: got the search_dataset itself, allowed are rows that no step has seen.")
        return super().get_eval_dataloader(eval_dataset)

    def _get_output_dir(self, trial) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, STAGING_DIR) if self._staging else run_dir

    def _save_checkpoint(self, model, trial) -> None:
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged = run_dir / STAGING_DIR / name
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        best = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if self.state.best_global_step and (best == name or (run_dir / best).is_dir()):
            self.state.best_model_checkpoint = str(run_dir / best)
        if self.args.should_save:
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
            write_search_state(staged, self.args, self.strategy, self.effort.state_dict())
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if (run_dir / name).exists():
                _discard(run_dir / name)
            os.replace(staged, run_dir / name)
            self._rotate(run_dir)
            shutil.rmtree(run_dir / STAGING_DIR)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))

    def _rotate(self, run_dir: Path) -> None:
        """Delete checkpoints beyond `save_total_limit`, oldest first; never the newest or the best."""
        limit = self.args.save_total_limit or 0
        folders = sort_checkpoints(str(run_dir), use_mtime=True)
        kept = {folders[-1], str(Path(self.state.best_model_checkpoint or folders[-1]))}
        surplus = max(len(folders) - max(limit, len(kept)), 0) if limit > 0 else 0
        for folder in [folder for folder in folders if folder not in kept][:surplus]:
            _discard(Path(folder))

    def _finalize_training(self, trial, num_train_samples, start_time) -> TrainOutput:
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and self.args.save_total_limit == 1:
            for folder in sort_checkpoints(self._get_output_dir(trial)):
                if not os.path.samefile(folder, best):
                    _discard(Path(folder))
            shutil.rmtree(Path(self._get_output_dir(trial), STAGING_DIR), ignore_errors=True)
        return super()._finalize_training(trial, num_train_samples, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and not self._staging:
            Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging or not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        hf_api().upload_folder(
            repo_id=self.hub_model_id,
            folder_path=checkpoint_folder,
            commit_message=f"Training in progress, step {self.state.global_step}",
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            ignore_patterns=LOCAL_FILES,
        )

    def _check_resumable(self, folder: Path) -> None:
        if not _is_complete(folder):
            raise ValueError(
                f"resume_from_checkpoint: got {str(folder)!r}, allowed is a complete checkpoint of ManticoreTrainer, "
                f"with {TRAINER_STATE_NAME} and {STRATEGY_STATE_NAME}."
            )
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not sharded and not (folder / OPTIMIZER_NAME).is_file():
            raise ValueError(
                f"resume_from_checkpoint: got {str(folder)!r}, which has no {OPTIMIZER_NAME} (save_only_model); "
                "allowed is a checkpoint that has one."
            )
        check_search_state(folder, self.args)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._model_is_whole():
            _read_weights(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._model_is_whole():
            _read_weights(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()
        self._load_strategy(self.state.best_model_checkpoint)

    def _model_is_whole(self) -> bool:
        """Whether checkpoints hold the whole hybrid: no adapter, no sharding by FSDP or DeepSpeed."""
        return self.model is self.hybrid and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_strategy(checkpoint)
            self.effort.load_state_dict(read_search_state(Path(checkpoint))["effort"])

    def _load_strategy(self, checkpoint: str) -> None:
        if self.strategy is not None:
            self.strategy.load_state_dict(read_search_state(Path(checkpoint))["state"])
            self.strategy.apply(self.hybrid)


def _checked_budget(budget: Budget | None, args: ManticoreTrainingArguments) -> Budget | None:
    if budget is None:
        return None
    if not isinstance(budget, Budget):
        raise ValueError(f"budget: got {type(budget).__name__}, allowed is a Budget or None.")
    if args.stage != "search":
        raise ValueError(f"budget: got {budget} with stage={args.stage!r}, allowed is None, or stage='search'.")
    return budget


def _is_complete(folder: Path) -> bool:
    return (folder / TRAINER_STATE_NAME).is_file() and (folder / STRATEGY_STATE_NAME).is_file()


def _last_complete_checkpoint(output_dir: str) -> str:
    folders = [folder for folder in sort_checkpoints(output_dir) if _is_complete(Path(folder))]
    if not folders:
        raise ValueError(
            f"resume_from_checkpoint: got True, but {output_dir!r} has no complete checkpoint; allowed there is a "
            "folder in which ManticoreTrainer saved one, or None to start afresh."
        )
    return folders[-1]


def _discard(folder: Path) -> None:
    """Delete a checkpoint so that a kill on the way leaves it whole or not at all, never in part."""
    trash = folder.parent / STAGING_DIR / f"deleted-{folder.name}"
    trash.parent.mkdir(exist_ok=True)
    shutil.rmtree(trash, ignore_errors=True)
    os.replace(folder, trash)
    shutil.rmtree(trash)


def _read_weights(model: nn.Module, folder: str) -> None:
    """
    Read weights as `from_pretrained` does: on disk some families' tensors have the names of their first release. They
    are read in a dtype that holds every dtype of the model, so that copying them is exact.

    Raises:
        ValueError: tensors are missing, unknown or of another shape.
    """
    always_float32 = {id(p) for p in mixture_parameters(model)}
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and id(p) not in always_float32}
    dtype = functools.reduce(torch.promote_types, dtypes)
    loaded, info = type(model).from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise ValueError(
                f"checkpoint: got {folder!r} with {kind} {sorted(map(str, info[kind]))[:5]}, allowed is a checkpoint "
                "of this very model."
            )
    model.load_state_dict(loaded.state_dict())
