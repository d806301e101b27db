"""The line under a chapter's title: the download always, the button once the book has an address."""

import re
from types import SimpleNamespace

import nbformat
import pytest

from tools import pairs
from tools.render import render
from tools.sphinx_ext import colab_link


@pytest.mark.slow
def test_every_chapters_page_links_its_copy(site):
    for page in (site / "notebooks").glob("[0-9][0-9]_*.html"):
        assert f'href="../colab/{page.stem}.ipynb"' in page.read_text()
        nbformat.validate(nbformat.read(site / f"colab/{page.stem}.ipynb", as_version=4))


def page_with(repository: str, page: str = "notebooks/01_toy") -> str:
    context = {"body": "<h1>Toy</h1><p>text</p>", "pathto": lambda path, _: f"../{path}"}
    app = SimpleNamespace(config=SimpleNamespace(html_theme_options={"repository_url": repository}))
    colab_link.add_run_line(app, page, "page.html", context, None)
    return context["body"]


def test_page_without_an_address_offers_the_download_alone():
    body = page_with("")
    assert body.startswith("<h1>Toy</h1><p class=")
    assert 'href="../colab/01_toy.ipynb" download' in body
    assert "http" not in body


@pytest.mark.parametrize("address", ["https://github.com/me/book", "https://github.com/me/book.git"])
def test_page_with_an_address_has_the_button(address):
    target = "https://colab.research.google.com/github/me/book/blob/gh-pages/colab/01_toy.ipynb"
    assert f'href="{target}"' in page_with(address)


@pytest.mark.slow
def test_the_address_in_the_configuration_brings_the_button(tiny):
    config = tiny.root / "_config.yml"
    config.write_text(config.read_text().replace('url: ""', 'url: "https://github.com/me/book"'))
    nbformat.write(pairs.fresh_notebook(tiny.source), tiny.notebook)
    page = (render(tiny.root, tiny.root / "html") / "notebooks/01_tiny.html").read_text()
    buttons = re.findall(r'href="(https://colab[^"]+)"', page)
    assert buttons == ["https://colab.research.google.com/github/me/book/blob/gh-pages/colab/01_tiny.ipynb"]


def test_button_needs_a_repository_that_colab_can_open():
    assert "http" not in page_with("https://example.org/me/book")


def test_other_pages_stay_as_they_are():
    assert page_with("", page="book/index") == "<h1>Toy</h1><p>text</p>"
