"""Every chapter runs to its end, offline, and keeps its contract; every committed pair is in step."""

import pytest

from tools import pairs
from tools.execute import execute
from tools.layout import chapters

CHAPTERS = chapters()


def test_the_book_has_chapters():
    assert CHAPTERS, "notebooks/NN_name.py: there is none"


@pytest.mark.slow
@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: c.name)
def test_chapter_runs(chapter, capsys):
    with capsys.disabled():  # whoever waits sees what runs, and what was reused
        print()
        execute(chapter)
    assert (chapter.executed / f"{chapter.name}.json").is_file()


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: c.name)
def test_pair_is_in_step(chapter):
    pairs.check_pair(chapter)


def test_every_notebook_has_its_source():
    pairs.check_orphans()
