"""Pipelines and the streamer, on hybrids that are read from a folder with their tokenizer."""

from threading import Thread

import pytest
import torch
from child import run_without_package
from ecosystem import saved
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, pipeline

from modeling_manticore import ManticoreForSequenceClassification


PROMPTS = ["The value of a name", "import", "A class may define"]
KINDS = {"supernet": None, "discretized": [0, 1]}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    saved(folder, ("gpt_neox", "mamba2"), request.param, max_position_embeddings=512)
    return folder


@torch.no_grad()
def continued(model, tokenizer, prompt, tokens):
    """Greedy continuation of one prompt by whole forward passes, without generate, cache or padding."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    for _ in range(tokens):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_text_generation(folder, batch_size, caplog):
    generate = pipeline("text-generation", model=str(folder), batch_size=batch_size)
    assert type(generate.model).__name__ == "ManticoreForCausalLM"
    found = generate(PROMPTS, max_new_tokens=8, do_sample=False)
    expected = [continued(generate.model, generate.tokenizer, prompt, 8) for prompt in PROMPTS]
    assert [rows[0]["generated_text"] for rows in found] == expected
    assert len(set(expected)) == 3 and "is not supported for text-generation" not in caplog.text


def test_text_generation_returns_the_scores_that_generate_computes(folder):
    """Left-padded logits of a batch against every prompt alone; tokens alone would hide a small error."""
    generate = pipeline("text-generation", model=str(folder))
    tokenizer, model = generate.tokenizer, generate.model
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert tokenizer.padding_side == "left" and batch.attention_mask.min() == 0
    out = model.generate(**batch, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    for row, prompt in enumerate(PROMPTS):
        width = batch.input_ids.shape[1]
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        alone = torch.cat([ids, out.sequences[row : row + 1, width:]], dim=1)
        with torch.no_grad():
            expected = model(alone).logits[0, ids.shape[1] - 1 : -1]
        found = torch.stack([step[row] for step in out.logits])
        torch.testing.assert_close(found, expected[: len(found)], atol=1e-4, rtol=1e-4)


def test_text_classification(folder, tmp_path):
    labels = {"id2label": {0: "dull", 1: "bright", 2: "odd"}, "label2id": {"dull": 0, "bright": 1, "odd": 2}}
    torch.manual_seed(0)
    classifier = ManticoreForSequenceClassification.from_pretrained(folder, **labels).eval()
    torch.nn.init.normal_(classifier.score.weight)
    classifier.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path)
    for batch_size in (1, 3):
        classify = pipeline("text-classification", model=str(tmp_path), batch_size=batch_size, top_k=None)
        for prompt, rows in zip(PROMPTS, classify(PROMPTS)):
            with torch.no_grad():
                hidden = classifier.model(tokenizer(prompt, return_tensors="pt").input_ids).last_hidden_state[0, -1]
                expected = torch.softmax(classifier.score(hidden), dim=-1)
            found = {row["label"]: row["score"] for row in rows}
            assert found == pytest.approx(dict(zip(["dull", "bright", "odd"], expected.tolist())), abs=1e-5)


def test_the_streamer_gives_the_text_piece_by_piece(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    options = dict(tokenizer(PROMPTS[0], return_tensors="pt"), max_new_tokens=8, do_sample=False, streamer=streamer)
    thread = Thread(target=model.generate, kwargs=options)
    thread.start()
    pieces = list(streamer)
    thread.join(timeout=60)
    expected = continued(model, tokenizer, PROMPTS[0], 8)
    assert "".join(pieces).replace(tokenizer.eos_token, "") == expected and len(pieces) > 2


def test_pipelines_without_the_package(tmp_path):
    saved(tmp_path / "hybrid", ("gpt_neox", "mamba2"), [0, 1], max_position_embeddings=512)
    code = """
from transformers import pipeline
generate = pipeline("text-generation", model="hybrid", trust_remote_code=True)
print(generate("The value", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith("The value"))
classify = pipeline("text-classification", model="hybrid", trust_remote_code=True)
print(type(classify.model).__name__, classify("The value")[0]["label"].startswith("LABEL_"))
"""
    assert run_without_package(code, tmp_path).splitlines() == ["True", "ManticoreForSequenceClassification True"]
