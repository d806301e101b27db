"""From hand-out to grades with nbgrader and the box: honest answers, broken files, hostile ones."""

import copy
import csv
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest

from tests.classroom import hostile
from tests.classroom.gate import ROOT, SOLUTION, Session, exercise_files
from tests.classroom.hostile import RIGHT
from tools.classroom import grade, release, report, sandbox, submissions
from tools.exercises import HIDDEN

pytestmark = pytest.mark.slow



def cell(kind: str, **meta: object) -> str:
    """The first line of a cell, with nbgrader's metadata."""
    usual = {"grade": False, "locked": False, "points": 0, "schema_version": 3, "solution": False, "task": False}
    mark = " [markdown]" if kind == "markdown" else ""
    return f"# %%{mark} nbgrader={json.dumps(usual | meta | {'cell_type': kind})}"


TINY = f"""# %% [markdown]
# # Tiny

{cell("code", grade_id="setup", locked=True)}
import os

import torch

{cell("code", grade_id="e1_step", solution=True)}
def step(low, high, bits):
    \"\"\"Scale.\"\"\"
    ### BEGIN SOLUTION
    secret_reference = 2**bits - 1
    return (high - low) / secret_reference
    ### END SOLUTION


{cell("code", grade_id="e1_step_test", grade=True, locked=True, points=3)}
assert torch.allclose(torch.tensor(step(0.0, 1.0, 4)), torch.tensor(1 / 15)), "15 steps, not 16"
### BEGIN HIDDEN TESTS
_bits = 2 + int(os.environ["QFT_SEED"])
assert torch.allclose(torch.tensor(step(0.0, 1.0, _bits)), torch.tensor(1 / (2**_bits - 1)))
### END HIDDEN TESTS

{cell("markdown", grade_id="e2_ship", grade=True, solution=True, points=2)}
# ### BEGIN SOLUTION
# The second. Rubric: 2 for why.
# ### END SOLUTION
"""


