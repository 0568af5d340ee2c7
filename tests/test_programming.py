"""Programming: mixture weights searched on MAD tasks, around the blocks of a supernet that is not changed."""

import json
from dataclasses import replace

import pytest
import torch
from search_runs import supernet
from tiny import component
from transformers import TrainerCallback

from modeling_manticore import (
    ManticoreForCausalLM,
    ManticoreForSequenceClassification,
    ManticoreTrainingArguments,
    ProgrammingReport,
    discretize,
    lora_config,
    program,
)
from modeling_manticore.search import programming
from modeling_manticore.search.programming_data import (
    all_batches,
    drawn_batches,
    joint_rows,
    settings_of,
    task_weights,
)
from modeling_manticore.search.programming_model import with_fresh_ends


RECALL = {"in-context-recall": {"sequence_length": 16}}
TINY = {"rows": 48, "validation_rows": 8, "batch_size": 4, "steps": 6, "mixture_learning_rate": 0.1, "progress": False}


def state_of(model):
    """What must not change: tensors, flags, modes, configuration."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    return tensors, flags, modes, model.config.to_dict()


def assert_same(model, before):
    tensors, *rest = before
    after, *rest_after = state_of(model)
    assert rest == rest_after and after.keys() == tensors.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in after.items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("strategy", programming.KINDS)
def test_weights_are_found_and_the_model_is_untouched(strategy):
    model = supernet("softmax", dropout=0.1).train()
    model.trunk.blocks[0].paths[1].slice.requires_grad_(False)
    before = state_of(model)
    report = program(model, settings=RECALL, strategy=strategy, train_components=strategy == "darts", **TINY)
    assert_same(model, before)
    assert len(report.weights) == 2
    for point in report.weights:
        assert sum(point) == pytest.approx(1) and min(point) >= 0 and abs(point[0] - 0.5) > 1e-4
    assert report.choice == [point.index(max(point)) for point in report.weights]
    model.set_mixture_weights(report.weights)
    for point, found in zip(model.mixture_weights(), report.weights):
        assert point.tolist() == pytest.approx(found, abs=1e-6)


def test_the_model_is_untouched_by_an_error(monkeypatch):
    class Fails(TrainerCallback):
        def __init__(self, *arguments):
            pass

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise RuntimeError("in the middle")

    monkeypatch.setattr(programming, "_Bar", Fails)
    model = supernet("softmax")
    before = state_of(model)
    with pytest.raises(RuntimeError, match="in the middle"):
        program(model, settings=RECALL, train_components=True, apply=True, **TINY)
    assert_same(model, before)


def test_a_seed_decides(tmp_path):
    model = supernet("softmax")
    torch.manual_seed(5)
    first = program(model, settings=RECALL, seed=3, **TINY)
    torch.manual_seed(6)
    second, other = (program(model, settings=RECALL, seed=seed, apply=True, **TINY) for seed in (3, 4))
    assert first.weights == second.weights and first.metrics == second.metrics
    # `apply` set the weights of the second run, from which the third started.
    assert other.weights != second.weights
    assert model.mixture_weights()[1].tolist() == pytest.approx(other.weights[1], abs=1e-6)


def test_several_tasks_and_the_report(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(programming, "_trainer", lambda *given: made.append(trainer_of(*given)) or made[0])
    tasks = {"in-context-recall": 3, "memorization": 1}
    settings = RECALL | {"memorization": {"vocab_size": 12, "sequence_length": 8}}
    options = dict(TINY, steps=8, eval_steps=3)
    report = program(supernet("softmax"), tasks, settings=settings, folder=tmp_path / "a" / "report", **options)
    (trainer,) = made
    batches = [trainer.train_dataset[i] for i in range(8)]
    assert sorted(batch["input_ids"].shape for batch in batches) == [(4, 8)] * 2 + [(4, 16)] * 6
    for batch in batches:
        # Every batch is of one task, whose tokens and labels have ids of their own; the copy is sized for all.
        own = range(16) if batch["input_ids"].shape[1] == 16 else range(16, 28)
        assert set(batch["input_ids"].unique().tolist()) <= set(own)
        assert set(batch["labels"].unique().tolist()) - {-100} <= set(own)
    assert trainer.model.config.vocab_size == 28

    assert report.tasks == {"in-context-recall": 0.75, "memorization": 0.25}
    for task in tasks:
        course = report.metrics[task]
        assert [point["step"] for point in course] == [0, 3, 6, 8]
        assert all(0 <= point["accuracy"] <= 1 and point["loss"] > 0 for point in course)
        assert task in str(report)
    assert report.course[1][0][0] == (0, 0.5) and report.course[1][0][-1][1] == pytest.approx(report.weights[1][0])
    assert "gpt_neox[0:1]" in str(report) and "8 steps" in str(report)
    assert {file.name for file in (tmp_path / "a" / "report").iterdir()} == {
        "programming.json",
        "mixture_weights.png",
        "report.html",
    }
    assert ProgrammingReport.load(tmp_path / "a" / "report") == report
    assert json.loads((tmp_path / "a" / "report" / "programming.json").read_text())["weights"] == report.weights
    with pytest.raises(ValueError, match="allowed is a folder with a programming.json"):
        ProgrammingReport.load(tmp_path)


trainer_of = programming._trainer


def test_accuracy_is_of_the_validation_rows():
    """What the report says at the end is what the model of that moment answers on rows that no step saw."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programming, "_trainer", lambda *given: made.append(trainer_of(*given)) or made[0])
        report = program(supernet("softmax"), settings=RECALL, strategy="darts", **TINY)
    (trainer,) = made
    rows = {
        name: data.rows["in-context-recall"].input_ids
        for name, data in (
            ("train", trainer.train_dataset),
            ("search", trainer.search_dataset),
            ("validation", trainer.eval_dataset["in-context-recall"]),
        )
    }
    assert {name: len(ids) for name, ids in rows.items()} == {"train": 48, "search": 48, "validation": 8}
    assert len(torch.cat(list(rows.values())).unique(dim=0)) == 104
    held_out = trainer.eval_dataset["in-context-recall"].rows["in-context-recall"]
    with torch.no_grad():
        guessed = trainer.model.eval()(input_ids=held_out.input_ids).logits.argmax(-1)[:, :-1]
    asked = held_out.labels[:, 1:] != -100
    share = (guessed == held_out.labels[:, 1:])[asked].float().mean().item()
    assert report.metrics["in-context-recall"][-1]["accuracy"] == pytest.approx(share)


