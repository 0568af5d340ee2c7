"""
The paper's fine-tuning sets by name, through `datasets`: from the Hub (only repositories that need no loading script)
or from local files in the same columns. First texts, in the columns prompt and completion, as TRL's trainers take
them; then, with a tokenizer, tokens with labels on the completions only.
"""

import hashlib
import os
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .mad.metric import IGNORED, token_accuracy
from .mad.settings import require_integer


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

logger = logging.get_logger(__name__)

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
SPLIT_WORDS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
}
SHUFFLED = 10_000  # rows of a stream among which the next one is drawn

Files = str | os.PathLike | list | Mapping[str, Any]

metric = token_accuracy


@dataclass(frozen=True)
class FineTuningSet:
    """
    One set: where it is, and what of a row is the prompt and what the completion.

    Attributes:
        repository, config, revision, data_dir: as in `datasets.load_dataset`.
        columns: that a row must have.
        render: from a row to (prompt, completion).
        group: the columns that tell rows apart that belong together; rows of one group are in one split only.
    """

    repository: str
    columns: tuple[str, ...]
    render: Callable[[dict], tuple[str, str]]
    group: tuple[str, ...]
    config: str | None = None
    revision: str | None = None
    data_dir: str | None = None


def _question(*parts: str | None) -> str:
    """Parts that are there, an empty line between and behind."""
    return "".join(part.strip() + "\n\n" for part in parts if part and part.strip())


def _first_answer(row: dict) -> str:
    texts = row["answers"]["text"]
    return texts[0] if texts else ""


SETS = {
    # The repository's own main branch is a loading script; this is the Hub's Parquet copy of it.
    "penn-treebank": FineTuningSet(
        "ptb-text-only/ptb_text_only",
        ("sentence",),
        lambda row: ("", row["sentence"].strip()),
        ("sentence",),
        revision="refs/convert/parquet",
        data_dir="penn_treebank",
    ),
    "alpaca": FineTuningSet(
        "tatsu-lab/alpaca",
        ("instruction", "input", "output"),
        lambda row: (_question(row["instruction"], row["input"]), row["output"]),
        ("instruction", "input"),
    ),
    # The original repository is defunct; this has its questions with one answer a row.
    "eli5": FineTuningSet(
        "sentence-transformers/eli5",
        ("question", "answer"),
        lambda row: (_question(row["question"]), row["answer"]),
        ("question",),
        config="pair",
    ),
    "natural-instructions": FineTuningSet(
        "Muennighoff/natural-instructions",
        ("definition", "inputs", "targets"),
        lambda row: (_question(row["definition"], row["inputs"]), row["targets"]),
        ("definition", "inputs"),
    ),
    # XTREME has MLQA as Parquet, a configuration for every pair of languages (context, question). There is no train
    # split in MLQA: the rows of its two splits are split anew, by contexts.
    "mlqa": FineTuningSet(
        "google/xtreme",
        ("context", "question", "answers"),
        lambda row: (_question(row["context"], row["question"]), _first_answer(row)),
        ("context",),
        config="MLQA.en.en",
    ),
    "openorca": FineTuningSet(
        "Open-Orca/OpenOrca",
        ("system_prompt", "question", "response"),
        lambda row: (_question(row["system_prompt"], row["question"]), row["response"]),
        ("system_prompt", "question"),
    ),
}


def finetuning_set(
    name: str,
    files: Files | None = None,
    *,
    config: str | None = None,
    max_rows: int | None = None,
    validation: float = 0.05,
    test: float = 0.05,
    seed: int = 0,
) -> "DatasetDict":
    """
    A fine-tuning set as train, validation and test with the columns prompt and completion. A split that the source
    has stays (rows that an evaluation split has too leave the train split); one that it does not have is cut from the
    train split, by groups (one prompt, or one context, is in one split only). Where there is no train split, all rows
    are split so. Rows without a completion are left out.

    Args:
        name: penn-treebank, alpaca, eli5, natural-instructions, mlqa or openorca.
        files: in place of the Hub: a .json, .jsonl, .parquet or .txt file, a list of such, a folder (a file is of the
            split that its path names: train, validation, valid, dev or test; else of train), or a dictionary of
            splits. The columns are the Hub's; a .txt file has a sentence a line.
        config: another configuration of the repository, as "MLQA.de.de".
        max_rows: at most so many rows of each split of the source, drawn from a stream, so that a large set is not
            downloaded whole.
        validation, test: shares of the groups, where the source has no such split.

    Raises:
        ValueError: an unknown name, columns that are not the set's, files that are not there, too few rows, or the
            Hub cannot be reached.
    """
    if name not in SETS:
        raise ValueError(f"name: got {name!r}, allowed are {', '.join(SETS)}.")
    if max_rows is not None:
        require_integer("max_rows", max_rows, 1)
    require_integer("seed", seed, 0)
    if not (validation > 0 and test > 0 and validation + test < 1):
        raise ValueError(f"validation, test: got {validation} and {test}, allowed are positive with a sum below 1.")
    chosen = SETS[name]
    source = _load(name, chosen, config, None if files is None else _data_files(files), max_rows, seed)
    return _split({split: _rendered(rows, chosen, name) for split, rows in source.items()}, validation, test, seed)


