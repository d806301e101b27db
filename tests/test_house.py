"""`pyproject.toml`, the locks, `environment.yml` and the Makefile name one environment."""

import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools import lock
from tools.layout import ROOT, BuildError


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines), "no suffixes, hashes or markers"
    return dict(line.split("==") for line in lines)


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EVERYTHING, DOCS = lock.roots(ROOT)


@pytest.mark.parametrize("line", EVERYTHING)
def test_lock_satisfies_pyproject(line):
    wanted = Requirement(line)
    assert wanted.specifier.contains(pins("requirements.lock")[canonicalize_name(wanted.name)])


def test_dependencies_have_no_upper_bounds():
    """An upper bound would make pip replace what Colab brings."""
    bounds = [s.operator for line in PROJECT["project"]["dependencies"] for s in Requirement(line).specifier]
    assert set(bounds) <= {">="}


def test_docs_lock_is_part_of_the_lock_without_torch():
    docs = pins("requirements-docs.lock")
    assert docs.items() <= pins("requirements.lock").items()
    assert {canonicalize_name(Requirement(line).name) for line in DOCS} <= set(docs)
    assert not {"torch", "transformers", "pytest"} & set(docs)


def test_torch_and_its_companions():
    """These three are built for one another."""
    locked = pins("requirements.lock")
    assert [locked[name] for name in ("torch", "torchvision", "torchao")] == ["2.13.0", "0.28.0", "0.18.0"]


def test_assets_have_hashes_and_stay_out_of_the_lock():
    text = (ROOT / "requirements-assets.lock").read_text().replace("\\\n", "")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(lines) == 4
    assert all(re.fullmatch(r"[\w-]+==[\w.]+( +--hash=sha256:[0-9a-f]{64})+", line) for line in lines)
    assert not {line.split("==")[0] for line in lines} & set(pins("requirements.lock"))


def test_conda_installs_the_same_locks():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(d for d in environment["dependencies"] if str(d).startswith("python="))
    assert Requirement(f"python{PROJECT['project']['requires-python']}").specifier.contains(
        python.split("=")[1]
    )
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert pip == ["-r requirements.lock", "-e ."]
    after = (ROOT / "postBuild").read_text()
    assert "--no-deps --require-hashes -r requirements-assets.lock" in after


def test_lock_follows_what_is_needed_in_turn():
    """pip's own resolver agrees: nothing in the closure lacks a dependency."""
    found = lock.closure(["pytest"])
    assert {"pytest", "pluggy", "iniconfig", "packaging"} <= set(found)
    with pytest.raises(BuildError, match="no-such-package is not installed"):
        lock.closure(["no_such_package"])


@pytest.mark.parametrize("target", ["book", "test", "check", "chapter", "html", "lock", "clean", "help"])
def test_make_knows_and_explains_its_targets(target):
    shown = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert re.search(rf"^  make {target} +\w", shown, re.MULTILINE)


def test_old_python_is_refused(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    command = ["make", "-f", str(ROOT / "Makefile"), f"PYTHON={old}", ".venv/bin/python"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "is older than 3.11: install a newer Python" in done.stdout


def test_continuous_integration_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert re.search(r"^set -euo pipefail$(?s:.*)^(exec )?make test$", script.read_text(), re.MULTILINE)


def test_tools_need_neither_torch_nor_the_package():
    """`make html` runs them where neither is installed. A name that is None in sys.modules cannot be imported."""
    modules = sorted(f"tools.{path.stem}" for path in (ROOT / "tools").glob("*.py") if path.stem != "__init__")
    assert "tools.render" in modules
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys(["torch", "transformers", "qft_utils"]))
for name in {modules!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_and_pictures_of_a_page_beside_the_book_exist(page):
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links or page != "README.md"
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_make_sweeps_runs_every_sweep():
    """In an order of its own, since some read what others have stored."""
    (line,) = re.findall(r"^SWEEPS = (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert sorted(line.split()) == sorted(p.stem[len("sweep_") :] for p in (ROOT / "experiments").glob("sweep_*.py"))
