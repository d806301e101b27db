"""qft_utils.quantization against PyTorch's kernels, torchao, closed forms and the bound in its docstring."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine

from qft_utils.quantization import (
    MAX_MAGNITUDE,
    MIN_SCALE,
    QParams,
    choose_qparams,
    dequantize,
    fake_quantize,
    qparams_from_range,
    quantize,
    sqnr_db,
)

PROPERTY = settings(deadline=None, max_examples=40, derandomize=True)
BITS = st.integers(2, 8)
INT_TYPES = {True: (torch.int8, torch.qint8), False: (torch.uint8, torch.quint8)}


@st.composite
def cases(draw, kinds=("tensor", "channel", "group")):
    """(x, QParams chosen from x, bits, symmetric): random shape, layout, magnitude and offset."""
    shape = draw(st.lists(st.integers(1, 7), min_size=2, max_size=4))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    offset, magnitude = draw(st.sampled_from([0.0, 0.0, 3.0, -3.0])), 10.0 ** draw(st.integers(-30, 30))
    x = (torch.randn(shape) + offset) * magnitude
    if draw(st.booleans()):
        x = x.transpose(0, -1)  # not contiguous
    kind, row = draw(st.sampled_from(kinds)), math.prod(x.shape[1:])
    where = {
        "tensor": {},
        "channel": {"axis": draw(st.integers(-x.ndim, x.ndim - 1))},
        "group": {"group_size": draw(st.sampled_from([g for g in range(1, row + 1) if row % g == 0]))},
    }[kind]
    bits, symmetric = draw(BITS), draw(st.booleans())
    return x, choose_qparams(x, bits, symmetric=symmetric, **where), bits, symmetric


def beyond(x):
    """Values that partly leave the range of x's QParams."""
    return (x * (1 + torch.rand_like(x))).detach().requires_grad_()


def full_size(t, x, qp):
    """scale or zero point with one entry for each of x, by repetition: not by the code under test."""
    if qp.group_size is not None:
        return t.flatten().repeat_interleave(qp.group_size).reshape(x.shape)
    if qp.axis is not None:
        channels_first = x.movedim(qp.axis, 0).shape
        return t.repeat_interleave(x.numel() // len(t)).reshape(channels_first).movedim(0, qp.axis)
    return t.expand(x.shape)


def torch_fake(x, qp):
    """PyTorch's per-tensor kernel with Python numbers, run on every part of x that has a scale of its own."""
    scale, zero_point = full_size(qp.scale, x, qp), full_size(qp.zero_point, x, qp)
    out = torch.zeros_like(x)
    for s, z in set(zip(qp.scale.flatten().tolist(), qp.zero_point.flatten().tolist(), strict=True)):
        part = torch.fake_quantize_per_tensor_affine(x, s, z, qp.qmin, qp.qmax)
        out = torch.where((scale == s) & (zero_point == z), part, out)
    return out


# --- equal to PyTorch -----------------------------------------------------------------------------


@PROPERTY
@given(cases())
def test_fake_quantize_equals_torch_forward_and_gradient(case):
    x, qp, _, _ = case
    ours = beyond(x)
    theirs = ours.detach().clone().requires_grad_()
    weight = torch.randn(x.shape)
    got, want = fake_quantize(ours, qp), torch_fake(theirs, qp)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    assert torch.equal(got, want)
    assert torch.equal(ours.grad, theirs.grad)


@PROPERTY
@given(cases(kinds=("channel",)))
def test_fake_quantize_equals_torch_per_channel_kernel(case):
    x, qp, _, _ = case
    want = torch.fake_quantize_per_channel_affine(x, qp.scale, qp.zero_point, qp.axis, qp.qmin, qp.qmax)
    assert torch.equal(fake_quantize(x, qp), want)


@PROPERTY
@given(cases())
def test_quantize_then_dequantize_is_fake_quantize_to_the_bit(case):
    x, qp, _, _ = case
    values = beyond(x).detach()
    assert torch.equal(dequantize(quantize(values, qp), qp), fake_quantize(values, qp))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.1, 0.3, 1 / 3, 0.7])
