"""The self-contained copies: what they carry, what they import, and that one runs where nothing else is."""

import json
import os
import re
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import jupytext
import nbformat
import pytest
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

from tools import colab

ROOT = Path(__file__).resolve().parent.parent
STUB = ROOT / "tests" / "colab_stub"
CHAPTER = """# ---
# jupyter:
#   qft:
#     wheels: [toy-model]
#     files: [results/sweeps/toy.json]
# ---

# %% [markdown]
# # Toy

# %%
import google.colab
import qft_utils.inner
from importlib import metadata
from pathlib import Path

# %%
beside = Path(qft_utils.__file__).parent.parent / "results/sweeps/toy.json"
print(qft_utils.inner.ANSWER, metadata.version("qft_utils"), beside.read_text())
"""


@pytest.fixture
def book(tmp_path):
    """A tiny book with a package, a stored sweep and a chapter that ran."""
    root = tmp_path / "book"
    for folder in ("qft_utils/__pycache__", "notebooks", "results/sweeps"):
        (root / folder).mkdir(parents=True)
    (root / "qft_utils/__init__.py").write_text("")
    (root / "qft_utils/inner.py").write_text("ANSWER = 42\n")
    (root / "qft_utils/__pycache__/inner.pyc").write_text("stale")
    (root / "results/sweeps/toy.json").write_text("stored")
    (root / "pyproject.toml").write_text('[project]\nname = "qft_utils"\nversion = "0.1.0"\n')
    (root / "requirements.lock").write_text("torchao==0.0.1\ngguf==1.0  # comment\n")
    (root / "requirements-assets.lock").write_text(f"Toy_Model==1.0 \\\n    --hash=sha256:{'0' * 64}\n")
    (root / "notebooks/01_toy.py").write_text(CHAPTER)
    notebook = jupytext.reads(CHAPTER, fmt="py:percent")
    del notebook.metadata["qft"]
    notebook.cells[2].outputs = [nbformat.v4.new_output("stream", text="42 0.1.0 stored\n")]
    nbformat.write(notebook, root / "notebooks/01_toy.ipynb")
    return root


def write_toy(book, tmp_path):
    [path] = colab.write_copies(book, [book / "notebooks/01_toy.ipynb"], tmp_path / "colab")
    return path


def bare_environment(folder: Path) -> dict[str, str]:
    """Variables for `python -S`: this environment's libraries, without `.pth` files, and a pip that tells."""
    pip = folder / "spy" / "pip"
    pip.mkdir(parents=True)
    (pip / "__init__.py").touch()
    (pip / "__main__.py").write_text(f"open({str(folder / 'pip-ran')!r}, 'w')\nraise SystemExit('no pip')")
    libraries = [path for path in sys.path if Path(path).name == "site-packages"]
    paths = [str(pip.parent), str(STUB), *libraries]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("QFT_STRICT", "QFT_RESULTS", "PYTHON"))}
    return kept | {"PYTHONPATH": os.pathsep.join(paths)}


def run_copy(path: Path, folder: Path) -> nbformat.NotebookNode:
    """Run a copy to its end in an empty place under `folder`, where qft_utils cannot be imported."""
    environment = bare_environment(folder)
    work = folder / "work"
    work.mkdir()
    bare = [sys.executable, "-S", "-c", "import qft_utils"]
    refused = subprocess.run(bare, cwd=work, env=environment, capture_output=True, text=True)
    assert "No module named 'qft_utils'" in refused.stderr
    argv = [sys.executable, "-S", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (folder / "kernels/bare").mkdir(parents=True)
    spec = {"argv": argv, "display_name": "bare", "language": "python"}
    (folder / "kernels/bare/kernel.json").write_text(json.dumps(spec))
    specs = KernelSpecManager(kernel_dirs=[str(folder / "kernels")])
    manager = KernelManager(kernel_name="bare", kernel_spec_manager=specs)
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, km=manager, timeout=900, resources={"metadata": {"path": str(work)}})
    with client.setup_kernel(env=environment):
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
    return notebook


def code_of(cell) -> str:
    return cell.source.replace(re.search(r'qft_unpack\("""\n(.*?)\n"""\)', cell.source, re.DOTALL)[0], "")


def test_wheel_is_the_same_every_time_whatever_the_dates(book):
    first = colab.build_wheel(book / "qft_utils", "0.1.0")
    os.utime(book / "qft_utils/inner.py", (0, 0))
    assert colab.build_wheel(book / "qft_utils", "0.1.0") == first
    (book / "qft_utils/inner.py").write_text("ANSWER = 43\n")
    assert colab.build_wheel(book / "qft_utils", "0.1.0") != first


def test_wheel_holds_every_module_of_the_real_package():
    archive = zipfile.ZipFile(BytesIO(colab.build_wheel(ROOT / "qft_utils", "0.1.0")))
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "qft_utils").rglob("*.py")}
    assert modules <= set(archive.namelist())
    assert not [name for name in archive.namelist() if "__pycache__" in name]
    assert archive.testzip() is None


