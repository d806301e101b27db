"""Measurements against closed forms, SciPy, simulation, and callables that keep a diary."""

import math
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from qft_utils import measure
from qft_utils.measure import Latency


def wilson(right: int, n: int) -> tuple[float, float]:
    z, p = 1.959963984540054, right / n
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_accuracy_is_wilsons_closed_form(counts):
    right, n = counts
    got = measure.accuracy([1] * right + [0] * (n - right), torch.ones(n, dtype=torch.long))
    assert got.value == right / n
    assert (got.low, got.high) == pytest.approx(wilson(right, n), abs=1e-12)
    assert got.low <= got.value <= got.high


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([], [], "shape"),
        ([1, 2], [1], "2 predictions but 1 labels"),
        (torch.zeros(3, 2), [1, 2, 3], r"\(3, 2\)"),
    ],
)
def test_accuracy_refuses(predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        measure.accuracy(predictions, labels)


def paired(both: int, only_a: int, only_b: int, neither: int):
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return np.array(a), torch.tensor(b)


@given(st.integers(0, 20), st.integers(0, 12), st.integers(0, 12), st.integers(1, 20))
def test_mcnemar_is_a_sum_of_binomial_coefficients(both, only_a, only_b, neither):
    got = measure.compare_paired(*paired(both, only_a, only_b, neither))
    m, k = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(m, i) for i in range(k + 1)) / 2**m
    assert got.p_value == pytest.approx(min(1, 2 * tail))
    n = both + m + neither
    assert got.difference.value == pytest.approx((only_b - only_a) / n)
    assert -1 <= got.difference.low <= got.difference.value <= got.difference.high <= 1


def test_the_interval_is_walds_on_the_table_with_half_an_example_more_in_each_cell():
    got = measure.compare_paired(*paired(794, 86, 150, 570)).difference
    p_a, p_b, n = 86.5 / 1602, 150.5 / 1602, 1602  # Wald: d +- z sqrt(p_a + p_b - d^2) / sqrt(n)
    half = stats.norm.ppf(0.975) * math.sqrt((p_a + p_b - (p_b - p_a) ** 2) / n)
    assert (got.low, got.high) == pytest.approx((p_b - p_a - half, p_b - p_a + half), abs=1e-12)


def test_the_paired_interval_covers_the_true_difference_as_often_as_it_says():
    random = np.random.default_rng(0)
    cells, n, trials = [0.75, 0.06, 0.10, 0.09], 120, 1500  # both, only a, only b, neither
    tables = random.multinomial(n, cells, size=trials)
    differences = [measure.compare_paired(*paired(*table)).difference for table in tables]
    covered = sum(d.low <= 0.04 <= d.high for d in differences)
    assert stats.binomtest(covered, trials, 0.95).pvalue > 1e-3


@pytest.mark.parametrize(
    ("only_a", "only_b", "tie"), [(0, 0, True), (5, 5, True), (0, 5, True), (30, 2, False), (2, 30, False)]
)
def test_a_tie_is_what_cannot_be_told_apart(only_a, only_b, tie):
    assert measure.compare_paired(*paired(100, only_a, only_b, 20)).tie is tie


def test_compare_paired_refuses_labels_and_other_lengths():
    with pytest.raises(ValueError, match="int64"):
        measure.compare_paired([True, False], np.array([3, 4]))
    with pytest.raises(ValueError, match="1 correct_a but 2 correct_b"):
        measure.compare_paired([True], [True, False])


def test_estimate_scales_to_points():
    points = measure.Estimate(-0.25, -0.5, 0.125).scaled(100)
    assert points.as_dict() == {"value": -25, "low": -50, "high": 12.5}
    with pytest.raises(ValueError, match="-1"):
        measure.Estimate(0.0, 0.0, 0.0).scaled(-1)


def test_latency_interleaves_in_an_order_that_changes_and_repeats_from_run_to_run():
    def diary() -> list[str]:
        calls: list[str] = []
        contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
        result = measure.latency(contenders, rounds=8, warmup=2)
        assert [len(result[name].times) for name in "abc"] == [8, 8, 8]
        return calls

    calls = diary()
    rounds = ["".join(calls[i : i + 3]) for i in range(0, 30, 3)]
    assert len(calls) == 30
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 2
    assert diary() == calls


def test_latency_measures_milliseconds_and_drops_the_warmup():
    waits = iter([0.2, 0.02, 0.02, 0.02])
    got = measure.latency({"sleep": lambda: time.sleep(next(waits))}, rounds=3, warmup=1)["sleep"]
    assert min(got.times) >= 20
    assert got.median < 200
    assert (got.q1, got.median, got.q3) == tuple(np.percentile(got.times, [25, 50, 75]))


