"""Sphinx extension: the site asks no other server for anything, and its pages have no script errors.

MathJax comes from a Python package and is copied into `_static`; the site's icon is in this folder. Thebe,
which jupyter-book always loads, would need a kernel server; it also declares `const THEBE_JS_URL` twice.
"""

import shutil
from importlib.util import find_spec
from pathlib import Path

from sphinx.application import Sphinx

_MATHJAX = "tex-chtml-full.js"
# `full` holds TeX's extensions; fonts, and what its accessibility menu loads when a reader asks for it.
_PARTS = ["output/chtml/fonts/woff-v2/*.woff", "a11y/*.js", "sre/mathmaps/base.json", "sre/mathmaps/en.json"]


def mathjax_folder() -> Path:
    """The folder `es5` of the installed MathJax package."""
    return Path(find_spec("mathjax").origin).parent / "static" / "mathjax" / "es5"


def use_own_files(app: Sphinx, config) -> None:
    config.mathjax_path = f"mathjax/{_MATHJAX}"
    config.html_favicon = str(Path(__file__).with_name("favicon.svg"))  # without one, browsers report a 404


def copy_mathjax(app: Sphinx, exception: Exception | None) -> None:
    if exception or app.builder.format != "html":
        return
    origin, target = mathjax_folder(), Path(app.outdir) / "_static" / "mathjax"
    for path in [origin / _MATHJAX, *(p for part in _PARTS for p in sorted(origin.glob(part)))]:
        copy = target / path.relative_to(origin)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def drop_thebe(app: Sphinx) -> None:
    """Undo what sphinx_thebe has set up; jupyter-book has no setting that leaves it out."""
    for listeners in app.events.listeners.values():
        listeners[:] = [heard for heard in listeners if heard.handler.__module__ != "sphinx_thebe"]
    app.registry.css_files[:] = [file for file in app.registry.css_files if "thebe" not in file[0]]


def setup(app: Sphinx) -> dict:
    drop_thebe(app)
    app.connect("config-inited", use_own_files)
    app.connect("build-finished", copy_mathjax)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
