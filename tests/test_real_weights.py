"""The benchmark on real weights, a tiny random Llama for SmolLM2: its models, its fit, its units, its arithmetic."""

import io
import json
import math
import shutil
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_manticore.tasks import packages


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
DEPTH, LENGTH = 6, 16


@pytest.fixture(scope="module")
def parts():
    """The benchmark's modules; they are scripts, not a package."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import _real_weights_data
        import _real_weights_fit
        import _real_weights_models
        import _real_weights_units
        import real_weights
    finally:
        sys.path.remove(str(BENCHMARKS))
    modules = (_real_weights_data, _real_weights_fit, _real_weights_models, _real_weights_units, real_weights)
    return {module.__name__: module for module in modules}


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        initializer_range=0.2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 96, (3, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_with(teacher, ids, layer_output=None, attention_output=None):
    """
    Logits of the teacher with hooks: layer -> function of a layer's input that gives its output, or of its attention's
    input that gives the attention's output.
    """
    hooks = []
    for layer, function in (layer_output or {}).items():
        module = teacher.model.layers[layer]
        hooks.append(module.register_forward_hook(lambda m, args, out, function=function: function(args[0])))
    for layer, function in (attention_output or {}).items():
        module = teacher.model.layers[layer].self_attn
        hooks.append(
            module.register_forward_hook(
                lambda m, args, kwargs, out, function=function: (function(kwargs["hidden_states"]), None),
                with_kwargs=True,
            )
        )
    try:
        return teacher(input_ids=ids).logits
    finally:
        for hook in hooks:
            hook.remove()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("layers", [[3], [1, 2, 4]])
def test_dropped_layers_are_passed_by(parts, teacher, ids, layers):
    model = parts["_real_weights_models"].dropped(teacher, layers)
    expected = logits_with(teacher, ids, layer_output={layer: lambda x: x for layer in layers})
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, logits(teacher, ids), atol=1e-2)


@pytest.mark.parametrize("layers", [[3], [1, 2, 4]])
def test_without_attention_norms_and_mlp_are_kept_and_no_mixer_is_trained(parts, teacher, ids, layers):
    model = parts["_real_weights_models"].without_attention(teacher, layers, 8)
    expected = logits_with(teacher, ids, attention_output=dict.fromkeys(layers, torch.zeros_like))
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=1e-5)
    mixers = [p.requires_grad for name, p in model.named_parameters() if ".mamba." in name]
    assert mixers and not any(mixers)
    assert all(p.requires_grad for name, p in model.named_parameters() if "mlp" in name)


def test_linear_maps_stand_where_the_layers_were_and_fit_better_than_nothing(parts, teacher, given, tmp_path):
    units = parts["_real_weights_units"]
    units.fit_maps({"layers": [1, 4], "tokens": 60 * LENGTH}, given, tmp_path, tmp_path / "none")
    model = units.build({"variant": "linear", "layers": [1, 4]}, given | {"maps": tmp_path})
    bridges = [block.paths[0].in_projector for block in model.model.blocks]
    maps = {1: bridges[1], 4: bridges[2]}
    assert bridges[0] is None and all(m.weight.requires_grad for m in maps.values())
    rows = parts["_real_weights_data"].load_rows(given["rows"])["new"]
    expected = logits_with(teacher, rows, layer_output=maps)
    torch.testing.assert_close(logits(model, rows), expected, atol=1e-5, rtol=1e-5)
    _, states = _inputs_and_outputs(teacher, rows, 1)
    entered, wanted = states
    with torch.no_grad():
        assert (maps[1](entered) - wanted).norm() < 0.9 * (entered - wanted).norm()


def _inputs_and_outputs(teacher, rows, layer):
    found = []
    module = teacher.model.layers[layer]
    hook = module.register_forward_hook(lambda m, args, out: found.append((args[0], out)))
    result = logits(teacher, rows)
    hook.remove()
    return result, found[0]


@pytest.mark.parametrize("layers, alike", [([3], True), ([1, 2, 4], False)])
def test_a_mamba_replaces_the_attention_and_nothing_else(parts, teacher, ids, layers, alike):
    models = parts["_real_weights_models"]
    torch.manual_seed(2)
    donor = models.mamba_layers(teacher, len(layers), state=8, chunk=8, like_attention=alike)
    mixers = {layer: own.mamba for layer, own in zip(layers, donor.model.layers)}
    for layer, mixer in mixers.items():
        if alike:
            models.start_from_attention(mixer, teacher.model.layers[layer].self_attn)
    states = {layer: mixer.state_dict() for layer, mixer in mixers.items()}
    model = models.with_mamba(teacher, states, state=8, like_attention=alike)
    expected = logits_with(teacher, ids, attention_output=mixers)
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, logits(teacher, ids), atol=1e-2)
    cached = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
    step = model(input_ids=ids[:, -1:], past_key_values=cached).logits[:, -1]
    torch.testing.assert_close(step.detach(), expected[:, -1], atol=1e-4, rtol=1e-4)


def test_a_mixer_that_gives_what_the_attention_gives_makes_the_teacher(parts, teacher, ids):
    models = parts["_real_weights_models"]
    donor = models.mamba_layers(teacher, 1, state=8)
    model = models.with_mamba(teacher, {3: donor.model.layers[0].mamba.state_dict()}, state=8)
    found, layer = [], teacher.model.layers[3]
    hook = layer.self_attn.register_forward_hook(lambda m, args, out: found.append(out[0]))
    expected = logits(teacher, ids)
    hook.remove()
    replaced = model.model.blocks[1].paths[0].slice.layers[0].mamba
    replaced.register_forward_hook(lambda m, args, out: found[0])
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=1e-5)


def test_a_start_from_attention_keeps_queries_keys_and_values(parts, teacher):
    models = parts["_real_weights_models"]
    mixer = models.mamba_layers(teacher, 1, state=8, like_attention=True).model.layers[0].mamba
    attention = teacher.model.layers[3].self_attn
    models.start_from_attention(mixer, attention)
    with torch.no_grad():
        x = torch.randn(1, 5, 32)
        _, value, key, query, _ = mixer.in_proj(x).split([32, 32, 32, 32, 4], dim=-1)
        torch.testing.assert_close(query, attention.q_proj(x) / 8**0.5)
        for found, own in ((value, attention.v_proj(x)), (key, attention.k_proj(x) / 8**0.5)):
            heads = own.view(1, 5, 2, 8)
            torch.testing.assert_close(found.view(1, 5, 4, 8), heads[:, :, [0, 0, 1, 1]])
    other = models.mamba_layers(teacher, 1, state=4, like_attention=True).model.layers[0].mamba
    with pytest.raises(ValueError, match="state: got 4, allowed is the width of a head of the attention"):
        models.start_from_attention(other, attention)


@pytest.mark.parametrize("layers", [[], [0], [DEPTH - 1], [2, 2]])
def test_layers_that_cannot_be_replaced_are_refused(parts, teacher, layers):
    with pytest.raises(ValueError, match=rf"layers: got .* allowed are different ones of 1\.\.{DEPTH - 2}"):
        parts["_real_weights_models"].dropped(teacher, layers)


def test_cache_bytes(parts, teacher):
    count = parts["_real_weights_units"].cache_bytes_per_token
    models = parts["_real_weights_models"]
    one = 2 * 2 * 8 * 2  # keys and values, two heads of width 8, two bytes
    mixer = models.mamba_layers(teacher, 1, state=8).model.layers[0].mamba.state_dict()
    assert count(teacher) == DEPTH * one
    assert count(models.dropped(teacher, [1, 4])) == (DEPTH - 2) * one
    assert count(models.with_mamba(teacher, {2: mixer}, state=8)) == (DEPTH - 1) * one


# ---------------------------------------------------------------------- fit
@pytest.fixture(scope="module")
def given(parts, teacher, tmp_path_factory):
    """The folders that units need: the tiny teacher's, and random rows."""
    folder = tmp_path_factory.mktemp("given")
    _small_teacher(teacher)(folder)
    _small_rows(folder)
    return {"teacher": folder, "rows": folder}


