"""Distillation: the loss against plain float64 formulas, teachers of every kind, caches, training."""

import copy

import pytest
import torch
from peft import get_peft_model
from tiny import FAMILIES, VOCAB, component, tokens
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from modeling_manticore import (
    ManticoreForCausalLM,
    ManticoreForSequenceClassification,
    ManticoreTrainer,
    ManticoreTrainingArguments,
    cache_teacher,
    lora_config,
)
from modeling_manticore.building.states import Batch, boundaries
from modeling_manticore.search.distill import divergence
from modeling_manticore.search.teachers import Lesson


def path(k, start, stop):
    return {"component": k, "start": start, "stop": stop}


CHAIN = [[path(0, 0, 1)], [path(1, 1, 2)], [path(0, 2, 4)]]


def loud(model):
    """Larger logits, so that probabilities of random models differ."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def parts():
    return [loud(component("gpt_neox")), loud(component("mamba2", 1))]


def hybrid(components=None, blocks=CHAIN):
    torch.manual_seed(0)
    return ManticoreForCausalLM.from_components(components or parts(), blocks=blocks)


def rows(count=16, seed=3):
    """Rows of which every third has no label in its first half."""
    data = [{"input_ids": row, "labels": row.clone()} for row in tokens(count, 10, seed)]
    for row in data[::3]:
        row["labels"][:5] = -100
    return data


def padded():
    """A batch with left and right padding."""
    ids, mask = tokens(3, 10, seed=5), torch.ones(3, 10, dtype=torch.long)
    mask[0, 7:], mask[1, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}


def arguments(folder, **options):
    plain = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none"}
    plain |= {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "stage": "distill"}
    return ManticoreTrainingArguments(output_dir=str(folder), **(plain | options))


def trainer_of(folder, model, teacher, data=None, callbacks=None, **options):
    args = arguments(folder, **options)
    return ManticoreTrainer(
        model=model, args=args, train_dataset=rows() if data is None else data, teacher=teacher, callbacks=callbacks
    )


def training_loss(trainer, inputs, num_items=None):
    trainer.model.train()
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=num_items).double()


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp_min(0)


@torch.no_grad()
def expected_loss(student, teacher, inputs, w, temperature, m=0.0, num_items=None):
    """The formula, place by place, in float64."""
    mask, labels = inputs["attention_mask"], inputs["labels"]
    given = {"input_ids": inputs["input_ids"], "attention_mask": mask, "position_ids": positions(mask)}
    said, answer = teacher(**given, output_hidden_states=True), student(**given).logits.double()
    steps = list(boundaries(student, Batch(inputs["input_ids"], mask)))
    bridge = student.model.blocks[2].paths[0].in_projector
    pairs = [(steps[1].states[0], said.hidden_states[1]), (bridge(steps[2].states[0]), said.hidden_states[2])]
    total, count = 0.0, 0
    for i in range(len(labels)):
        for t in range(labels.shape[1] - 1):
            if labels[i, t + 1] == -100:
                continue
            z, s = said.logits[i, t].double(), answer[i, t]
            label_loss = -torch.log(s.exp() / s.exp().sum())[labels[i, t + 1]]
            total, count = total + (1 - w) * label_loss, count + 1
            if not mask[i, t]:
                continue  # the last place of left padding: nothing was read
            p, q = ((x / temperature).exp() / (x / temperature).exp().sum() for x in (z, s))
            error = sum(
                ((u[i, t] - v[i, t]) ** 2).double().sum() / ((v[i, t] - v[i, t].mean()) ** 2).double().sum()
                for u, v in pairs
            )
            total += w * temperature**2 * (p * (p / q).log()).sum() + m * error / len(pairs)
    return total / (count if num_items is None else num_items)


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


ARGUMENT_CASES = {
    "weight": ({"distill_weight": 1.5}, "distill_weight: got 1.5, allowed is a number of 0..1"),
    "weight_type": ({"distill_weight": "all"}, "distill_weight: got 'all'"),
    "temperature": ({"distill_temperature": 0.0}, "distill_temperature: got 0.0"),
    "hidden": ({"hidden_weight": -1.0}, "hidden_weight: got -1.0"),
    "nothing": ({"distill_weight": 0.0}, "distill_weight: got 0 with stage='distill'"),
}


@pytest.mark.parametrize("options, message", ARGUMENT_CASES.values(), ids=ARGUMENT_CASES)
def test_bad_arguments(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path / "run", **options)
    assert not any(tmp_path.iterdir())


def other_vocabulary():
    config = FAMILIES["llama"]()
    config.vocab_size = 32
    return AutoModelForCausalLM.from_config(config)


def shared(model):
    teacher = loud(component("gpt_neox"))
    teacher.get_output_embeddings().weight = model.heads["0"].get_output_embeddings().weight
    return teacher


def llama_classifier():
    return LlamaForSequenceClassification(FAMILIES["llama"]())


TEACHER_CASES = {
    "missing": (lambda model: None, {}, "teacher: got None with stage='distill'"),
    "missing_elsewhere": (lambda model: None, {"stage": "finetune", "distill_weight": 0.5}, "teacher: got None"),
    "unused": (lambda model: component("llama"), {"stage": "finetune"}, "teacher: got one with stage='finetune'"),
    "vocabulary": (lambda model: other_vocabulary(), {}, "teacher: got a vocabulary of 32 tokens, allowed is"),
    "in_a_list": (lambda model: [component("llama"), other_vocabulary()], {}, r"teacher\[1\]: got a vocabulary"),
    "empty": (lambda model: [], {}, "teacher: got an empty list"),
    "no_model": (lambda model: 3.5, {}, "teacher: got float, allowed is a causal language model"),
    "no_logits": (lambda model: llama_classifier(), {}, "teacher: got LlamaForSequenceClassification"),
    "no_index": (lambda model: 2, {}, r"teacher: got component 2, allowed is 0..1"),
    "no_source": (lambda model: 0, {}, "teacher: this component has no recorded source"),
    "no_folder": (lambda model: "nowhere/at-all", {}, "teacher: 'nowhere/at-all' cannot be loaded"),
    "itself": (lambda model: model, {}, "teacher: it shares weights with the model that is trained"),
    "shared": (shared, {}, "teacher: it shares weights"),
    "states_of_a_stranger": (lambda model: component("llama"), {"hidden_weight": 1.0}, "hidden_weight: hidden states"),
    "states_of_two": (lambda model: parts(), {"hidden_weight": 1.0}, "hidden_weight: hidden states"),
}


@pytest.mark.parametrize("teacher, options, message", TEACHER_CASES.values(), ids=TEACHER_CASES)
def test_bad_teachers(teacher, options, message, tmp_path):
    model = hybrid()
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path / "run", model, teacher(model), **options)
    assert not any(tmp_path.iterdir())


def test_hidden_states_need_a_cut(tmp_path):
    components = parts()
    pure = hybrid(components, [[path(0, 0, 4)]])
    with pytest.raises(ValueError, match="hidden_weight: no block begins behind a bridge"):
        trainer_of(tmp_path, pure, components[0], hidden_weight=1.0)
    supernet = ManticoreForCausalLM.from_components(components, num_blocks=2)
    with pytest.raises(ValueError, match="hidden_weight: got a supernet"):
        trainer_of(tmp_path, supernet, components[0], hidden_weight=1.0)
    twins = hybrid([component("gpt_neox"), component("gpt_neox", 1)])
    with pytest.raises(ValueError, match=r"may be any of the components \[0, 1\]"):
        trainer_of(tmp_path, twins, component("gpt_neox"), hidden_weight=1.0)


def test_a_classifier_has_no_teacher(tmp_path):
    config = hybrid().config
    config.num_labels = 3
    with pytest.raises(ValueError, match="model: got ManticoreForSequenceClassification with a teacher"):
        trainer_of(tmp_path, ManticoreForSequenceClassification(config), component("llama"))


CACHE_CASES = {
    "top_k": ({"top_k": VOCAB + 1}, "top_k: got"),
    "dtype": ({"dtype": "int8"}, "dtype: got 'int8'"),
    "temperature": ({"temperature": -1.0, "top_k": 2}, "temperature: got -1.0"),
    "batch_size": ({"batch_size": 0}, "batch_size: got 0"),
    "no_rows": ({"dataset": []}, "dataset: got no row"),
    "no_ids": ({"dataset": [{"text": "a"}]}, r"dataset\[0\]: got the fields \['text'\]"),
    "foreign_ids": ({"dataset": [{"input_ids": [1, VOCAB]}]}, rf"dataset\[0\]: got token {VOCAB}"),
    "teacher": ({"teacher": 4}, "teacher: got int"),
}


@pytest.mark.parametrize("options, message", CACHE_CASES.values(), ids=CACHE_CASES)
def test_bad_caches(options, message, tmp_path):
    given = {"teacher": component("gpt_neox"), "dataset": rows(2), "folder": tmp_path / "cache"}
    with pytest.raises(ValueError, match=message):
        cache_teacher(**(given | options))
    assert not any(tmp_path.iterdir())


def test_caches_that_do_not_fit(tmp_path):
    teacher = component("gpt_neox")
    folder = cache_teacher(teacher, rows(4), tmp_path / "cache", top_k=5, progress=False)
    with pytest.raises(ValueError, match="folder: got .* which is in use"):
        cache_teacher(teacher, rows(4), folder)
    with pytest.raises(ValueError, match="distill_temperature: got 2.0, allowed with the teacher cache"):
        trainer_of(tmp_path / "run", hybrid(), folder, distill_temperature=2.0)
    with pytest.raises(ValueError, match="hidden_weight: hidden states"):
        trainer_of(tmp_path / "run", hybrid(), folder, hidden_weight=1.0)
    trainer = trainer_of(tmp_path / "run", hybrid(), folder)
    with pytest.raises(ValueError, match="has no row of 10 tokens that begins with"):
        training_loss(trainer, {"input_ids": tokens(2, 10, 77), "labels": tokens(2, 10, 77)})
    ids = rows(4)[1]["input_ids"][None]
    with pytest.raises(ValueError, match="position_ids: got some"):
        training_loss(trainer, {"input_ids": ids, "labels": ids, "position_ids": torch.arange(10)[None]})
    with pytest.raises(ValueError, match="labels: a batch has none"):
        training_loss(trainer, {"input_ids": ids})
    other = cache_teacher(other_vocabulary(), [{"input_ids": [1, 2]}], tmp_path / "other", progress=False)
    with pytest.raises(ValueError, match="got a vocabulary of 32 tokens"):
        trainer_of(tmp_path / "run", hybrid(), other)
