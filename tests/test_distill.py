"""Distillation: the loss against plain float64 formulas, teachers of every kind, caches, training."""

import copy

import pytest
import torch
from distilling import (
    arguments,
    expected_loss,
    hybrid,
    loud,
    padded,
    parts,
    path,
    rows,
    trainer_of,
    training_loss,
)
from peft import get_peft_model
from tiny import VOCAB, component, tokens
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from modeling_manticore import (
    ManticoreForCausalLM,
    ManticoreTrainer,
    cache_teacher,
    lora_config,
)
from modeling_manticore.search.distill import divergence
from modeling_manticore.search.teachers import Lesson


@pytest.mark.parametrize("num_items", [None, 37])
@pytest.mark.parametrize("w, temperature, m", [(1.0, 1.0, 0.0), (0.3, 2.0, 0.0), (0.5, 0.7, 0.9), (0.0, 1.0, 2.0)])
def test_the_loss_is_the_formula(w, temperature, m, num_items, tmp_path):
    components = parts()
    options = {"distill_weight": w, "distill_temperature": temperature, "hidden_weight": m}
    trainer = trainer_of(tmp_path, hybrid(components), components[0], **options)
    inputs = padded()
    found = training_loss(trainer, inputs, num_items)
    expected = expected_loss(trainer.model.eval(), components[0], inputs, w, temperature, m, num_items)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    trainer.model.eval()
    with torch.no_grad():
        labels_only = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=num_items)
        plain = trainer.model(**inputs, num_items_in_batch=num_items).loss
    torch.testing.assert_close(labels_only, plain)


def test_balancing_experts_is_not_the_teachers_business(tmp_path):
    moe = loud(component("jamba"))
    moe.config.output_router_logits = True
    model, teacher = ManticoreForCausalLM.from_components([moe], num_blocks=1), loud(component("llama", 4))
    inputs = padded()
    inputs["input_ids"] = inputs["input_ids"] % min(model.config.vocab_size, VOCAB)
    options = {"distill_weight": 1.0}
    with torch.no_grad():
        outputs = model.train()(**inputs)
    router = outputs.loss - model.loss_function(outputs.logits, inputs["labels"], VOCAB)
    assert router > 1e-4
    with_router = training_loss(trainer_of(tmp_path, model, teacher, **options), inputs)
    moe.config.output_router_logits = False
    without = ManticoreForCausalLM.from_components([moe], num_blocks=1)
    kl = training_loss(trainer_of(tmp_path, without, teacher, **options), inputs)
    torch.testing.assert_close(with_router, kl + router.double(), atol=1e-5, rtol=1e-5)


def test_a_component_as_student_has_nothing_to_learn_from_itself(tmp_path):
    teacher = loud(component("gpt_neox"))
    model = hybrid([teacher], [[path(0, 0, 4)]])
    trainer = trainer_of(tmp_path, model, teacher)
    loss = trainer.compute_loss(model.train(), padded())
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert max(p.grad.abs().max() for p in model.parameters() if p.grad is not None) < 1e-5


def test_accumulated_batches_are_one_large_batch(tmp_path):
    components = parts()
    kept = copy.deepcopy(components[0].state_dict())

    def weights(size, accumulated):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated, "optim": "sgd"}
        options |= {"hidden_weight": 0.5, "distill_weight": 0.6, "distill_temperature": 2.0, "max_grad_norm": 0.0}
        trainer = trainer_of(tmp_path, hybrid(components), components[0].train(), rows(24), max_steps=3, **options)
        assert components[0].training
        trainer.train()
        return trainer.model.state_dict(), trainer.state.log_history[0]

    (whole, first), (accumulated, second) = weights(8, 1), weights(2, 4)
    start = hybrid(components).state_dict()
    assert any((whole[name] - start[name]).abs().max() > 1e-3 for name in whole)
    for name, tensor in whole.items():
        torch.testing.assert_close(accumulated[name], tensor, atol=2e-5, rtol=1e-3, msg=name)
    for name in ("loss", "distill/kl", "distill/hidden"):
        assert first[name] == pytest.approx(second[name], rel=1e-3)
    assert first["loss"] > 0 < first["distill/kl"]
    assert all(torch.equal(tensor, kept[name]) for name, tensor in components[0].state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in components[0].parameters())
    assert not components[0].training