class Class:
    """A course with the tiny exercise, and a folder of returned notebooks."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.exercises = folder, folder / "exercises"
        self.exercises.mkdir()
        (self.exercises / "01_tiny.py").write_text(TINY)
        self.names = release.make_course(self.exercises, folder / "course")
        self.handed = nbformat.read(folder / "course" / "release" / "01_tiny" / "01_tiny.ipynb", as_version=4)
        self.returned = folder / "returned"

    def notebook(self, answer: str | None = None):
        made = copy.deepcopy(self.handed)
        if answer is not None:
            self.cell(made, "e1_step").source = answer
        return made

    @staticmethod
    def cell(notebook, name):
        return next(c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("grade_id") == name)

    def put(self, student: str, content) -> Path:
        path = self.returned / student / "01_tiny.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content)
        else:
            nbformat.write(content, path)
        return path

    def settings(self, **changes) -> grade.Settings:
        usual = {"seed": 5, "boxed": BOXED, "jobs": 2, "cell_seconds": 8, "total_seconds": 60}
        return grade.Settings(self.folder / "course", self.folder / "grades", **usual | changes)

    def grade(self, **changes) -> dict[str, dict]:
        made = grade.grade(self.returned, self.settings(**changes), self.names)
        return {record["student"]: record for record in made}

    def feedback(self, student: str) -> str:
        key = submissions.Submission(student, "01_tiny", Path()).key
        return (self.folder / "grades" / "feedback" / key / "01_tiny.html").read_text()


def _boxes_can_be_made() -> bool:
    try:
        sandbox.check()
    except sandbox.NoSandbox:
        return False
    return True


BOXED = _boxes_can_be_made()


@pytest.fixture(scope="module")
def school(tmp_path_factory) -> Class:
    folder = tmp_path_factory.mktemp("school")
    folder.chmod(0o755)
    return Class(folder)


@pytest.fixture(scope="module")
def graded(school) -> dict[str, dict]:
    """All of them in one run, as a teacher would have them: it must come to its end."""
    put, notebook, of = school.put, school.notebook, school.cell
    right = notebook(RIGHT)
    of(right, "e2_ship").source = "The second, since it is smaller."
    put("right", right)
    put("empty", notebook())
    put("Zoë Ångström", notebook(RIGHT))
    edited = notebook(hostile.UNPAID["wrong"])
    of(edited, "e1_step_test").source = "pass"
    put("edited_test", edited)
    deleted = notebook(hostile.UNPAID["wrong"])
    deleted.cells.remove(of(deleted, "e1_step_test"))
    put("deleted_test", deleted)
    renamed = notebook(RIGHT)
    of(renamed, "e1_step").metadata.nbgrader.grade_id = "mine"
    for place, each in enumerate(renamed.cells):
        each.id = f"changed-{place}"
    put("changed_ids", renamed)
    doubled = notebook(RIGHT)
    doubled.cells.append(copy.deepcopy(of(doubled, "e1_step")))
    put("doubled", doubled)
    foreign = notebook(RIGHT)
    foreign.metadata.kernelspec = {"name": "ir", "language": "R", "display_name": "R"}
    put("wrong_kernel", foreign)
    put("not_json", '{"cells": [')
    put("empty_file", "")
    put("huge", json.dumps({"cells": [], "padding": "x" * (50 << 20)}))
    course, own = school.folder / "course", [str(school.folder / "escaped"), str(ROOT / "escaped"), "/etc/escaped"]
    paths = {"writes": own, "reads": [str(course / "gradebook.db"), str(school.exercises), str(school.returned)]}
    for student, answer in (hostile.UNPAID | hostile.PAID | (hostile.BOXED if BOXED else {})).items():
        put(student, notebook(answer.replace("PATHS", repr(paths.get(student)))))
    return school.grade()


def points(record: dict) -> float:
    return record["scores"]["e1_step"]["score"]


ODD = ["right", "Zoë Ångström", "changed_ids", "doubled", "wrong_kernel"]


@pytest.mark.parametrize("student", [*ODD, *hostile.PAID])
def test_a_right_answer_has_its_points_whatever_is_around_it(graded, student):
    assert points(graded[student]) == 3


@pytest.mark.parametrize(
    "student", ["empty", "edited_test", "deleted_test", "not_json", "empty_file", "huge", *hostile.UNPAID]
)
def test_none_of_these_is_paid(graded, student):
    assert points(graded[student]) == 0


SAID = {
    "not_json": "no notebook", "empty_file": "no notebook", "huge": "20 are allowed", "loop": "out of time",
    "printer": "printed too much",
    "checker": "has been replaced", "doubled": "2 cells of this name", "wrong_kernel": "run as Python",
}  # fmt: skip


@pytest.mark.parametrize("student, line", SAID.items())
def test_what_was_odd_is_said_to_teacher_and_student(graded, school, student, line):
    assert any(line in note for note in graded[student]["notes"])
    assert line in school.feedback(student)
    assert line in (school.folder / "grades" / "summary.html").read_text()


def test_the_mistake_is_named_in_the_feedback(graded, school):
    assert "15 steps, not 16" in school.feedback("wrong")


def test_a_kernel_that_leaves_is_no_pass(graded):
    assert graded["leaves"]["notes"]


def test_nothing_of_an_answer_runs_in_the_teachers_browser(graded, school):
    assert "<script>steal()" not in school.feedback("script")


def test_a_gigabyte_of_print_does_not_fill_the_feedback(graded, school):
    assert len(school.feedback("printer")) < 3_000_000


@pytest.mark.parametrize("student", hostile.BOXED)
def test_the_box_holds(graded, school, student):
    if not BOXED:
        with pytest.raises(sandbox.NoSandbox, match="bubblewrap"):
            school.grade(boxed=True)
        return
    assert points(graded[student]) == (0 if student == "memory" else 3)
    assert not (school.folder / "escaped").exists() and not (ROOT / "escaped").exists()


def test_nobody_is_left_running(graded):
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "qft-grade-" not in running


def test_the_table_has_a_row_for_each_student(graded, school):
    rows = list(csv.DictReader((school.folder / "grades" / "grades.csv").open()))
    assert {row["student"] for row in rows} == set(graded)
    right = next(row for row in rows if row["student"] == "right")
    assert (float(right["01/e1_step"]), float(right["total"]), right["possible"]) == (3, 3, "5.0")
    assert (right["to grade by hand"], right["notes"]) == ("e2_ship", "")


def test_no_name_becomes_a_formula_in_a_sheet():
    record = {"student": "=1+1", "assignment": "01_tiny", "scores": {}, "notes": ["@x"]}
    (row,) = csv.DictReader(report.table([record]).splitlines())
    assert (row["student"], row["notes"]) == ("'=1+1", "'@x")


def test_what_has_been_graded_stays_and_what_has_changed_is_graded_again(graded, school):
    kept = {path: path.stat().st_mtime_ns for path in (school.folder / "grades" / "records").iterdir()}
    school.put("wrong", school.notebook(RIGHT))
    again = school.grade()
    assert points(again["wrong"]) == 3
    changed = [path.name for path, time in kept.items() if path.stat().st_mtime_ns != time]
    assert changed == ["01_tiny__wrong.json"]


def test_the_layout_of_learning_platforms(school, tmp_path):
    nbformat.write(school.notebook(RIGHT), tmp_path / "01_tiny__anna b.ipynb")
    nbformat.write(school.notebook(RIGHT), tmp_path / "01_tiny__...ipynb")
    (tmp_path / "notes.ipynb").write_text("{}")
    found, strange = submissions.find(tmp_path, ["01_tiny"])
    assert {submission.student for submission in found} == {"anna b", ".."}
    assert all("/" not in s.key and "." not in s.key and s.key for s in found)
    assert len(strange) == 1


def test_without_a_box_the_command_stops_and_says_what_to_install(school, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    folders = {"--exercises": school.exercises, "--course": school.folder / "course"}
    folders["--out"] = school.folder / "unboxed"
    arguments = [str(school.returned), *(str(part) for pair in folders.items() for part in pair)]
    assert grade.main(arguments) == 1
    assert "install Debian's package `bubblewrap`" in capsys.readouterr().err
    assert not (school.folder / "unboxed" / "grades.csv").exists()


def test_a_folder_without_submissions_is_named(school, tmp_path):
    with pytest.raises(FileNotFoundError, match="NN_name__student"):
        grade.grade(tmp_path, school.settings(), school.names)


def test_an_exercise_that_would_be_handed_out_with_its_answer_is_refused(tmp_path):
    (tmp_path / "01_bad.py").write_text(TINY.replace("### BEGIN SOLUTION", "# here"))
    with pytest.raises(release.BadExercise, match="BEGIN SOLUTION"):
        release.make_course(tmp_path, tmp_path / "course")


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """The book's own exercises, handed out; their references and the empty hand-outs, returned and graded."""
    folder = tmp_path_factory.mktemp("real")
    folder.chmod(0o755)
    exercises = exercise_files()[0].parent
    names = release.make_course(exercises, folder / "course")
    release.hand_outs(folder / "course", names, exercises, folder / "release")
    for name in names:
        for student, path in (("reference", folder / "course" / "source" / name), ("empty", folder / "release")):
            target = folder / "returned" / student
            target.mkdir(parents=True, exist_ok=True)
            os.link(path / f"{name}.ipynb", target / f"{name}.ipynb")
    settings = grade.Settings(folder / "course", folder / "grades", seed=31, boxed=BOXED, jobs=2)
    grade.grade(folder / "returned", settings, names)
    return folder


