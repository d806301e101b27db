"""System packages are installed where that can be done, and otherwise named in one line."""

import subprocess

import pytest

from tools import system_packages
from tools.layout import ROOT


@pytest.fixture
def commands(monkeypatch):
    """The apt-get commands that would have run; a call succeeds unless its packages hold `unknown`."""
    ran = []

    def run(command, **_):
        ran.append(command)
        return subprocess.CompletedProcess(command, int("unknown" in command))

    monkeypatch.setattr(system_packages.subprocess, "run", run)
    return ran


def test_names_without_comments():
    assert system_packages.wanted("# all\n\ng++  # for Inductor\nchromium\n") == ["g++", "chromium"]
    assert "dataset-fashion-mnist" in system_packages.wanted((ROOT / "apt.txt").read_text())


def test_installs_together(commands):
    system_packages.install(["a", "b"])
    assert [command[1] for command in commands] == ["update", "install"]
    assert commands[1][-2:] == ["a", "b"]


def test_one_unknown_package_does_not_keep_the_others_away(commands):
    system_packages.install(["a", "unknown"])
    assert [command[-1] for command in commands[2:]] == ["a", "unknown"]


@pytest.mark.parametrize("debian, user", [(True, 1000), (False, 0)])
def test_otherwise_names_them_in_one_line(monkeypatch, capsys, commands, debian, user):
    monkeypatch.setattr(system_packages.shutil, "which", lambda name: name if debian else None)
    monkeypatch.setattr(system_packages.os, "geteuid", lambda: user)
    monkeypatch.setattr(system_packages, "installed", lambda name: False)
    system_packages.main(ROOT)
    out = capsys.readouterr().out
    assert commands == []
    assert out.count("\n") == 1
    assert "sudo apt-get install dataset-fashion-mnist chromium" in out
    assert "Fashion-MNIST comes through torchvision's download" in out


def test_silent_where_nothing_is_missing(monkeypatch, capsys, commands):
    monkeypatch.setattr(system_packages.shutil, "which", lambda name: name)
    monkeypatch.setattr(system_packages, "installed", lambda name: True)
    system_packages.main(ROOT)
    assert capsys.readouterr().out == "" and commands == []