def test_an_ensemble_is_the_mean_of_probabilities(tmp_path):
    teachers = [loud(component("gpt_neox", 7)), loud(component("llama", 8))]
    inputs = {"input_ids": tokens(2, 6), "labels": tokens(2, 6)}
    model = hybrid()
    found = training_loss(trainer_of(tmp_path, model, teachers), inputs)
    with torch.no_grad():
        p = sum(t(inputs["input_ids"]).logits.double().softmax(-1) for t in teachers) / 2
        q = model.eval()(inputs["input_ids"]).logits.double().softmax(-1)
    expected = (p * (p / q).log()).sum(-1)[:, :-1].mean()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_excluded_tokens_count_nothing():
    z, s = torch.randn(3, 8), torch.randn(3, 8)
    z[:, 6:], s[:, 6:] = -torch.inf, -torch.inf
    s.requires_grad_()
    found = divergence(s, Lesson(logits=z), 2.0)
    found.sum().backward()
    torch.testing.assert_close(found, divergence(s[:, :6], Lesson(logits=z[:, :6]), 2.0))
    assert torch.isfinite(s.grad).all() and s.grad[:, :6].abs().max() > 0


def saved_parts(folder):
    names = []
    for name, model in zip(("neox", "mamba"), parts()):
        model.save_pretrained(folder / name)
        names.append(str(folder / name))
    return names


def test_teachers_by_name_index_and_list(tmp_path):
    names = saved_parts(tmp_path)
    neox, mamba = (AutoModelForCausalLM.from_pretrained(name) for name in names)
    model, inputs = hybrid(names), padded()

    def loss(teacher, **options):
        return training_loss(trainer_of(tmp_path / "run", model, teacher, **options), inputs)

    assert loss(0) == loss(names[0]) == loss(neox)
    assert loss(1) == loss(mamba) != loss(0)
    assert loss("components") == loss([neox, mamba]) == loss([0, names[1]])
    assert loss(0, hidden_weight=1.0) == loss(neox, hidden_weight=1.0) > loss(0)
    assert loss(1, hidden_weight=1.0) > loss(1)
    hybrid(names).save_pretrained(tmp_path / "hybrid")
    assert loss(str(tmp_path / "hybrid")) < 1e-6 < loss(0)


