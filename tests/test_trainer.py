"""The Trainer: what each stage trains, rates, logs, losses, adapters, checkpoints with missing or foreign tensors."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import component, tokens
from torch.nn import functional
from transformers import TrainerCallback, TrainingArguments

from modeling_manticore import (
    ManticoreForCausalLM,
    ManticoreForSequenceClassification,
    ManticoreModel,
    ManticoreTrainer,
    ManticoreTrainingArguments,
    discretize,
    lora_config,
)


def supernet(**options):
    return ManticoreForCausalLM.from_components([component("gpt_neox"), component("mamba2")], num_blocks=2, **options)


def rows(count=16, seed=3):
    return [{"input_ids": row, "labels": row} for row in tokens(count, 10, seed)]


def arguments(folder, **options):
    plain = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none"}
    plain |= {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    return ManticoreTrainingArguments(output_dir=str(folder), **(plain | options))


def moved(model, folder, **options):
    """Names of the parameters that a short training changed."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = ManticoreTrainer(model=model, args=arguments(folder, **options), train_dataset=rows())
    trainer.train()
    return {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}


STAGES = {
    "projectors": ({"stage": "projectors"}, lambda name: "projector" in name),
    "search": ({"stage": "search"}, lambda name: True),
    "search_without_components": (
        {"stage": "search", "train_components": False},
        lambda name: "projector" in name or "mixture" in name,
    ),
    "finetune": ({"stage": "finetune"}, lambda name: "mixture" not in name),
}


@pytest.mark.parametrize("options, trains", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("gate", ["routed", "learned"])
def test_what_a_stage_trains(options, trains, gate, tmp_path):
    model = supernet(gate=gate)
    names = {name for name, _ in model.named_parameters()}
    assert moved(model, tmp_path, **options) == {name for name in names if trains(name)}
    assert all(p.requires_grad for p in model.parameters())


def test_what_the_user_froze_stays_frozen(tmp_path):
    model = supernet()
    model.model.stems.requires_grad_(False)
    changed = moved(model, tmp_path, stage="finetune")
    assert changed and not any(name.startswith("model.stems.") for name in changed)
    assert not any(p.requires_grad for p in model.model.stems.parameters())


def test_mixture_weights_have_a_rate_of_their_own_and_no_decay(tmp_path):
    model = supernet(gate="learned")
    args = arguments(tmp_path, stage="search", mixture_learning_rate=0.3, weight_decay=0.1)
    trainer = ManticoreTrainer(model=model, args=args, train_dataset=rows())
    optimizer = trainer.create_optimizer()
    groups = [g for g in optimizer.param_groups if g["lr"] == 0.3]
    assert len(groups) == 1 and groups[0]["weight_decay"] == 0
    own = {id(p) for n, p in model.named_parameters() if "mixture" in n or n.endswith(".gate")}
    assert {id(p) for p in groups[0]["params"]} == own
    everything = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(everything) == len(set(everything)) == len(list(model.parameters()))


def test_logs_and_picture_of_the_mixture(tmp_path):
    model = supernet()
    args = arguments(tmp_path, stage="search", mixture_learning_rate=0.5, max_steps=3)
    trainer = ManticoreTrainer(model=model, args=args, train_dataset=rows())
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "mixture/block_0/path_0" in entry]
    assert [entry["step"] for entry in logged][:4] == [0, 1, 2, 3]
    first, last = logged[0], logged[-1]
    assert first["mixture/block_1/entropy"] == pytest.approx(torch.log(torch.tensor(2.0)).item())
    for b, point in enumerate(model.mixture_weights()):
        assert [last[f"mixture/block_{b}/path_{p}"] for p in range(2)] == pytest.approx(point.tolist())
        assert last[f"mixture/block_{b}/entropy"] == pytest.approx(torch.special.entr(point).sum().item())
    picture = (tmp_path / "report" / "mixture_weights.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    assert not any(name.startswith(".") for name in map(str, tmp_path.iterdir()))


def test_tensorboard_sees_the_mixture(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = arguments(tmp_path, stage="search", report_to="tensorboard")
    ManticoreTrainer(model=supernet(), args=args, train_dataset=rows()).train()
    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file))
    events.Reload()
    assert {"mixture/block_0/path_1", "mixture/block_1/entropy"} <= {
        tag.removeprefix("train/") for tag in events.Tags()["scalars"]
    }


