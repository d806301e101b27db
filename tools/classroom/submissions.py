"""What students return, made into notebooks that nbgrader can grade, whatever was done to them.

Two layouts, as people and learning platforms make them: `student/NN_name.ipynb`, and `NN_name__student.ipynb`. Of a
returned file only the answers and the student's further cells are taken; all else is the hand-out's own, so edited,
deleted or doubled test cells change nothing.
"""

import ast
import copy
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from nbformat import NotebookNode

LARGEST = 20 << 20  # bytes of a file
MOST_CELLS = 300


@dataclass(frozen=True)
class Submission:
    """One returned file."""

    student: str  # as the folder or the file spells it
    assignment: str
    path: Path

    @property
    def key(self) -> str:
        """The student's name as it stands in paths and in nbgrader's data base."""
        plain = unicodedata.normalize("NFKD", self.student).encode("ascii", "ignore").decode()
        plain = re.sub(r"[^A-Za-z0-9_-]+", "_", plain).strip("_") or "student"
        if plain == self.student:
            return plain
        return f"{plain[:40]}_{hashlib.sha256(self.student.encode()).hexdigest()[:6]}"


@dataclass
class Read:
    """A submission as it will be graded: `refused` says why nothing of it is run."""

    notebook: NotebookNode
    notes: list[str] = field(default_factory=list)
    refused: str | None = None


def find(folder: Path, assignments: Iterable[str]) -> tuple[list[Submission], list[str]]:
    """The submissions in a folder, and lines about files that are none. Raises FileNotFoundError for no folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: say SUBMISSIONS=folder, with student/NN_name.ipynb in it")
    known, found, strange = set(assignments), [], []
    for path in sorted(folder.rglob("*.ipynb")):
        parts, together = path.relative_to(folder).parts, path.stem.split("__", 1)
        if ".ipynb_checkpoints" in parts:
            continue
        if len(parts) == 2 and path.stem in known:
            found.append(Submission(parts[0], path.stem, path))
        elif len(parts) == 1 and len(together) == 2 and together[0] in known:
            found.append(Submission(together[1], together[0], path))
        else:
            strange.append(f"{path.relative_to(folder)}: neither student/NN_name.ipynb nor NN_name__student.ipynb")
    return found, strange


def read(submission: Submission, handed: NotebookNode) -> Read:
    """The hand-out with this submission's answers in it. Never raises for what is in the file."""
    try:
        cells, notes = _cells(submission.path)
    except ValueError as error:
        return Read(copy.deepcopy(handed), [], str(error))
    return _rebuilt(handed, cells, notes)


def _cells(path: Path) -> tuple[list[NotebookNode], list[str]]:
    if path.is_symlink() or not path.is_file():
        raise ValueError("this is a link, not a file: return the notebook itself")
    if path.stat().st_size > LARGEST:
        raise ValueError(
            f"the file has {path.stat().st_size >> 20} MB, and {LARGEST >> 20} are allowed: clear its outputs"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this is no notebook (not valid JSON: {str(error)[:80]}): return the .ipynb itself") from None
    raw = content.get("cells") if isinstance(content, dict) else None
    if not isinstance(raw, list):
        raise ValueError("this is no notebook (it has no list of cells): return the .ipynb itself")
    cells = [cell for cell in map(_cell, raw[:MOST_CELLS]) if cell is not None]
    notes = [f"only the first {MOST_CELLS} cells were looked at"] if len(raw) > MOST_CELLS else []
    language = (
        (content.get("metadata") or {}).get("kernelspec", {}) if isinstance(content.get("metadata"), dict) else {}
    )
    if isinstance(language, dict) and language.get("language", "python") != "python":
        notes.append(f"the notebook asked for the kernel {str(language.get('name'))[:40]!r}; it was run as Python")
    return cells, notes


def _cell(raw: object) -> NotebookNode | None:
    """A cell with nothing but its kind, its source and nbgrader's name for it."""
    if not isinstance(raw, dict) or raw.get("cell_type") not in ("code", "markdown"):
        return None
    source, meta = raw.get("source", ""), raw.get("metadata")
    source = "".join(map(str, source)) if isinstance(source, list) else str(source)
    meta = meta.get("nbgrader") if isinstance(meta, dict) else None
    make = nbformat.v4.new_code_cell if raw["cell_type"] == "code" else nbformat.v4.new_markdown_cell
    made = make(source)
    made.metadata = (
        NotebookNode(name=str(meta["grade_id"])) if isinstance(meta, dict) and "grade_id" in meta else NotebookNode()
    )
    return made


def _rebuilt(handed: NotebookNode, cells: list[NotebookNode], notes: list[str]) -> Read:
    made, own = copy.deepcopy(handed), {_name(cell): cell for cell in handed.cells if _name(cell)}
    answers = {name for name, cell in own.items() if cell.metadata.nbgrader.get("solution")}
    given: dict[str, list[str]] = {}
    extra: dict[str | None, list[NotebookNode]] = {}
    last = None
    for cell in cells:
        name = cell.metadata.get("name")
        name = name if name in own else _by_definition(cell, own, answers)
        if name in answers:
            given.setdefault(name, []).append(cell.source)
        elif name not in own and cell.cell_type == "code" and "qft_unpack(" not in cell.source:
            extra.setdefault(last, []).append(cell)
        last = name if name in own else last
    for name in sorted(answers - set(given)):
        notes.append(f"{name}: no answer was found, so the empty one was graded")
    for name, several in given.items():
        if len(several) > 1:
            notes.append(
                f"{name}: there are {len(several)} cells of this name; the first that was filled in was graded"
            )
    made.cells = _without_metadata(extra.get(None, []))
    for cell in handed.cells:
        cell = copy.deepcopy(cell)
        if (name := _name(cell)) in given:
            changed = [source for source in given[name] if source != cell.source]
            cell.source = (changed or given[name])[0]
        made.cells += [cell, *_without_metadata(extra.get(name, []) if name else [])]
    return Read(made, notes)


def _name(cell: NotebookNode) -> str | None:
    return cell.metadata.get("nbgrader", {}).get("grade_id")


def _without_metadata(cells: list[NotebookNode]) -> list[NotebookNode]:
    for cell in cells:
        cell.metadata = NotebookNode()
    return cells


def _by_definition(cell: NotebookNode, own: dict[str, NotebookNode], answers: set[str]) -> str | None:
    """An answer whose metadata a platform has dropped is known by what it defines."""
    if cell.cell_type != "code" or not (defined := _defined(cell.source)):
        return None
    return next(
        (name for name in sorted(answers) if own[name].cell_type == "code" and defined == _defined(own[name].source)),
        None,
    )


def _defined(source: str) -> set[str]:
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set(re.findall(r"^(?:def|class) (\w+)", source, re.MULTILINE))
    return {statement.name for statement in body if isinstance(statement, ast.FunctionDef | ast.ClassDef)}
