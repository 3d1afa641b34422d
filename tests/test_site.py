"""The documentation builds without warnings. Its links are valid, and it loads nothing from other sites."""

import importlib
import re
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import sphinx
from PIL import Image

from conftest import ROOT
from forked_scripts import ForkedScript


class Page(HTMLParser):
    """Collects the anchors of a page, and its links and resources as (tag, URL)."""

    def __init__(self, file: Path):
        super().__init__()
        self.ids, self.urls = set(), []
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.add(attrs.get("id"))
        self.urls += [(tag, attrs[name]) for name in ("href", "src", "srcset", "data", "action") if name in attrs]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    # -W -n: a warning is an error, and so is a reference in a docstring to something that is not documented.
    options = ["-q", "-W", "-n", "--keep-going", "-c", str(ROOT / "docs")]
    run = ForkedScript(Path(sphinx.__file__).with_name("__main__.py"), *options, ROOT, folder, folder=folder).wait()
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {file: Page(file) for file in site.rglob("*.html")}


def test_links_are_valid(site, pages):
    """Pages, anchors and images of the site exist. Links to other sites are well-formed and use https."""
    broken, checked = [], 0
    for file, page in pages.items():
        for tag, url in page.urls:
            checked += 1
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                good = bool(re.fullmatch(r"https://[a-z0-9-]+(\.[a-z0-9-]+)+(/[^\s<>\"]*)?", url))
            else:
                target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
                good = target.is_file() and target.is_relative_to(site)
                if good and parts.fragment and target in pages:
                    good = unquote(parts.fragment) in pages[target].ids
            if not good:
                broken.append(f"{file.relative_to(site)}: <{tag}> {url}")
    assert not broken, "\n".join(broken)
    assert checked > 1000


def test_nothing_is_loaded_from_other_sites(site, pages):
    """Scripts, styles, fonts and images are on the site itself."""
    loaded = [url for page in pages.values() for tag, url in page.urls if tag != "a"]
    for file in [*site.rglob("*.css"), *pages]:
        loaded += re.findall(r"""(?:url\(|@import)\s*["']?([^"')\s]+)""", file.read_text())
    assert len(loaded) > 100
    assert not [url for url in loaded if urlsplit(url).netloc]


@pytest.mark.parametrize("module", ["focal_hf", "focal_hf.visualization"])
def test_every_public_name_is_in_the_reference(pages, site, module):
    ids = pages[site / "docs" / "api.html"].ids
    assert not [name for name in importlib.import_module(module).__all__ if f"{module}.{name}" not in ids]


def test_markdown_in_docstrings_is_converted(site):
    """transformers writes docstrings with parts of Markdown."""
    text = (site / "docs" / "api.html").read_text()
    text = re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL)
    # Alone, backticks would make <cite> of code.
    assert not re.findall(r".*(?:`|<cite>|\]\(|\*\*\w).*", text)


@pytest.mark.slow
def test_figures(tmp_path, monkeypatch):
    """The script draws the figures that the pages show."""
    monkeypatch.setattr(sys, "argv", ["draw_figures.py", str(tmp_path)])
    runpy.run_path(str(ROOT / "docs" / "draw_figures.py"), run_name="__main__")
    drawn = sorted(tmp_path.iterdir())
    assert [file.name for file in drawn] == sorted(file.name for file in (ROOT / "docs").glob("*.png"))
    for file in drawn:
        with Image.open(file) as new, Image.open(ROOT / "docs" / file.name) as committed:
            assert new.size == committed.size
