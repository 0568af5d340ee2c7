"""The paper's fine-tuning sets from small local files in each set's real columns; splits; labels on answers only."""

import json
from dataclasses import replace

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from modeling_manticore.tasks import finetuning_sets as F
from modeling_manticore.tasks.text import help_topics, train_tokenizer


def alpaca(i):
    text = f"Below is an instruction. Name {i}. Number {i}"
    return {"instruction": f"Name {i}.", "input": "" if i % 2 else f"in {i}", "output": f"Number {i}", "text": text}


def natural(i):
    names = {"task_name": f"task{i}_x", "id": f"task{i}-abc", "definition": f"Answer {i}."}
    return names | {"inputs": f"Is {i} even?", "targets": "No" if i % 2 else "Yes"}


def mlqa(i):
    answers = {"answer_start": [0], "text": [f"Fact {i}"]}
    return {"id": str(i), "title": "T", "context": f"Fact {i // 2} is.", "question": f"Which {i}?", "answers": answers}


def openorca(i):
    prompt = {"system_prompt": "" if i % 2 else "Be kind.", "question": f"How is {i}?"}
    return {"id": f"flan.{i}"} | prompt | {"response": f"Well, {i}."}


ROWS = {
    "penn-treebank": (lambda i: {"sentence": f" no it was n't black monday {i} "}, "", "no it was n't black monday 4"),
    "alpaca": (alpaca, "Name 4.\n\nin 4\n\n", "Number 4"),
    "eli5": (lambda i: {"question": f"Why {i}?", "answer": f"Because {i}."}, "Why 4?\n\n", "Because 4."),
    "natural-instructions": (natural, "Answer 4.\n\nIs 4 even?\n\n", "Yes"),
    "mlqa": (mlqa, "Fact 2 is.\n\nWhich 4?\n\n", "Fact 4"),
    "openorca": (openorca, "Be kind.\n\nHow is 4?\n\n", "Well, 4."),
}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    datasets.disable_progress_bars()


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    elif file.suffix == ".txt":
        file.write_text("\n".join(row["sentence"] for row in rows))
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    return file


def pairs(split):
    return list(zip(split["prompt"], split["completion"]))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_real_columns(name, suffix, tmp_path):
    make, prompt, completion = ROWS[name]
    file = write(tmp_path / f"rows{suffix}", [make(i) for i in range(40)])
    data = F.finetuning_set(name, file, validation=0.1, test=0.2, seed=1)
    parts = {split: pairs(rows) for split, rows in data.items()}
    assert list(parts) == ["train", "validation", "test"] and all(parts.values())
    everything = sum(parts.values(), [])
    assert len(everything) == len(set(everything)) == 40 and (prompt, completion) in everything
    assert data["train"].column_names == ["prompt", "completion"]
    again = F.finetuning_set(name, file, validation=0.1, test=0.2, seed=1)
    assert {split: pairs(rows) for split, rows in again.items()} == parts
    if name == "mlqa":  # a context is in one split only
        contexts = [{prompt.split("\n")[0] for prompt, _ in part} for part in parts.values()]
        assert len(set.union(*contexts)) == sum(map(len, contexts)) == 20


def configurations(*names):
    """The head of a README that names configurations by their folders."""
    listed = [
        f"- config_name: {name}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {name}/{split}-*\n" for split in splits)
        for name, splits in names
    ]
    return "---\nconfigs:\n" + "".join(listed) + "---\n"


