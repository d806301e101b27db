"""Stored runs that are too long for a chapter, each bound to the code that made it."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from qft_utils import storage
from qft_utils.measure import Estimate
from qft_utils.paths import cache_dir


class StaleSweep(RuntimeError):
    """A stored sweep was made by code that has since changed."""


def write_sweep(
    name: str, runs: Sequence[Mapping[str, Any]], code_files: Iterable[str], seconds: float
) -> Path:
    """Write `results/sweeps/<name>.json` whole or not at all, and return its path.

    `code_files` are relative to the repository's root: every file whose change would change `runs`.
    Raises FileNotFoundError if one is missing, ValueError if there are no runs or no code files.
    """
    code = {file: _file_hash(storage.ROOT / file) for file in sorted(code_files)}
    if not runs or not code:
        raise ValueError(f"sweep {name!r} needs runs and code files: got {len(runs)} and {len(code)}")
    path = storage.ROOT / "results" / "sweeps" / f"{name}.json"
    content = {"sweep": name, "code": code, "environment": storage.environment()}
    storage.write_json(path, content | {"seconds": round(seconds, 1), "runs": [dict(run) for run in runs]})
    return path


class Journal:
    """The runs of a sweep, each kept as soon as it is made: a sweep that was killed goes on after its last one.

    `code_files` as for `write_sweep`; when one of them changes, the journal begins anew.
    """

    def __init__(self, name: str, code_files: Iterable[str]) -> None:
        self.name, self.code_files = name, sorted(code_files)
        code = json.dumps([_file_hash(storage.ROOT / file) for file in self.code_files])
        digest = hashlib.sha256(code.encode()).hexdigest()[:12]
        self.path = cache_dir() / "sweeps" / f"{name}-{digest}.json"
        self.kept: list[dict[str, Any]] = json.loads(self.path.read_text()) if self.path.exists() else []

    def run(self, settings: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The kept run of just these settings, or that of `make()`: settings, what was measured, and `seconds`."""
        as_stored = json.loads(json.dumps(dict(settings)))  # JSON makes a list of a tuple
        for kept in self.kept:
            if kept["settings"] == as_stored:
                return kept["run"]
        begin = time.perf_counter()
        run = {**settings, **make()}
        run["seconds"] = round(time.perf_counter() - begin, 1)
        self.kept.append({"settings": dict(settings), "run": run})
        storage.write_json(self.path, self.kept)
        print(f"{self.name}, run {len(self.kept)}: {_brief(run)}", flush=True)
        return run

    def write(self) -> Path:
        """Store the runs as the sweep that chapters read. Raises as `write_sweep` does."""
        runs = [kept["run"] for kept in self.kept]
        return write_sweep(self.name, runs, self.code_files, sum(run["seconds"] for run in runs))


def _brief(run: Mapping[str, Any]) -> str:
    """A run in a line, without its lists and tables."""
    return ", ".join(f"{name} {value}" for name, value in run.items() if not isinstance(value, list | dict))


def load_sweep(path: str | Path) -> dict[str, Any]:
    """Read a stored sweep; a relative path starts at the repository's root.

    Raises StaleSweep if a file that made it has changed, or is gone from a checkout. Where the package
    is installed without the repository, files that are absent are not held against the sweep.
    """
    path = storage.ROOT / path
    sweep = json.loads(path.read_text(encoding="utf-8"))
    checkout = (storage.ROOT / "pyproject.toml").is_file()
    for file, made_by in sweep["code"].items():
        source = storage.ROOT / file
        if source.is_file() and _file_hash(source) != made_by:
            raise StaleSweep(f"{file} has changed since {path.name} was made: run `make sweeps`")
        if checkout and not source.is_file():
            raise StaleSweep(f"{file}, which made {path.name}, is gone: run `make sweeps`")
    return sweep


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean of one value per seed, with Student's t interval (1908, Biometrika 6), which is wide for few seeds.

    Give differences, seed by seed, to compare two contenders. Raises ValueError for fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} seed shows no spread: give the values of two or more")
    mean, error = float(np.mean(values)), float(stats.sem(values))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return Estimate(mean, mean - half, mean + half)


def sweep_source(sweep: Mapping[str, Any]) -> str:
    """Text for a metric's `source`: the sweep's name and a short hash of the code that made it."""
    digest = hashlib.sha256(json.dumps(sweep["code"], sort_keys=True).encode()).hexdigest()
    return f"sweep {sweep['sweep']} ({digest[:12]})"


def _file_hash(path: Path) -> str:
    # Git may check text out with other line ends; that changes no result.
    return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
