"""Language modelling on packed rows of one or several texts, as a task of an experiment."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..tasks.mad.settings import require_integer


if TYPE_CHECKING:
    from datasets import DatasetDict


def text_rows(
    texts: list[str],
    tokenizer: str,
    row_length: int = 64,
    train_rows: int = 4096,
    validation_rows: int = 256,
    test_rows: int = 256,
    characters: int = 3_000_000,
    seed: int = 0,
) -> "DatasetDict":
    """
    Rows of `row_length` tokens, an equal share of every text, as train, validation and test; labels are the inputs.

    Args:
        texts: bible, python, topics, or .txt/.jsonl files and folders.
        tokenizer: folder or repository; that of the components.
        characters: read of every text.
        seed: of the order of the rows. Which documents are in which split does not depend on it.

    Raises:
        ValueError: as `check_text_rows`, `corpus` and `pack`.
    """
    from datasets import Dataset, DatasetDict

    from ..commands.models import load_tokenizer
    from ..tasks.text import corpus, interleave, pack, shorten, split

    check_text_rows(texts, tokenizer, row_length, train_rows, validation_rows, test_rows, characters, seed)
    own = load_tokenizer(tokenizer)
    parts = [split(shorten(corpus(name), characters)) for name in texts]
    wanted = {"train": ("train", train_rows), "validation": ("search", validation_rows), "test": ("test", test_rows)}
    made = {}
    for name, (part, rows) in wanted.items():
        packed = [pack(own, getattr(documents, part), row_length) for documents in parts]
        # Evaluation rows are the same for every seed, so that seeds differ by their training alone.
        chosen = interleave(packed, rows, seed if name == "train" else 0).tolist()
        made[name] = Dataset.from_dict({"input_ids": chosen, "labels": chosen})
    return DatasetDict(made)


def check_text_rows(
    texts: list[str],
    tokenizer: str,
    row_length: int,
    train_rows: int,
    validation_rows: int,
    test_rows: int,
    characters: int,
    seed: int,
) -> None:
    """
    Raises:
        ValueError: a number is too small, or a text or the tokenizer is neither known nor there.
    """
    from ..tasks.text import BUILT_IN

    sizes = {"train_rows": train_rows, "validation_rows": validation_rows, "test_rows": test_rows}
    for name, value in (sizes | {"characters": characters}).items():
        require_integer(name, value, 1)
    require_integer("row_length", row_length, 2)
    if not isinstance(texts, list) or not texts or not all(isinstance(name, str) for name in texts):
        raise ValueError(f"texts: got {texts!r}, allowed is a list of names or paths.")
    for name in texts:
        if name not in BUILT_IN and not Path(name).exists():
            raise ValueError(f"texts: got {name!r}, allowed are {', '.join(BUILT_IN)}, files and folders.")
    if not isinstance(tokenizer, str) or not tokenizer:
        raise ValueError(f"tokenizer: got {tokenizer!r}, allowed is a folder or repository.")
    if Path(tokenizer).is_absolute() and not Path(tokenizer).is_dir():
        raise ValueError(f"tokenizer: got {tokenizer!r}, which is no folder, allowed is a folder or repository.")
