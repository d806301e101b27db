"""The record of a chapter, its digits, its glue as MyST-NB itself reads it, and stored sweeps."""

import json
import math
import os

import nbformat
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from qft_utils import formatting, results, storage
from qft_utils.formatting import Metric


@pytest.fixture(autouse=True)
def record(tmp_path, monkeypatch):
    monkeypatch.setenv("QFT_RESULTS_DIR", str(tmp_path / "out"))
    monkeypatch.delenv("QFT_STRICT", raising=False)
    monkeypatch.setattr(results, "_record", None)
    results.start("05_int8")
    return tmp_path / "out" / "05_int8.json"


@pytest.mark.parametrize(
    ("metric", "plain", "ci"),
    [
        (Metric(0.8412, "fraction", 0.823, 0.855), "84 %", "84 % [82, 86]"),
        (Metric(0.88412, "fraction", 0.8806, 0.8877), "88.4 %", "88.4 % [88.1, 88.8]"),
        (Metric(1, "fraction", 0.9, 1), "100 %", "100 % [90, 100]"),
        (Metric(-0.3, "points", -2.0, 1.4), "0 points", "0 points [-2, 1]"),
        (Metric(5.4321, "ms", 5.38, 5.49), "5.43 ms", "5.43 ms [5.38, 5.49]"),
        (Metric(5.4321, "ms", tolerance=0.96), "5 ms", "5 ms ± 1"),
        (Metric(1234.5, "tokens/s", tolerance=60), "1,230 tokens/s", "1,230 tokens/s ± 60"),
        (Metric(2.345, "ratio", 2.2, 2.5), "2.3×", "2.3× [2.2, 2.5]"),
        (Metric(3.2e-7, "nats", tolerance=1e-8), "0.00000032 nats", "0.00000032 nats ± 0.00000001"),
        (Metric(12808, "count"), "12,808", "12,808"),
        (Metric(17012345, "bytes"), "17.0 MB", "17.0 MB"),
        (Metric(538_000_000, "bytes"), "538 MB", "538 MB"),
        (Metric(4200, "bytes"), "4.20 kB", "4.20 kB"),
        (Metric(0, "bytes"), "0 bytes", "0 bytes"),
        (Metric(2_000_000, "bytes", tolerance=30_000), "2.00 MB", "2.00 MB ± 0.03"),
        (Metric(2.0, "ratio", 2.0, 2.0), "2×", "2×"),
        (Metric(np.mean([0.1] * 3), "fraction", low=0.1 - 1e-17, high=0.1 + 3e-17), "10.0 %", "10.0 %"),
    ],
)
def test_digits(metric, plain, ci):
    assert f"{metric}" == plain
    assert f"{metric:ci}" == ci


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e5))
def test_the_printed_number_is_within_its_uncertainty(value, tolerance):
    shown = float(f"{Metric(value, 'number', tolerance=tolerance)}".replace(",", ""))
    last_place = 10.0 ** formatting.decimal_place(tolerance)
    assert abs(shown - value) <= last_place / 2 * (1 + 1e-6)
    assert last_place <= tolerance / 0.95 * (1 + 1e-9)
    assert shown != 0 or math.copysign(1, shown) == 1


@pytest.mark.parametrize(
    ("name", "value", "unit", "bounds", "message"),
    [
        ("accuracy/a", 0.8, "fraction", {}, "needs low= and high="),
        ("accuracy/a", 0.8, "fraction", {"tolerance": 0.1}, "needs low= and high="),
        ("accuracy/a", 84.0, "fraction", {"low": 80, "high": 90}, "divide by 100"),
        ("accuracy/a", 0.8, "percent", {"low": 0.7, "high": 0.9}, "unknown unit 'percent'"),
        ("latency/a", 3.0, "ms", {"low": 4.0, "high": 5.0}, "not between"),
        ("latency/a", 3.0, "ms", {"low": 2.0}, "together"),
        ("latency/a", 3.0, "ms", {}, "no exact count"),
        ("latency/a", math.nan, "ms", {"tolerance": 1}, "nan"),
        ("latency/a", 3.0, "ms", {"tolerance": math.inf}, "tolerance is inf"),
        ("latency/a", 3.0, "ms", {"tolerance": 0}, "must be positive"),
        ("latency/a", "3", "ms", {"tolerance": 1}, "'3'"),
        ("count/a", True, "count", {}, "True"),
        ("Latency/a", 3, "ms", {}, "lower case"),
        ("latency ms", 3, "ms", {}, "quantity/of_what"),
        ("text/a", 3, "ms", {}, "taken"),
    ],
)
def test_metric_refuses_and_names(name, value, unit, bounds, message):
    with pytest.raises(ValueError, match=message) as error:
        results.metric(name, value, unit, **bounds)
    assert repr(name) in str(error.value)


