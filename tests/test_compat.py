"""torchvision, and what imports it, beside a torch that it was not built for; and nothing where the builds match."""

import importlib.machinery
import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qft_utils import compat
from tools.layout import ROOT


def python(code: str, folder: Path | None = None) -> str:
    """What a fresh interpreter prints; a package in `folder` is found before an installed one."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, filter(None, (folder, ROOT))))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def torchvision_in(folder: Path, *libraries: str) -> Path:
    """A package called torchvision with files that claim to be compiled operators."""
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in libraries:
        (package / name).write_bytes(b"built for another torch")
    return package


@pytest.fixture
def found(monkeypatch):
    """Makes `find_spec` answer with a package in this folder, or with none."""

    def answer(package: Path | None):
        origin = package and str(package / "__init__.py")
        spec = package and importlib.machinery.ModuleSpec("torchvision", None, origin=origin)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)

    return answer


@pytest.mark.slow
def test_torchvision_trainer_and_peft_import_after_the_package():
    code = """
import qft_utils
import torchvision, peft
from transformers import Trainer
print(torchvision.datasets.FashionMNIST.__name__, peft.LoraConfig.__name__, Trainer.__name__)
"""
    assert python(code).split() == ["FashionMNIST", "LoraConfig", "Trainer"]


def test_absent_torchvision_needs_nothing(found):
    found(None)
    assert compat.torchvision_ops_load()


def test_torchvision_without_compiled_operators_needs_nothing(found, tmp_path):
    found(torchvision_in(tmp_path))
    assert compat.torchvision_ops_load()


def test_operators_of_another_torch_do_not_load(found, tmp_path):
    found(torchvision_in(tmp_path, "_C.so"))
    assert not compat.torchvision_ops_load()


def test_operators_that_load(found, tmp_path):
    (torchvision_in(tmp_path) / "_C.so").symlink_to(torch._C.__file__)  # a library that is sure to load
    found(tmp_path / "torchvision")
    assert compat.torchvision_ops_load()


def test_nothing_is_declared_where_operators_load(monkeypatch):
    def refuse(*_):
        raise AssertionError("declared an operator")

    monkeypatch.setattr(compat, "_keep_alive", [])
    monkeypatch.setattr(compat, "torchvision_ops_load", lambda: True)
    monkeypatch.setattr(torch.library, "Library", refuse)
    assert compat.declare_missing_torchvision_ops() is False
    assert compat._keep_alive == []


def test_declared_operators(tmp_path):
    """Declaring again does no harm, torch can describe them, and a call says that nobody implements them."""
    torchvision_in(tmp_path, "_C.so")
    code = """
import gc, torch
from qft_utils import compat
print(compat.declare_missing_torchvision_ops(), compat.declare_missing_torchvision_ops(), len(compat._keep_alive))
gc.collect()
for name in ("nms", "qnms"):
    operator = getattr(torch.ops.torchvision, name)
    print(operator.default._schema)
    try:
        operator(torch.rand(3, 4), torch.rand(3), 0.5)
    except NotImplementedError as error:
        print(str(error).splitlines()[0])
"""
    lines = python(code, tmp_path).splitlines()
    assert lines[0] == "True True 1"
    for name, schema, refusal in (("nms", *lines[1:3]), ("qnms", *lines[3:])):
        assert schema == f"torchvision::{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        assert refusal.startswith(f"Could not run 'torchvision::{name}' with arguments from the 'CPU' backend")


def test_hush_drops_one_notice_and_no_other(caplog):
    logger = logging.getLogger("qft_test_hush")
    compat.hush("qft_test_hush", "of no use")
    logger.warning("this is %s to you", "of no use")
    logger.warning("this is of use")
    assert [record.getMessage() for record in caplog.records] == ["this is of use"]