# The files of the repositories on the Hub: rows by file, and the README where it says what is what.
LAYOUTS = {
    "penn-treebank": ({f"penn_treebank/{s}/0000.parquet": 20 for s in ("train", "validation", "test")}, None),
    "alpaca": ({"data/train-00000-of-00001-a09b74b3ef9c3b56.parquet": 40}, None),
    "eli5": ({"pair/train-00000-of-00001.parquet": 40}, configurations(("pair", ["train"]))),
    "natural-instructions": ({"train/task1_train.jsonl": 20, "test/task2_test.jsonl": 20}, None),
    "mlqa": (
        {
            f"{name}/{s}-00000-of-00001.parquet": 20
            for name in ("MLQA.en.de", "MLQA.en.en")
            for s in ("test", "validation")
        },
        configurations(("MLQA.en.de", ["test", "validation"]), ("MLQA.en.en", ["test", "validation"])),
    ),
    "openorca": ({"1M-GPT4-Augmented.parquet": 20, "3_5M-GPT3_5-Augmented.parquet": 20}, None),
}


@pytest.mark.parametrize("name", F.SETS)
def test_repositories_are_read_as_they_are_laid_out(name, tmp_path, monkeypatch):
    files, readme = LAYOUTS[name]
    for number, (file, count) in enumerate(files.items()):
        write(tmp_path / file, [ROWS[name][0](i) for i in range(number * 100, number * 100 + count)])
    if readme:
        (tmp_path / "README.md").write_text(readme)
    monkeypatch.setitem(F.SETS, name, replace(F.SETS[name], repository=str(tmp_path)))
    data = F.finetuning_set(name)
    assert sum(map(len, data.values())) == (60 if name == "penn-treebank" else 40)
    if name == "mlqa":
        prompts = [prompt for split in data.values() for prompt in split["prompt"]]
        assert min(int(prompt.split("Which ")[1].split("?")[0]) for prompt in prompts) == 200
    if name == "natural-instructions":
        assert len(data["test"]) == 20
    if name == "penn-treebank":
        assert [len(split) for split in data.values()] == [20, 20, 20]


def test_splits_of_the_source_stay(tmp_path):
    for split, numbers in (("train", range(30)), ("valid", range(25, 33)), ("test", range(28, 36))):
        write(tmp_path / f"ptb.{split}.txt", [{"sentence": f"line {i}"} for i in numbers])
    data = F.finetuning_set("penn-treebank", tmp_path)
    lines = {split: [int(text.split()[1]) for text in rows["completion"]] for split, rows in data.items()}
    assert lines == {"train": list(range(25)), "validation": [25, 26, 27], "test": list(range(28, 36))}


def test_a_folder_without_a_train_split_is_split_anew(tmp_path):
    write(tmp_path / "validation" / "0.parquet", [mlqa(i) for i in range(10)])
    write(tmp_path / "test" / "0.parquet", [mlqa(i) for i in range(10, 40)])
    data = F.finetuning_set("mlqa", tmp_path)
    assert sum(map(len, data.values())) == 40 and len(data["train"]) > 30


def test_files_by_split_and_empty_answers(tmp_path):
    answerless = dict(alpaca(99), output="  ")
    files = {"train": [write(tmp_path / "a.json", [alpaca(i) for i in range(9)] + [answerless])]}
    files["test"] = str(write(tmp_path / "b.json", [alpaca(i) for i in range(7, 12)]))
    data = F.finetuning_set("alpaca", files)
    assert [len(data[split]) for split in data] == [6, 1, 5]


def test_a_sample_of_a_large_set(tmp_path):
    file = write(tmp_path / "x.jsonl", [openorca(i) for i in range(50)])
    data = F.finetuning_set("openorca", file, max_rows=20, seed=2)
    assert sum(map(len, data.values())) == 20
    assert pairs(F.finetuning_set("openorca", file, max_rows=20, seed=2)["train"]) == pairs(data["train"])
    assert set(pairs(F.finetuning_set("openorca", file, max_rows=20, seed=3)["train"])) != set(pairs(data["train"]))


def test_without_network_one_error_says_what_to_pass():
    message = (
        r"name: 'alpaca' is tatsu-lab/alpaca on the Hub, which cannot be had \(.*\); pass local files with the "
        r"columns instruction, input, output as files=\.\.\."
    )
    with pytest.raises(ValueError, match=message):
        F.finetuning_set("alpaca")
    with pytest.raises(ValueError, match="ptb-text-only/ptb_text_only on the Hub"):
        F.finetuning_set("penn-treebank", max_rows=5)


