"""Stored runs that are too long for a chapter, each bound to the code that made it."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qft_utils import storage


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


def sweep_source(sweep: Mapping[str, Any]) -> str:
    """Text for a metric's `source`: the sweep's name and a short hash of the code that made it."""
    digest = hashlib.sha256(json.dumps(sweep["code"], sort_keys=True).encode()).hexdigest()
    return f"sweep {sweep['sweep']} ({digest[:12]})"


def _file_hash(path: Path) -> str:
    # Git may check text out with other line ends; that changes no result.
    return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
