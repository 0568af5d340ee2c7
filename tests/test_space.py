"""The Space of a hybrid: what is in it, how it is pushed, its app without gradio, and in a browser with it."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time

import pytest
import yaml
from browser import Browser, screenshots
from command_runs import component_folders, options
from loopback import LoopbackHub
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_manticore import ManticoreForCausalLM, push_hybrid
from modeling_manticore.commands import main
from modeling_manticore.hub.space import push_space, write_space


FILES = {"README.md", "app.py", "hybrid.svg", "requirements.txt", "space.json"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a saved hybrid of two component folders."""
    root = component_folders(tmp_path_factory.mktemp("space"))
    parts = [str(root / "gpt_neox"), str(root / "mamba2")]
    blocks = [[{"component": 0, "start": 0, "stop": 1}], [{"component": 1, "start": 1, "stop": 2}]]
    words = options(components=parts, output_folder=root / "my-hybrid", blocks=json.dumps(blocks))
    assert not main(["compose", *words])
    return root / "my-hybrid"


@pytest.fixture(scope="module")
def written(saved, tmp_path_factory):
    """A Space in a folder, made by the command."""
    folder = tmp_path_factory.mktemp("written") / "space"
    assert not main(["space", str(saved), *options(output_folder=folder)])
    return folder


@pytest.fixture(scope="module")
def app(written):
    """The Space's app as a module."""
    spec = importlib.util.spec_from_file_location("space_app", written / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def front_matter(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.S)[1])


def test_what_is_in_a_folder(saved, written):
    files = {path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()}
    assert files > FILES and {"model/config.json", "model/model.safetensors", "model/tokenizer.json"} < files
    settings = json.loads((written / "space.json").read_text())
    assert settings["hybrid"] == {"name": "my-hybrid", "source": "model", "revision": None}
    assert [entry["name"] for entry in settings["components"]] == ["gpt_neox", "mamba2"]
    front = front_matter((written / "README.md").read_text())
    assert front["sdk"] == "gradio" and front["app_file"] == "app.py" and front["title"] == "my-hybrid"
    assert (written / "hybrid.svg").read_text().count("<svg") == 1
    assert "modeling_manticore" not in (written / "app.py").read_text()


