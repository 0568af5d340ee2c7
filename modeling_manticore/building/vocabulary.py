"""What the tokens of a tokenizer stand for, however they are spelled, and which of two tokenizers are the same."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode


BYTE_OF_CHARACTER = {character: byte for byte, character in bytes_to_unicode().items()}
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE = "\u2581"  # SentencePiece's mark
ROLES = ("eos_token", "bos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
ROWS_AT_ONCE = 4096


class Vocabulary:
    """
    The tokens of a tokenizer as the bytes they stand for: byte-level spelling ('Ġthe', 'Ċ'), SentencePiece spelling
    ('▁the', '<0x0A>') and plain text become the same.

    Args:
        tokenizer: any tokenizer of transformers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.ids: dict[str, int] = tokenizer.get_vocab()
        added = tokenizer.added_tokens_decoder
        self.special = {token.content for token in added.values() if token.special}
        self.literal = {token.content for token in added.values()}
        self.size = max(self.ids.values(), default=-1) + 1
        self.spelling = self._spelling()

    @cached_property
    def contents(self) -> list[bytes | None]:
        """The bytes of every id below `size`; None for special tokens and for ids without a token."""
        contents: list[bytes | None] = [None] * self.size
        for token, i in self.ids.items():
            if token not in self.special:
                contents[i] = self._bytes(token)
        return contents

    @cached_property
    def by_content(self) -> dict[bytes, int]:
        """The id of every content; a token for a whole character comes before a byte token of the same content."""
        found: dict[bytes, int] = {}
        for token, i in sorted(self.ids.items(), key=lambda pair: (bool(BYTE_TOKEN.fullmatch(pair[0])), pair[1])):
            if token not in self.special:
                found.setdefault(self.contents[i], i)
        return found

    def same(self, other: "Vocabulary") -> bool:
        """Whether both have the same token under every id, whatever files or classes they come from."""
        if self.ids == other.ids:
            return True
        return (
            self.size == other.size
            and self.contents == other.contents
            and {t: self.ids[t] for t in self.special} == {t: other.ids[t] for t in other.special}
        )

    def counterpart(self, token: str, i: int, other: "Vocabulary") -> int | None:
        """The id here of `token`, which has the id i in `other`: the same special token, spelling or content."""
        if token in other.special:
            return self.ids.get(token)
        if self.spelling == other.spelling and token in self.ids and token not in self.special:
            return self.ids[token]
        return self.by_content.get(other.contents[i])

    def with_role_of(self, token: str, other: "Vocabulary") -> int | None:
        """The id here of the special token that has a role (end of text, padding, ...) of `token` in `other`."""
        for role in ROLES:
            if getattr(other.tokenizer, role, None) == token and getattr(self.tokenizer, role, None) in self.ids:
                return self.ids[getattr(self.tokenizer, role)]
        return None

    def pieces(self, contents: list[bytes]) -> list[list[int]]:
        """
        The ids into which this tokenizer splits each content, without unknown tokens and without the space that some
        tokenizers put in front of a text. What is not UTF-8 is split into single bytes.
        """
        texts: dict[int, str] = {}
        found: list[list[int]] = [[] for _ in contents]
        for i, content in enumerate(contents):
            try:
                texts[i] = content.decode("utf-8")
            except UnicodeDecodeError:
                found[i] = [self.by_content[b] for b in (bytes([byte]) for byte in content) if b in self.by_content]
        for i, ids in zip(texts, self._split(list(texts.values()))):
            found[i] = [piece for piece in ids if piece not in self.unknown]
        return found

    @cached_property
    def unknown(self) -> set[int | None]:
        """The id that stands for text which the tokenizer cannot spell."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        model = json.loads(backend.to_str())["model"] if isinstance(backend, Tokenizer) else {}
        tokens = {self.tokenizer.unk_token, model.get("unk_token")}
        return {self.ids.get(token) for token in tokens} | {model.get("unk_id")}

    def _split(self, texts: list[str]) -> Iterable[list[int]]:
        backend = edited_backend(self.tokenizer, space_in_front=False)
        if backend is None:
            return [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]

    def _spelling(self) -> str:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if isinstance(backend, Tokenizer):
            parts = json.loads(backend.to_str())
            steps = json.dumps([parts[key] for key in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False)
            return "bytes" if "ByteLevel" in steps else "marked" if SPACE in steps else "plain"
        first = [token[:1] for token in self.ids]
        counts = {"bytes": first.count("Ġ"), "marked": first.count(SPACE)}
        spelling = max(counts, key=counts.get)
        return spelling if counts[spelling] else "plain"

    def _bytes(self, token: str) -> bytes:
        if token not in self.literal:
            if self.spelling == "bytes" and all(character in BYTE_OF_CHARACTER for character in token):
                return bytes(BYTE_OF_CHARACTER[character] for character in token)
            if self.spelling == "marked":
                byte = BYTE_TOKEN.fullmatch(token)
                return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode("utf-8")
        return token.encode("utf-8", errors="surrogatepass")


def edited_backend(tokenizer: PreTrainedTokenizerBase, space_in_front: bool) -> Tokenizer | None:
    """
    A copy of a fast tokenizer that reports offsets untrimmed and neither cuts nor pads; with `space_in_front` False
    it also puts no space in front of a text. None where the tokenizer is written in Python.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return None
    parts = json.loads(backend.to_str())
    for key in ("normalizer", "pre_tokenizer", "post_processor"):
        parts[key] = _edited(parts[key], space_in_front)
    copied = Tokenizer.from_str(json.dumps(parts))
    copied.no_truncation()
    copied.no_padding()
    return copied


