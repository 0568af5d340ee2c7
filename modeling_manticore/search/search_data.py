"""The search split: a second, endless stream of batches beside the Trainer's own, which resumes exactly."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length
from transformers.utils import is_datasets_available, logging


if TYPE_CHECKING:
    from .arguments import ManticoreTrainingArguments
    from .trainer import ManticoreTrainer


logger = logging.get_logger(__name__)

COMPARED_ROWS = 20_000  # of every split: a few seconds at most
SHARED_AT_MOST = 0.5  # of the search rows; short texts repeat by nature


class SearchBatches:
    """
    Batches of the search split for one mixture step after the other.

    The rows are one endless stream: permutation e of all rows comes from a generator seeded with (seed, e) and the
    permutations follow each other without a gap. So every step has the same number of rows, the effective batch of
    the weight step (rows per device x accumulation steps x processes), and the number of rows taken so far is the
    whole state. The generator is its own: the search split neither reads nor moves the global one.

    Args:
        trainer: its `search_dataset`, collator, batch size and processes are used.
        taken: rows taken before, by all processes together.
    """

    def __init__(self, trainer: "ManticoreTrainer", taken: int = 0):
        args = trainer.args
        self.dataset, self.collate = trainer.search_dataset, trainer.data_collator
        if is_datasets_available() and _is_hf_dataset(self.dataset):
            self.dataset = trainer._remove_unused_columns(self.dataset, description="Search")
        else:
            self.collate = trainer._get_collator_with_removed_columns(self.collate, description="Search")
        self.rows, self.parts = trainer._train_batch_size, args.gradient_accumulation_steps
        self.rank, self.processes = args.process_index, args.world_size
        self.seed = args.seed if args.data_seed is None else args.data_seed
        self.taken = taken
        self._permutations: dict[int, list[int]] = {}

    def step(self) -> list[dict[str, Any]]:
        """This process's micro-batches of the next mixture step, collated, on the CPU."""
        share = self.rows * self.parts
        first = self.taken + self.rank * share
        self.taken += share * self.processes
        places = [range(first + i * self.rows, first + (i + 1) * self.rows) for i in range(self.parts)]
        return [self.collate([self.dataset[self._row(place)] for place in part]) for part in places]

    def _row(self, place: int) -> int:
        epoch, index = divmod(place, len(self.dataset))
        if epoch not in self._permutations:
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1}
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            self._permutations[epoch] = torch.randperm(len(self.dataset), generator=generator).tolist()
        return self._permutations[epoch][index]

    def state_dict(self) -> dict[str, int]:
        """The place in the stream, and what must be the same for it to mean the same rows."""
        return {"taken": self.taken, "rows": len(self.dataset), "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """
        Raises:
            ValueError: the split has another number of rows, or the seed is another.
        """
        for name, value in self.state_dict().items():
            if name != "taken" and value != state[name]:
                raise ValueError(
                    f"search_dataset: got {name}={value}, but the checkpoint was written with {name}={state[name]}; "
                    "allowed is the same, else the place in the search split means other rows."
                )
        self.taken = state["taken"]


def check_search_dataset(
    args: "ManticoreTrainingArguments", needed: bool, search_dataset: Any, train_dataset: Any, eval_dataset: Any
) -> None:
    """
    Three disjoint splits: weights learn on one, mixture weights on another, and a third says how well.

    Args:
        needed: whether the strategy of `args` steps mixture weights on a split of their own.

    Raises:
        ValueError: a search split is missing, not used, empty, without a length, or is another split.
    """
    if not needed:
        if search_dataset is not None:
            what = f"strategy={args.strategy!r}" if args.stage == "search" else f"stage={args.stage!r}"
            raise ValueError(
                f"search_dataset: got {type(search_dataset).__name__} with {what}, which does not use it; allowed is "
                "None, or stage='search' with strategy='darts', or 'gaea' with gaea_base='darts'."
            )
        return
    if search_dataset is None or isinstance(search_dataset, IterableDataset) or not has_length(search_dataset):
        raise ValueError(
            f"search_dataset: got {type(search_dataset).__name__} with strategy={args.strategy!r}, allowed is a "
            "dataset with a length and indices, whose rows are neither in the training nor in the evaluation data."
        )
    if len(search_dataset) == 0:
        raise ValueError("search_dataset: got 0 examples, allowed is at least 1.")
    named = eval_dataset if isinstance(eval_dataset, dict) else {None: eval_dataset}
    others = {"train_dataset": train_dataset}
    others |= {"eval_dataset" if name is None else f"eval_dataset[{name!r}]": data for name, data in named.items()}
    for name, data in others.items():
        if is_same_split(search_dataset, data):
            raise ValueError(
                f"search_dataset: got the {name} itself, allowed are examples of their own: mixture weights that "
                "learn on the training rows favour what fits them, and on the evaluation rows make it worthless."
            )


def is_same_split(first: Any, second: Any) -> bool:
    """Whether two datasets are one object, or Hugging Face datasets of one origin."""
    if first is None or second is None:
        return False
    fingerprint = getattr(first, "_fingerprint", None)
    return first is second or (fingerprint is not None and fingerprint == getattr(second, "_fingerprint", None))


def check_disjoint_rows(search_dataset: Any, train_dataset: Any, eval_dataset: Any) -> None:
    """
    Compare the splits by content: rows of the search split whose `input_ids` are, as they stand (with their padding),
    also a row of the training or evaluation data are counted. Some repeat by nature, so they are warned of, and
    refused when they are more than half. At most `COMPARED_ROWS` rows of each split are read, the first ones; data
    without a length, without indices or without `input_ids` are not compared.

    Raises:
        ValueError: more than half of the search rows are also in another split.
    """
    mine = list(_digests(search_dataset))
    if not mine:
        return
    named = eval_dataset if isinstance(eval_dataset, dict) else {None: eval_dataset}
    others = {"train_dataset": train_dataset}
    others |= {"eval_dataset" if name is None else f"eval_dataset[{name!r}]": data for name, data in named.items()}
    for name, data in others.items():
        known = set(_digests(data))
        shared = sum(digest in known for digest in mine)
        what = f"{shared} of its {'first ' if len(mine) == COMPARED_ROWS else ''}{len(mine)} rows are also in {name}"
        if shared > SHARED_AT_MOST * len(mine):
            raise ValueError(f"search_dataset: {what}, allowed are rows of their own (at most half may repeat).")
        if shared:
            logger.warning(f"search_dataset: {what}.")


def _digests(dataset: Any) -> Iterator[bytes]:
    """A digest of the `input_ids` of each of the first rows, where the dataset has such."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not has_length(dataset):
        return
    count = min(len(dataset), COMPARED_ROWS)
    if is_datasets_available() and _is_hf_dataset(dataset):
        if "input_ids" not in dataset.column_names:
            return
        rows = dataset.select_columns("input_ids").with_format("arrow")[:count]["input_ids"].to_pylist()
    else:
        examples = (dataset[i] for i in range(count))
        rows = (example.get("input_ids") if isinstance(example, Mapping) else None for example in examples)
    for row in rows:
        if row is not None:
            row = row.cpu().numpy() if isinstance(row, torch.Tensor) else row
            yield hashlib.blake2b(numpy.asarray(row, dtype=numpy.int64).tobytes(), digest_size=16).digest()


def _is_hf_dataset(dataset: Any) -> bool:
    import datasets

    return isinstance(dataset, datasets.Dataset)