def test_the_app_streams_and_compares(saved, app):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    inputs = tokenizer("The list of", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    expected = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    texts = list(app.stream(0, "The list of", 12))
    assert len(texts) > 3 and all(b.startswith(a) for a, b in zip(texts, texts[1:])) and texts[-1] == expected
    alone, together = list(app.answers("The list of", False, 12)), list(app.answers("The list of", True, 12))
    assert alone[-1] == [expected, "", ""] and together[-1][0] == expected
    component, words = AutoModelForCausalLM.from_pretrained(saved.parent / "mamba2"), inputs["input_ids"]
    ids = component.generate(words, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    assert together[-1][2] == tokenizer.decode(ids[0, words.shape[1] :], skip_special_tokens=True)
    assert all(together[-1])
    assert list(app.stream(0, "The list of", 12, 1.0))[-1]


def test_what_the_app_says_of_bad_prompts(app, monkeypatch):
    with pytest.raises(ValueError, match="Type a prompt first"):
        next(app.stream(0, "  "))
    with pytest.raises(ValueError, match="The prompt is too long: my-hybrid reads at most"):
        next(app.stream(0, "word " * 5000))

    def broken(*arguments, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(app.load(0)[0], "generate", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(app.stream(0, "The"))


def test_bad_input(saved, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("x")
    cases = [
        (["space", str(saved), "--output_folder", str(full)], "output_folder: got"),
        (["space", str(saved.parent / "gpt_neox"), "--output_folder", str(tmp_path / "a")], "which is no hybrid"),
        (["space", str(saved), "--to", "a b", "--allow_local_sources"], "to: got 'a b'"),
        (["space", str(saved), "--to", "a", "--output_folder", str(tmp_path / "a")], "give at most one of the two"),
        (["space", str(saved), "--revision", "v1", "--output_folder", str(tmp_path / "a")], "revision: got 'v1'"),
    ]
    for words, message in cases:
        assert main(words) == 2 and message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"full"} and len(list(full.iterdir())) == 1


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with LoopbackHub(tmp_path / "hub") as hub:
        for name, value in hub.environment(tmp_path / "cache").items():
            monkeypatch.setenv(name, value)
        yield hub


def test_it_is_pushed_in_one_commit(saved, hub, capsys):
    model = ManticoreForCausalLM.from_pretrained(saved)
    for component, name in zip(model.config.components, ("someone/gpt_neox", "someone/mamba2")):
        component.source, component.revision = name, "a" * 40
    commit = push_hybrid(model, AutoTokenizer.from_pretrained(saved), "tester/hybrid").oid
    hub.faults.clear()
    assert main(["space", "tester/hybrid"]) == 0
    assert "5 files changed." in capsys.readouterr().out
    repository = hub.store.repositories["tester/hybrid-space"]
    files = repository.find("main").files
    assert set(files) >= FILES and not any(name.startswith("model") for name in files)
    history = len(repository.history())
    assert main(["space", "tester/hybrid"]) == 0 and "no commit" in capsys.readouterr().out
    assert len(repository.history()) == history

    settings = json.loads(hub.store.read(files["space.json"]))
    assert settings["hybrid"] == {"name": "hybrid", "source": "tester/hybrid", "revision": commit}
    assert [(c["source"], c["revision"]) for c in settings["components"]] == [
        ("someone/gpt_neox", "a" * 40),
        ("someone/mamba2", "a" * 40),
    ]
    front = front_matter(hub.store.read(files["README.md"]).decode())
    assert front["models"] == ["tester/hybrid", "someone/gpt_neox", "someone/mamba2"]


def test_a_folder_goes_along_without_local_paths(saved, hub):
    with pytest.raises(ValueError, match="allow_local_sources: got False"):
        push_space(saved, "tester/whole")
    assert "tester/whole" not in hub.store.repositories
    push_space(saved, "tester/whole", allow_local_sources=True, private=True)
    files = hub.store.repositories["tester/whole"].find("main").files
    assert {"app.py", "model/config.json", "model/model.safetensors", "model/modeling_manticore.py"} <= set(files)


# ---------------------------------------------------------------------- in a browser
SLOW = """
import runpy, sys, time, torch
from transformers import PreTrainedModel
forward = torch.nn.Module.__call__
def slow(self, *inputs, **options):
    if isinstance(self, PreTrainedModel) and self.config.model_type == "manticore" and hasattr(self, "heads"):
        time.sleep(0.03)
    return forward(self, *inputs, **options)
torch.nn.Module.__call__ = slow
runpy.run_path(sys.argv[1], run_name="__main__")
"""  # a tiny hybrid writes faster than a browser shows


@pytest.fixture
def running(written):
    """The address of the app, run as a user runs it, but that the hybrid takes 30 ms a token."""
    pytest.importorskip("gradio", reason="gradio is not installed (extra space)")
    environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONUNBUFFERED": "1"}
    log = written.parent / "app.log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW, str(written / "app.py")],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        end = time.monotonic() + 300
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-2000:]
            time.sleep(0.2)
        yield found[0]
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.browser
@pytest.mark.timeout(600)
def test_type_stream_compare(running, tmp_path, app):
    expected = list(app.answers("The list of", True, 64))[-1]
    browser = Browser(tmp_path)
    try:
        tab = browser.page()
        tab.open(running)
        tab.wait("!!document.querySelector('#write') && !!document.querySelector('#prompt textarea')")
        tab.run("document.querySelector('#prompt textarea').focus()")
        tab.call("Input.insertText", text="The list of")
        # What untrained models write has control characters, which a text box does not keep.
        boxes = "[0, 1, 2].map(i => document.querySelector(`#answer${i} textarea`).value.replace(/[^A-Za-z0-9]/g, ''))"
        plain = [re.sub("[^A-Za-z0-9]", "", text) for text in expected]
        first = boxes.replace("[0, 1, 2]", "[0]")
        tab.run(f"window.seen = new Set(); window.watch = setInterval(() => window.seen.add({first}[0]), 5); 1")
        assert tab.run("!document.querySelector('#answer1')")  # not asked for yet
        tab.move("#compare input", click=True)
        tab.wait("[0, 1, 2].every(i => document.querySelector(`#answer${i} textarea`))")
        tab.move("#write", click=True)
        tab.wait(f"JSON.stringify({boxes}) === JSON.stringify({json.dumps(plain)})")
        seen = tab.run("[...window.seen]")
        assert len(seen) >= 3 and all(plain[0].startswith(text) for text in seen)  # it came word by word
        assert tab.run("document.querySelectorAll('#picture svg').length") == 1
        kept = screenshots(tmp_path)
        tab.screenshot(kept / "space_light.png")
        for kind, view in {"dark": {"dark": True}, "phone": {"width": 380, "height": 800}}.items():
            other = browser.page(**view)
            other.open(running)
            other.wait("!!document.querySelector('#write') && !!document.querySelector('#picture svg')")
            assert other.run("document.documentElement.scrollWidth - innerWidth") <= 0
            other.screenshot(kept / f"space_{kind}.png")
        assert not tab.problems
    finally:
        browser.close()


def test_a_space_without_matplotlib(saved, tmp_path, monkeypatch):
    def missing(*arguments, **options):
        raise ImportError("matplotlib")

    monkeypatch.setattr("modeling_manticore.hub.space.draw_hybrid", missing)
    folder = write_space(saved, tmp_path / "plain")
    assert not (folder / "hybrid.svg").exists() and (folder / "app.py").is_file()
