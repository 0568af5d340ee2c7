"""One text in two tokenizations: which tokens of both end at the same byte."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import torch
from transformers import PreTrainedTokenizerBase

from .states import Batch, ComponentStates
from .texts import tokenizer_of
from .transplant import load_tokenizer
from .vocabulary import Vocabulary, edited_backend


@dataclass
class OwnTokens:
    """
    A batch in a component's own tokenization.

    Args:
        batch: its own token ids.
        positions: (rows, tokens of the hybrid), int64: where the component has read as far as the hybrid's token.
        matched: (rows, tokens of the hybrid), bool: whether there is such a place.
    """

    batch: Batch
    positions: torch.LongTensor
    matched: torch.BoolTensor


def align_batches(
    batches: list[Batch], states: ComponentStates, wanted: Iterable[int], tokenizer: PreTrainedTokenizerBase | None
) -> dict[int, float]:
    """
    Tokenize the batches for each of the wanted components, whose vocabularies were transplanted (`Batch.own`).

    Args:
        tokenizer: the hybrid's, if not the recorded one.

    Returns:
        For each such component the share of the hybrid's tokens that are matched.

    Raises:
        ValueError: the texts are no strings, a tokenizer or an uncut component is missing, or nothing is matched.
    """
    config, shares = states.config, {}
    for k in sorted(wanted):
        if batches[0].texts is None:
            raise ValueError("targets: got 'own' with rows of token ids, allowed is 'transplanted', or strings.")
        states.own_base(k)
        pair = [states.tokenizers[j] if states.tokenizers else None for j in (config.tokenizer_from, k)]
        pair[0] = pair[0] if tokenizer is None else tokenizer
        hybrid, own = (
            Vocabulary(
                tokenizer_of(config, j, f"tokenizers[{j}]")
                if given is None
                else load_tokenizer(given, f"tokenizers[{j}]")
            )
            for j, given in zip((config.tokenizer_from, k), pair)
        )
        limit = getattr(config.components[k], "max_position_embeddings", None)
        matched = total = 0
        for batch in batches:
            batch.own[k] = align(batch, hybrid, own, limit)
            matched += int(batch.own[k].matched.sum())
            total += len(batch.tokens(batch.input_ids[..., None]))
        if not matched:
            raise ValueError(f"targets: got 'own', but no token of component {k} ends where one of the hybrid's does.")
        shares[k] = matched / total
    return shares


def align(batch: Batch, hybrid: Vocabulary, own: Vocabulary, limit: int | None) -> OwnTokens:
    """
    Tokenize a batch's texts with a component's own tokenizer, as far as the hybrid reads them and at most `limit`
    tokens, and match the positions with those of the hybrid's tokenizer.

    Raises:
        ValueError: one of the tokenizers does not report offsets.
    """
    there, here = ends_of(hybrid, batch.texts), ends_of(own, batch.texts)
    positions = torch.zeros_like(batch.input_ids)
    matched = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    rows = []
    for r, ((ids, ends), (own_ids, own_ends)) in enumerate(zip(there, here)):
        given = batch.input_ids[r].tolist()
        length = next((i for i, pair in enumerate(zip(ids, given)) if pair[0] != pair[1]), min(len(ids), len(given)))
        reads = {end: i for i, end in enumerate(ends[:length]) if end > 0}
        reach = max(reads, default=0)
        stop = next((j for j, end in enumerate(own_ends) if end > reach), len(own_ends))
        stop = max(1, stop if limit is None else min(stop, limit))
        rows.append(torch.tensor(own_ids[:stop]))
        for j, end in enumerate(own_ends[:stop]):
            if end in reads:
                positions[r, reads[end]], matched[r, reads[end]] = j, True
    return OwnTokens(Batch.of(rows, [None] * len(rows), batch.input_ids.device), positions, matched)


def ends_of(vocabulary: Vocabulary, texts: list[str]) -> list[tuple[list[int], list[int]]]:
    """(ids, byte at which each token ends) of every text; special tokens that are added end at 0."""
    backend = edited_backend(vocabulary.tokenizer, space_in_front=True)
    if backend is None:
        raise ValueError(
            f"tokenizers: {type(vocabulary.tokenizer).__name__} does not say where its tokens end, allowed are fast "
            "tokenizers; or targets='transplanted'."
        )
    found = []
    for text, encoding in zip(texts, backend.encode_batch(list(texts))):
        until = [0, *accumulate(len(character.encode("utf-8", errors="replace")) for character in text)]
        ends = [until[end] for _, end in encoding.offsets]
        for i in range(len(ends) - 2, -1, -1):  # tokens that share one character
            if encoding.offsets[i][1] == encoding.offsets[i + 1][1]:
                ends[i] = max(0, ends[i + 1] - len(vocabulary.contents[encoding.ids[i + 1]] or b""))
        found.append((encoding.ids, ends))
    return found
