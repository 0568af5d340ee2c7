"""
The stock `transformers.Trainer` on hybrids, and ManticoreTrainer beside it: compiled, in bfloat16, with gradient
checkpointing and accumulation, label smoothing, evaluation, the best model, and data that are streamed.
"""

import pytest
import torch
from child import run_without_package
from datasets import IterableDataset, load_dataset
from tiny import component, tokens
from torch.nn import functional
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from modeling_manticore import (
    ManticoreForCausalLM,
    ManticoreForSequenceClassification,
    ManticoreTrainer,
    ManticoreTrainingArguments,
)


KINDS = {
    "Trainer": (Trainer, TrainingArguments, {}),
    "ManticoreTrainer": (ManticoreTrainer, ManticoreTrainingArguments, {"stage": "search"}),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request):
    return request.param


def supernet(*families, **options):
    families = families or ("gpt_neox", "mamba2")
    parts = [component(family, i) for i, family in enumerate(families)]
    return ManticoreForCausalLM.from_components(parts, num_blocks=2, **options)


def rows(count=16, seed=3):
    """Rows of ten tokens with different numbers of labels."""
    data = [{"input_ids": row, "labels": row.clone()} for row in tokens(count, 10, seed)]
    for row in data[::2]:
        row["labels"][:6] = -100
    return data


def make(kind, folder, model=None, data=None, eval_data=None, callbacks=None, **options):
    trainer_class, arguments_class, extra = kind
    plain = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none"}
    plain |= {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "max_grad_norm": 0.0}
    plain |= {"optim": "sgd", "seed": 0}
    return trainer_class(
        model=supernet() if model is None else model,
        args=arguments_class(output_dir=str(folder), **(plain | extra | options)),
        train_dataset=rows() if data is None else data,
        eval_dataset=eval_data,
        callbacks=callbacks,
    )


def trained(kind, folder, **options):
    """Weights and logged losses after a short training."""
    torch.manual_seed(0)
    trainer = make(kind, folder, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}, losses


def assert_same(found, expected, atol, rtol):
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}")


def test_accumulated_gradients_equal_one_large_batch(kind, tmp_path):
    whole, losses = trained(kind, tmp_path, per_device_train_batch_size=8)
    parts, same = trained(kind, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_same(parts, whole, 2e-5, 1e-3)
    assert same == pytest.approx(losses, abs=1e-4)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize("families", [("gpt_neox", "mamba2"), ("gemma3_text", "mamba")], ids="+".join)
def test_gradient_checkpointing_changes_nothing(kind, families, reentrant, tmp_path):
    plain, losses = trained(kind, tmp_path, model=supernet(*families))
    checkpointed, same = trained(
        kind,
        tmp_path,
        model=supernet(*families),
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert_same(checkpointed, plain, 1e-6, 1e-5)
    assert same == pytest.approx(losses, abs=1e-5)


def test_checkpointing_really_recomputes(tmp_path):
    calls = []
    model = supernet()
    for path in (path for block in model.model.blocks for path in block.paths):
        for module in path.slice.modules():
            if type(module).__name__ in ("GPTNeoXAttention", "Mamba2Mixer"):
                module.register_forward_pre_hook(lambda *_: calls.append(1))
    make(KINDS["Trainer"], tmp_path, model=model, max_steps=1).train()
    once = len(calls)
    calls.clear()
    make(KINDS["Trainer"], tmp_path, model=model, max_steps=1, gradient_checkpointing=True).train()
    assert len(calls) == 2 * once > 0


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training_is_training(kind, backend, tmp_path):
    torch._dynamo.reset()
    plain, losses = trained(kind, tmp_path, max_steps=2)
    compiled, same = trained(kind, tmp_path, max_steps=2, torch_compile=True, torch_compile_backend=backend)
    assert_same({name.removeprefix("_orig_mod."): t for name, t in compiled.items()}, plain, 1e-4, 1e-3)
    assert same == pytest.approx(losses, abs=1e-4)


def test_bfloat16_autocast(kind, tmp_path):
    options = {"data": rows(4), "max_steps": 6, "learning_rate": 3e-3, "optim": "adamw_torch"}
    _, losses = trained(kind, tmp_path, **options)
    weights, near = trained(kind, tmp_path, bf16=True, **options)
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float32}
    assert near != losses and near == pytest.approx(losses, rel=0.05)
    assert near[-1] < 0.9 * near[0]


def smoothed(model, batch, factor):
    with torch.no_grad():
        logits = model(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    return functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), label_smoothing=factor)


def test_label_smoothing_is_that_of_shifted_labels(kind, tmp_path):
    model = supernet().eval()
    trainer = make(kind, tmp_path, model=model, label_smoothing_factor=0.2, eval_data=rows(4, 9))
    batch = {key: torch.stack([row[key] for row in rows(4, 9)]) for key in ("input_ids", "labels")}
    expected = smoothed(model, batch, 0.2)
    with torch.no_grad():
        found = trainer.compute_loss(model, dict(batch))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), abs=1e-4)


