"""The eight-bit table of a language model, as its embedding and, tied, as its head (see packed.py)."""

import torch
from torch import Tensor, nn

from qft_utils.gguf_blocks import GROUP, group_parts, quantized, to_blocks
from qft_utils.packed_base import Packed, check_parts, few, product

_CHUNK = 8192  # rows of a head that are dequantized at a time


class Int8Embedding(Packed, nn.Embedding):
    """Rows of an 8-bit table (V, D), Q8_0: ids (...) to (..., D) of `dtype`. Nothing of it trains."""

    bits = 8

    def __init__(self, codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> None:
        """codes: int8 (V, D), scale: float16 (V, D/32). Raises ValueError for other shapes or types."""
        nn.Module.__init__(self)  # as above
        self.padding_idx = self.max_norm = None
        self.scale_grad_by_freq, self.norm_type, self.sparse, self.dtype = False, 2.0, False, dtype
        self._set(codes, scale)

    def _set(self, codes: Tensor, scale: Tensor) -> None:
        check_parts(codes, scale)
        self.num_embeddings, self.embedding_dim = codes.shape
        by_group = codes.view(len(codes), -1, GROUP).transpose(0, 1)  # D/32, V, 32: a matrix for the kernel each
        self._hold(codes=by_group, scale=scale.T, kernel_scales=scale.T.bfloat16())  # D/32, V

    @classmethod
    def from_blocks(cls, blocks: Tensor, dtype: torch.dtype = torch.float32) -> "Int8Embedding":
        """From GGUF's Q8_0 blocks, uint8 (V, D/32 * 34)."""
        return cls(*group_parts(blocks, 8), dtype)

    @classmethod
    def from_float(cls, weight: Tensor, dtype: torch.dtype = torch.float32) -> "Int8Embedding":
        """Rounds a float table (V, D) to Q8_0."""
        return cls.from_blocks(quantized(weight, 8), dtype)

    def blocks(self) -> Tensor:
        """Q8_0 blocks again."""
        return to_blocks(self.codes.transpose(0, 1).contiguous(), self.scale.T)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The table (V, D)."""
        return self.rows(slice(None), dtype)

    def rows(self, index: Tensor | slice, dtype: torch.dtype, as_in_kernel: bool = False) -> Tensor:
        """The dequantized rows (..., D) at `index`."""
        scale = (self.kernel_scales if as_in_kernel else self.scale)[:, index].float()
        return (self.codes[:, index].float() * scale[..., None]).movedim(0, -2).flatten(-2).to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids, self.dtype)


class Int8Head(Packed, nn.Linear):
    """Logits by the table of a `Int8Embedding`, which it shares: x (..., D) to (..., V) of the dtype of x."""

    def __init__(self, embedding: Int8Embedding) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.register_parameter("bias", None)
        self._shared = (embedding,)  # in a tuple, so that the codes are not listed twice

    def get_extra_state(self) -> Tensor:
        """Nothing: the table is saved with the embedding."""
        return torch.empty(0)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to take."""

    @property
    def embedding(self) -> Int8Embedding:
        """Whose codes these are."""
        return self._shared[0]

    def dequantize(self, dtype: torch.dtype = torch.float32, as_in_kernel: bool = False) -> Tensor:
        """W (V, D)."""
        return self.embedding.rows(slice(None), dtype, as_in_kernel)

    def takes_kernel(self, x: Tensor) -> bool:
        """Whether torch's int8 kernel is there for this input (..., D), and faster than dequantizing."""
        return few(x, self.embedding.bits)

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
        return product(x, self)
