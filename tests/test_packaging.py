"""The wheel: what is in it, and the demo from it in a clean environment outside the clone."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cards import numbers_without_source
from tiny import component, tokens
from travelling import TRAVELLING

from modeling_manticore import ManticoreForCausalLM, discretize
from modeling_manticore.hub.card_check import check_card


ROOT = Path(__file__).parents[1]


def run(command, folder, timeout=900, **environment):
    """Run outside the clone, with caches of its own; returns standard output."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HF_HOME", "VIRTUAL_ENV")}
    kept |= {"HF_HOME": str(folder / "hf"), "XDG_CACHE_HOME": str(folder / "cache"), "TMPDIR": str(folder)}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=kept | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done.stdout


def clean_environment(folder, *packages):
    """The Python of a new environment that has these packages, under the pins of the project."""
    run([sys.executable, "-m", "venv", folder / "environment"], folder)
    python = folder / "environment" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    for package in packages:
        run([*pip, package], folder, XDG_CACHE_HOME=os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")))
    return python


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--outdir", folder, ROOT], folder)
    return folder


def borrowing_environment(folder, wheel):
    """The Python of a new environment that has the wheel alone; what it depends on comes from the tests' own."""
    run([sys.executable, "-m", "venv", folder / "environment"], folder)
    python = folder / "environment" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    run([*pip, wheel], folder)
    (own,) = (folder / "environment").glob("lib/python*/site-packages")
    (own / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("fetched", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.network])])
def test_the_demo_runs_from_the_wheel(built, tmp_path, fetched):
    (wheel,), (source,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {f"modeling_manticore/{name}" for name in TRAVELLING} <= set(names)
    assert "modeling_manticore/hub_configs/demo.yaml" in names and "modeling_manticore/model_cards/hybrid.md" in names
    assert not any(name.startswith(("tests/", "benchmarks/", "scripts/")) for name in names)
    with tarfile.open(source) as archive:
        assert any(name.endswith("/LICENSE") for name in archive.getnames())

    packages = ("torch", f"{wheel}[train]")
    python = clean_environment(tmp_path, *packages) if fetched else borrowing_environment(tmp_path, wheel)
    where = run([python, "-c", "import modeling_manticore; print(modeling_manticore.__file__)"], tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path / "environment")
    short = ["--steps", "5", "--eval_rows", "16", "--calibration_rows", "32", "--row_length", "64"]
    printed = run([python.with_name("manticore"), "demo", *short], tmp_path)
    output = tmp_path / "runs" / "demo"
    assert [line.split()[-1] for line in printed.splitlines()[-3:] if not line.startswith("plots")] == [
        str(output / "hybrid"),
        str(output / "table.json"),
    ]
    rows = {row["name"]: row for row in json.loads((output / "table.json").read_text())["rows"]}
    assert {"gpt_neox (prose)", "mamba2 (code), fine-tuned", "supernet, searched", "fixed hybrid, calibrated"} <= set(
        rows
    )
    assert all(0 < row["mean"] < 20 for row in rows.values())
    check_card((output / "hybrid" / "README.md").read_text())
    table = json.loads((output / "table.json").read_text())
    assert numbers_without_source((output / "hybrid" / "README.md").read_text(), table) == []
    assert (output / "losses.png").is_file() and (output / "mixture_weights.png").is_file()
    assert not list(output.glob(".*"))


ALONE = """
import importlib.util, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModel
for name in ("modeling_manticore", "accelerate", "datasets", "peft"):
    assert importlib.util.find_spec(name) is None, name
torch.set_num_threads(1)
ids, logits = load_file("ids.safetensors")["ids"], {}
for name in ("supernet", "hybrid"):
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    with torch.no_grad():
        logits[name] = model(ids).logits
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, pad_token_id=0)
save_file(logits, "logits.safetensors")
"""


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(1200)
@torch.no_grad()
def test_hybrids_run_where_only_torch_and_transformers_are_installed(tmp_path):
    supernet = ManticoreForCausalLM.from_components([component("gpt_neox"), component("mamba2")], num_blocks=2)
    hybrid, ids = discretize(supernet, [0, 1]), tokens()
    supernet.save_pretrained(tmp_path / "supernet")
    hybrid.save_pretrained(tmp_path / "hybrid")
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    python = clean_environment(tmp_path, "torch", "transformers")
    run([python, "-c", ALONE], tmp_path, OMP_NUM_THREADS="1")
    found = load_file(tmp_path / "logits.safetensors")
    assert torch.equal(found["supernet"], supernet(ids).logits)
    assert torch.equal(found["hybrid"], hybrid(ids).logits)
