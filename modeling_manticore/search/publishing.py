"""How `ManticoreTrainer` pushes: by `push_folder`, in one commit each, without the run's own files."""

import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging

from ..hub.contents import refuse_local_paths
from ..hub.push import local_sources, push_folder
from ..hub.transfer import HubError, call


logger = logging.get_logger(__name__)


class PushingMixin:
    """
    The Trainer's pushes. What is pushed is the saved model: weights, configuration, code, tokenizer, card; never
    pickles (arguments, optimizer, scheduler, RNG) and never the Trainer's state, whatever `hub_strategy` is. So a copy
    of a checkpoint on the Hub ("checkpoint", "all_checkpoints") can be loaded, but a run resumes from a local one.

    The card is README.md in `output_dir`; else the one in the repository stays, and a new repository gets a short one.
    """

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        As in transformers.

        Raises:
            ValueError: no token or a wrong one; a local path in the model's configuration, so that no push after hours
                of training fails for it.
        """
        if not self.is_world_process_zero():
            return
        refuse_local_paths(local_sources(self.accelerator.unwrap_model(self.model)))
        request = {
            "repo_id": self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
            "private": self.args.hub_private_repo if private is None else private,
        }
        made = call("create", request, token=token or self.args.hub_token, needs_token=True)
        self.hub_model_id, self.push_in_progress = made["repo_id"], None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """
        As in transformers, but a push always ends before this returns; with `blocking=False` the result comes in a
        `Future` all the same. Fields of transformers' own card (`kwargs`) are not used: write README.md.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if kwargs:
            logger.warning(f"{', '.join(kwargs)}: not used; the model card is README.md in {self.args.output_dir!r}.")
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        info = self._push_files(self.args.output_dir, commit_message, token=token, revision=revision)
        if blocking:
            return info
        done = Future()
        done.set_result(info)
        return done

    def _push_files(self, folder: str, message: str, token=None, revision=None, places=("",)) -> CommitInfo:
        return push_folder(
            folder,
            self.hub_model_id,
            places=places,
            private=self.args.hub_private_repo,
            commit_message=message,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        strategy = self.args.hub_strategy
        if getattr(self, "_staging", False) or not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        step = f"step {self.state.global_step}"
        if self.args.save_strategy == SaveStrategy.EPOCH:
            step = f"epoch {int(self.state.epoch)}"
        copies = {
            HubStrategy.CHECKPOINT: ("last-checkpoint",),
            HubStrategy.ALL_CHECKPOINTS: (os.path.basename(checkpoint_folder),),
        }
        places = ("", *copies.get(strategy, ()))
        try:
            self._push_files(checkpoint_folder, f"Training in progress, {step}", places=places)
        except HubError as error:
            if error.kind not in ("connection", "stalled"):
                raise
            logger.warning(f"{step} was not pushed, training goes on: {error}")