def test_recall_is_learned_through_frozen_blocks():
    """Fresh ends and projectors alone lower the loss of a task far below a guess."""
    options = dict(TINY, steps=60, rows=64, batch_size=16, learning_rate=3e-2)
    facts = {"memorization": {"vocab_size": 9, "sequence_length": 8}}
    report = program(supernet("softmax"), "memorization", settings=facts, **options)
    first, last = report.metrics["memorization"][0], report.metrics["memorization"][-1]
    assert last["accuracy"] > 0.9 and last["loss"] < 0.5 * first["loss"]


@pytest.mark.parametrize("family", ["gpt2", "opt_projected", "gemma3_text", "jamba", "recurrent_gemma"])
def test_fresh_ends(family):
    model = ManticoreForCausalLM.from_components([component(family), component("mamba2")], num_blocks=2)
    before = state_of(model)
    frozen, copied = (with_fresh_ends(model, 11, train_components=train, seed=2) for train in (False, True))
    assert_same(model, before)
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    for fresh, train in ((frozen, False), (copied, True)):
        assert fresh.config.vocab_size == 11 == fresh.config.components[1].vocab_size
        ends = [stem.get_input_embeddings() for stem in fresh.trunk.stems.values()]
        ends += [head.get_output_embeddings() for head in fresh.heads.values()]
        assert [end.weight.shape[0] for end in ends] == [11] * 4
        names = {name for name, p in fresh.named_parameters(remove_duplicate=False) if p.shape[:1] == (11,)}
        for name, parameter in fresh.named_parameters():
            in_slice = ".slice." in name
            assert parameter.requires_grad == (train or not in_slice)
            assert (parameter.data_ptr() in shared) == (in_slice and not train)
            if name not in names:
                assert torch.equal(parameter, model.get_parameter(name))
        assert set(fresh.all_tied_weights_keys) == set(model.all_tied_weights_keys)
        logits = fresh(input_ids=torch.arange(10)[None]).logits
        assert logits.shape == (1, 10, 11) and torch.isfinite(logits).all()
    again, other = (with_fresh_ends(model, 11, seed=seed).state_dict() for seed in (2, 3))
    assert all(torch.equal(value, again[name]) for name, value in frozen.state_dict().items())
    assert not torch.equal(frozen.get_input_embeddings().weight, other["model.stems.0." + embedding_name(model)])


