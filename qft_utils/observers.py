"""Observers: what range of values a tensor takes, over the batches seen.

Every batch has a range (`range_of`), and the ranges of many batches are made one (`merge`). All stays on the device,
as tensors: an observer never makes the processor wait for a GPU.
"""

import math

import torch
from torch import Tensor, nn


class Observer(nn.Module):
    """The least and greatest value ever seen: min-max (Krishnamoorthi 2018, section 3.1.1).

    low, high: float32 of shape (), in the units of what is observed; infinite before the first batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(math.inf))
        self.register_buffer("high", torch.tensor(-math.inf))

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The range of one batch, of any shape but empty."""
        return in_memory_order(x).aminmax()

    def merge(self, low: Tensor, high: Tensor) -> None:
        """Count the range of one batch in."""
        self.low.copy_(torch.minimum(self.low, low))
        self.high.copy_(torch.maximum(self.high, high))


MinMax = Observer


class MovingAverage(Observer):
    """Exponential moving average of the ranges of the batches (Jacob et al. 2018, section 3.1).

    momentum: weight of the newest batch, in (0, 1]. The first batch counts in full.
    """

    def __init__(self, momentum: float = 0.01) -> None:
        super().__init__()
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must lie in (0, 1], got {momentum}: PyTorch's own default is 0.01")
        self.momentum = momentum

    def merge(self, low: Tensor, high: Tensor) -> None:
        for mean, new in ((self.low, low), (self.high, high)):
            mean.copy_(torch.where(mean.isinf(), new, torch.lerp(mean, new.float(), self.momentum)))


class Percentile(MovingAverage):
    """Moving average of two percentiles of each batch, so that a few outliers do not stretch the grid.

    percent: in (50, 100]. The range runs from the (100 - percent)-th to the percent-th percentile, interpolated
    linearly, of `samples` values at most, which are spread evenly over the batch.
    """

    def __init__(self, percent: float = 99.9, momentum: float = 0.01, samples: int = 2**16) -> None:
        super().__init__(momentum)
        if not 50 < percent <= 100:
            raise ValueError(f"percent must lie in (50, 100], got {percent}: try 99.9")
        self.percent, self.samples = percent, samples

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tails = torch.tensor([1 - self.percent / 100, self.percent / 100], device=x.device)
        low, high = self._sample(in_memory_order(x).flatten()).float().quantile(tails)
        return low, high

    def _sample(self, flat: Tensor) -> Tensor:
        step = -(-len(flat) // self.samples)
        while math.gcd(step, len(flat)) > 1:  # a common factor could pick the same channels again and again
            step += 1
        return flat[::step]


def in_memory_order(x: Tensor) -> Tensor:
    """x with its dimensions permuted so that it is contiguous where it is dense.

    A reduction over all values of a channels-last tensor otherwise copies it first, and takes ten times as long.
    """
    return x.permute(sorted(range(x.ndim), key=lambda dim: -x.stride(dim)))
