"""What a teacher says about a dataset, written to disk once."""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.utils import logging

from ..progress import progress_bar
from .teachers import Lesson, Prompt, Teacher, check_vocabulary, load_teacher


logger = logging.get_logger(__name__)

DESCRIPTION = "teacher_cache.json"
FORMAT = 1
SHARD_BYTES = 2**28
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def cache_teacher(
    teacher: Any,
    dataset: Any,
    folder: str | os.PathLike,
    *,
    top_k: int | None = None,
    temperature: float = 1.0,
    dtype: str = "float16",
    batch_size: int = 8,
    progress: bool = True,
) -> Path:
    """
    Run a teacher over a dataset once and keep what it says, for `ManticoreTrainer(teacher=folder)`.

    On disk a token takes `vocabulary * bytes` of all logits, or `top_k * (4 + bytes) + 4` of the likeliest, where
    bytes is 2 (4 for float32): with a vocabulary of 50,000, 100 KB, or 388 bytes with `top_k=64`. The size is logged
    and compared with the free space before the work. Logits are kept as their difference from the largest, so that
    rounding is least where the probability is. Rows are found again by their token ids, in any order and with any
    padding that an `attention_mask` marks.

    Args:
        teacher: a causal language model, a repository or folder of one, or a list of such for an ensemble.
        dataset: rows with `input_ids`, and `attention_mask` where they are padded.
        folder: where the cache is made; it must not exist or be empty. It is complete or not there.
        top_k: keep the so many likeliest tokens and the mass of all others, which the loss treats as one further token
            (a lower bound of the full KL divergence). None keeps all logits.
        temperature: of the kept probabilities, with `top_k` only; training must use the same.
        dtype: "float16", "bfloat16" or "float32".
        batch_size: rows of one length that are run together.

    Raises:
        ValueError: bad arguments, rows without ids or with ids outside the vocabulary, a folder that is in use, or a
            disk that is too small; before the work.
    """
    target = Path(folder)
    models = [
        load_teacher("teacher" if one is teacher else f"teacher[{i}]", one)
        for i, one in enumerate(teacher if isinstance(teacher, (list, tuple)) else [teacher])
    ]
    speaker = Teacher(models)
    vocabulary = speaker.vocab_size
    _check(target, top_k, temperature, dtype, batch_size, vocabulary)
    rows = _rows(dataset, vocabulary)
    itemsize = DTYPES[dtype].itemsize
    token_bytes = vocabulary * itemsize if top_k is None else top_k * (itemsize + 4) + 4
    size = sum(map(len, rows.values())) * token_bytes
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise ValueError(
            f"folder: {str(target)!r} would take {size:,} bytes of {free:,} free ones; allowed is less, as with "
            f"top_k={top_k or 64} or fewer rows."
        )
    logger.info(f"teacher cache: {len(rows):,} rows, {token_bytes:,} bytes a token, {size:,} bytes in {target}")
    found: dict[str, int] = {}
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        staging = Path(temporary, target.name)
        staging.mkdir()
        shards = _shards(speaker, rows, batch_size, top_k, temperature, DTYPES[dtype], size, progress)
        for number, (keys, tensors) in enumerate(shards):
            save_file(tensors, staging / _shard_name(number))
            found |= dict.fromkeys(keys, number)
        description = {
            "format": FORMAT,
            "vocab_size": vocabulary,
            "top_k": top_k,
            "temperature": temperature if top_k is not None else None,
            "teacher": [model.config.name_or_path or type(model).__name__ for model in models],
            "rows": found,
        }
        (staging / DESCRIPTION).write_text(json.dumps(description) + "\n", encoding="utf-8")
        if target.is_dir():
            target.rmdir()
        os.replace(staging, target)
    return target


def is_cache(folder: str | os.PathLike) -> bool:
    """Whether the folder is one that `cache_teacher` made."""
    return Path(folder, DESCRIPTION).is_file()


class CachedTeacher:
    """
    A teacher that is read from the folder of `cache_teacher`.

    Raises:
        ValueError: another format or vocabulary.
    """

    def __init__(self, folder: Path, vocab_size: int):
        self.folder = folder
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if description["format"] != FORMAT:
            raise ValueError(f"teacher: {str(folder)!r} has format {description['format']}, allowed is {FORMAT}.")
        check_vocabulary(f"teacher ({folder})", description["vocab_size"], vocab_size)
        self.top_k, self.temperature = description["top_k"], description["temperature"]
        self._rows: dict[str, int] = description["rows"]
        self._files: dict[int, Any] = {}

    def check_temperature(self, temperature: float) -> None:
        """
        Raises:
            ValueError: the kept probabilities are of another temperature.
        """
        if self.top_k is not None and temperature != self.temperature:
            raise ValueError(
                f"distill_temperature: got {temperature}, allowed with the teacher cache {str(self.folder)!r} is "
                f"{self.temperature}: it holds the {self.top_k} largest probabilities at that temperature."
            )

    def lesson(self, prompt: Prompt, layers=()) -> Lesson:
        """
        Raises:
            ValueError: a row is not in the cache, or has positions of its own.
        """
        if prompt.own_positions:
            raise ValueError("position_ids: got some in a batch; allowed with a teacher cache are derived ones only.")
        real = torch.ones_like(prompt.counted) if prompt.attention_mask is None else prompt.attention_mask.bool()
        parts: list[tuple] = []
        for ids, mask, counted in zip(prompt.input_ids.cpu(), real.cpu(), prompt.counted.cpu()):
            if counted.any():
                parts.append(tuple(tensor[counted[mask]] for tensor in self._read(ids[mask])))
        place = prompt.input_ids.device
        if not parts:
            return Lesson(logits=torch.empty(0, 1, device=place))
        joined = [torch.cat(tensors).to(place) for tensors in zip(*parts)]
        if self.top_k is None:
            return Lesson(logits=joined[0])
        indices, log_probabilities, rest = joined
        return Lesson(indices=indices.long(), log_probabilities=log_probabilities.float(), rest=rest)

    def _read(self, ids: torch.Tensor) -> list[torch.Tensor]:
        key = row_key(ids)
        if key not in self._rows:
            raise ValueError(
                f"teacher: the cache {str(self.folder)!r} has no row of {len(ids)} tokens that begins with "
                f"{ids[:8].tolist()}; allowed are rows of the dataset that cache_teacher was given, cut the same way."
            )
        number = self._rows[key]
        if number not in self._files:
            self._files[number] = safe_open(self.folder / _shard_name(number), framework="pt")
        names = ["logits"] if self.top_k is None else ["indices", "log_probabilities", "rest"]
        return [self._files[number].get_tensor(f"{key}.{name}") for name in names]


