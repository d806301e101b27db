"""Rounding to a grid of integers, with the three gradients that training needs.

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
    """Gradient 1 for x in [first, last] and 0 elsewhere (Krishnamoorthi 2018, section 2.4).

    first, last: shape (), in the units of x. A ReLU6 before the grid is this clamp too: give its ends.
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


class LearnedStep(Function):
    """Gradients for x and for the step s (Esser et al. 2020, arXiv 1902.08153, eq. 3 and 5).

    ds = round(x/s) - x/s inside the grid, its end (low or high) outside, times the gradient from above, summed
    over the values that share s. The boundary goes by x / s itself, as in the paper.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, scale: Tensor, low: Tensor | int, high: Tensor | int
    ) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.ends = low, high
        return round_to_grid(x, scale, low, high)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Gradients:
        x, scale = ctx.saved_tensors
        v = x.float() * scale.reciprocal()
        clamped = v.clamp_min(ctx.ends[0]).clamp_max_(ctx.ends[1])
        inside = clamped == v
        d_scale = (clamped.round_() - v * inside) * grad
        return grad * inside, d_scale.sum_to_size(scale.shape), None, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x, with its gradient multiplied by `factor` (`gradscale` in Esser et al. 2020, appendix A)."""
    return x * factor + (x - x * factor).detach()
