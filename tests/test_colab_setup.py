"""The first cell of a self-contained copy: what it installs, what it leaves, and how it fails."""

import base64
import copy
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools import colab, colab_setup


def test_nothing_is_installed_where_nothing_is_missing(monkeypatch):
    monkeypatch.setattr(colab_setup.subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    colab_setup.qft_install({"pytest>=1.0": "pytest==1.0"})
    colab_setup.qft_install({})


@pytest.mark.parametrize("needed", ["pytest>=9999", "no-such-library>=0", "pytest==0.1"])
def test_missing_or_old_libraries_are_installed_alone(monkeypatch, needed):
    seen = []

    def pip(command, **_):
        seen.extend([command, Path(command[-1]).read_text()])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(colab_setup.subprocess, "run", pip)
    colab_setup.qft_install({needed: "wanted==1", "pytest>=1": "unwanted==1"}, "--require-hashes")
    assert seen[1] == "wanted==1\n"
    assert {"--no-deps", "--require-hashes"} <= set(seen[0])


def test_failed_install_says_what_and_why(monkeypatch):
    failed = SimpleNamespace(returncode=1, stderr="a\nb\nno route to host", stdout="")
    monkeypatch.setattr(colab_setup.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(RuntimeError, match=r"absent-model==1.*run this cell again(.|\n)*no route to host"):
        colab_setup.qft_install({"absent-model==1": "absent-model==1 --hash=sha256:0"})


def test_set_up_cell_imports_the_standard_library_and_packaging_only():
    names = colab.imported_names(colab.SETUP.read_text())
    assert names <= sys.stdlib_module_names | {"packaging"}


def test_unpacked_package_comes_first_and_is_inherited(tmp_path, monkeypatch):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy/__init__.py").write_text("")
    monkeypatch.setattr(sys, "path", copy.copy(sys.path))
    monkeypatch.setenv("PYTHONPATH", "kept")
    colab_setup.qft_unpack(base64.encodebytes(colab.build_wheel(tmp_path / "toy", "1.0")).decode())
    assert (Path(sys.path[0]) / "toy/__init__.py").is_file()
    assert os.environ["PYTHONPATH"] == os.pathsep.join([sys.path[0], "kept"])
