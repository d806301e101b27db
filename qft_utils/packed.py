"""Layers that keep GGUF's integers packed, multiply with torch's own kernels, and pass on the exact gradient.

    layer = PackedLinear.from_float(linear.weight)      # four bits: half a byte a weight, and 1/8 byte of scales
    embedding = PackedEmbedding.from_float(weight)      # eight bits
    head = PackedHead(embedding)                        # the same codes once more: tied, stored once

Formats: GGUF's Q4_1 and Q8_0 (see gguf_blocks.py), whose integers, scales and minima are kept as they are. A state dict
holds them as blocks, in an `_extra_state`, because the order of the codes in memory is that of the processor's kernel.

None of these has a trainable weight: there is no gradient for an integer. The *input* gets grad W, with the very
weight that the product had, so adapters beside such a layer and layers before it train. For few rows in bf16 on a CPU,
torch's kernels multiply the packed codes; they want bf16 scales. Elsewhere the weight is dequantized, used and dropped.
"""

import torch
from torch import Tensor, nn

from qft_utils.gguf_blocks import GROUP, group_parts, quantized, to_blocks

KERNEL_ROWS = {4: 128, 8: 16}  # by bits: up to here the kernel beats dequantizing, on two AVX512 cores
_INTERLEAVED = 64  # rows that the int4 kernel packs together where the processor has AVX512
_CHUNK = 8192  # rows of a head that are dequantized at a time


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
    rows = x.reshape(-1, x.shape[-1])
    product = layer.by_kernel(rows) if layer.takes_kernel(x) else layer.dequantized_product(rows)
    return product.view(*x.shape[:-1], -1)


def _product(x: Tensor, layer: nn.Module) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _Product.apply(x, layer) if torch.is_grad_enabled() and x.requires_grad else _forward(x, layer)


def _few(x: Tensor, bits: int) -> bool:
    """Whether an input (..., K) is one for torch's kernels."""
    few = 0 < x.numel() <= x.shape[-1] * KERNEL_ROWS[bits]
    return few and x.device.type == "cpu" and x.dtype is torch.bfloat16


class _Packed(nn.Module):
    """Buffers that change place but never type, saved as GGUF blocks."""

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


