"""What a chapter that ran must have left behind: numbers, and pictures that can be read aloud."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from nbformat import NotebookNode

from tools.layout import BuildError

_NUMBER = {"type": "number"}
_TEXT = {"type": "string", "minLength": 1}
_ENVIRONMENT = ["python", "torch", "torchao", "transformers", "device", "cpu", "threads"]


def _record(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties}


_RANGE = dict.fromkeys(["low", "high", "tolerance"], {"type": ["number", "null"]})
_METRIC = _record(["value", "unit"], value=_NUMBER, unit=_TEXT, **_RANGE)
_CLAIM = _record(["text", "holds"], text=_TEXT, holds={"type": "boolean"})
SCHEMA = _record(
    ["chapter", "environment", "seconds", "peak_memory_mb", "metrics", "claims"],
    environment=_record(_ENVIRONMENT),
    seconds={"type": "number", "minimum": 0},
    peak_memory_mb={"type": "number", "exclusiveMinimum": 0},
    metrics={"type": "object", "additionalProperties": _METRIC},
    claims={"type": "array", "items": _CLAIM},
)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number that a result may hold")


def check_result(path: Path, name: str) -> None:
    """Raises BuildError unless `path` is chapter `name`'s result file with at least one metric."""
    problem = _problem(path, name)
    if problem:
        raise BuildError(f"notebooks/{name}.py {problem}")


def _problem(path: Path, name: str) -> str | None:
    if not path.is_file():
        return f"records no metric: it wrote no {name}.json; end it with finish() of qft_utils.results"
    try:
        result = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except ValueError as problem:
        return f"wrote a {path.name} that is not valid JSON ({problem}): write it with qft_utils.results"
    for problem in Draft202012Validator(SCHEMA).iter_errors(result):
        where = "/".join(str(part) for part in problem.absolute_path) or "top level"
        return f"wrote {path.name}, where {where}: {problem.message}; write it with qft_utils.results"
    if result["chapter"] != name:
        return f"calls itself {result['chapter']!r}: call start({name!r}) in its first cell"
    return None if result["metrics"] else "records no metric: call metric(...) of qft_utils.results"


def check_outputs(notebook: NotebookNode, name: str, folders: Iterable[Path]) -> None:
    """Raises BuildError for the first output of chapter `name` that shows one of `folders` of this machine."""
    private = [str(folder) for folder in folders if folder != folder.parent]
    for number, cell in enumerate(notebook.cells, start=1):
        shown = json.dumps(cell.get("outputs", []), ensure_ascii=False)
        for path in private:
            if path in shown:
                raise BuildError(
                    f"notebooks/{name}.py, cell {number} shows {path}, a folder of this machine: end the cell's last "
                    "line with ';', or silence the warning that names it, with the reason"
                )


def check_images(notebook: NotebookNode, name: str) -> None:
    """Raises BuildError for the first picture without alternative text in chapter `name`."""
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type == "markdown":
            bare = re.search(r"!\[\s*\]", cell.source) or _bare_img(cell.source)
            remedy = "write it: ![what a sighted reader concludes](…)"
        else:
            bare = _has_bare_output(cell)
            remedy = 'add {"mystnb": {"image": {"alt": "…"}}} to the cell\'s metadata'
        if bare:
            where = f"notebooks/{name}.py, cell {number}"
            raise BuildError(f"{where}: an image without alternative text: {remedy}")


def _bare_img(html: str) -> bool:
    return any(not re.search(r"""\balt\s*=\s*["']?\s*[^\s"'>]""", tag) for tag in re.findall(r"<img\b[^>]*>", html))


def _has_bare_output(cell: NotebookNode) -> bool:
    alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "").strip()
    data = [output.data for output in cell.get("outputs", []) if "data" in output]
    pictured = any(kind.startswith("image/") for bundle in data for kind in bundle)
    return (pictured and not alt) or any(_bare_img("".join(b.get("text/html", ""))) for b in data)