def _small_teacher(teacher):
    return lambda folder: teacher.save_pretrained(folder)


def _small_rows(folder, *others):
    generator = torch.Generator().manual_seed(3)
    sizes = {"train": 64, "search": 4, "bible": 4, "shakespeare": 4, "new": 4}
    rows = {name: torch.randint(0, 96, (count, LENGTH), generator=generator) for name, count in sizes.items()}
    save_file(rows, Path(folder) / "rows.safetensors")


def _preset(parts, **changes):
    sizes = {"fit_tokens": 60 * LENGTH, "linear_tokens": 60 * LENGTH, "train_tokens": 8 * LENGTH}
    sizes |= {"test_tokens": 4 * LENGTH, "seeds": 2, "length": LENGTH, "state": 8, "replaced": ((1, 3),)}
    return parts["_real_weights_units"].Preset(**sizes | changes)


def _fit(parts, given, checkpoints, **changes):
    module = parts["_real_weights_fit"]
    options = module.FitOptions(**{"tokens": 60 * LENGTH, "state": 8} | changes)
    teacher = parts["_real_weights_data"].load_teacher(given["teacher"])
    rows = parts["_real_weights_data"].load_rows(given["rows"])
    fit = module.MixerFit(teacher, [1, 3], options, checkpoints)
    return fit, lambda: fit.run(rows["train"], rows["search"])