def test_a_skip_path_has_a_weight_like_any_other():
    model = ManticoreForCausalLM.from_components(
        [component("gpt_neox"), component("mamba2")], num_blocks=3, skip_paths=True
    )
    report = program(model, settings=RECALL, apply=True, **TINY)
    assert [len(point) for point in report.weights] == [2, 3, 2] and report.paths[1][2] == "skip"
    assert model.mixture_weights()[1].tolist() == pytest.approx(report.weights[1], abs=1e-6)


def embedding_name(model):
    stem = model.trunk.stems["0"]
    return next(name for name, p in stem.named_parameters() if p is stem.get_input_embeddings().weight)


def test_half_precision():
    model = supernet("softmax").to(torch.bfloat16)
    fresh = with_fresh_ends(model, 16)
    assert fresh.get_input_embeddings().weight.dtype == torch.bfloat16
    assert all(torch.isfinite(torch.tensor(point)).all() for point in program(model, settings=RECALL, **TINY).weights)


def test_batches():
    weights = task_weights({"in-context-recall": 1, "memorization": 2.0, "selective-copying": 1})
    settings = {"memorization": {"vocab_size": 12}, "selective-copying": {"copies": 2, "sequence_length": 9}}
    found = settings_of(weights, settings | RECALL, 20, 64)
    assert found["memorization"].train_rows == 20 and found["memorization"].sequence_length == 32
    rows, vocabulary = joint_rows(found, False, 8, 1)
    assert vocabulary == 16 + 12 + 16 and rows.keys() == {"train", "validation"}
    generator = torch.Generator().manual_seed(0)
    batches = drawn_batches(rows["train"], weights, 10, 7, generator)
    counts = [sum(task == name for task, _ in batches.plan) for name in weights]
    assert sum(counts) == 10 and counts[1] == 5
    # Rows come again only when all have come.
    seen = torch.cat([chosen for task, chosen in batches.plan if task == "memorization"]).bincount(minlength=20)
    assert seen.sum() == 35 and seen.min() >= 1 and seen.max() <= 2
    again = drawn_batches(rows["train"], weights, 10, 7, torch.Generator().manual_seed(0))
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(batches.plan, again.plan))
    whole = all_batches(rows["validation"], "memorization", 3)
    assert torch.equal(torch.cat([whole[i]["labels"] for i in range(3)]), rows["validation"]["memorization"].labels)


