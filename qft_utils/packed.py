"""Layers that keep GGUF's integers packed, multiply with torch's own kernels, and pass on the exact gradient.

    layer = Int4Linear.from_float(linear.weight)      # four bits: half a byte a weight, and 1/8 byte of scales
    embedding = Int8Embedding.from_float(weight)      # eight bits
    head = Int8Head(embedding)                        # the same codes once more: tied, stored once

Formats: GGUF's Q4_1 and Q8_0 (see gguf_blocks.py), whose integers, scales and minima are kept as they are. A state dict
holds them as blocks, in an `_extra_state`, because the order of the codes in memory is that of the processor's kernel.

None of these has a trainable weight: there is no gradient for an integer. The *input* gets grad W, with the very
weight that the product had, so adapters beside such a layer and layers before it train. For few rows in bf16 on a CPU,
torch's kernels multiply the packed codes; they want bf16 scales. Elsewhere the weight is dequantized, used and dropped.
"""

import torch
from torch import Tensor, nn

from qft_utils.gguf_blocks import GROUP, group_parts, quantized, to_blocks
from qft_utils.packed_base import KERNEL_ROWS, Packed, check_parts, few, product
from qft_utils.packed_tables import Int8Embedding, Int8Head

__all__ = ["KERNEL_ROWS", "Int8Embedding", "Int8Head", "Int4Linear", "kernel_interleaves"]
_INTERLEAVED = 64  # rows that the int4 kernel packs together where the processor has AVX512


class Int4Linear(Packed, nn.Linear):
    """y = x W^T + b in four bits; x (..., K), y (..., N), of the dtype of x, or of autocast where it is on.

    An `nn.Linear` to whoever asks, as PEFT does; its `weight` is a copy that can be neither trained nor merged into.
    """

    bits = 4

    def __init__(self, codes: Tensor, scale: Tensor, minimum: Tensor, bias: Tensor | None = None) -> None:
        """codes: uint8 (N, K), 0..15; scale, minimum: float16 (N, K/32); bias: (N,), kept as it is, not trained.
        Raises ValueError for other shapes or types, and codes out of range."""
        nn.Module.__init__(self)  # nn.Linear's own would make the weight that is not stored here
        self._set(codes, scale, minimum)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def _set(self, codes: Tensor, scale: Tensor, minimum: Tensor) -> None:
        check_parts(codes, scale, minimum)
        self.out_features, self.in_features = codes.shape
        self.interleaved = kernel_interleaves(codes)
        nibbles = _to_kernel(codes) if self.interleaved else codes[:, ::2] | codes[:, 1::2] << 4
        kernel_scales = _kernel_scales(scale, minimum) if self.interleaved else None
        self._hold(codes=nibbles, scale=scale, minimum=minimum, kernel_scales=kernel_scales)

    @classmethod
    def from_blocks(cls, blocks: Tensor, bias: Tensor | None = None) -> "Int4Linear":
        """From GGUF's Q4_1 blocks, uint8 (N, K/32 * 20), without another rounding."""
        return cls(*group_parts(blocks, 4), bias)

    @classmethod
    def from_float(cls, weight: Tensor, bias: Tensor | None = None) -> "Int4Linear":
        """Rounds a float weight (N, K) to Q4_1."""
        return cls.from_blocks(quantized(weight, 4), bias)

    def unpacked(self) -> Tensor:
        """The codes, uint8 (N, K)."""
        if self.interleaved:
            return _from_kernel(self.codes, self.out_features)
        return torch.stack([self.codes & 15, self.codes >> 4], -1).flatten(1)

    def blocks(self) -> Tensor:
        """Q4_1 blocks again: byte for byte those that the layer was made from."""
        return to_blocks(self.unpacked(), self.scale, self.minimum)

    def dequantize(self, dtype: torch.dtype = torch.float32, as_in_kernel: bool = False) -> Tensor:
        """W (N, K), exact in float32; as_in_kernel: with the bf16 scales of the kernel."""
        codes = self.unpacked().view(*self.scale.shape, GROUP)
        if as_in_kernel:
            scale, middle = self.kernel_scales.float().transpose(0, 1).unbind(-1)  # the value of code 8
            codes, minimum = codes.float() - 8, middle
        else:
            scale, minimum = self.scale.float(), self.minimum.float()
        return torch.addcmul(minimum[..., None], codes, scale[..., None]).flatten(1).to(dtype)

    def takes_kernel(self, x: Tensor) -> bool:
        """Whether torch's int4 kernel is there for this input (..., K), and faster than dequantizing."""
        return self.interleaved and few(x, self.bits)

    def by_kernel(self, rows: Tensor) -> Tensor:
        """(M, N) by torch's int4 kernel."""
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.codes, GROUP, self.kernel_scales)

    def dequantized_product(self, rows: Tensor) -> Tensor:
        """(M, N) by a weight that lives as long as the product."""
        return rows @ self.dequantize(rows.dtype).T

    def forward(self, x: Tensor) -> Tensor:
        y = product(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def kernel_interleaves(codes: Tensor) -> bool:
    """Whether torch's int4 kernel orders these codes (N, K) as `_from_kernel` takes for granted, seen on a sample."""
    if codes.device.type != "cpu" or len(codes) % _INTERLEAVED or codes.shape[1] % GROUP:
        return False
    sample = codes[:_INTERLEAVED, :GROUP].contiguous()
    return torch.equal(_from_kernel(_to_kernel(sample), _INTERLEAVED), sample)


def _to_kernel(codes: Tensor) -> Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)


def _from_kernel(packed: Tensor, rows: int) -> Tensor:
    """Of 64 rows, byte j of a column has row j in its low half and row j + 32 in its high half."""
    columns = packed.view(rows // _INTERLEAVED, -1, _INTERLEAVED // 2)
    return torch.cat([columns & 15, columns >> 4], -1).transpose(1, 2).reshape(rows, -1)


def _kernel_scales(scale: Tensor, minimum: Tensor) -> Tensor:
    """bf16 (K/32, N, 2): the scale, and the value of code 8."""
    middle = minimum.float() + 8 * scale.float()
    return torch.stack([scale.float(), middle], -1).transpose(0, 1).bfloat16().contiguous()
