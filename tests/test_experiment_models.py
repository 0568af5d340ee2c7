"""Builders of an experiment's models, and what a run measures."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM

from modeling_manticore.building.costs import count
from modeling_manticore.experiments import tasks
from modeling_manticore.experiments.architectures import (
    Sizes,
    component_config,
    costs_of,
)
from modeling_manticore.experiments.heads import ClassificationModel, LogitEnsemble
from modeling_manticore.experiments.models import BUILDERS, Request, build, choice_of, hybrid_in
from modeling_manticore.experiments.schema import KINDS, ModelEntry, Shape, Training
from modeling_manticore.experiments.tasks import Task, collate, data_of, frequency_baseline, register, vocabulary_of
from modeling_manticore.experiments.text_rows import check_text_rows
from modeling_manticore.experiments.training import run
from modeling_manticore.tasks.text import help_topics, train_tokenizer


SHAPE = Shape(hidden_size=32, layers=4, blocks=4, head_size=16, state_size=8, chunk_size=8)
SIZES = Sizes(vocabulary=16, length=16)
FAMILIES = ["gpt_neox", "mamba2"]


def request(kind: str, head: str = "tokens", **fields) -> Request:
    """A request for a small model."""
    own = {name: fields.pop(name) for name in list(fields) if name in ModelEntry.__dataclass_fields__}
    weights = own.pop("weights", None) if kind == "discretized" else None
    entry = ModelEntry(name="model", kind=kind, **own)
    return Request(entry, SHAPE, fields.pop("sizes", SIZES), head, 0, FAMILIES, weights=weights, **fields)


def layers_of(model) -> list[tuple[str, int, int]]:
    """Family, start and stop of every block of a discretized hybrid."""
    config = model.config
    assert config.is_discretized
    paths = [block[0] for block in config.blocks]
    return [(config.components[p["component"]].model_type, p["start"], p["stop"]) for p in paths]


def test_there_is_a_builder_for_every_kind():
    assert BUILDERS.keys() == KINDS.keys()


def test_mambaformer_begins_with_mamba_and_striped_with_attention():
    attention, mamba = [("gpt_neox", i, i + 1) for i in (0, 1)], [("mamba2", i, i + 1) for i in (0, 1)]
    assert layers_of(build(request("mambaformer"))) == [mamba[0], attention[0], mamba[1], attention[1]]
    assert layers_of(build(request("striped"))) == [attention[0], mamba[0], attention[1], mamba[1]]


def test_a_discretized_hybrid_has_the_choice_and_nothing_of_the_search():
    supernet = ModelEntry(name="s", kind="searched")
    model = build(request("discretized", of="s", supernet=supernet, choice=[1, 0, 0, 1]))
    assert layers_of(model) == [("mamba2", 0, 1), ("gpt_neox", 1, 3), ("mamba2", 3, 4)]
    torch.manual_seed(7)
    again = build(request("discretized", of="s", supernet=supernet, choice=[1, 0, 0, 1]))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_the_best_choice_with_few_attention_blocks():
    weights = [[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.3, 0.7]]
    asked = request(
        "discretized", of="s", supernet=ModelEntry("s", "searched"), weights=weights, max_attention_blocks=2
    )
    build(asked)
    assert asked.choice == [0, 1, 0, 1]


def test_mixtures_keep_their_weights():
    uniform = hybrid_in(build(request("mixture", weights="uniform")))
    random = hybrid_in(build(request("mixture", weights="random")))
    assert all(torch.allclose(point, torch.tensor([0.5, 0.5])) for point in uniform.mixture_weights())
    assert not any(torch.allclose(point, torch.tensor([0.5, 0.5])) for point in random.mixture_weights())
    searched = hybrid_in(build(request("searched")))
    for hybrid, trains in ((uniform, False), (random, False), (searched, True)):
        flags = {p.requires_grad for name, p in hybrid.named_parameters() if "mixture" in name}
        assert flags == {trains}


@pytest.mark.parametrize("head", ["tokens", "last_state", "sequence"])
@pytest.mark.parametrize("family", ["gpt_neox", "llama", "mamba2"])
def test_a_component_of_so_many_parameters(family, head):
    sizes = Sizes(16, 16, 3 if head == "sequence" else 0)
    wanted = count(build(request("component", head, family="gpt_neox", sizes=sizes))) + 9_000
    own = {"family": family, "of": "other", "sizes": sizes}
    found = count(build(request("same_parameters", head, parameters=wanted, **own)))
    assert abs(found - wanted) <= 0.02 * wanted
    with pytest.raises(ValueError, match="same_parameters: got 100 parameters"):
        build(request("same_parameters", head, parameters=100, **own))


def test_costs_of_a_component_and_of_a_supernet():
    attention = costs_of(component_config("gpt_neox", SHAPE, SIZES), 16)
    assert attention["cache_bytes_per_token"] == 4 * 2 * 32 * 4  # layers, keys and values, width, bytes
    # Of a GPT-NeoX layer: 4 d^2 of attention and 8 d^2 of its feed-forward part, at 2; scores and sums over 16 tokens.
    assert attention["flops_per_token"] == 4 * (2 * 12 * 32**2 + 4 * 32 * 16) + 2 * 32 * 16
    mamba = costs_of(component_config("mamba2", SHAPE, SIZES), 16)
    both = costs_of(build(request("searched")).config, 16)
    assert mamba["cache_bytes_per_token"] == 0 and both["cache_bytes_per_token"] == attention["cache_bytes_per_token"]
    assert both["flops_per_token"] > attention["flops_per_token"] + mamba["flops_per_token"]


def test_the_ensemble_is_the_mean_of_probabilities():
    members = [AutoModelForCausalLM.from_config(component_config(family, SHAPE, SIZES)) for family in FAMILIES]
    ids = torch.randint(0, 16, (2, 12))
    found = LogitEnsemble(members).eval()(ids, labels=ids)
    parts = torch.stack([member.eval()(ids).logits.softmax(-1) for member in members])
    torch.testing.assert_close(found["logits"].exp(), parts.mean(dim=0))
    expected = torch.nn.functional.cross_entropy(parts.mean(0).log()[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(found["loss"], expected)
    with pytest.raises(ValueError, match="sources: got 1"):
        LogitEnsemble(members[:1])


def test_padding_changes_no_class():
    model = build(request("mambaformer", "sequence", sizes=Sizes(16, 16, 3))).eval()
    assert isinstance(model, ClassificationModel)
    rows = [{"input_ids": list(range(1, 6)), "label": 0}, {"input_ids": list(range(1, 13)), "label": 2}]
    with torch.no_grad():
        together = model(**collate(rows))["logits"]
        alone = torch.cat([model(**collate([row]))["logits"] for row in rows])
    assert together.shape == (2, 3)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def toy(rows: int = 24, seed: int = 0) -> DatasetDict:
    """Is the first token 1 or 2? Rows of two lengths; a longer split, too."""
    draws = np.random.default_rng(seed)

    def made(count: int, longer: int) -> Dataset:
        labels = draws.integers(0, 2, count)
        ids = [[1 + int(label)] + [3] * (3 + longer + i % 2) for i, label in enumerate(labels)]
        return Dataset.from_dict({"input_ids": ids, "label": labels})

    return DatasetDict(train=made(rows, 0), validation=made(8, 0), test=made(8, 0), test_2x=made(8, 4))


@pytest.fixture
def toy_task():
    register("toy", Task(f"{__name__}:toy", "modeling_manticore.experiments.tasks:class_accuracy", head="sequence"))
    yield
    del tasks.TASKS["toy"]
    tasks._made.cache_clear()


def settings(model: dict, **changes) -> dict:
    """Settings of a run on the toy task."""
    training = {"batch_size": 8, "stop_at": 0.995, "eval_steps": 4}
    return {
        "model": model,
        "families": FAMILIES,
        "shape": asdict(SHAPE) | {"layers": 2, "blocks": 2},
        "task": {"task": "toy", "options": {}, "also_tested": [{"name": "longer", "split": "test_2x"}]},
        "training": asdict(Training()) | training,
        "learning_rate": 1e-2,
        "seed": 0,
        "steps": 40,
        "tested": True,
    } | changes


def test_a_run_learns_stops_early_and_says_what_it_took(toy_task):
    record = run(settings({"kind": "searched"}))
    assert record["test"]["accuracy"] == 1.0 and record["validation"]["accuracy"] >= 0.995
    assert record["steps_done"] < 40 and record["steps_done"] % 4 == 0
    assert record["also_tested"].keys() == record["also_baseline"].keys() == {"longer"}
    data = data_of("toy", {}, 0)
    # Batches hold rows of 4 and 5 tokens: all are padded to 5.
    assert record["tokens"] == record["steps_done"] * 8 * 5
    assert record["training_flops"] == 3 * record["flops_per_token"] * record["tokens"]
    assert [sum(point) for point in record["weights"]] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert record["choice"] == [int(a < b) for a, b in record["weights"]]
    labels = list(data["test"]["label"])
    most = np.bincount(data["train"]["label"]).argmax()
    assert record["baseline"] == np.mean([label == most for label in labels])
    assert record["versions"]["torch"] == torch.__version__ and record["cpu_seconds"] > 0


def test_tuning_runs_see_no_test_rows_and_seeds_reproduce(toy_task):
    model = {"kind": "component", "family": "gpt_neox"}
    first, again = (run(settings(model, tested=False, steps=3)) for _ in range(2))
    assert "test" not in first and first["validation"] == again["validation"]
    assert first["validation"] != run(settings(model, tested=False, steps=3, seed=1))["validation"]


def test_pretrained_models_are_continued_searched_and_joined(tmp_path):
    for name, family in (("first-0", "gpt_neox"), ("second-0", "mamba2")):
        torch.manual_seed(3)
        config = component_config(family, SHAPE, SIZES, layers=2)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    sources = [str(tmp_path / "first-{seed}"), str(tmp_path / "second-{seed}")]
    rows = torch.randint(0, 16, (8, 16))
    continued = build(request("continued", source=sources[0]))
    assert continued.config.model_type == "gpt_neox"
    members = build(request("ensemble", sources=sources)).members
    assert [member.config.model_type for member in members] == FAMILIES
    searched = build(request("searched", sources=sources, blocks=2, rows=rows))
    assert choice_of(searched) == [0, 0] and not searched.config.is_discretized
    layout = ModelEntry("s", "searched", sources=sources, blocks=2)
    hybrid = build(request("discretized", of="s", supernet=layout, choice=[0, 1], rows=rows))
    assert layers_of(hybrid) == [("gpt_neox", 0, 1), ("mamba2", 1, 2)]
    own = dict(hybrid.named_parameters())
    given = continued.gpt_neox.layers[0].attention.query_key_value.weight
    assert any(parameter.shape == given.shape and torch.equal(parameter, given) for parameter in own.values())


def test_pretrained_models_on_text(tmp_path):
    tokenizer = train_tokenizer(help_topics()[:5], 300)
    folders = [tmp_path / "first-0", tmp_path / "second-0"]
    for folder, family in zip(folders, FAMILIES):
        config = component_config(family, SHAPE, Sizes(len(tokenizer), 16), layers=2)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    options = {"texts": ["topics"], "tokenizer": str(folders[0]), "row_length": 16, "characters": 60_000}
    options |= {"train_rows": 24, "validation_rows": 8, "test_rows": 8}
    first, second = (data_of("text", options, seed) for seed in (0, 1))
    assert first["test"][:] == second["test"][:] and first["train"][:] != second["train"][:]
    assert not set(map(tuple, first["train"]["input_ids"])) & set(map(tuple, first["test"]["input_ids"]))
    sources = [str(tmp_path / "first-{seed}"), str(tmp_path / "second-{seed}")]
    changes = {"task": {"task": "text", "options": options, "also_tested": []}, "steps": 2, "learning_rate": 1e-3}
    ensemble = run(settings({"kind": "ensemble", "sources": sources}, **changes))
    single = run(settings({"kind": "continued", "source": sources[0]}, **changes))
    searched = run(settings({"kind": "searched", "sources": sources, "blocks": 2}, **changes))
    assert ensemble["parameters"] > single["parameters"] and ensemble["flops_per_token"] > single["flops_per_token"]
    for record in (ensemble, single, searched):
        assert record["steps_done"] == 2 and record["tokens"] == 2 * 8 * 16
        assert 3.0 < record["test"]["loss"] < 8.0
    with pytest.raises(ValueError, match="texts: got 'nowhere'"):
        check_text_rows(["nowhere"], "tokenizer", 64, 1, 1, 1, 1, 0)


def test_data_of_mad_and_a_guess_by_frequency():
    options = {"vocab_size": 16, "sequence_length": 8, "train_rows": 32, "validation_rows": 16, "test_rows": 16}
    data = data_of("mad/memorization", options, 0)
    assert vocabulary_of(data, "tokens", options) == 16
    train = Dataset.from_dict({"input_ids": [[1, 5, 2, 6, 1, 5]], "labels": [[-100, -100, 5, 6, -100, 5]]})
    ids = [[1, 6, 2, 6, 3, 5, 4, 6], [1, 5, 2, 6, 3, 6, 4, 5]]
    labels = [[-100] * 5 + [5, -100, 6], [-100] * 7 + [5]]
    test = Dataset.from_dict({"input_ids": ids, "labels": labels})
    # Before the three answers 6, 6 and 6 were the most frequent of {5, 6}: one is right. Always 5 gets two right.
    assert frequency_baseline(train, test, "tokens") == pytest.approx(2 / 3)
    labels[0][5] = 6
    test = Dataset.from_dict({"input_ids": ids, "labels": labels})
    assert frequency_baseline(train, test, "tokens") == pytest.approx(2 / 3)
    labels[1][7] = 6
    test = Dataset.from_dict({"input_ids": ids, "labels": labels})
    assert frequency_baseline(train, test, "tokens") == 1.0


def test_a_task_of_a_name_that_is_taken_is_refused():
    with pytest.raises(ValueError, match="name: got 'mqar', which is taken"):
        register("mqar", Task("a:b", "a:b"))
    with pytest.raises(ValueError, match="head: got 'tail'"):
        register("new", Task("a:b", "a:b", head="tail"))
