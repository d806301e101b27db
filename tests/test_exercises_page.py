"""Exercises as the site shows them."""

import nbformat
import pytest

from tools import exercises, pairs

SOURCES = exercises.sources()


@pytest.fixture(params=SOURCES, ids=lambda path: path.stem)
def source(request):
    return request.param


def test_the_committed_notebook_is_that_of_its_source(source):
    """Its outputs are checked by the gate, which runs every cell."""
    committed = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert pairs.content(committed) == pairs.content(pairs.fresh_notebook(source)), "run `make exercises`"
    assert not [o for c in committed.cells for o in c.get("outputs", []) if o.output_type == "error"]


def test_solutions_are_folded_and_hidden_tests_left_out(source):
    page = exercises.page(nbformat.read(source.with_suffix(".ipynb"), as_version=4))
    everything = "\n".join(cell.source for cell in page.cells)
    assert "SOLUTION" not in everything and "HIDDEN TESTS" not in everything and "QFT_SEED" not in everything
    folded = [cell for cell in page.cells if "hide-cell" in cell.metadata.get("tags", [])]
    frames = [cell for cell in page.cells if "# your answer" in cell.source]
    assert len(folded) == len(frames) >= 4
    for frame, answer in zip(frames, folded, strict=True):
        assert len(frame.source) < len(answer.source) + 40 and "return" not in frame.source.split('"""')[-1]
    nbformat.validate(page)


def test_a_model_answer_is_folded_too(source):
    page = exercises.page(nbformat.read(source.with_suffix(".ipynb"), as_version=4))
    (answer,) = [cell for cell in page.cells if "A model answer" in cell.source]
    assert ":class: dropdown" in answer.source and "Rubric" in answer.source
