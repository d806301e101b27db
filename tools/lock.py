"""Writes `requirements.lock` and `requirements-docs.lock` from what is installed in this environment.

The locks hold `pyproject.toml`'s dependencies and groups with all that these need in turn. Versions come
without a build suffix or hash: readers' machines have other builds of torch than CI.
"""

import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.layout import ROOT, BuildError

_OURS = {"qft-utils", "pip"}


def closure(roots: Iterable[str]) -> dict[str, str]:
    """`{canonical name: version}` of the requirements in `roots` and theirs, as installed here.

    Raises BuildError for one that is not installed.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [Requirement(line) for line in roots]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in _OURS or (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        found[name], needed = _installed(name)
        todo += [r for r in needed if _applies(r, requirement.extras)]
    return dict(sorted(found.items()))


def _installed(name: str) -> tuple[str, list[Requirement]]:
    try:
        package = distribution(name)
    except PackageNotFoundError:
        raise BuildError(f"{name} is not installed: pip install it into .venv, then `make lock`") from None
    return package.version.split("+")[0], [Requirement(line) for line in package.requires or []]


def _applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ["", *extras])


def roots(root: Path) -> tuple[list[str], list[str]]:
    """What `pyproject.toml` asks for: everything, and the part that renders the site."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    groups = project["dependency-groups"]
    return project["project"]["dependencies"] + groups["docs"] + groups["test"], groups["docs"]


def main() -> int:
    everything, docs = roots(ROOT)
    for name, wanted in {"requirements.lock": everything, "requirements-docs.lock": docs}.items():
        try:
            pins = closure(wanted)
        except BuildError as problem:
            print(problem, file=sys.stderr)
            return 1
        lines = [f"{package}=={version}" for package, version in pins.items()]
        head = "# Written by `make lock` from pyproject.toml; do not edit."
        (ROOT / name).write_text("\n".join([head, *lines]) + "\n")
        print(f"{name}: {len(pins)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
