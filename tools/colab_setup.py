"""The body of a self-contained notebook's first cell: `tools/colab.py` copies this file into it.

So it imports only what a bare notebook has, and running the cell twice does no harm.
"""

import base64
import importlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def qft_lacks(requirement: str) -> bool:
    """Whether the running interpreter does not meet a requirement such as `torchao>=0.18.0`."""
    wanted = Requirement(requirement)
    try:
        return not wanted.specifier.contains(metadata.version(wanted.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return True


def qft_install(needs: dict[str, str], *options: str) -> None:
    """Install the line of each unmet requirement (requirement -> pip line); RuntimeError where pip fails."""
    missing = [requirement for requirement in needs if qft_lacks(requirement)]
    if not missing:
        return
    names = ", ".join(missing)
    print(f"Installing {names}. This happens once a session.")
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder, "requirements.txt")
        lines.write_text("\n".join(needs[requirement] for requirement in missing) + "\n")
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-color", *options, "-r", str(lines)]
        run = subprocess.run(pip, capture_output=True, text=True)
    if run.returncode:
        last = "\n".join((run.stderr or run.stdout).strip().splitlines()[-5:])
        raise RuntimeError(
            f"This chapter needs {names}, and pip could not install it. Check that this machine reaches its "
            f"package index, then run this cell again. pip's last words:\n{last}"
        )
    importlib.invalidate_caches()


def qft_unpack(wheel: str) -> None:
    """Put the helper package first on the path, for this process and for those it starts.

    Unpacked, not pip-installed: a copy that you have installed yourself stays as it is.
    """
    folder = tempfile.mkdtemp(prefix="qft_utils-")
    zipfile.ZipFile(io.BytesIO(base64.b64decode(wheel))).extractall(folder)
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    importlib.invalidate_caches()
