"""Where the book's files are."""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class BuildError(Exception):
    """Something in the book is wrong; the message names the file and the remedy."""


@dataclass(frozen=True)
class Chapter:
    """`notebooks/<name>.py` and what is made from it; `name` is `NN_name`."""

    root: Path
    name: str

    @property
    def number(self) -> str:
        return self.name[:2]

    @property
    def source(self) -> Path:
        return self.root / "notebooks" / f"{self.name}.py"

    @property
    def notebook(self) -> Path:
        return self.source.with_suffix(".ipynb")

    @property
    def result(self) -> Path:
        return self.root / "results" / f"{self.name}.json"

    @property
    def figure(self) -> Path:
        return self.root / "results" / "figures" / f"{self.name}.png"

    @property
    def executed(self) -> Path:
        """The folder of the last successful run: key, notebook, result, and a figure where there is one."""
        return stage(self.root) / "executed" / self.name

    @property
    def title(self) -> str:
        """The first `# heading` of the chapter."""
        found = re.search(r"^# # (.+)$", self.source.read_text(encoding="utf-8"), re.MULTILINE)
        return found.group(1).strip() if found else self.name


def stage(root: Path) -> Path:
    """The untracked folder that everything is made in before it is put in its place."""
    return root / ".stage"


def chapters(root: Path = ROOT) -> list[Chapter]:
    """Every chapter, in order: the files `notebooks/NN_name.py`."""
    found = sorted((root / "notebooks").glob("[0-9][0-9]_*.py"))
    return [Chapter(root, path.stem) for path in found]


def find(name: str, root: Path = ROOT) -> Chapter:
    """The chapter with this number or name. Raises BuildError if there is none, or more than one."""
    matching = [c for c in chapters(root) if name in (c.name, c.number)]
    if len(matching) != 1:
        known = ", ".join(c.name for c in chapters(root)) or "none"
        raise BuildError(f"NAME={name}: no single chapter has this number or name; there are: {known}")
    return matching[0]


def key(chapter: Chapter) -> str:
    """SHA-256 over what a chapter's outputs depend on: its code, the package, the locks, the sweeps that it names."""
    root, code = chapter.root, chapter.source.read_text(encoding="utf-8")
    locks = [root / "requirements.lock", root / "requirements-assets.lock"]
    sweeps = [path for path in (root / "results" / "sweeps").glob("*.json") if path.name in code]
    digest = hashlib.sha256()
    for path in [chapter.source, *sorted((root / "qft_utils").rglob("*.py")), *locks, *sorted(sweeps)]:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def relative(path: Path, root: Path) -> str:
    """`path` as messages show it."""
    return os.path.relpath(path, root)
