"""Runs exercise notebooks in one namespace each: the reference, the hand-out's empty answers, and plausible wrong ones.

python -m tests.classroom.gate 01        # one notebook, with the time that each exercise takes
"""

import ast
import importlib
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jupytext
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
EXERCISES = ROOT / "notebooks" / "exercises"
SOLUTION = re.compile(r"[ \t]*### BEGIN SOLUTION.*?### END SOLUTION\n?", re.DOTALL)


@dataclass(frozen=True)
class Wrong:
    """A plausible wrong answer: for which solution cell, what it gets wrong, its code, and a part of the message."""

    exercise: str
    mistake: str
    code: str
    message: str


def exercise_files() -> list[Path]:
    return sorted(EXERCISES.glob("[0-9][0-9]_*.py"))


def wrong_answers(path: Path) -> list[Wrong]:
    return importlib.import_module(f"tests.classroom.wrong_answers.w{path.stem}").WRONG


class Session:
    """The cells of one exercise notebook, and a namespace in which they run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells: list[NotebookNode] = jupytext.read(path).cells
        self.space: dict[str, object] = {"__name__": "__main__"}

    def of(self, kind: str) -> dict[str, NotebookNode]:
        """Code cells by grade_id: "solution", which are answered, or "grade", which test."""
        other = {"solution": "grade", "grade": "solution"}[kind]
        found = [(c.metadata.get("nbgrader", {}), c) for c in self.cells if c.cell_type == "code"]
        return {meta["grade_id"]: c for meta, c in found if meta.get(kind) and not meta.get(other)}

    def manual(self) -> list[NotebookNode]:
        """Cells that a person grades."""
        found = [(c.metadata.get("nbgrader", {}), c) for c in self.cells]
        return [c for meta, c in found if meta.get("grade") and meta.get("solution")]

    def tests_of(self, exercise: str) -> list[NotebookNode]:
        """Test cells of an exercise: `e1_name` is tested by `e1_name_test`, `e1_name_test2` ..."""
        return [cell for name, cell in self.of("grade").items() if name.startswith(f"{exercise}_test")]

    def run(self, source: str, name: str) -> None:
        exec(compile(source, f"{self.path.stem}:{name}", "exec"), self.space)

    def run_reference(self) -> Iterator[tuple[str, float]]:
        """Every code cell once; yields name and seconds. Raises what a cell raises."""
        for place, cell in enumerate(self.cells):
            if cell.cell_type == "code":
                name, begin = cell.metadata.get("nbgrader", {}).get("grade_id", f"cell {place}"), time.perf_counter()
                self.run(cell.source, name)
                yield name, time.perf_counter() - begin

    def error_of(self, exercise: str, answer: str) -> str | None:
        """The message with which this answer fails its tests, or None; the reference is back in place afterwards."""
        try:
            self.run(answer, exercise)
            for cell in self.tests_of(exercise):
                self.run(cell.source, f"{exercise}_test")
        except AssertionError as error:
            return str(error)
        except NotImplementedError:
            return "not implemented"
        finally:
            self.run(self.of("solution")[exercise].source, exercise)
        return None

    def empty(self, exercise: str) -> str:
        """The answer as it is handed out."""
        return SOLUTION.sub("    raise NotImplementedError()\n", self.of("solution")[exercise].source)

    def names_made(self, exercise: str) -> set[str]:
        """What a solution cell defines."""
        body = ast.parse(self.of("solution")[exercise].source).body
        defined = {s.name for s in body if isinstance(s, ast.FunctionDef | ast.ClassDef)}
        targets = [t for s in body if isinstance(s, ast.Assign) for t in s.targets]
        return defined | {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}

    def names_read(self, exercise: str) -> set[str]:
        """What an exercise's own cells read: its solution and its tests."""
        cells = [self.of("solution")[exercise], *self.tests_of(exercise)]
        names = [n for c in cells for n in ast.walk(ast.parse(c.source)) if isinstance(n, ast.Name)]
        return {n.id for n in names if isinstance(n.ctx, ast.Load)}


def main(which: str) -> int:
    os.chdir(EXERCISES)
    for path in (path for path in exercise_files() if path.name.startswith(which)):
        session, total, bad = Session(path), 0.0, 0
        for name, seconds in session.run_reference():
            total += seconds
            print(f"{seconds:6.1f} s  {name}")
        print(f"{total:6.1f} s  all of {path.stem}, {len(session.manual())} to be graded by hand")
        for exercise in session.of("solution"):
            if session.error_of(exercise, session.empty(exercise)) is None:
                bad += 1
                print(f"BAD: {exercise}: the empty answer passes")
            others = {o for o in session.of("solution") if o != exercise}
            if shared := session.names_made(exercise) & set().union(*map(session.names_read, others)):
                bad += 1
                print(f"BAD: {exercise} defines {shared}, which another exercise reads")
        for wrong in wrong_answers(path):
            message = session.error_of(wrong.exercise, wrong.code)
            good = message is not None and wrong.message in message
            bad += not good
            print(f"{'ok ' if good else 'BAD'} {wrong.exercise}, {wrong.mistake}: {message}")
        print(f"{bad} bad")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