def write_broken(folder):
    (folder / "a.jsonl").write_text("{broken")
    return folder / "a.jsonl"


def two_kinds(folder):
    write(folder / "a.json", [alpaca(0)])
    write(folder / "b.jsonl", [alpaca(1)])
    write(folder / "c.parquet", [alpaca(2)])
    return folder


BAD = {
    "name": ({"name": "pile"}, "name: got 'pile', allowed are penn-treebank, alpaca"),
    "absent": ({"files": "nowhere.json"}, "files: got 'nowhere.json', allowed are folders and files that exist"),
    "kind": ({"files": lambda folder: write(folder / "a.jsonl", []).rename(folder / "a.csv")}, "allowed are folders"),
    "kinds": ({"files": two_kinds}, "files: got json and parquet files, allowed are files of one kind"),
    "nothing": ({"files": lambda folder: folder}, "files: got no files"),
    "split": ({"files": {"dev": []}}, "files: got the split 'dev', allowed are train, validation and test"),
    "columns": (
        {"files": lambda folder: write(folder / "a.json", [{"question": "a", "answer": "b"}])},
        "files: 'alpaca' has no column 'instruction' but question, answer",
    ),
    "few": ({"files": lambda folder: write(folder / "a.json", [alpaca(1)])}, "too few rows"),
    "broken": ({"files": write_broken}, "files: 'alpaca' cannot be read"),
    "shares": ({"validation": 0.5, "test": 0.5}, "validation, test: got 0.5 and 0.5"),
    "rows": ({"max_rows": 0}, "max_rows: got 0"),
}


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD)
def test_bad_input(changes, message, tmp_path):
    arguments = {"name": "alpaca", "files": lambda folder: write(folder / "a.json", [alpaca(1)])} | changes
    if callable(arguments["files"]):
        arguments["files"] = arguments["files"](tmp_path)
    with pytest.raises(ValueError, match=message):
        F.finetuning_set(**arguments)


def test_labels_are_the_answers_only(tmp_path):
    tokenizer = train_tokenizer(help_topics()[:10], 300)
    rows = [alpaca(i) for i in range(20)] + [dict(alpaca(20), instruction="long " * 60)]
    text = F.finetuning_set("alpaca", write(tmp_path / "a.json", rows), validation=0.1, test=0.1)
    data = F.tokenize(text, tokenizer, length=64)
    assert sum(map(len, data.values())) == 20
    kept = {prompt: completion for split in text.values() for prompt, completion in pairs(split)}
    for row in (row for split in data.values() for row in split):
        asked = sum(label == -100 for label in row["labels"])
        assert set(row["labels"][:asked]) == {-100} and row["labels"][asked:] == row["input_ids"][asked:]
        assert row["input_ids"][-1] == tokenizer.eos_token_id and len(row["attention_mask"]) == len(row["input_ids"])
        prompt, completion = tokenizer.decode(row["input_ids"][:asked]), tokenizer.decode(row["labels"][asked:-1])
        assert kept[prompt] == completion
    with pytest.raises(ValueError, match="no row of .* has room for a completion"):
        F.tokenize(text, tokenizer, length=2)


def test_sentences_are_targets_but_for_the_first_token(tmp_path):
    tokenizer = train_tokenizer(help_topics()[:10], 300)
    rows = [{"sentence": f"the line number {i}"} for i in range(10)]
    data = F.tokenize(F.finetuning_set("penn-treebank", write(tmp_path / "a.txt", rows)), tokenizer, length=12)
    row = data["train"][0]
    assert row["labels"][0] == -100 and row["labels"][1:] == row["input_ids"][1:] and len(row["labels"]) <= 12
