"""Renders the site from notebooks that already ran.

python -m tools.render                   the committed notebooks, into _build/html
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import yaml

from tools import colab, exercises
from tools.layout import ROOT, BuildError, chapters, relative, stage

EXTENSIONS = Path(__file__).resolve().parent / "sphinx_ext"


def render(root: Path, destination: Path, executed: bool = False) -> Path:
    """Build the site and put it at `destination`, which keeps its old content if the build fails.

    The pages show the committed notebooks or, if `executed`, those of the last runs in `.stage`. Raises
    BuildError with Sphinx's lines if there is a warning or an error.
    """
    work = stage(root) / "render"
    shutil.rmtree(work, ignore_errors=True)
    source = work / "source"
    _collect(root, source, executed)
    config = work / "_config.yml"
    config.write_text(yaml.safe_dump(site_config(root), sort_keys=False))
    _sphinx(source, config, root / "_toc.yml", work / "out")
    html = work / "out" / "_build" / "html"
    try:
        colab.write_copies(root, sorted((source / "notebooks").glob("*.ipynb")), html / "colab")
    except ValueError as problem:
        raise BuildError(f"notebooks/{problem}") from problem
    _move(html, destination)
    return destination


def site_config(root: Path) -> dict:
    """`_config.yml`, with a link to the repository once its address is known."""
    config = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))
    if config.get("repository", {}).get("url"):
        config.setdefault("html", {})["use_repository_button"] = True
    return config


def _collect(root: Path, source: Path, executed: bool) -> None:
    """Copy what the site is made of, and nothing else, into `source`."""
    (source / "notebooks").mkdir(parents=True)
    if (root / "book").is_dir():
        shutil.copytree(root / "book", source / "book")
    for folder in ("_static", "_templates"):  # Sphinx sees them only at the source's root
        if (source / "book" / folder).is_dir():
            (source / "book" / folder).rename(source / folder)
    for chapter in chapters(root):
        notebook = chapter.executed / chapter.notebook.name if executed else chapter.notebook
        if not notebook.is_file():
            name = relative(notebook, root)
            raise BuildError(f"{name} is missing: run `make chapter NAME={chapter.number}`")
        exercise = root / "notebooks" / "exercises" / chapter.notebook.name
        _copy_chapter(notebook, source / "notebooks", exercise)
        figure = chapter.executed / chapter.figure.name if executed else chapter.figure
        if figure.is_file():  # pages show it as ../results/figures/NN_name.png, the place where it is committed
            (source / "results" / "figures").mkdir(parents=True, exist_ok=True)
            shutil.copy(figure, source / "results" / "figures")


def _copy_chapter(notebook: Path, folder: Path, exercise: Path) -> None:
    """The chapter's page and, where it has exercises, theirs, with a link from one to the other."""
    if not exercise.is_file():
        shutil.copy(notebook, folder)
        return
    content = nbformat.read(notebook, as_version=4)
    content.cells.append(exercises.link_cell(exercise.stem))
    nbformat.write(content, folder / notebook.name)
    (folder / "exercises").mkdir(exist_ok=True)
    nbformat.write(exercises.page(nbformat.read(exercise, as_version=4)), folder / "exercises" / exercise.name)


def _sphinx(source: Path, config: Path, toc: Path, out: Path) -> None:
    start = "from jupyter_book.cli.main import main; main()"
    command = [sys.executable, "-c", start, "build", str(source), "--config", str(config)]
    command += ["--toc", str(toc.resolve()), "--path-output", str(out), "-W", "-n", "--keep-going"]
    path = [str(EXTENSIONS), str(EXTENSIONS.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "NO_COLOR": "1"}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, env=environment, text=True, **streams)
    if done.returncode:
        raise BuildError(_complaint(done.stdout, source))


def _complaint(output: str, source: Path) -> str:
    """Sphinx's warnings and errors, with the paths that people edit."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output).replace(f"{source}{os.sep}", "")
    lines = [line for line in plain.splitlines() if re.search(r"WARNING|ERROR|CRITICAL", line)]
    shown = lines or plain.splitlines()[-25:]
    remedy = "The site was not built: mend these lines (for an .ipynb, in the .py beside it)"
    return "\n".join([*shown, remedy])


def _move(built: Path, destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    old = destination.with_name(f".{destination.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if destination.exists():
        destination.rename(old)
    shutil.move(built, destination)
    shutil.rmtree(old, ignore_errors=True)


def main() -> int:
    destination = ROOT / "_build" / "html"
    try:
        render(ROOT, destination)
    except BuildError as problem:
        print(problem, file=sys.stderr)
        return 1
    print(f"rendered {relative(destination / 'index.html', Path.cwd())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
