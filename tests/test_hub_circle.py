"""
The full circle over HTTP, in both modes of the loopback Hub: components from the Hub, `manticore build` killed while
it downloads, searches and pushes, run to its end, and the hybrid loaded at its commit where the package is absent.
"""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from child import run_without_package
from command_runs import component_folders
from huggingface_hub import ModelCard
from loopback import TOKEN, LoopbackHub
from safetensors.torch import load_file, save_file
from tiny import component

from modeling_manticore import ManticoreForCausalLM
from modeling_manticore.hub.card_check import check_card
from modeling_manticore.hub.contents import CARRIED
from modeling_manticore.hub.staging import PREFIX
from modeling_manticore.hub.transfer import call


REPO = "tester/hybrid"
COMPONENTS = {"gpt_neox": "tester/attention", "mamba2": "tester/recurrent"}
COMPONENT_CARD = "---\nlibrary_name: transformers\nlicense: apache-2.0\n---\n\n# A component\n"
MIXED_ONLY = {"max_attention_blocks": 1, "max_parameters": 110_000}  # one component alone has 2, or 121,216
TEXT = {"texts": ["text.txt"], "rows": 24, "row_length": 16}
RECIPE = {
    "name": "circle",
    "components": [{"repo": repo} for repo in COMPONENTS.values()],
    "num_blocks": 2,
    "calibration": TEXT,
    "search": TEXT | {"strategy": "joint", "steps": 3, "batch_size": 2, "limits": MIXED_ONLY},
    "finetune": TEXT | {"steps": 2, "batch_size": 2},
    "evaluation": {"texts": ["held-out.txt"], "rows": 8, "row_length": 16},
    "publishing": {"repo_id": REPO, "private": True},
}
BEFORE_PUSH = ["compose", "calibrate", "search", "discretize", "finetune", "evaluate", "card"]
# Builds are forks of one process, which has paid for the imports; a fork is a process of its own for whoever kills it.
BUILDER = """
import os, sys, traceback
import torch
import modeling_manticore.hub.build
from huggingface_hub import _upload_pipeline
from modeling_manticore.commands import main
assert _upload_pipeline.MAX_COMMIT_INTERVAL == 0
torch.set_num_threads(1)
for line in sys.stdin:
    build = os.fork()
    if build == 0:
        code = 70
        try:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            log = os.open("build.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1), os.dup2(log, 2)
            code = main(["build", "recipe.yaml"])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(build, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(build, 0)[1]), flush=True)
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


class Circle:
    """One mode: a Hub, a folder with texts and the recipe, and the process of which builds are forks."""

    def __init__(self, mode, parts, folder):
        self.mode, self.parts, self.folder = mode, parts, folder
        self.runs, self.temporary = folder / "runs" / "circle", folder / "temporary"
        self.temporary.mkdir(parents=True)
        (folder / "patch").mkdir()
        (folder / "patch" / "sitecustomize.py").write_text(PATCH)
        (folder / "recipe.yaml").write_text(json.dumps(RECIPE))
        text = (parts / "text.txt").read_text()
        (folder / "text.txt").write_text(text[:-4000])
        (folder / "held-out.txt").write_text(text[-4000:])

    def environment(self, hub, cache):
        own = hub.environment(self.folder / cache) | {"PYTHONPATH": str(self.folder / "patch")}
        return own | {"OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary)}

    def publish_components(self, hub, environment):
        for family, repo in COMPONENTS.items():
            files = {path.name: str(path) for path in (self.parts / family).iterdir()}
            settings = {"kept": [], "stale": "", "revision": None, "create_pr": False, "private": True}
            settings |= {"message": "Upload", "description": None, "verify": True}
            call("push", {"repo_id": repo, "files": files} | settings, environment=environment)

    def start(self):
        """A build; returns its process number."""
        print("build", file=self.builder.stdin, flush=True)
        return int(self.builder.stdout.readline())

    def end(self):
        """Wait for the build; its exit code and what it printed, which never has the token."""
        code = int(self.builder.stdout.readline())
        printed = (self.folder / "build.log").read_text()
        assert TOKEN not in printed
        return code, printed

    def wait(self, build, condition, seconds=400):
        """Until something has happened to a build that runs."""
        end = time.monotonic() + seconds
        while not condition():
            assert Path(f"/proc/{build}").exists(), (self.folder / "build.log").read_text()[-3000:]
            assert time.monotonic() < end
            time.sleep(0.01)

    def kill(self, build):
        os.kill(build, signal.SIGKILL)
        assert self.end()[0] == -signal.SIGKILL

    def there(self):
        """What the build's folder holds."""
        return {path.name for path in self.runs.iterdir()}

    def killed_while_downloading(self, hub):
        build = self.start()
        self.wait(build, (self.runs / f".compose.partial-{build}").is_dir)
        repo = COMPONENTS["gpt_neox"]
        weights = {"lfs": f"GET /{repo}/resolve/.*safetensors", "xet": f"GET /api/models/{repo}/xet-read-token"}
        fault = hub.faults.add("stall", weights[self.mode])
        self.wait(build, lambda: fault.hits)
        self.kill(build)
        hub.faults.clear()
        assert self.there() == {f".compose.partial-{build}"}

    def killed_while_searching(self):
        build = self.start()
        self.wait(build, (self.runs / f".search.partial-{build}").is_dir)
        self.kill(build)
        assert self.there() == {"compose", "calibrate", f".search.partial-{build}"}

    def killed_while_pushing(self, hub):
        fault = hub.faults.add("stall", f"POST /api/models/{REPO}/commit/")
        build = self.start()
        self.wait(build, lambda: fault.hits)
        self.kill(build)
        hub.faults.clear()
        assert self.there() == {*BEFORE_PUSH, "report.html", f".push.partial-{build}"}
        assert [path.name.startswith(f"{PREFIX}{build}.") for path in self.temporary.iterdir()].count(True) == 1
        assert [commit.title for commit in hub.store.repositories[REPO].history()] == ["initial commit"]
        assert hub.store.repositories[REPO].find("main").files == {}

    def completed(self, hub):
        self.start()
        code, printed = self.end()
        assert code == 0, printed[-3000:]
        assert "[7/8] card: done before" in printed and "[8/8] push: running" in printed
        assert self.there() == {*BEFORE_PUSH, "push", "report.html"}
        assert not any(path.name.startswith(PREFIX) for path in self.temporary.iterdir())

    def check_repository(self, hub):
        """Exactly one commit, private, with our card and its picture, code, tokenizer, recipe and results."""
        repository = hub.store.repositories[REPO]
        assert [commit.title for commit in repository.history()] == ["Upload hybrid", "initial commit"]
        assert repository.private and len(repository.commits) == 2
        files = repository.find("main").files
        expected = {*CARRIED, "README.md", "hybrid.png", "recipe.yaml", "results.json", "tokenizer.json"}
        assert expected | {"config.json", "model.safetensors"} <= files.keys()
        assert bool(files["model.safetensors"].xet) == (self.mode == "xet")
        for name in ("README.md", "hybrid.png"):
            assert hub.store.read(files[name]) == (self.runs / "card" / name).read_bytes()
        config = json.loads(hub.store.read(files["config.json"]))
        assert all("auto_map" not in entry for entry in config["components"]) and "auto_map" in config
        heads = {repo: hub.store.repositories[repo].branches["main"] for repo in COMPONENTS.values()}
        assert {entry["source"]: entry["revision"] for entry in config["components"]} == heads  # both are in it
        self.check_card(hub.store.read(files["README.md"]).decode(), heads)
        return repository.branches["main"]

    def check_card(self, text, heads):
        check_card(text)
        data = ModelCard(text).data
        assert set(data.base_model) == set(heads) and data.license == "apache-2.0" and "manticore" in data.tags
        assert all(f"`{commit}`" in text for commit in heads.values()) and "](hybrid.png)" in text
        measured = json.loads((self.runs / "evaluate" / "results.json").read_text())["texts"]["held-out.txt"]
        assert {result.metric_type: result.metric_value for result in data.eval_results}["loss"] == pytest.approx(
            measured["loss"], rel=1e-3
        )

    def check_loaded(self, hub, commit):
        """Loaded where nothing of ours is, at its commit: the same logits, bit for bit."""
        hybrid = ManticoreForCausalLM.from_pretrained(self.runs / "finetune" / "model")
        assert hybrid.config.is_discretized
        rows = torch.randint(0, 300, (4, 16), generator=torch.Generator().manual_seed(0))
        save_file({"ids": rows}, self.folder / "ids.safetensors")
        (self.folder / "commit").write_text(commit)
        clean = self.environment(hub, "clean")
        printed = json.loads(run_without_package(LOAD, self.folder, 500, clean).splitlines()[-1])
        assert printed["new"] == printed["prompt"] + 5
        with torch.no_grad():
            expected = hybrid(rows).logits
        assert torch.equal(load_file(self.folder / "logits.safetensors")["logits"], expected)

    def run(self):
        with LoopbackHub(self.folder / "hub", xet=self.mode == "xet") as hub:
            environment = dict(os.environ) | self.environment(hub, "cache")
            self.publish_components(hub, environment)
            with subprocess.Popen(
                [sys.executable, "-c", BUILDER],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            ) as self.builder:
                try:
                    self.killed_while_downloading(hub)
                    self.killed_while_searching()
                    self.killed_while_pushing(hub)
                    self.completed(hub)
                finally:
                    self.builder.stdin.close()
            self.check_loaded(hub, self.check_repository(hub))


@pytest.mark.timeout(1200)
def test_full_circle(tmp_path, capfd):
    """Both modes at once: most of it is waiting for processes."""
    parts = component_folders(tmp_path / "parts")
    component("mamba2", width=64, vocab_size=300).save_pretrained(parts / "mamba2")
    for family in COMPONENTS:
        config = json.loads((parts / family / "config.json").read_text())
        (parts / family / "config.json").write_text(
            json.dumps(config | {"auto_map": {"AutoConfig": "foreign.Config"}})
        )
        (parts / family / "README.md").write_text(COMPONENT_CARD)
    circles = [Circle(mode, parts, tmp_path / mode) for mode in ("lfs", "xet")]
    with ThreadPoolExecutor(len(circles)) as pool:
        list(pool.map(Circle.run, circles))
    out, err = capfd.readouterr()
    assert TOKEN not in out + err
