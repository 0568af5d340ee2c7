"""The page of recipe fields: every field has a meaning, and the tables say what the schema says."""

import re
import sys

import pytest
from snippets import ROOT

from modeling_manticore.hub.recipes import recipe_from_dict


sys.path.insert(0, str(ROOT / "docs"))
import recipe_fields  # noqa: E402


def test_every_field_has_a_meaning():
    assert recipe_fields.undocumented() == []
    assert all(text.strip() for meanings in recipe_fields.MEANINGS.values() for text in meanings.values())


def test_a_field_without_a_meaning_is_an_error(monkeypatch):
    meanings = {name: dict(known) for name, known in recipe_fields.MEANINGS.items()}
    del meanings["SearchRecipe"]["beam"]
    meanings["LimitsRecipe"]["max_watts"] = "x"
    monkeypatch.setattr(recipe_fields, "MEANINGS", meanings)
    with pytest.raises(ValueError, match=r"MEANINGS: .* LimitsRecipe.max_watts, SearchRecipe.beam\."):
        recipe_fields.field_tables()


def test_what_the_tables_say():
    text = recipe_fields.field_tables()
    titles = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert titles[0] == "The recipe" and {"components", "search", "search.limits", "publishing"} <= set(titles)
    assert len(titles) == len(set(titles))
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\(#([^)]+)\)", text)) <= anchors
    rows = re.findall(r"^\| `.*\|$", text, re.MULTILINE)
    assert all(row.count(" | ") == 3 for row in rows)
    assert "| `gate` | `routed`, `mixture`" in text and "| `texts` | a list: text | required |" in text
    assert "| `seed` | integer, at least 0 | `0` |" in text and "| `bf16` | true or false | `false` |" in text


def test_bounds_are_those_that_are_checked():
    limits = {"components": [{"folder": "a"}, {"folder": "b"}], "name": "n"}
    assert "| `tokenizer_from` | integer, 0 to 15 |" in recipe_fields.field_tables()
    with pytest.raises(ValueError, match="tokenizer_from: got 16, allowed is at least 0 and at most 15"):
        recipe_from_dict(limits | {"num_blocks": 2, "tokenizer_from": 16})