def test_a_name_is_taken_once():
    results.metric("count/films", np.int64(507), "count")
    assert results.recorded("count/films").value == 507
    with pytest.raises(ValueError, match="'count/films' is already"):
        results.metric("count/films", 508, "count")


def test_nothing_is_recorded_before_start(monkeypatch):
    monkeypatch.setattr(results, "_record", None)
    with pytest.raises(RuntimeError, match="start"):
        results.metric("count/films", 507, "count")
    with pytest.raises(ValueError, match="names a file"):
        results.start("../05_int8")


def test_text_fills_in_metrics_and_values():
    results.metric("accuracy/int8", 0.8412, "fraction", low=0.823, high=0.855)
    sentence = "{accuracy/int8} or {accuracy/int8:ci}, {accuracy/int8:.1%}, {ratio:.1f} times {{as}} {what}"
    rendered = results.text(sentence, ratio=1.96, what="fast")
    assert rendered == "84 % or 84 % [82, 86], 84.1%, 2.0 times {as} fast"


def test_text_refuses_what_it_cannot_fill_in():
    results.metric("count/films", 507, "count")
    with pytest.raises(ValueError, match="'count/film'; did you mean count/films"):
        results.text("{count/film}")
    with pytest.raises(ValueError, match="how many digits of 0.3333"):
        results.text("{third}", third=1 / 3)
    with pytest.raises(ValueError, match="not in the sentence: ratio"):
        results.text("{count/films}", ratio=2)
    with pytest.raises(ValueError, match="nan"):
        results.text("{loss:.2f}", loss=np.float32("nan"))


def test_say_prints_once_and_returns_none(capsys):
    assert results.say("{n} films", n=507) is None
    assert capsys.readouterr().out == "507 films\n"


def test_claims_that_fail_are_shown_or_in_strict_mode_raised(capsys, monkeypatch):
    results.metric("count/films", 507, "count")
    results.claim("{count/films} is many", np.bool_(True))
    results.claim("{count/films} is over {n}", False, n=600)
    assert capsys.readouterr().out == "✓ Checked: 507 is many\n✗ did not hold here: 507 is over 600\n"
    monkeypatch.setenv("QFT_STRICT", "1")
    results.claim("{count/films} is many", True)
    with pytest.raises(results.ClaimFailed, match="507 is over 600"):
        results.claim("{count/films} is over {n}", False, n=600)


@pytest.mark.parametrize("holds", [None, "yes", 1, np.ones(1, dtype=bool)])
def test_a_claim_needs_a_bool_and_a_value(holds):
    with pytest.raises(ValueError, match="pass a bool"):
        results.claim("{n} films", holds, n=507)
    with pytest.raises(ValueError, match="shows no value"):
        results.claim("int8 is {{smaller}}", True)


def test_finish_writes_the_whole_record(record, capsys):
    results.metric("accuracy/int8", np.float32(0.75), "fraction", low=0.5, high=0.875, source="sweep x (abc)")
    results.claim("{accuracy/int8} is over half", True)
    assert results.finish() == record
    assert "| `accuracy/int8` | 80 % [50, 90] | sweep x (abc) |" in capsys.readouterr().out
    content = json.loads(record.read_text(encoding="utf-8"))
    assert content["chapter"] == "05_int8"
    assert content["metrics"] == {
        "accuracy/int8": {
            "value": 0.75,
            "unit": "fraction",
            "low": 0.5,
            "high": 0.875,
            "tolerance": None,
            "source": "sweep x (abc)",
        }
    }
    assert content["claims"] == [{"text": "80 % is over half", "holds": True}]
    recorded = {"python", "torch", "torchao", "transformers", "device", "cpu", "threads"}
    assert set(content["environment"]) == recorded
    assert 50 < content["peak_memory_mb"] < 50_000  # a process that has imported torch, in MB
    assert 0 <= content["seconds"] < 60
    with pytest.raises(RuntimeError, match="start"):
        results.finish()


def test_finish_refuses_an_empty_chapter(record):
    with pytest.raises(ValueError, match="call metric"):
        results.finish()
    assert not record.exists()


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "old.json"
    storage.write_json(path, {"n": 1})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="old.json"):
        storage.write_json(path, {"n": math.nan})
    with pytest.raises(TypeError):
        storage.write_json(path, {"n": object()})

    def broken(*_):
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk"):
        storage.write_json(path, {"n": 2})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["old.json"]


