"""Model cards: what they say has a source, they validate, and their licences and numbers are right."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from tiny import FAMILIES, component
from travelling import TRAVELLING

from modeling_manticore import ManticoreConfig, ManticoreForCausalLM, discretize
from modeling_manticore.commands.demo_report import Row, card_arguments, write_json
from modeling_manticore.hub.card_check import card_problems, check_card
from modeling_manticore.hub.cards import architecture, render_card, template_file, write_card
from modeling_manticore.hub.contents import paths_in_text
from modeling_manticore.hub.licences import LICENCES, licence_of_folder, licence_of_hybrid
from modeling_manticore.hub.numbers import number
from modeling_manticore.hub.picture import FRAME, draw_hybrid


UNSURE = {"license": "unknown", "license_reason": "made in a test"}


@pytest.fixture(scope="module")
def supernet():
    model = ManticoreForCausalLM.from_components([component("gpt_neox"), component("mamba2", width=24)], num_blocks=2)
    model.set_mixture_weights([[0.713, 0.287], [0.25, 0.75]])
    return model


@pytest.fixture(scope="module")
def hybrid(supernet):
    return discretize(supernet, [0, 1], refit=False)


def named(config):
    """A copy whose components come from repositories."""
    config = ManticoreConfig.from_dict(config.to_dict())
    for entry, name in zip(config.components, ("EleutherAI/pythia-410m", "state-spaces/mamba2-130m")):
        entry.source, entry.revision = name, name.encode().hex()[:40].ljust(40, "0")
    return config


def front(text):
    return yaml.safe_load(text.split("---\n")[1])


# ---------------------------------------------------------------------- what a card says
def test_a_card_names_its_sources(hybrid):
    config = named(hybrid.config)
    results = [
        {
            "dataset": "prose",
            "metric": "loss",
            "value": 4.56712,
            "interval": [4.5, 4.61],
            "level": 0.95,
            "tokens": 1000,
        },
        {"dataset": "prose", "metric": "loss", "value": 5.25, "model": "pythia | continued", "tokens": 1000},
    ]
    recipe = {
        "components": [{"repo": "EleutherAI/pythia-410m", "license": "apache-2.0"}, {"license": "mit"}],
        "calibration": {"dataset": "someone/texts", "rows": 7},
        "evaluation": {"datasets": [{"name": "someone/more"}, "bible"]},
        "output": "/home/someone/runs/a",
        "cache": "/data",
        "publishing": {"language": "en", "limits": ["It is small."], "description": "A test.", "tags": ["tiny"]},
    }
    text = render_card(
        config, repo_id="me/hybrid", recipe=recipe, results=results, versions={"torch": "2.13.0"}, picture="hybrid.png"
    )
    data = front(text)
    assert data["base_model"] == ["EleutherAI/pythia-410m", "state-spaces/mamba2-130m"]
    assert data["base_model_relation"] == "merge" and data["license"] == "apache-2.0"
    assert data["tags"] == ["manticore", "hybrid", "custom_code", "tiny"]
    assert data["datasets"] == ["someone/texts", "someone/more"] and data["language"] == "en"
    (entry,) = data["model-index"][0]["results"]
    assert data["model-index"][0]["name"] == "hybrid"
    assert entry["metrics"] == [
        {
            "type": "loss",
            "name": "loss",
            "value": 4.567,
            "args": {"interval": [4.5, 4.61], "level": 0.95, "tokens": 1000},
        }
    ]
    assert "| **this hybrid** | 1,000 | 4.567 [4.500, 4.610] |" in text
    assert "| pythia \\| continued | 1,000 | 5.250 |" in text
    for revision in (entry.revision for entry in config.components):
        assert f"`{revision}`" in text
    assert "gpt_neox" in text and "`pythia-410m[0:2]`" in text and "bridge 32 -> 24" in text
    assert "![" in text and "(hybrid.png)" in text and '"me/hybrid"' in text and "torch 2.13.0" in text
    assert "- It is small." in text and "A test." in text and "someone/texts, someone/more and bible" in text
    assert "output: local" in text and "cache: local" in text and "/home" not in text
    assert ModelCard(text).data.to_dict()["license"] == "apache-2.0"


def test_what_has_no_source_is_left_out(hybrid):
    text = render_card(hybrid, recipe=UNSURE)
    data = front(text)
    assert set(data) == {"library_name", "license", "model_name", "pipeline_tag", "tags"}
    assert "how good this hybrid is, is unknown" in text and "![" not in text and "revision" in text
    assert f"{sum(p.numel() for p in hybrid.parameters()):,} parameters, float32" in text
    assert "Data:" not in text and "search" not in text and "None" not in text.replace("None were given", "")


def test_mixture_weights_of_a_supernet_and_of_a_report(supernet, hybrid):
    text = render_card(supernet, recipe=UNSURE)
    assert "`gpt_neox[0:2]` 0.713, `mamba2[0:1]` 0.287" in text
    report = {"strategy": "gaea", "blocks": [{"paths": ["a[0:2]", "b[0:1]"], "weights": [0.98765, 0.01235]}]}
    for given in (report, SimpleNamespace(to_dict=lambda: report)):
        text = render_card(hybrid, recipe=UNSURE, report=given)
        assert "`a[0:2]` 0.988, `b[0:1]` 0.012" in text and "strategy: gaea" in text
    assert "fit ``` 0.5" in render_card(hybrid, recipe=UNSURE, report="fit ``` 0.5")
    with pytest.raises(ValueError, match="report: got int"):
        render_card(hybrid, recipe=UNSURE, report=3)


def test_the_template_names_the_files_of_code():
    assert set(re.findall(r"`(\w+\.py)`", template_file().read_text())) == set(TRAVELLING)


BAD_RESULTS = {
    "list": ({"a": 1}, "results: got dict"),
    "keys": ([{"dataset": "a", "value": 1.0}], r"results\[0\]: got the keys"),
    "unknown": ([{"dataset": "a", "metric": "b", "value": 1.0, "seed": 1}], r"results\[0\]: got the keys"),
    "value": ([{"dataset": "a", "metric": "b", "value": float("nan")}], r"results\[0\].value: got nan"),
    "text": ([{"dataset": "a", "metric": 3, "value": 1.0}], r"results\[0\].metric: got 3"),
    "interval": ([{"dataset": "a", "metric": "b", "value": 1.0, "interval": [2, 1]}], r"results\[0\].interval"),
}


@pytest.mark.parametrize("case", BAD_RESULTS)
def test_bad_results(hybrid, case):
    results, message = BAD_RESULTS[case]
    with pytest.raises(ValueError, match=message):
        render_card(hybrid, recipe=UNSURE, results=results)


def test_bad_recipes(hybrid):
    with pytest.raises(ValueError, match="recipe: got list"):
        render_card(hybrid, recipe=[1])
    with pytest.raises(ValueError, match="recipe.a.b: got object"):
        render_card(hybrid, recipe=UNSURE | {"a": {"b": object()}})
    with pytest.raises(ValueError, match="licences: got"):
        render_card(hybrid, licences=["mit"])


# ---------------------------------------------------------------------- licences
@pytest.mark.parametrize(
    "components, expected",
    [
        (["mit", "mit"], "mit"),
        (["apache-2.0", "mit"], "apache-2.0"),
        (["apache-2.0", "cc-by-nc-4.0"], "cc-by-nc-4.0"),
        (["gemma", "mit", "gemma"], "gemma"),
        (["llama3.2", "apache-2.0"], "llama3.2"),
    ],
)
def test_licences_that_follow(components, expected):
    assert licence_of_hybrid(components) == expected == licence_of_hybrid(components, expected)


@pytest.mark.parametrize(
    "components, message",
    [
        (["mit", None], "component 1 is unknown"),
        (["other", "mit"], "component 0 is unknown"),
        (["mit", "my-own"], "component 1 is 'my-own'"),
        (["gemma", "cc-by-nc-4.0"], "'cc-by-nc-4.0' and 'gemma' do not go together"),
        (["cc-by-nd-4.0", "mit"], "allows nothing made of it to be shared"),
    ],
)
def test_licences_that_need_a_reason(hybrid, components, message):
    with pytest.raises(ValueError, match=f"^license: .*{message}"):
        licence_of_hybrid(components)
    with pytest.raises(ValueError, match=message):
        licence_of_hybrid(components, "other")
    with pytest.raises(ValueError, match=message):
        licence_of_hybrid(components, None, "so they said")
    assert licence_of_hybrid(components, "other", "so they said") == "other"
    if len(components) == 2:
        text = render_card(hybrid, licences=components, recipe={"license": "other", "license_reason": "so they said"})
        assert "Reason: so they said" in text


def test_choices_of_a_licence():
    with pytest.raises(ValueError, match="got 'mit', but the components' licences give 'apache-2.0'"):
        licence_of_hybrid(["apache-2.0", "mit"], "mit")
    with pytest.raises(ValueError, match="license: got 'mine', allowed are"):
        licence_of_hybrid(["mit"], "mine", "because")
    with pytest.raises(ValueError, match="license_reason: got ''"):
        licence_of_hybrid(["mit"], "mit", "")
    with pytest.raises(ValueError, match="repo_id: got 'me/hybrid'.*begins with 'Llama'"):
        licence_of_hybrid(["llama3.2", "mit"], repo_id="me/hybrid")
    assert licence_of_hybrid(["llama3", "mit"], repo_id="me/Llama-3-Mamba") == "llama3"
    with pytest.raises(ValueError, match="'Llama 3'"):
        licence_of_hybrid(["llama3", "mit"], repo_id="me/Llama-2-Mamba")


def test_obligations_in_words():
    assert LICENCES["cc0-1.0"].obligations == []
    assert LICENCES["llama3.1"].obligations[1:] == [
        "the name begins with 'Llama'",
        "its own terms and use policy pass on",
    ]
    assert LICENCES["cc-by-nc-sa-4.0"].obligations[1:] == [
        "non-commercial use only",
        "share-alike: the same licence for what is made of it",
    ]


def test_the_licence_of_a_local_folder(hybrid, tmp_path):
    config = named(hybrid.config)
    for k, entry in enumerate(config.components):
        entry.source, entry.revision = str(tmp_path / f"part{k}"), None
        (tmp_path / f"part{k}").mkdir()
    assert licence_of_folder(tmp_path / "part0") is None
    (tmp_path / "part0" / "README.md").write_text("---\nlicense: mit\n---\nhello\n")
    (tmp_path / "part1" / "README.md").write_text("---\nlicense: [\n---\nhello\n")
    with pytest.raises(ValueError, match="component 1 is unknown"):
        render_card(config)
    (tmp_path / "part1" / "README.md").write_text("---\nlicense: gemma\n---\n---\n")
    text = render_card(config)
    assert front(text)["license"] == "gemma" and "base_model" not in front(text)
    assert "part0 (local)" in text and str(tmp_path) not in text


# ---------------------------------------------------------------------- the validator
GOOD = """---
license: mit
library_name: transformers
tags: [manticore]
base_model: [a/b, c]
model-index:
- name: x
  results:
  - {task: {type: t}, dataset: {name: d, type: d}, metrics: [{type: loss, value: 1.0}]}
