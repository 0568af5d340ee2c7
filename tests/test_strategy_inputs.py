"""What gradient strategies are given and leave alone: parametrisations, bad input, other gates, frozen blocks."""

import copy

import pytest
import torch
from search_runs import VARIANTS, arguments, rows, supernet, trainer_of
from torch.utils.data import IterableDataset

from modeling_manticore import ManticoreForCausalLM, ManticoreTrainer, ManticoreTrainingArguments
from modeling_manticore.search import set_mixture_kind


@pytest.mark.parametrize("start", ["softmax", "gumbel_softmax", "simplex"])
@pytest.mark.parametrize("kind", ["softmax", "gumbel_softmax", "simplex"])
def test_another_parametrisation_has_the_same_weights(start, kind, tmp_path):
    model = supernet(start, mixture_temperature=0.5).eval()
    model.set_mixture_weights([[0.25, 0.75], [1.0, 0.0]])
    model.model.blocks[0].mixture.requires_grad_(False)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = model(ids).logits
        set_mixture_kind(model, kind)
        torch.testing.assert_close(model(ids).logits, expected)
        model.save_pretrained(tmp_path)
        again = ManticoreForCausalLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(ids).logits, expected)
    assert again.config.mixture == kind and again.model.blocks[1].mixture.kind == kind
    assert [block.mixture.parameter.requires_grad for block in model.model.blocks] == [False, True]


def test_bad_parametrisations():
    model = supernet("softmax")
    with pytest.raises(ValueError, match="kind: got 'dirichlet', allowed are 'softmax'"):
        set_mixture_kind(model, "dirichlet")
    with pytest.raises(ValueError, match="model: got Linear, allowed is a hybrid"):
        set_mixture_kind(torch.nn.Linear(2, 2), "softmax")
    assert model.config.mixture == "softmax"


ARGUMENTS = {
    "base": ({"gaea_base": "dash"}, "gaea_base: got 'dash', allowed are 'joint', 'darts'"),
    "start": ({"temperature_start": 0}, "temperature_start: got 0, allowed is a finite number > 0"),
    "end": ({"temperature_end": float("nan")}, "temperature_end: got nan"),
    "type": ({"temperature_end": "cold"}, "temperature_end: got 'cold'"),
    "order": ({"temperature_start": 0.1, "temperature_end": 1.0}, "temperature_end: got 1.0, allowed is at most"),
}


@pytest.mark.parametrize("options, message", ARGUMENTS.values(), ids=ARGUMENTS)
def test_bad_arguments(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path / "run", **options)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "strategy, mixture, allowed",
    [
        ("joint", "simplex", "softmax"),
        ("darts", "simplex", "softmax"),
        ("gaea", "softmax", "simplex"),
        ("gaea", "gumbel_softmax", "simplex"),
        ("dash", "softmax", "gumbel_softmax"),
        ("dash", "simplex", "gumbel_softmax"),
    ],
)
def test_a_mixture_that_does_not_fit(strategy, mixture, allowed, tmp_path):
    search = {"search_dataset": rows(4, 5)} if strategy == "darts" else {}
    args = arguments(tmp_path / "run", strategy=strategy)
    message = f"strategy: got '{strategy}' for a hybrid with mixture='{mixture}'.*mixture='{allowed}'"
    with pytest.raises(ValueError, match=message):
        ManticoreTrainer(supernet(mixture), args, train_dataset=rows(8, 1), **search)
    assert not any(tmp_path.iterdir())


class Stream(IterableDataset):
    def __iter__(self):
        return iter(rows(4, 1))


TRAIN, EVALUATION = rows(8, 1), rows(4, 2)
DATA = {
    "missing": ("darts", {}, "search_dataset: got NoneType with strategy='darts'"),
    "missing_gaea": ("gaea_darts", {}, "search_dataset: got NoneType with strategy='gaea'"),
    "empty": ("darts", {"search_dataset": []}, "search_dataset: got 0 examples"),
    "stream": ("darts", {"search_dataset": Stream()}, "search_dataset: got Stream"),
    "train": ("darts", {"search_dataset": TRAIN}, "search_dataset: got the train_dataset itself"),
    "evaluation": ("darts", {"search_dataset": EVALUATION}, "search_dataset: got the eval_dataset itself"),
    "named": (
        "gaea_darts",
        {"search_dataset": EVALUATION, "eval_dataset": {"other": rows(4, 3), "same": EVALUATION}},
        r"search_dataset: got the eval_dataset\['same'\] itself",
    ),
    "not_used": ("dash", {"search_dataset": rows(4, 5)}, "search_dataset: got list with strategy='dash'"),
    "not_used_gaea": ("gaea_joint", {"search_dataset": rows(4, 5)}, "search_dataset: got list with strategy='gaea'"),
}


