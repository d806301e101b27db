"""Replaces a set of files, all of them or none."""

import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def replace_all(files: Mapping[Path, Path]) -> None:
    """Copy each source over its target (`{target: source}`).

    The slow part, copying, happens beside the targets; an interruption there changes none. The renames are
    not interrupted by Ctrl-C, and are taken back if one of them fails.
    """
    temporary = {target: target.with_name(f".{target.name}.new") for target in files}
    try:
        for target, source in files.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, temporary[target])
        with _uninterrupted():
            _rename(temporary)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _rename(temporary: Mapping[Path, Path]) -> None:
    before = {target: target.read_bytes() if target.is_file() else None for target in temporary}
    done = []
    try:
        for target, new in temporary.items():
            os.replace(new, target)
            done.append(target)
    except BaseException:
        for target in done:
            _restore(target, before[target])
        raise


def _restore(target: Path, content: bytes | None) -> None:
    if content is None:
        target.unlink()
    else:
        target.write_bytes(content)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
