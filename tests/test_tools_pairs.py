"""`.py` and `.ipynb` say the same, and what is generated is the same every time."""

import jupytext
import nbformat
import pytest

from tools import pairs
from tools.layout import BuildError


def write(chapter, change=lambda notebook: None):
    notebook = pairs.fresh_notebook(chapter.source)
    change(notebook)
    nbformat.write(notebook, chapter.notebook)


def test_generated_notebook_is_in_step_and_stable(tiny):
    write(tiny)
    first = tiny.notebook.read_bytes()
    pairs.check_pair(tiny)
    write(tiny)
    assert tiny.notebook.read_bytes() == first
    nbformat.validate(nbformat.read(tiny.notebook, as_version=4))


def test_jupytext_finds_the_same_source(tiny):
    """Another way from the notebook back to text: jupytext's own."""
    write(tiny)
    text = jupytext.writes(jupytext.read(tiny.notebook), fmt="py:percent")
    body = text[text.index("# %% [markdown]") :]
    assert body == tiny.source.read_text()


def test_a_new_cell_renames_no_other(tiny):
    before = [cell.id for cell in pairs.fresh_notebook(tiny.source).cells]
    tiny.source.write_text("# %%\nx = 1\n\n" + tiny.source.read_text())
    assert [cell.id for cell in pairs.fresh_notebook(tiny.source).cells][1:] == before


def test_equal_cells_get_different_ids(tiny):
    tiny.source.write_text("# %%\nx = 1\n\n# %%\nx = 1\n")
    first, second = pairs.fresh_notebook(tiny.source).cells
    assert first.id != second.id


def edit(notebook):
    notebook.cells[2].source += "\nmore = 1"


def drop(notebook):
    del notebook.cells[-1]


def retag(notebook):
    notebook.cells[1].metadata["tags"] = ["hide-input"]


def retype(notebook):
    notebook.cells[0] = nbformat.v4.new_raw_cell(notebook.cells[0].source)


@pytest.mark.parametrize("change, cell", [(edit, 3), (drop, 3), (retag, 2), (retype, 1)])
def test_pair_out_of_step_is_named(tiny, change, cell):
    write(tiny, change)
    message = f"^notebooks/01_tiny.ipynb is out of step with 01_tiny.py from cell {cell} on: run `make ch"
    with pytest.raises(BuildError, match=message):
        pairs.check_pair(tiny)


def test_header_travels_and_is_compared(tiny):
    header = "# ---\n# jupyter:\n#   qft:\n#     wheels: [scattertext]\n# ---\n\n"
    tiny.source.write_text(header + tiny.source.read_text())
    assert pairs.fresh_notebook(tiny.source).metadata.qft == {"wheels": ["scattertext"]}
    write(tiny, lambda notebook: notebook.metadata.pop("qft"))
    with pytest.raises(BuildError, match="in its header"):
        pairs.check_pair(tiny)


def test_outputs_are_no_difference(tiny):
    write(tiny, lambda n: n.cells[2].outputs.append(nbformat.v4.new_output("stream", text="hello")))
    pairs.check_pair(tiny)


def test_missing_big_and_orphaned_notebooks_are_named(tiny):
    with pytest.raises(BuildError, match="01_tiny.ipynb is missing: run `make chapter NAME=01`"):
        pairs.check_pair(tiny)
    tiny.notebook.write_bytes(b" " * pairs.MAX_BYTES)
    with pytest.raises(BuildError, match="has 400 kB, the limit is 400"):
        pairs.check_pair(tiny)
    tiny.notebook.rename(tiny.notebook.with_name("02_gone.ipynb"))
    with pytest.raises(BuildError, match="02_gone.ipynb has no 02_gone.py"):
        pairs.check_orphans(tiny.root)