def test_ties_round_as_torchs_fake_kernel_does(scale, symmetric):
    limit = 2**7 * scale
    qp = qparams_from_range(-limit, limit, 8, symmetric=symmetric)
    qp = QParams(torch.tensor(scale), qp.zero_point, qp.qmin, qp.qmax)
    ties = ((torch.arange(-300, 300) + 0.5) * scale).requires_grad_()
    reference = ties.detach().clone().requires_grad_()
    got = fake_quantize(ties, qp)
    want = torch.fake_quantize_per_tensor_affine(reference, scale, qp.zero_point.item(), qp.qmin, qp.qmax)
    got.sum().backward()
    want.sum().backward()
    assert torch.equal(got, want)
    assert torch.equal(dequantize(quantize(ties.detach(), qp), qp), want)
    assert torch.equal(ties.grad, reference.grad)


def test_gradient_boundary_goes_by_the_rounded_integer():
    qp = qparams_from_range(-7.0, 7.0, 4, symmetric=True)  # scale 1, integers -8..7
    x = torch.tensor([-8.6, -8.5, -8.4, -8.0, 0.0, 7.0, 7.4, 7.5, 7.6], requires_grad=True)
    fake_quantize(x, qp).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 1, 0, 0]  # -8.5 rounds to -8, 7.5 to 8: half to even


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # deprecated, and still the reference
@PROPERTY
@given(cases(kinds=("tensor", "channel")))
def test_integers_equal_torchs_integer_kernel_except_at_ties(case):
    x, qp, _, symmetric = case
    zp, qtype = qp.zero_point, INT_TYPES[symmetric][1]
    if qp.axis is None:
        theirs = torch.quantize_per_tensor(x, qp.scale.item(), zp.item(), qtype)
    else:
        theirs = torch.quantize_per_channel(x.contiguous(), qp.scale.double(), zp.long(), qp.axis, qtype)
    theirs = theirs.int_repr().clamp(qp.qmin, qp.qmax).int()  # torch's types have 8 bits: saturate to ours
    steps = x.double() / full_size(qp.scale, x, qp).double()
    tie = (steps - steps.floor() - 0.5).abs() < 2 ** (8 - 22)  # float32 cannot tell such a value from a tie
    difference = (quantize(x, qp).int() - theirs).abs()
    assert difference[~tie].sum() == 0
    assert difference.max() <= 1


@PROPERTY
@given(cases())
def test_qparams_agree_with_torchao(case):
    x, qp, _, symmetric = case
    if qp.group_size is not None:
        x, block = x.reshape(x.shape[0], -1), [1, qp.group_size]
    else:
        block = [1 if dim == qp.axis else n for dim, n in enumerate(x.shape)]
    x, block = torch.stack([x, x], -1), [*block, 2]  # torchao needs a block above one value
    mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
    qmin = -qp.qmax if symmetric else qp.qmin  # with integers -qmax..qmax its definition is ours
    scale, zero_point = choose_qparams_affine(
        x, mapping, block, INT_TYPES[symmetric][0], quant_min=qmin, quant_max=qp.qmax, eps=MIN_SCALE
    )
    assert torch.equal(qp.scale.flatten(), scale.flatten())
    assert torch.equal(qp.zero_point.flatten(), zero_point.flatten().int())


# --- properties -----------------------------------------------------------------------------------


@PROPERTY
@given(cases())
def test_error_is_within_the_derived_bound(case):
    x, qp, bits, _ = case
    scale = full_size(qp.scale, x, qp).double()
    error = (x.double() - fake_quantize(x, qp).double()).abs()
    excess = (error / scale).max().item() - (0.5 + 2.0 ** (bits - 22))
    assert excess <= 0, f"{bits} bits: the error exceeds s (1/2 + 2**(b - 22)) by {excess} steps"