def test_a_teacher_of_another_tokenizer(tmp_path):
    names = saved_parts(tmp_path)
    for name, word in zip(names, ("begin", "start")):
        words = {word: 0} | {f"w{i}": i for i in range(1, VOCAB)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w1").save_pretrained(name)
    model = hybrid(parts())
    model.config.components[0].source = names[0]
    trainer_of(tmp_path / "run", model, names[0])
    with pytest.raises(
        ValueError, match=r"differs from the hybrid's, .* in 2 tokens, among them \['begin', 'start'\]"
    ):
        trainer_of(tmp_path / "run", model, names[1])


def test_a_cache_teaches_what_the_teacher_does(tmp_path):
    teacher, model = loud(component("gpt_neox", 5)), hybrid()
    inputs = padded()
    data = [{name: inputs[name][i] for name in ("input_ids", "attention_mask")} for i in (2, 0, 1)] + rows(9)
    live = {}
    for temperature in (1.0, 2.0):
        options = {"distill_temperature": temperature, "distill_weight": 0.8}
        live[temperature] = training_loss(trainer_of(tmp_path / "run", model, teacher, **options), inputs)

    def cached(name, at=1.0, **how):
        folder = cache_teacher(teacher, data, tmp_path / name, progress=False, **how)
        options = {"distill_temperature": at, "distill_weight": 0.8}
        return training_loss(trainer_of(tmp_path / "run", model, str(folder), **options), inputs)

    exact = {"atol": 2e-6, "rtol": 2e-6}
    torch.testing.assert_close(cached("full", dtype="float32"), live[1.0], **exact)
    torch.testing.assert_close(cached("warm", 2.0, dtype="float32"), live[2.0], **exact)
    whole = {"top_k": VOCAB, "dtype": "float32", "temperature": 2.0}
    torch.testing.assert_close(cached("whole", 2.0, **whole), live[2.0], **exact)
    torch.testing.assert_close(cached("half"), live[1.0], atol=1e-3, rtol=1e-3)
    assert cached("half-k", top_k=VOCAB) != live[1.0]
    torch.testing.assert_close(cached("brain", dtype="bfloat16"), live[1.0], atol=1e-2, rtol=1e-2)
    assert cached("few", top_k=3, dtype="float32") < live[1.0]
    size = sum(file.stat().st_size for file in (tmp_path / "few").glob("*.safetensors"))
    assert size > (9 * 10 + 7 + 6 + 10) * (3 * 8 + 4)
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_a_cache_of_the_likeliest_has_one_token_for_the_rest(tmp_path):
    teacher, model, ids = loud(component("gpt_neox", 5)), hybrid(), tokens(2, 6)
    folder = cache_teacher(
        teacher, [{"input_ids": row} for row in ids], tmp_path / "k", top_k=4, dtype="float32", progress=False
    )
    inputs = {"input_ids": ids, "labels": ids}
    found = training_loss(trainer_of(tmp_path / "run", model, folder), inputs)
    with torch.no_grad():
        p = teacher(ids).logits.double().softmax(-1)
        q = model.eval()(ids).logits.double().softmax(-1)
    top, indices = p.topk(4, dim=-1)
    q_top = q.gather(-1, indices)
    rest, q_rest = 1 - top.sum(-1), 1 - q_top.sum(-1)
    expected = (top * (top / q_top).log()).sum(-1) + rest * (rest / q_rest).log()
    torch.testing.assert_close(found, expected[:, :-1].mean(), atol=1e-5, rtol=1e-5)


def test_a_cache_trains_as_the_live_teacher(tmp_path):
    teacher, data = loud(component("gpt_neox", 5)), rows(12)
    folder = cache_teacher([teacher], data, tmp_path / "cache", dtype="float32", progress=False)

    def trained(one):
        trainer = trainer_of(tmp_path / "run", hybrid(), one, data, optim="sgd", num_train_epochs=2, max_steps=-1)
        trainer.train()
        return trainer.model.state_dict()

    live, cached = trained(teacher), trained(folder)
    for name, tensor in live.items():
        torch.testing.assert_close(cached[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def test_a_hundred_steps_bring_the_hybrid_to_its_teacher(tmp_path):
    components = parts()
    trainer = trainer_of(
        tmp_path, hybrid(components), components[0], max_steps=100, learning_rate=3e-3, logging_steps=5
    )
    trainer.train()
    course = [entry["distill/kl"] for entry in trainer.state.log_history if "distill/kl" in entry]
    assert len(course) == 20 and course[-1] < 0.2 * course[0]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    components = parts()
    components[0].config.hidden_dropout = 0.2
    teacher = loud(component("gpt_neox", 6))

    def run(folder, stop, resume=None):
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "gradient_accumulation_steps": 2}
        trainer = trainer_of(folder, hybrid(components), teacher, callbacks=[StopAt(stop)], **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole", 5)
    run(tmp_path / "cut", 2)
    resumed = run(tmp_path / "cut", 5, resume=True)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    courses = [[e["distill/kl"] for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert courses[0] == courses[1] and len(courses[0]) == 5
    files = {file.name for file in (tmp_path / "whole" / "checkpoint-2").iterdir()}
    assert not any("teacher" in name for name in files)
    size = (tmp_path / "whole" / "checkpoint-2" / "model.safetensors").stat().st_size
    assert size < 1.2 * sum(p.nbytes for p in whole.model.parameters()) + 50_000


def test_adapters_learn_from_a_teacher(tmp_path):
    components = parts()
    model = get_peft_model(hybrid(components), lora_config(hybrid(components), r=2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trainer_of(tmp_path, model, components[0], hidden_weight=0.5, max_steps=3)
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert moved and moved <= {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_" in name for name in moved)
    assert trainer.state.log_history[0]["distill/kl"] > 0


def test_checkpointed_layers_are_matched_too(tmp_path):
    components = parts()

    def weights(**options):
        trainer = trainer_of(tmp_path, hybrid(components), components[0], hidden_weight=0.5, optim="sgd", **options)
        trainer.train()
        return trainer.model.state_dict()

    plain = weights()
    checkpointed = weights(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, tensor in plain.items():
        torch.testing.assert_close(checkpointed[name], tensor, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("options", [{"stage": "finetune"}, {"stage": "projectors"}, {"strategy": "darts"}])
def test_other_stages_take_the_term_too(options, tmp_path):
    model = ManticoreForCausalLM.from_components(parts(), num_blocks=2)
    data = {"search_dataset": rows(8, 11)} if "strategy" in options else {}
    args = arguments(tmp_path, **({"stage": "search", "distill_weight": 0.5} | options))
    trainer = ManticoreTrainer(
        model=model, args=args, train_dataset=rows(), teacher=loud(component("llama", 4)), **data
    )
    trainer.train()
    logged = [entry["distill/kl"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2 and min(logged) > 0
