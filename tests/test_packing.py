"""qft_utils.packing against numpy.packbits, which writes one bit after another."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qft_utils.packing import pack, packed_size, unpack

PROPERTY = settings(deadline=None, max_examples=100, derandomize=True)


def numpy_pack(codes, bits):
    """A stream of bits, the least significant of each code first."""
    stream = (codes.numpy().reshape(-1, 1) >> np.arange(bits)) & 1
    return np.packbits(stream.flatten().astype(np.uint8), bitorder="little")


@PROPERTY
@given(bits=st.integers(2, 8), count=st.integers(1, 300), seed=st.integers(0, 2**31))
@example(bits=8, count=1, seed=0)
@example(bits=3, count=8, seed=0)
def test_pack_equals_numpy_and_unpack_undoes_it(bits, count, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (count,), generator=generator)
    packed = pack(codes, bits)
    assert packed.dtype is torch.uint8
    assert np.array_equal(packed.numpy(), numpy_pack(codes, bits))
    assert torch.equal(unpack(packed, bits, count).long(), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_extremes_fill_the_bits(bits):
    ones = torch.full((16,), 2**bits - 1, dtype=torch.uint8)
    assert torch.equal(pack(ones, bits), torch.full((2 * bits,), 255, dtype=torch.uint8))
    assert torch.equal(pack(ones * 0, bits), torch.zeros(2 * bits, dtype=torch.uint8))


@pytest.mark.parametrize(("bits", "size"), [(2, 250), (3, 375), (4, 500), (8, 1000)])
def test_size_of_a_thousand_codes(bits, size):
    assert packed_size(1000, bits) == pack(torch.zeros(10, 100, dtype=torch.int64), bits).numel() == size


def test_nothing_packs_to_nothing():
    nothing = pack(torch.zeros(0, 3, dtype=torch.int64), 3)
    assert nothing.shape == unpack(nothing, 3, 0).shape == (0,)


@pytest.mark.parametrize("bits", [1, 9, 4.0, True])
def test_bits_outside_are_refused(bits):
    with pytest.raises(ValueError, match="bits must be an integer from 2 to 8"):
        packed_size(1, bits)


@pytest.mark.parametrize("codes", [torch.tensor([16]), torch.tensor([-1])])
def test_codes_outside_are_refused(codes):
    with pytest.raises(ValueError, match=r"outside 0\.\.15: choose more bits"):
        pack(codes, 4)


@pytest.mark.parametrize("codes", [torch.ones(2), torch.ones(2, dtype=torch.bool)])
def test_codes_of_other_types_are_refused(codes):
    with pytest.raises(ValueError, match="must be integers"):
        pack(codes, 4)


@pytest.mark.parametrize("size", [1, 3])
def test_wrong_number_of_bytes_is_refused(size):
    with pytest.raises(ValueError, match=r"4 codes of 4 bits take \(2,\) bytes"):
        unpack(torch.zeros(size, dtype=torch.uint8), 4, 4)
