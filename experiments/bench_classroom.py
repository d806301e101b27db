"""Thirty submissions of one exercise notebook, graded in their boxes on two cores: wall time for each.

`make bench NAME=classroom` runs it and writes `results/bench_classroom.json`. Every second submission has the
reference's answers, the others are empty. Beside it stands the notebook's own running time: the same cells in a plain
kernel, from its start to its end, as a student runs them.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `tools` is not installed, and needs not be

# isort: split
from qft_utils import storage  # noqa: E402
from tools import exercises  # noqa: E402
from tools.classroom import grade, release  # noqa: E402

NOTEBOOK, SUBMISSIONS, JOBS, OWN_RUNS = "03_quantization_aware_training", 30, 2, 5


def own_seconds() -> list[float]:
    """Seconds of each plain run."""
    source, seconds = ROOT / "notebooks" / "exercises" / f"{NOTEBOOK}.py", []
    for _ in range(OWN_RUNS):
        begin = time.perf_counter()
        exercises.execute(source)
        seconds.append(time.perf_counter() - begin)
    return seconds


def hand_in(course: Path, returned: Path) -> None:
    for number in range(SUBMISSIONS):
        folder = returned / f"student{number:02}"
        folder.mkdir(parents=True)
        kind = "source" if number % 2 else "release"
        os.link(course / kind / NOTEBOOK / f"{NOTEBOOK}.ipynb", folder / f"{NOTEBOOK}.ipynb")


def main() -> None:
    own = own_seconds()
    with tempfile.TemporaryDirectory() as folder:
        course = Path(folder) / "course"
        Path(folder).chmod(0o755)
        names = release.make_course(ROOT / "notebooks" / "exercises", course)
        hand_in(course, Path(folder) / "returned")
        settings = grade.Settings(course, Path(folder) / "grades", seed=17, jobs=JOBS)
        begin = time.perf_counter()
        graded = grade.grade(Path(folder) / "returned", settings, names)
        each = (time.perf_counter() - begin) / SUBMISSIONS
    full = [record for record in graded if sum(score["score"] for score in record["scores"].values())]
    content = {"benchmark": "grading in the sandbox", "notebook": NOTEBOOK, "submissions": SUBMISSIONS, "jobs": JOBS}
    content |= {"environment": storage.environment(), "with_points": len(full), "seconds_own_runs": own}
    content |= {"seconds_a_submission": each, "ratio_to_own_median": each / statistics.median(own)}
    storage.write_json(ROOT / "results" / "bench_classroom.json", content)
    print(f"{each:.1f} s a submission, own {statistics.median(own):.1f} s, x{content['ratio_to_own_median']:.2f}")


if __name__ == "__main__":
    main()
