"""A chapter runs as the contract says, or is refused with a line that names the file and the remedy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tools import contract, execute, pairs, promote
from tools.layout import BuildError, Chapter, chapters, find, key

CONNECT = "\n# %%\nimport socket\ntry:\n    socket.create_connection(('192.0.2.1', 80), 1)\n"


def committed(chapter: Chapter) -> tuple[bytes, bytes]:
    return chapter.notebook.read_bytes(), chapter.result.read_bytes()


@pytest.fixture
def foreign_kernel(tmp_path, monkeypatch):
    """A user's own kernel `python3`, which does not even start."""
    spec = tmp_path / "user" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text('{"argv": ["/bin/false"], "display_name": "mine", "language": "python"}')
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "user"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")


@pytest.fixture
def published(tiny):
    """The tiny chapter with an older notebook and result in place."""
    tiny.notebook.write_text("old notebook")
    tiny.result.write_text("old result")
    return tiny


def test_runs_once_and_promotes_a_tidy_pair(tiny, tmp_path, capsys, foreign_kernel):
    assert execute.execute(tiny)
    assert not execute.execute(tiny)
    assert "unchanged" in capsys.readouterr().out
    execute.promote([tiny])
    pairs.check_pair(tiny)
    notebook = nbformat.read(tiny.notebook, as_version=4)
    assert notebook.cells[1].outputs[-1].data["image/png"]
    assert not any("execution" in cell.metadata for cell in notebook.cells)
    assert json.loads(tiny.result.read_text())["metrics"]["speed/tiny"]["value"] == 2
    assert tiny.figure.read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.rglob("*.new"))


def test_raising_cell_is_named_and_nothing_is_touched(published):
    before = committed(published)
    with published.source.open("a") as source:
        source.write("\n# %%\nbroken = 1 / 0\n")
    with pytest.raises(
        BuildError, match=r"(?s)1 / 0.*notebooks/01_tiny.py, cell 4 raised ZeroDivisionError.*NAME=01"
    ):
        execute.execute(published)
    assert committed(published) == before
    assert not published.executed.exists()


@pytest.mark.parametrize(
    "rest, message",
    [
        ("finally: pass\n", "cell 4 raised NetworkBlocked"),
        ("except Exception: pass\n", "reached for the network"),
    ],
)
def test_network_is_blocked(tiny, rest, message):
    """192.0.2.1 is an address that no machine has (RFC 5737); code that hides the exception is found too."""
    with tiny.source.open("a") as source:
        source.write(CONNECT + rest)
    with pytest.raises(BuildError, match=message):
        execute.execute(tiny)


def guarded(code: str, log: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(execute.GUARD), "QFT_OFFLINE_LOG": str(log)}
    command = [sys.executable, "-c", f"import socket, urllib.request\n{code}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "code",
    [
        "socket.create_connection(('192.0.2.1', 80), 1)",
        "socket.getaddrinfo('example.invalid', 80)",
        "socket.gethostbyname('example.invalid')",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'', ('192.0.2.1', 53))",
        "urllib.request.urlopen('http://192.0.2.1/')",
    ],
)
def test_guard_refuses_and_notes(code, tmp_path):
    assert "NetworkBlocked" in guarded(code, tmp_path / "log").stderr
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_guard_lets_this_machine_talk_to_itself(tmp_path):
    code = "\n".join(
        [
            "server = socket.create_server(('127.0.0.1', 0))",
            "socket.create_connection(server.getsockname())",
            "socket.getaddrinfo('localhost', 80); socket.getaddrinfo(None, 80, type=socket.SOCK_STREAM)",
            "a, b = socket.socketpair(); a.sendall(b'x')",
            "u = socket.socket(socket.AF_UNIX); u.connect_ex('/nowhere')",
        ]
    )
    done = guarded(code, tmp_path / "log")
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    "path", ["notebooks/01_tiny.py", "qft_utils/deep/new.py", "requirements.lock", "results/sweeps/a.json"]
)
def test_key_follows_what_outputs_depend_on(tiny, path):
    tiny.source.write_text(tiny.source.read_text() + '# reads "results/sweeps/a.json"\n')
    before = key(tiny)
    file = tiny.root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as handle:
        handle.write("\n")
    assert key(tiny) != before


def test_key_is_blind_to_a_sweep_that_the_chapter_does_not_name(tiny):
    before = key(tiny)
    (tiny.root / "results" / "sweeps").mkdir()
    (tiny.root / "results" / "sweeps" / "other.json").write_text("{}")
    assert key(tiny) == before


def test_find_names_what_there_is(tiny_book):
    assert find("01", tiny_book) == find("01_tiny", tiny_book) == chapters(tiny_book)[0]
    with pytest.raises(BuildError, match="NAME=7: .*01_tiny"):
        find("7", tiny_book)