def test_label_smoothing_is_that_of_shifted_labels(tmp_path):
    model = supernet()
    args = arguments(tmp_path, label_smoothing_factor=0.2)
    trainer = ManticoreTrainer(model=model, args=args, train_dataset=rows())
    ids = tokens(4, 10)
    with torch.no_grad():
        found = trainer.compute_loss(model.eval(), {"input_ids": ids, "labels": ids.clone()})
        logits = model(ids).logits[:, :-1].flatten(0, 1)
    expected = functional.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_accumulated_gradients_equal_one_large_batch(tmp_path):
    def weights(size, parts):
        torch.manual_seed(0)
        args = arguments(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=parts, optim="sgd", max_steps=3
        )
        args.max_grad_norm = 0.0
        data = rows(24)
        for i in range(0, 24, 2):  # rows with different numbers of labels
            data[i]["labels"] = torch.cat([torch.full((6,), -100), data[i]["labels"][6:]])
        model = supernet()
        ManticoreTrainer(model=model, args=args, train_dataset=data).train()
        return model.state_dict()

    whole, parts = weights(8, 1), weights(2, 4)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, atol=2e-5, rtol=1e-3, msg=name)


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    class Rising(TrainerCallback):
        """Says that the first evaluation was the best."""

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = float(state.global_step)

    model = supernet()
    kept = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            kept.setdefault(state.global_step, {n: t.clone() for n, t in model.state_dict().items()})

    args = arguments(
        tmp_path, stage="search", max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1
    )
    args.load_best_model_at_end, args.metric_for_best_model, args.greater_is_better = True, "loss", False
    trainer = ManticoreTrainer(
        model=model, args=args, train_dataset=rows(), eval_dataset=rows(4, 9), callbacks=[Rising(), Keep()]
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert all(torch.equal(tensor, kept[1][name]) for name, tensor in model.state_dict().items())


def test_the_saved_folder_is_a_hybrid_without_pickles(tmp_path):
    model = discretize(supernet(), [0, 1])
    trainer = ManticoreTrainer(model=model, args=arguments(tmp_path / "run"), train_dataset=rows())
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    names = {file.name for file in (tmp_path / "saved").iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "modeling_manticore.py"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in names)


def peft_model(model):
    """Adapters on the linear layers of every slice; projectors and mixtures are trained whole."""
    return get_peft_model(model, lora_config(model, r=2))


def test_adapters_train_save_and_resume(tmp_path):
    def trainer(folder, steps):
        args = arguments(folder, stage="search", max_steps=4, save_strategy="steps", save_steps=2, seed=1)
        torch.manual_seed(0)
        model = peft_model(supernet())
        stop = [StopAt(steps)]
        return model, ManticoreTrainer(model=model, args=args, train_dataset=rows(), callbacks=stop)

    whole, first = trainer(tmp_path / "whole", 4)
    frozen = {n: p.clone() for n, p in whole.named_parameters() if not p.requires_grad}
    first.train()
    assert all(torch.equal(dict(whole.named_parameters())[name], p) for name, p in frozen.items())
    assert any("mixture/block_0/path_0" in entry for entry in first.state.log_history)
    assert (whole.get_base_model().mixture_weights()[0] != 0.5).all()
    _, second = trainer(tmp_path / "cut", 2)
    second.train()
    resumed, third = trainer(tmp_path / "cut", 4)
    third.train(resume_from_checkpoint=True)
    for (name, p), (_, q) in zip(whole.named_parameters(), resumed.named_parameters()):
        torch.testing.assert_close(q, p, atol=1e-6, rtol=0, msg=name)
    whole.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    again = PeftModel.from_pretrained(supernet(), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(tokens()).logits, whole.eval()(tokens()).logits, atol=1e-5, rtol=0)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


DAMAGES = {
    "missing": (lambda tensors: tensors.pop("heads.0.embed_out.weight"), "missing_keys"),
    "foreign": (lambda tensors: tensors.update(other=torch.zeros(3)), "unexpected_keys"),
}


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
def test_a_checkpoint_of_another_model_is_not_resumed(damage, message, tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=1)
    ManticoreTrainer(model=supernet(), args=args, train_dataset=rows()).train()
    file = tmp_path / "checkpoint-2" / "model.safetensors"
    tensors = load_file(file)
    assert "heads.0.embed_out.weight" in tensors
    damage(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    args = arguments(tmp_path, save_strategy="steps", save_steps=1, max_steps=4)
    with pytest.raises(ValueError, match=message):
        ManticoreTrainer(model=supernet(), args=args, train_dataset=rows()).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_stage_is_not_resumed(tmp_path):
    args = arguments(tmp_path, stage="search", save_strategy="steps", save_steps=2)
    ManticoreTrainer(model=supernet(), args=args, train_dataset=rows()).train()
    state = json.loads((tmp_path / "checkpoint-2" / "strategy_state.json").read_text())
    assert state["stage"] == "search" and state["strategy"] == "joint"
    with pytest.raises(ValueError, match="stage: got 'finetune', but .* was written with 'search'"):
        trainer = ManticoreTrainer(model=supernet(), args=arguments(tmp_path), train_dataset=rows())
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


ARGUMENT_CASES = {
    "stage": ({"stage": "warmup"}, "stage: got 'warmup'"),
    "strategy": ({"strategy": "random"}, "strategy: got 'random'"),
    "rate": ({"mixture_learning_rate": -1.0}, "mixture_learning_rate: got -1.0"),
    "rate_type": ({"mixture_learning_rate": "high"}, "mixture_learning_rate: got 'high'"),
    "components": ({"train_components": "no"}, "train_components: got 'no'"),
}


@pytest.mark.parametrize("options, message", ARGUMENT_CASES.values(), ids=ARGUMENT_CASES)
def test_bad_arguments(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path / "run", **options)
    assert not any(tmp_path.iterdir())


def plain(folder):
    return TrainingArguments(output_dir=str(folder), report_to="none")


TRAINER_CASES = {
    "plain_arguments": (supernet, plain, {}, "args: got TrainingArguments"),
    "no_hybrid": (lambda: component("llama"), arguments, {}, "model: got LlamaForCausalLM, allowed is a hybrid"),
    "no_head": (lambda: ManticoreModel(supernet().config), arguments, {}, "model: got ManticoreModel"),
    "no_mixture": (
        lambda: discretize(supernet(), [0, 1]),
        lambda folder: arguments(folder, stage="search"),
        {},
        "stage: got 'search', but every block",
    ),
    "no_projector": (
        lambda: discretize(supernet(), [0, 0]),
        lambda folder: arguments(folder, stage="projectors"),
        {},
        "stage: got 'projectors', but this hybrid has no unfrozen parameter",
    ),
    "simplex": (
        lambda: supernet(mixture="simplex"),
        lambda folder: arguments(folder, stage="search"),
        {},
        "strategy: got 'joint' for a hybrid with mixture='simplex'",
    ),
    "no_rows": (supernet, arguments, {"train_dataset": []}, "train_dataset: got 0 examples"),
    "no_evaluation": (
        supernet,
        lambda folder: arguments(folder, eval_strategy="steps"),
        {},
        "eval_dataset: got None with eval_strategy='steps'",
    ),
}


@pytest.mark.parametrize("model, args, options, message", TRAINER_CASES.values(), ids=TRAINER_CASES)
def test_bad_trainers(model, args, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ManticoreTrainer(model=model(), args=args(tmp_path / "run"), **({"train_dataset": rows()} | options))
    assert not any(tmp_path.iterdir())


def test_resuming_where_nothing_is(tmp_path):
    trainer = ManticoreTrainer(model=supernet(), args=arguments(tmp_path), train_dataset=rows())
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="allowed is a complete checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_classifier_trains(tmp_path):
    config = supernet().config
    config.num_labels, config.pad_token_id = 3, 0
    model = ManticoreForSequenceClassification(config)
    data = [{"input_ids": row["input_ids"], "labels": i % 3} for i, row in enumerate(rows())]
    trainer = ManticoreTrainer(
        model=model, args=arguments(tmp_path, max_steps=20), train_dataset=data, eval_dataset=data[:8]
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
