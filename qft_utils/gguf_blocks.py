"""GGUF's block formats Q4_1 and Q8_0: groups of 32 weights of a row, each with its scale, as bytes and as tensors.

Q4_1: weight = scale * code + minimum, codes 0..15; 20 bytes are scale, minimum, and 16 of codes, the first half of
the group in the low halves. Q8_0: weight = scale * code, codes -127..127; 34 bytes. Scales and minima are float16.
Source: ggml-quants.c of llama.cpp, and its port in the `gguf` package, which rounds here.
"""

import gguf
import torch
from torch import Tensor

GROUP = 32


def group_parts(blocks: Tensor, bits: int) -> tuple[Tensor, ...]:
    """The parts of GGUF blocks, uint8 (N, bytes): Q4_1 as codes uint8 (N, K), scale and minimum float16 (N, K/32);
    Q8_0 as codes int8 (N, K) and scale. Raises ValueError where a row is no whole number of blocks."""
    size = {4: 20, 8: 34}[bits]
    if blocks.dtype is not torch.uint8 or blocks.dim() != 2 or blocks.shape[1] % size:
        raise ValueError(f"blocks {blocks.dtype} {tuple(blocks.shape)}: need uint8, and rows of {size} bytes a group")
    grouped = blocks.reshape(len(blocks), blocks.shape[1] // size, size)  # N, K/32, size
    scale = grouped[..., :2].contiguous().view(torch.float16)[..., 0]
    if bits == 8:
        return grouped[..., 2:].contiguous().view(torch.int8).flatten(1), scale
    minimum, nibbles = grouped[..., 2:4].contiguous().view(torch.float16)[..., 0], grouped[..., 4:]
    return torch.cat([nibbles & 15, nibbles >> 4], -1).flatten(1), scale, minimum


def to_blocks(codes: Tensor, scale: Tensor, minimum: Tensor | None = None) -> Tensor:
    """The inverse of `group_parts`: uint8 (N, bytes), Q4_1 with a minimum, Q8_0 without."""
    groups = codes.reshape(*scale.shape, GROUP)  # N, K/32, 32
    parts = [scale.contiguous()[..., None].view(torch.uint8)]
    if minimum is None:
        return torch.cat([*parts, groups.view(torch.uint8)], -1).flatten(1)
    low, high = groups.chunk(2, -1)
    return torch.cat([*parts, minimum.contiguous()[..., None].view(torch.uint8), low | high << 4], -1).flatten(1)


def quantized(weight: Tensor, bits: int) -> Tensor:
    """GGUF blocks of a float weight (N, K), by the reference code of the `gguf` package: Q4_1 or Q8_0.

    Raises ValueError for K that is no multiple of 32, and for infinities and NaN.
    """
    if weight.dim() != 2 or weight.shape[1] % GROUP:
        raise ValueError(f"weight {tuple(weight.shape)}: need two dimensions, the second a multiple of {GROUP}")
    if not weight.isfinite().all():
        raise ValueError("the weight has infinities or NaN, which no scale can hold: look at its training")
    kind = {4: gguf.GGMLQuantizationType.Q4_1, 8: gguf.GGMLQuantizationType.Q8_0}[bits]
    return torch.from_numpy(gguf.quants.quantize(weight.detach().float().cpu().numpy(), kind))