def test_the_reference_scores_all_and_the_hand_out_nothing(real):
    rows = {row["student"]: row for row in csv.DictReader((real / "grades" / "grades.csv").open())}
    by_hand = set(rows["reference"]["to grade by hand"].split())
    for path in exercise_files():
        for cell in Session(path).cells:
            meta = cell.metadata.get("nbgrader", {})
            if meta.get("grade"):
                name = meta["grade_id"].removesuffix("_test")
                column = f"{path.stem[:2]}/{name}"
                assert float(rows["empty"][column]) == 0, column
                if name not in by_hand:
                    assert float(rows["reference"][column]) == meta["points"], column


def test_no_solution_leaks_into_the_hand_out(real):
    for path in exercise_files():
        handed = (real / "release" / f"{path.stem}.ipynb").read_text()
        text = path.read_text()
        secret = SOLUTION.findall(text) + HIDDEN.findall(text)
        visible = HIDDEN.sub("", SOLUTION.sub("", text))
        for line in (line.strip().removeprefix("# ") for part in secret for line in part.splitlines()[1:-1]):
            if len(line) > 25 and line not in visible:
                assert json.dumps(line)[1:-1] not in handed, (path.name, line)


def test_the_zip_holds_every_hand_out(real):
    with zipfile.ZipFile(real / "release" / "exercises.zip") as together:
        assert sorted(together.namelist()) == [f"exercises/{path.stem}.ipynb" for path in exercise_files()]
