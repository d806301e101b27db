"""Affine quantization: r ~ s (q - z), with real value r, scale s, integer q, zero point z and b bits.

Jacob et al. 2018 (arXiv 1712.05877), eq. 1 and section 3; Krishnamoorthi 2018 (arXiv 1806.08342), section 2.

Rounding follows PyTorch's *fake-quantization* kernels, in float32:
q = clamp(round_half_even(x * (1/s)) + z, qmin, qmax). PyTorch's integer kernel (`torch.quantize_per_tensor`)
may differ by one step where x/s is a tie or within a rounding error of one. Following one kernel throughout
gives `dequantize(quantize(x)) == fake_quantize(x)` to the bit.

Error bound. For every x inside the range that `qparams_from_range` was given, float32 or narrower,

    |x - dequantize(quantize(x))| <= s (1/2 + 2**(b - 22)).

Why: N = 2**b - 1 steps cover high - low, and rounding z moves both ends of the grid by at most half a step.
So a clamped x lies at most s/2 beyond the last level, and any other x at most s/2 from its own. The rest is
float32: s, 1/s, z and the two products carry relative errors of 2**-24 (s twice that) on at most N steps,
and in either case these add up to at most 4 N 2**-24 s. (A result cast to float16 or bfloat16 adds that
type's own rounding.)
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_BITS, MAX_BITS = 2, 8
MIN_SCALE = torch.finfo(torch.float32).tiny  # a smaller scale has an infinite reciprocal
MAX_MAGNITUDE = torch.finfo(torch.float32).max / 2  # keeps high - low and every level s (q - z) finite


@dataclass(frozen=True, eq=False)
class QParams:
    """What maps real values to integers: one scale and zero point per tensor, channel or group.

    scale: float32, in the units of x. () per tensor, (C,) per channel, (rows, groups per row) per group.
    zero_point: int32, same shape; the integer that stands for 0.0.
    qmin, qmax: the least and the greatest integer.
    axis: the channel dimension, counted from the front; None unless per channel.
    group_size: consecutive values that share a scale within a row of x.flatten(1); None unless per group.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    axis: int | None = None
    group_size: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The smallest integer type that holds qmin..qmax. (uint8 wraps: convert before doing arithmetic.)"""
        return torch.int8 if self.qmin < 0 else torch.uint8

    def aligned(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, scale and zero point, shaped to broadcast. Per group, x becomes (rows, groups per row, size)."""
        if self.group_size is not None:
            groups = x.reshape(*self.scale.shape, self.group_size)
            return groups, self.scale[..., None], self.zero_point[..., None]
        shape = [] if self.axis is None else [-1 if dim == self.axis else 1 for dim in range(x.ndim)]
        return x, self.scale.reshape(shape), self.zero_point.reshape(shape)


def choose_qparams(
    x: Tensor, bits: int, *, symmetric: bool = False, axis: int | None = None, group_size: int | None = None
) -> QParams:
    """QParams that cover every value of x: per tensor, per channel (`axis`) or per group (`group_size`).

    A group is `group_size` consecutive values in a row of x.flatten(1), the row being the inputs of one
    output of a Linear or Conv weight. See `qparams_from_range` for the formulas. The result carries no
    gradient.
    Raises ValueError for an empty x, NaN, infinity, magnitudes above half of float32's maximum, bits outside
    2..8, an axis that x lacks, or a group size that does not divide the row.
    """
    x = x.detach()
    if x.numel() == 0:
        raise ValueError(f"an empty tensor of shape {tuple(x.shape)} has no range: pass some values")
    if axis is not None:
        axis = _front_axis(axis, x.ndim)
        low, high = x.movedim(axis, 0).reshape(x.shape[axis], -1).aminmax(dim=1)
    elif group_size is not None:
        _check_group_size(group_size, x)
        low, high = x.reshape(x.shape[0], -1, group_size).aminmax(dim=2)
    else:
        low, high = x.aminmax()
    return qparams_from_range(low, high, bits, symmetric=symmetric, axis=axis, group_size=group_size)


def qparams_from_range(
    low: Tensor | float,
    high: Tensor | float,
    bits: int,
    *,
    symmetric: bool = False,
    axis: int | None = None,
    group_size: int | None = None,
) -> QParams:
    """QParams for values in [low, high], elementwise; shapes as `QParams.scale`.

    Affine: unsigned, 0..2**b - 1. The range is widened to hold 0, s = (high - low) / (2**b - 1) and
    z = round(-low / s), so that 0.0 is exact (Jacob et al. 2018, eq. 12 and section 3.1).
    Symmetric: signed, -2**(b-1)..2**(b-1) - 1, z = 0 and s = max(|low|, |high|) / qmax. Then the greatest
    value is a level, lies inside the range and keeps its gradient. Dividing by (qmax - qmin) / 2 instead, as
    torchao's SYMMETRIC does, gives finer steps but puts that value on the tie at qmax + 1/2, which rounds up
    and clamps. The lowest integer is left to values below the range (Jacob et al. 2018, section 3.1, keep
    weights off it).
    A range of nothing but zero gets scale 1. Other scales are at least 2**-126, the least normal float32.
    Raises ValueError for bits outside 2..8, low > high, NaN, infinity, magnitudes above half of float32's
    maximum, or a shape that does not fit `axis` and `group_size`.
    """
    qmin, qmax = _integer_range(bits, symmetric)
    low, high = (torch.as_tensor(end).detach().float() for end in (low, high))
    _check_range(low, high)
    _check_granularity(low, axis, group_size)
    low, high = low.clamp(max=0), high.clamp(min=0)
    span, steps = (torch.maximum(-low, high), qmax) if symmetric else (high - low, qmax - qmin)
    scale = torch.where(span > 0, (span / steps).clamp(min=MIN_SCALE), 1.0)
    zero_point = torch.zeros_like(scale) if symmetric else (-low / scale).round().clamp(qmin, qmax)
    return QParams(scale, zero_point.int(), qmin, qmax, axis, group_size)


