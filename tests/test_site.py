"""The built documentation in a browser: opened from a folder, in the dark, on a phone, without any request outside."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from browser import Browser, screenshots
from snippets import ROOT


PAGES = ("index.html", "howto/looking.html", "concepts.html", "reference/recipes.html", "measured.html")
VIEWS = {"light": {}, "dark": {"dark": True}, "phone": {"width": 380, "height": 800}}
BUILT = ROOT / "build" / "site"


def sources() -> list[Path]:
    """What the site is made from."""
    package = ROOT / "modeling_manticore"
    pages = [file for file in (ROOT / "docs").rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    return [ROOT / "mkdocs.yml", *pages, *package.rglob("*.py")]


def is_fresh(site: Path) -> bool:
    """Whether the site was built after everything that it is made from had changed."""
    start = site / "sitemap.xml"
    return start.is_file() and start.stat().st_mtime >= max(file.stat().st_mtime for file in sources())


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """What `make docs` has built; where it is stale, it is built again as strictly."""
    if is_fresh(BUILT):
        return BUILT
    if find_spec("mkdocs") is None or find_spec("material") is None:
        pytest.skip(
            "no site: `make docs` has not built it since the sources changed, and mkdocs is not installed here"
        )
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.mark.browser
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", VIEWS)
def test_pages(kind, browser, site, tmp_path):
    kept = screenshots(tmp_path)
    for name in PAGES:
        tab = browser.page(**VIEWS[kind])
        tab.open((site / name).as_uri())
        tab.wait("document.readyState === 'complete' && !!document.querySelector('article h1')")
        wide = tab.run("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, f"{name} is {wide} pixels wider than the window"
        assert tab.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)"), name
        light = "getComputedStyle(document.body).backgroundColor === 'rgb(255, 255, 255)'"
        tab.wait(f"{light} === {str(kind != 'dark').lower()}")
        tab.screenshot(kept / f"site_{name.removesuffix('.html').replace('/', '_')}_{kind}.png", whole=False)
        assert not tab.problems, f"{name}: {tab.problems}"
        outside = [address for address in tab.requests if not address.startswith(site.as_uri())]
        assert not outside, f"{name} asks for {outside}"


@pytest.mark.browser
@pytest.mark.timeout(600)
def test_a_search_finds_a_page(browser, site):
    tab = browser.page()
    tab.open((site / "index.html").as_uri())
    tab.run("document.querySelector('[data-md-component=search-query]').focus()")
    tab.call("Input.insertText", text="distillation")
    tab.wait("document.querySelectorAll('.md-search-result__item a').length > 0")
    assert {address.split(":")[0] for address in tab.requests} == {"file"}
    assert "distillation" in tab.run("document.querySelector('.md-search-result__list').textContent").lower()
    assert not tab.problems
