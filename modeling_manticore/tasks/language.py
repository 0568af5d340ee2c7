"""
Language modelling on any text: packed rows whose targets do not cross documents, and the likelihood of whole texts,
from which bits per byte (`metrics.bits_per_byte`) follow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .mad.metric import IGNORED
from .mad.settings import require_integer
from .metrics import bits_per_byte
from .text import split


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

BOUNDARIES = ("targets", "rows")


@dataclass(frozen=True)
class TextScore:
    """How likely a text is: its negative log-likelihood, the tokens that it was cut into, its UTF-8 bytes."""

    nats: float
    tokens: int
    bytes: int


def metric(scores: Sequence[TextScore]) -> float:
    """
    Bits per byte of scored texts.

    Raises:
        ValueError: there are none.
    """
    return bits_per_byte([score.nats for score in scores], [score.bytes for score in scores])


def language_modelling(
    documents: list[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    boundaries: str = "targets",
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
) -> "DatasetDict":
    """
    Documents as packed rows of train, validation and test. They are split by whole documents, as `text.split` does
    (which see), and packed as `pack_documents` does. For the metric, score the documents of `text.split(documents,
    validation, test, seed).test` with `score_texts`.

    Raises:
        ValueError: as both.
    """
    from datasets import DatasetDict

    parts = split(documents, validation, test, seed)
    named = {"train": parts.train, "validation": parts.search, "test": parts.test}
    return DatasetDict({name: pack_documents(tokenizer, part, length, boundaries) for name, part in named.items()})


def pack_documents(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], length: int, boundaries: str = "targets"
) -> "Dataset":
    """
    Rows of `length` tokens with input_ids, attention_mask and labels (shifted by the model). Every document is ended
    by the end-of-text token where the tokenizer has one.

    Args:
        boundaries: "targets": documents follow each other without a gap, as in `text.pack`, and the first token of
            one is no target, since nothing before it says what it is. The model still sees the earlier documents of
            its row. "rows": no row has tokens of two documents; the last row of each is padded (a single token left
            over, which nothing could predict, makes none). That is what it takes for a state-space layer to forget:
            its state cannot be cut by position ids as attention can.

    Raises:
        ValueError: another value, no text, or not one full row ("targets").
    """
    require_integer("length", length, 2)
    if boundaries not in BOUNDARIES:
        raise ValueError(f"boundaries: got {boundaries!r}, allowed are {', '.join(BOUNDARIES)}.")
    if isinstance(documents, str) or not documents:
        raise ValueError(f"documents: got {documents!r:.60}, allowed is a list of at least one text.")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    ids = [row + end for row in encoded if row]
    labels = [[IGNORED, *row[1:]] for row in ids]
    if boundaries == "targets":
        tokens, targets = list(chain.from_iterable(ids)), list(chain.from_iterable(labels))
        starts = range(0, len(tokens) - length + 1, length)
        if not starts:
            raise ValueError(f"documents: got {len(tokens)} tokens, allowed is at least one row of {length}.")
        cut = [[part[begin : begin + length] for begin in starts] for part in (tokens, targets)]
        return _dataset(cut[0], [[1] * length] * len(starts), cut[1])
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (end or [0])[0]
    pieces = [
        (row[begin : begin + length], asked[begin : begin + length])
        for row, asked in zip(ids, labels)
        for begin in range(0, len(row) - 1, length)
    ]
    if not pieces:
        raise ValueError("documents: got no text of at least two tokens.")
    empty = [length - len(piece) for piece, _ in pieces]
    return _dataset(
        [piece + [padding] * missing for (piece, _), missing in zip(pieces, empty)],
        [[1] * len(piece) + [0] * missing for (piece, _), missing in zip(pieces, empty)],
        [asked + [IGNORED] * missing for (_, asked), missing in zip(pieces, empty)],
    )


def _dataset(input_ids: list, attention_mask: list, labels: list) -> "Dataset":
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels})


@torch.inference_mode()
def score_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    length: int = 512,
    stride: int | None = None,
    batch_size: int = 8,
    start: int | None = None,
) -> list[TextScore]:
    """
    The negative log-likelihood of every text: -sum over its tokens of log p(token | start, earlier tokens). Every
    token counts exactly once, also the first; the end-of-text token does not, so that texts of one content compare
    whatever the tokenizer. Texts that do not fit are read in overlapping windows.

    Args:
        length: tokens that the model sees at once, with the start token.
        stride: tokens by which a window moves on; at least length - stride tokens are in front of every token that a
            later window counts. Default: half the length.
        start: the token in front of every text; by default the tokenizer's beginning-of-text, else end-of-text token.

    Raises:
        ValueError: a size is no such number, there is no start token, a text is empty, or the tokenizer puts the
            unknown token into a text, whose likelihood would be another text's.
    """
    require_integer("length", length, 2)
    require_integer("batch_size", batch_size, 1)
    stride = max(1, length // 2) if stride is None else stride
    require_integer("stride", stride, 1)
    if stride >= length:
        raise ValueError(f"stride: got {stride}, allowed is at most {length - 1} with a length of {length}.")
    rows = _encoded(tokenizer, texts, start)
    windows = [window for number, row in enumerate(rows) for window in _windows(number, row, length, stride)]
    windows.sort(key=lambda window: len(window[1]))
    was_training = model.training
    model.eval()
    nats = [0.0] * len(rows)
    for begin in range(0, len(windows), batch_size):
        batch = windows[begin : begin + batch_size]
        for (number, _, _), value in zip(batch, _batch_nats(model, batch)):
            nats[number] += value
    model.train(was_training)
    sizes = [len(text.encode("utf-8")) for text in texts]
    return [TextScore(value, len(row) - 1, size) for value, row, size in zip(nats, rows, sizes)]


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str], start: int | None) -> list[list[int]]:
    if start is None:
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise ValueError("start: the tokenizer has no beginning- or end-of-text token, allowed is a token id.")
    if isinstance(texts, str) or not texts:
        raise ValueError(f"texts: got {texts!r:.60}, allowed is a list of at least one text.")
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    for number, row in enumerate(rows):
        if not row:
            raise ValueError(f"texts[{number}]: it has no tokens, allowed are texts that are not empty.")
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in row:
            raise ValueError(
                f"texts[{number}]: the tokenizer knows a part of it only as {tokenizer.unk_token!r}; allowed are "
                "texts that it can write down, else bits per byte are too few."
            )
    return [[start, *row] for row in rows]


def _windows(number: int, row: list[int], length: int, stride: int) -> list[tuple[int, list[int], int]]:
    """(number, tokens, how many of the tokens are only read), such that every token but the first counts once."""
    windows, counted, begin = [], 1, 0
    while counted < len(row):
        end = min(begin + length, len(row))
        windows.append((number, row[begin:end], counted - begin))
        counted, begin = end, begin + stride
    return windows


def _batch_nats(model: PreTrainedModel, batch: list[tuple[int, list[int], int]]) -> list[float]:
    longest = max(len(tokens) for _, tokens, _ in batch)
    input_ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, IGNORED)
    for place, (_, tokens, read) in enumerate(batch):
        ids = torch.tensor(tokens)
        input_ids[place, : len(ids)], mask[place, : len(ids)] = ids, 1
        labels[place, read : len(ids)] = ids[read:]
    input_ids, mask, labels = (part.to(model.device) for part in (input_ids, mask, labels))
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    losses = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    return losses.view(len(batch), -1).double().sum(dim=1).tolist()
