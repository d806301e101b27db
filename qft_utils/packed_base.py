"""What packed layers share: buffers that keep their type, a product with an exact gradient, a weight to read only."""

import torch
from torch import Tensor, nn

from qft_utils.gguf_blocks import GROUP, group_parts

KERNEL_ROWS = {4: 128, 8: 16}  # by bits: up to here the kernel beats dequantizing, on two AVX512 cores


class _Product(torch.autograd.Function):
    """x W^T of a packed layer; the gradient for x is grad W, by the weight that the product had."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer, ctx.by_kernel = layer, layer.takes_kernel(x)
        return _forward(x, layer)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dequantize(grad.dtype, as_in_kernel=ctx.by_kernel), None


def _forward(x: Tensor, layer: nn.Module) -> Tensor:
    rows = x.reshape(x.numel() // x.shape[-1], x.shape[-1])
    product = layer.by_kernel(rows) if layer.takes_kernel(x) else layer.dequantized_product(rows)
    return product.view(*x.shape[:-1], layer.out_features)


def product(x: Tensor, layer: nn.Module) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _Product.apply(x, layer) if torch.is_grad_enabled() and x.requires_grad else _forward(x, layer)


def few(x: Tensor, bits: int) -> bool:
    """Whether an input (..., K) is one for torch's kernels."""
    few = 0 < x.numel() <= x.shape[-1] * KERNEL_ROWS[bits]
    return few and x.device.type == "cpu" and x.dtype is torch.bfloat16


class _ReadOnly(Tensor):
    """A dequantized copy. Merging into it, as PEFT does through `data`, would change nothing, so that is refused."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> Tensor:
        """The plain tensor."""
        return self.detach().as_subclass(Tensor)

    @data.setter
    def data(self, value: Tensor) -> None:
        raise TypeError("packed integers take no float weight: add to `dequantize()`, and make a new layer of the sum")


class Packed(nn.Module):
    """Buffers that change place but never type, saved as GGUF blocks."""

    @property
    def weight(self) -> Tensor:
        """A copy in float32, read-only, for those who ask an `nn.Linear` for one."""
        return self.dequantize().as_subclass(_ReadOnly)

    def _hold(self, **buffers: Tensor | None) -> None:
        for name, value in buffers.items():
            self.register_buffer(name, None if value is None else value.contiguous(), persistent=False)

    def _apply(self, fn, recurse=True):
        held = {name: value for name, value in self._buffers.items() if value is not None}
        super()._apply(fn, recurse)  # .bfloat16() of the whole model would round the scales
        self._buffers |= {name: value.to(self._buffers[name].device) for name, value in held.items()}
        return self

    def get_extra_state(self) -> Tensor:
        """The blocks, for `state_dict`."""
        return self.blocks()

    def set_extra_state(self, state: Tensor) -> None:
        """Takes the blocks of another layer of this shape."""
        if state.shape != (own := self.blocks()).shape:
            raise ValueError(f"blocks {tuple(state.shape)} do not fit this layer's {tuple(own.shape)}")
        self._set(*group_parts(state.cpu(), self.bits))


def check_parts(codes: Tensor, scale: Tensor, minimum: Tensor | None = None) -> None:
    """Raises ValueError where the parts are not those of one layer; a minimum makes it one of four bits."""
    kind = torch.int8 if minimum is None else torch.uint8
    if codes.dtype is not kind or codes.dim() != 2 or codes.shape[1] % GROUP:
        raise ValueError(f"codes {codes.dtype} {tuple(codes.shape)}: need {kind} (N, K), K a multiple of {GROUP}")
    for name, part in {"scale": scale, "minimum": minimum}.items():
        if part is None:
            continue
        if part.dtype is not torch.float16 or part.shape != (len(codes), codes.shape[1] // GROUP):
            raise ValueError(f"{name} {part.dtype} {tuple(part.shape)}: need float16 (N, K/{GROUP})")
    if kind is torch.uint8 and codes.numel() and codes.max() > 15:
        raise ValueError(f"code {codes.max()} is outside 0..15, what four bits hold")
