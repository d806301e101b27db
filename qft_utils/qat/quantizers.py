"""The parts of a prepared layer that fake-quantize: its input's quantizer and its weight's.

Inputs have one affine grid per tensor, unsigned, from observed ranges; weights have symmetric grids, per channel
(the rows of the weight, dimension 0), per group or per tensor, from their present maximum. With a learned step
both are symmetric, and an input that was never negative has the unsigned grid (Esser et al. 2020, section 2).
The formulas are those of `quantization.qparams_from_range`, without its checks: they would wait for a GPU.
"""

import math

import torch
from torch import Tensor, nn

from qft_utils.observers import Observer, in_memory_order
from qft_utils.qat.rounding import LearnedStep, ReluThenGrid, Straight, StraightWithin, scale_gradient
from qft_utils.quantization import MAX_BITS, MIN_BITS, MIN_SCALE

Grid = tuple[Tensor, Tensor, Tensor, Tensor]  # scale, zero point, lowest and highest integer, each of shape ()
Granularity = str | int  # "channel", "tensor", or the size of a group


def check_bits(bits: int) -> int:
    """`bits`, or ValueError unless it is an integer in 2..8."""
    if type(bits) is not int or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits must be an integer from {MIN_BITS} to {MAX_BITS}, got {bits!r}")
    return bits


def usable_scale(span: Tensor, steps: int) -> Tensor:
    """span / steps, but 1 for a span of nothing, and never less than the least normal float32."""
    return torch.where(span > 0, (span / steps).clamp(min=MIN_SCALE), 1.0)


class InputQuantizer(nn.Module):
    """Fake-quantizes with the range that its observer saw in training, or while calibrating."""

    def __init__(self, bits: int, observer: Observer) -> None:
        super().__init__()
        self.bits, self.observer = check_bits(bits), observer
        self.observing, self.calibrating, self.seen = True, False, False

    def forward(self, x: Tensor) -> Tensor:
        self.observe(x)
        scale, zero_point, qmin, qmax = self.grid()
        low, high = qmin - zero_point, qmax - zero_point
        return StraightWithin.apply(x, scale, low, high, (low - 0.5) * scale, (high + 0.5) * scale)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Count the batch in if that is asked for. Raises RuntimeError if there is no range otherwise."""
        if self.observing and (self.training or self.calibrating):
            self.observer.merge(*self.range_of(x))
            self.seen = True
        elif not self.seen:
            self.check_seen()

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest value that the grid shall hold for this batch."""
        return self.observer.range_of(x)

    def check_seen(self) -> None:
        """Raises RuntimeError unless a range is there, observed or loaded."""
        self.seen = bool(self.observer.low <= self.observer.high)
        if not self.seen:
            raise RuntimeError("no input was observed: train, or call calibrate(model, batches), first")

    def grid(self) -> Grid:
        """Scale, zero point, and the lowest and highest integer, all as float32 tensors."""
        steps = 2**self.bits - 1
        low, high = self.observer.low.clamp(max=0), self.observer.high.clamp(min=0)
        scale = usable_scale(high - low, steps)
        zero_point = (-low / scale).round().clamp(0, steps)
        return scale, zero_point, torch.zeros_like(scale), torch.full_like(scale, steps)

    def set_bits(self, bits: int) -> None:
        self.bits = check_bits(bits)


class ReluInputQuantizer(InputQuantizer):
    """Takes over the ReLU before it: clamping to the grid is the ReLU, and the ReLU6 too, as no range exceeds 6.

    ceiling: the greatest value that the ReLU lets through.
    """

    def __init__(self, bits: int, observer: Observer, ceiling: float) -> None:
        super().__init__(bits, observer)
        self.ceiling = ceiling

    def forward(self, x: Tensor) -> Tensor:
        self.observe(x)
        steps = 2**self.bits - 1
        return ReluThenGrid.apply(x, usable_scale(self.observer.high, steps), steps)

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = super().range_of(x)
        return low.clamp(0, self.ceiling), high.clamp(0, self.ceiling)


