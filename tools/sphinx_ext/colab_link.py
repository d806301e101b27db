"""Sphinx extension: a line under each chapter's title that leads to its self-contained copy.

It always offers the download and, once the book has an address, an "Open in Colab" button. That points at the
branch that publishes the site, since only the copy there carries `qft_utils`. Without `repository.url` in
`_config.yml` there is no outside address.
"""

import re
from html import escape
from typing import Any

from sphinx.application import Sphinx

PUBLISHED_BRANCH = "gh-pages"


def colab_address(repository: str, name: str) -> str | None:
    """Where Colab opens the published copy of chapter `name`; None unless `repository` is on GitHub."""
    match = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", repository.strip())
    if not match:
        return None
    return f"https://colab.research.google.com/github/{match[1]}/blob/{PUBLISHED_BRANCH}/colab/{name}.ipynb"


def run_line(download: str, colab: str | None) -> str:
    """The line's HTML: the button where there is an address, and always the download."""
    link = f'<a href="{escape(download)}" download>Download this chapter as a self-contained notebook</a>'
    if colab:
        button = f'<a class="sd-btn sd-btn-primary sd-btn-sm" href="{escape(colab)}">Open in Colab</a>'
        return f'<p class="run-chapter">{button} {link} for your own machine.</p>'
    return f'<p class="run-chapter">{link}; Colab opens it by <em>File › Upload notebook</em>.</p>'


def add_run_line(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Insert the line after the title of a chapter's page; other pages stay as they are."""
    match = re.fullmatch(r"notebooks/(\d\d_\w+)", page)
    if not match or "body" not in context:
        return
    download = context["pathto"](f"colab/{match[1]}.ipynb", 1)
    colab = colab_address(app.config.html_theme_options.get("repository_url") or "", match[1])
    title, end, rest = context["body"].partition("</h1>")
    if not end:
        raise ValueError(f"{page}: no title; start the notebook with a '# Title' cell")
    context["body"] = title + end + run_line(download, colab) + rest


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", add_run_line)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
