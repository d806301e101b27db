"""Exercise notebooks: `notebooks/exercises/NN_name.py`, their executed pair, and the pages that the site shows.

    python -m tools.exercises            runs every exercise source, and writes the .ipynb beside it

On a page the answer, with all that it prints, is folded behind a button, a model answer in words too, and hidden tests
are left out: they are for grading.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from tools import pairs
from tools.layout import ROOT, BuildError

MARKERS = re.compile(r"^[ \t]*### (BEGIN|END) SOLUTION\n?", re.MULTILINE)
SOLUTION = re.compile(r"^([ \t]*)### BEGIN SOLUTION.*?### END SOLUTION\n?", re.DOTALL | re.MULTILINE)
HIDDEN = re.compile(r"^[ \t]*### BEGIN HIDDEN TESTS.*?### END HIDDEN TESTS\n?", re.DOTALL | re.MULTILINE)


def sources(root: Path = ROOT) -> list[Path]:
    """The exercise sources, in order."""
    return sorted((root / "notebooks" / "exercises").glob("[0-9][0-9]_*.py"))


class _OwnKernel(AsyncKernelManager):
    """This interpreter, whatever kernels the user has installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


def execute(source: Path) -> NotebookNode:
    """The notebook of a source with its outputs. Raises BuildError for a cell that raises."""
    notebook, root = pairs.fresh_notebook(source), source.parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "QFT_SEED": "2026", "HF_HUB_OFFLINE": "1"}
    environment.pop("MPLBACKEND", None)
    with tempfile.TemporaryDirectory() as folder:
        here = {"metadata": {"path": folder}}
        client = NotebookClient(notebook, timeout=60, kernel_manager_class=_OwnKernel, resources=here)
        try:
            client.execute(env=environment)
        except CellExecutionError as error:
            raise BuildError(f"{source.name}: {str(error)[-1500:]}\nmend the cell and run `make exercises`") from error
    return pairs.tidy(notebook)


def page(notebook: NotebookNode) -> NotebookNode:
    """A copy as the site shows it."""
    shown = nbformat.from_dict(notebook)
    cells, shown.cells = shown.cells, []
    for cell in cells:
        meta = cell.metadata.pop("nbgrader", {})
        if meta.get("solution"):
            shown.cells += [_task(cell)] if cell.cell_type == "code" else []
            _fold(cell)
        elif meta.get("grade"):
            cell.source = HIDDEN.sub("", cell.source).rstrip()
        shown.cells.append(cell)
    return shown


def _task(cell: NotebookNode) -> NotebookNode:
    """What students are handed: the answer's frame, to read."""
    frame = SOLUTION.sub(r"\1...  # your answer\n", cell.source).strip()
    return nbformat.v4.new_markdown_cell(f"```python\n{frame}\n```", id=f"{cell.id}-task"[-64:])


def _fold(cell: NotebookNode) -> None:
    cell.source = MARKERS.sub("", cell.source.replace("# ### ", "### ")).strip()
    if cell.cell_type == "code":
        cell.metadata["tags"] = [*cell.metadata.get("tags", []), "hide-cell"]
        cell.metadata["mystnb"] = {"code_prompt_show": "Show a solution", "code_prompt_hide": "Hide the solution"}
    else:
        cell.source = f"````{{admonition}} A model answer\n:class: dropdown\n{cell.source}\n````"


def link_cell(name: str) -> NotebookNode:
    """The end of a chapter's page."""
    where = f"[the exercises of this chapter](exercises/{name}.ipynb)"
    text = f"## Exercises\n\nTry it yourself: {where}, with solutions behind a button."
    return nbformat.v4.new_markdown_cell(text, id="exercises")


def main() -> int:
    try:
        for source in sources():
            notebook, target = execute(source), source.with_suffix(".ipynb")
            part = target.with_suffix(".part")
            nbformat.write(notebook, part)
            part.replace(target)
            print(f"{target.name} written", flush=True)
    except BuildError as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
