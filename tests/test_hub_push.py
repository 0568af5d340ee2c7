"""What is pushed and what is refused; pictures; the Trainer's pushes; adapters; the commands; kills while saving."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loopback import TOKEN, LoopbackHub
from tiny import component, tokens
from travelling import TRAVELLING

from modeling_manticore import ManticoreForCausalLM, push_hybrid, verify
from modeling_manticore.commands import main
from modeling_manticore.hub.contents import cleaned_text, is_local, paths_in_text, pictures_of, sorted_out
from modeling_manticore.hub.push import push_folder
from modeling_manticore.hub.staging import remove_stale


CODE = set(TRAVELLING)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with LoopbackHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def online(hub, tmp_path, monkeypatch):
    """The variables that processes which talk to the Hub will have; this process stays offline."""
    for name, value in hub.environment(tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    hub.faults.clear()
    return hub


def hybrid():
    torch.manual_seed(0)
    return ManticoreForCausalLM.from_components(
        [component("gpt_neox"), component("mamba2")],
        blocks=[[{"component": 0, "start": 0, "stop": 2}], [{"component": 1, "start": 1, "stop": 3}]],
    )


def files_of(hub, repo, revision="main"):
    return hub.store.repositories[repo].find(revision).files


def test_version_and_hashes_stand_in_every_saved_configuration(tmp_path, capsys):
    hybrid().save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["manticore_version"] == "0.1.0" and set(config["manticore_files"]) == CODE
    assert verify(str(tmp_path / "saved")).problems == ()
    assert main(["verify", str(tmp_path / "saved")]) == 0 and "byte for byte" in capsys.readouterr().out
    with open(tmp_path / "saved" / "cache_manticore.py", "a") as file:
        file.write("# changed\n")
    (tmp_path / "saved" / "training_args.bin").write_bytes(b"\x80\x04.")
    assert main(["verify", str(tmp_path / "saved")]) == 1
    printed = capsys.readouterr().err
    assert "cache_manticore.py differs from that of the installed release" in printed and "pickled" in printed
    config["manticore_version"] = "0.0.1"
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    assert any("installed is 0.1.0" in problem for problem in verify(str(tmp_path / "saved")).problems)


def test_bad_arguments_are_refused_before_any_work(online, monkeypatch):
    model = hybrid()
    monkeypatch.setattr(type(model), "save_pretrained", lambda *a, **k: pytest.fail("it was saved"))
    repo, count = "tester/refused", len(online.requests)
    for arguments, options, message in (
        ((torch.nn.Linear(1, 1), None, repo), {}, "model: got Linear"),
        ((model, "gpt2", repo), {}, "tokenizer: got str"),
        ((model, None, "a/b/c"), {}, "repo_id: got 'a/b/c'"),
        ((model, None, repo), {"card": "no front matter"}, "card: it has no front matter"),
        ((model, None, repo), {"card": 3}, "card: got int"),
        ((model, None, repo), {"recipe": 3}, "recipe: got int"),
        ((model, None, repo), {"results": {"loss": float("nan")}}, "results: "),
        ((model, None, repo), {"create_pr": "yes"}, "create_pr: got 'yes'"),
        ((model, None, repo), {"commit_message": ""}, "commit_message: got ''"),
        ((model, None, repo), {"base_model": "a/b"}, "base_model: got one for a whole hybrid"),
        ((model, None, repo), {"recipe": {"data": ["/home/me/text.txt"]}}, "recipe.data[0] is '/home/me/text.txt'"),
        ((model, None, repo), {"card": "---\n---\nSee /home/me/x.\n"}, "card is '/home/me/x"),
        ((model, None, repo), {"token": False}, "token: there is none"),
    ):
        with pytest.raises(ValueError) as error:
            push_hybrid(*arguments, **options)
        assert message in str(error.value), error.value
    assert len(online.requests) == count


def test_local_sources(online, tmp_path):
    model, repo = hybrid(), "tester/local"
    folder = tmp_path / "component"
    folder.mkdir()
    model.config.components[0].source, model.config.components[1].source = str(folder), "tester/recurrent"
    with pytest.raises(ValueError, match=r"allow_local_sources: got False, but config.components\[0\].source is"):
        push_hybrid(model, None, repo)
    assert repo not in online.store.repositories
    push_hybrid(model, None, repo, allow_local_sources=True, recipe={"components": [str(folder), "tester/recurrent"]})
    files = files_of(online, repo)
    texts = {name: online.store.read(files[name]).decode() for name in ("config.json", "recipe.yaml", "README.md")}
    assert all(str(tmp_path) not in text for text in texts.values())
    assert [c["source"] for c in json.loads(texts["config.json"])["components"]] == ["local", "tester/recurrent"]
    front = texts["README.md"].split("---\n")[1]
    assert "base_model:\n- tester/recurrent\n" in front and "library_name: transformers" in front
    assert "pipeline_tag: text-generation" in front and "license" not in front
    assert model.config.components[0].source == str(folder)


def test_what_counts_as_a_local_path(tmp_path):
    for text in ("/home/me/model", "~/model", "C:\\models\\x", "file:///x/y", "\\\\server\\share"):
        assert is_local(text), text
    for text in ("EleutherAI/pythia-410m", "https://hf.co/a/b", "</s>", "/", "a /b", "silu", ""):
        assert not is_local(text), text
    assert is_local(str(tmp_path), "source") and is_local("./here", "source") and not is_local("a/b", "source")
    text = "From https://hf.co/a/b, [x](/org/name), 3/4, </s> and and/or; kept in /home/me/run-1 and ~/data/x."
    assert paths_in_text(text) == ["/home/me/run-1", "~/data/x"]
    text = f"C:\\runs\\x, \\\\server\\share, ~you/x, file:///x/y, ![y]({tmp_path})"
    assert len(paths_in_text(text)) == 5 and cleaned_text(text) == "local, local, local, local, ![y](local)"


def test_pictures_that_a_card_shows_go_along(online, tmp_path):
    for name in ("card/hybrid.png", "card/more/b c.svg", "card/notes.txt", "outside.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    shown = "![x](hybrid.png) <img width=3 src='more/b%20c.svg'> ![x](notes.txt) ![x](../outside.png) ![x](gone.png)"
    card = tmp_path / "card" / "README.md"
    card.write_text(f"---\nlibrary_name: transformers\n---\n{shown} ![x](https://example.org/hybrid.png)\n")
    assert pictures_of(card).keys() == {"hybrid.png", "more/b c.svg"}
    push_hybrid(hybrid(), None, "tester/pictures", card=card)
    files = files_of(online, "tester/pictures")
    assert {"README.md", "hybrid.png", "more/b c.svg"} <= files.keys() and "notes.txt" not in files
    assert online.store.read(files["hybrid.png"]) == b"card/hybrid.png"
    hybrid().save_pretrained(tmp_path / "saved")
    assert main(["push", str(tmp_path / "saved"), "tester/pictures-too", "--card", str(card)]) == 0
    repository = online.store.repositories["tester/pictures-too"]
    assert {"README.md", "hybrid.png"} <= repository.find("main").files.keys() and len(repository.history()) == 2


def test_what_stays_behind(tmp_path):
    for name in ("config.json", "model.safetensors", "cache_manticore.py", "LICENSE", "LICENSE.txt"):
        (tmp_path / name).write_bytes(b"{}")
    left = {"training_args.bin", "optimizer.pt", "rng_state.pth", "x.pkl", "trainer_state.json", ".env", "evil.py"}
    for name in left | {"run.log"}:
        (tmp_path / name).write_bytes(b"{}")
    files, found = sorted_out(tmp_path)
    assert set(found) == left | {"run.log"} and "LICENSE" in files and len(files) == 5
    (tmp_path / "innocent.json").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="innocent.json: it holds a pickle"):
        sorted_out(tmp_path)


def trained(hub, tmp_path, strategy, **options):
    from modeling_manticore import ManticoreTrainer, ManticoreTrainingArguments

    repo = options.pop("hub_model_id", f"tester/trained-{strategy}")
    args = ManticoreTrainingArguments(
        output_dir=str(tmp_path / strategy),
        stage="finetune",
        max_steps=2,
        save_steps=1,
        push_to_hub=True,
        hub_model_id=repo,
        hub_strategy=strategy,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 8)]
    trainer = ManticoreTrainer(hybrid(), args, train_dataset=rows)
    trainer.train()
    return trainer, repo


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_the_trainer_pushes_models_and_nothing_of_the_run(online, tmp_path, strategy):
    trainer, repo = trained(online, tmp_path, strategy)
    assert (tmp_path / strategy / "checkpoint-2" / "optimizer.pt").is_file()
    if strategy == "every_save":
        (tmp_path / strategy / "README.md").write_text("---\nlibrary_name: transformers\n---\nmine\n")
    info = trainer.push_to_hub()
    model = CODE | {"config.json", "generation_config.json", "model.safetensors"}
    copies = {"checkpoint": ["last-checkpoint"], "all_checkpoints": ["checkpoint-1", "checkpoint-2"]}.get(strategy, [])
    expected = {name for name in model if (tmp_path / strategy / name).is_file()} | {"README.md"}
    below = {f"{place}/{name}" for place in copies for name in expected}
    assert files_of(online, repo).keys() == expected | below
    assert CODE | {"config.json", "model.safetensors"} <= expected
    titles = [commit.title for commit in online.store.repositories[repo].history()][::-1]
    steps = [] if strategy == "end" else ["Training in progress, step 1", "Training in progress, step 2"]
    assert titles[: 1 + len(steps)] == ["initial commit", *steps] and len(titles) <= 2 + len(steps)
    assert online.store.repositories[repo].branches["main"] == info.oid
    if strategy == "every_save":
        assert online.store.read(files_of(online, repo)["README.md"]).decode().endswith("mine\n")


def test_training_survives_a_push_that_does_not_get_through(online, tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr("modeling_manticore.search.publishing.logger.warning", warned.append)
    monkeypatch.setattr(push_folder, "__kwdefaults__", push_folder.__kwdefaults__ | {"patience": 4.0})
    online.faults.add("drop", "POST /api/models/tester/unreachable/commit/main")  # a repository that has nothing yet
    trainer, _ = trained(online, tmp_path, "every_save", save_total_limit=1, hub_model_id="tester/unreachable")
    assert trainer.state.global_step == 2 and len(warned) == 2
    assert "step 1 was not pushed, training goes on" in warned[0] and TOKEN not in "".join(warned)


def test_saving_with_push_to_hub(online, tmp_path):
    hybrid().save_pretrained(tmp_path / "here", push_to_hub=True, repo_id="tester/saved", tags=["mine"])
    files = files_of(online, "tester/saved")
    assert files.keys() == {path.name for path in (tmp_path / "here").iterdir()} | {"README.md"}
    assert "- mine" in online.store.read(files["README.md"]).decode()
    assert len(online.store.repositories["tester/saved"].history()) == 2


def test_adapters_name_the_repository_of_their_hybrid(online, tmp_path):
    from peft import get_peft_model

    from modeling_manticore import lora_config

    base = hybrid()
    base.save_pretrained(tmp_path / "base")
    base = ManticoreForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, lora_config(base, r=2))
    with pytest.raises(ValueError, match="base_model_name_or_path"):
        push_hybrid(adapted, None, "tester/adapters")
    push_hybrid(adapted, None, "tester/adapters", base_model="tester/hybrid")
    files = files_of(online, "tester/adapters")
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    settings = json.loads(online.store.read(files["adapter_config.json"]))
    assert settings["base_model_name_or_path"] == "tester/hybrid"
    assert "base_model: tester/hybrid" in online.store.read(files["README.md"]).decode()


def test_the_command(online, tmp_path, capsys):
    hybrid().save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "training_args.bin").write_bytes(b"\x80\x04.")
    assert main(["push", str(tmp_path / "saved"), "tester/command", "--private", "--patience", "30"]) == 0
    printed = capsys.readouterr().out
    assert "Left behind: training_args.bin" in printed and "Commit " in printed and TOKEN not in printed
    assert "short card without licence and results" in printed
    assert online.store.repositories["tester/command"].private
    assert main(["push", str(tmp_path / "saved"), "tester/command"]) == 0
    printed = capsys.readouterr().out
    assert "Nothing differs" in printed and "short card" not in printed
    assert main(["verify", "tester/command"]) == 0 and "byte for byte" in capsys.readouterr().out
    assert main(["verify", "tester/absent"]) == 1 and "no repository 'tester/absent'" in capsys.readouterr().err
    assert main(["push", str(tmp_path), "tester/command"]) == 2 and "folder: got" in capsys.readouterr().err
    assert main(["push", "a", "b", "c"]) == 2 and "got 'c'" in capsys.readouterr().err


# ------------------------------------------------------------------ kills
@pytest.mark.parametrize("moment", ["transformers.modeling_utils.safe_save_file", "os.rename"])
def test_killed_while_saving(tmp_path, moment):
    model = hybrid()
    target = tmp_path / "hybrid"
    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(moment, lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
            model.save_pretrained(target)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not target.exists() and [path.name for path in tmp_path.iterdir()][0].startswith(f".hybrid.{child}.")
    model.save_pretrained(target)
    assert [path.name for path in tmp_path.iterdir()] == ["hybrid"]
    assert CODE | {"config.json", "model.safetensors"} <= {path.name for path in target.iterdir()}
    assert Path(target).stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_only_stale_folders_of_ours_go(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    names = {f"x.{int(dead.stdout)}.abc": False, f"x.{os.getpid()}.abc": True, "x.abc": True, "y.1.abc": True}
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / f"x.{int(dead.stdout)}.file").write_text("a file")
    remove_stale(tmp_path, "x.")
    assert {name: (tmp_path / name).is_dir() for name in names} == names
