"""What distillation refuses: arguments, teachers, models and caches."""

import pytest
import torch
from distilling import arguments, hybrid, loud, parts, path, rows, trainer_of, training_loss
from tiny import FAMILIES, VOCAB, component, tokens
from transformers import (
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
)

from modeling_manticore import (
    ManticoreForCausalLM,
    ManticoreForSequenceClassification,
    cache_teacher,
)


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
