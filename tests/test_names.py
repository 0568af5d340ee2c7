"""Names of models and texts that are not there: refused at once, with what may have been meant."""

import socket
import subprocess

import pytest

from modeling_manticore.building.names import check_name, hint, not_here
from modeling_manticore.commands import main
from modeling_manticore.tasks.text import corpus


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "a-gpt-neox").mkdir()
    (tmp_path / "notes.txt").write_text("words")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_cannot_be_a_repository_is_refused_at_once(here):
    for name in ("./a-gpt-neo", "../x", "~/x", "/nowhere/x", "runs/x/model", "a-gpt-neo/", "a b", "a\\b"):
        with pytest.raises(ValueError, match="^model: there is no such folder"):
            check_name(name, "model")
    with pytest.raises(ValueError, match=r"there is no such folder; did you mean 'a-gpt-neox'\?$"):
        check_name("./a-gpt-neo", "model")
    with pytest.raises(ValueError, match="it is a file"):
        check_name("notes.txt", "model")
    for name in ("a-gpt-neox", "./a-gpt-neox", "a-gpt-neo", "EleutherAI/pythia-70m", "gpt2"):
        check_name(name, "model")
    assert not_here("a-gpt-neo") == "There is no folder 'a-gpt-neo' here either; did you mean 'a-gpt-neox'?"
    assert hint("nothing-alike") == hint("no/such/place") == "."


def test_a_missing_text_is_told_to_be_missing(here):
    with pytest.raises(ValueError, match=r"got 'note.txt', but there is no such file or folder; did you mean 'notes"):
        corpus("note.txt")
    with pytest.raises(ValueError, match="Built in are bible, shakespeare, python, topics"):
        corpus("bibel")
    (here / "notes.md").write_text("words")
    with pytest.raises(ValueError, match=r"allowed are .txt and .jsonl files"):
        corpus("notes.md")


def test_every_command_refuses_a_mistyped_folder_at_once(here, capsys, monkeypatch):
    def asked(*given, **named):
        raise AssertionError("somebody asked the Hub")

    monkeypatch.setattr(socket.socket, "connect", asked)
    monkeypatch.setattr(subprocess, "Popen", asked)
    texts = ["--texts", "notes.txt"]
    for words in (
        ["describe", "runs/a/b"],
        ["evaluate", "--model", "./x", *texts],
        ["discretize", "--model", "./x", "--output_folder", "y"],
        ["train", "--model", "./x", "--output_dir", "y", "--train_texts", "notes.txt"],
        ["search", "--components", "./x", "a-gpt-neox", "--num_blocks", "2", "--output_folder", "y", *texts],
        ["compose", "--components", "./x", "a-gpt-neox", "--num_blocks", "2", "--output_folder", "y"],
        ["space", "./x"],
        ["verify", "./x"],
    ):
        assert main(words) == 2, words
        told = capsys.readouterr().err
        assert "there is no such folder" in told and "tokenizer" not in told, words
    assert not (here / "y").exists()


def test_a_hub_that_cannot_be_reached_is_told_with_the_folder_that_was_meant(here, capsys, monkeypatch):
    def away(operation, request, **options):
        raise HubError("the Hub at https://x cannot be reached.", "connection")

    from modeling_manticore.building import sources
    from modeling_manticore.hub.transfer import HubError

    monkeypatch.setattr(sources, "call", away)
    monkeypatch.setattr(sources, "is_offline_mode", lambda: False)
    assert main(["evaluate", "--model", "a-gpt-neo", "--texts", "notes.txt"]) == 1
    told = capsys.readouterr().err
    assert "the Hub at https://x cannot be reached. There is no folder 'a-gpt-neo' here either; did you mean" in told