@pytest.mark.parametrize("variant, data, message", DATA.values(), ids=DATA)
def test_bad_search_data(variant, data, message, tmp_path):
    mixture, own = VARIANTS[variant]
    data = {"train_dataset": TRAIN, "eval_dataset": EVALUATION} | data
    with pytest.raises(ValueError, match=message):
        ManticoreTrainer(supernet(mixture), arguments(tmp_path / "run", **own), **data)
    assert not any(tmp_path.iterdir())


def test_other_stages_have_no_search_data(tmp_path):
    args = arguments(tmp_path, stage="finetune")
    with pytest.raises(ValueError, match="search_dataset: got list with stage='finetune'"):
        ManticoreTrainer(supernet("softmax"), args, train_dataset=TRAIN, search_dataset=rows(4, 5))


def test_two_datasets_of_one_origin_are_one_split(tmp_path):
    from datasets import Dataset

    ids = torch.stack([row["input_ids"] for row in TRAIN]).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    args = arguments(tmp_path, strategy="darts")
    with pytest.raises(ValueError, match="search_dataset: got the train_dataset itself"):
        ManticoreTrainer(supernet("softmax"), args, train_dataset=data, search_dataset=copy.copy(data))
    halves = data.train_test_split(0.5, seed=0)
    columns = halves["test"].add_column("note", ["x"] * 4)
    ManticoreTrainer(
        supernet("softmax"),
        arguments(tmp_path, strategy="darts", max_steps=2),
        train_dataset=halves["train"],
        search_dataset=columns,
    ).train()


def test_the_search_split_is_not_evaluated_on(tmp_path):
    trainer = trainer_of("darts", tmp_path)
    with pytest.raises(ValueError, match="eval_dataset: got the search_dataset itself"):
        trainer.evaluate(trainer.search_dataset)
    assert "eval_loss" in trainer.evaluate()


OWN_STEPS = {
    "fp16": ({"fp16": True}, "fp16: got True with strategy='darts'"),
    "reentrant": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        "gradient_checkpointing_kwargs: got use_reentrant=True",
    ),
}


@pytest.mark.parametrize("options, message", OWN_STEPS.values(), ids=OWN_STEPS)
def test_what_own_mixture_steps_cannot_do(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of("darts", tmp_path / "run", **options)
    assert not any(tmp_path.iterdir())


def test_a_hybrid_of_which_only_the_mixture_trains(tmp_path):
    model = supernet("simplex")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mixture" in name)
    with pytest.raises(ValueError, match="strategy: got 'gaea' for a hybrid of which nothing but the mixture"):
        ManticoreTrainer(model, arguments(tmp_path, strategy="gaea"), train_dataset=TRAIN)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("gate", ["mixture", "learned"])
def test_other_gates_half_precision_and_checkpointing(variant, gate, tmp_path):
    mixture, own = VARIANTS[variant]
    model = supernet(mixture, gate=gate, projector_init="random").to(torch.bfloat16)
    search = {"search_dataset": rows(7, 5)} if "darts" in variant else {}
    args = arguments(tmp_path, **own, max_steps=2, gradient_checkpointing=True)
    trainer = ManticoreTrainer(model, args, train_dataset=rows(8, 1), **search)
    trainer.train()
    for block in model.model.blocks:
        assert block.mixture.parameter.dtype == torch.float32
        point = block.mixture.weights_without_noise().detach()
        assert (point - 0.5).abs().max() > 1e-5 and abs(point.sum().item() - 1) < 1e-6
    gates = [p for name, p in model.named_parameters() if name.endswith(".gate")]
    assert (gate == "learned") == bool(gates) and all(p.dtype == torch.float32 for p in gates)
    assert all(p.abs().max() > 1e-4 for p in gates)  # all start at zero and step


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_frozen_block_stays(variant, tmp_path):
    trainer = trainer_of(variant, tmp_path, max_steps=2)
    frozen, free = (block.mixture.parameter for block in trainer.model.model.blocks)
    frozen.requires_grad_(False)
    before = [trainer.model.model.blocks[b].mixture.weights_without_noise().detach().clone() for b in range(2)]
    trainer.train()
    after = [trainer.model.model.blocks[b].mixture.weights_without_noise().detach() for b in range(2)]
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
    assert not frozen.requires_grad and free.requires_grad


def test_one_training_after_the_other(tmp_path):
    trainer = trainer_of("darts", tmp_path, max_steps=2)
    trainer.train()
    first = [point.detach().clone() for point in trainer.model.mixture_weights()]
    trainer.train()
    assert all(not torch.equal(a, b) for a, b in zip(first, trainer.model.mixture_weights()))


def test_arguments_are_documented():
    fields = ManticoreTrainingArguments.__dataclass_fields__
    assert all(len(fields[n].metadata["help"]) > 20 for n in ("gaea_base", "temperature_start", "temperature_end"))
