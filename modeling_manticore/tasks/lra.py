"""
Image, Text and Retrieval of the Long Range Arena (arXiv 2011.04006) from the user's own copies of CIFAR-10, IMDB and
AAN, and small built-in stand-ins, named so: scikit-learn's digits and movie snippets.

Every function returns a `datasets.DatasetDict` of train, validation and test with the columns input_ids (one
sequence) and label (a class). Tokens are a byte or a grey value plus 1, so that 0 is free for padding: it is the
`pad_token_id` of a model that classifies sequences, and `collate` pads with it. `metric` is the accuracy beside the
majority baseline.
"""

import csv
import os
import random
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .mad.settings import require_integer
from .metrics import classification_accuracy
from .packages import fetch_member, reason_of
from .text import cache_folder


if TYPE_CHECKING:
    from datasets import DatasetDict

PAD = 0
BYTE_VOCABULARY = 257  # padding, then 256 bytes or grey values
SEPARATOR = 257
RETRIEVAL_VOCABULARY = 258
DIGITS_VOCABULARY = 18  # padding, then grey values 0..16

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR_RECORD = 1 + 3 * 32 * 32
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
AAN_FILES = {"train": "new_aan_pairs.train.tsv", "validation": "new_aan_pairs.eval.tsv"}
AAN_FILES["test"] = "new_aan_pairs.test.tsv"
SNIPPETS_PACKAGE = "vaderSentiment==3.3.2"
SNIPPETS_MEMBERS = ("additional_resources/hutto_ICWSM_2014.tar.gz", "movieReviewSnippets_GroundTruth.txt")

Example = tuple[bytes, int]

metric = classification_accuracy


def image_task(folder: str | os.PathLike, validation: float = 0.1, seed: int = 0) -> "DatasetDict":
    """
    LRA's Image: grey images as sequences of pixels, row by row; 1,024 steps and 10 classes for CIFAR-10.

    Args:
        folder: CIFAR-10's binary version (`data_batch_1.bin` ... `test_batch.bin`), or `train` and `test` with a
            folder of image files of one size for every class.
        validation: share of the training images.

    Raises:
        ValueError: none of both, a broken file, or the python version of CIFAR-10, whose files are pickles.
    """
    root = existing_folder(folder)
    if (root / "cifar-10-batches-bin").is_dir():
        root = root / "cifar-10-batches-bin"
    batches = sorted(root.glob("data_batch_*.bin"))
    if batches and (root / "test_batch.bin").is_file():
        train = [example for file in batches for example in _cifar(file)]
        return _classes(train, _cifar(root / "test_batch.bin"), CIFAR_CLASSES, validation, seed)
    if (root / "train").is_dir() and (root / "test").is_dir():
        names = sorted(path.name for path in (root / "train").iterdir() if path.is_dir())
        train, test = _images(root / "train", names), _images(root / "test", names)
        if len({len(pixels) for pixels, _ in train + test}) > 1:
            raise ValueError(f"folder: {str(root)!r} has images of several sizes, allowed is one.")
        return _classes(train, test, names, validation, seed)
    if any(root.glob("**/data_batch_[0-9]")):
        raise ValueError(
            f"folder: {str(root)!r} has the python version of CIFAR-10, whose files are pickles and are not read; "
            "allowed is the binary version (cifar-10-binary.tar.gz, unpacked) or folders of images."
        )
    raise ValueError(
        f"folder: got {str(root)!r}, allowed is a folder with data_batch_1.bin ... data_batch_5.bin and "
        "test_batch.bin, or with train/<class>/ and test/<class>/ of image files."
    )


def text_task(
    folder: str | os.PathLike, sequence_length: int = 4096, validation: float = 0.1, seed: int = 0
) -> "DatasetDict":
    """
    LRA's Text: film reviews as bytes, positive or negative.

    Args:
        folder: IMDB's `aclImdb`, with train and test, and pos and neg in each.
        sequence_length: longer reviews are cut; shorter ones stay short.
        validation: share of the training reviews (LRA itself validates on the test split).

    Raises:
        ValueError: the folder is not so.
    """
    require_integer("sequence_length", sequence_length, 1)
    root = existing_folder(folder)
    root = root / "aclImdb" if (root / "aclImdb").is_dir() else root
    names, parts = ("neg", "pos"), {"train": [], "test": []}
    for split, examples in parts.items():
        for label, name in enumerate(names):
            files = sorted((root / split / name).glob("*.txt"))
            if not files:
                raise ValueError(f"folder: {str(root)!r} has no {split}/{name}/*.txt, allowed is an aclImdb folder.")
            examples += [(file.read_bytes()[:sequence_length], label) for file in files]
    return _classes(parts["train"], parts["test"], names, validation, seed)


