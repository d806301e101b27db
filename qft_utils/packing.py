"""Integers of 2 to 8 bits, stored without a wasted bit.

Eight codes of b bits fill b bytes exactly. Code i of a row of eight takes bits i*b to (i+1)*b - 1 of a 64-bit
word, counted from the least significant; the word's b low bytes are stored, the lowest first. The last row is cut
after its last used byte, so n codes take ceil(n*b/8) bytes.
"""

import torch
from torch import Tensor

from qft_utils.quantization import MAX_BITS, MIN_BITS

CODES = 8  # in a row


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take. Raises ValueError for bits outside 2..8."""
    if type(bits) is not int or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits must be an integer from {MIN_BITS} to {MAX_BITS}, got {bits!r}")
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 of shape (ceil(n*bits/8),) that holds the n values of `codes`, integers in 0..2**bits - 1, any shape.

    Raises ValueError for bits outside 2..8, a type that is not an integer, or a code out of range.
    """
    size = packed_size(codes.numel(), bits)
    if codes.is_floating_point() or codes.is_complex() or codes.dtype is torch.bool:
        raise ValueError(f"codes must be integers, got {codes.dtype}: quantize first")
    flat = codes.flatten().long()
    if size and (flat.min() < 0 or flat.max() >= 2**bits):
        raise ValueError(f"codes span {flat.min()}..{flat.max()}, outside 0..{2**bits - 1}: choose more bits")
    rows = torch.nn.functional.pad(flat, (0, -len(flat) % CODES)).reshape(-1, CODES)
    words = (rows << _shifts(CODES, bits, codes.device)).sum(1, keepdim=True)  # disjoint bits: a sum is an or
    return (words >> _shifts(bits, 8, codes.device) & 255).to(torch.uint8).flatten()[:size]


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The `count` codes that `pack` stored: uint8 of shape (count,). Raises ValueError for another number of bytes."""
    if packed.shape != (packed_size(count, bits),):
        expected = packed_size(count, bits)
        raise ValueError(f"{count} codes of {bits} bits take ({expected},) bytes, got {tuple(packed.shape)}")
    if bits == 8:
        return packed
    rows = torch.nn.functional.pad(packed.long(), (0, -len(packed) % bits)).reshape(-1, bits)
    words = (rows << _shifts(bits, 8, packed.device)).sum(1, keepdim=True)
    return (words >> _shifts(CODES, bits, packed.device) & (2**bits - 1)).to(torch.uint8).flatten()[:count]


def _shifts(count: int, step: int, device: torch.device) -> Tensor:
    return torch.arange(0, count * step, step, device=device)
