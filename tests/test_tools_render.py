"""The site is built from what ran, whole or not at all, and asks no other server for anything."""

import re

import nbformat
import pytest

from tools import pairs
from tools.layout import BuildError
from tools.render import render, site_config


@pytest.fixture
def promoted(tiny):
    """The tiny book with its notebook in place, and an older site."""
    nbformat.write(pairs.fresh_notebook(tiny.source), tiny.notebook)
    site = tiny.root / "_build" / "html"
    site.mkdir(parents=True)
    (site / "old.html").write_text("old")
    return tiny


def test_site_is_complete_and_self_reliant(promoted):
    site = render(promoted.root, promoted.root / "_build" / "html")
    assert not (site / "old.html").exists()
    page = (site / "notebooks" / "01_tiny.html").read_text()
    assert "THEBE" not in page and "thebe" not in page
    fetched = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=[\"'](?:https?:)?//[^\"']+", page)
    assert fetched == []
    script = re.search(r'src="\.\./(_static/mathjax/[\w-]+\.js)', page)
    assert (site / script.group(1)).stat().st_size > 1_000_000
    assert len(list((site / "_static/mathjax/output/chtml/fonts/woff-v2").glob("*.woff"))) == 23
    assert (site / "colab" / "01_tiny.ipynb").is_file()
    assert (site / "index.html").is_file()


def test_warning_fails_and_the_old_site_stays(promoted):
    (promoted.root / "book" / "index.md").write_text("# Home\n\n[Nowhere](nowhere.md)\n")
    site = promoted.root / "_build" / "html"
    with pytest.raises(BuildError, match=r"(?s)^book/index.md:3: WARNING: .*nowhere.*mend these lines"):
        render(promoted.root, site)
    assert [path.name for path in site.iterdir()] == ["old.html"]


def test_chapter_that_did_not_run_is_named(promoted):
    with pytest.raises(
        BuildError, match=r"executed/01_tiny/01_tiny.ipynb is missing: run `make chapter NAME=01`"
    ):
        render(promoted.root, promoted.root / "site", executed=True)


def test_repository_is_linked_once_it_has_an_address(tiny_book):
    assert not site_config(tiny_book)["html"]["use_repository_button"]
    config = tiny_book / "_config.yml"
    config.write_text(config.read_text().replace('url: ""', 'url: "https://example.org/book"'))
    assert site_config(tiny_book)["html"]["use_repository_button"]
