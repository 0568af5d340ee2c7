"""Texts: corpora, files, splits without overlap, rows."""

import json

import pytest
import torch

from modeling_manticore.tasks import packages
from modeling_manticore.tasks import text as T


@pytest.fixture(scope="module")
def tokenizer():
    return T.train_tokenizer(T.help_topics()[:40], 400)


def test_built_in_corpora():
    topics, source = T.corpus("topics"), T.corpus("python")
    assert len(topics) > 50 and len(source) > 300
    assert any("class OrderedDict" in document for document in source)
    assert T.python_source() == source


def test_prose_falls_back_where_nothing_can_be_fetched(tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(packages, "_relayed", fail)
    assert T.bible(tmp_path) == T.help_topics()
    assert "could not be fetched (no network)" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_prose_is_read_by_chapters(tmp_path):
    verses = [
        {"book": "Ruth", "chapter": 1, "verse": 1, "text": "Now"},
        {"book": "Ruth", "chapter": 1, "verse": 2, "text": "And"},
        {"book": "Ruth", "chapter": 2, "verse": 1, "text": "Then"},
    ]
    (tmp_path / "kjv.jsonl").write_text("\n".join(map(json.dumps, verses)))
    assert T.bible(tmp_path) == ["Ruth 1\nNow\nAnd", "Ruth 2\nThen"]


def test_files_and_folders(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('"first"\n\n{"text": "other"}\n')
    (tmp_path / "ignored.py").write_text("x")
    assert T.corpus(str(tmp_path)) == ["first", "other", "second"]
    assert T.read_texts(tmp_path / "b.txt") == ["second"]


BAD_FILES = {
    "absent": (None, None, "no such file or folder. Built in are bible, shakespeare, python, topics"),
    "kind": ("a.csv", b"x", "allowed are .txt and .jsonl"),
    "encoding": ("a.txt", b"\xff\xfe\xfa", "is not UTF-8"),
    "json": ("a.jsonl", b"{", "line 1 is not JSON"),
    "entry": ("a.jsonl", b'"a"\n[1]', "line 2: allowed is a string or an object with 'text'"),
    "empty": ("a.txt", b" \n", "holds no text"),
}


@pytest.mark.parametrize("name, content, message", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(name, content, message, tmp_path):
    file = tmp_path / (name or "absent")
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        T.corpus(str(file))


@pytest.mark.parametrize("documents", [[f"document {i} " * 30 for i in range(60)], ["line of text\n" * 900]])
def test_splits_share_nothing_and_are_repeatable(documents):
    if len(documents) == 1:
        documents = ["".join(f"line {i}\n" for i in range(2000))]
    splits = T.split([*documents, documents[0]], seed=3)
    parts = (splits.train, splits.search, splits.test)
    everything = [text for part in parts for text in part]
    assert len(everything) == len(set(everything))
    assert sum(map(len, everything)) == sum(map(len, documents))
    share = sum(map(len, splits.test)) / sum(map(len, everything))
    assert 0.1 <= share < 0.2
    assert T.split([*documents, documents[0]], seed=3) == splits
    assert T.split(documents, seed=4) != splits


def test_too_little_to_split():
    with pytest.raises(ValueError, match="too few for three parts"):
        T.split(["a", "b"])
    with pytest.raises(ValueError, match="allowed are positive with a sum below 1"):
        T.split(["a"] * 30, search=0.5, test=0.5)


def test_rows_hold_the_text_in_order(tokenizer):
    texts = ["def f(x):\n    return x\n" * 9, "The quick brown fox. " * 9]
    rows = T.pack(tokenizer, texts, 16)
    assert rows.shape[1] == 16 and rows.dtype == torch.long
    joined = T.END_OF_TEXT.join(texts) + T.END_OF_TEXT
    assert joined.startswith(tokenizer.decode(rows.flatten()))
    assert int((rows == tokenizer.eos_token_id).sum()) >= 1
    with pytest.raises(ValueError, match="allowed is at least one row of 999"):
        T.pack(tokenizer, "short", 999)


def test_tokenizer_loses_nothing(tokenizer):
    text = "naïve\t  ✓ \n\nשלום"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    with pytest.raises(ValueError, match="vocab_size: got 200"):
        T.train_tokenizer(["a"], 200)


def test_interleaved_rows_are_balanced():
    parts = [torch.zeros(3, 4, dtype=torch.long), torch.ones(50, 4, dtype=torch.long)]
    rows = T.interleave(parts, 21, seed=1)
    assert rows.shape == (21, 4) and int(rows[:, 0].sum()) == 10
    assert torch.equal(rows, T.interleave(parts, 21, seed=1))
    assert not torch.equal(rows, T.interleave(parts, 21, seed=2))


def test_shortening_keeps_whole_documents():
    documents = ["x" * n for n in range(1, 40)]
    kept = T.shorten(documents, 100)
    assert sum(map(len, kept)) <= 100 and set(kept) <= set(documents) and kept == T.shorten(documents, 100)
    assert len(T.shorten(["y" * 500], 10)) == 1


def test_dataset_is_ready_for_the_trainer():
    rows = torch.arange(12).view(3, 4)
    data = T.as_dataset(rows)
    assert data[1] == {"input_ids": [4, 5, 6, 7], "attention_mask": [1] * 4, "labels": [4, 5, 6, 7]}
