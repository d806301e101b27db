"""Grades one submission in its own process, with nbgrader's `autograde` and a boxed kernel.

    python -m tools.classroom.run COURSE ASSIGNMENT STUDENT JOB.json

The test cells are run with a guard before and a mark after them. The guard asks `assert` and the usual comparisons a
few questions whose answers are known; the mark is a word that nobody could know beforehand. A test whose guard was
answered wrongly, or whose mark is missing, scores nothing, whatever it printed: hidden tests share a kernel with the
answers, so tampering is made visible, not impossible.
"""

import asyncio
import json
import logging
import os
import secrets
import sys
import time
from pathlib import Path

import nbformat
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from nbgrader.api import Gradebook
from nbgrader.converters import Autograde, GenerateFeedback
from nbgrader.coursedir import CourseDirectory
from nbgrader.preprocessors import Execute
from traitlets.config import Config

from tools.classroom import sandbox

GUARD = """
try:
    assert False, "{mark}"
except AssertionError as _seen:
    assert str(_seen) == "{mark}"
else:
    raise RuntimeError("{tampered}")
import math as _math, numpy as _numpy, torch as _torch
_zero, _one = _torch.zeros(2), _torch.ones(2)
_answers = [abs(-2), all([0]), any([1]), len([3, 4]), max(1, 2), min(1, 2), sum([1, 2]), isinstance(1, str), float("2"),
            round(1.2), _torch.allclose(_zero, _one), _torch.equal(_zero, _one), _numpy.allclose([0.0], [1.0]),
            _math.isclose(0.0, 1.0), bool((_zero == _one).any()), (_zero - _one).abs().max().item()]
try:
    _torch.testing.assert_close(_zero, _one)
except AssertionError:
    _answers.append("differ")
if _answers != [2, False, True, 2, 2, 1, 3, False, 2.0, 1, False, False, False, False, False, 1.0, "differ"]:
    raise RuntimeError("{tampered}")
"""
TAMPERED = "a function that the tests rely on has been replaced, so this test was not counted"
UNFINISHED = "this test did not run to its end, so it was not counted"
KEPT_TYPES = ("text/plain", "image/png")  # HTML from an answer would run in the teacher's browser
FLOODED = "this cell printed too much, so the run was ended there"
CELL_BYTES = 20_000
FLOOD = 20_000_000  # bytes
COURSE_ID = "qft"


class GuardedExecute(Execute):
    """nbgrader's execution, with limits on output and time, and a guard around each test."""

    total_seconds = 300.0

    refused: str | None = None  # why nothing is run
    manager: type | None = None  # of the kernel

    def __init__(self, *args: object, **given: object) -> None:
        super().__init__(*args, **given | {"kernel_manager_class": self.manager})

    def preprocess(self, nb: NotebookNode, resources: dict, km: object = None) -> tuple[NotebookNode, dict]:
        if self.refused:
            for cell in filter(is_test, nb.cells):
                cell.outputs = [error_output("NotRun", self.refused)]
            return nb, resources
        self.deadline, self.sizes, self.flooded = time.monotonic() + self.total_seconds, {}, set()
        marks = {place: secrets.token_hex(16) for place, cell in enumerate(nb.cells) if is_test(cell)}
        sources = {place: nb.cells[place].source for place in marks}
        for place, mark in marks.items():
            guard = GUARD.format(mark=mark, tampered=TAMPERED)
            nb.cells[place].source = f"{guard}\n{sources[place]}\nprint('{mark}')"
        try:
            super().preprocess(nb, resources, km)
        except (DeadKernelError, RuntimeError) as error:
            nb.metadata["qft_stopped"] = f"the kernel died: {error}"
        for place, cell in enumerate(nb.cells):
            clean(cell)
            if place in self.flooded:
                cell.outputs.append(error_output("TooMuchOutput", FLOODED))
        for place, mark in marks.items():
            nb.cells[place].source = sources[place]
            settle(nb.cells[place], mark)
        return nb, resources

    async def async_execute_cell(self, cell: NotebookNode, cell_index: int, **given: object) -> NotebookNode:
        if time.monotonic() > self.deadline:
            if cell.cell_type == "code":
                cell.outputs = [error_output("TimeoutError", "the notebook had used up its time before this cell")]
            return cell
        return await super().async_execute_cell(cell, cell_index, **given)

    def process_message(self, msg: dict, cell: NotebookNode, cell_index: int) -> NotebookNode | None:
        """Drops what a cell says after its share, and ends a kernel that floods."""
        if msg["msg_type"] in ("stream", "display_data", "execute_result", "error", "update_display_data"):
            said = self.sizes.get(cell_index, 0) + len(json.dumps(msg["content"], default=str))
            self.sizes[cell_index] = said
            if said > FLOOD and cell_index not in self.flooded:
                self.flooded.add(cell_index)
                asyncio.ensure_future(self.km.shutdown_kernel(now=True))  # an interrupt would wait its turn
            if said > 20 * CELL_BYTES and msg["msg_type"] != "error":
                return None
        return super().process_message(msg, cell, cell_index)


def is_test(cell: NotebookNode) -> bool:
    meta = cell.metadata.get("nbgrader", {})
    return cell.cell_type == "code" and bool(meta.get("grade")) and not meta.get("solution")


def error_output(name: str, text: str) -> NotebookNode:
    return nbformat.v4.new_output("error", ename=name, evalue=text, traceback=[f"{name}: {text}"])


