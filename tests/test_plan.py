"""Plans: every shipped recipe plans on stand-ins; numbers are those of really built hybrids; problems are all told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from standins import make_standin, substitute
from tiny import FAMILIES, component, tokens
from transformers.cache_utils import DynamicLayer

from modeling_manticore import ManticoreCache, ManticoreForCausalLM, cost_table, discretize
from modeling_manticore.commands import main
from modeling_manticore.hub.plan import plan
from modeling_manticore.hub.recipes import load_recipe, recipe_from_dict, shipped_recipes
from modeling_manticore.hub.sizes import state_bytes


def path(k, start, stop):
    return {"component": k, "start": start, "stop": stop}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("standins")


@pytest.fixture(scope="module")
def same(tmp_path_factory):
    """Folders of a Llama and a Mamba-2 with one vocabulary and no tokenizer, the Llama in bfloat16."""
    folder = tmp_path_factory.mktemp("same")
    component("llama", tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(folder / "llama")
    component("mamba2").save_pretrained(folder / "mamba2")
    return [{"folder": str(folder / name)} for name in ("llama", "mamba2")]


@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_shipped_recipes_plan(name, root, monkeypatch):
    monkeypatch.chdir(root)
    found = plan(substitute(load_recipe(name), root))
    assert found.problems == []
    found.check()
    assert json.loads(json.dumps(found.to_dict()))["blocks"] == found.blocks
    text = str(found)
    assert "parameters" in text and "composing" in text
    assert found.hybrid is not None or found.smallest["sizes"].parameters <= found.largest["sizes"].parameters


def stored(folder):
    """Bytes of all tensors in a folder's safetensors."""
    total = 0
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            tensors = [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return total


def test_sizes_are_those_of_the_built(same, tmp_path):
    settings = {"name": "x", "components": same, "num_blocks": 3, "skip_paths": True}
    settings["search"] = {"strategy": "none", "choice": [0, 2, 1]}
    found = plan(recipe_from_dict(settings))
    assert not found.problems and found.dtype == "float32"
    supernet = ManticoreForCausalLM.from_components([entry["folder"] for entry in same], num_blocks=3, skip_paths=True)
    hybrid = discretize(supernet, [0, 2, 1])
    for name, model, sizes in (("supernet", supernet, found.supernet), ("hybrid", hybrid, found.hybrid)):
        model.save_pretrained(tmp_path / name)
        assert sizes.parameters == sum(p.numel() for p in model.parameters())
        assert sizes.bytes == stored(tmp_path / name)
        assert f"{sizes.cache_bytes_per_token:,} bytes per token" in model.describe()
    table = cost_table(supernet, found.context and min(found.context, 2048)).of([0, 2, 1])
    assert found.hybrid.parameters == table["parameters"]
    assert found.hybrid.flops_per_token == table["flops_per_token"]
    assert found.hybrid.cache_bytes_per_token == table["cache_bytes_per_token"]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_sizes_of_a_plain_hybrid(same, dtype, tmp_path):
    blocks = [[path(1, 0, 1)], [path(0, 1, 3)], [path(1, 1, 3)]]
    found = plan(recipe_from_dict({"name": "x", "components": same, "blocks": blocks, "dtype": dtype}))
    hybrid = ManticoreForCausalLM.from_components([entry["folder"] for entry in same], blocks=blocks, dtype=dtype)
    hybrid.save_pretrained(tmp_path)
    assert found.supernet is None
    assert found.hybrid.parameters == sum(p.numel() for p in hybrid.parameters())
    assert found.hybrid.bytes == stored(tmp_path)


def test_the_range_is_that_of_all_choices(same):
    settings = {"name": "x", "components": same, "num_blocks": 2, "search": {"texts": ["topics"], "row_length": 32}}
    found = plan(recipe_from_dict(settings))
    supernet = ManticoreForCausalLM.from_components([entry["folder"] for entry in same], num_blocks=2)
    counts = {
        (p, q): sum(x.numel() for x in discretize(supernet, [p, q]).parameters()) for p in (0, 1) for q in (0, 1)
    }
    for side, extreme in ((found.smallest, min), (found.largest, max)):
        assert side["sizes"].parameters == extreme(counts.values()) == counts[tuple(side["choice"])]


@pytest.mark.parametrize("family", ["llama", "mamba", "mamba2", "falcon_mamba", "lfm2", "mistral"])
@torch.no_grad()
def test_states_are_those_of_a_long_run(family):
    model = component(family)
    blocks = [[path(0, 0, model.config.num_hidden_layers)]]
    hybrid = ManticoreForCausalLM.from_components([model], blocks=blocks)
    cache = ManticoreCache(hybrid.config)
    hybrid(tokens(1, 24), past_key_values=cache, use_cache=True)
    held = 0
    for layer in cache.layers:
        values = [
            v for entry in vars(layer).values() for v in (entry.values() if isinstance(entry, dict) else [entry])
        ]
        grows = isinstance(layer, DynamicLayer) and not layer.is_sliding
        held += sum(
            v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor) and v.ndim > 1 and not grows
        )
    assert sum(state_bytes(FAMILIES[family](), torch.float32)) == held


