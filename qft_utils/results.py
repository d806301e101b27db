"""What a chapter measured and what it claims: the one way by which numbers reach the text.

    start("05_static_int8")
    metric("accuracy/float32", unit="fraction", **measure.accuracy(predictions, labels).as_dict())
    say("The float model is right on {accuracy/float32:ci} of the test set.")
    claim("Int8 ({accuracy/int8}) loses at most a point.", loss <= 0.01)
    finish();

A page cites a number by MyST-NB's glue. Always end the role with a format, also where it is only `s`:
without one, the role takes the second colon of `::` for the format's and finds nothing.

    {glue:text}`../notebooks/05_static_int8.ipynb::accuracy/float32:.1%`     88.4%
    {glue:text}`../notebooks/05_static_int8.ipynb::text/accuracy/float32:s`  88 %
    {glue:text}`../notebooks/05_static_int8.ipynb::ci/accuracy/float32:s`    88 % [86, 90]
"""

import math
import numbers
import os
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qft_utils import showing, storage
from qft_utils.formatting import UNITS, Metric, placeholders, render
from qft_utils.sweeps import StaleSweep, load_sweep, sweep_source, write_sweep

__all__ = ["ClaimFailed", "Metric", "StaleSweep", "claim", "finish", "load_sweep", "metric", "recorded", "say"]
__all__ += ["start", "sweep_source", "text", "write_sweep"]

_NAME = re.compile(r"[a-z0-9_-]+(/[a-z0-9_-]+)*")


class ClaimFailed(AssertionError):
    """A claim of the book does not hold in this run, and `QFT_STRICT=1` makes that an error."""


@dataclass
class _Record:
    chapter: str
    began: float = field(default_factory=time.perf_counter)
    metrics: dict[str, Metric] = field(default_factory=dict)
    claims: list[dict[str, Any]] = field(default_factory=list)
    costs: Any = None  # IPython's handle of the line under the title that `finish` fills in


_record: _Record | None = None


def start(chapter: str) -> None:
    """Begin the record of `chapter`, the stem of its notebook's file name, and drop one left unfinished.

    The clock starts here. The peak memory that `finish` writes is that of the whole process. In a notebook
    a line is shown in which `finish` will say what the whole chapter cost.
    """
    global _record
    if not re.fullmatch(r"[A-Za-z0-9_-]+", chapter):
        raise ValueError(f"chapter {chapter!r} names a file: use letters, digits, '-' and '_'")
    _record = _Record(chapter)
    _record.costs = showing.reserve("*What this chapter costs will stand here when its last cell has run.*")


def _current() -> _Record:
    if _record is None:
        raise RuntimeError("no record is open: call start('NN_name') first, in the chapter's first cell")
    return _record


def metric(
    name: str,
    value: float,
    unit: str,
    *,
    low: float | None = None,
    high: float | None = None,
    tolerance: float | None = None,
    source: str = "this run",
) -> None:
    """Record one measured number.

    `name` is "quantity/of_what". `low` and `high` bound an interval; `tolerance` says how far an honest
    re-run may land. All are in `unit`, one of `formatting.UNITS`: a "fraction" is 0.84 and prints as 84 %,
    "points" are percentage points. Only an exact integer may come without interval and tolerance.
    Raises ValueError if any of that does not hold, or if `name` is taken.
    """
    record = _current()
    if not _NAME.fullmatch(name) or name.startswith(("text/", "ci/")):
        raise ValueError(f"metric {name!r}: write it in lower case, quantity/of_what (text/ and ci/ are taken)")
    if name in record.metrics:
        raise ValueError(f"metric {name!r} is already recorded: pick another name, or run again from start()")
    if unit not in UNITS:
        raise ValueError(f"metric {name!r}: unknown unit {unit!r}; use one of {', '.join(UNITS)}")
    parts = {"value": value, "low": low, "high": high, "tolerance": tolerance}
    plain = {part: _plain(name, part, number) for part, number in parts.items()}
    made = Metric(**plain, unit=unit, source=source)
    _check(name, made)
    record.metrics[name] = made


def recorded(name: str) -> Metric:
    """The metric of that name, with its unit and its uncertainty, for a figure or a table of this chapter.

    Raises ValueError for a name that was not recorded.
    """
    metrics = _current().metrics
    if name not in metrics:
        raise ValueError(f"no metric is named {name!r}; recorded: {', '.join(metrics) or 'none'}")
    return metrics[name]


def _plain(name: str, part: str, number: Any) -> int | float | None:
    """The Python number behind a NumPy one, so that JSON and repr show a number and nothing else."""
    if number is None and part != "value":
        return None
    if not isinstance(number, numbers.Real) or isinstance(number, bool) or not math.isfinite(number):
        raise ValueError(f"metric {name!r}: {part} is {number!r}, no finite number (tensors: .item())")
    return int(number) if isinstance(number, numbers.Integral) else float(number)


