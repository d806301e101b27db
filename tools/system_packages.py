"""Installs the packages of `apt.txt` where that is possible, and otherwise names what is missing.

Runs before there is an environment: standard library only. Never fails: without the packages, Fashion-MNIST
is downloaded, and what needs a compiler or a browser says so itself.
"""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path


def wanted(text: str) -> list[str]:
    """The package names in the text of an `apt.txt`; `#` starts a comment."""
    names = (line.split("#")[0].strip() for line in text.splitlines())
    return [name for name in names if name]


def installed(name: str) -> bool:
    """Whether dpkg has the package."""
    query = ["dpkg-query", "-W", "-f=${db:Status-Status}", name]
    return subprocess.run(query, capture_output=True, text=True).stdout == "installed"


def missing(root: Path) -> list[str]:
    """What `apt.txt` asks for and dpkg does not have; Debian's Python without `venv` needs that too."""
    names = wanted((root / "apt.txt").read_text(encoding="utf-8"))
    if find_spec("ensurepip") is None:
        names.append("python3-venv")
    return [name for name in names if not installed(name)]


def install(names: list[str]) -> None:
    """Install together or, where one of them is unknown to the distribution, one by one."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "-y", "--no-install-recommends"]
    subprocess.run(["apt-get", "update"], env=environment)
    if subprocess.run(command + names, env=environment).returncode:
        for name in names:
            subprocess.run([*command, name], env=environment)


def advice(names: list[str]) -> str:
    """One line for the names that are still missing."""
    together = " ".join(names)
    line = f"Missing system packages: {together}. On Debian or Ubuntu: sudo apt-get install {together}."
    if "dataset-fashion-mnist" in names:
        line += " Fashion-MNIST comes through torchvision's download instead."
    return line


def main(root: Path) -> None:
    debian = bool(shutil.which("apt-get") and shutil.which("dpkg-query"))
    names = missing(root) if debian else wanted((root / "apt.txt").read_text(encoding="utf-8"))
    if debian and names and os.geteuid() == 0:
        install(names)
        names = missing(root)
    if names:
        print(advice(names), flush=True)


if __name__ == "__main__":
    main(Path(__file__).resolve().parent.parent)
    sys.exit(0)