class LearnedInputQuantizer(nn.Module):
    """Fake-quantizes with a learned step, which starts as 2 mean|x| / sqrt(qmax) of the first batch.

    Esser et al. 2020, section 2.1; the gradient of the step is scaled by 1 / sqrt(features * qmax), the features
    being those of one example (section 2.2).
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits, self.step = check_bits(bits), nn.Parameter(torch.tensor(1.0))
        self.observing, self.calibrating, self.seen, self.signed = True, False, False, False

    @property
    def ends(self) -> tuple[int, int]:
        """Lowest and highest integer."""
        half = 2 ** (self.bits - 1)
        return (-half, half - 1) if self.signed else (0, 2 * half - 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.seen:
            self._start(x.detach())
        features = math.prod(x.shape[1:])
        step = scale_gradient(self._step(), 1 / math.sqrt(max(1, features) * self.ends[1]))
        return LearnedStep.apply(x, step, *self.ends)

    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        if not (self.training or self.calibrating):
            self.check_seen()
        self.signed = bool(x.amin() < 0)
        mean = in_memory_order(x).abs().float().mean()
        self.step.copy_(torch.where(mean > 0, 2 * mean / math.sqrt(self.ends[1]), 1.0))
        self.seen = True

    def _step(self) -> Tensor:
        return self.step.abs().clamp_min(MIN_SCALE)

    def check_seen(self) -> None:
        """Raises RuntimeError unless the step has been set, by a batch or from a file."""
        if not self.seen:
            raise RuntimeError("no input was observed: train, or call calibrate(model, batches), first")

    def grid(self) -> Grid:
        """Scale, zero point 0, and the lowest and highest integer, all as float32 tensors."""
        step = self._step().detach()
        qmin, qmax = (torch.full_like(step, end) for end in self.ends)
        return step, torch.zeros_like(step), qmin, qmax

    def set_bits(self, bits: int) -> None:
        """Another width over the same range."""
        old, self.bits = self.ends[1], check_bits(bits)
        with torch.no_grad():
            self.step.mul_(old / self.ends[1])

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.seen, self.signed])

    def set_extra_state(self, state: Tensor) -> None:
        self.seen, self.signed = state.tolist()


class WeightQuantizer(nn.Module):
    """Fake-quantizes a weight with scale max|w| / qmax, taken anew each time.

    factor: (C, 1, ...), what a batch norm multiplies the channels of w by when it is folded. The grid is that of
    the folded weight w * factor, and the result is divided by the factor again: only the scale is, in fact.
    """

    def __init__(self, bits: int, granularity: Granularity = "channel") -> None:
        super().__init__()
        self.bits, self.granularity = check_bits(bits), granularity

    @property
    def ends(self) -> tuple[int, int]:
        """Lowest and highest integer."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    @property
    def group_size(self) -> int | None:
        return self.granularity if isinstance(self.granularity, int) else None

    def forward(self, weight: Tensor, factor: Tensor | None = None) -> Tensor:
        values = self.grouped(weight)
        return Straight.apply(values, self.scale(values, factor), *self.ends).reshape(weight.shape)

    def grouped(self, weight: Tensor) -> Tensor:
        """Rows, groups per row and values for a weight in groups; any other as it is."""
        return weight.reshape(len(weight), -1, self.granularity) if self.group_size else weight

    @torch.no_grad()
    def scale(self, values: Tensor, factor: Tensor | None = None) -> Tensor:
        """Scale of the weight that is not folded; it broadcasts against `values`, and has the factor's sign."""
        largest = values.abs().amax(tuple(range(2 if self.group_size else 1, values.ndim)), keepdim=True).float()
        largest = largest if factor is None else largest * factor.abs()
        largest = largest.amax().expand_as(largest) if self.granularity == "tensor" else largest
        scale = usable_scale(largest, self.ends[1])
        return scale if factor is None else scale / factor

    def set_bits(self, bits: int) -> None:
        self.bits = check_bits(bits)


class LearnedWeightQuantizer(WeightQuantizer):
    """Fake-quantizes a weight with learned steps, which start as 2 mean|w| / sqrt(qmax) (Esser et al. 2020)."""

    def __init__(
        self, bits: int, granularity: Granularity, weight: Tensor, factor: Tensor | None = None
    ) -> None:
        super().__init__(bits, granularity)
        values = self.grouped(weight.detach()).abs().float()
        means = values.mean(tuple(range(2 if self.group_size else 1, values.ndim)), keepdim=True)
        means = means if factor is None else means * factor.abs()
        means = means.mean().reshape([1] * means.ndim) if granularity == "tensor" else means
        start = 2 * means / math.sqrt(self.ends[1])
        self.step = nn.Parameter(torch.where(start > 0, start, 1.0))

    def forward(self, weight: Tensor, factor: Tensor | None = None) -> Tensor:
        values = self.grouped(weight)
        return LearnedStep.apply(values, self.scale(values, factor), *self.ends).reshape(weight.shape)

    def scale(self, values: Tensor, factor: Tensor | None = None) -> Tensor:
        per_step = values.numel() / self.step.numel()
        step = scale_gradient(self.step.abs().clamp_min(MIN_SCALE), 1 / math.sqrt(per_step * self.ends[1]))
        return step if factor is None else step / factor

    def set_bits(self, bits: int) -> None:
        """Another width over the same range."""
        old, self.bits = self.ends[1], check_bits(bits)
        with torch.no_grad():
            self.step.mul_(old / self.ends[1])