def tokenize(data: "DatasetDict", tokenizer: PreTrainedTokenizerBase, length: int = 512) -> "DatasetDict":
    """
    Prompts and completions as input_ids, attention_mask and labels (shifted by the model): labels are the tokens of
    the completion and the end-of-text token, and -100 on the prompt. Rows have the length they have; a
    `DataCollatorForSeq2Seq(tokenizer)` pads input_ids and labels. Completions are cut at `length`; rows whose prompt
    leaves no room for any of it are left out, with a warning that counts them.

    Raises:
        ValueError: nothing is left of a split.
    """
    require_integer("length", length, 2)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    begin = [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
    end = [] if eos is None else [eos]

    def encode(batch: dict) -> dict:
        rows = {"input_ids": [], "attention_mask": [], "labels": []}
        prompts = tokenizer(batch["prompt"], add_special_tokens=False, verbose=False)["input_ids"]
        answers = tokenizer(batch["completion"], add_special_tokens=False, verbose=False)["input_ids"]
        for prompt, answer in zip(prompts, answers):
            asked = begin + prompt
            if not asked:  # the first token has nothing before it, so it is no target
                asked, answer = answer[:1], answer[1:]
            ids = (asked + answer + end)[:length]
            if len(ids) > len(asked):
                rows["input_ids"].append(ids)
                rows["attention_mask"].append([1] * len(ids))
                rows["labels"].append([IGNORED] * len(asked) + ids[len(asked) :])
        return rows

    made = data.map(encode, batched=True, remove_columns=["prompt", "completion"], desc="tokens")
    for split, rows in made.items():
        if not len(rows):
            raise ValueError(f"length: got {length}, with which no row of {split} has room for a completion.")
        if len(rows) < len(data[split]):
            logger.warning(
                f"{len(data[split]) - len(rows)} of {len(data[split])} rows of {split} have a prompt of {length} or "
                "more tokens and were left out."
            )
    return made


def _data_files(files: Files) -> dict[str, list[str]]:
    """
    Splits and their files, all of one builder.

    Raises:
        ValueError: none, a file of another kind, or several kinds.
    """
    found: dict[str, list[Path]] = {}
    if isinstance(files, Mapping):
        unknown = [split for split in files if split not in ("train", "validation", "test")]
        if unknown:
            raise ValueError(f"files: got the split {unknown[0]!r}, allowed are train, validation and test.")
        found = {split: [path for path, _ in _paths(paths)] for split, paths in files.items()}
    else:
        for path, place in _paths(files):
            words = re.split(r"[^a-z]+", place.lower())
            split = next((SPLIT_WORDS[word] for word in reversed(words) if word in SPLIT_WORDS), "train")
            found.setdefault(split, []).append(path)
    kinds = {BUILDERS[path.suffix.lower()] for paths in found.values() for path in paths}
    if len(kinds) != 1:
        what = "no files" if not kinds else f"{' and '.join(sorted(kinds))} files"
        raise ValueError(f"files: got {what}, allowed are files of one kind ({', '.join(BUILDERS)}).")
    return {split: [str(path) for path in paths] for split, paths in found.items() if paths}


def _paths(files: Any) -> list[tuple[Path, str]]:
    """Files, each with its path below the folder that was given, or its name."""
    paths = []
    for entry in files if isinstance(files, (list, tuple)) else [files]:
        path = Path(entry).expanduser()
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in BUILDERS)
            paths += [(file, str(file.relative_to(path))) for file in inside]
        elif path.is_file() and path.suffix.lower() in BUILDERS:
            paths.append((path, path.name))
        else:
            raise ValueError(
                f"files: got {str(entry)!r}, allowed are folders and files that exist ({', '.join(BUILDERS)})."
            )
    return paths