def test_a_killed_fit_goes_on_where_it_was(parts, given, tmp_path, monkeypatch):
    whole, run = _fit(parts, given, tmp_path / "whole")
    result = run()
    assert result["earlier_seconds"] == {"cpu": 0.0, "wall": 0.0} and not (tmp_path / "whole").exists()

    monkeypatch.setattr(parts["_real_weights_fit"], "KEPT_EVERY", 0)
    killed, run = _fit(parts, given, tmp_path / "killed")
    step = killed._one_step
    monkeypatch.setattr(killed, "_one_step", lambda rows, at: step(rows, at) if at < 4 / 15 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run()

    again, run = _fit(parts, given, tmp_path / "killed")
    steps = []
    step = again._one_step
    monkeypatch.setattr(again, "_one_step", lambda rows, at: (steps.append(at), step(rows, at)))
    found = run()
    assert steps == [k / 15 for k in range(4, 15)] and found["earlier_seconds"]["cpu"] > 0
    torch.testing.assert_close(again.mixers.state_dict(), whole.mixers.state_dict(), atol=1e-6, rtol=1e-5)
    assert found["explained"] == pytest.approx(result["explained"], abs=1e-4) and found["tokens"] == 60 * LENGTH


@pytest.mark.parametrize("alike, margin", [(False, 0.05), (True, 0.0)])
def test_a_fit_learns_and_refuses_more_tokens_than_there_are(parts, given, tmp_path, alike, margin):
    rows = parts["_real_weights_data"].load_rows(given["rows"])
    fit, run = _fit(parts, given, tmp_path, like_attention=alike)
    before, after = fit.explained(rows["search"]), run()["explained"]
    assert all(after[layer] > before[layer] + margin for layer in ("1", "3")), (before, after)
    _, greedy = _fit(parts, given, tmp_path, tokens=65 * LENGTH)
    with pytest.raises(ValueError, match="fit_tokens: got 1,040, allowed are at most the 1,024"):
        greedy()


# ---------------------------------------------------------------------- units
@pytest.fixture
def small(parts, teacher, tmp_path, monkeypatch):
    """`real_weights.py` with the tiny teacher and random rows: a function of its words, and the units it has done."""
    main, units, done = parts["real_weights"], parts["_real_weights_units"], []
    monkeypatch.setattr(units, "make_teacher", _small_teacher(teacher))
    monkeypatch.setattr(units, "make_rows", _small_rows)
    monkeypatch.setitem(units.PRESETS, "smoke", _preset(parts))
    really = main._tell
    monkeypatch.setattr(main, "_tell", lambda unit, record: (done.append(main._named(unit)), really(unit, record)))

    def run(*words):
        done.clear()
        places = ("--work", str(tmp_path / "work"), "--results", str(tmp_path), "--workers", "1")
        return main.main(["--preset", "smoke", *places, *words])

    return run, done


def test_finished_units_are_not_run_again(parts, small, tmp_path, capsys):
    run, done = small
    file, written = tmp_path / "real_weights.jsonl", tmp_path / "real_weights_smoke.json"
    assert run("--dry_run") is False and not file.exists()
    assert "19 units and" in capsys.readouterr().out  # teacher, rows, fit, maps, and 5 variants 3 times
    assert run("--minutes", "1e-6") is False and done == [] and not file.exists()
    assert run("--variants", "teacher", "linear") is False
    assert done[:4] == ["teacher", "rows", "teacher", "maps, 1+3"] and len(done) == 3 + 3 + 3 and not written.exists()
    assert run() is True
    assert len(done) == 1 + 3 * 3 and done[0] == "fit, 1+3" and written.exists()
    lines = file.read_text().splitlines()
    assert len(lines) == 19
    assert run() is True and done == []

    last = "mamba2, 1+3, trained end to end, seed 1"
    file.write_text("\n".join(lines[:-1]) + "\n")  # the last unit is lost, and the machine was wiped
    shutil.rmtree(tmp_path / "work")
    assert run() is True
    assert done == ["teacher", "rows", "fit, 1+3", last]
    first, again = (json.loads(text)["record"]["texts"] for text in (lines[-1], file.read_text().splitlines()[-1]))
    assert again == first


def test_the_tables_are_made_before_what_is_beside_the_target(parts, small, tmp_path, capsys):
    run, _ = small
    written = tmp_path / "real_weights_smoke.json"
    assert run("--variants", "teacher", "dropped") is False and not written.exists()
    assert run("--variants", "mamba2") is False
    assert "linear, no attention to come" in capsys.readouterr().out
    partial = json.loads(written.read_text())
    assert partial["unfinished"] == ["linear", "no attention"]
    entry = partial["table"]["1+3"]
    assert set(entry["loss"]["after"]) == {"teacher", "dropped", "mamba2"} and entry["gain_over"]["after"] == {}
    assert set(entry["share"]["after"]) == {"mamba2"}
    assert run() is True
    whole = json.loads(written.read_text())["table"]["1+3"]
    assert whole["share"]["after"]["mamba2"] == entry["share"]["after"]["mamba2"]


def test_presets_share_what_does_not_depend_on_the_difference(parts):
    units, preset = parts["_real_weights_units"].Units, _preset(parts)
    own = {unit.digest for unit in units(preset).all()}
    others = units(replace(preset, train_tokens=4 * LENGTH)).all()
    new = [unit for unit in others if unit.digest not in own]
    assert len(new) == 5 * 2 and all("seed" in unit.settings for unit in new)
    fewer = units(replace(preset, fit_tokens=LENGTH)).all()
    new = [unit for unit in fewer if unit.digest not in own]
    assert len(new) == 1 + 3 and {unit.settings.get("variant") for unit in new} == {None, "mamba2"}


def test_the_tables_are_made_of_the_records(parts, small, tmp_path, capsys):
    run, _ = small
    assert run() is True
    results = json.loads((tmp_path / "real_weights_smoke.json").read_text())
    assert results["unfinished"] == []
    entry = results["table"]["1+3"]
    assert entry["cache_saved"] == pytest.approx(2 / DEPTH)
    assert len(entry["share"]["after"]["mamba2"]["all"]["values"]) == 2
    assert entry["share"]["before"]["mamba2"]["all"]["half_width"] is None
    loss = {v: entry["loss"]["after"][v]["all"]["values"] for v in ("teacher", "dropped", "mamba2")}
    expected = [(d - m) / (d - t) for t, d, m in zip(*loss.values())]
    assert entry["share"]["after"]["mamba2"]["all"]["values"] == pytest.approx(expected)
    assert entry["perplexity"]["before"]["teacher"]["new"]["mean"] == pytest.approx(
        math.exp(entry["loss"]["before"]["teacher"]["new"]["mean"])
    )
    linear = entry["loss"]["after"]["linear"]["all"]["values"]
    assert set(entry["gain_over"]["after"]) == {"linear", "no attention"}
    gain = entry["gain_over"]["after"]["linear"]["all"]
    assert gain["values"] == pytest.approx([x - y for x, y in zip(linear, loss["mamba2"])])
    assert gain["low"] == pytest.approx(gain["mean"] - 12.706 * abs(gain["values"][0] - gain["values"][1]) / 2)
    assert set(results["fit"]) == {"explained", "tokens", "parameters_of_a_mixer"}
    assert results["seconds"]["cpu"] > 0
    assert "key-value bytes saved: 33.3%" in capsys.readouterr().out


def test_the_end_to_end_step_leaves_identity_bridges_alone(parts, given, tmp_path):
    units = parts["_real_weights_units"]
    units.fit_maps({"layers": [3], "tokens": 60 * LENGTH}, given, tmp_path, tmp_path / "none")
    settings = {"layers": [3], "test_tokens": 4 * LENGTH, "train_tokens": 8 * LENGTH}
    settings |= {"rows_per_step": 2, "learning_rate": 1e-4, "seed": 0}
    for variant, trained in (("dropped", 0), ("linear", 1)):
        needs = given | {"maps": tmp_path}
        whole = sum(p.numel() for p in units.build(settings | {"variant": variant}, needs).parameters())
        bridge = 32 * 32 + 32
        found = units.measure_variant(settings | {"variant": variant}, needs, None, tmp_path / "none")
        assert found["parameters"] == whole - (1 - trained) * bridge
        assert found["train_tokens"] == 8 * LENGTH and set(found["texts"]) == {"bible", "shakespeare", "new"}


def test_share_of_gap(parts):
    share = parts["real_weights"].share_of_gap
    assert share([4.0, 4.0], [3.0, 3.5], [2.0, 3.0]) == pytest.approx([0.5, 0.5])
    assert share([4.0], [2.0], [2.0]) == [1.0] and share([4.0], [4.0], [2.0]) == [0.0]


def test_sections_newer_than_a_date(parts):
    text = "note\n\n3.1 (2026-02-01)\n======\n\n- new one\n\n{0}\n\n3.0 (2026-01-01)\n======\n\n{0}\n\n- other\n\n"
    text = (text + "2.9 (2024-01-01)\n======\n\n- old\n").format("- backported " + "word " * 20)
    data = parts["_real_weights_data"]
    sections = data.newer_releases(text, data.datetime.date(2025, 6, 1))
    assert len(sections) == 2 and "- new one" in sections[0] and "- other" in sections[1]
    assert sum(section.count("backported") for section in sections) == 1
    assert not any("old" in section or "note" in section for section in sections)


@pytest.mark.parametrize("source", [True, False])
def test_files_of_a_package_are_fetched_once(source, tmp_path, monkeypatch):
    content = {"pack-1/texts/b.txt": b"second", "pack-1/texts/a.txt": b"first", "pack-1/setup.py": b"raise"}
    archive = tmp_path / ("pack-1.tar.gz" if source else "pack-1.whl")
    if source:
        with tarfile.open(archive, "w:gz") as opened:
            for name, data in content.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                opened.addfile(member, io.BytesIO(data))
    else:
        with zipfile.ZipFile(archive, "w") as opened:
            for name, data in content.items():
                opened.writestr(name, data)
    asked = []
    monkeypatch.setattr(packages, "_download", lambda *given: (asked.append((given[0], given[2])), archive)[1])
    for _ in range(2):
        files = packages.fetch_files("pack==1", "*/texts/*.txt", tmp_path / "here" / "texts", source)
        assert [(file.name, file.read_bytes()) for file in files] == [("a.txt", b"first"), ("b.txt", b"second")]
    assert asked == [("pack==1", source)]
    with pytest.raises(ValueError, match=r"pattern: got '\*.md', which matches \[\] of pack==1"):
        packages.fetch_files("pack==1", "*.md", tmp_path / "none", source)
    assert not (tmp_path / "none").exists()
