"""How a measured number is printed: with its unit, and only the digits that would survive a second run."""

import difflib
import math
import numbers
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# unit -> (factor from the stored to the printed number, what is printed after it)
UNITS: dict[str, tuple[float, str]] = {
    "fraction": (100, " %"),
    "points": (1, " points"),
    "us": (1, " µs"),
    "ms": (1, " ms"),
    "s": (1, " s"),
    "MB": (1, " MB"),
    "bytes": (1, " bytes"),
    "ratio": (1, "×"),
    "dB": (1, " dB"),
    "bits": (1, " bits"),
    "count": (1, ""),
    "number": (1, ""),
    "tokens/s": (1, " tokens/s"),
    "images/s": (1, " images/s"),
    "perplexity": (1, ""),
    "nats": (1, " nats"),
}


@dataclass(frozen=True)
class Metric:
    """One measured number: `value`, `low`, `high` and `tolerance` are all in `unit`."""

    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    tolerance: float | None = None
    source: str = "this run"

    @property
    def uncertainty(self) -> float:
        """The larger of the interval's half-width and the tolerance; 0 for an exact count."""
        half_width = 0.0 if self.low is None or self.high is None else (self.high - self.low) / 2
        return max(half_width, self.tolerance or 0.0)

    def __format__(self, spec: str) -> str:
        """`""`: number and unit; `"ci"`: with its interval; anything else: Python's format of the value."""
        if spec not in ("", "ci"):
            return format(self.value, spec)
        factor, suffix = _scale(self)
        place = _last_place(self, factor)

        def digits(number: float) -> str:
            return round_to(number * factor, place)

        shown = digits(self.value) + suffix
        ends = [digits(end) for end in (self.low, self.high) if end is not None]
        if spec == "ci" and len({digits(self.value), *ends}) > 1:  # else the digits hide the interval: it says nothing
            shown += f" [{', '.join(ends)}]"
        elif spec == "ci" and not ends and self.tolerance is not None:
            shown += f" ± {digits(self.tolerance)}"
        return shown


def _scale(metric: Metric) -> tuple[float, str]:
    if metric.unit != "bytes" or abs(metric.value) < 1000:
        return UNITS[metric.unit]
    return (1e-6, " MB") if abs(metric.value) >= 1e6 else (1e-3, " kB")


def _last_place(metric: Metric, factor: float) -> int:
    """Exponent of the last decimal place to print: 0 for units, -1 for tenths, 1 for tens."""
    if metric.uncertainty > 1e-12 * abs(metric.value):  # less is the rounding of equal numbers' mean
        return decimal_place(metric.uncertainty * factor)
    if factor == 1 and float(metric.value).is_integer():
        return 0
    return decimal_place(metric.value * factor) - 2  # exact, but scaled: three significant digits


def decimal_place(number: float) -> int:
    """Power of ten of the first significant digit, after rounding to that digit: 0.96 -> 0, 17 -> 1."""
    return int(f"{abs(number):.0e}".partition("e")[2]) if number else 0


def round_to(number: float, place: int) -> str:
    """Decimal text of `number` rounded to `10**place`: `round_to(1234.5, 1) == "1,230"`; never "-0"."""
    return f"{round(number, -place):z,.{max(0, -place)}f}"


class _Template(string.Formatter):
    """`str.format` whose names are keyword values or metrics, the latter with a slash in the name."""

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self.metrics = metrics

    def get_field(self, field_name: str, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        known = {**self.metrics, **kwargs}
        if field_name not in known:
            close = difflib.get_close_matches(field_name, known, n=3, cutoff=0.4)
            hint = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(known) or 'none'}"
            raise ValueError(f"no metric and no value is named {field_name!r}; {hint}")
        return known[field_name], field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        real = isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral)
        if real and not math.isfinite(value):
            raise ValueError(f"{value} cannot stand in a sentence: measure it again")
        if real and not format_spec:
            raise ValueError(f"say how many digits of {value!r} are worth printing, for example {{name:.1f}}")
        return format(value, format_spec)

    def check_unused_args(self, used_args: set[Any], args: Any, kwargs: Mapping[str, Any]) -> None:
        if unused := sorted(set(kwargs) - used_args):
            raise ValueError(f"given but not in the sentence: {', '.join(unused)}")


def placeholders(template: str) -> list[str]:
    """Names between braces in `template`, in order."""
    return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]


def render(template: str, metrics: Mapping[str, Metric], values: Mapping[str, Any]) -> str:
    """Fill `template` from `metrics` and `values`.

    Raises ValueError for an unknown name, a value that is not used, or a float without a format.
    """
    return _Template(metrics).vformat(template, (), values)
