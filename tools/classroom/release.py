"""A course in nbgrader's layout from exercise sources, and the notebooks and the zip that a class is sent.

    python -m tools.classroom.release [--exercises FOLDER] [--course FOLDER] [--out FOLDER]

The course folder (source/, release/, gradebook.db) is nbgrader's own: its formgrader and its exchange work on it.
"""

import argparse
import shutil
import sys
import zipfile
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode
from nbgrader.converters import GenerateAssignment
from nbgrader.coursedir import CourseDirectory

from tools.classroom.run import COURSE_ID, course_config
from tools.colab import chapter_needs, self_contained

ROOT = Path(__file__).resolve().parents[2]
CONFIG = f"""# nbgrader reads this. `jupyter lab`, started here, has its formgrader.
c = get_config()
c.CourseDirectory.course_id = "{COURSE_ID}"
"""


class BadExercise(ValueError):
    """An exercise source that nbgrader could not hand out or grade."""


def sources(folder: Path) -> list[Path]:
    """The exercise notebooks of a folder. Raises BadExercise if there are none."""
    found = sorted(folder.glob("[0-9][0-9]_*.py"))
    if not found:
        raise BadExercise(f"{folder} holds no NN_name.py: name a folder of exercise sources")
    return found


def source_notebook(path: Path) -> NotebookNode:
    """An exercise source as nbgrader reads it. Raises BadExercise for a cell that cannot be graded."""
    notebook = jupytext.read(path)
    seen = set()
    for cell in notebook.cells:
        meta = cell.metadata.get("nbgrader")
        if meta is None:
            continue
        name = meta.get("grade_id")
        if not name or name in seen:
            raise BadExercise(f"{path.name}: grade_id {name!r} is missing or used twice; give each cell its own")
        seen.add(name)
        if meta.get("solution") and "### BEGIN SOLUTION" not in cell.source:
            raise BadExercise(
                f"{path.name}, {name}: no line says ### BEGIN SOLUTION, so the answer would be handed out"
            )
    notebook.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return notebook


def make_course(exercises: Path, course: Path) -> list[str]:
    """Writes the course's sources and hand-outs; returns the names of its assignments. Raises BadExercise."""
    notebooks = {path.stem: source_notebook(path) for path in sources(exercises)}
    course.mkdir(parents=True, exist_ok=True)
    (course / "nbgrader_config.py").write_text(CONFIG)
    for name, notebook in notebooks.items():
        folder = course / "source" / name
        folder.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, folder / f"{name}.ipynb")
        config = course_config(course)
        config.CourseDirectory.assignment_id = name
        GenerateAssignment(coursedir=CourseDirectory(config=config), config=config, force=True).start()
    return list(notebooks)


def hand_outs(course: Path, names: list[str], exercises: Path, out: Path) -> Path:
    """Student notebooks that run by themselves, and a zip of them, in place of what `out` held."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name in names:
        handed = nbformat.read(course / "release" / name / f"{name}.ipynb", as_version=4)
        nbformat.write(self_contained(ROOT, handed, chapter_needs(exercises / f"{name}.py")), part / f"{name}.ipynb")
    with zipfile.ZipFile(part / "exercises.zip", "w", zipfile.ZIP_DEFLATED) as together:
        for name in names:
            together.write(part / f"{name}.ipynb", f"exercises/{name}.ipynb")
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)
    return out


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser("python -m tools.classroom.release", description=__doc__.splitlines()[0])
    options.add_argument("--exercises", type=Path, default=ROOT / "notebooks" / "exercises", help="folder of sources")
    options.add_argument("--course", type=Path, default=ROOT / "classroom", help="nbgrader's course folder")
    options.add_argument("--out", type=Path, default=ROOT / "release", help="what students get")
    given = options.parse_args(arguments)
    try:
        names = make_course(given.exercises, given.course)
        out = hand_outs(given.course, names, given.exercises, given.out)
    except BadExercise as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(names)} notebooks and exercises.zip in {out}; the course is in {given.course}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
