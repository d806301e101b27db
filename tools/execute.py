"""Executes chapters in a staging folder and promotes what they made, all of it or nothing.

    python -m tools.execute                    every chapter that changed; then promote
    python -m tools.execute --chapter 01       this one, now; then promote it

`FORCE=1` executes unchanged chapters too.
"""

import argparse
import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from tools import contract, pairs
from tools.layout import BuildError, Chapter, chapters, find, key, relative, stage
from tools.promote import replace_all

GUARD = Path(__file__).resolve().parent.parent / "tests" / "offline"
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def execute(chapter: Chapter, force: bool | None = None) -> bool:
    """Run `chapter` unless its last run used the same code; True if it ran now.

    `force` is `FORCE=1` of the environment by default. Raises BuildError, and keeps the last good run, if
    a cell raises or the chapter breaks the contract.
    """
    force = os.environ.get("FORCE") == "1" if force is None else force
    now = key(chapter)
    stored = chapter.executed / "key"
    if not force and stored.is_file() and stored.read_text() == now:
        print(f"{chapter.name}: unchanged, its last run stands (FORCE=1 runs it again)", flush=True)
        return False
    print(f"{chapter.name}: running …", flush=True)
    began = time.perf_counter()
    run = _run(chapter)
    _store(chapter, run, now)
    print(f"{chapter.name}: ran in {time.perf_counter() - began:.0f} s", flush=True)
    return True


def _run(chapter: Chapter) -> Path:
    """Execute the notebook in a new folder; returns the folder."""
    run = stage(chapter.root) / "run" / chapter.name
    shutil.rmtree(run, ignore_errors=True)
    for folder in ("notebooks", "results", "jupyter/kernels/python3", "ipython"):
        (run / folder).mkdir(parents=True)
    notebook = run / "notebooks" / f"{chapter.name}.ipynb"
    nbformat.write(pairs.fresh_notebook(chapter.source), notebook)
    _own_kernel(run / "jupyter" / "kernels" / "python3" / "kernel.json")
    code = _nbmake(notebook, run, chapter.root)
    if code:
        raise BuildError(_failure(chapter, notebook, run / "log"))
    attempts = run / "network"
    if attempts.is_file():
        raise BuildError(
            f"notebooks/{chapter.name}.py reached for the network ({attempts.read_text().splitlines()[0]}): "
            "chapters run offline; bring files with qft_utils.assets"
        )
    return run


def _own_kernel(path: Path) -> None:
    """`python3` means this interpreter, whatever kernels the user has installed."""
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    path.write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))


def _nbmake(notebook: Path, run: Path, root: Path) -> int:
    (run / "pytest.ini").write_text("[pytest]\n")  # or pytest would find the repository's own settings
    command = [sys.executable, "-m", "pytest", "-c", "pytest.ini", "--nbmake", "--overwrite"]
    command += ["--nbmake-timeout=1800", "-p", "no:cacheprovider", "-q", str(notebook)]
    with (run / "log").open("w") as log:
        done = subprocess.run(
            command, cwd=run, env=_environment(run, root), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    return done.returncode


def _environment(run: Path, root: Path) -> dict[str, str]:
    kept = {n: v for n, v in os.environ.items() if n != "MPLBACKEND" and not n.startswith("PYTEST_")}
    return kept | {
        "QFT_STRICT": "1",
        "QFT_RESULTS_DIR": str(run / "results"),
        "QFT_OFFLINE_LOG": str(run / "network"),
        "PYTHONPATH": os.pathsep.join([str(GUARD), str(root)]),
        "PYTHONHASHSEED": "0",
        "JUPYTER_PATH": str(run / "jupyter"),
        "IPYTHONDIR": str(run / "ipython"),  # no start-up files or settings of the user's
        "TQDM_DISABLE": "1",  # a stored bar stands at 0 %
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }


def _failure(chapter: Chapter, notebook: Path, log: Path) -> str:
    """What went wrong, from the cell that raised or else from nbmake's log."""
    where = relative(log, chapter.root)
    remedy = f"mend the cell and run `make chapter NAME={chapter.number}` (log: {where})"
    for number, cell in enumerate(nbformat.read(notebook, as_version=4).cells, start=1):
        errors = [output for output in cell.get("outputs", []) if output.output_type == "error"]
        if errors and "raises-exception" not in cell.metadata.get("tags", []):
            trace = _tail("\n".join(errors[-1].traceback))
            return f"{trace}\nnotebooks/{chapter.name}.py, cell {number} raised {errors[-1].ename}: {remedy}"
    said = _tail(log.read_text(errors="replace"))
    return f"{said}\nnotebooks/{chapter.name}.py did not run to its end: {remedy}"


def _tail(text: str, lines: int = 20) -> str:
    return "\n".join(_ANSI.sub("", text).rstrip().splitlines()[-lines:])


def _store(chapter: Chapter, run: Path, now: str) -> None:
    """Check what a run made and keep it. The key goes last: without it, the folder counts for nothing."""
    notebook = pairs.tidy(nbformat.read(run / "notebooks" / f"{chapter.name}.ipynb", as_version=4))
    nbformat.validate(notebook)
    contract.check_images(notebook, chapter.name)
    contract.check_outputs(notebook, chapter.name, [chapter.root.resolve(), Path.home()])
    result = run / "results" / f"{chapter.name}.json"
    contract.check_result(result, chapter.name)
    made = run / f"{chapter.name}.ipynb"
    nbformat.write(notebook, made)
    pairs.check_size(made, relative(chapter.notebook, chapter.root))
    shutil.rmtree(chapter.executed, ignore_errors=True)
    chapter.executed.mkdir(parents=True)
    for path in (made, result, run / "log"):
        shutil.copy(path, chapter.executed)
    figure = readme_figure(notebook, chapter.name)
    if figure:
        (chapter.executed / chapter.figure.name).write_bytes(figure)
    (chapter.executed / "key").write_text(now)


def readme_figure(notebook: NotebookNode, name: str) -> bytes | None:
    """The PNG of the cell tagged `readme-figure`, if a cell is. Raises BuildError if it shows none."""
    for number, cell in enumerate(notebook.cells, start=1):
        if "readme-figure" not in cell.metadata.get("tags", []):
            continue
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                return base64.b64decode(output.data["image/png"])
        where = f"notebooks/{name}.py, cell {number}"
        raise BuildError(f"{where} is tagged readme-figure but shows no PNG: drop the tag")
    return None


def promote(done: list[Chapter]) -> None:
    """Put the executed notebooks, results and figures of `done` where they are committed, all or none."""
    files: dict[Path, Path] = {}
    for chapter in done:
        for target in (chapter.notebook, chapter.result, chapter.figure):
            made = chapter.executed / target.name
            if made.is_file():
                files[target] = made
    replace_all(files)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Execute chapters and promote what they made.")
    parser.add_argument("--chapter", metavar="NN", help="only this one, whether it changed or not")
    wanted = parser.parse_args(arguments).chapter
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit takes the running kernel along
    try:
        todo = [find(wanted)] if wanted else chapters()
        for chapter in todo:
            execute(chapter, force=True if wanted else None)
        promote(todo)
    except BuildError as problem:
        print(f"{problem}\nNothing was promoted.", file=sys.stderr)
        return 1
    print(f"promoted: {', '.join(c.name for c in todo) or 'nothing, there is no chapter'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
