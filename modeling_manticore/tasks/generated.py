"""Data sets that are made: rows in chunks that any number of workers make alike, no row twice, kept on disk."""

import hashlib
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .mad.draws import Draws
from .mad.settings import require_integer
from .text import cache_folder, fingerprint


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SPLITS = ("train", "validation", "test")
# Streams of one split; a set never needs so many chunks.
STREAMS = 2**40
# So many chunks without a new row, or rows looked at for a wanted one, and the search is given up.
EMPTY_CHUNKS = 20
ROWS_A_ROW = 50
AGAIN = 2**16
# Arrow counts the numbers of one array of lists with 31 bits.
NUMBERS_AN_ARRAY = 2**30


@dataclass
class Rows:
    """
    Rows of lists and a label.

    Attributes:
        columns: of each list column, the lists of all rows end to end, (sum of lengths,) uint8.
        lengths: (rows,) int64, the same for all columns.
        labels: (rows,) int64.
    """

    columns: dict[str, np.ndarray]
    lengths: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def lists(self, column: str) -> list[np.ndarray]:
        """The lists of a column, one array a row, views."""
        return np.split(self.columns[column], np.cumsum(self.lengths)[:-1]) if len(self) else []

    def kept(self, keep: np.ndarray) -> "Rows":
        """The rows where `keep`, (rows,) bool, is True, in their order."""
        if keep.all():
            return self
        numbers = np.repeat(keep, self.lengths)
        columns = {name: column[numbers] for name, column in self.columns.items()}
        return Rows(columns, self.lengths[keep], self.labels[keep])


def joined(parts: list[Rows]) -> Rows:
    """Rows of all parts, one after the other (at least one part)."""
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
    return Rows(
        columns, np.concatenate([part.lengths for part in parts]), np.concatenate([part.labels for part in parts])
    )


def check_sizes(rows: tuple[int, int, int], seed: int, workers: int | None) -> None:
    """
    Raises:
        ValueError: rows are no three integers of at least 1, or seed or workers no integer in range.
    """
    if not isinstance(rows, (tuple, list)) or len(rows) != 3:
        raise ValueError(f"rows: got {rows!r}, allowed are three integers, of train, validation and test.")
    for split, count in zip(SPLITS, rows):
        require_integer(f"rows ({split})", count, 1)
    require_integer("seed", seed, 0)
    if workers is not None:
        require_integer("workers", workers, 1)


def make_splits(
    make_chunk: Callable[[Draws], Rows], rows: tuple[int, int, int], seed: int, workers: int | None, hint: str
) -> dict[str, Rows]:
    """
    Train, validation and test rows, none of them twice. Chunk c of a split is made from a stream of the generator that
    belongs to it, and chunks are taken in their order: rows depend neither on the number of workers (threads; None: as
    many as there are cores) nor on how many rows are made after them.

    Args:
        make_chunk: makes some rows, at times none, from random numbers alone.
        hint: what to change where rows run out, for the message.

    Raises:
        ValueError: there are too few different rows.
    """
    workers = workers or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count()))
    wanted = dict(zip(SPLITS, rows))
    taken: set[bytes] = set()
    made = {}
    with ThreadPoolExecutor(workers) as pool:
        # The train split comes last: its size must not change what the others are.
        for number, split in enumerate(reversed(SPLITS)):
            chunks = _in_order(
                pool, workers, lambda chunk, base=number * STREAMS: make_chunk(Draws(seed, base + chunk))
            )
            made[split] = _unseen(chunks, wanted[split], taken, f"rows ({split})", hint)
    return {split: made[split] for split in SPLITS}


def _in_order(pool: ThreadPoolExecutor, workers: int, make: Callable[[int], Rows]) -> Iterator[Rows]:
    """Endless: make(0), make(1), ..., a few of them ahead in the pool."""
    ahead: deque = deque()
    number = 0
    try:
        while True:
            while len(ahead) <= workers:
                ahead.append(pool.submit(make, number))
                number += 1
            yield ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()


def _unseen(chunks: Iterator[Rows], wanted: int, taken: set[bytes], field: str, hint: str) -> Rows:
    """The first rows that are not among those taken, which they join."""
    parts: list[Rows] = []
    found = looked_at = empty = 0
    for rows in chunks:
        keep = np.zeros(len(rows), dtype=bool)
        for number, row in enumerate(rows.lists("input_ids")):
            content = hashlib.blake2b(row, digest_size=16).digest()
            if found < wanted and content not in taken:
                taken.add(content)
                keep[number] = True
                found += 1
        if keep.any():
            parts.append(rows.kept(keep))
        if found == wanted:
            break
        looked_at += len(rows)
        empty = 0 if keep.any() else empty + 1
        if empty == EMPTY_CHUNKS or looked_at > ROWS_A_ROW * wanted + AGAIN:
            raise ValueError(
                f"{field}: got {wanted}, but only {found} rows were found that are in no split yet; allowed are fewer "
                f"rows, or {hint}."
            )
    chunks.close()
    return joined(parts)


def as_dataset(rows: Rows, label_names: list[str]) -> "Dataset":
    """A `datasets.Dataset`: the list columns as uint8 (int64 in torch format), and `label`, a ClassLabel."""
    import pyarrow
    from datasets import ClassLabel, Dataset, DatasetInfo, Features, List, Value

    batch = max(1, NUMBERS_AN_ARRAY // int(rows.lengths.max()))
    ends = np.concatenate([[0], np.cumsum(rows.lengths)])
    columns: dict = {}
    for name, numbers in rows.columns.items():
        arrays = []
        for start in range(0, len(rows), batch):
            offsets = ends[start : start + batch + 1]
            values = pyarrow.array(numbers[offsets[0] : offsets[-1]])
            arrays.append(pyarrow.ListArray.from_arrays((offsets - offsets[0]).astype(np.int32), values))
        columns[name] = pyarrow.chunked_array(arrays)
    columns["label"] = pyarrow.array(rows.labels)
    features = {name: List(Value("uint8")) for name in rows.columns} | {"label": ClassLabel(names=label_names)}
    return Dataset(pyarrow.table(columns), info=DatasetInfo(features=Features(features)))


def kept_on_disk(
    name: str, settings: object, make: Callable[[], "DatasetDict"], cache: str | os.PathLike | bool | None
) -> "DatasetDict":
    """
    The set from the cache folder, where a set of the name was kept for equal settings; else it is made and kept,
    written beside its place and then moved.

    Args:
        settings: all that the set depends on, with a repr of its own.
        cache: a folder, None for `cache_folder()`, False to keep nothing.
    """
    from datasets import load_from_disk

    if cache is False:
        return make()
    place = cache_folder(cache) / f"{name}-{fingerprint(settings)}"
    if not place.is_dir():
        data = make()
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{name}-") as folder:
            written = Path(folder) / "set"
            data.save_to_disk(written)
            try:
                os.replace(written, place)
            except OSError:
                # Another process was faster; its set is the same.
                if not place.is_dir():
                    raise
    return load_from_disk(place)