def quantize(x: Tensor, qparams: QParams) -> Tensor:
    """Integers of x's shape and of type `qparams.dtype`; values outside the range saturate. Checks nothing.

    Computed in float32. NaN has no integer: the result there is undefined.
    """
    values, scale, zero_point = qparams.aligned(x.float())
    q = (values * scale.reciprocal()).round() + zero_point  # not values / scale: as the fake kernel rounds
    return q.clamp(qparams.qmin, qparams.qmax).to(qparams.dtype).reshape(x.shape)


def dequantize(q: Tensor, qparams: QParams) -> Tensor:
    """Real values s (q - z) in float32, of q's shape (Jacob et al. 2018, eq. 1). Checks nothing."""
    values, scale, zero_point = qparams.aligned(q.float())  # float first: uint8 - int32 can wrap
    return ((values - zero_point) * scale).reshape(q.shape)


def fake_quantize(x: Tensor, qparams: QParams) -> Tensor:
    """dequantize(quantize(x)) in x's dtype, with a straight-through gradient for x. Adds no checks.

    The gradient is 1 where qmin <= round(x/s) + z <= qmax and 0 elsewhere. The boundary goes by the rounded
    integer, so x passes up to half a step beyond the last level (Krishnamoorthi 2018, section 2.4). Scale
    and zero point get none. PyTorch's fused kernels compute it, in float32 for every dtype of x. It agrees
    with `quantize` while |x| < 2**62 s: beyond, a kernel's conversion to an integer may overflow and
    saturate at the wrong end.
    """
    wide, qmin, qmax = x.float(), qparams.qmin, qparams.qmax
    scale, zero_point = qparams.scale, qparams.zero_point
    if qparams.group_size is not None:  # a group is a row, and a row is a channel
        wide, scale, zero_point = wide.reshape(-1, qparams.group_size), scale.flatten(), zero_point.flatten()
        out = torch.fake_quantize_per_channel_affine(wide, scale, zero_point, 0, qmin, qmax)
    elif qparams.axis is not None:
        out = torch.fake_quantize_per_channel_affine(wide, scale, zero_point, qparams.axis, qmin, qmax)
    else:
        out = torch.fake_quantize_per_tensor_affine(wide, scale, zero_point, qmin, qmax)
    return out.reshape(x.shape).to(x.dtype)


def sqnr_db(x: Tensor, x_hat: Tensor) -> float:
    """Signal to quantization noise ratio, 10 log10(sum x**2 / sum (x - x_hat)**2), in dB; inf when equal.

    Raises ValueError where the shapes differ.
    """
    if x.shape != x_hat.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, x_hat {tuple(x_hat.shape)}: pass equal shapes")
    signal = x.double().square().sum()
    noise = (x.double() - x_hat.double()).square().sum()
    return math.inf if noise == 0 else (10 * torch.log10(signal / noise)).item()


def _integer_range(bits: int, symmetric: bool) -> tuple[int, int]:
    if type(bits) is not int or not MIN_BITS <= bits <= MAX_BITS:  # bool is an int too
        raise ValueError(f"bits must be an integer from {MIN_BITS} to {MAX_BITS}, got {bits!r}")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def _front_axis(axis: int, ndim: int) -> int:
    if type(axis) is not int or not -ndim <= axis < ndim:
        raise ValueError(f"axis={axis!r} is not in a tensor of {ndim} dimensions: count from 0, or pass None")
    return axis % ndim


def _check_group_size(group_size: int, x: Tensor) -> None:
    row = math.prod(x.shape[1:])
    if x.ndim < 2:
        raise ValueError(f"group_size={group_size} needs rows, got shape {tuple(x.shape)}: reshape to 2-D")
    if type(group_size) is not int or group_size < 1 or row % group_size:
        raise ValueError(f"group_size={group_size!r} does not divide a row of {row} values: use a divisor")


def _check_granularity(low: Tensor, axis: int | None, group_size: int | None) -> None:
    if axis is not None and group_size is not None:
        raise ValueError(f"got both axis={axis} and group_size={group_size}: choose one")
    if axis is not None and axis < 0:
        raise ValueError(f"axis={axis} is negative: count it from the front")
    ndim = 1 if axis is not None else 2 if group_size is not None else 0
    if low.ndim != ndim:
        where = f"axis={axis}, group_size={group_size}"
        raise ValueError(f"{where} needs a range with {ndim} dimensions, got shape {tuple(low.shape)}")


def _check_range(low: Tensor, high: Tensor) -> None:
    if low.shape != high.shape or low.numel() == 0:
        raise ValueError(f"low {tuple(low.shape)} and high {tuple(high.shape)} need one shape, not empty")
    if ((low <= high) & (low >= -MAX_MAGNITUDE) & (high <= MAX_MAGNITUDE)).all():
        return  # NaN would have failed; one test makes one wait for a GPU
    ends = torch.stack([low, high])
    if ends.isnan().any():
        raise ValueError("the values hold NaN: find where it arises, or replace it with torch.nan_to_num")
    if ends.isinf().any():
        raise ValueError("the values hold infinity (in float32): clamp them to a finite range first")
    if (low > high).any():
        raise ValueError(f"low must not exceed high, got low={low.tolist()}, high={high.tolist()}: swap them")
    raise ValueError(f"a magnitude of {ends.abs().max():.4g} exceeds {MAX_MAGNITUDE:.4g}: scale values down")