@PROPERTY
@given(st.floats(-1e4, 1e4, width=32), st.floats(-1e4, 1e4, width=32), BITS, st.booleans())
def test_error_bound_holds_on_a_fine_grid_and_at_both_ends(a, b, bits, symmetric):
    low, high = min(a, b), max(a, b)
    qp = qparams_from_range(low, high, bits, symmetric=symmetric)
    x = torch.linspace(0, 1, 4001, dtype=torch.float64).mul(high - low).add(low).float().clamp(low, high)
    x = torch.cat([x, torch.tensor([low, high])])
    error = (x.double() - fake_quantize(x, qp).double()).abs().max().item()
    assert error <= qp.scale.item() * (0.5 + 2.0 ** (bits - 22))


@PROPERTY
@given(cases())
def test_symmetric_range_keeps_every_seen_gradient(case):
    x, qp, bits, _ = case
    symmetric = choose_qparams(x, bits, symmetric=True, axis=qp.axis, group_size=qp.group_size)
    values = x.detach().clone().requires_grad_()
    fake_quantize(values, symmetric).sum().backward()
    assert torch.equal(values.grad, torch.ones(x.shape))


@PROPERTY
@given(cases())
def test_idempotent(case):
    x, qp, _, _ = case
    once = fake_quantize(beyond(x).detach(), qp)
    assert torch.equal(fake_quantize(once, qp), once)
    assert torch.equal(quantize(once, qp), quantize(dequantize(quantize(once, qp), qp), qp))


@PROPERTY
@given(cases(kinds=("tensor",)))
def test_monotone_and_within_the_integers(case):
    x, qp, _, symmetric = case
    q = quantize(beyond(x).detach().flatten().sort().values, qp)
    assert q.dtype == qp.dtype == INT_TYPES[symmetric][0]
    assert (q.int().diff() >= 0).all()
    assert qp.qmin <= q.min() and q.max() <= qp.qmax


@PROPERTY
@given(cases())
def test_zero_is_exact(case):
    x, qp, _, _ = case
    zeros = torch.zeros(x.shape)
    assert torch.equal(fake_quantize(zeros, qp), zeros)
    assert torch.equal(quantize(zeros, qp).int(), full_size(qp.zero_point, x, qp))


@PROPERTY
@given(cases(), st.integers(0, 3))
def test_scaling_by_a_power_of_two_scales_the_result(case, power):
    x, qp, bits, symmetric = case
    where = {"axis": qp.axis, "group_size": qp.group_size}
    scaled = choose_qparams(x * 2**power, bits, symmetric=symmetric, **where)
    assert torch.equal(scaled.zero_point, qp.zero_point)
    assert torch.equal(fake_quantize(x * 2**power, scaled), fake_quantize(x, qp) * 2**power)


@pytest.mark.parametrize("bits", range(2, 9))
def test_symmetric_dequantized_values_choose_the_same_scale_again(bits):
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(bits))
    qp = choose_qparams(x, bits, symmetric=True, axis=0)
    again = choose_qparams(fake_quantize(x, qp), bits, symmetric=True, axis=0)
    torch.testing.assert_close(again.scale, qp.scale, rtol=2**-22, atol=0)  # two products, one quotient


# --- signal to noise ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_uniform_signal_gains_six_decibels_a_bit(bits):
    # x uniform on [-1, 1] has power 1/3. Affine: s = 2 / N with N = 2**b - 1. N is odd, so zero lies half-way
    # between two levels and z is off by half a step: the levels still reach within s/2 of every x, the error
    # is uniform on [-s/2, s/2], its power s**2 / 12, and SQNR = 20 log10 N.
    # Tolerance: the mean of n = 200,000 squared errors has relative deviation sqrt(4/5) / sqrt(n) = 0.002,
    # that of the signal the same; five times their sum is 0.02, and 10 log10(1.02) < 0.09 dB.
    x = torch.rand(200_000, generator=torch.Generator().manual_seed(bits)) * 2 - 1
    x[0], x[1] = -1.0, 1.0
    measured = sqnr_db(x, fake_quantize(x, choose_qparams(x, bits)))
    assert abs(measured - 20 * math.log10(2**bits - 1)) < 0.09
    assert abs(measured - 6.0206 * bits) < 0.09 - 20 * math.log10(1 - 2.0**-bits)  # N against 2**b