def row_key(ids: torch.Tensor) -> str:
    """What a row is found by: a hash of its token ids, without padding."""
    return hashlib.sha256(ids.long().contiguous().cpu().numpy().tobytes()).hexdigest()[:32]


def _shard_name(number: int) -> str:
    return f"logits-{number:05d}.safetensors"


def _check(target: Path, top_k, temperature, dtype, batch_size, vocabulary: int) -> None:
    whole = isinstance(top_k, int) and not isinstance(top_k, bool)
    if top_k is not None and not (whole and 1 <= top_k <= vocabulary):
        raise ValueError(f"top_k: got {top_k!r}, allowed are None and 1..{vocabulary}, the teacher's vocabulary.")
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not number or not 0 < temperature < math.inf:
        raise ValueError(f"temperature: got {temperature!r}, allowed is a finite number > 0.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, allowed are {', '.join(map(repr, DTYPES))}.")
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size!r}, allowed is a positive integer.")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"folder: got {str(target)!r}, which is in use; allowed is a folder that is empty or absent.")


def _rows(dataset: Any, vocabulary: int) -> dict[str, torch.LongTensor]:
    """Every different row without its padding, by its key; shorter rows first."""
    rows = {}
    for i, row in enumerate(dataset):
        if "input_ids" not in row:
            raise ValueError(f"dataset[{i}]: got the fields {sorted(row)}, allowed are rows with input_ids.")
        ids = torch.as_tensor(row["input_ids"]).long()
        if row.get("attention_mask") is not None:
            ids = ids[torch.as_tensor(row["attention_mask"]).bool()]
        if len(ids) == 0:
            continue
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocabulary:
            raise ValueError(f"dataset[{i}]: got token {low if low < 0 else high}, allowed is 0..{vocabulary - 1}.")
        rows[row_key(ids)] = ids
    if not rows:
        raise ValueError("dataset: got no row with tokens, allowed is at least one.")
    return dict(sorted(rows.items(), key=lambda item: len(item[1])))


def _shards(
    speaker: Teacher, rows: dict, batch_size: int, top_k, temperature, dtype, size: int, progress: bool
) -> Iterator[tuple[list[str], dict[str, torch.Tensor]]]:
    """Keys of rows and their tensors, about `SHARD_BYTES` at a time."""
    keys, tensors, held = [], {}, 0
    with progress_bar(total=len(rows), desc=f"teacher cache, {size / 1e6:,.0f} MB", unit="row", show=progress) as bar:
        for batch in _batches(rows, batch_size):
            for key, kept in zip(batch, _kept(speaker, [rows[key] for key in batch], top_k, temperature, dtype)):
                tensors |= {f"{key}.{name}": tensor for name, tensor in kept.items()}
                held += sum(tensor.nbytes for tensor in kept.values())
                keys.append(key)
            bar.update(len(batch))
            if held >= SHARD_BYTES:
                yield keys, tensors
                keys, tensors, held = [], {}, 0
        if keys:
            yield keys, tensors


def _batches(rows: dict[str, torch.LongTensor], batch_size: int) -> Iterator[list[str]]:
    """Keys of rows of one length, so that nothing is padded."""
    batch: list[str] = []
    for key, row in rows.items():
        if batch and (len(batch) == batch_size or len(rows[batch[0]]) != len(row)):
            yield batch
            batch = []
        batch.append(key)
    yield batch


def _kept(speaker: Teacher, rows: list, top_k, temperature, dtype) -> Iterator[dict[str, torch.Tensor]]:
    """What is written for each row."""
    model: nn.Module = speaker.models[0]
    ids = torch.stack(rows).to(model.device)
    prompt = Prompt.of({"input_ids": ids, "labels": ids, "shift_labels": ids})
    logits = speaker.lesson(prompt).logits.float().reshape(*ids.shape, -1)
    for row in logits:
        if top_k is None:
            shifted = row - row.max(-1, keepdim=True).values
            floor = torch.finfo(dtype).min
            shifted = torch.where(shifted.isinf(), shifted, shifted.clamp_min(floor))
            yield {"logits": shifted.to(dtype).cpu().contiguous()}
            continue
        log_p = torch.log_softmax(row / temperature, dim=-1)
        values, indices = log_p.topk(top_k, dim=-1)
        others = log_p.double().exp().scatter(-1, indices, 0.0)
        yield {
            "indices": indices.to(torch.int32).cpu(),
            "log_probabilities": values.to(dtype).cpu(),
            "rest": others.sum(-1).float().cpu(),
        }
