"""Roles in a chapter's Markdown become links and words that any notebook viewer shows."""

import re

import jupytext
import pytest

from tools.layout import ROOT, chapters
from tools.plain_roles import plain

BIBLIOGRAPHY = ROOT / "book" / "references.bib"


@pytest.mark.parametrize(
    ("role", "shown"),
    [
        ("{cite:t}`wilson1927probable`", "[Wilson (1927)](https://doi.org/10.1080/01621459.1927.10502953)"),
        ("{cite}`pang2004sentimental`", "([Pang and Lee, 2004](https://doi.org/10.3115/1218955.1218990))"),
        ("{cite}`jacob2018quantization`", "([Jacob et al., 2018](https://arxiv.org/abs/1712.05877))"),
        ("a {term}`scale` and {doc}`the notation <../book/notation>`", "a scale and the notation"),
        ("`{cite}` in code, $\\{x\\}$ in mathematics", "`{cite}` in code, $\\{x\\}$ in mathematics"),
    ],
)
def test_a_role_becomes_plain_markdown(role, shown):
    assert plain(role, BIBLIOGRAPHY) == shown


def test_two_keys_in_one_role_are_both_shown():
    shown = plain("{cite}`jacob2018quantization,gholami2021survey`", BIBLIOGRAPHY)
    assert "1712.05877" in shown
    assert "2103.13630" in shown


def test_an_unknown_key_is_named():
    with pytest.raises(KeyError, match="nobody1900"):
        plain("{cite}`nobody1900`", BIBLIOGRAPHY)


@pytest.mark.parametrize("chapter", chapters(), ids=lambda c: c.name)
def test_no_role_is_left_in_a_chapter(chapter):
    cells = jupytext.read(chapter.source, fmt="py:percent").cells
    text = "\n".join(plain(cell.source, BIBLIOGRAPHY) for cell in cells if cell.cell_type == "markdown")
    assert not re.findall(r"\{[a-z:]+\}`", text)