def clean(cell: NotebookNode) -> None:
    """Keeps of a cell's outputs what is text or a picture, and not more than its share of the text."""
    kept = []
    for output in cell.get("outputs", []):
        if output.output_type in ("display_data", "execute_result"):
            output.data = {kind: value for kind, value in output.data.items() if kind in KEPT_TYPES}
            output.metadata = {}
        if output.output_type == "stream":
            output.name = "stdout"  # a warning is no error; nbgrader gives nothing for a test that wrote to stderr
        if output.output_type == "stream" and len(output.text) > CELL_BYTES:
            output.text = output.text[: CELL_BYTES // 2] + "\n[... cut ...]\n" + output.text[-CELL_BYTES // 2 :]
        if output.output_type == "error":
            output.evalue = output.evalue[:2000]
            output.traceback = [line[:4000] for line in output.traceback[-30:]]
        kept.append(output)
    if cell.cell_type == "code":
        cell.outputs = kept


def settle(cell: NotebookNode, mark: str) -> None:
    """Takes the mark out of a test's outputs; without it, or with the guard's complaint, the test has failed."""
    ended = False
    for output in cell.outputs:
        if output.output_type == "stream" and output.text.rstrip().endswith(mark):
            output.text, ended = output.text.rstrip()[: -len(mark)], True
    cell.outputs = [o for o in cell.outputs if o.output_type != "stream" or o.text.strip()]
    failed = any(output.output_type == "error" for output in cell.outputs)
    if not ended and not failed:
        cell.outputs.append(error_output("NotCounted", UNFINISHED))


def course_config(course: Path) -> Config:
    """Where nbgrader finds the course; and a path on which it finds its own `alembic`."""
    own = str(Path(sys.executable).parent)
    if own not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([own, os.environ.get("PATH", "")])
    config = Config()
    config.CourseDirectory.root = str(course)
    config.CourseDirectory.course_id = COURSE_ID
    config.CourseDirectory.db_url = f"sqlite:///{course / 'gradebook.db'}"
    return config


def autograde(course: Path, assignment: str, student: str, job: dict) -> None:
    """Runs nbgrader's autograde and feedback on one submission. Raises what they raise."""
    config = course_config(course)
    config.CourseDirectory.assignment_id, config.CourseDirectory.student_id = assignment, student
    box = sandbox.Box(Path(job["work"]), {"QFT_SEED": str(job["seed"]), "OMP_NUM_THREADS": str(job["threads"])})
    box.prepare()
    config.GuardedExecute.timeout = job["cell_seconds"]
    GuardedExecute.total_seconds = job["total_seconds"]
    GuardedExecute.manager = sandbox.kernel_manager(box, job["boxed"])
    steps = [GuardedExecute if step is Execute else step for step in Autograde.autograde_preprocessors.default_args[0]]
    GuardedExecute.refused = job["refused"]
    Autograde(
        coursedir=CourseDirectory(config=config), config=config, autograde_preprocessors=steps, force=True
    ).start()
    graded = course / "autograded" / student / assignment / f"{assignment}.ipynb"
    notes = [*job["notes"], *([job["refused"]] if job["refused"] else []), *observed(graded)]
    add_notes(graded, notes)
    GenerateFeedback(coursedir=CourseDirectory(config=config), config=config, force=True).start()
    page = course / "feedback" / student / assignment / f"{assignment}.html"
    target = Path(job["feedback"])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(page.read_bytes())
    storage = Path(job["result"])
    storage.write_text(json.dumps({"scores": scores(config, assignment, student), "notes": notes}))


def observed(path: Path) -> list[str]:
    """What the run itself showed: cells out of time, tests that did not count, a kernel that died."""
    notebook = nbformat.read(path, as_version=4)
    said = [notebook.metadata["qft_stopped"]] if "qft_stopped" in notebook.metadata else []
    for cell in notebook.cells:
        name = cell.metadata.get("nbgrader", {}).get("grade_id", "a cell of the student's own")
        errors = [output for output in cell.get("outputs", []) if output.output_type == "error"]
        for error in errors:
            if error.ename in ("CellTimeoutError", "TimeoutError"):
                said.append(f"{name}: out of time")
            elif TAMPERED in error.evalue or UNFINISHED in error.evalue:
                said.append(f"{name}: {TAMPERED if TAMPERED in error.evalue else UNFINISHED}")
            elif error.ename == "TooMuchOutput":
                said.append(f"{name}: {FLOODED}")
            elif error.ename == "MemoryError":
                said.append(f"{name}: out of memory")
    return said


def add_notes(path: Path, notes: list[str]) -> None:
    """The notes as the first cell of the graded notebook, for the student."""
    if not notes:
        return
    notebook = nbformat.read(path, as_version=4)
    lines = "\n".join(f"    {note}" for note in notes)  # indented: shown as it is, nothing in it is markup
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell(f"**What the grader noticed**\n\n{lines}"))
    nbformat.write(notebook, path)


def scores(config: Config, assignment: str, student: str) -> dict[str, dict]:
    """By exercise: points, possible points, and whether a person has yet to grade it."""
    with Gradebook(config.CourseDirectory.db_url, COURSE_ID) as book:
        notebook = book.find_submission_notebook(assignment, assignment, student)
        return {
            grade.name.removesuffix("_test"): {
                "score": grade.score, "possible": grade.max_score, "by_hand": bool(grade.needs_manual_grade)
            }
            for grade in sorted(notebook.grades, key=lambda grade: grade.name)
        }  # fmt: skip


def main(arguments: list[str]) -> int:
    course, assignment, student, job = arguments
    logging.basicConfig(level=logging.WARNING)
    autograde(Path(course), assignment, student, json.loads(Path(job).read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
