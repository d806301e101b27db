"""Shared by the tests: a chapter's definitions, the built site, a tiny book, a guard over tracked files."""

import ast
import os
import shutil
import subprocess
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch

import qft_utils  # noqa: F401  first: it makes torchvision, timm and Trainer importable beside a CPU torch
from tools.execute import execute
from tools.layout import ROOT, Chapter, chapters, stage
from tools.render import render

TINY = """\
# %% [markdown]
# # Tiny
# It weighs $s \\cdot q$.

# %% mystnb={"image": {"alt": "A line that rises"}} tags=["readme-figure"]
import json, os
import matplotlib.pyplot as plt
plt.plot([1, 2])
plt.show()

# %%
parts = ["python", "torch", "torchao", "transformers", "device", "cpu", "threads"]
result = {"chapter": "01_tiny", "environment": dict.fromkeys(parts, ""), "seconds": 1, "peak_memory_mb": 1}
result |= {"metrics": {"speed/tiny": {"value": 2, "unit": "ratio"}}, "claims": []}
with open(os.environ["QFT_RESULTS_DIR"] + "/01_tiny.json", "w") as file:
    json.dump(result, file)
"""


@pytest.fixture
def tiny_book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a book with one chapter, one page and the real configuration."""
    monkeypatch.delenv("FORCE", raising=False)
    for name in ("_config.yml", "requirements.lock", "requirements-assets.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("notebooks", "qft_utils", "results", "book"):
        (tmp_path / folder).mkdir()
    (tmp_path / "notebooks" / "01_tiny.py").write_text(TINY)
    (tmp_path / "qft_utils" / "__init__.py").write_text("")
    (tmp_path / "book" / "references.bib").write_text("")
    (tmp_path / "book" / "index.md").write_text("# Home\n\n[Tiny](../notebooks/01_tiny.ipynb), $x^2$\n")
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: book/index\nchapters:\n- file: notebooks/01_tiny\n")
    return tmp_path


@pytest.fixture
def tiny(tiny_book: Path) -> Chapter:
    """The one chapter of `tiny_book`."""
    return chapters(tiny_book)[0]


@pytest.fixture(scope="session")
def defined_in() -> Callable[..., dict]:
    """Takes a chapter and names of its functions and classes; gives them, and what it imports and `constants`."""

    def definitions(chapter: str, kept: Collection[str], constants: Collection[str] = ()) -> dict:
        statements = ast.parse((ROOT / "notebooks" / f"{chapter}.py").read_text()).body
        defined = [s for s in statements if isinstance(s, ast.FunctionDef | ast.ClassDef) and s.name in kept]
        assert sorted(s.name for s in defined) == sorted(kept)
        assigned = [s for s in statements if isinstance(s, ast.Assign) and ast.unparse(s.targets[0]) in constants]
        assert len(assigned) == len(constants)
        imports = [s for s in statements if isinstance(s, ast.Import | ast.ImportFrom)]
        namespace = {}
        exec(compile(ast.Module(imports + assigned + defined, []), chapter, "exec"), namespace)
        return namespace

    return definitions


@pytest.fixture(scope="module")
def one_thread():
    """Tiny tensors gain nothing from a second thread, and on a busy machine they wait for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def site() -> Path:
    """The folder of the site, built from the last run of every chapter, which it executes if need be."""
    for chapter in chapters(ROOT):
        execute(chapter, force=False)  # FORCE=1 has had its run in test_chapters.py
    return render(ROOT, stage(ROOT) / "test_site", executed=True)


def _tree() -> str:
    """What git sees: names of changed and new files, and the content of the tracked ones, staged or not."""
    status, diff = ["status", "--porcelain"], ["diff", "HEAD", "--no-ext-diff"]
    git = ["git", "-c", "safe.directory=*", "-C", str(ROOT)]  # also where another user made the checkout
    done = [subprocess.run([*git, *said], capture_output=True, text=True, check=True) for said in (status, diff)]
    return "".join(command.stdout for command in done)


@pytest.fixture(scope="session", autouse=True)
def tracked_files_stay():
    """`make test` sets QFT_TREE_STAYS: whatever the tests did, the working tree is as it was."""
    if os.environ.get("QFT_TREE_STAYS") != "1" or not (ROOT / ".git").exists():  # an archive: nothing is tracked
        yield
        return
    before = _tree()
    yield
    assert _tree() == before, "the tests changed the working tree: see `git status`; write into .stage"
