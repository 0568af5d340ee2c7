"""lm-evaluation-harness on local tasks, without `max_length`: equal scores in any batch, and those found by hand."""

import json
import math
import os
import subprocess
import sys

import lm_eval
import pytest
import torch
from child import PREAMBLE
from ecosystem import TEXTS, saved
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer


HYBRIDS = {
    "limit_of_512": (("gpt_neox", "mamba2"), None, 512),
    "discretized": (("gpt2", "mamba2"), [1, 0], 512),
    "no_limit": (("mamba2", "falcon_mamba"), None, None),
}
QUESTIONS = [
    {"question": "A name is", "choices": [" bound", " a class of numbers", " nothing"], "answer": 0},
    {"question": "The value of an object whose identity", "choices": [" may change", " is"], "answer": 1},
    {"question": "if", "choices": [" x", " not a statement", " else", " y"], "answer": 2},
    {"question": "Functions return", "choices": [" one value", " several values in a tuple"], "answer": 1},
    {"question": "import", "choices": [" sys", " this module of the standard library"], "answer": 0},
]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rolling.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{{metric: byte_perplexity}}]
"""
GENERATE = """
task: tiny_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{until: ["zzz"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
TASKS = ["tiny_choice", "tiny_rolling", "tiny_generate"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "choice.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    texts = [TEXTS[i][: 60 * (i + 1)] for i in range(4)] + [TEXTS[5][:5000]]
    (folder / "rolling.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("generate", GENERATE)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    return folder, texts


def evaluated(folder, tasks, batch_size, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=TASKS,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=batch_size,
        device="cpu",
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    answers = {
        task: [sample["resps"] for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"])]
        for task in TASKS
    }
    return results["results"], answers


@torch.no_grad()
def log_probability(model, tokenizer, context, continuation):
    """Sum of the log-probabilities of the tokens of `continuation`, one forward pass, no batch and no padding."""
    ids = torch.tensor([tokenizer(context).input_ids if context else [tokenizer.eos_token_id]])
    start = ids.shape[1]
    ids = torch.cat([ids, torch.tensor([tokenizer(continuation).input_ids])], dim=1)
    rows = torch.log_softmax(model(ids).logits[0, start - 1 : -1], dim=-1)
    return rows.gather(-1, ids[0, start:, None]).sum().item()


@pytest.mark.parametrize("families, choice, limit", HYBRIDS.values(), ids=HYBRIDS)
def test_scores(families, choice, limit, tasks, monkeypatch, tmp_path):
    folder, texts = tasks
    saved(tmp_path / "hybrid", families, choice, max_position_embeddings=limit, n_positions=limit)
    scores, answers = evaluated(tmp_path / "hybrid", folder, 1, monkeypatch, tmp_path)
    batched, same = evaluated(tmp_path / "hybrid", folder, 4, monkeypatch, tmp_path)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hybrid")
    assert model.config.max_position_embeddings == limit
    for row, others, document in zip(answers["tiny_choice"], same["tiny_choice"], QUESTIONS):
        found, again = [float(r[0][0]) for r in row], [float(r[0][0]) for r in others]
        expected = [log_probability(model, tokenizer, document["question"], c) for c in document["choices"]]
        assert found == pytest.approx(expected, abs=1e-3) and again == pytest.approx(expected, abs=1e-3)
    for row, others, text in zip(answers["tiny_rolling"][:4], same["tiny_rolling"][:4], texts):
        expected = log_probability(model, tokenizer, "", text)
        assert len(tokenizer(text).input_ids) < 512
        assert float(row[0][0]) == pytest.approx(expected, rel=1e-4) == float(others[0][0])
    assert float(answers["tiny_rolling"][4][0][0]) == pytest.approx(float(same["tiny_rolling"][4][0][0]), rel=1e-5)
    assert answers["tiny_generate"] == same["tiny_generate"] and answers["tiny_generate"][0][0][0]
    for task in TASKS:
        for metric, value in scores[task].items():
            if isinstance(value, float) and not math.isnan(value):
                assert batched[task][metric] == pytest.approx(value, rel=1e-5), (task, metric)
    total = sum(float(row[0][0]) for row in answers["tiny_rolling"])
    per_byte = math.exp(-total / sum(len(text.encode()) for text in texts))
    assert scores["tiny_rolling"]["byte_perplexity,none"] == pytest.approx(per_byte, rel=1e-5)


@pytest.mark.parametrize("limit, expected", [(512, 512), (None, 2048)])
def test_the_longest_text(limit, expected, tmp_path):
    """The smallest limit of the components; where there is none, the harness's own default."""
    families = ("gpt_neox", "mamba2") if limit else ("mamba2", "falcon_mamba")
    saved(tmp_path, families, max_position_embeddings=limit)
    harness = HFLM(pretrained=str(tmp_path), device="cpu", dtype="float32")
    assert harness.max_length == expected and harness.backend == "causal"


@pytest.mark.slow
def test_the_command_without_the_package(tasks, tmp_path):
    saved(tmp_path / "hybrid", ("gpt_neox", "mamba2"), [0, 1], max_position_embeddings=512)
    words = ["run", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'hybrid'},trust_remote_code=True"]
    words += ["--tasks", "tiny_choice", "--include_path", str(tasks[0]), "--device", "cpu"]
    words += ["--batch_size", "4", "--output_path", str(tmp_path / "out.json")]
    code = (
        PREAMBLE
        + f"import runpy; sys.argv = ['lm_eval'] + {words!r}\nrunpy.run_module('lm_eval', run_name='__main__')"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.glob("out*.json")
    assert 0 <= json.loads(file.read_text())["results"]["tiny_choice"]["acc,none"] <= 1
