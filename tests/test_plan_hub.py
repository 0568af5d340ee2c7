"""Plans of repositories, over HTTP to a loopback Hub: commits, licences, sizes, and no weights."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from standins import tokenizer
from tiny import component


loopback = pytest.importorskip("loopback", reason="the loopback Hub is not in this checkout")
CARD = "---\nlicense: apache-2.0\n---\n# A component\n"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    own = tokenizer("neox")
    with loopback.LoopbackHub(root) as hub:
        for name, family, width, card in (("t/llama", "llama", 96, CARD), ("t/mamba2", "mamba2", 64, "# No card\n")):
            folder = root / name
            component(family, width=width, vocab_size=len(own)).save_pretrained(folder, max_shard_size="150KB")
            own.save_pretrained(folder)
            (folder / "README.md").write_text(card)
            repository = hub.store.create(name)
            files = {file.name: hub.store.put(file.read_bytes()) for file in folder.iterdir()}
            repository.commit("main", files, "files", repository.branches["main"])
        yield hub


def planned(hub, folder, recipe, token=loopback.TOKEN):
    """(exit code, the plan, standard error) of `manticore plan` in a process of its own."""
    (folder / "x.yaml").write_text(yaml.safe_dump(recipe))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= hub.environment(folder / "cache", token) | {"OMP_NUM_THREADS": "1"}
    code = "import sys; from modeling_manticore.commands import main; sys.exit(main(['plan', 'x.yaml', '--json']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    found = done.stdout[done.stdout.find("{") :]
    return done.returncode, json.loads(found) if found.startswith("{") else None, done.stderr


def test_no_weights_are_downloaded(hub, tmp_path):
    blocks = [[{"component": 0, "start": 0, "stop": 1}], [{"component": 1, "start": 1, "stop": 3}]]
    recipe = {"components": [{"repo": "t/llama"}, {"repo": "t/mamba2"}], "blocks": blocks}
    code, found, error = planned(hub, tmp_path, recipe)
    assert code == 0, error
    heads = [hub.store.repositories[name].branches["main"] for name in ("t/llama", "t/mamba2")]
    assert [entry["revision"] for entry in found["components"]] == heads
    assert [entry["license"] for entry in found["components"]] == ["apache-2.0", "unknown"]
    sizes = {
        name: {file: entry.size for file, entry in hub.store.repositories[name].find("main").files.items()}
        for name in ("t/llama", "t/mamba2")
    }
    shards = sum(size for own in sizes.values() for file, size in own.items() if file.endswith(".safetensors"))
    others = sum(size for own in sizes.values() for file, size in own.items() if not file.endswith(".safetensors"))
    assert len(sizes["t/llama"]) > 8 and others < found["building"]["download_bytes"] < 0.7 * shards + others
    measured = recipe | {"evaluation": {"texts": ["topics"]}}  # the components too, unless it says otherwise
    _, whole, _ = planned(hub, tmp_path, measured)
    assert whole["building"]["download_bytes"] == shards + others
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not any(path.name.endswith(".safetensors") for path in kept)
    assert max(path.stat().st_size for path in kept) < 50_000


def test_what_the_hub_refuses_is_a_problem(hub, tmp_path):
    recipe = {"components": [{"repo": "t/llama", "revision": "nowhere"}, {"repo": "t/nothing"}], "num_blocks": 2}
    code, found, error = planned(hub, tmp_path, recipe)
    assert code == 2 and len(found["problems"]) == 2 and "Traceback" not in error
    assert "components[0]" in found["problems"][0] and "components[1]" in found["problems"][1]
    assert loopback.TOKEN not in error + json.dumps(found)