def test_sqnr_closed_forms():
    x = torch.tensor([3.0, 4.0])
    assert sqnr_db(x, x) == math.inf
    assert sqnr_db(torch.zeros(2), torch.zeros(2)) == math.inf
    assert sqnr_db(torch.zeros(2), x) == -math.inf
    assert sqnr_db(x, torch.zeros(2)) == 0.0
    assert sqnr_db(x, 0.9 * x) == pytest.approx(20.0, abs=1e-5)
    with pytest.raises(ValueError, match=r"\(2,\), x_hat \(1,\)"):
        sqnr_db(x, x[:1])


# --- edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_constant_tensors_come_back_and_zero_gets_scale_one(bits, symmetric):
    for value in (2.5, -2.5, 1e-30, -1e30):
        x = torch.full((3, 4), value)
        x_hat = fake_quantize(x, choose_qparams(x, bits, symmetric=symmetric))
        torch.testing.assert_close(x_hat, x, rtol=2**-22, atol=0)  # the constant is an end of the range
    zero = choose_qparams(torch.zeros(3, 4), bits, symmetric=symmetric, axis=0)
    assert zero.scale.tolist() == [1.0] * 3 and zero.zero_point.tolist() == [0] * 3
    assert fake_quantize(torch.zeros(3, 4), zero).count_nonzero() == 0


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("size", [1e-45, 1e-40, MIN_SCALE, 1e-36, 1e37, MAX_MAGNITUDE])
def test_tiny_and_huge_values_stay_finite_and_within_the_bound(size, bits, symmetric):
    for x in (torch.linspace(-1, 1, 101), torch.linspace(0, 1, 101), torch.linspace(-1, 0.3, 101)):
        x = (x.double() * size).float()
        qp = choose_qparams(x, bits, symmetric=symmetric)
        x_hat = fake_quantize(x, qp)
        levels = dequantize(torch.arange(qp.qmin, qp.qmax + 1), qp)
        assert qp.scale >= MIN_SCALE and levels.isfinite().all()
        assert ((x.double() - x_hat.double()).abs() <= qp.scale.double() * (0.5 + 2.0 ** (bits - 22))).all()


