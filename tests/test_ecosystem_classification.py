"""Sequence and token classification against values computed by hand: last real token, padding, problem types."""

import pytest
import torch
from tiny import component, tokens
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from modeling_manticore import (
    ManticoreForCausalLM,
    ManticoreForSequenceClassification,
    ManticoreForTokenClassification,
    discretize,
)


PAD = 0
LENGTHS = (9, 4, 6)


@pytest.fixture(scope="module", params=["supernet", "discretized"])
def config(request):
    model = ManticoreForCausalLM.from_components([component("gpt_neox"), component("mamba2")], num_blocks=2)
    config = (model if request.param == "supernet" else discretize(model, [0, 1])).config
    config.pad_token_id, config.num_labels = PAD, 3
    return config


def build(model_class, config, **changes):
    torch.manual_seed(0)
    config = type(config).from_dict(config.to_dict() | changes)
    model = model_class(config).eval()
    torch.nn.init.normal_(model.score.weight)
    return model


def texts():
    """Rows of different length without the padding token."""
    return [row[:length].clamp_min(1) for row, length in zip(tokens(3, 9), LENGTHS)]


def padded(side):
    ids = torch.full((3, 9), PAD)
    for row, text in zip(ids, texts()):
        row[: len(text)] = text
        if side == "left":
            row.copy_(row.roll(9 - len(text)))
    return ids, (ids != PAD).long()


def by_hand(model):
    """(3, labels): the score of the last token of every row, run alone and without padding."""
    rows = []
    for text in texts():
        hidden = model.model(text[None]).last_hidden_state
        rows.append(hidden[0, -1] @ model.score.weight.T)
    return torch.stack(rows)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_the_last_real_token_is_scored(config, side):
    model = build(ManticoreForSequenceClassification, config)
    ids, mask = padded(side)
    expected = by_hand(model)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected, atol=1e-5, rtol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-2


@torch.no_grad()
def test_several_rows_need_a_padding_token(config):
    model = build(ManticoreForSequenceClassification, config, pad_token_id=None)
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="batch sizes > 1 if no padding token is defined"):
        model(tokens())
    row = texts()[0][None]
    expected = model.model(row).last_hidden_state[:, -1] @ model.score.weight.T
    torch.testing.assert_close(model(row).logits, expected, atol=1e-5, rtol=1e-5)


def binary(logits, labels):
    """Mean of the binary cross-entropies, written out."""
    p = 1 / (1 + (-logits).exp())
    return -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()


def categorical(logits, labels):
    """Mean negative log-probability, written out."""
    return -(logits - logits.exp().sum(-1, keepdim=True).log()).gather(-1, labels[:, None]).mean()


PROBLEMS = {
    "regression_of_one": (1, torch.tensor([0.5, -1.0, 2.0]), lambda x, y: ((x.squeeze(-1) - y) ** 2).mean()),
    "regression_of_three": (3, torch.arange(9.0).view(3, 3), lambda x, y: ((x - y) ** 2).mean()),
    "single_label_classification": (3, torch.tensor([2, 0, 1]), categorical),
    "multi_label_classification": (3, torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]]), binary),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "problem, named",
    [(problem, True) for problem in PROBLEMS]
    + [(problem, False) for problem in PROBLEMS if problem != "regression_of_three"],  # taken for several labels
)
def test_losses_of_the_problem_types(config, problem, side, named):
    labels_count, labels, loss = PROBLEMS[problem]
    kind = "regression" if problem.startswith("regression") else problem
    model = build(ManticoreForSequenceClassification, config, num_labels=labels_count)
    model.config.problem_type = kind if named else None
    ids, mask = padded(side)
    out = model(ids, attention_mask=mask, labels=labels)
    assert out.logits.shape == (3, labels_count) and model.config.problem_type == kind
    torch.testing.assert_close(out.loss, loss(by_hand(model), labels), atol=1e-4, rtol=1e-4)
    out.loss.backward()
    assert model.score.weight.grad.abs().sum() > 0


def test_an_unknown_problem_type_is_refused(config):
    with pytest.raises(ValueError, match="problem_type: got 'ranking', allowed are None, 'regression', 'single_label"):
        build(ManticoreForSequenceClassification, config, problem_type="ranking")


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_token_is_scored(config, side):
    model = build(ManticoreForTokenClassification, config)
    ids, mask = padded(side)
    labels = torch.where(mask.bool(), ids % 3, -100)
    out = model(ids, attention_mask=mask, labels=labels)
    rows = [model.model(text[None]).last_hidden_state[0] for text in texts()]
    expected = torch.cat(rows) @ model.score.weight.T + model.score.bias
    torch.testing.assert_close(out.logits[mask.bool()], expected, atol=1e-5, rtol=1e-5)
    wanted = torch.cat([text % 3 for text in texts()])
    torch.testing.assert_close(out.loss, categorical(expected, wanted), atol=1e-5, rtol=1e-5)
    assert functional.cross_entropy(expected, wanted).item() == pytest.approx(out.loss.item(), abs=1e-5)


def test_dropout_of_the_token_classifier(config):
    model = build(ManticoreForTokenClassification, config, classifier_dropout=0.5)
    assert model.dropout.p == 0.5
    assert not torch.equal(model.train()(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize(
    "model_class, auto",
    [
        (ManticoreForSequenceClassification, AutoModelForSequenceClassification),
        (ManticoreForTokenClassification, AutoModelForTokenClassification),
    ],
    ids=["sequence", "token"],
)
@torch.no_grad()
def test_saved_and_loaded(config, model_class, auto, tmp_path):
    model = build(model_class, config, id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2})
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path).eval()
    ids, mask = padded("left")
    assert torch.equal(again(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    assert again.config.id2label == {0: "a", 1: "b", 2: "c"}


@torch.no_grad()
def test_a_classifier_takes_the_trunk_of_a_language_model(config, tmp_path):
    """`from_pretrained` of a saved language model: the trunk is read, the classifier is fresh."""
    torch.manual_seed(3)
    model = ManticoreForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    classifier, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=4, pad_token_id=PAD, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"score.weight"} and classifier.num_labels == 4
    trunk = classifier.eval().model(tokens(), output_hidden_states=True)
    assert torch.equal(trunk.last_hidden_state, model.model(tokens()).last_hidden_state)