def test_a_median_has_the_sign_tests_interval_and_too_few_rounds_have_none():
    times = tuple(float(t) for t in range(1, 31))
    got = measure.Latency(15.5, 8.25, 22.75, times).as_dict()
    assert got == {"value": 15.5, "low": 10.0, "high": 21.0}  # 10th and 21st of 30: the tables of the sign test
    with pytest.raises(ValueError, match="5 rounds"):
        measure.Latency(3.0, 2.0, 4.0, times[:5]).as_dict()


def test_threads_are_fixed_inside_and_restored_outside_also_after_an_error():
    before, seen = torch.get_num_threads(), []
    watch = {"a": lambda: seen.append(torch.get_num_threads())}
    measure.latency(watch, rounds=2, warmup=0, threads=before + 1)
    assert seen == [before + 1] * 2
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError):
        measure.latency({"a": lambda: 1 / 0}, threads=before + 1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("bad", [{"contenders": {}}, {"contenders": {"a": int}, "rounds": 0}])
def test_latency_refuses_nothing_to_time(bad):
    with pytest.raises(ValueError, match="need contenders"):
        measure.latency(**bad)


def made_of(times) -> Latency:
    return Latency(float(np.median(times)), *np.quantile(times, [0.25, 0.75]), tuple(times))


def test_speed_ratio_pairs_the_rounds():
    fast = [1.0, 10.0, 2.0, 5.0, 3.0, 1.5]
    got = measure.speed_ratio(made_of([2 * t for t in fast]), made_of(fast))
    assert got == measure.Estimate(2.0, 2.0, 2.0)


@given(st.lists(st.floats(0.5, 8), min_size=6, max_size=60))
def test_speed_ratio_interval_is_scipys_quantile_interval(ratios):
    got = measure.speed_ratio(made_of(ratios), made_of([1.0] * len(ratios)))
    expected = stats.quantile_test(ratios, p=0.5).confidence_interval(0.95)
    assert (got.low, got.high) == (expected.low, expected.high)
    assert got.value == np.median(ratios)


def test_speed_ratio_refuses_too_few_other_and_zero_rounds():
    five, six = made_of([1.0] * 5), made_of([1.0] * 6)
    for slow, fast in [(five, five), (five, six), (six, five)]:
        with pytest.raises(ValueError, match="rounds=6 or more"):
            measure.speed_ratio(slow, fast)
    with pytest.raises(ValueError, match="no measurable time"):
        measure.speed_ratio(six, made_of([0.0] * 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_bytes_of_a_state_dict_are_its_numbers_and_a_small_header(dtype):
    state = {"weight": torch.zeros(300, 1000, dtype=dtype), "bias": torch.zeros(0)}
    overhead = measure.bytes_on_disk(state) - 300_000 * dtype.itemsize
    assert 0 < overhead < 4096


def test_bytes_count_packed_parameters_and_subclasses(tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def linear() -> torch.nn.Sequential:
        return torch.nn.Sequential(torch.nn.Linear(512, 512, bias=False))

    quantized = linear()
    quantize_(quantized, Int8WeightOnlyConfig())
    packed = torch.ao.quantization.quantize_dynamic(linear(), dtype=torch.qint8)
    for model in (quantized, packed):
        assert 512 * 512 < measure.bytes_on_disk(model.state_dict()) < 512 * 512 + 512 * 4 + 8192
    torch.save(quantized.state_dict(), tmp_path / "weights.pt")
    assert measure.bytes_on_disk(quantized.state_dict()) == measure.bytes_on_disk(tmp_path / "weights.pt")


def test_bytes_of_files_and_folders(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "one").write_bytes(b"x" * 10)
    (tmp_path / "inner" / "two").write_bytes(b"x" * 32)
    assert measure.bytes_on_disk(str(tmp_path / "one")) == 10
    assert measure.bytes_on_disk(tmp_path) == 42
    with pytest.raises(FileNotFoundError):
        measure.bytes_on_disk(tmp_path / "three")
    with pytest.raises(TypeError, match="Linear"):
        measure.bytes_on_disk(torch.nn.Linear(2, 2))


def test_peak_memory_sees_what_was_taken_and_given_back():
    with measure.peak_memory() as use:
        block = np.ones(25_000_000)  # 200 MB, and every page is written
        time.sleep(0.05)
        del block
    assert 195 <= use.growth_mb < 300
    assert use.peak_mb > use.growth_mb
    with measure.peak_memory() as idle:
        time.sleep(0.03)
    assert idle.growth_mb < 50


def test_peak_memory_is_filled_when_the_block_fails():
    with pytest.raises(KeyError), measure.peak_memory() as use:
        raise KeyError("inside")
    assert use.peak_mb > 0


def test_speed_ratio_interval_widens_as_rounds_scatter():
    one = made_of([1.0] * 30)
    random = np.random.default_rng(0)
    widths = [measure.speed_ratio(made_of(2 + s * random.random(30)), one) for s in (0.01, 0.1, 1.0)]
    assert all(a.high - a.low < b.high - b.low for a, b in pairwise(widths))
