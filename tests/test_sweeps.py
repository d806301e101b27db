"""The journal of a sweep, which a killed sweep goes on from, and the mean over seeds."""

import json
import math
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from qft_utils import storage, sweeps
from qft_utils.sweeps import Journal

GRID = [{"part": "grid", "bits": bits} for bits in (2, 4, 8)]


class Killed(BaseException):
    """Like KeyboardInterrupt, it is no Exception."""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository of two files, whose cache is a folder of its own."""
    root = tmp_path / "checkout"
    root.mkdir()
    monkeypatch.setattr(storage, "ROOT", root)
    monkeypatch.setenv("QFT_CACHE", str(tmp_path / "cache"))
    for name in ("pyproject.toml", "code.py", "other.py"):
        (root / name).write_bytes(b"bits = 4\nsteps = 60\n")
    return root


@pytest.fixture
def ticking(monkeypatch):
    """A clock on which every run takes 1.5 seconds."""
    times = iter(np.arange(0, 1000, 1.5).tolist())
    monkeypatch.setattr(sweeps.time, "perf_counter", lambda: next(times))


def journal() -> Journal:
    return Journal("bits", ["code.py", "other.py"])


class Maker:
    """Makes runs, and remembers of which settings; raises at the run before which it is killed."""

    def __init__(self, die_at: int | None = None):
        self.made, self.die_at = [], die_at

    def sweep(self, kept: Journal, grid=GRID) -> list[dict]:
        return [kept.run(settings, lambda settings=settings: self.make(settings)) for settings in grid]

    def make(self, settings) -> dict:
        if len(self.made) + 1 == self.die_at:
            raise Killed
        self.made.append(settings)
        return {"loss": 1 / settings["bits"], "history": {"train_loss": [1.0, 0.5]}}


def test_a_killed_sweep_goes_on_after_its_last_run(checkout):
    first = Maker(die_at=3)
    with pytest.raises(Killed):
        first.sweep(journal())
    assert first.made == GRID[:2]
    second = Maker()
    runs = second.sweep(journal())
    assert second.made == GRID[2:]
    assert [run["loss"] for run in runs] == [1 / 2, 1 / 4, 1 / 8]
    third = Maker()
    assert third.sweep(journal()) == runs
    assert third.made == []


def test_a_run_is_its_settings_its_measures_and_its_seconds(checkout, ticking):
    (made,) = Maker().sweep(journal(), GRID[:1])
    expected = GRID[0] | {"loss": 0.5, "history": {"train_loss": [1.0, 0.5]}, "seconds": 1.5}
    assert made == expected
    (kept,) = Maker().sweep(journal(), GRID[:1])  # read from the file
    assert kept == expected
    assert list(kept) == ["part", "bits", "loss", "history", "seconds"]


def test_within_one_journal_a_run_is_made_once(checkout):
    kept, maker = journal(), Maker()
    maker.sweep(kept, GRID + GRID[::-1])
    assert maker.made == GRID


@pytest.mark.parametrize("file", ["code.py", "other.py"])
def test_changed_code_begins_anew(checkout, file):
    Maker().sweep(journal())
    before = (checkout / file).read_bytes()
    (checkout / file).write_bytes(before + b"epochs = 2\n")
    maker = Maker()
    maker.sweep(journal(), GRID[:1])
    assert maker.made == GRID[:1]
    (checkout / file).write_bytes(before.replace(b"\n", b"\r\n"))  # the old code, as Git has it on Windows
    again = Maker()
    again.sweep(journal())
    assert again.made == []


def test_another_sweep_and_other_code_files_have_journals_of_their_own(checkout):
    Maker().sweep(journal())
    for other in (Journal("steps", ["code.py", "other.py"]), Journal("bits", ["code.py"])):
        assert other.kept == []
    assert Journal("bits", ["other.py", "code.py"]).kept == journal().kept != []


def test_code_that_is_missing_is_an_error_at_once(checkout):
    with pytest.raises(FileNotFoundError, match="gone.py"):
        Journal("bits", ["gone.py"])


@pytest.mark.parametrize(
    "settings",
    [{"bits": 4}, {"part": "grid", "bits": 4, "seed": 0}, {"part": "bits", "bits": 4}, {"part": "grid", "bits": 3}],
    ids=["fewer", "more", "another name", "another number"],
)
def test_runs_are_matched_on_exactly_their_settings(checkout, settings):
    Maker().sweep(journal())
    maker = Maker()
    (run,) = maker.sweep(journal(), [settings])
    assert maker.made == [settings]
    assert settings.items() <= run.items()
    assert len(journal().kept) == len(GRID) + 1


def test_a_tuple_among_the_settings_is_found_again(checkout):
    for _ in range(2):  # the second journal reads what the first has kept
        sweeps.Journal("bits", ["code.py"]).run({"grid": (1, 2)}, dict)
    assert len(sweeps.Journal("bits", ["code.py"]).kept) == 1


def test_the_order_of_settings_makes_no_difference(checkout):
    Maker().sweep(journal())
    maker = Maker()
    maker.sweep(journal(), [dict(reversed(settings.items())) for settings in GRID])
    assert maker.made == []


def test_what_was_measured_does_not_decide_which_run_it_is(checkout):
    kept = journal()
    kept.run({"bits": 4}, lambda: {"seed": 0})
    assert kept.run({"bits": 4, "seed": 0}, lambda: {"loss": 1.0})["loss"] == 1.0
    assert len(kept.kept) == 2


def test_write_stores_all_runs_in_order_with_the_sum_of_their_seconds(checkout, ticking):
    with pytest.raises(Killed):
        Maker(die_at=3).sweep(journal())
    kept = journal()
    runs = Maker().sweep(kept)
    assert kept.write() == checkout / "results" / "sweeps" / "bits.json"
    sweep = sweeps.load_sweep("results/sweeps/bits.json")
    assert sweep["runs"] == runs
    assert [run["bits"] for run in sweep["runs"]] == [2, 4, 8]
    assert sweep["seconds"] == pytest.approx(sum(run["seconds"] for run in runs), abs=0.05)
    assert sweep["seconds"] > 3 * 1.4
    assert list(sweep["code"]) == ["code.py", "other.py"]
    (checkout / "code.py").write_text("bits = 3\n")
    with pytest.raises(sweeps.StaleSweep, match=r"code\.py has changed"):
        sweeps.load_sweep("results/sweeps/bits.json")


def test_write_without_runs_is_refused(checkout):
    with pytest.raises(ValueError, match="'bits' needs runs and code files: got 0 and 2"):
        journal().write()
    assert not (checkout / "results").exists()


def raises(error: BaseException):
    def make(*_):
        raise error

    return make


@pytest.mark.parametrize("how", ["the run dies", "a number is none", "no JSON", "the disk is full"])
def test_nothing_is_half_written(checkout, monkeypatch, how):
    kept = journal()
    Maker().sweep(kept, GRID[:2])
    before = kept.path.read_bytes()
    make = {
        "the run dies": raises(FloatingPointError("loss nan")),
        "a number is none": lambda: {"loss": math.nan},
        "no JSON": lambda: {"loss": object()},
        "the disk is full": lambda: {"loss": 0.5},
    }[how]
    if how == "the disk is full":
        monkeypatch.setattr(os, "replace", raises(OSError("no space")))
    with pytest.raises((FloatingPointError, ValueError, TypeError, OSError)):
        kept.run(GRID[2], make)
    assert kept.path.read_bytes() == before
    assert os.listdir(kept.path.parent) == [kept.path.name]
    assert [entry["settings"] for entry in json.loads(before)] == GRID[:2]


def test_progress_is_told_in_a_line_without_tables(checkout, ticking, capsys):
    Maker().sweep(journal(), GRID[:2])
    Maker().sweep(journal(), GRID[:2])  # kept: nothing to tell
    first, second = capsys.readouterr().out.splitlines()
    assert first == "bits, run 1: part grid, bits 2, loss 0.5, seconds 1.5"
    assert second == "bits, run 2: part grid, bits 4, loss 0.25, seconds 1.5"


# The mean over seeds

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=12)


@given(VALUES.filter(lambda values: np.std(values) > 1e-6))
def test_over_seeds_is_students_interval(values):
    estimate = sweeps.over_seeds(values)
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert estimate.value == pytest.approx(np.mean(values))
    assert (estimate.low, estimate.high) == pytest.approx((low, high))


@given(VALUES.filter(lambda values: np.std(values) > 1e-3), st.floats(0.5, 2), st.floats(-10, 10))
def test_over_seeds_moves_with_the_unit(values, factor, shift):
    plain = sweeps.over_seeds(values)
    moved = sweeps.over_seeds([factor * value + shift for value in values])
    expected = [factor * end + shift for end in plain.as_dict().values()]
    assert list(moved.as_dict().values()) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("seeds", "quantile"), [(2, 12.706), (3, 4.303), (5, 2.776)])
def test_over_seeds_has_the_quantiles_of_students_table(seeds, quantile):
    values = list(range(seeds))
    estimate = sweeps.over_seeds(values)
    error = math.sqrt(sum((v - estimate.value) ** 2 for v in values) / (seeds - 1) / seeds)
    assert (estimate.high - estimate.value) / error == pytest.approx(quantile, abs=6e-4)
    assert estimate.value - estimate.low == pytest.approx(estimate.high - estimate.value)


@pytest.mark.parametrize("value", [0, 0.875, -3.0])
def test_seeds_that_agree_have_no_spread(value):
    assert sweeps.over_seeds([value] * 3).as_dict() == {"value": value, "low": value, "high": value}


@pytest.mark.parametrize("values", [[], [0.9]])
def test_over_seeds_needs_two(values):
    with pytest.raises(ValueError, match=rf"^{len(values)} seed.*give the values of two or more"):
        sweeps.over_seeds(values)
