"""
The full circle over HTTP, in both modes of the loopback Hub: components from the Hub, a hybrid of them pushed, and
loaded at its commit where the package is absent.
"""

import json

import pytest
import torch
from child import run_without_package
from loopback import TOKEN, LoopbackHub
from safetensors.torch import load_file, save_file
from tiny import FAMILIES
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_manticore import ManticoreForCausalLM, discretize, push_hybrid, verify
from modeling_manticore.hub.transfer import call
from modeling_manticore.tasks.text import help_topics, train_tokenizer


REPO = "tester/hybrid"
CARD = """---
library_name: transformers
license: apache-2.0
tags: [manticore]
---

# Ours
"""
LOAD = """
import json, sys
import torch
from huggingface_hub import _upload_pipeline
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
assert _upload_pipeline.MAX_COMMIT_INTERVAL == 0
repo, commit = "tester/hybrid", open("commit").read()
tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=True, revision=commit)
options = {"trust_remote_code": True, "revision": commit, "output_loading_info": True}
model, info = AutoModelForCausalLM.from_pretrained(repo, **options)
assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
assert type(model).__module__.startswith("transformers_modules.") and commit in type(model).__module__
ids = load_file("ids.safetensors")["ids"]
with torch.no_grad():
    save_file({"logits": model(ids).logits.contiguous()}, "logits.safetensors")
prompt = tokenizer("for every", return_tensors="pt")
output = model.generate(**prompt, min_new_tokens=5, max_new_tokens=5, do_sample=False)
print(json.dumps({"new": output.shape[1], "prompt": prompt["input_ids"].shape[1]}))
"""
# Python runs a sitecustomize.py at every start; so the process that talks to the Hub has the patch too.
PATCH = """
try:
    from huggingface_hub import _upload_pipeline
except ImportError:
    pass
else:
    _upload_pipeline.MAX_COMMIT_INTERVAL = 0
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["lfs", "xet"])
def test_full_circle(mode, tmp_path, monkeypatch, capfd):
    tokenizer = train_tokenizer(help_topics()[:12], 300)
    (tmp_path / "patch").mkdir()
    (tmp_path / "patch" / "sitecustomize.py").write_text(PATCH)
    names = {"gpt_neox": "tester/attention", "mamba2": "tester/recurrent"}
    with LoopbackHub(tmp_path / "hub", xet=mode == "xet") as hub:
        cache = tmp_path / "cache"
        client = hub.environment(cache) | {"PYTHONPATH": str(tmp_path / "patch")}
        for name, value in client.items():
            monkeypatch.setenv(name, value)
        # In this process nothing asks the Hub; the process that does is started with these variables.
        monkeypatch.setattr("modeling_manticore.building.sources.is_offline_mode", lambda: False)
        for family, repo in names.items():
            config = FAMILIES[family]()
            config.vocab_size, config.auto_map = len(tokenizer), {"AutoConfig": "foreign.Config"}
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / family)
            tokenizer.save_pretrained(tmp_path / family)
            files = {path.name: str(path) for path in (tmp_path / family).iterdir()}
            settings = {"kept": [], "stale": "", "revision": None, "create_pr": False, "private": True}
            settings |= {"message": "Upload", "description": None, "verify": True}
            call("push", {"repo_id": repo, "files": files} | settings)

        options = {"cache_dir": str(cache / "hub"), "num_blocks": 2}
        with pytest.raises(
            ValueError, match=r"components\[1\] \(tester/no\): repo_id: there is no repository 'tester/no'"
        ):
            ManticoreForCausalLM.from_components(["tester/attention", "tester/no"], **options)
        supernet = ManticoreForCausalLM.from_components(list(names.values()), **options)
        heads = [hub.store.repositories[repo].branches["main"] for repo in names.values()]
        assert [component.revision for component in supernet.config.components] == heads
        rows = torch.randint(0, 300, (16, 16), generator=torch.Generator().manual_seed(0))
        hybrid = discretize(supernet, [0, 1], calibration=rows)
        results = {"loss": 5.5, "tokens": 240}
        info = push_hybrid(hybrid, tokenizer, REPO, card=CARD, recipe={"num_blocks": 2}, results=results, private=True)
        repository = hub.store.repositories[REPO]
        assert [commit.title for commit in repository.history()] == ["Upload hybrid", "initial commit"]
        assert repository.private and repository.branches["main"] == info.oid
        again = push_hybrid(hybrid, tokenizer, REPO, card=CARD, recipe={"num_blocks": 2}, results=results)
        assert again.oid == info.oid and not again.changed
        assert hybrid.push_to_hub(REPO).oid == info.oid  # the card and the code stay, nothing differs

        files = repository.find("main").files
        code = {f"{name}_manticore.py" for name in ("cache", "configuration", "mixing", "modeling", "slicing")}
        assert (
            code | {"README.md", "recipe.yaml", "results.json", "tokenizer.json", "model.safetensors"} <= files.keys()
        )
        assert hub.store.read(files["README.md"]).decode() == CARD
        config = json.loads(hub.store.read(files["config.json"]))
        assert all("auto_map" not in component for component in config["components"]) and "auto_map" in config
        assert [component["source"] for component in config["components"]] == list(names.values())
        assert bool(files["model.safetensors"].xet) == (mode == "xet")

        found = verify(REPO)
        assert found.problems == () and found.commit == info.oid
        tampered = dict(files) | {"mixing_manticore.py": hub.store.put(b"import os\n"), "more.py": hub.store.put(b"1")}
        repository.commit("bad", tampered, "tamper", info.oid)
        problems = "\n".join(verify(REPO, revision="bad").problems)
        assert "mixing_manticore.py is not the file whose hash" in problems and "more.py is code" in problems

        save_file({"ids": rows}, tmp_path / "ids.safetensors")
        (tmp_path / "commit").write_text(info.oid)
        clean = client | {"HF_HOME": str(tmp_path / "clean"), "HF_XET_CACHE": str(tmp_path / "clean" / "xet")}
        monkeypatch.delenv("PYTHONPATH")
        printed = json.loads(run_without_package(LOAD, tmp_path, 500, clean).splitlines()[-1])
    assert printed["new"] == printed["prompt"] + 5
    with torch.no_grad():
        expected = hybrid(rows).logits
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], expected)
    out, err = capfd.readouterr()
    assert TOKEN not in out + err
    assert len(AutoTokenizer.from_pretrained(tmp_path / "gpt_neox")) == 300