class PackedLinear(_Packed, nn.Linear):
    """y = x W^T + b in four bits; x (..., K), y (..., N), of the dtype of x, or of autocast where it is on.

    An `nn.Linear` to whoever asks, as PEFT does, but without a `weight` that could be trained or merged into.
    """

    bits = 4

    def __init__(self, codes: Tensor, scale: Tensor, minimum: Tensor, bias: Tensor | None = None) -> None:
        """codes: uint8 (N, K), 0..15; scale, minimum: float16 (N, K/32); bias: (N,), kept as it is, not trained.
        Raises ValueError for other shapes or types, and codes out of range."""
        nn.Module.__init__(self)  # nn.Linear's own would make the weight that is not stored here
        self._set(codes, scale, minimum)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def _set(self, codes: Tensor, scale: Tensor, minimum: Tensor) -> None:
        _check(codes, scale, minimum)
        self.out_features, self.in_features = codes.shape
        self.interleaved = kernel_interleaves(codes)
        nibbles = _to_kernel(codes) if self.interleaved else codes[:, ::2] | codes[:, 1::2] << 4
        kernel_scales = _kernel_scales(scale, minimum) if self.interleaved else None
        self._hold(codes=nibbles, scale=scale, minimum=minimum, kernel_scales=kernel_scales)

    @classmethod
    def from_blocks(cls, blocks: Tensor, bias: Tensor | None = None) -> "PackedLinear":
        """From GGUF's Q4_1 blocks, uint8 (N, K/32 * 20), without another rounding."""
        return cls(*group_parts(blocks, 4), bias)

    @classmethod
    def from_float(cls, weight: Tensor, bias: Tensor | None = None) -> "PackedLinear":
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
        return self.interleaved and _few(x, self.bits)

    def by_kernel(self, rows: Tensor) -> Tensor:
        """(M, N) by torch's int4 kernel."""
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.codes, GROUP, self.kernel_scales)

    def dequantized_product(self, rows: Tensor) -> Tensor:
        """(M, N) by a weight that lives as long as the product."""
        return rows @ self.dequantize(rows.dtype).T

    def forward(self, x: Tensor) -> Tensor:
        y = _product(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class PackedEmbedding(_Packed, nn.Embedding):
    """Rows of an 8-bit table (V, D), Q8_0: ids (...) to (..., D) of `dtype`. Nothing of it trains."""

    bits = 8

    def __init__(self, codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> None:
        """codes: int8 (V, D), scale: float16 (V, D/32). Raises ValueError for other shapes or types."""
        nn.Module.__init__(self)  # as above
        self.padding_idx = self.max_norm = None
        self.scale_grad_by_freq, self.norm_type, self.sparse, self.dtype = False, 2.0, False, dtype
        self._set(codes, scale)

    def _set(self, codes: Tensor, scale: Tensor) -> None:
        _check(codes, scale)
        self.num_embeddings, self.embedding_dim = codes.shape
        by_group = codes.view(len(codes), -1, GROUP).transpose(0, 1)  # D/32, V, 32: a matrix for the kernel each
        self._hold(codes=by_group, scale=scale.T, kernel_scales=scale.T.bfloat16())  # D/32, V

    @classmethod
    def from_blocks(cls, blocks: Tensor, dtype: torch.dtype = torch.float32) -> "PackedEmbedding":
        """From GGUF's Q8_0 blocks, uint8 (V, D/32 * 34)."""
        return cls(*group_parts(blocks, 8), dtype)

    @classmethod
    def from_float(cls, weight: Tensor, dtype: torch.dtype = torch.float32) -> "PackedEmbedding":
        """Rounds a float table (V, D) to Q8_0."""
        return cls.from_blocks(quantized(weight, 8), dtype)

    def blocks(self) -> Tensor:
        """Q8_0 blocks again."""
        return to_blocks(self.codes.transpose(0, 1).contiguous(), self.scale.T)

    def rows(self, index: Tensor | slice, dtype: torch.dtype, as_in_kernel: bool = False) -> Tensor:
        """The dequantized rows (..., D) at `index`."""
        scale = (self.kernel_scales if as_in_kernel else self.scale)[:, index].float()
        return (self.codes[:, index].float() * scale[..., None]).movedim(0, -2).flatten(-2).to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids, self.dtype)


class PackedHead(nn.Linear):
    """Logits by the table of a `PackedEmbedding`, which it shares: x (..., D) to (..., V) of the dtype of x."""

    def __init__(self, embedding: PackedEmbedding) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.register_parameter("bias", None)
        self._shared = (embedding,)  # in a tuple, so that the codes are not listed twice

    @property
    def embedding(self) -> PackedEmbedding:
        """Whose codes these are."""
        return self._shared[0]

    def dequantize(self, dtype: torch.dtype = torch.float32, as_in_kernel: bool = False) -> Tensor:
        """W (V, D)."""
        return self.embedding.rows(slice(None), dtype, as_in_kernel)

    def takes_kernel(self, x: Tensor) -> bool:
        """Whether torch's int8 kernel is there for this input (..., D), and faster than dequantizing."""
        return _few(x, self.embedding.bits)

    def by_kernel(self, rows: Tensor) -> Tensor:
        """(M, V): the kernel has one scale a row, so each group is a product of its own; the sum is in float32."""
        table, total = self.embedding, rows.new_zeros(len(rows), self.out_features, dtype=torch.float32)
        for part, codes, scale in zip(rows.split(GROUP, 1), table.codes, table.kernel_scales, strict=True):
            total += torch.ops.aten._weight_int8pack_mm(part.contiguous(), codes, scale)
        return total.to(rows.dtype)

    def dequantized_product(self, rows: Tensor) -> Tensor:
        """(M, V), some rows of the table at a time."""
        starts = range(0, self.out_features, _CHUNK)
        return torch.cat([rows @ self.embedding.rows(slice(s, s + _CHUNK), rows.dtype).T for s in starts], -1)

    def forward(self, x: Tensor) -> Tensor:
        return _product(x, self)


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


def _check(codes: Tensor, scale: Tensor, minimum: Tensor | None = None) -> None:
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
