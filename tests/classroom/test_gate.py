"""The exercises: the reference passes, the empty answer fails, each mistake meets a message that names it."""

import re

import pytest

from tests.classroom.gate import EXERCISES, SOLUTION, Session, exercise_files, wrong_answers

FILES = {path.stem: path for path in exercise_files()}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=FILES)
def session(request, tmp_path_factory):
    """One namespace a notebook, in which the reference has run."""
    made = Session(FILES[request.param])
    seconds = sum(seconds for _, seconds in made.run_reference())
    assert seconds < 60
    return made


def test_every_chapter_has_exercises():
    chapters = {path.stem for path in EXERCISES.parent.glob("[0-9][0-9]_*.py")}
    assert set(FILES) == chapters


def test_there_are_five_or_more_and_one_asks_for_judgement(session):
    assert len(session.of("solution")) + len(session.manual()) >= 5
    assert session.manual() and all("Rubric" in cell.source for cell in session.manual())


def test_each_has_tests_and_three_plausible_mistakes(session):
    by_exercise = [wrong.exercise for wrong in wrong_answers(session.path)]
    for exercise in session.of("solution"):
        assert session.tests_of(exercise), exercise
        assert any("BEGIN HIDDEN TESTS" in cell.source for cell in session.tests_of(exercise)), exercise
        assert by_exercise.count(exercise) >= 3, exercise
    assert set(by_exercise) <= set(session.of("solution"))


def test_the_empty_answer_scores_nothing(session):
    for exercise in session.of("solution"):
        assert session.error_of(exercise, session.empty(exercise)) is not None, exercise


def test_each_mistake_meets_a_message_that_names_it(session):
    missed = {}
    for wrong in wrong_answers(session.path):
        message = session.error_of(wrong.exercise, wrong.code)
        if message is None or wrong.message not in message:
            missed[f"{wrong.exercise}: {wrong.mistake}"] = message
    assert not missed


def test_no_exercise_needs_the_answer_of_another(session):
    """So a wrong answer loses its own points and no others."""
    for exercise in session.of("solution"):
        others = set(session.of("solution")) - {exercise}
        assert not session.names_made(exercise) & set().union(*map(session.names_read, others)), exercise


def test_another_seed_draws_other_tests_that_the_reference_passes(session, monkeypatch):
    for seed in ("1", "77"):
        monkeypatch.setenv("QFT_SEED", seed)
        for exercise, cell in session.of("solution").items():
            assert session.error_of(exercise, cell.source) is None, (exercise, seed)


def test_points_in_the_text_are_those_that_are_graded(session):
    for cell in session.cells:
        name = cell.metadata.get("nbgrader", {}).get("grade_id", "")
        said = re.search(r"\((\d+) points?\)", cell.source)
        if name.endswith("_text") and said:
            graded = [c.metadata.nbgrader for c in session.cells if c.metadata.get("nbgrader", {}).get("grade")]
            exercise = name.removesuffix("_text")
            own = [m for m in graded if m["grade_id"] == exercise or m["grade_id"].startswith(f"{exercise}_test")]
            points = sum(m["points"] for m in own)
            assert points == int(said[1]), name


def test_markers_are_where_nbgrader_looks(session):
    for cell in [*session.of("solution").values(), *session.manual()]:
        assert len(SOLUTION.findall(cell.source.replace("# ###", "###"))) == 1, cell.metadata.nbgrader.grade_id