def test_pip_accepts_the_wheel(book, tmp_path):
    wheel = tmp_path / "qft_utils-0.1.0-py3-none-any.whl"
    wheel.write_bytes(colab.build_wheel(book / "qft_utils", "0.1.0"))
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", tmp_path / "lib"]
    subprocess.run([*pip, wheel], check=True, capture_output=True)
    assert (tmp_path / "lib/qft_utils/inner.py").read_text() == "ANSWER = 42\n"


def test_folder_without_a_package_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="__init__"):
        colab.build_wheel(tmp_path, "1.0")


def test_copy_starts_folded_keeps_outputs_and_leaves_the_original(book, tmp_path):
    before = (book / "notebooks/01_toy.ipynb").read_bytes()
    notebook = nbformat.read(write_toy(book, tmp_path), as_version=4)
    nbformat.validate(notebook)
    first = notebook.cells[0]
    assert first.metadata.cellView == "form" and "hide-input" in first.metadata.tags
    assert first.source.startswith("#@title")
    assert notebook.cells[3].outputs[0].text == "42 0.1.0 stored\n"
    assert (book / "notebooks/01_toy.ipynb").read_bytes() == before
    assert [p.name for p in (tmp_path / "colab").iterdir()] == ["01_toy.ipynb"]


def test_copy_carries_the_hash_of_the_model(book, tmp_path):
    first = code_of(nbformat.read(write_toy(book, tmp_path), as_version=4).cells[0])
    assert f'"toy-model==1.0": "toy-model==1.0 --hash=sha256:{"0" * 64}"' in first.lower().replace("_", "-")
    assert '"torchao>=0.0.1": "torchao==0.0.1"' in first
    assert not re.search(r'"(torch|torchvision|transformers)\W', first)


@pytest.mark.parametrize(
    ("needs", "problem"),
    [
        ({"wheels": ["absent"]}, "requirements-assets.lock does not pin 'absent'"),
        ({"packages": ["absent"]}, "requirements.lock does not pin 'absent'"),
        ({"packages": ["Torch"]}, "Colab keeps its own"),
    ],
)
def test_needs_that_cannot_be_met_are_refused(book, needs, problem):
    with pytest.raises((KeyError, ValueError), match=problem):
        colab.requirements(book, needs)


def test_model_without_a_hash_is_refused(book):
    (book / "requirements-assets.lock").write_text("toy-model==1.0\n")
    with pytest.raises(ValueError, match="no hash"):
        colab.requirements(book, {"wheels": ["toy-model"]})


def test_failure_names_the_chapter_and_leaves_no_file(book, tmp_path):
    (book / "requirements-assets.lock").write_text("")
    with pytest.raises(ValueError, match="01_toy.ipynb.*toy-model"):
        write_toy(book, tmp_path)
    assert not list((tmp_path / "colab").iterdir())


def test_unavailable_imports_are_named():
    code = "import os, torch.nn\nfrom qft_utils import data\n%matplotlib inline\nimport gguf, pybtex"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    assert colab.unavailable_imports(notebook, []) == {"gguf", "pybtex"}
    assert colab.unavailable_imports(notebook, ["GGUF", "pybtex"]) == set()


def test_imports_of_every_chapter_are_at_hand_in_colab():
    missing = {}
    for source in (ROOT / "notebooks").glob("[0-9][0-9]_*.py"):
        installed, _ = colab.requirements(ROOT, colab.chapter_needs(source))
        names = [re.split("[>=]", requirement)[0] for requirement in installed]
        missing[source.name] = colab.unavailable_imports(jupytext.read(source), names)
    assert {name: lacking for name, lacking in missing.items() if lacking} == {}


def test_a_toy_copy_runs_in_an_empty_folder(book, tmp_path):
    (book / "requirements-assets.lock").write_text(f"pytest=={pytest.__version__} --hash=sha256:{'0' * 64}\n")
    (book / "notebooks/01_toy.py").write_text(CHAPTER.replace("toy-model", "pytest"))
    done = run_copy(write_toy(book, tmp_path), tmp_path / "machine")
    assert done.cells[3].outputs[0].text == "42 0.1.0 stored\n"
    assert not (tmp_path / "machine/pip-ran").exists()


def test_a_copy_that_lacks_a_model_stops_at_its_first_cell(book, tmp_path):
    with pytest.raises(Exception, match=r"needs Toy_Model==1\.0(.|\n)*no pip"):
        run_copy(write_toy(book, tmp_path), tmp_path / "machine")
    assert (tmp_path / "machine/pip-ran").exists()


@pytest.mark.slow
def test_the_first_chapters_copy_runs_in_an_empty_folder(site, tmp_path):
    [path] = (site / "colab").glob("01_*.ipynb")
    done = run_copy(path, tmp_path)
    code = [cell for cell in done.cells if cell.cell_type == "code"]
    assert len(code) > 2 and all(cell.execution_count for cell in code if cell.source.strip())
    assert not (tmp_path / "pip-ran").exists()