def retrieval_task(folder: str | os.PathLike, document_length: int = 4000) -> "DatasetDict":
    """
    LRA's Retrieval: two papers as bytes, does one cite the other? LRA reads them with two towers; here they are one
    sequence, with a separator (257) between.

    Args:
        folder: has AAN's new_aan_pairs.train.tsv, .eval.tsv and .test.tsv (label, two ids, two texts).
        document_length: bytes of a document; longer ones are cut.

    Raises:
        ValueError: a file is missing, or a line is no such pair.
    """
    require_integer("document_length", document_length, 1)
    root = existing_folder(folder)
    splits, taken = {}, set()
    for split in ("test", "validation", "train"):
        file, examples = root / AAN_FILES[split], []
        for first, second, label in _pairs(file):
            pair = first.encode()[:document_length], second.encode()[:document_length]
            if pair not in taken:
                taken.add(pair)
                examples.append((_tokens(pair[0]) + [SEPARATOR] + _tokens(pair[1]), label))
        splits[split] = examples
    return _datasets(splits, ("different", "same"))


def digits_standin(seed: int = 0) -> "DatasetDict":
    """
    A small stand-in for Image, not LRA's: scikit-learn's 1,797 digits of 8x8 pixels as 64 steps with 17 grey values,
    10 classes; 70 % train, 10 % validation, 20 % test. Needs scikit-learn.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "digits_standin: the digits come with scikit-learn, which is not installed (pip install scikit-learn)."
        ) from error
    digits = load_digits()
    pixels = digits.data.astype(np.uint8)
    examples = [(row.tobytes(), int(label)) for row, label in zip(pixels, digits.target)]
    return _three(examples, [str(digit) for digit in range(10)], seed)


def snippets_standin(
    sequence_length: int = 256, seed: int = 0, cache: str | os.PathLike | None = None
) -> "DatasetDict":
    """
    A small stand-in for Text, not LRA's: 10,605 snippets of film reviews (at most 257 bytes, most near 110) with the
    mean sentiment that people gave them, as bytes, positive or negative; those rated 0 are left out. 70 % train, 10 %
    validation, 20 % test. They come with a small package's source, fetched once into the cache folder.

    Raises:
        ValueError: they cannot be fetched.
    """
    require_integer("sequence_length", sequence_length, 1)
    kept = cache_folder(cache) / "movie_snippets.tsv"
    if not kept.is_file():
        try:
            fetch_member(SNIPPETS_PACKAGE, SNIPPETS_MEMBERS, kept, _snippets)
        except (OSError, subprocess.SubprocessError, tarfile.TarError, ValueError) as error:
            raise ValueError(
                f"snippets_standin: {SNIPPETS_PACKAGE} could not be fetched ({reason_of(error)}); allowed is a "
                f"package index, or the file movieReviewSnippets_GroundTruth.txt of its source as {str(kept)!r}."
            ) from error
    rated = _snippets(kept.read_text(encoding="utf-8"))
    examples = [(text.encode()[:sequence_length], int(rating > 0)) for rating, text in rated if rating]
    return _three(examples, ("negative", "positive"), seed)


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """A batch for the Trainer: input_ids padded with 0 at the end, (rows, longest), attention_mask, labels (rows)."""
    length = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros_like(input_ids)
    for number, row in enumerate(rows):
        size = len(row["input_ids"])
        input_ids[number, :size] = torch.as_tensor(row["input_ids"])
        mask[number, :size] = 1
    labels = torch.tensor([int(row["label"]) for row in rows])
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def existing_folder(folder: str | os.PathLike) -> Path:
    """
    Raises:
        ValueError: it is no path, or there is no such folder.
    """
    if not isinstance(folder, (str, os.PathLike)) or not Path(folder).expanduser().is_dir():
        raise ValueError(f"folder: got {str(folder)!r}, allowed is a folder that exists.")
    return Path(folder).expanduser()


def check_share(validation: float) -> None:
    """
    Raises:
        ValueError: it is no share.
    """
    if isinstance(validation, bool) or not isinstance(validation, (int, float)) or not 0 < validation < 1:
        raise ValueError(f"validation: got {validation!r}, allowed is a share above 0 and below 1.")


def _cifar(file: Path) -> list[Example]:
    """Records of one byte of class and 3 x 1,024 bytes of red, green and blue, as grey (ITU-R 601 luma)."""
    content = np.fromfile(file, dtype=np.uint8)
    if not len(content) or len(content) % CIFAR_RECORD:
        raise ValueError(
            f"folder: {file.name} has {len(content)} bytes, allowed is a multiple of {CIFAR_RECORD}, the bytes of an "
            "image of CIFAR-10's binary version."
        )
    records = content.reshape(-1, CIFAR_RECORD)
    labels = records[:, 0]
    if labels.max() > 9:
        raise ValueError(f"folder: {file.name} has class {labels.max()}, allowed is 0..9.")
    red, green, blue = records[:, 1:].reshape(-1, 3, 1024).astype(np.uint32).transpose(1, 0, 2)
    grey = ((299 * red + 587 * green + 114 * blue + 500) // 1000).astype(np.uint8)
    return [(row.tobytes(), int(label)) for row, label in zip(grey, labels)]


def _images(root: Path, names: list[str]) -> list[Example]:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("image_task: folders of images need Pillow, which is not installed.") from error
    examples = []
    for label, name in enumerate(names):
        files = [file for file in sorted((root / name).glob("*")) if file.suffix.lower() in IMAGE_SUFFIXES]
        if not files:
            raise ValueError(f"folder: {str(root / name)!r} has no images ({', '.join(IMAGE_SUFFIXES)}).")
        for file in files:
            try:
                with Image.open(file) as image:
                    examples.append((image.convert("L").tobytes(), label))
            except (OSError, UnidentifiedImageError) as error:
                raise ValueError(f"folder: {str(file)!r} is no image that can be read ({error}).") from error
    if len(names) < 2:
        raise ValueError(f"folder: {str(root)!r} has {len(names)} classes, allowed are at least 2 folders.")
    return examples


def _pairs(file: Path) -> Iterable[tuple[str, str, int]]:
    if not file.is_file():
        raise ValueError(
            f"folder: {str(file)!r} does not exist, allowed is a folder with {', '.join(AAN_FILES.values())}."
        )
    before = csv.field_size_limit(2**31 - 1)
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            for number, row in enumerate(csv.reader(opened, delimiter="\t", quoting=csv.QUOTE_NONE)):
                if len(row) != 5 or row[0] not in ("0", "1", "0.0", "1.0"):
                    raise ValueError(
                        f"folder: {file.name} line {number + 1} is no pair, allowed are label (0 or 1), two ids and "
                        "two texts with tabs between."
                    )
                yield row[3], row[4], int(float(row[0]))
    finally:
        csv.field_size_limit(before)


def _snippets(content: str) -> list[tuple[float, str]]:
    """Ratings and texts of lines of id, rating and text, with tabs between."""
    rows = []
    for number, line in enumerate(content.splitlines()):
        parts = line.split("\t")
        try:
            rows.append((float(parts[1]), parts[2]))
        except (IndexError, ValueError) as error:
            raise ValueError(f"movie snippets: line {number + 1} is not id, rating and text.") from error
    if not rows:
        raise ValueError("movie snippets: there are none.")
    return rows


def _three(examples: list[Example], names: Iterable[str], seed: int) -> "DatasetDict":
    """70, 10 and 20 % of one list, shuffled."""
    examples = _first_of_each(examples, set())
    _random(seed).shuffle(examples)
    test, validation = len(examples) // 5, len(examples) // 10
    splits = {"test": examples[:test], "validation": examples[test : test + validation]}
    return _byte_datasets(splits | {"train": examples[test + validation :]}, names)


def _classes(
    train: list[Example], test: list[Example], names: Iterable[str], validation: float, seed: int
) -> "DatasetDict":
    """The test split as it is, and validation a share of the train split, which loses what the test split has too."""
    check_share(validation)
    train = _first_of_each(train, {content for content, _ in test})
    _random(seed).shuffle(train)
    held = max(1, round(validation * len(train)))
    if held >= len(train):
        raise ValueError(
            f"validation: got {validation} of {len(train)} examples, allowed is a share that leaves some."
        )
    return _byte_datasets({"train": train[held:], "validation": train[:held], "test": test}, names)


def _first_of_each(examples: list[Example], taken: set[bytes]) -> list[Example]:
    return [example for example in examples if not (example[0] in taken or taken.add(example[0]))]


def _random(seed: int) -> random.Random:
    require_integer("seed", seed, 0)
    return random.Random(seed)


def _tokens(content: bytes) -> list[int]:
    return (np.frombuffer(content, dtype=np.uint8).astype(np.int64) + 1).tolist()


def _byte_datasets(splits: dict[str, list[Example]], names: Iterable[str]) -> "DatasetDict":
    return _datasets(
        {split: [(_tokens(content), label) for content, label in examples] for split, examples in splits.items()},
        names,
    )


def _datasets(splits: dict[str, list[tuple[list[int], int]]], names: Iterable[str]) -> "DatasetDict":
    from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

    features = Features({"input_ids": List(Value("int64")), "label": ClassLabel(names=list(names))})
    made = DatasetDict()
    for split in ("train", "validation", "test"):
        input_ids, labels = zip(*splits[split]) if splits[split] else ((), ())
        made[split] = Dataset.from_dict({"input_ids": input_ids, "label": labels}, features=features)
    return made
