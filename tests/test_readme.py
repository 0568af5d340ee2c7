"""README.md: what a script makes is fresh, it is short, and one function draws its picture and all others."""

import re
import runpy
import sys

import made_reports
import pytest
import yaml
from snippets import ROOT, blocks_of

from modeling_manticore.hub import picture
from modeling_manticore.hub.cards import write_card


sys.path.insert(0, str(ROOT / "docs"))
import fill_readme  # noqa: E402
import readme_parts  # noqa: E402
import readme_results  # noqa: E402


TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
MOST_LINES, MOST_CHARACTERS = 250, 14_000


def by_hand() -> str:
    """What is not written by script, without code and addresses."""
    text = fill_readme.PART.sub("", TEXT)
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|https?://\S+", "", text, flags=re.DOTALL)
    return text


def test_it_is_fresh():
    assert fill_readme.filled(TEXT) == TEXT, "README.md is stale: make readme"


def test_it_is_short():
    assert len(TEXT.splitlines()) <= MOST_LINES and len(TEXT) <= MOST_CHARACTERS


def test_no_measured_number_is_written_by_hand():
    numbers = set(re.findall(r"(?<![\w.])\d[\d.,]*\d|(?<![\w.-])\d(?![\w.])", by_hand()))
    assert numbers <= {"3.10", "2406.00894", "95", "4", "5", "2.0", "2"}  # Python, the paper, the level, releases


def test_a_changed_result_changes_it(monkeypatch):
    real = readme_results.result

    def changed(name):
        found = real(name)
        if name == "regret":
            found["runs"][0]["rows"]["stitch"]["rank"] = 2
        if name == "ecosystem":
            found["rows"] = [row | {"library": row["library"].replace("5.23.0", "5.99.0")} for row in found["rows"]]
        return found

    for module in (readme_results, readme_parts):
        monkeypatch.setattr(module, "result", changed)
    text = fill_readme.filled(TEXT)
    assert "in 8 of 9 runs" in text and "in 8 of 9 runs" not in TEXT and "| transformers | 5.99.0 |" in text


def test_claims_about_libraries_are_tests(monkeypatch):
    monkeypatch.setattr(readme_parts, "WORKS", (("torch", "a", "b", ("test_that_is_not_there",)),))
    with pytest.raises(ValueError, match="got 'test_that_is_not_there', allowed are the tests in"):
        readme_parts.works_table()
    failed = {"rows": [{"item": "test_larger[0]", "status": "failed", "library": "torch 1"}]}
    monkeypatch.setattr(readme_parts, "WORKS", (("torch", "a", "b", ("test_larger",)),))
    monkeypatch.setattr(readme_parts, "result", lambda name: failed)
    with pytest.raises(ValueError, match="test_larger did not pass"):
        readme_parts.works_table()


def test_a_missing_result_or_part_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match=r"benchmarks/results/nothing.json: there is no such file"):
        readme_results.result("nothing")
    with pytest.raises(ValueError, match=r"README.md: got the parts"):
        fill_readme.filled(TEXT.replace("<!-- part works -->", ""))
    monkeypatch.setattr(readme_parts, "EXTRAS", {"train": "training"})
    with pytest.raises(ValueError, match=r"EXTRAS: got \['train'\], allowed are the extras"):
        readme_parts.extras()


def test_what_a_reader_with_ten_minutes_finds():
    commands = {line for block in blocks_of(TEXT) if block.language == "bash" for line in block.code.splitlines()}
    assert {"make demo", "make test", "make wheel", "make docs"} <= commands
    api = next(block.code for block in blocks_of(TEXT) if block.language == "python")
    statements = [line for line in api.splitlines()[1:] if line.strip()]
    assert len(statements) <= 5
    assert TEXT.count("\n![") == 1 and len(TEXT.split("\n\n")[1].split(". ")) == 3  # one picture, three sentences
    for name in ("vLLM", "llama.cpp, GGUF", "Ollama", "TGI"):
        assert re.search(rf"^\| {re.escape(name)} \| .{{10,}} \|$", TEXT, re.MULTILINE)


def test_how_to_cite():
    told = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert {"cff-version", "message", "title", "abstract", "authors", "version", "license", "keywords"} <= set(told)
    assert f'version = "{told["version"]}"' in project and f'license = "{told["license"]}"' in project
    (paper,) = told["references"]
    entry = next(block.code for block in blocks_of(TEXT) if block.language == "bibtex")
    assert paper["title"].replace("MAD", "{MAD}") in entry and f"{{{paper['year']}}}" in entry
    assert all(author["family-names"] in entry and author["given-names"] in entry for author in paper["authors"])
    assert paper["identifiers"][0]["value"].removeprefix("arXiv:") in entry and len(paper["authors"]) == 8


def test_every_picture_comes_from_one_function(monkeypatch, tmp_path):
    drawn = []
    real = picture._Drawing

    class Seen(real):
        def __init__(self, config, *rest):
            drawn.append(config)
            super().__init__(config, *rest)

    monkeypatch.setattr(picture, "_Drawing", Seen)
    pictures = runpy.run_path(str(ROOT / "benchmarks" / "make_pictures.py"))
    pictures["main"].__globals__["DOCS"] = tmp_path
    pictures["main"]()
    assert len(drawn) == 2
    for name in ("supernet.svg", "hybrid.svg"):
        committed, made = ((folder / name).read_text(encoding="utf-8") for folder in (ROOT / "docs", tmp_path))
        assert words(committed) == words(made), f"docs/{name} is stale: python benchmarks/make_pictures.py"
    write_card(tmp_path, made_reports.config(), repo_id="me/a", licences=["mit", "mit"])
    assert len(drawn) == 3 and (tmp_path / "hybrid.png").is_file()
    made_reports.search_report().write_page(tmp_path)
    assert len(drawn) == 4 and "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8")


def words(svg: str) -> tuple[list[str], list[str]]:
    """What is written in a picture, and the colours of what is drawn."""
    return re.findall(r"<!-- (.*?) -->", svg), re.findall(r"fill: (#\w+)", svg)