def _edited(step: dict | None, space_in_front: bool) -> dict | None:
    if step is None:
        return None
    kind = step["type"]
    if kind == "Sequence":
        (key,) = (key for key in step if key != "type")
        inner = [_edited(child, space_in_front) for child in step[key]]
        return step | {key: [child for child in inner if child is not None]}
    changes: dict = {}
    if "trim_offsets" in step:
        changes["trim_offsets"] = False
    if not space_in_front:
        if kind == "Prepend":
            return None
        if kind == "Metaspace":
            changes["prepend_scheme"] = "never"
        if "add_prefix_space" in step:
            changes["add_prefix_space"] = False
    return step | changes


@dataclass
class Transplant:
    """
    Where the rows of a component's vocabulary matrices come from, for every id of the hybrid's tokenizer: row i is the
    mean of the old rows `pieces[starts[i]:starts[i + 1]]`, or the mean of all old rows where there is none.

    Args:
        pieces: ids of the component's own tokenizer, int64.
        starts: int64, one more than the hybrid's vocabulary has tokens.
        own_size: tokens of the component's own tokenizer; the rows beyond are padding.
        counts: number of rows by their origin; they add up to the vocabulary.
        exact: {own id: id in the hybrid} of tokens that are in both, or have the same role.
    """

    pieces: torch.LongTensor
    starts: torch.LongTensor
    own_size: int
    counts: dict[str, int]
    exact: dict[int, int] = field(repr=False)

    @torch.no_grad()
    def rows(self, matrix: torch.Tensor, size: int | None = None) -> torch.Tensor:
        """
        The matrix (own vocabulary, ...) for the hybrid's vocabulary, in its dtype. Means are taken in float32; rows
        from the tokenizer's size up to `size` are padding and zero.
        """
        count = len(self.starts) - 1
        lengths = self.starts.diff()
        result = matrix.new_zeros((count if size is None else size, *matrix.shape[1:]))
        single = lengths == 1
        result[:count][single] = matrix[self.pieces[self.starts[:-1][single]]]
        if (lengths == 0).any():
            result[:count][lengths == 0] = matrix[: self.own_size].mean(0, dtype=torch.float32).to(matrix.dtype)
        averaged = (lengths > 1).nonzero()[:, 0]
        for ids in averaged.split(ROWS_AT_ONCE) if len(averaged) else ():
            bags = torch.repeat_interleave(torch.arange(len(ids)), lengths[ids])
            taken = torch.cat([torch.arange(self.starts[i], self.starts[i + 1]) for i in ids.tolist()])
            sums = matrix.new_zeros((len(ids), *matrix.shape[1:]), dtype=torch.float32)
            sums.index_add_(0, bags.to(matrix.device), matrix[self.pieces[taken]].float())
            divisor = lengths[ids].view(-1, *[1] * (matrix.ndim - 1))
            result[ids] = (sums / divisor.to(matrix.device)).to(matrix.dtype)
        return result


def transplant(target: Vocabulary, own: Vocabulary) -> Transplant:
    """
    How a component that speaks `own` learns to speak `target`. Every token of `target` gets the row of the same token,
    compared by the bytes it stands for; a special token that `own` lacks gets the row of the one in the same role;
    every other token the mean of the rows of the pieces into which `own` splits it; and where nothing is left, or the
    id has no token, the mean row.
    """
    sources: list[list[int]] = [[] for _ in range(target.size)]
    counts = {"copied": 0, "same role": 0, "averaged": 0, "mean row": 0}
    exact: dict[int, int] = {}
    missing = {}
    for token, i in sorted(target.ids.items(), key=lambda pair: pair[1]):
        found, origin = own.counterpart(token, i, target), "copied"
        if found is None and token in target.special:
            found, origin = own.with_role_of(token, target), "same role"
        if found is None:
            missing[i] = target.contents[i] if token not in target.special else token.encode("utf-8")
            continue
        sources[i] = [found]
        counts[origin] += 1
        if origin == "copied":
            exact[found] = i
        else:
            exact.setdefault(found, i)
    for i, pieces in zip(missing, own.pieces(list(missing.values()))):
        sources[i] = pieces
        counts["averaged"] += bool(pieces)
    counts["mean row"] = sum(not pieces for pieces in sources)
    starts = torch.tensor([0] + [len(pieces) for pieces in sources]).cumsum(0)
    flat = torch.tensor([piece for pieces in sources for piece in pieces], dtype=torch.long)
    return Transplant(flat, starts, own.size, counts, exact)


def cut(size: int, own_size: int) -> Transplant:
    """The first `size` rows of a vocabulary of `own_size`, as they are."""
    ids = torch.arange(size)
    counts = {"copied": size, "same role": 0, "averaged": 0, "mean row": 0}
    return Transplant(ids, torch.arange(size + 1), own_size, counts, {i: i for i in range(size)})
