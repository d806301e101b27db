"""Chapter pairs: people edit `NN_name.py` (jupytext percent); `NN_name.ipynb` is generated from it."""

import copy
import hashlib
import sys
from collections import Counter
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

from tools.layout import ROOT, BuildError, Chapter, chapters, relative

MAX_BYTES = 400_000  # Colab and code review both get slow beyond
WIDGET = "application/vnd.jupyter.widget-view+json"  # a progress bar: without its kernel it stands at 0 %
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def fresh_notebook(source: Path) -> NotebookNode:
    """The notebook of a `.py`, without outputs."""
    notebook = jupytext.read(source, fmt="py:percent")
    return tidy(notebook)


def tidy(notebook: NotebookNode) -> NotebookNode:
    """A copy without what changes from run to run (time stamps, versions, random cell ids) and without dead widgets."""
    notebook = copy.deepcopy(notebook)
    kept = {"qft": notebook.metadata["qft"]} if "qft" in notebook.metadata else {}
    notebook.metadata = nbformat.from_dict(copy.deepcopy(_METADATA) | kept)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: Counter[str] = Counter()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
        cell.id = f"{digest}-{seen[digest]}"  # by content, so that a new cell renames no other
        seen[digest] += 1
    return notebook


def content(notebook: NotebookNode) -> list[tuple]:
    """What the two halves of a pair must agree in: the notebook's own metadata, then cell by cell."""
    cells = [(cell.cell_type, cell.source, dict(cell.metadata)) for cell in tidy(notebook).cells]
    return [("header", "", dict(tidy(notebook).metadata)), *cells]


def check_pair(chapter: Chapter) -> None:
    """Raises BuildError if the committed notebook is absent, too big or out of step with its `.py`."""
    name = relative(chapter.notebook, chapter.root)
    remedy = f"run `make chapter NAME={chapter.number}`"
    if not chapter.notebook.is_file():
        raise BuildError(f"{name} is missing: {remedy}")
    check_size(chapter.notebook, name)
    ours = content(fresh_notebook(chapter.source))
    theirs = content(nbformat.read(chapter.notebook, as_version=4))
    if ours == theirs:
        return
    pairs = zip(ours, theirs, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    where = f"from cell {first} on" if first else "in its header"
    raise BuildError(f"{name} is out of step with {chapter.name}.py {where}: {remedy}")


def check_size(path: Path, name: str) -> None:
    """Raises BuildError if the notebook at `path` is not under 400 kB."""
    size = path.stat().st_size
    if size >= MAX_BYTES:
        limit = f"has {size / 1000:.0f} kB, the limit is {MAX_BYTES // 1000}"
        raise BuildError(f"{name} {limit}: draw fewer points, or lower the dpi")


def check_orphans(root: Path = ROOT) -> None:
    """Raises BuildError for a numbered notebook without its `.py`."""
    for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        if not path.with_suffix(".py").is_file():
            name = relative(path, root)
            raise BuildError(f"{name} has no {path.stem}.py: delete it, or bring the .py back")


def main() -> int:
    problems = []
    for check, argument in [(check_orphans, ROOT), *((check_pair, c) for c in chapters())]:
        try:
            check(argument)
        except BuildError as problem:
            problems.append(str(problem))
    print("\n".join(problems), file=sys.stderr, end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