def test_title_is_the_first_heading(tiny):
    assert tiny.title == "Tiny"


def result(**changes):
    parts = ["python", "torch", "torchao", "transformers", "device", "cpu", "threads"]
    good = {"chapter": "01_tiny", "environment": dict.fromkeys(parts, ""), "seconds": 1, "peak_memory_mb": 1}
    return good | {"metrics": {"a/b": {"value": 1, "unit": "ratio"}}, "claims": []} | changes


def test_good_result_passes(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(result()))
    assert contract.check_result(tmp_path / "r.json", "01_tiny") is None


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "records no metric: it wrote no 01_tiny.json"),
        ("{", "not valid JSON"),
        (json.dumps(result(metrics={})), "records no metric"),
        (json.dumps(result(metrics={"a": {"value": float("nan"), "unit": "s"}})), "NaN is no number"),
        (json.dumps(result(metrics={"a": {"value": 1}})), "metrics/a: 'unit' is a required property"),
        (json.dumps(result(chapter="02_other")), "calls itself '02_other'"),
        (json.dumps(result(environment={})), "environment: 'python' is a required property"),
        (json.dumps(result(claims=[{"text": "x", "holds": "yes"}])), "claims/0/holds"),
    ],
)
def test_bad_result_is_refused(tmp_path, content, message):
    path = tmp_path / "01_tiny.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BuildError, match=message) as refused:
        contract.check_result(path, "01_tiny")
    assert "notebooks/01_tiny.py" in str(refused.value)


def code_cell(data: dict, alt: str = "") -> nbformat.NotebookNode:
    cell = nbformat.v4.new_code_cell("plot()", outputs=[nbformat.v4.new_output("display_data", data)])
    cell.metadata = nbformat.from_dict({"mystnb": {"image": {"alt": alt}}} if alt else {})
    return cell


@pytest.mark.parametrize(
    "cell, good",
    [
        (code_cell({"image/png": "aGk="}), False),
        (code_cell({"image/png": "aGk="}, alt="A line that rises"), True),
        (code_cell({"text/html": "<img src='a.png'>"}), False),
        (code_cell({"text/html": "<img src='a.png' alt='A line'>"}), True),
        (code_cell({"text/plain": "1"}), True),
        (nbformat.v4.new_markdown_cell("![](a.png)"), False),
        (nbformat.v4.new_markdown_cell("![A line](a.png)"), True),
    ],
)
def test_images_need_alternative_text(cell, good):
    notebook = nbformat.v4.new_notebook(cells=[cell])
    if good:
        assert contract.check_images(notebook, "01_tiny") is None
        return
    with pytest.raises(BuildError, match="notebooks/01_tiny.py, cell 1: an image without alternative text: "):
        contract.check_images(notebook, "01_tiny")


def test_readme_figure_must_be_a_picture():
    cell = code_cell({"text/plain": "1"})
    cell.metadata["tags"] = ["readme-figure"]
    with pytest.raises(BuildError, match="cell 1 is tagged readme-figure but shows no PNG"):
        execute.readme_figure(nbformat.v4.new_notebook(cells=[cell]), "01_tiny")


@pytest.mark.parametrize("fails", ["shutil.copyfile", "os.replace"])
@pytest.mark.parametrize("problem", [KeyboardInterrupt, OSError])
def test_interrupted_promotion_changes_nothing(published, monkeypatch, fails, problem):
    """The second file of three fails, while it is copied or while it is renamed."""
    before = committed(published)
    published.executed.mkdir(parents=True)
    for target in (published.notebook, published.result, published.figure):
        (published.executed / target.name).write_text("new")
    module, name = fails.split(".")
    original, calls = getattr(getattr(promote, module), name), []

    def second_fails(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise problem
        return original(*arguments)

    monkeypatch.setattr(getattr(promote, module), name, second_fails)
    with pytest.raises(problem):
        execute.promote([published])
    assert committed(published) == before
    assert not published.figure.exists()
    assert not [path for path in Path(published.root).rglob("*.new") if path.is_file()]


@pytest.mark.parametrize(
    ("text", "good"),
    [("PosixPath('/home/somebody/book/x.json')", False), ("/home/other", True), ("/", True), ("all is well", True)],
)
def test_outputs_show_no_folder_of_this_machine(text, good):
    cell = nbformat.v4.new_code_cell("x", outputs=[nbformat.v4.new_output("stream", text=text)])
    notebook = nbformat.v4.new_notebook(cells=[cell])
    folders = [Path("/home/somebody/book"), Path("/home/somebody"), Path("/")]
    if good:
        assert contract.check_outputs(notebook, "01_tiny", folders) is None
        return
    with pytest.raises(BuildError, match="01_tiny.py, cell 1 shows /home/somebody/book"):
        contract.check_outputs(notebook, "01_tiny", folders)
