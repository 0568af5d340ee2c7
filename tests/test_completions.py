"""The completion mixture: what every component writes, equal in tokens, disjoint, repeatable, fit for calibration."""

from collections import Counter

import pytest
import torch

from modeling_manticore import ManticoreForCausalLM, calibrate
from modeling_manticore.tasks import completions as C
from modeling_manticore.tasks.text import help_topics, train_tokenizer
from tests.tiny import component


PROMPTS = ["The first", "A longer beginning of a text", "def f("]
SIZES = {"train_rows": 8, "validation_rows": 4, "test_rows": 4, "length": 12, "new_tokens": 10, "batch_size": 4}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(help_topics()[:30], 320)


@pytest.fixture(scope="module")
def models():
    return [component(family, vocab_size=320, eos_token_id=None) for family in ("gpt_neox", "mamba2")]


def test_equal_parts_in_every_split(models, tokenizer):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    data = C.completion_mixture(models, PROMPTS, [tokenizer] * 2, **SIZES)
    assert torch.equal(torch.get_rng_state(), before)
    for split, rows in (("train", 8), ("validation", 4), ("test", 4)):
        assert Counter(data[split]["component"]) == {0: rows // 2, 1: rows // 2}
        assert all(len(row["input_ids"]) == len(row["attention_mask"]) == 12 for row in data[split])
        assert data[split]["labels"] == data[split]["input_ids"]
    assert data["train"]["component"] != sorted(data["train"]["component"])
    again = C.completion_mixture(models, PROMPTS, [tokenizer] * 2, **SIZES)
    assert all(again[split][:] == data[split][:] for split in data)
    other = C.completion_mixture(models, PROMPTS, [tokenizer] * 2, **SIZES, seed=1)
    assert other["train"][:] != data["train"][:]

    hybrid = ManticoreForCausalLM.from_components(models, num_blocks=2)
    assert calibrate(hybrid, data["train"])


def test_components_write_their_own_text(models, tokenizer):
    """Without randomness, it is what the model's own generate gives, left padding or not."""
    texts = C.write_completions(models[0], tokenizer, PROMPTS, 3, new_tokens=6, batch_size=3, do_sample=False)
    for prompt, text in zip(PROMPTS, texts):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        alone = models[0].generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        assert text == tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)
    many = C.write_completions(models[1], tokenizer, PROMPTS, 9, new_tokens=6, batch_size=4)
    assert len(set(many)) == 9


def test_folders_are_loaded(models, tokenizer, tmp_path):
    folders = []
    for model in models:
        folders.append(str(tmp_path / model.config.model_type))
        model.save_pretrained(folders[-1])
        tokenizer.save_pretrained(folders[-1])
    data = C.completion_mixture(folders, PROMPTS, **SIZES)
    assert data["test"][:] == C.completion_mixture(models, PROMPTS, [tokenizer] * 2, **SIZES)["test"][:]


BAD = {
    "components": ({"components": []}, r"components: got \[\], allowed is a list"),
    "prompts": ({"prompts": ["a", ""]}, "prompts: got .* allowed is a list of texts that are not empty"),
    "rows": ({"train_rows": 7}, "train_rows: got 7, allowed are multiples of 2"),
    "few": ({"test_rows": 1}, "test_rows: got 1, allowed is an integer of at least 2"),
    "tokenizers": ({"tokenizers": None}, "tokenizers: got None with models in memory"),
    "one": ({"tokenizers": "one"}, "tokenizers: got 1 for 2 components"),
    "seed": ({"seed": -1}, "seed: got -1"),
    "repeats": ({"do_sample": False}, "'gpt_neox' wrote no new text in 10 batches of prompts"),
}


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD)
def test_bad_input(changes, message, models, tokenizer):
    arguments = {"components": models, "prompts": PROMPTS[:1], "tokenizers": [tokenizer] * 2} | SIZES | changes
    if arguments["tokenizers"] == "one":
        arguments["tokenizers"] = [tokenizer]
    with pytest.raises(ValueError, match=message):
        C.completion_mixture(**arguments)