def test_all_problems_are_told(same, tmp_path):
    settings = {
        "name": "x",
        "components": [*same, {"folder": str(tmp_path / "nothing")}, {"folder": str(tmp_path)}],
        "num_blocks": 2,
        "calibration": {"texts": ["no-such-text"]},
    }
    found = plan(recipe_from_dict(settings))
    assert len(found.problems) == 3
    with pytest.raises(ValueError, match="calibration.texts.*components.2.*components.3"):
        found.check()
    settings = {"name": "x", "components": same, "num_blocks": 9}
    assert "num_blocks" in plan(recipe_from_dict(settings)).problems[0]
    settings = {"name": "x", "components": same, "num_blocks": 2, "finetune": {"texts": ["topics"], "row_length": 65}}
    assert "finetune.row_length: got 65, allowed is at most 64" in plan(recipe_from_dict(settings)).problems[0]
    search = {"texts": ["topics"], "row_length": 32, "limits": {"max_parameters": 3}}
    settings = {"name": "x", "components": same, "num_blocks": 2, "search": search}
    assert "smallest feasible value" in plan(recipe_from_dict(settings)).problems[0]
    limited = {"strategy": "none", "choice": [0, 0], "limits": {"max_attention_blocks": 1}}
    settings = {"name": "x", "components": same, "num_blocks": 2, "search": limited}
    assert "max_attention_blocks: got 1, allowed is at least 2" in plan(recipe_from_dict(settings)).problems[0]


def test_licences(root):
    known, unknown = make_standin("EleutherAI/pythia-410m", root), make_standin("state-spaces/mamba-370m-hf", root)
    settings = {"name": "x", "components": [{"folder": str(known)}, {"folder": str(unknown)}], "num_blocks": 2}
    found = plan(recipe_from_dict(settings))
    assert [entry["license"] for entry in found.components] == ["apache-2.0", "unknown"]
    assert any("licence is unknown" in note for note in found.notes) and not found.problems
    settings["publishing"] = {"repo_id": "me/x", "allow_local_sources": True}
    assert "licence is unknown" in plan(recipe_from_dict(settings)).problems[0]
    settings["components"][1] |= {"license": "apache-2.0", "license_reason": "its authors say so"}
    assert plan(recipe_from_dict(settings)).problems == []


def test_what_a_push_would_refuse_is_a_problem_at_once(same, tmp_path):
    (tmp_path / "text.txt").write_text("words")
    licensed = [entry | {"license": "mit", "license_reason": "ours"} for entry in same]
    settings = {"name": "x", "components": licensed, "num_blocks": 2, "publishing": {"private": True}}
    settings["calibration"] = {"texts": [str(tmp_path / "text.txt")], "row_length": 16}
    assert plan(recipe_from_dict(settings)).problems == []  # nothing is pushed
    settings["publishing"]["repo_id"] = "me/x"
    (problem,) = plan(recipe_from_dict(settings)).problems
    for part in ("components[0].folder", "components[1].folder", "calibration.texts[0]", "--allow_local_sources"):
        assert part in problem
    settings["publishing"]["allow_local_sources"] = True
    assert plan(recipe_from_dict(settings)).problems == []


def test_vocabularies(root):
    names = ("EleutherAI/pythia-410m", "state-spaces/mamba-370m-hf", "HuggingFaceTB/SmolLM2-135M")
    folders = [{"folder": str(make_standin(name, root))} for name in names]
    padded = plan(recipe_from_dict({"name": "x", "components": folders[:2], "num_blocks": 2})).vocabulary
    assert (padded.size, padded.same, padded.changed, padded.shared) == (300, False, [0, 1], [1.0, 1.0])
    other = plan(recipe_from_dict({"name": "x", "components": folders[1:], "num_blocks": 2, "tokenizer_from": 1}))
    assert other.vocabulary.size == 280 and 0.5 < other.vocabulary.shared[0] < 1
    assert other.supernet is not None and not other.problems


def test_missing_layers_are_noticed(same, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "cut"
    component("llama").save_pretrained(folder)
    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if "layers.2." not in k}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = plan(recipe_from_dict({"name": "x", "components": [{"folder": str(folder)}, same[1]], "num_blocks": 2}))
    assert "layers [2]" in found.problems[0]


def test_memory_of_building(tmp_path):
    """As `benchmarks/building_memory.py` measures it, here with 80 MB each."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    import building_memory

    case = building_memory.CASES["converted"]
    folders = building_memory.make_components(tmp_path, 80, case["shards"])
    command = [sys.executable, building_memory.__file__, "--build", *map(str, folders), "--dtype", case["dtype"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, stdin=subprocess.DEVNULL, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    found = building_memory.planned(folders, case["dtype"])
    assert (found["parameters"], found["bytes"]) == (measured["hybrid_parameters"], measured["hybrid_bytes"])
    peak = measured["private"] * measured["hybrid_bytes"]
    assert abs(found["peak"] / peak - 1) < building_memory.PLAN_LIMIT, (found, peak)


def test_the_command(same, tmp_path, capsys):
    import yaml

    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"components": same, "num_blocks": 2}))
    assert main(["plan", str(file)]) == 0
    assert "plan of mine" in capsys.readouterr().out
    assert main(["plan", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["supernet"]["parameters"] > 0
    file.write_text(yaml.safe_dump({"components": same, "num_blocks": 9}))
    assert main(["plan", str(file)]) == 2
    printed = capsys.readouterr()
    assert "num_blocks: got 9" not in printed.out and "it cannot be built" in printed.err  # said once
    assert printed.err.count("num_blocks: got 9") == 1
    assert main(["plan", "no-such.yaml"]) == 2 and main(["plan", "nothing"]) == 2