---
# x: either/or, 3/4, <a/b>, https://example.org/a/b, [link](docs/x.md), `a/b/c`
"""
BAD_CARDS = {
    "no front matter": ("hello", "no front matter"),
    "no yaml": (GOOD.replace("license: mit", "license: ["), "no YAML"),
    "no mapping": ("---\n- a\n---\n", "list, not a mapping"),
    "licence": (GOOD.replace("mit", "mine"), "license: got 'mine'"),
    "no licence": (GOOD.replace("license: mit\n", ""), "license: missing"),
    "type": (GOOD.replace("[manticore]", "manticore"), "tags: got 'manticore'"),
    "entries": (GOOD.replace("[manticore]", "[1]"), r"tags: got \[1\]"),
    "base": (GOOD.replace("[a/b, c]", "[a/b/c]"), "base_model: got 'a/b/c'"),
    "base number": (GOOD.replace("[a/b, c]", "3"), "base_model: got 3"),
    "relation": (GOOD.replace("license:", "base_model_relation: frankenstein\nlicense:"), "base_model_relation: got"),
    "index": (GOOD.replace("name: x", "nome: x"), r"model-index\[0\]: needs a name"),
    "metric": (GOOD.replace(", value: 1.0", ""), r"model-index\[0\].results\[0\].metrics: lacks value"),
    "no metrics": (GOOD.replace(", metrics: [{type: loss, value: 1.0}]", ""), "metrics: lacks type, value"),
    "path": (GOOD + "see /home/me/x", "local path '/home/me/x'"),
    "home": (GOOD + "see ~/runs/x", "local path '~/runs/x'"),
    "drive": (GOOD + "see C:\\Users\\me", "local path"),
    "file": (GOOD + "see file:///x/y", "local path"),
    "marker": (GOOD + "by {{ author }}", "template marker"),
    "placeholder": (GOOD + "[More Information Needed]", "More Information Needed"),
}


def test_a_good_card_passes():
    assert card_problems(GOOD) == []
    check_card(GOOD)


@pytest.mark.parametrize("case", BAD_CARDS)
def test_bad_cards(case):
    text, message = BAD_CARDS[case]
    with pytest.raises(ValueError, match=f"^card: .*{message}"):
        check_card(text)


# ---------------------------------------------------------------------- the demo's card
def numbers_without_source(card, table):
    """
    Every word with a digit in the card, but in lines of the template itself, that is neither a number of the JSON as
    cards print it nor part of one of its texts.
    """
    numbers, texts = set(), []

    def collect(value):
        if isinstance(value, dict):
            [collect(inner) for pair in value.items() for inner in pair]
        elif isinstance(value, list):
            [collect(inner) for inner in value]
        elif isinstance(value, str):
            texts.append(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            numbers.update({float(value), float(number(value).replace(",", ""))})

    collect(table)
    static = set(template_file().read_text().splitlines())
    missing = []
    for line in card.splitlines():
        for word in re.findall(r"[\w.+-]*\d[\w.,+-]*", "" if line in static else line):
            word = word.rstrip(".,")
            try:
                known = float(word.replace(",", "")) in numbers
            except ValueError:
                known = False
            if not known and not any(word in text for text in texts):
                missing.append(word)
    return missing


def demo_table(supernet, hybrid, file):
    """A table as the demo writes it."""
    rows = [
        Row("gpt_neox (prose)", {"prose": 4.68471, "code": 6.25}, {"prose": 0.0123, "code": 0.02}, 1000, 3.25),
        Row(
            "gpt_neox (prose), fine-tuned",
            {"prose": 4.5, "code": 5.1},
            {"prose": 0.01, "code": None},
            1000,
            3.0,
            5,
            1e-4,
        ),
        Row("fixed hybrid, fine-tuned", {"prose": 4.4, "code": 4.9}, {"prose": 0.01, "code": 0.03}, 900, 4.0, 5, 1e-4),
    ]
    settings = {
        "texts": ["bible", "/home/me/code.txt"],
        "num_blocks": 2,
        "gate": "routed",
        "row_length": 128,
        "steps": 5,
    }
    settings |= {"batch_size": 8, "seed": 0, "calibration_rows": 256, "search_steps": 3, "search_learning_rate": 1e-4}
    settings |= {"mixture_learning_rate": 0.1, "learning_rate": 2e-3, "eval_rows": 64}
    weights = [point.tolist() for point in supernet.mixture_weights()]
    write_json(
        file,
        rows,
        settings=settings,
        kept="fixed hybrid, fine-tuned",
        hybrid=architecture(hybrid),
        tokens=5 * 8 * 128,
        total_seconds=12.3456,
        searched_choice=[0, 1],
        blocks=[{"paths": ["a[0:2]", "b[0:1]"], "weights": point} for point in weights],
        versions={"torch": "2.13.0", "python": "3.11.9"},
    )
    return json.loads(file.read_text())


def test_every_number_of_the_demos_card_is_in_its_table(supernet, hybrid, tmp_path):
    table = demo_table(supernet, hybrid, tmp_path / "table.json")
    card = write_card(tmp_path, hybrid, **card_arguments(table))
    text = card.read_text()
    assert card == tmp_path / "README.md" and (tmp_path / "hybrid.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "hybrid.png", "table.json"]
    assert numbers_without_source(text, table) == []
    assert "4.400 [4.380, 4.420]" in text and "5,120" in text and "0.713" in text
    for wrong in ("4.681", "0.714", "99", "2.14.0"):
        assert numbers_without_source(f"{text}\nloss {wrong}\n", table) == [wrong]
    assert paths_in_text(text) == []
    check_card(text)


# ---------------------------------------------------------------------- the picture
def test_the_picture_has_every_slice_and_weight(supernet, hybrid, tmp_path):
    text = draw_hybrid(supernet)
    for word in ("gpt_neox", "mamba2", "[0:2]", "[2:4]", "[0:1]", "[1:3]", "0.713", "0.287", "gate routed"):
        assert f"<!-- {word}" in text, word
    assert draw_hybrid(supernet) == text
    assert FRAME not in text and draw_hybrid(supernet, choice=[0, 1]).count(f"stroke: {FRAME}") == 2
    text = draw_hybrid(hybrid)
    assert "<!-- bridge -->" in text and "0.713" not in text
    config = ManticoreConfig.from_partition(
        [FAMILIES[name]() for name in ("gpt_neox", "mamba2", "llama")], 3, skip_paths=True
    )
    assert "<!-- skip -->" in draw_hybrid(config) and "0.333" not in draw_hybrid(config)
    weights = [[0.2, 0.3, 0.5], [0.1, 0.2, 0.3, 0.4], [0.5, 0.25, 0.25]]
    draw_hybrid(config, tmp_path / "new" / "x.svg", weights=weights, names=["a", "b", "c"])
    text = (tmp_path / "new" / "x.svg").read_text()
    assert "<!-- skip 0.400 -->" in text and "<!-- b -->" in text
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["x.svg"]


def test_pictures_refuse(supernet, tmp_path):
    with pytest.raises(ValueError, match="file: got .*x.jpg"):
        draw_hybrid(supernet, tmp_path / "x.jpg")
    with pytest.raises(ValueError, match="weights: got"):
        draw_hybrid(supernet, weights=[[1.0], [0.5, 0.5]])
    with pytest.raises(ValueError, match=r"choice: got \[0, 2\]"):
        draw_hybrid(supernet, choice=[0, 2])
    with pytest.raises(ValueError, match="names: got 1"):
        draw_hybrid(supernet, names=["a"])
    assert not list(tmp_path.iterdir())


def test_measured_standard_error():
    from modeling_manticore.commands.models import measure

    model = component("gpt_neox")
    rows = torch.randint(3, 64, (5, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        each = torch.stack([model(row[None], labels=row[None]).loss for row in rows]).double()
    found = measure(model, rows, batch_size=2)
    assert found["loss"] == pytest.approx(each.mean().item(), rel=1e-5)
    assert found["standard_error"] == pytest.approx((each.std() / 5**0.5).item(), rel=1e-4)
    assert measure(model, rows[:1])["standard_error"] is None


# ---------------------------------------------------------------------- licences of what a choice dropped
def test_licences_of_components_that_a_choice_dropped(supernet):
    config = named(supernet.config)
    alone = named(config)
    alone.components = alone.components[1:]
    alone = ManticoreConfig.from_dict(
        alone.to_dict() | {"components": alone.components, "blocks": [[{"component": 0, "start": 0, "stop": 3}]]}
    )
    names = [entry.source for entry in config.components]

    def licence(**arguments):
        return front(render_card(alone, **arguments))["license"]

    assert licence(licences=["mit", "mit"]) == "mit"
    assert licence(licences={names[0]: "gemma", names[1]: "mit"}) == "mit"
    assert licence(licences={"mamba2-130m": "isc"}) == "isc"
    recipe = {"components": [{"repo": name, "license": own} for name, own in zip(names, ("gemma", "cc0-1.0"))]}
    assert licence(licences=["gemma", "mit"], recipe=recipe) == "mit"
    assert licence(recipe=recipe) == "cc0-1.0"
    with pytest.raises(ValueError, match=f"licences: got .* where a choice dropped some, a mapping .*'{names[1]}'"):
        licence(licences=["gemma", "mit"])
    with pytest.raises(ValueError, match="component 0 is unknown"):
        licence(licences={"somebody/else": "mit"})


def test_a_card_is_checked_before_anything_is_drawn(supernet, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("modeling_manticore.hub.cards.draw_hybrid", lambda *given, **named: drawn.append(given))
    with pytest.raises(ValueError, match="licences: got"):
        write_card(tmp_path, supernet, licences=["mit"])
    assert not drawn and not list(tmp_path.iterdir())
    write_card(tmp_path, supernet, licences=["mit", "mit"])
    assert drawn
