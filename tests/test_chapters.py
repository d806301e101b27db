"""Every chapter runs to its end, offline, and keeps its contract; every committed pair is in step."""

import json

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


TIMES = {"us", "ms", "s", "ratio", "tokens/s", "images/s"}


def _range(metric: dict) -> tuple[float, float]:
    """Where a second run may land: the interval, widened by the tolerance."""
    value, more = metric["value"], metric["tolerance"] or 0
    ends = [value if metric[end] is None else metric[end] for end in ("low", "high")]
    return min(ends[0], value - more), max(ends[1], value + more)


@pytest.mark.slow
@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: c.name)
def test_this_run_lands_where_the_committed_one_said(chapter):
    """Guards against stored numbers that no run gives. Blind to times: machines differ, and claims compare those."""
    execute(chapter, force=False)
    committed = json.loads(chapter.result.read_text())["metrics"]
    now = json.loads((chapter.executed / chapter.result.name).read_text())["metrics"]
    assert list(now) == list(committed), f"run `make chapter NAME={chapter.number}` and commit its results"
    ranges = {name: _range(metric) for name, metric in committed.items() if metric["unit"] not in TIMES}
    assert ranges
    astray = {n: (now[n]["value"], r) for n, r in ranges.items() if not r[0] <= now[n]["value"] <= r[1]}
    assert not astray, f"this run's value and the committed range: {astray}"