def _load(
    name: str,
    chosen: FineTuningSet,
    config: str | None,
    data_files: dict[str, list[str]] | None,
    max_rows: int | None,
    seed: int,
) -> dict[str, "Dataset"]:
    import datasets

    streaming = max_rows is not None
    columns = ", ".join(chosen.columns)
    try:
        if data_files is not None:
            builder = BUILDERS[Path(next(iter(data_files.values()))[0]).suffix.lower()]
            source = datasets.load_dataset(builder, data_files=data_files, streaming=streaming)
        else:
            source = datasets.load_dataset(
                chosen.repository,
                config or chosen.config,
                data_dir=chosen.data_dir,
                revision=chosen.revision,
                streaming=streaming,
            )
        return {split: _drawn(rows, max_rows, seed) if streaming else rows for split, rows in source.items()}
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"files: {name!r} cannot be read ({error.__cause__ or error}).") from error
    except OSError as error:
        if data_files is not None:
            raise ValueError(f"files: {name!r} cannot be read ({error}).") from error
        raise ValueError(
            f"name: {name!r} is {chosen.repository} on the Hub, which cannot be had ({str(error).splitlines()[0]}); "
            f"pass local files with the columns {columns} as files=... ({', '.join(BUILDERS)}, or a folder of them)."
        ) from error


def _drawn(stream: Any, max_rows: int, seed: int) -> "Dataset":
    from datasets import Dataset

    return Dataset.from_list(list(stream.shuffle(seed=seed, buffer_size=SHUFFLED).take(max_rows)))


def _rendered(rows: "Dataset", chosen: FineTuningSet, name: str) -> "Dataset":
    """
    Prompt, completion and the group's digest of every row with a completion.

    Raises:
        ValueError: a column is missing.
    """
    if chosen.columns == ("sentence",) and rows.column_names == ["text"]:
        rows = rows.rename_column("text", "sentence")
    missing = [column for column in chosen.columns if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"files: {name!r} has no column {missing[0]!r} but {', '.join(rows.column_names)}; allowed are "
            f"the columns {', '.join(chosen.columns)}."
        )

    def render(row: dict) -> dict:
        prompt, completion = chosen.render(row)
        group = "\0".join(str(row[column]) for column in chosen.group)
        digest = hashlib.blake2b(group.encode("utf-8", errors="surrogatepass"), digest_size=8).digest()
        return {"prompt": prompt, "completion": completion or "", "group": int.from_bytes(digest, "big", signed=True)}

    made = rows.map(render, remove_columns=rows.column_names, desc=name)
    kept = made.filter(lambda completion: bool(completion.strip()), input_columns="completion", desc=name)
    if len(kept) < len(made):
        logger.warning(f"{len(made) - len(kept)} of {len(made)} rows of {name} have no completion and were left out.")
    return kept


def _split(source: dict[str, "Dataset"], validation: float, test: float, seed: int) -> "DatasetDict":
    from datasets import DatasetDict, concatenate_datasets

    kept = {split: rows for split, rows in source.items() if split in ("validation", "test") and "train" in source}
    others = [rows for split, rows in source.items() if split not in kept]
    pool = concatenate_datasets(others)
    groups = {split: np.array(rows["group"], dtype=np.int64) for split, rows in kept.items()}
    if "test" in kept and "validation" in kept:
        inside = ~np.isin(groups["validation"], groups["test"])
        kept["validation"] = kept["validation"].select(np.flatnonzero(inside))
    of_row = np.array(pool["group"], dtype=np.int64)
    free = ~np.isin(of_row, np.concatenate([*groups.values(), np.array([], dtype=np.int64)]))
    order = np.unique(of_row[free]).tolist()
    random.Random(seed).shuffle(order)
    begin = 0
    for split, share in (("test", test), ("validation", validation)):
        if split not in kept:
            size = max(1, round(share * len(order)))
            taken = np.isin(of_row, order[begin : begin + size]) & free
            kept[split], free, begin = pool.select(np.flatnonzero(taken)), free & ~taken, begin + size
    kept["train"] = pool.select(np.flatnonzero(free))
    for split, rows in kept.items():
        if not len(rows):
            raise ValueError(f"files: there are too few rows ({len(pool)}) for three splits, {split} is empty.")
    return DatasetDict({split: kept[split].remove_columns("group") for split in ("train", "validation", "test")})
