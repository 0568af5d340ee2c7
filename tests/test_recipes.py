"""Recipes: read exactly, refused with the place; fuzzed: only our ValueErrors, quickly, without files or network."""

import builtins
import random
import socket
import time
from pathlib import Path

import pytest
import yaml

from modeling_manticore.hub import recipes
from modeling_manticore.hub.recipes import load_recipe, recipe_from_dict, recipe_from_text, recipe_to_dict
from modeling_manticore.hub.safe_yaml import MOST_BYTES, parse_yaml


SMALL = """
components:
  - repo: a/one
  - {repo: b/two, revision: v1, license: mit, license_reason: "its authors say so"}
num_blocks: 3
calibration: {texts: [topics], rows: 1_000}
search: {strategy: darts, texts: [python], search_texts: [bible], steps: 10, learning_rate: 1e-4}
finetune: {texts: [python], learning_rate: 0.001, steps: 20}
evaluation: {texts: [notes.txt]}
publishing: {repo_id: me/hybrid, private: true}
"""


@pytest.mark.parametrize("name, file", list(recipes.shipped_recipes().items()))
def test_shipped_recipes_are_valid(name, file):
    recipe = load_recipe(name)
    assert recipe == load_recipe(file) and recipe.name == name == file.stem
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe
    assert recipe_from_text(yaml.safe_dump(recipe_to_dict(recipe))) == recipe
    comment = file.read_text().split("\nname:")[0]
    assert all(line.startswith("#") for line in comment.splitlines()) and "easure" in comment


def test_the_seven_are_there():
    found = recipes.shipped_recipes()
    assert len(found) == 7 and "demo" in found and "pythia-410m-mamba-370m" in found
    paper = load_recipe("pythia-410m-mamba-370m")
    assert [c.repo for c in paper.components] == ["EleutherAI/pythia-410m", "state-spaces/mamba-370m-hf"]
    assert (paper.gate, paper.project_ends, paper.head_mixture) == ("mixture", False, "first")
    assert len(load_recipe("three-components").components) == 3
    assert load_recipe("mambaformer-from-scratch").from_scratch


def test_values_arrive():
    recipe = recipe_from_text(SMALL)
    assert recipe.calibration.rows == 1000 and recipe.search.learning_rate == 1e-4
    assert recipe.components[1].revision == "v1" and recipe.publishing.private is True
    assert recipe.paths == [2, 2, 2] and recipe.folder == "runs/recipe"


BAD = {
    "gate: rooted": "gate: got 'rooted', allowed are 'routed'",
    "gates: routed": "gates: there is no such field; did you mean 'gate'",
    "num_blocks: 2.0": "num_blocks: got 2.0, allowed is an integer",
    "num_blocks: true": "num_blocks: got True, allowed is an integer",
    "num_blocks: 0": "num_blocks: got 0, allowed is at least 1",
    "num_blocks: 99999999999999999999": "num_blocks: got 99999999999999999999, allowed are integers of at most",
    "project_ends: yes": "project_ends: got 'yes', allowed is true or false",
    "components: []": "components: got 0 entries",
    "components: [{}]": "give exactly one of them",
    "components: [{repo: ../x}]": "components[0].repo: got '../x'",
    "components: [{repo: a/b, license: mit}]": "license_reason: give both or neither",
    "components: [{config: {model_type: llama, auto_map: {}}}]": "components[0].config.auto_map",
    "components: [{config: {a: {auto_map: 1}, model_type: x}}]": "components[0].config.a.auto_map",
    "tokenizer_from: 2": "tokenizer_from: got 2, allowed is 0..1",
    "output_folder: /etc": "output_folder: got '/etc', allowed is a relative path",
    "output_folder: a/../../b": "allowed is a relative path",
    "output_folder: '~/x'": "allowed is a relative path",
    "output_folder: 'C:x'": "allowed is a relative path",
    "name: ../x": "name: got '../x'",
    "search: {strategy: none}": "search.choice: is missing with strategy 'none'",
    "search: {strategy: none, choice: [0, 1]}": "search.choice: got 2 indices, allowed is one a block, 3",
    "search: {strategy: none, choice: [0, 1, 2]}": "search.choice[2]: got 2, allowed is 0..1",
    "search: {strategy: joint}": "search.texts: it is missing",
    "search: {texts: [a], search_texts: [b]}": "search.search_texts: allowed with strategy 'darts'",
    "search: {texts: [notes.txt]}": "evaluation.texts: got 'notes.txt', which is in search.texts too",
    "finetune: {texts: [a], learning_rate: 0}": "finetune.learning_rate: got 0.0, allowed is above 0",
    "finetune: {texts: [a], learning_rate: .inf}": "finetune.learning_rate: got .inf, allowed are finite",
    "finetune: {texts: [a], learning_rate: 1e999}": "allowed are finite numbers",
    "finetune: {texts: [a], learning_rate: .nan}": "allowed are finite numbers",
    "finetune: {texts: [a], distill_weight: 1}": "finetune.distill_weight: given without teacher",
    "finetune: {texts: []}": "finetune.texts: got 0 entries",
    "finetune: {texts: a}": "finetune.texts: got 'a', allowed is a list",
    "finetune: [1]": "finetune: got a list of 1, allowed is a mapping",
    "publishing: {repo_id: a/b/c}": "publishing.repo_id: got 'a/b/c'",
    "blocks: [[{component: 0, start: 0, stop: 1}]]": "num_blocks, blocks: give exactly one",
    "skip_paths: !!python/object:os.system {}": "skip_paths: got the tag",
    "dtype: &a float32": "dtype: got an anchor or alias",
    "dtype: *a": "dtype",
    "gate: routed\ngate: none": "gate: it is given twice",
    "1: 2": "got the key '1', allowed are strings",
    "tokenizer: {repo: a/b}": "tokenizer: allowed with components from scratch",
}


