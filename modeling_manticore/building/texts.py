"""Calibration text in the forms that users have it, as batches of token ids."""

import random
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..configuration_manticore import ManticoreConfig
from .states import Batch
from .transplant import load_tokenizer


DEFAULT_LENGTH = 512


def batches_of(
    data: Any, model: PreTrainedModel, tokenizer: Any = None, batch_size: int = 8, field: str = "texts"
) -> list[Batch]:
    """
    Batches for a hybrid, in a fixed shuffled order.

    Args:
        data: LongTensor (rows, tokens); a list of rows of ids; a list of strings (cut at the context or 512 tokens);
            a `datasets.Dataset` with `input_ids` (and `attention_mask`) or `text`.
        tokenizer: for strings; by default that of the hybrid's tokenizer component.

    Raises:
        ValueError: nothing to read, fewer than two rows, ids outside the vocabulary, rows beyond the context.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size!r}, allowed is a positive integer.")
    config = model.config
    rows, masks, texts = _rows(data, config, tokenizer, field)
    kept = [(row, mask, text) for row, mask, text in zip(rows, masks, texts) if len(row) > 0]
    if len(kept) < 2:
        raise ValueError(f"{field}: got {len(kept)} non-empty rows, allowed are at least 2 (one is held out).")
    for i, (row, *_) in enumerate(kept):
        if config.max_position_embeddings is not None and len(row) > config.max_position_embeddings:
            raise ValueError(
                f"{field}[{i}]: got {len(row)} tokens, allowed are at most {config.max_position_embeddings}."
            )
        low, high = int(row.min()), int(row.max())
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"{field}[{i}]: got token {low if low < 0 else high}, allowed is 0..{config.vocab_size - 1}."
            )
    random.Random(0).shuffle(kept)
    batches = []
    size = min(batch_size, max(1, len(kept) // 2))
    for i in range(0, len(kept), size):
        batch_rows, batch_masks, batch_texts = zip(*kept[i : i + size])
        batch = Batch.of(batch_rows, batch_masks, model.device)
        batch.texts = None if batch_texts[0] is None else list(batch_texts)
        batches.append(batch)
    return batches


def _rows(data, config, tokenizer, field) -> tuple[list, list, list]:
    """Rows of ids, their masks and their texts; None where there is no mask or text."""
    if isinstance(data, torch.Tensor):
        if data.ndim != 2 or data.is_floating_point():
            raise ValueError(
                f"{field}: got a tensor {tuple(data.shape)} of {data.dtype}, allowed is integers (rows, tokens)."
            )
        return list(data.long().cpu()), [None] * len(data), [None] * len(data)
    columns = getattr(data, "column_names", None)
    if columns is not None:
        if "input_ids" in columns:
            rows = [torch.as_tensor(row, dtype=torch.long) for row in data["input_ids"]]
            masks = data["attention_mask"] if "attention_mask" in columns else [None] * len(rows)
            masks = [None if mask is None else torch.as_tensor(mask, dtype=torch.long) for mask in masks]
            return rows, masks, [None] * len(rows)
        if "text" not in columns:
            raise ValueError(f"{field}: got a dataset with the columns {columns}, allowed are input_ids or text.")
        data = list(data["text"])
    if not isinstance(data, (list, tuple)) or len(data) == 0:
        raise ValueError(f"{field}: got {type(data).__name__}, allowed are rows of token ids, strings or a dataset.")
    if all(isinstance(entry, str) for entry in data):
        tokenizer = tokenizer_of(config, config.tokenizer_from, field) if tokenizer is None else tokenizer
        length = min(config.max_position_embeddings or DEFAULT_LENGTH, DEFAULT_LENGTH)
        encoded = tokenizer(list(data), truncation=True, max_length=length)["input_ids"]
        return [torch.tensor(row, dtype=torch.long) for row in encoded], [None] * len(encoded), list(data)
    try:
        rows = [torch.as_tensor(row, dtype=torch.long) for row in data]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{field}: its entries are neither all strings nor all rows of token ids.") from error
    if any(row.ndim != 1 for row in rows):
        raise ValueError(f"{field}: its entries are not rows of token ids.")
    return rows, [None] * len(rows), [None] * len(rows)


def tokenizer_of(config: ManticoreConfig, k: int, field: str) -> PreTrainedTokenizerBase:
    """
    The tokenizer that component k came with.

    Raises:
        ValueError: there is no record of it.
    """
    component = config.components[k]
    source, revision = getattr(component, "source", None), getattr(component, "revision", None)
    name = getattr(component, "tokenizer_source", None)
    if name is None and source is None:
        raise ValueError(f"{field}: got strings, but no tokenizer; pass `tokenizer`, or rows of token ids.")
    return AutoTokenizer.from_pretrained(source, revision=revision) if name is None else load_tokenizer(name, field)
