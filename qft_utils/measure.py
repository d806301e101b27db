"""How well, how fast, how large: measurements that carry their own uncertainty. MB are 10**6 bytes."""

import contextlib
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """For `results.metric(name, unit=..., **estimate.as_dict())`."""
        return asdict(self)

    def scaled(self, factor: float) -> "Estimate":
        """The same in another unit, for example `scaled(100)` from a fraction to points; `factor` > 0."""
        if not factor > 0:
            raise ValueError(f"factor {factor} must be positive: any other would turn the interval over")
        return Estimate(self.value * factor, self.low * factor, self.high * factor)


def _vector(name: str, values: Any) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"{name} has shape {array.shape}: pass one value for each of one or more examples")
    return array


def _pair(first: tuple[str, Any], second: tuple[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    a, b = _vector(*first), _vector(*second)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} {first[0]} but {len(b)} {second[0]}: pass both for the same examples")
    return a, b


def accuracy(predictions: Any, labels: Any) -> Estimate:
    """Fraction of `predictions` [N] that equal `labels` [N], with Wilson's interval (1927, JASA 22).

    Tensors, arrays or sequences of classes. Raises ValueError if empty, not one-dimensional (take
    `.argmax(-1)` of logits first), or of different lengths.
    """
    predictions, labels = _pair(("predictions", predictions), ("labels", labels))
    test = stats.binomtest(int((predictions == labels).sum()), len(labels))
    interval = test.proportion_ci(method="wilson")
    return Estimate(test.statistic, interval.low, interval.high)


@dataclass(frozen=True)
class PairedComparison:
    """Two models on the same examples.

    `difference` is the accuracy of b minus that of a, a fraction. `tie` says that the two cannot be told
    apart: the interval holds 0 or `p_value` is at least 0.05.
    """

    difference: Estimate
    p_value: float
    tie: bool


def compare_paired(correct_a: Any, correct_b: Any) -> PairedComparison:
    """Compare two models by which of the same examples each gets right: two bool vectors [N].

    The p-value is McNemar's exact test on the examples where only one is right (McNemar 1947,
    Psychometrika 12). The interval is Agresti & Min's (2005, Statistics in Medicine 24, "Wald+2"): Wald's
    after adding half an example to each of the four cells, so that it keeps its coverage in small samples.
    Raises ValueError if empty, not one-dimensional, not bool, or of different lengths.
    """
    a, b = _pair(("correct_a", correct_a), ("correct_b", correct_b))
    if a.dtype != bool or b.dtype != bool:
        raise ValueError(f"correct_a is {a.dtype} and correct_b {b.dtype}: pass bool, predictions == labels")
    only_a, only_b, n = int((a & ~b).sum()), int((b & ~a).sum()), len(a)
    difference = _agresti_min(only_a, only_b, n)
    p_value = stats.binomtest(only_b, only_a + only_b).pvalue if only_a + only_b else 1.0
    tie = p_value >= 0.05 or difference.low <= 0 <= difference.high
    return PairedComparison(difference, float(p_value), bool(tie))


def _agresti_min(only_a: int, only_b: int, n: int) -> Estimate:
    total = n + 2
    centre = (only_b - only_a) / total
    half = stats.norm.ppf(0.975) * np.sqrt((only_a + only_b + 1) / total - centre**2) / np.sqrt(total)
    return Estimate((only_b - only_a) / n, float(max(centre - half, -1)), float(min(centre + half, 1)))


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call: median and quartiles over the rounds, and every round in order."""

    median: float
    q1: float
    q3: float
    times: tuple[float, ...]

    def as_dict(self) -> dict[str, float]:
        """For `results.metric(name, unit="ms", **latency.as_dict())`: the median and its 95 % interval.

        Raises ValueError with fewer than 6 rounds, which bound no median with that confidence.
        """
        return _median(self.times).as_dict()


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _timed(call: Callable[[], Any]) -> float:
    # A CUDA call returns before its work is done, so the clock waits for the device on both sides.
    synchronize = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    synchronize()
    begin = time.perf_counter_ns()
    call()
    synchronize()
    return (time.perf_counter_ns() - begin) / 1e6


def latency(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 30,
    warmup: int = 5,
    threads: int | None = None,
) -> dict[str, Latency]:
    """Time every contender once a round, in a new seeded order each round, so that a slow minute hurts all.

    `warmup` rounds go before and are not kept. `threads` is PyTorch's intra-op count during the measurement;
    None keeps the present one. The caller chooses `torch.inference_mode()`.
    Raises ValueError without contenders or with fewer than one round.
    """
    if not contenders or rounds < 1 or warmup < 0:
        got = f"{len(contenders)} contenders, {rounds} rounds, {warmup} warmup rounds"
        raise ValueError(f"need contenders, rounds >= 1 and warmup >= 0: got {got}")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    shuffled = random.Random(0)
    with _threads(threads):
        for _ in range(warmup + rounds):
            for name in shuffled.sample(list(contenders), len(contenders)):
                times[name].append(_timed(contenders[name]))
    return {name: _summary(measured[warmup:]) for name, measured in times.items()}


def _summary(times: list[float]) -> Latency:
    q1, median, q3 = (float(quartile) for quartile in np.quantile(times, [0.25, 0.5, 0.75]))
    return Latency(median, q1, q3, tuple(times))


def speed_ratio(slow: Latency, fast: Latency) -> Estimate:
    """How many times as fast: the median over rounds of slow time / fast time in the same round.

    Both must come from one `latency` call. The interval is the sign test's, between two order statistics
    (Thompson 1936, Annals of Mathematical Statistics 7): no normality is assumed, but rounds count as
    independent, so it speaks for this machine and this hour.
    Raises ValueError for different numbers of rounds, fewer than 6, or a time of zero.
    """
    n = len(slow.times)
    if n != len(fast.times) or n < 6:
        raise ValueError(f"{n} and {len(fast.times)} rounds: time both in one latency(..., rounds=6 or more)")
    if min(slow.times + fast.times) <= 0:
        raise ValueError("a call took no measurable time: let each contender repeat its work")
    return _median(np.divide(slow.times, fast.times))


def _median(values: Any) -> Estimate:
    """Median with the sign test's interval, between two order statistics (Thompson 1936)."""
    ordered, n = np.sort(values), len(values)
    if n < 6:
        raise ValueError(f"{n} rounds bound no median with 95 % confidence: time rounds=6 or more")
    skip = int(stats.binom.ppf(0.025, n, 0.5))  # smallest k with P(X <= k) >= 0.025, so P(X < k) < 0.025
    return Estimate(float(np.median(ordered)), float(ordered[skip - 1]), float(ordered[n - skip]))


def bytes_on_disk(saved: Mapping[str, Any] | str | os.PathLike[str]) -> int:
    """Bytes of a file, of all files in a folder, or of a state dict once `torch.save` has written it.

    Every state dict goes through the one format that can hold them all, packed parameters and tensor
    subclasses too, so that contenders carry the same overhead: a few hundred bytes a tensor. As in any
    `torch.save`, a view costs its whole storage and tied tensors cost once.
    Raises FileNotFoundError for a path that is not there, TypeError for a module (pass its state_dict()).
    """
    if isinstance(saved, Mapping):
        with tempfile.TemporaryDirectory() as folder:
            torch.save(saved, Path(folder, "weights.pt"))
            return bytes_on_disk(folder)
    if not isinstance(saved, str | os.PathLike):
        raise TypeError(f"got {type(saved).__name__}: pass a path or a state_dict()")
    path = Path(saved)
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


@dataclass
class MemoryUse:
    """Filled when `peak_memory` ends, in MB: resident peak, its growth since entry, CUDA peak if in use."""

    peak_mb: float = 0.0
    growth_mb: float = 0.0
    cuda_peak_mb: float | None = None


@contextlib.contextmanager
def peak_memory() -> Iterator[MemoryUse]:
    """Watch this process's memory while the block runs; read the yielded `MemoryUse` afterwards.

    Resident memory is sampled every 10 ms, so a shorter peak can be missed. Memory that the process had
    freed but not returned before the block can be used again without growth: measure in a fresh process.
    """
    use, done, resident = MemoryUse(), threading.Event(), psutil.Process().memory_info
    samples = [resident().rss]

    def sample() -> None:
        while not done.wait(0.01):
            samples.append(resident().rss)

    if torch.cuda.is_initialized():  # asking an idle CUDA would start it, and count its memory as the block's
        torch.cuda.reset_peak_memory_stats()
    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    try:
        yield use
    finally:
        done.set()
        watcher.join()
        samples.append(resident().rss)
        use.peak_mb = max(samples) / 1e6
        use.growth_mb = (max(samples) - samples[0]) / 1e6
        if torch.cuda.is_initialized():
            use.cuda_peak_mb = torch.cuda.max_memory_allocated() / 1e6