@pytest.mark.parametrize("line", list(BAD))
def test_bad_recipes_are_refused_with_the_place(line):
    key = line.split(":")[0]
    kept = [own for own in SMALL.splitlines() if not own.startswith(f"{key}:")]
    if key == "components":
        kept = [own for own in kept if not own.startswith("  - ")]
    with pytest.raises(ValueError) as error:
        recipe_from_text("\n".join([*kept, line]))
    assert BAD[line] in str(error.value), error.value


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "empty"),
        ("- 1", "allowed is a mapping"),
        ("a: 1\n---\nb: 2", "more than one document"),
        ("a: [" * 40, "nested more than"),
        ("a: {b: [1, 2}", "not valid YAML"),
        ("%TAG ! tag:x,2000:\n---\na: 1", "defines tags"),
        ("a: [" + "1," * 30_000 + "]", "entries"),
        ("a: " + "9" * 5000, "digits"),
        ("a: &x [1]\nb: [*x, *x]", "anchor"),
    ],
)
def test_bad_yaml_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_yaml(text)


def test_bad_files_are_refused(tmp_path):
    file = tmp_path / "x.yaml"
    for content, message in (
        (b" " * (MOST_BYTES + 1), "larger"),
        (b"a: \xff", "not UTF-8"),
        (b"a: 1", "no such field"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_recipe(file)
    for name in ("nothing.yaml", "nothing", tmp_path):
        with pytest.raises(ValueError):
            load_recipe(name)


WORDS = ["null", "true", "-1", "0", "10**9", "999999999999999999", "1" * 30, "-" + "9" * 18, ".nan", "-.inf", "1e400"]
WORDS += ["''", "'../..'", "/etc/passwd", "!!python/name:os.system", "!x y", "&a 1", "*a", "{}", "[]", "[[[[[[]]]]]]"]
WORDS += ["{a: {b: {c: 1}}}", "{component: null}", "'\\0'", '"\\0"', "1e-4", "é", "x" * 3000, "~", "<<", "2024-01-01"]
KEYS = [
    "auto_map",
    "components",
    "blocks",
    "search",
    "name",
    "<<",
    "texts",
    "choice",
    "config",
    "model_type",
    "~",
    "1",
]
KEYS += ["component", "start", "stop", "limits", "license", "output_folder", "'../x'", "__class__", "validate"]


def mutated(text: str, rng: random.Random) -> str:
    """One to four changes: of values, keys, lines, letters, or a bomb in place of all."""
    for _ in range(rng.randint(1, 4)):
        lines = text.split("\n")
        i = rng.randrange(len(lines))
        kind, head = rng.randrange(12), lines[i].split(":")[0]
        if kind <= 3 and ":" in lines[i]:
            lines[i] = f"{head}: {rng.choice(WORDS)}"
        elif kind == 4:
            lines.insert(i, lines[i])
        elif kind == 5:
            del lines[i]
        elif kind == 6 and ":" in lines[i]:
            indent = lines[i][: len(lines[i]) - len(lines[i].lstrip())]
            lines[i] = f"{indent}{rng.choice(KEYS)}:{lines[i].partition(':')[2]}"
        elif kind == 7:
            j = rng.randrange(len(lines))
            lines[i], lines[j] = lines[j], lines[i]
        elif kind == 8:
            lines[i] = "".join(
                rng.choice((c, c, c, c, rng.choice("{}[]:,&*!|>'\"%@`#- \t\x00\u2028é9"))) for c in lines[i]
            )
        elif kind == 9:
            lines.insert(i, f"{rng.choice(KEYS)}: {rng.choice(WORDS)}")
        elif kind == 10 and rng.random() < 0.2:
            bombs = ["a: " + "[" * rng.randint(1, 5000), "x: [" + "1, " * rng.randint(1, 50_000) + "]"]
            bombs.append("a: &a [x]\n" + "\n".join(f"b{n}: &b{n} [*a, *a, *a]" for n in range(30)))
            bombs.append("y: " + "9" * rng.randint(1, 100_000))
            lines.insert(i, rng.choice(bombs))
        elif kind == 11:
            lines[i] = f"{lines[i]} {rng.choice(WORDS)}"
        text = "\n".join(lines)
    return text


def fuzz(count: int, monkeypatch) -> int:
    """Number of mutations that are still recipes."""
    sources = [file.read_text() for file in recipes.shipped_recipes().values()] + [SMALL]
    recipe_from_text(SMALL)

    def refuse(*arguments, **options):
        raise AssertionError(f"opened {arguments}")

    monkeypatch.setattr(builtins, "open", refuse)
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(socket, "socket", refuse)
    rng, valid = random.Random(0), 0
    for n in range(count):
        text = mutated(rng.choice(sources), rng)
        start = time.process_time()
        try:
            recipe_from_text(text)
            valid += 1
        except ValueError as error:
            assert str(error) and len(str(error)) < 2000 and type(error) is ValueError, (n, error)
        assert time.process_time() - start < 1, (n, text[:500])
    return valid


def test_mutated_recipes(monkeypatch):
    assert 50 < fuzz(1000, monkeypatch) < 950


@pytest.mark.slow
def test_five_thousand_mutated_recipes(monkeypatch):
    assert 250 < fuzz(5000, monkeypatch) < 4750
