"""Pages of reports: what they hold, that nothing in them comes from data as code, and that a browser can use them."""

import json
import re
from html.parser import HTMLParser

import made_reports
import pytest
from browser import Browser, screenshots

from modeling_manticore.pages.charts import line_chart, scatter_chart, ticks
from modeling_manticore.pages.page import Page, Table, thinned
from modeling_manticore.search.search_report import likeliest


MADE = {
    "search": made_reports.search_report,
    "stitch": made_reports.stitch_report,
    "sweep": made_reports.sweep_report,
    "programming": made_reports.programming_report,
}
EVIL = '</script><script>alert(1)</script><img src=x onerror="alert(2)"> & {{ 7 * 7 }} $x$'


class Elements(HTMLParser):
    """Tags with attributes, and the text outside script and style."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts, self.inside = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and tag == self.inside[-1]:
            self.inside.pop()

    def handle_data(self, data):
        if not self.inside:
            self.texts.append(data)


def write(name, folder, **options):
    """The page of a made report, as text."""
    report = MADE[name]()
    if name == "search":
        report.save(folder)
    report.write_page(folder, **options)
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", MADE)
def test_a_page_is_one_file_with_everything_in_it(name, tmp_path):
    text = write(name, tmp_path, recipe={"texts": ["my own.txt"], "steps": 40})
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    found = Elements(text)
    told = " ".join(" ".join(found.texts).split())
    links = [a for _, tag in found.tags for key, a in tag.items() if key in ("src", "href", "action", "data")]
    assert links == ["data:,"] and not re.search(r"url\((?!#)", text) and "@import" not in text
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {"svg", "table", "h1", "noscript"} <= {tag for tag, _ in found.tags}
    for word in ("gate routed", "pythia-70m", "mamba2-130m", "gpt_neox", "my own.txt", "Environment", "torch"):
        assert word in told
    if name in ("search", "stitch"):
        assert "Costs and limits" in told and "11,621,440" in told and "gpt_neox[0:2] > mamba2[2:" in told
        assert sum("data-row" in attributes and tag == "circle" for tag, attributes in found.tags) >= 3 * 30
    if name == "search":
        assert "loss (nats)" in told and "163,840" in told and "0.972" in told  # also without a script


@pytest.mark.parametrize("name", ["search", "stitch"])
def test_strings_from_data_are_text(name, tmp_path):
    if name == "search":
        report = made_reports.search_report(names=(EVIL.replace("/", "|"), "b"), strategy=EVIL)
        report.arguments[EVIL] = report.losses[EVIL] = [[1, 2.0]]
    else:
        report = made_reports.stitch_report()
        report.candidates[0].slices = report.order = EVIL
        report.seconds[EVIL] = report.fits[EVIL] = 1.0
    report.save(tmp_path)
    text = (tmp_path / "report.html").read_text()
    found, plain = Elements(text), Elements(write(name, tmp_path))
    for tag in ("script", "img", "iframe"):
        assert sum(t == tag for t, _ in found.tags) == sum(t == tag for t, _ in plain.tags)
    assert not any(key.startswith("on") for _, attributes in found.tags for key in attributes)
    assert EVIL in " ".join(found.texts) and "49" not in "".join(re.findall(r"on=.*", text))


def test_a_page_without_matplotlib_or_a_configuration(tmp_path, monkeypatch):
    def missing(*args, **kwargs):
        raise ImportError("matplotlib")

    report = made_reports.search_report()
    monkeypatch.setattr("modeling_manticore.pages.page.draw_hybrid", missing)
    report.save(tmp_path)
    assert "matplotlib was not installed" in (tmp_path / "report.html").read_text()
    report.config = None
    report.save(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "matplotlib was not" not in text and "pythia-70m[0:2] 0.972" in text


def test_the_report_as_json_makes_the_same_page(tmp_path):
    from modeling_manticore.pages.of_reports import search_page

    text = write("search", tmp_path)
    values = json.loads((tmp_path / "search.json").read_text())
    assert "config" not in values
    assert search_page(values, made_reports.config()).render() == text


def test_parts():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0][:5] or len(ticks(0, 1)) <= 5
    for low, high in ((0, 1), (4.41, 4.43), (-3, 12_000_000), (1e-9, 2e-9)):
        found = ticks(low, high)
        assert 2 <= len(found) <= 5 and all(low - 1e-9 * high <= value <= high * (1 + 1e-9) for value in found)
    assert line_chart({"a": []}, "x", "y") == scatter_chart([], [], "x", "y") == ""
    assert line_chart({"a": [(0, float("nan"))]}, "x", "y") == ""
    assert thinned(list(range(1000)), 4) == [0, 333, 666, 999] and thinned([1, 2], 4) == [1, 2]
    rows = Table(["a", "b"], [[1234567, None], [0.5, "x"]]).cells()
    assert [[cell["text"] for cell in row] for row in rows] == [["1,234,567", "-"], ["0.5000", "x"]]
    assert "<svg" not in Page("t", "l").render()


def test_the_likeliest_choices_are_the_largest_products():
    import itertools
    import math

    import torch

    points = [torch.rand(n, generator=torch.Generator().manual_seed(n)).softmax(0) for n in (3, 2, 4)]
    paths = [[0, 2], [0, 1], [1, 2, 3]]
    every = sorted(
        itertools.product(*paths), key=lambda choice: -math.prod(float(a[p]) for a, p in zip(points, choice))
    )
    assert likeliest(points, paths, 5) == [list(choice) for choice in every[:5]]


# ---------------------------------------------------------------------- in a browser
@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name in ("search", "stitch"):
        write(name, folder / name)
    return folder


def address(pages, name):
    return (pages / name / "report.html").as_uri()


@pytest.mark.browser
@pytest.mark.parametrize("name", ["search", "stitch"])
def test_screenshots(name, browser, pages):
    kept = screenshots(pages / "screenshots")
    views = {"light": {}, "dark": {"dark": True}, "phone": {"width": 380, "height": 800}}
    backs = {}
    for kind, view in views.items():
        tab = browser.page(**view)
        tab.open(address(pages, name))
        assert tab.screenshot(kept / f"{name}_{kind}.png").stat().st_size > 10_000
        backs[kind] = tab.run("getComputedStyle(document.documentElement).backgroundColor")
        wide = tab.run("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0 and not tab.problems and tab.requests == [address(pages, name)]
    assert backs["light"] == backs["phone"] == "rgb(255, 255, 255)" and backs["dark"] != backs["light"]


@pytest.mark.browser
def test_the_slider_moves_the_picture(browser, pages):
    tab = browser.page()
    tab.open(address(pages, "search"))
    look = (
        "[document.querySelector('#picture0-weight-0-0 text').textContent,"
        "getComputedStyle(document.querySelector('#picture0-box-0-0 path')).fill,"
        "document.querySelector('#picture0-skip-1-2 text').textContent, document.querySelector('output').textContent]"
    )
    last = tab.run(look)
    assert last[0] == "0.972" and last[3] == "step 40"
    tab.run("document.querySelector('.slider input').focus()")
    for _ in range(20):
        tab.key("ArrowLeft", 37)
    first = tab.run(look)
    assert first[0] == "0.500" and first[2] == "skip 0.333" and first[3] == "step 0"
    assert first[1] != last[1]
    tab.key("End", 35)
    assert tab.run(look) == last
    assert not tab.problems


@pytest.mark.browser
def test_the_table_sorts_and_leads_the_picture(browser, pages):
    tab = browser.page()
    tab.open(address(pages, "stitch"))
    column = (
        "(name => { const heads = [...document.querySelectorAll('#candidates th')];"
        "const at = heads.findIndex(head => head.textContent === name);"
        "return [...document.querySelectorAll('#candidates tbody tr')].map(row => row.cells[at].textContent); })"
    )
    click = "([...document.querySelectorAll('#candidates th button')].find(b => b.textContent === {!r}).click(), 1)"
    before = tab.run(f"{column}('rank')")
    assert before == [str(i) for i in range(1, 37)]
    tab.run(click.format("parameters"))
    rising = [int(word.replace(",", "")) for word in tab.run(f"{column}('parameters')")]
    assert rising == sorted(rising) and len(set(rising)) > 5
    tab.run(click.format("parameters"))
    assert tab.run(f"{column}('parameters')") == [f"{value:,}" for value in reversed(rising)]
    tab.run(click.format("after 15 %"))
    tuned = tab.run(f"{column}('after 15 %')")
    assert tuned[:4] == sorted(tuned[:4]) and set(tuned[4:]) == {"-"}
    tab.run(click.format("slices"))
    assert tab.run("document.querySelectorAll('#candidates [aria-sort]').length") == 1

    tab.move("#candidates tr[data-row='11']", click=True)
    assert tab.run("document.querySelector('output').textContent").startswith("rank 12: loss ")
    choice = tab.run("document.querySelector(\"#candidates tr[data-row='11']\").cells[1].textContent").split(",")
    framed = "getComputedStyle(document.querySelector('#picture0-box-{}-{} path')).stroke"
    for b, p in enumerate(choice):
        assert tab.run(framed.format(b, p)) == "rgb(214, 39, 40)"
        if p != "2":
            assert tab.run(framed.format(b, 1 - int(p))) != "rgb(214, 39, 40)"
    assert not tab.problems


@pytest.mark.browser
def test_hover_shows_the_candidate(browser, pages):
    tab = browser.page()
    tab.open(address(pages, "stitch"))
    assert tab.run("document.querySelector('#hover').hidden")
    tab.move(".point.front")
    tab.wait("!document.querySelector('#hover').hidden")
    row = tab.run("document.querySelector('.point.front').dataset.row")
    cells = f"[...document.querySelector('#candidates tr[data-row=\"{row}\"]').cells].map(cell => cell.textContent)"
    shown = tab.run("[...document.querySelectorAll('#hover span:last-child')].map(span => span.textContent)")
    assert shown == tab.run(cells)
    assert tab.run(f"document.querySelector('#candidates tr[data-row=\"{row}\"]').classList.contains('chosen')")
    box = tab.run(
        "(() => { const r = document.querySelector('#hover').getBoundingClientRect();"
        "return r.left >= 0 && r.top >= 0 && r.right <= innerWidth && r.bottom <= innerHeight; })()"
    )
    assert box
    tab.screenshot(screenshots(pages / "screenshots") / "stitch_hover.png", whole=False)
    tab.move("h1")
    tab.wait("document.querySelector('#hover').hidden")
    assert not tab.problems and tab.requests == [address(pages, "stitch")]


@pytest.mark.browser
def test_it_can_be_read_without_a_script(browser, pages):
    tab = browser.page(script=False)
    tab.open(address(pages, "search"))
    tab.view(script=False)
    tab.screenshot(screenshots(pages / "screenshots") / "search_no_script.png")
    tree = json.dumps(tab.call("Accessibility.getFullAXTree"))
    assert "With JavaScript a slider goes" in tree and "0.972" in tree and "11,621,440" in tree


@pytest.mark.browser
def test_a_script_in_data_does_not_run(browser, tmp_path):
    report = made_reports.search_report(names=("<script>window.ran=1</script>", "b"), strategy="<b onclick=x>g</b>")
    report.arguments["<img src=x onerror='window.ran=1'>"] = "</pre><script>window.ran=1</script>"
    report.losses["</svg><script>window.ran=1</script>"] = [[1, 2.0], [2, 3.0]]
    report.candidates[0]["slices"] = "</script><script>window.ran=1</script>"
    report.save(tmp_path)
    tab = browser.page()
    tab.open((tmp_path / "report.html").as_uri())
    tab.move(".point.front")
    assert tab.run("window.ran === undefined && document.querySelectorAll('b').length >= 0")
    assert "<b onclick" in tab.run("document.querySelector('h1').textContent")
    assert not tab.problems and len(tab.requests) == 1