def test_smoothed_and_accumulated(kind, tmp_path):
    options = {"label_smoothing_factor": 0.2}
    whole, _ = trained(kind, tmp_path, per_device_train_batch_size=8, **options)
    parts, _ = trained(kind, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    assert_same(parts, whole, 2e-5, 1e-3)


def test_label_smoothing_without_the_package(tmp_path):
    """The class that a checkpoint brings along is one that the stock Trainer shifts labels for."""
    supernet().save_pretrained(tmp_path / "hybrid")
    code = """
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
model = AutoModelForCausalLM.from_pretrained("hybrid", trust_remote_code=True).eval()
args = TrainingArguments(output_dir="run", report_to="none", use_cpu=True, label_smoothing_factor=0.2)
ids = torch.arange(20).view(2, 10)
with torch.no_grad():
    found = Trainer(model=model, args=args).compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
    logits = model(ids).logits[:, :-1].flatten(0, 1)
print(found - torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.2))
"""
    difference = run_without_package(code, tmp_path).split("(")[1].rstrip(")\n")
    assert abs(float(difference)) < 1e-5


class FirstIsBest(TrainerCallback):
    """Says that the first evaluation was the best, and keeps the weights of every step."""

    def __init__(self):
        self.kept = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.kept[state.global_step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_loss"] = float(state.global_step)


LAYOUTS = {
    "renamed": (("gpt_neox", "mamba2"), False),  # a head that has another name on disk
    "renamed_in_shards": (("gpt_neox", "mamba2"), True),
    "joined": (("jamba", "llama"), False),  # experts that are one tensor in memory and many on disk
}


@pytest.mark.parametrize("families, shards", LAYOUTS.values(), ids=LAYOUTS)
def test_the_best_model_is_loaded_at_the_end(kind, families, shards, tmp_path):
    first = FirstIsBest()
    model = supernet(*families)
    if shards:
        saved = model.save_pretrained
        model.save_pretrained = lambda *args, **options: saved(*args, **({"max_shard_size": "30KB"} | options))
    trainer = make(
        kind,
        tmp_path,
        model=model,
        eval_data=rows(4, 9),
        callbacks=[first],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert_same(trainer.model.state_dict(), first.kept[1], 0, 0)
    assert any(not torch.equal(first.kept[3][name], tensor) for name, tensor in first.kept[1].items())


def test_resuming_is_exact(kind, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "lr_scheduler_type": "constant"}
    whole, _ = trained(kind, tmp_path / "whole", **options)
    trained(kind, tmp_path / "cut", max_steps=2, **options)
    torch.manual_seed(0)
    trainer = make(kind, tmp_path / "cut", **options)
    trainer.train(resume_from_checkpoint=True)
    assert_same(trainer.model.state_dict(), whole, 0, 0)


def test_evaluation_is_the_mean_over_labels(kind, tmp_path):
    model = supernet().eval()
    data = rows(6, 9)
    trainer = make(kind, tmp_path, model=model, eval_data=data, per_device_eval_batch_size=6)
    batch = {key: torch.stack([row[key] for row in data]) for key in ("input_ids", "labels")}
    assert trainer.evaluate()["eval_loss"] == pytest.approx(smoothed(model, batch, 0.0).item(), abs=1e-4)
    predictions = trainer.predict(data).predictions
    with torch.no_grad():
        expected = model(batch["input_ids"]).logits
    torch.testing.assert_close(torch.as_tensor(predictions), expected, atol=1e-5, rtol=1e-5)


def test_streamed_data(kind, tmp_path):
    """A file that `datasets` reads while training, against the same rows in memory."""
    data = rows(12)
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "\n".join(str({key: value.tolist() for key, value in row.items()}).replace("'", '"') for row in data)
    )
    stream = load_dataset("json", data_files=str(file), split="train", streaming=True, cache_dir=str(tmp_path))
    assert isinstance(stream, IterableDataset)
    streamed, losses = trained(kind, tmp_path / "a", data=stream, eval_data=None)
    held, same = trained(kind, tmp_path / "b", data=data, train_sampling_strategy="sequential")
    assert_same(streamed, held, 1e-6, 1e-5)
    assert losses == pytest.approx(same, abs=1e-5)


def test_a_classifier_trains_under_the_stock_trainer(kind, tmp_path):
    config = supernet().config
    config.num_labels, config.pad_token_id = 3, 0
    model = ManticoreForSequenceClassification(config)
    data = [{"input_ids": row["input_ids"], "labels": i % 3} for i, row in enumerate(rows())]
    trainer = make(kind, tmp_path, model=model, data=data, eval_data=data[:8], max_steps=30, learning_rate=0.1)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


def test_what_the_stock_trainer_saves_loads(tmp_path):
    trainer = make(KINDS["Trainer"], tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, trainer.model.eval()(tokens()).logits)