ERRORS = {
    "none": ({"tasks": []}, r"tasks: got \[\], allowed are a MAD task"),
    "no_weights": ({"tasks": {}}, "tasks: got {}"),
    "unknown": ({"tasks": "recall"}, "tasks: got 'recall', allowed are in-context-recall, fuzzy"),
    "compression": (
        {"tasks": ["compression"]},
        "tasks: got 'compression', whose decoder takes the place of the heads",
    ),
    "twice": ({"tasks": ["memorization"] * 2}, "allowed is every task once"),
    "weight": ({"tasks": {"memorization": 0}}, r"tasks\['memorization'\]: got 0, allowed is a positive"),
    "small": (
        {
            "tasks": {"memorization": 1, "in-context-recall": 1e-3},
            "settings": {"memorization": {"sequence_length": 8, "vocab_size": 9}} | RECALL,
        },
        r"tasks\['in-context-recall'\]: got the weight 0.000999, allowed is at least 0.1667",
    ),
    "context": ({"settings": {"in-context-recall": {"sequence_length": 32}}}, "got 32, allowed are at most 20 tokens"),
    "other_task": ({"settings": {"memorization": {}}}, "settings: got 'memorization', allowed are the tasks"),
    "settings": ({"settings": [1]}, "settings: got list, allowed is a dictionary"),
    "field": ({"settings": {"in-context-recall": {"copies": 3}}}, "copies: got 3 for 'in-context-recall'"),
    "steps": ({"steps": 0}, "steps: got 0, allowed is an integer of at least 1"),
    "eval_steps": ({"eval_steps": 1.5}, "eval_steps: got 1.5"),
    "seed": ({"seed": -1}, "seed: got -1"),
    "strategy": ({"strategy": "stitch"}, "strategy: got 'stitch', allowed are"),
    "option": ({"warmup": 3}, "warmup: got 3, allowed beside the arguments of `program`"),
    "own_option": ({"output_dir": "x"}, "output_dir: got 'x'"),
}


@pytest.mark.parametrize("changes, message", ERRORS.values(), ids=ERRORS)
def test_bad_input(changes, message, monkeypatch):
    model = supernet("softmax")
    model.config.max_position_embeddings = 20
    monkeypatch.setattr(programming.ManticoreTrainer, "train", lambda *args, **kwargs: pytest.fail("it trained"))
    with pytest.raises(ValueError, match=message):
        program(model, **{"settings": RECALL if "tasks" not in changes else None} | TINY | changes)


def test_bad_models(tmp_path):
    model = supernet("softmax")
    with pytest.raises(ValueError, match="model: got Linear, allowed is a hybrid"):
        program(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="it is discretized"):
        program(discretize(model, [0, 1]))
    with pytest.raises(ValueError, match="got ManticoreModel, which has no head"):
        program(model.model)
    with pytest.raises(ValueError, match="got ManticoreForSequenceClassification, allowed is a supernet"):
        program(ManticoreForSequenceClassification(model.config))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="folder: got the file"):
        program(model, settings=RECALL, folder=tmp_path / "file", **TINY)
    from peft import get_peft_model

    with pytest.raises(ValueError, match="allowed is one without adapters"):
        adapted = get_peft_model(supernet("softmax"), lora_config(model, modules_to_save=["mixture"]))
        program(adapted, settings=RECALL, **TINY)
    model.trunk.blocks[1].to("meta")
    with pytest.raises(ValueError, match="got weights on cpu, meta, allowed is a hybrid on one device"):
        program(model, settings=RECALL, **TINY)


def test_the_trainer_points_here(tmp_path):
    with pytest.raises(ValueError, match=r"strategy: got 'mad', .*call modeling_manticore.program\(model"):
        ManticoreTrainingArguments(output_dir=str(tmp_path), stage="search", strategy="mad")


def test_a_task_needs_rows():
    few = {"in-context-recall": {"vocab_size": 4, "sequence_length": 4}}
    with pytest.raises(ValueError, match="rows: got"):
        program(supernet("softmax"), settings=few, **dict(TINY, rows=200))
    setting = settings_of({"in-context-recall": 1.0}, RECALL, 10, None)["in-context-recall"]
    searched, _ = joint_rows({"in-context-recall": setting}, True, 4, 0)
    plain, _ = joint_rows({"in-context-recall": replace(setting, train_rows=20)}, False, 4, 0)
    both = [searched[name]["in-context-recall"].input_ids for name in ("train", "search")]
    assert torch.equal(torch.cat(both), plain["train"]["in-context-recall"].input_ids)