@pytest.mark.parametrize("variable", ["QFT_CACHE", "XDG_CACHE_HOME"])
def test_a_readers_results_go_to_the_cache(variable, tmp_path, monkeypatch):
    for name in ("QFT_RESULTS_DIR", "QFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    inside = {"QFT_CACHE": "results", "XDG_CACHE_HOME": "qft_utils/results"}[variable]
    assert storage.results_dir() == tmp_path / inside


@pytest.fixture
def notebook():
    """What a chapter's `finish()` leaves in its notebook."""
    InteractiveShell.instance()
    try:
        with capture_output() as captured:
            results.metric("accuracy/int8", 0.8412, "fraction", low=0.823, high=0.855)
            results.metric("count/films", 507, "count")
            results.finish()
    finally:
        InteractiveShell.clear_instance()
    pairs = [(output.data, output.metadata or {}) for output in captured.outputs]
    shown = [nbformat.v4.new_output("display_data", data, metadata=metadata) for data, metadata in pairs]
    cells = [nbformat.v4.new_markdown_cell("# Int8"), nbformat.v4.new_code_cell("finish();", outputs=shown)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def test_glue_as_myst_nb_reads_it(notebook, tmp_path):
    from sphinx.application import Sphinx

    for folder in ("notebooks", "book"):
        (tmp_path / folder).mkdir()
    nbformat.write(notebook, tmp_path / "notebooks" / "05_int8.ipynb")
    keys = ["accuracy/int8:.1%", "text/accuracy/int8:s", "ci/accuracy/int8:s", "count/films:d"]
    cited = "\n".join(f"- {{glue:text}}`../notebooks/05_int8.ipynb::{key}`" for key in keys)
    (tmp_path / "book" / "page.md").write_text(f"# Page\n\n{cited}\n", encoding="utf-8")
    (tmp_path / "index.md").write_text("# Index\n\n```{toctree}\nbook/page\nnotebooks/05_int8\n```\n")
    settings = {"extensions": ["myst_nb"], "nb_execution_mode": "off", "html_theme": "basic"}
    out, trees = tmp_path / "html", tmp_path / "doctrees"
    Sphinx(tmp_path, None, out, trees, "html", settings, status=None, warningiserror=True).build()
    page = (out / "book" / "page.html").read_text(encoding="utf-8")
    for shown in ("84.1%", "84 %", "84 % [82, 86]", "507"):
        assert f'<span class="pasted-text">{shown}</span>' in page
    assert "papermill" not in (out / "notebooks" / "05_int8.html").read_text(encoding="utf-8")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "code.py").write_bytes(b"bits = 4\nsteps = 60\n")
    return tmp_path


def test_a_sweep_comes_back_as_it_was_written(checkout):
    path = results.write_sweep("bits", [{"bits": 4, "loss": 0.5}], ["code.py"], 12.34)
    assert path == checkout / "results" / "sweeps" / "bits.json"
    sweep = results.load_sweep("results/sweeps/bits.json")
    assert list(sweep) == ["sweep", "code", "environment", "seconds", "runs"]
    assert (sweep["runs"], sweep["seconds"]) == ([{"bits": 4, "loss": 0.5}], 12.3)
    assert results.sweep_source(sweep).startswith("sweep bits (")
    (checkout / "code.py").write_bytes(b"bits = 4\r\nsteps = 60\r\n")
    assert results.load_sweep(path) == sweep


def test_a_sweep_is_stale_once_its_code_changes_or_goes(checkout):
    path = results.write_sweep("bits", [{"bits": 4}], ["code.py"], 1)
    fresh = results.sweep_source(results.load_sweep(path))
    (checkout / "code.py").write_text("bits = 3\n")
    with pytest.raises(results.StaleSweep, match="code.py has changed.*bits.json.*make sweeps"):
        results.load_sweep(path)
    results.write_sweep("bits", [{"bits": 4}], ["code.py"], 1)
    assert results.sweep_source(results.load_sweep(path)) != fresh
    (checkout / "code.py").unlink()
    with pytest.raises(results.StaleSweep, match="code.py.*gone.*make sweeps"):
        results.load_sweep(path)
    (checkout / "pyproject.toml").unlink()
    assert results.load_sweep(path)["runs"] == [{"bits": 4}]


def test_write_sweep_refuses_nothing_and_missing_code(checkout):
    with pytest.raises(ValueError, match="'bits' needs runs"):
        results.write_sweep("bits", [], ["code.py"], 1)
    with pytest.raises(FileNotFoundError, match="other.py"):
        results.write_sweep("bits", [{"bits": 4}], ["other.py"], 1)
    assert not (checkout / "results").exists()


def test_every_stored_sweep_is_as_old_as_its_code():
    for path in sorted((storage.ROOT / "results" / "sweeps").glob("*.json")):
        assert results.load_sweep(path)["runs"], path.name
