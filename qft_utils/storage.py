"""Where the record of a chapter goes, how it gets there, and on what machine it was made."""

import contextlib
import json
import os
import platform
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from qft_utils.paths import cache_dir

ROOT = Path(__file__).resolve().parents[1]  # the repository, where the package lies in a checkout


def results_dir() -> Path:
    """Folder for `<chapter>.json`: `QFT_RESULTS_DIR`, else `results` in the package's cache."""
    folder = os.environ.get("QFT_RESULTS_DIR")
    return Path(folder) if folder else cache_dir() / "results"


def write_json(path: Path, content: dict[str, Any] | list[Any]) -> None:
    """Write `content` to `path` whole or not at all; an older file stays if anything fails.

    Raises ValueError if `content` holds NaN or infinity, TypeError if it is not JSON at all.
    """
    try:
        text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}; record None where a run diverged") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp makes it private, and results are there to be read
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def environment() -> dict[str, Any]:
    """Versions and hardware that a number depends on; a package that is absent is None."""
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchao": _version("torchao"),
        "transformers": _version("transformers"),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory_mb() -> float:
    """Largest resident memory of this process since it began, in MB (10**6 bytes)."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # bytes on macOS, KiB on Linux
