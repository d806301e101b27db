"""Rounding to a grid of integers, with the four gradients that training needs.

The grid is s * k for the integers k = low..high, counted from the zero point (k = q - z). The value is the one of
`quantization.fake_quantize`, to the bit: s * clamp(round(x / s), low, high), in float32, x / s being x * (1 / s).
PyTorch has fused kernels for this, but on a CPU they run one value at a time: eight to fifteen times slower than
the four vectorized operations here. `torch.compile` fuses these.
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

Gradients = tuple[Tensor | None, ...]


def round_to_grid(x: Tensor, scale: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
    """s * clamp(round(x / s), low, high) in x's dtype; `scale` broadcasts against x. Its gradient is zero."""
    k = (x.float() * scale.reciprocal()).round_().clamp_min_(low).clamp_max_(high)
    return k.mul_(scale).to(x.dtype)


class Straight(Function):
    """Gradient 1 everywhere: for a grid that holds every value of x, as that of a weight's own maximum does."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        return round_to_grid(x, scale, low, high)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Gradients:
        return grad, None, None, None


class StraightWithin(Function):
    """Gradient 1 for x in [first, last] and 0 elsewhere; these have shape () and the units of x.

    With first = (low - 1/2) s and last = (high + 1/2) s, that is where x rounds to an integer of the grid
    (Krishnamoorthi 2018, section 2.4).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, first: Tensor, last: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, first, last)
        return round_to_grid(x, scale, low, high)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Gradients:
        x, first, last = ctx.saved_tensors
        inside = x.clamp_min(first).clamp_max_(last).eq_(x)  # 1.0 or 0.0
        return inside.mul_(grad), None, None, None, None, None


class ReluThenGrid(Function):
    """ReLU, then the grid 0..high: one clamp forwards and one backwards, where 0 < x < (high + 1/2) s passes."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scale: Tensor, high: int) -> Tensor:
        v = x.float() * scale.reciprocal()
        ctx.high = high
        ctx.save_for_backward(v.to(x.dtype))
        return v.round().clamp_(0, high).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Gradients:
        (v,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grad, v, 0, ctx.high + 0.5), None, None


class LearnedStep(Function):
    """Gradients for x and for the step s (Esser et al. 2020, arXiv 1902.08153, eq. 3 and 5).

    For v = x / s inside (low, high), dx = 1 and ds = round(v) - v; outside, dx = 0 and ds is the end. Both times
    the gradient from above, ds summed over the values that share s.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        v = x.float() * scale.reciprocal()
        ctx.ends, ctx.shape = (low, high), scale.shape
        ctx.save_for_backward(v)
        return v.round().clamp_(low, high).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Gradients:
        (v,), wide = ctx.saved_tensors, grad.float()
        dx = torch.ops.aten.hardtanh_backward(wide, v, *ctx.ends)
        ds = v.clamp(*ctx.ends).round_().mul_(wide).addcmul_(dx, v, value=-1)
        return dx.to(grad.dtype), ds.sum_to_size(ctx.shape), None, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x, with its gradient multiplied by `factor` (`gradscale` in Esser et al. 2020, appendix A)."""
    return x * factor + (x - x * factor).detach()
