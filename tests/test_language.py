"""Language modelling: packed rows with document boundaries; the likelihood of whole texts; metrics."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from modeling_manticore import ManticoreForCausalLM
from modeling_manticore.tasks import language, metrics
from modeling_manticore.tasks.text import help_topics, pack, train_tokenizer
from tests.tiny import component


TEXTS = ["The quick brown fox jumps over the lazy dog. " * 4, "Caf\u00e9 \u2014 \u65e5\u672c\u8a9e", "x = 1\n" * 30]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(help_topics()[:30], 320)


@pytest.fixture(scope="module")
def model():
    return component("gpt_neox", vocab_size=320)


def test_targets_do_not_cross_documents(tokenizer):
    rows = language.pack_documents(tokenizer, TEXTS, 16)
    assert torch.tensor(rows["input_ids"]).equal(pack(tokenizer, TEXTS, 16))
    ids = [token for row in rows["input_ids"] for token in row]
    labels = [token for row in rows["labels"] for token in row]
    starts = [0] + [i + 1 for i, token in enumerate(ids[:-1]) if token == tokenizer.eos_token_id]
    assert len(starts) == 3 and [i for i, label in enumerate(labels) if label == -100] == starts
    assert all(label in (-100, token) for token, label in zip(ids, labels))
    assert all(mask == [1] * 16 for mask in rows["attention_mask"])


def test_rows_of_one_document_only(tokenizer):
    rows = language.pack_documents(tokenizer, TEXTS, 16, boundaries="rows")
    read, asked = [], 0
    for row in rows:
        size = sum(row["attention_mask"])
        assert row["attention_mask"] == [1] * size + [0] * (16 - size) and len(row["labels"]) == 16
        assert set(row["labels"][size:]) <= {-100} and tokenizer.eos_token_id not in row["input_ids"][: size - 1]
        read += row["input_ids"][:size]
        asked += sum(label != -100 for label in row["labels"])
    documents = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]
    expected = [token for ids in documents for token in (ids[:-1] if len(ids) % 16 == 1 else ids)]
    assert read == expected and asked == len(read) - len(TEXTS)


def test_splits_of_documents(tokenizer):
    data = language.language_modelling(help_topics()[:40], tokenizer, 32, seed=1)
    rows = {name: set(map(tuple, split["input_ids"])) for name, split in data.items()}
    assert list(rows) == ["train", "validation", "test"] and len(rows["train"]) > len(rows["test"]) > 0
    assert data["test"][:] == language.language_modelling(help_topics()[:40], tokenizer, 32, seed=1)["test"][:]


def by_hand(model, tokenizer, text):
    """The likelihood in one go."""
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    return functional.cross_entropy(logits[0, :-1].double(), ids[0, 1:], reduction="sum").item()


def test_scores_are_the_likelihood_of_the_text(model, tokenizer):
    scores = language.score_texts(model, tokenizer, TEXTS, length=200, batch_size=2)
    for text, score in zip(TEXTS, scores):
        assert score.nats == pytest.approx(by_hand(model, tokenizer, text), rel=1e-5)
        assert score.bytes == len(text.encode()) and score.tokens == len(tokenizer(text)["input_ids"])
    expected = sum(score.nats for score in scores) / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    assert language.metric(scores) == pytest.approx(expected)


@pytest.mark.parametrize("length, stride", [(16, None), (16, 15), (7, 2), (2, 1)])
def test_windows_count_every_token_once(model, tokenizer, length, stride):
    row = [tokenizer.eos_token_id, *tokenizer(TEXTS[0])["input_ids"]]
    stride_used = length // 2 if stride is None else stride
    nats = torch.zeros(len(row), dtype=torch.float64)
    for place in range(1, len(row)):
        # The first window has the beginning; each later one brings the next `stride` tokens.
        moves = max(0, math.ceil((place + 1 - length) / stride_used))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row[moves * stride_used : place]])).logits[0, -1]
        nats[place] = functional.cross_entropy(logits.double(), torch.tensor(row[place]))
    (score,) = language.score_texts(model, tokenizer, TEXTS[:1], length=length, stride=stride)
    assert score.nats == pytest.approx(nats.sum().item(), rel=1e-5)


class Fixed(torch.nn.Module):
    """A language model in which every token costs the same number of nats a byte; one more token takes the rest."""

    def __init__(self, sizes, nats):
        super().__init__()
        chances = (-nats * sizes.double()).exp()
        self.logits = torch.cat([chances, 1 - chances.sum(dim=0, keepdim=True)]).log().float()
        self.device = torch.device("cpu")

    def forward(self, input_ids, attention_mask, use_cache):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_tokenizers_compare_in_bits_per_byte():
    """A model that pays the same for every byte has one figure, however the bytes are cut."""
    text, scores = "aaaabbbb" * 20, {}
    for name, tokenizer in (("coarse", train_tokenizer([text], 262)), ("fine", train_tokenizer(["z"], 257))):
        sizes = torch.tensor([len(piece) for piece in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))])
        scores[name] = language.score_texts(Fixed(sizes, 7.0), tokenizer, [text], length=32)
    assert scores["coarse"][0].tokens < scores["fine"][0].tokens == len(text)
    for score in scores.values():
        assert language.metric(score) == pytest.approx(7.0 / math.log(2), rel=1e-6)


@pytest.mark.parametrize("kind", ["component", "hybrid"])
def test_padding_and_mode_change_nothing(kind, model, tokenizer):
    if kind == "hybrid":
        model = ManticoreForCausalLM.from_components([model, component("mamba2", vocab_size=320)], num_blocks=2)
    model.train()
    together = language.score_texts(model, tokenizer, TEXTS, length=64, batch_size=8)
    assert model.training
    model.eval()
    alone = [language.score_texts(model, tokenizer, [text], length=64, batch_size=1)[0] for text in TEXTS]
    assert [score.nats for score in together] == pytest.approx([score.nats for score in alone], rel=1e-5)


BAD = {
    "length": ({"length": 1}, "length: got 1"),
    "stride": ({"length": 8, "stride": 8}, "stride: got 8, allowed is at most 7"),
    "texts": ({"texts": []}, r"texts: got \[\], allowed is a list"),
    "string": ({"texts": "a text"}, "texts: got 'a text', allowed is a list"),
    "empty": ({"texts": ["a", ""]}, r"texts\[1\]: it has no tokens"),
}


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD)
def test_bad_texts(changes, message, model, tokenizer):
    with pytest.raises(ValueError, match=message):
        language.score_texts(**({"model": model, "tokenizer": tokenizer, "texts": TEXTS} | changes))


def test_tokens_that_hide_text_are_refused(model):
    tokenizer = train_tokenizer(["a"], 257)
    tokenizer.unk_token = tokenizer.convert_ids_to_tokens(tokenizer("b")["input_ids"][0])
    with pytest.raises(ValueError, match=r"texts\[1\]: the tokenizer knows a part of it only as 'b'"):
        language.score_texts(model, tokenizer, ["aa", "ab"])
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="start: the tokenizer has no beginning- or end-of-text token"):
        language.score_texts(model, tokenizer, ["aa"])


def test_bad_packing(tokenizer):
    with pytest.raises(ValueError, match="boundaries: got 'both', allowed are targets, rows"):
        language.pack_documents(tokenizer, TEXTS, 16, "both")
    with pytest.raises(ValueError, match="allowed is at least one row of 5000"):
        language.pack_documents(tokenizer, TEXTS, 5000)
    with pytest.raises(ValueError, match="documents: got 'text', allowed is a list"):
        language.pack_documents(tokenizer, "text", 16)


def test_metrics_for_evaluate_need_no_hub():
    pytest.importorskip("evaluate")
    from modeling_manticore.tasks.evaluate_metrics import BitsPerByte, ClassificationAccuracy, Perplexity

    texts = ["caf\u00e9", "abc"]
    bits = BitsPerByte().compute(predictions=[5 * math.log(2), 3 * math.log(2)], references=texts)
    assert bits == {"bits_per_byte": pytest.approx(1.0)}
    assert Perplexity().compute(predictions=[2.0, 4.0], references=[1, 2]) == {"perplexity": pytest.approx(math.e**2)}
    accuracy = ClassificationAccuracy().compute(predictions=[1, 0, 1], references=[1, 1, 0], train_labels=[0, 0, 1])
    assert accuracy == metrics.classification_accuracy([1, 0, 1], [1, 1, 0], [0, 0, 1])


@pytest.mark.parametrize(
    "nats, counts, message",
    [
        ([], [], "allowed are two lists of one length"),
        ([1.0], [1, 2], "allowed are two lists of one length"),
        ([-1.0], [1], "nats: got a number that is negative or NaN"),
        ([1.0], [0], "tokens: got"),
        ([1.0], [1.5], "tokens: got"),
    ],
)
def test_bad_sums(nats, counts, message):
    with pytest.raises(ValueError, match=message):
        metrics.perplexity(nats, counts)


def test_perplexity_of_a_hopeless_model():
    assert metrics.perplexity([1e6], [1]) == math.inf