def test_one_element_and_zero_dimensions():
    for x in (torch.tensor(3.0), torch.tensor([3.0])):
        qp = choose_qparams(x, 4)
        assert quantize(x, qp).shape == x.shape and quantize(x, qp).item() == 15
    assert choose_qparams(torch.tensor([1.0, 2.0]), 4, axis=-1).axis == 0
    assert choose_qparams(torch.tensor([1.0, 2.0]), 4, axis=0).scale.shape == (2,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("where", [{}, {"axis": 1}, {"group_size": 4}])
def test_half_precision_is_computed_in_float32(dtype, where):
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    qp = choose_qparams(x, 8, **where)
    values = (1.5 * x).requires_grad_()
    out = fake_quantize(values, qp)
    out.sum().backward()
    reference = values.detach().float().requires_grad_()
    fake_quantize(reference, qp).sum().backward()
    assert qp.scale.dtype == torch.float32 and out.dtype == values.grad.dtype == dtype
    assert torch.equal(out, dequantize(quantize(values.detach(), qp), qp).to(dtype))
    assert torch.equal(values.grad.float(), reference.grad)
    assert torch.equal(out, torch_fake(values, qp))  # PyTorch's kernel in the narrow type itself


def test_float64_is_computed_in_float32_too():
    qp = qparams_from_range(-127.0, 127.0, 8, symmetric=True)  # scale 1
    x = torch.arange(-100, 100).double() + 0.5 + 1e-10  # ties in float32 alone
    assert torch.equal(fake_quantize(x, qp), fake_quantize(x.float(), qp).double())
    assert torch.equal(fake_quantize(x, qp), dequantize(quantize(x, qp), qp).double())


def test_group_layout_follows_the_flattened_row_of_a_convolution():
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    qp = choose_qparams(weight, 4, symmetric=True, group_size=6)
    assert qp.scale.shape == (4, 2)
    torch.testing.assert_close(qp.scale, weight.reshape(4, 2, 6).abs().amax(2) / 7, rtol=0, atol=0)
    assert quantize(weight.to(memory_format=torch.channels_last), qp).equal(quantize(weight, qp))
    whole_row = choose_qparams(weight, 4, symmetric=True, group_size=12)
    by_channel = choose_qparams(weight, 4, symmetric=True, axis=0)
    assert torch.equal(fake_quantize(weight, whole_row), fake_quantize(weight, by_channel))


def test_empty_input_passes_the_hot_path():
    qp, empty = qparams_from_range(-1.0, 1.0, 8), torch.empty(0, 3)
    assert fake_quantize(empty, qp).shape == quantize(empty, qp).shape == (0, 3)


def test_qparams_carry_no_gradient():
    x = torch.randn(4, 4, requires_grad=True)
    assert not choose_qparams(x, 4).scale.requires_grad
    assert not qparams_from_range(x.min(), x.max(), 4).scale.requires_grad


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.empty(0, 3), {}, r"empty tensor of shape \(0, 3\).*pass some"),
        (torch.tensor([1.0, math.nan]), {}, "NaN.*nan_to_num"),
        (torch.tensor([math.inf, math.nan]), {}, "NaN.*nan_to_num"),
        (torch.tensor([1.0, math.inf]), {}, "infinity.*clamp"),
        (torch.tensor([-math.inf, 1.0]), {"symmetric": True}, "infinity.*clamp"),
        (torch.tensor([[1.0, 2.0], [1.0, math.nan]]), {"axis": 0}, "NaN"),
        (torch.tensor([torch.finfo(torch.float32).max]), {}, r"3\.403e\+38 exceeds 1\.701e\+38.*scale"),
        (torch.ones(2, 6), {"axis": 2}, "axis=2 .*2 dimensions.*None"),
        (torch.ones(2, 6), {"axis": -3}, "axis=-3"),
        (torch.ones(2, 6), {"axis": 0.0}, r"axis=0\.0"),
        (torch.tensor(1.0), {"axis": 0}, "axis=0 .*0 dimensions"),
        (torch.ones(2, 6), {"group_size": 4}, "group_size=4 does not divide a row of 6"),
        (torch.ones(2, 6), {"group_size": 0}, "group_size=0"),
        (torch.ones(2, 6), {"group_size": -2}, "group_size=-2"),
        (torch.ones(2, 6), {"group_size": 2.0}, r"group_size=2\.0"),
        (torch.ones(6), {"group_size": 2}, r"group_size=2 needs rows, got shape \(6,\)"),
        (torch.ones(2, 6), {"axis": 0, "group_size": 2}, "both axis=0 and group_size=2"),
    ],
)
def test_bad_tensors_and_places_are_named(x, options, message):
    with pytest.raises(ValueError, match=message):
        choose_qparams(x, 8, **options)


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, True, "8", None])
def test_bad_bits_are_named(bits):
    with pytest.raises(ValueError, match=f"bits must be an integer from 2 to 8, got {bits!r}"):
        choose_qparams(torch.ones(3), bits)


@pytest.mark.parametrize(
    ("low", "high", "options", "message"),
    [
        (1.0, -1.0, {}, r"low=1\.0, high=-1\.0: swap"),
        (0.0, math.nan, {}, "NaN"),
        (torch.zeros(2), torch.ones(3), {"axis": 0}, r"low \(2,\) and high \(3,\)"),
        (torch.zeros(0), torch.ones(0), {"axis": 0}, "not empty"),
        (torch.zeros(2), torch.ones(2), {}, r"0 dimensions, got shape \(2,\)"),
        (0.0, 1.0, {"axis": 0}, r"1 dimensions, got shape \(\)"),
        (torch.zeros(2), torch.ones(2), {"axis": -1}, "axis=-1 is negative"),
        (torch.zeros(2), torch.ones(2), {"group_size": 4}, "2 dimensions"),
    ],
)
def test_bad_ranges_are_named(low, high, options, message):
    with pytest.raises(ValueError, match=message):
        qparams_from_range(low, high, 8, **options)
