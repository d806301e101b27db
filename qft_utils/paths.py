"""Where the package keeps what it makes: one folder, movable by `QFT_CACHE`."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$QFT_CACHE`, else `$XDG_CACHE_HOME/qft_utils`, else `~/.cache/qft_utils`; made if it is not there."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("QFT_CACHE") or Path(base) / "qft_utils")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