def _check(name: str, made: Metric) -> None:
    value, low, high, tolerance = made.value, made.low, made.high, made.tolerance
    bare = low is None and high is None
    problem = None
    if (low is None) != (high is None):
        problem = f"give low and high together: got low={low}, high={high}"
    elif not bare and not low <= value <= high:
        problem = f"{value} is not between low={low} and high={high}"
    elif tolerance is not None and tolerance <= 0:
        problem = f"tolerance {tolerance} must be positive; leave it out of exact counts"
    elif made.unit == "fraction" and not 0 <= value <= 1:
        problem = f"{value} is no fraction; divide by 100, or use 'points' or 'ratio'"
    elif name.startswith("accuracy/") and bare:
        problem = "an accuracy needs low= and high=; measure.accuracy gives all three"
    elif bare and tolerance is None and not isinstance(value, int):
        problem = f"{value} is no exact count, so it needs low= and high=, or tolerance="
    if problem:
        raise ValueError(f"metric {name!r}: {problem}")


def text(template: str, **values: Any) -> str:
    """The sentence `template` with each `{quantity/of_what}` and `{keyword}` filled in.

    A metric without a format prints its unit and the digits that would survive a second run; `:ci` adds
    the interval; any other format is Python's, of the bare value. A float keyword needs a format.
    Raises ValueError for an unknown name, with the close ones, and for a keyword that is not used.
    """
    return render(template, _record.metrics if _record else {}, values)


def say(template: str, **values: Any) -> None:
    """Show the sentence that `text` makes. Returns None, so that a cell's last line prints it once."""
    showing.show(text(template, **values))


def claim(template: str, holds: bool, **values: Any) -> None:
    """Record and show a statement of the book, and whether it `holds` in this run.

    Raises ValueError if the statement shows no value or `holds` is no bool; with `QFT_STRICT=1`,
    ClaimFailed if it does not hold.
    """
    if not placeholders(template):
        raise ValueError(f"claim {template!r} shows no value: put the numbers that decide it in braces")
    if not isinstance(holds, bool | np.bool_):
        raise ValueError(f"claim {template!r}: holds is {holds!r}; pass a bool, such as a comparison")
    statement = text(template, **values)
    _current().claims.append({"text": statement, "holds": bool(holds)})
    if not holds and os.environ.get("QFT_STRICT") == "1":
        raise ClaimFailed(f"does not hold: {statement}")
    showing.show(_verdict(statement, bool(holds)))


def finish() -> Path:
    """Write `<chapter>.json`, show measurements and claims, leave the numbers for glue, close the record.

    The file goes to `storage.results_dir()`. `seconds` is the time since `start`; `peak_memory_mb` is the
    largest resident memory of the process so far, in 10**6 bytes. End the line with `;` in a notebook, or
    the path of your machine is printed. Raises ValueError if nothing was recorded.
    """
    global _record
    record = _current()
    if not record.metrics:
        raise ValueError(f"chapter {record.chapter!r} recorded no metric: call metric(...) before finish()")
    path = storage.results_dir() / f"{record.chapter}.json"
    content = _content(record)
    storage.write_json(path, content)
    showing.show(_summary(record))
    showing.fill(record.costs, _costs(content))
    for name, value in record.metrics.items():
        for key, glued in ((name, value.value), (f"text/{name}", f"{value}"), (f"ci/{name}", f"{value:ci}")):
            showing.glue(key, glued)
    _record = None
    return path


def _content(record: _Record) -> dict[str, Any]:
    return {
        "chapter": record.chapter,
        "environment": storage.environment(),
        "seconds": round(time.perf_counter() - record.began, 1),
        "peak_memory_mb": round(storage.peak_memory_mb(), 1),
        "metrics": {name: asdict(value) for name, value in record.metrics.items()},
        "claims": record.claims,
    }


def _costs(content: dict[str, Any]) -> str:
    on = content["environment"]
    return (
        f"**What it costs.** The run that you see took {content['seconds'] / 60:.1f} minutes and at most "
        f"{content['peak_memory_mb'] / 1000:.1f} GB of memory, on {on['device']} ({on['cpu']}, "
        f"{on['threads']} threads), with torch {on['torch']} and torchao {on['torchao']}."
    )


def _summary(record: _Record) -> str:
    rows = [f"| `{name}` | {value:ci} | {value.source} |" for name, value in record.metrics.items()]
    claims = ["- " + _verdict(**made) for made in record.claims]
    return "\n".join(["| measured | value | from |", "|:--|--:|:--|", *rows, "", *claims])


def _verdict(text: str, holds: bool) -> str:
    return f"✓ Checked: {text}" if holds else f"✗ did not hold here: {text}"
