"""Grades a folder of returned notebooks: grades.csv, a feedback page for each student, a summary.

    python -m tools.classroom.grade returned/ [--seed 17] [--jobs 2] [--no-sandbox]

A run that was interrupted goes on: what has been graded, from the same file, sources and seed, stays as it is.
"""

import argparse
import hashlib
import json
import secrets
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nbformat
from tqdm import tqdm

from tools.classroom import report, sandbox, submissions
from tools.classroom.release import BadExercise, make_course
from tools.classroom.submissions import Submission

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Settings:
    """How a folder is graded. Seconds are for one cell and for one notebook."""

    course: Path
    out: Path
    seed: int
    boxed: bool = True
    jobs: int = 1
    cell_seconds: int = 60
    total_seconds: int = 300


def grade_one(submission: Submission, settings: Settings) -> dict:
    """The record of one submission: scores by test, and notes. Kept, and taken from there the next time."""
    record = settings.out / "records" / f"{submission.assignment}__{submission.key}.json"
    digest = _digest(submission, settings)
    if record.exists() and (kept := json.loads(record.read_text()))["digest"] == digest:
        return kept
    handed_path = settings.course / "release" / submission.assignment / f"{submission.assignment}.ipynb"
    read = submissions.read(submission, nbformat.read(handed_path, as_version=4))
    folder = settings.course / "submitted" / submission.key / submission.assignment
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(read.notebook, folder / f"{submission.assignment}.ipynb")
    made = _run(submission, settings, read)
    made |= {"digest": digest, "student": submission.student, "assignment": submission.assignment}
    record.parent.mkdir(parents=True, exist_ok=True)
    part = record.with_suffix(".part")
    part.write_text(json.dumps(made, indent=1))
    part.replace(record)
    return made


def _run(submission: Submission, settings: Settings, read: submissions.Read) -> dict:
    """In a process of its own; where that fails, once more without running anything."""
    with tempfile.TemporaryDirectory(prefix="qft-grade-") as folder:
        Path(folder).chmod(0o755)
        result = Path(folder) / "result.json"
        for refused in (read.refused, read.refused or "the run was stopped: it took too long, or its process died"):
            job = {
                "work": f"{folder}/box", "seed": settings.seed, "boxed": settings.boxed, "notes": read.notes,
                "refused": refused, "cell_seconds": settings.cell_seconds, "total_seconds": settings.total_seconds,
                "threads": 1 if settings.jobs > 1 else 2, "result": str(result),
                "feedback": str(_feedback(submission, settings)),
            }  # fmt: skip
            (Path(folder) / "job.json").write_text(json.dumps(job))
            command = [sys.executable, "-m", "tools.classroom.run", str(settings.course), submission.assignment]
            said = ""
            try:
                done = subprocess.run(
                    [*command, submission.key, f"{folder}/job.json"], cwd=ROOT, capture_output=True, text=True,
                    timeout=settings.total_seconds + 120,
                )  # fmt: skip
                said = done.stderr[-2000:]
            except subprocess.TimeoutExpired:
                pass
            if result.exists():
                return json.loads(result.read_text())
    raise RuntimeError(f"{submission.path} could not be graded at all; nbgrader said:\n{said}")


def _feedback(submission: Submission, settings: Settings) -> Path:
    return settings.out / "feedback" / submission.key / f"{submission.assignment}.html"


def _digest(submission: Submission, settings: Settings) -> str:
    source = settings.course / "source" / submission.assignment / f"{submission.assignment}.ipynb"
    said = hashlib.sha256(source.read_bytes() + f"{settings.seed}{settings.boxed}".encode())
    if submission.path.is_file() and submission.path.stat().st_size <= submissions.LARGEST:
        said.update(submission.path.read_bytes())
    return said.hexdigest()


def grade(folder: Path, settings: Settings, assignments: list[str]) -> list[dict]:
    """Every submission, and what a teacher reads. Raises FileNotFoundError for no folder, NoSandbox for no box."""
    if settings.boxed:
        sandbox.check()
    found, strange = submissions.find(folder, assignments)
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no submission: expected student/NN_name.ipynb or NN_name__student.ipynb"
        )
    with ThreadPoolExecutor(settings.jobs) as pool:
        graded = list(tqdm(pool.map(lambda s: grade_one(s, settings), found), total=len(found), desc="grading"))
    report.write(graded, strange, settings.out)
    return graded


def _seed(out: Path, given: int | None) -> int:
    """The teacher's seed: as given, or drawn once and kept."""
    kept = out / "seed.txt"
    if given is None:
        given = int(kept.read_text()) if kept.exists() else secrets.randbelow(2**31)
    out.mkdir(parents=True, exist_ok=True)
    kept.write_text(f"{given}\n")
    return given


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser("python -m tools.classroom.grade", description=__doc__.splitlines()[0])
    options.add_argument("submissions", type=Path, help="folder of returned notebooks")
    options.add_argument("--exercises", type=Path, default=ROOT / "notebooks" / "exercises", help="folder of sources")
    options.add_argument("--course", type=Path, default=ROOT / "classroom", help="nbgrader's course folder")
    options.add_argument("--out", type=Path, default=ROOT / "grades", help="where grades and feedback go")
    options.add_argument("--seed", type=int, help="for what hidden tests draw; without it one is drawn, and kept")
    options.add_argument("--jobs", type=int, default=1, help="submissions at a time (default: 1)")
    options.add_argument("--no-sandbox", action="store_true", help="run answers as yourself: only what you trust")
    given = options.parse_args(arguments)
    try:
        names = make_course(given.exercises, given.course)
        settings = Settings(given.course, given.out, _seed(given.out, given.seed), not given.no_sandbox, given.jobs)
        graded = grade(given.submissions, settings, names)
    except (BadExercise, FileNotFoundError, sandbox.NoSandbox) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(graded)} notebooks graded: {given.out / 'grades.csv'}, {given.out / 'summary.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
