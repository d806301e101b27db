# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Exercises: what a model weighs
#
# You count bytes, choose a scale and a zero_point, quantize a matrix row by row, and measure in decibels what a bit and
# a finer scale are worth. Then you build an evaluation that does not leak, and at the end you decide which model to
# ship. Plan one to two hours. Under each exercise a test cell tells you what is wrong; run it as often as you like.
# There are 25 points in all.

# %% nbgrader={"grade": false, "grade_id": "setup", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "code"}
import math
import os
from collections.abc import Callable

import torch
from torch import Tensor

from qft_utils import measure, quantization

Fit = Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]  # (features, labels) -> (features -> predicted labels)


def nearest_neighbour(features: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """A model that learns by heart: it answers with the label of the most similar row that it has seen."""
    exact = "donot_use_mm_for_euclid_dist"  # a row is at distance 0 from itself, and equal rows tie everywhere
    return lambda new: labels[torch.cdist(new, features, compute_mode=exact).argmin(1)]


def made_up_reviews(films: int, sentences: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, 12), labels (N,) and film numbers (N,) of N = films * sentences made-up sentences, shuffled.

    Eight of the features say which film a sentence is about, four give a faint hint whether its writer liked it.
    Most sentences about one film agree.
    """
    generator = torch.Generator().manual_seed(seed)
    film = torch.randperm(films * sentences, generator=generator) % films
    liked = torch.rand(films, generator=generator) < 0.5
    agrees = torch.rand(len(film), generator=generator) < 0.9
    labels = (liked[film] == agrees).long()
    about = 2 * torch.randn(films, 8, generator=generator)[film] + 0.5 * torch.randn(len(film), 8, generator=generator)
    hint = 0.8 * (2 * labels[:, None] - 1) + torch.randn(len(film), 4, generator=generator)
    numbers = 100 + torch.randperm(900, generator=generator)[:films]  # films are numbered as a library would
    return torch.cat([about, hint], 1), labels, numbers[film]


# %% [markdown] nbgrader={"grade": false, "grade_id": "e1_bytes_text", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "markdown"}
# ## 1. What a matrix weighs (2 points)
#
# The weight of a linear layer has shape (rows, columns). Each weight is stored in `bits` bits, packed without gaps. In
# each row, every `group_size` consecutive weights share one scale, and a scale takes `scale_bits` bits. (`group_size`
# divides `columns`. The quantizer is symmetric, so no zero_point is stored.)
#
# Write `weight_bytes`: the bytes of weights and scales together, rounded up to a whole byte at the end.
#
# Before you run the test: with 4 bits, groups of 32 and float32 scales, what does one weight really cost?


# %% nbgrader={"grade": false, "grade_id": "e1_bytes", "locked": false, "points": 0, "schema_version": 3, "solution": true, "task": false, "cell_type": "code"}
def weight_bytes(rows: int, columns: int, bits: int, group_size: int, scale_bits: int = 32) -> int:
    """Bytes of a quantized (rows, columns) weight, its scales included, rounded up to a whole byte."""
    ### BEGIN SOLUTION
    weights = rows * columns
    groups = weights // group_size  # a group never crosses the end of a row, since group_size divides columns
    return math.ceil((weights * bits + groups * scale_bits) / 8)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "e1_bytes_test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false, "cell_type": "code"}
_got = weight_bytes(4, 64, 4, 32)  # 256 weights in 8 groups
assert _got != 8 * 160, "1280 is the number of bits; a byte has 8 of them, so divide by 8"
assert _got != 128, "128 bytes are the weights alone; each group also stores a scale"
assert _got != 256 + 32, "you give every weight a whole byte; packed without gaps, two 4-bit weights share one"
assert _got != 128 + 4 * 4, (
    "you count one scale for each row; a row of 64 weights holds two groups of 32, each with its own"
)
assert _got != 128 + 4, "you count one scale for the whole matrix; each of its 8 groups has its own"
assert _got != 128 + 8 * 4 // 8, "you count a scale in as many bits as a weight; it has scale_bits bits"
assert _got == 160, (
    f"256 weights of 4 bits are 128 bytes and 8 scales of 32 bits are 32, so 160 in all; yours is {_got}"
)
_got = weight_bytes(4, 64, 4, 32, scale_bits=16)
assert _got == 144, f"with scales of 16 bits it is 128 + 16 = 144 bytes; yours is {_got}: use scale_bits"
_got = weight_bytes(3, 3, 3, 3, scale_bits=16)
assert _got == 10, (
    f"27 bits of weights and 48 of scales are 9.375 bytes, and a file holds whole ones, so 10; yours is {_got}: round up"
)
print(f"4 bits, groups of 32, float32 scales: {8 * weight_bytes(384, 384, 4, 32) / 384**2:.2f} bits for each weight")
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(int(os.environ.get("QFT_SEED", "2026")))
for _ in range(20):
    _rows, _groups, _size = (int(torch.randint(1, 40, (), generator=_generator)) for _ in range(3))
    _bits, _wide = (
        int(torch.randint(2, 9, (), generator=_generator)),
        16 * int(torch.randint(1, 3, (), generator=_generator)),
    )
    _want = -(-(_rows * _groups * _size * _bits + _rows * _groups * _wide) // 8)
    _got = weight_bytes(_rows, _groups * _size, _bits, _size, _wide)
    assert _got == _want, (
        f"a {_rows} x {_groups * _size} weight at {_bits} bits with a scale of {_wide} bits for every {_size} weights takes "
        f"{_want} bytes; yours is {_got}"
    )
### END HIDDEN TESTS

# %% [markdown] nbgrader={"grade": false, "grade_id": "e2_qparams_text", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "markdown"}
# ## 2. A scale and a zero_point (3 points)
#
# An affine quantizer with $b$ bits has the integers $0 \ldots 2^b - 1$ and maps
#
# $$q = \mathrm{clamp}(\mathrm{round}(r / s) + z,\; 0,\; 2^b - 1), \qquad \hat r = s\,(q - z).$$
#
# Choose the scale $s$ and the zero_point $z$ for values between `low` and `high`. Three rules:
#
# - The real number 0 must be a level, because padding and ReLU produce it all the time. So widen the range, where needed, until it holds 0.
# - The steps between the integers cover this range exactly.
# - $z$ is the integer that stands for 0. Choose it so that the low end of the range maps to $q = 0$, and round it to the nearest integer. (A tie may go either way.)
#
# Then no value in the range is off by more than half a step. The test checks that too.


# %% nbgrader={"grade": false, "grade_id": "e2_qparams", "locked": false, "points": 0, "schema_version": 3, "solution": true, "task": false, "cell_type": "code"}
def affine_qparams(low: float, high: float, bits: int) -> tuple[float, int]:
    """(scale, zero_point) of an unsigned affine quantizer for values in [low, high].

    low < high. The range may lie on one side of 0; it is widened to hold 0.
    """
    ### BEGIN SOLUTION
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1)  # 2**bits levels have one step fewer between them
    return scale, round(-low / scale)  # low maps to 0, so 0.0 lies -low / scale steps above it
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "e2_qparams_test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false, "cell_type": "code"}
_scale, _zero_point = affine_qparams(-1.0, 2.0, 4)
assert abs(_scale - 3 / 16) > 1e-6, "your scale divides by the 16 levels; between 16 levels there are 15 steps"
assert abs(_scale - 4 / 15) > 1e-6, "your range is [-2, 2]; that is the symmetric quantizer, and wastes levels below -1"
assert abs(_scale - 3 / 15) < 1e-6, f"the range [-1, 2] in 15 steps gives a scale of 0.2; yours is {float(_scale):.4f}"
assert _zero_point != -5, "your zero_point is -5; 0 lies above low, so it is -low / scale: mind the sign"
assert _zero_point != -3, "your zero_point is for signed integers from -8; here the integers are 0 to 15"
_scale, _zero_point = affine_qparams(-0.36, 1.0, 3)
assert float(_zero_point).is_integer(), (
    f"your zero_point is {float(_zero_point):.3f}; it must be an integer, or 0.0 is no level: round it"
)
assert _zero_point != 1, (
    "-low / scale is 1.85 here and your zero_point is 1; do not cut the fraction off, round to the nearest integer"
)
assert _zero_point == 2, f"-low / scale is 1.85, so the zero_point is 2; yours is {_zero_point}"
_scale, _zero_point = affine_qparams(0.5, 2.0, 4)
assert abs(_scale - 1.5 / 15) > 1e-6, "for [0.5, 2] your range does not hold 0; widen it first: low = min(low, 0)"
assert abs(_scale - 2 / 15) < 1e-6 and _zero_point == 0, (
    f"for [0.5, 2] the range is [0, 2], so scale 0.1333 and zero_point 0; yours are {_scale} and {_zero_point}"
)
_scale, _zero_point = affine_qparams(-3.0, -1.0, 4)
assert abs(_scale - 2 / 15) > 1e-6, (
    "for [-3, -1] your range does not hold 0; a range below 0 must be widened too: high = max(high, 0)"
)
assert abs(_scale - 3 / 15) < 1e-6 and _zero_point == 15, (
    f"for [-3, -1] the range is [-3, 0], so scale 0.2 and zero_point 15; yours are {_scale} and {_zero_point}"
)
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(int(os.environ.get("QFT_SEED", "2026")))
for _ in range(40):
    _bits = int(torch.randint(2, 9, (), generator=_generator))
    _low, _high = sorted((4 * torch.randn(2, generator=_generator)).tolist())
    _scale, _zero_point = affine_qparams(_low, _high, _bits)
    _span, _levels = max(_high, 0) - min(_low, 0), 2**_bits
    _case = f"for [{_low:.3f}, {_high:.3f}] and {_bits} bits"
    assert abs(_scale * (_levels - 1) / _span - 1) < 1e-4, (
        f"{_case} your scale times {_levels - 1} steps does not make the widened range"
    )
    assert float(_zero_point).is_integer(), f"{_case} your zero_point {_zero_point} is not an integer: round it"
    assert 0 <= _zero_point < _levels, (
        f"{_case} your zero_point {_zero_point} is not one of the integers 0 to {_levels - 1}"
    )
    _off = abs(_zero_point + min(_low, 0) / _scale)
    assert _off < 0.501, (
        f"{_case} your zero_point is {float(_off):.2f} steps from -low / scale; take the nearest integer"
    )
    _x = torch.linspace(_low, _high, 1001)
    _error = (
        (torch.fake_quantize_per_tensor_affine(_x, float(_scale), int(_zero_point), 0, _levels - 1) - _x)
        .abs()
        .max()
        .item()
    )
    assert _error < 0.502 * _scale, (
        f"{_case} a value is off by {_error / _scale:.2f} steps; inside the range half a step is the most"
    )
### END HIDDEN TESTS

# %% [markdown] nbgrader={"grade": false, "grade_id": "e3_round_trip_text", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "markdown"}
# ## 3. There and back, row by row (4 points)
#
# Now quantize a matrix with one scale for each **channel**, that is for each row. The quantizer is symmetric, so the
# zero_point is 0, and the integers are signed: with $b$ bits, $-2^{b-1} \ldots 2^{b-1} - 1$. The scales are given.
# Somebody else chose them, so some weights may lie outside what the levels cover; such a weight gets the nearest level
# that there is.
#
# Return both the integers and the real values that they stand for:
#
# $$q_{ij} = \mathrm{clamp}(\mathrm{round}(w_{ij} / s_i),\; q_\min,\; q_\max), \qquad \hat w_{ij} = s_i\, q_{ij}.$$
#
# Write it with plain tensor operations. The test compares your $\hat w$ with `torch.fake_quantize_per_channel_affine`.


# %% nbgrader={"grade": false, "grade_id": "e3_round_trip", "locked": false, "points": 0, "schema_version": 3, "solution": true, "task": false, "cell_type": "code"}
def round_trip(weight: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(q, w_hat) of symmetric quantization with a scale for each row; bits from 2 to 8.

    weight: (C, N) float32. scale: (C,) float32, positive.
    q: (C, N) int8, from -2**(bits - 1) to 2**(bits - 1) - 1. w_hat: (C, N) float32.
    """
    ### BEGIN SOLUTION
    step = scale[:, None]  # C -> C, 1: one for each row; without it a scale would meet a column
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    q = (weight / step).round().clamp(low, high)  # clamp while it is float: int8 would wrap around
    return q.to(torch.int8), q * step
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "e3_round_trip_test", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false, "cell_type": "code"}
_weight = torch.tensor([[0.3, -0.6, 100.0], [0.3, -0.6, -100.0], [0.07, 1.1, 0.4]])
_scale = torch.tensor([0.5, 0.25, 0.125])
_q, _w_hat = round_trip(_weight, _scale, 3)  # the integers are -4 to 3
assert _q.shape == _w_hat.shape == (3, 3), (
    f"q and w_hat have the weight's shape (3, 3); yours are {tuple(_q.shape)} and {tuple(_w_hat.shape)}"
)
assert _q.dtype == torch.int8, f"q is to be int8; yours is {_q.dtype}: convert with .to(torch.int8) at the end"
_by_column = (_weight / _scale).round().clamp(-4, 3)
assert not torch.equal(_q.float(), _by_column), (
    "you divide column j by scale j; row i belongs to scale i: use scale[:, None]"
)
assert _q[0, 0] != 0, (
    "0.3 is 0.6 of a step of 0.5 and your q is 0; converting to int8 cuts the fraction off: round first"
)
assert _q[2, 1] <= 3, (
    f"1.1 is 8.8 steps of 0.125 and became q = {_q[2, 1]}, but with 3 bits the greatest signed integer is 3: clamp to 2**(bits - 1) - 1"
)
assert _q[0, 2] >= 0, (
    f"100.0 became q = {_q[0, 2]}; int8 ends at 127 and starts again at -128: clamp first, convert to int8 afterwards"
)
assert _q[1, 2] != -3, "-100.0 became q = -3, but with 3 bits there is one level more, -4: the lowest is -2**(bits - 1)"
assert _q[1, 2] == -4, (
    f"-100.0 became q = {_q[1, 2]}, but the lowest integer with 3 bits is -4: clamp before you convert to int8"
)
_q_want = torch.tensor([[1, -1, 3], [1, -2, -4], [1, 3, 3]])
assert torch.equal(_q.long(), _q_want), f"q should be {_q_want.tolist()}; yours is {_q.tolist()}"
assert not torch.equal(_w_hat.float(), _q.float()), "your w_hat are still the integers; multiply each row by its scale"
assert _w_hat[0, 2] < 2, (
    "100.0 came back larger than the greatest level, 1.5; compute w_hat from the clamped q, not from the weight"
)
assert torch.allclose(_w_hat.float(), _q * _scale[:, None]), (
    f"w_hat is q times the row's scale, {(_q * _scale[:, None]).tolist()}; yours is {_w_hat.tolist()}"
)
_torch = torch.fake_quantize_per_channel_affine(_weight, _scale, torch.zeros(3, dtype=torch.int32), 0, -4, 3)
assert torch.allclose(_w_hat.float(), _torch), "your w_hat differs from torch.fake_quantize_per_channel_affine"
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(int(os.environ.get("QFT_SEED", "2026")))
for _bits in range(2, 9):
    for _ in range(4):
        _rows, _columns = (int(torch.randint(1, 30, (), generator=_generator)) for _ in range(2))
        _weight = torch.randn(_rows, _columns, generator=_generator)
        _scale = (0.5 + 2 * torch.rand(_rows, generator=_generator)) / 2 ** (_bits - 1)  # some values lie outside
        _before = _weight.clone(), _scale.clone()
        _q, _w_hat = round_trip(_weight, _scale, _bits)
        assert torch.equal(_weight, _before[0]) and torch.equal(_scale, _before[1]), (
            "you changed weight or scale in place; make new tensors"
        )
        assert _q.shape == _w_hat.shape == _weight.shape, (
            f"for a weight {tuple(_weight.shape)} your q is {tuple(_q.shape)} and your w_hat {tuple(_w_hat.shape)}"
        )
        assert _q.dtype == torch.int8, f"q is to be int8, yours is {_q.dtype}"
        _least, _most = -(2 ** (_bits - 1)), 2 ** (_bits - 1) - 1
        assert _q.min() >= _least and _q.max() <= _most, f"at {_bits} bits your q leaves {_least} to {_most}: clamp"
        _want = torch.fake_quantize_per_channel_affine(
            _weight, _scale, torch.zeros(_rows, dtype=torch.int32), 0, _least, _most
        )
        _ratio = _weight / _scale[:, None]
        _clear = ((_ratio - _ratio.floor()) - 0.5).abs() > 1e-3  # on a tie the two may take different sides
        assert torch.allclose(_w_hat[_clear].float(), _want[_clear], rtol=1e-4), (
            f"at {_bits} bits your w_hat differs from torch.fake_quantize_per_channel_affine"
        )
        assert torch.allclose(_q * _scale[:, None], _w_hat.float(), rtol=1e-4), (
            f"at {_bits} bits your w_hat is not q times the row's scale"
        )
### END HIDDEN TESTS

# %% [markdown] nbgrader={"grade": false, "grade_id": "e4_sqnr_text", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "markdown"}
# ## 4. What a bit is worth, and what a scale (5 points)
#
# A group is `group_size` consecutive weights of `weight.flatten()`, and has a scale of its own. So one number chooses the
# granularity: `weight.numel()` gives one scale for the tensor, the number of columns one for each channel (row), and
# a divisor of it one for each group.
#
# Quantize a matrix symmetrically, with $s = \max|w| / (2^{b-1} - 1)$ in each group. Every weight is then within the
# levels, so you need no clamp. Return the signal to quantization noise ratio of the *whole* matrix in decibels:
#
# $$\mathrm{SQNR} = 10 \log_{10} \frac{\sum w^2}{\sum (w - \hat w)^2}.$$
#
# Two expectations for the table that the test prints. Each further bit should add a little more than 6 dB (the levels
# on each side go from 7 at 4 bits to 127 at 8). And the test's matrix has rows of very different size, so one
# scale for the tensor should be far worse than one for each channel. Will groups gain as much again?


# %% nbgrader={"grade": false, "grade_id": "e4_sqnr", "locked": false, "points": 0, "schema_version": 3, "solution": true, "task": false, "cell_type": "code"}
def group_sqnr_db(weight: Tensor, bits: int, group_size: int) -> float:
    """SQNR in dB of symmetric quantization with one scale for each `group_size` consecutive weights.

    weight: (rows, columns) float32; group_size divides weight.numel(), and no group is all zeros. bits from 2 to 8.
    """
    ### BEGIN SOLUTION
    groups = weight.reshape(-1, group_size)  # rows, columns -> groups, group_size
    scale = groups.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)  # groups, 1
    noise = groups - (groups / scale).round() * scale
    # sums over everything before the ratio: small groups must not weigh as much as large ones
    return (10 * torch.log10(groups.square().sum() / noise.square().sum())).item()
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "e4_sqnr_test", "locked": true, "points": 5, "schema_version": 3, "solution": false, "task": false, "cell_type": "code"}
def _reference_sqnr(weight, bits, group_size):
    flat = weight.reshape(-1, group_size)
    return quantization.sqnr_db(
        flat, quantization.fake_quantize(flat, quantization.choose_qparams(flat, bits, symmetric=True, axis=0))
    )


_generator = torch.Generator().manual_seed(1)
_weight = torch.randn(48, 128, generator=_generator) * torch.randn(48, 1, generator=_generator).exp()
_got, _want = group_sqnr_db(_weight, 5, 16), _reference_sqnr(_weight, 5, 16)


def _is(value):
    return abs(_got - value) < 0.02


assert not _is(-_want), (
    f"your SQNR is {_got:.1f} dB, the right one with a minus; the signal belongs above, the noise below"
)
assert not _is(2 * _want), (
    "your SQNR is twice the right one; sums of squares are powers already, so the factor is 10 and not 20"
)
assert not _is(_want * math.log(10)), "you take the natural logarithm; decibels need log10"
assert not _is(_reference_sqnr(_weight, 5, _weight.numel())), (
    "you use one scale for the whole tensor; each group has its own: take the maximum over one dimension"
)
assert not _is(_reference_sqnr(_weight, 5, 128)), (
    "you use one scale for each row; each group has its own, whatever group_size is"
)
assert not _is(_reference_sqnr(_weight.T, 5, 16)), (
    "your groups run down the columns; reshape(-1, group_size) keeps weights of a row together"
)
assert not _is(_reference_sqnr(_weight.reshape(16, -1).T, 5, 16)), (
    "reshape(group_size, -1) takes weights that lie far apart; a group is consecutive: reshape(-1, group_size)"
)
assert not _is(_reference_sqnr(_weight, 6, 16)), (
    "your SQNR is that of one bit more; signed integers have 2**(bits - 1) - 1 levels on each side, not 2**bits - 1"
)
_each = [_reference_sqnr(row[None], 5, 16) for row in _weight.reshape(-1, 16)]
assert not _is(sum(_each) / len(_each)), (
    "you average the decibels of the groups; sum signal and noise over the whole matrix, then take one ratio"
)
_positive = torch.randn(16, 32, generator=_generator).exp()
_plus, _minus = group_sqnr_db(_positive, 4, 8), group_sqnr_db(-_positive, 4, 8)
assert abs(_plus - _minus) < 0.02, (
    f"a matrix has {_plus:.1f} dB and its negative {_minus:.1f}; the scale needs the largest magnitude: .abs() before the maximum"
)
assert _is(_want), f"at 5 bits with groups of 16 the SQNR is {_want:.2f} dB; yours is {_got:.2f}"

for _name, _size in (("per tensor", _weight.numel()), ("per channel", 128), ("groups of 16", 16)):
    print(f"{_name:13s}" + "  ".join(f"{_b} bits {group_sqnr_db(_weight, _b, _size):5.1f} dB" for _b in range(3, 9)))
_slope = (group_sqnr_db(_weight, 8, 128) - group_sqnr_db(_weight, 4, 128)) / 4
_theory = 20 * math.log10(127 / 7) / 4
_tensor, _channel, _group = (group_sqnr_db(_weight, 8, _size) for _size in (_weight.numel(), 128, 16))
print(
    f"at 8 bits, a scale for each channel gains {_channel - _tensor:.1f} dB, and one for each group {_group - _channel:.1f} dB more"
)
print(f"each bit from 4 to 8, per channel: {_slope:.2f} dB; theory: {_theory:.2f} dB")
assert abs(_slope - _theory) < 0.3, (
    f"per channel each bit should add about {_theory:.2f} dB; yours adds {_slope:.2f}: check the scale at 4 and at 8 bits"
)
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(int(os.environ.get("QFT_SEED", "2026")))
for _bits in range(2, 9):
    for _ in range(3):
        _rows, _groups, _size = (int(torch.randint(2, 24, (), generator=_generator)) for _ in range(3))
        _matrix = (
            torch.randn(_rows, _groups * _size, generator=_generator)
            * torch.randn(_rows, 1, generator=_generator).exp()
        )
        for _width in (_size, _groups * _size, _matrix.numel()):
            _got, _want = group_sqnr_db(_matrix, _bits, _width), _reference_sqnr(_matrix, _bits, _width)
            assert abs(_got - _want) < 0.1, (
                f"a {_rows} x {_groups * _size} matrix at {_bits} bits with groups of {_width} has {_want:.2f} dB; yours is {_got:.2f}"
            )
### END HIDDEN TESTS

# %% [markdown] nbgrader={"grade": false, "grade_id": "e5_report_text", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "markdown"}
# ## 5. A small project: an accuracy that you can believe (6 points)
#
# `made_up_reviews` gives you sentences, each about one film; most sentences about a film agree.
# `nearest_neighbour` is a model that learns by heart. You write the evaluation:
#
# 1. List the films, shuffle the list with `seed`, and take the first `round(share * number of films)` as test films.
#    (Any shuffle is welcome, as long as `seed` alone decides it.)
# 2. A sentence is a test sentence if its film is a test film.
# 3. Fit on the training sentences alone: `predict = fit(features, labels)`. Then predict the test sentences.
# 4. Compute the accuracy $p$ on the $n$ test sentences, and its 95 % interval by Wilson's formula, with $u = 1.96$:
#
# $$\frac{1}{1 + u^2/n}\left(p + \frac{u^2}{2n} \;\pm\; u \sqrt{\frac{p (1 - p)}{n} + \frac{u^2}{4 n^2}}\right).$$
#
# Unlike $p \pm u\sqrt{p(1-p)/n}$ it stays between 0 and 1, and it does not shrink to a point when all answers are right.
# (`measure.accuracy` knows the formula too. Write it out once yourself.)
#
# The test then evaluates the same model on a split that was drawn by sentence. Its test sentences have friends in the
# training set: sentences about the same film. Expect a much better figure, and do not believe it.


# %% nbgrader={"grade": false, "grade_id": "e5_report", "locked": false, "points": 0, "schema_version": 3, "solution": true, "task": false, "cell_type": "code"}
def film_report(
    features: Tensor, labels: Tensor, films: Tensor, fit: Fit, share: float, seed: int
) -> tuple[Tensor, float, float, float]:
    """(is_test, accuracy, low, high) of a model that is tested on films that it has not met.

    features: (N, D) float32. labels, films: (N,) int64. fit: see `nearest_neighbour`.
    share: fraction of the films that goes into the test. is_test: (N,) bool, true for a test sentence.
    """
    ### BEGIN SOLUTION
    names = films.unique()  # sorted, so the shuffle depends on nothing but the seed
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    is_test = torch.isin(films, names[order[: round(share * len(names))]])
    predict = fit(features[~is_test], labels[~is_test])
    right = predict(features[is_test]) == labels[is_test]
    p, n, u = right.float().mean().item(), len(right), 1.96
    centre = p + u**2 / (2 * n)
    half = u * math.sqrt(p * (1 - p) / n + u**2 / (4 * n**2))
    return is_test, p, (centre - half) / (1 + u**2 / n), (centre + half) / (1 + u**2 / n)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "e5_report_test", "locked": true, "points": 6, "schema_version": 3, "solution": false, "task": false, "cell_type": "code"}
def _check_split(is_test, films, share):
    assert is_test.dtype == torch.bool and is_test.shape == films.shape, (
        f"is_test is one bool for each sentence, {tuple(films.shape)}; yours is {is_test.dtype} of {tuple(is_test.shape)}"
    )
    test_films, train_films = set(films[is_test].tolist()), set(films[~is_test].tolist())
    shared = len(test_films & train_films)
    assert shared == 0, f"{shared} films are in training and in the test; that leaks: draw films, not sentences"
    want, count = round(share * len(films.unique())), len(test_films)
    assert count != len(films.unique()) - want or 2 * want == len(films.unique()), (
        "training and test have changed places: share is what goes into the test"
    )
    assert count == want, f"{share:.0%} of {len(films.unique())} films are {want} test films; you have {count}"


def _check_interval(accuracy, low, high, right):
    p, n = right.float().mean().item(), len(right)
    wald = 1.96 * math.sqrt(p * (1 - p) / n)
    assert abs(accuracy - p) < 1e-5, (
        f"on the test sentences {p:.4f} are right, for a model fitted on the others; your accuracy is {accuracy:.4f}"
    )
    assert low <= accuracy + 1e-6 and high >= accuracy - 1e-6, (
        "return the interval as low, then high, with the accuracy between them"
    )
    assert abs(low - (p - wald)) > 1e-5 or abs(high - (p + wald)) > 1e-5, (
        "your interval is p plus and minus 1.96 sqrt(p (1 - p) / n), not Wilson's"
    )
    want = measure.accuracy(right.long(), torch.ones(n, dtype=torch.int64))
    assert abs(low - want.low) < 2e-4 and abs(high - want.high) < 2e-4, (
        f"{right.sum()} right of {n} give Wilson's interval {want.low:.4f} to {want.high:.4f}; yours is {low:.4f} to {high:.4f}. "
        "Is n the number of test sentences, and u 1.96?"
    )


def _spy(seen):  # a model that also writes down what it was fitted on; column 0 of the features is the row's number
    def fit(features, labels):
        seen.append(features[:, 0].long())
        predict = nearest_neighbour(features[:, 1:], labels)
        return lambda new: predict(new[:, 1:])

    return fit


def _check_report(features, labels, films, share, seed):
    numbered, seen = torch.cat([torch.arange(len(films))[:, None].float(), features], 1), []
    is_test, accuracy, low, high = film_report(numbered, labels, films, _spy(seen), share, seed)
    _check_split(is_test, films, share)
    assert seen, "you never called fit; the model comes from predict = fit(features, labels)"
    fitted = torch.cat(seen)
    assert not is_test[fitted].any(), (
        f"fit has seen {int(is_test[fitted].sum())} test sentences; fit on features[~is_test] and labels[~is_test]"
    )
    assert len(fitted.unique()) == int((~is_test).sum()), "fit has not seen all of the training sentences"
    right = nearest_neighbour(features[~is_test], labels[~is_test])(features[is_test]) == labels[is_test]
    own = nearest_neighbour(features[~is_test], labels[~is_test])(features) == labels
    assert abs(accuracy - own.float().mean().item()) > 1e-5, (
        "your accuracy counts the training sentences too; measure on the test sentences alone"
    )
    _check_interval(accuracy, low, high, right)
    return is_test


_features, _labels, _films = made_up_reviews(40, 20, seed=0)
_is_test = _check_report(_features, _labels, _films, 0.25, seed=0)
_again = film_report(_features, _labels, _films, nearest_neighbour, 0.25, 0)[0]
assert torch.equal(_is_test, _again), (
    "the same seed gave two different splits; shuffle with a generator that is seeded with `seed`"
)
_others = [film_report(_features, _labels, _films, nearest_neighbour, 0.25, _s)[0] for _s in range(1, 5)]
assert not all(torch.equal(_is_test, _o) for _o in _others), (
    "five seeds give the same split; shuffle the films with `seed`"
)
_, _accuracy, _low, _high = film_report(
    _labels[:, None].float(), _labels, _films, lambda f, la: lambda new: new[:, 0].long(), 0.25, 0
)
_n = int(_is_test.sum())
assert _accuracy == 1 and abs(_high - 1) < 1e-4 and abs(_low - 1 / (1 + 1.96**2 / _n)) < 1e-4, (
    f"a model that is right {_n} times of {_n} has accuracy 1 and Wilson's interval {1 / (1 + 1.96**2 / _n):.4f} to 1; "
    f"yours is {_low:.4f} to {_high:.4f}"
)

_, _accuracy, _low, _high = film_report(_features, _labels, _films, nearest_neighbour, 0.25, 0)
_order = torch.randperm(len(_films), generator=torch.Generator().manual_seed(0))
_leaky, _rest = _order[: len(_order) // 4], _order[len(_order) // 4 :]
_friends = measure.accuracy(nearest_neighbour(_features[_rest], _labels[_rest])(_features[_leaky]), _labels[_leaky])
print(f"split by film:     {_accuracy:.1%} [{_low:.1%}, {_high:.1%}]")
print(f"split by sentence: {_friends.value:.1%} [{_friends.low:.1%}, {_friends.high:.1%}], with friends in training")
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(int(os.environ.get("QFT_SEED", "2026")))
for _share in (0.2, 0.25, 0.4, 0.5):
    _seed = int(torch.randint(1000, (), generator=_generator))
    _count, _sentences = (
        20 * int(torch.randint(1, 4, (), generator=_generator)),
        int(torch.randint(6, 15, (), generator=_generator)),
    )
    _check_report(*made_up_reviews(_count, _sentences, _seed), _share, _seed)
### END HIDDEN TESTS

# %% [markdown] nbgrader={"grade": false, "grade_id": "e6_ship_text", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "markdown"}
# ## 6. Which one do you ship? (5 points)
#
# A program tags film reviews on people's laptops, without a GPU, one sentence at a time. Your company's rules: the model
# file must not exceed 60 MB, and a sentence must not take more than 20 ms. The cell below shows five candidates.
# **The numbers are made up for this exercise.** Every model was tested on 1,500 sentences. For A to D they are the same
# sentences, about films that no model has met. For E, somebody drew the sentences at random before training, from the
# same films.
#
# *Lost* and *won* count the test sentences on which only A, or only the candidate, is right. The last columns compare
# the two in pairs.
#
# Which model do you ship? Defend it in about 100 words. Say why you reject each of the others, which differences in
# accuracy are real, what your choice costs, and what you would measure before the release.

# %% nbgrader={"grade": false, "grade_id": "e6_ship_table", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "code"}
# made-up example data: right of 1500, lost to A, won from A, file in MB, one sentence in ms, note
candidates = {
    "A float32": (1192, 0, 0, 91, 14, ""),
    "B int8, eager": (1189, 9, 6, 58, 27, ""),
    "C int8, compiled": (1189, 9, 6, 58, 6, "compiles for 35 s at the first start"),
    "D 4 bits, compiled": (1160, 61, 29, 49, 5, "compiles for 50 s at the first start"),
    "E int8, compiled": (1296, None, None, 58, 6, "test sentences drawn at random"),
}
print(f"{'':20s}{'accuracy, 95 % interval':27s}{'file':>7s}{'sentence':>10s}   lost  won  points to A    p       note")
for name, (right, lost, won, megabytes, milliseconds, note) in candidates.items():
    interval = measure.accuracy(torch.arange(1500) < right, torch.ones(1500, dtype=torch.bool))
    row = f"{name:20s}{interval.value:.1%} [{interval.low:.1%}, {interval.high:.1%}]".ljust(47)
    row += f"{megabytes:4d} MB{milliseconds:7d} ms   "
    if lost is None:
        row += "not the same sentences".ljust(34)
    elif lost:
        only_a = torch.arange(1500) < lost
        only_it = torch.arange(1500) >= 1500 - won
        paired = measure.compare_paired(~only_it, ~only_a)  # all others count alike for both
        points = paired.difference.scaled(100)
        row += f"{lost:4d} {won:4d}  {points.low:+.1f} to {points.high:+.1f}  {paired.p_value:.4f}   "
    print(row + note)

# %% [markdown] nbgrader={"grade": true, "grade_id": "e6_ship", "locked": false, "points": 5, "schema_version": 3, "solution": true, "task": false, "cell_type": "markdown"}
# ### BEGIN SOLUTION
# I ship C. A breaks the rule on size and B the rule on time, though B has the very same weights as C: eager int8
# spends its time around the products. E's accuracy is not comparable. Its test sentences have films in common with
# its training, so the figure measures memory; tested like the others it may be no better. D is smaller, and its interval
# overlaps A's, but the same sentences were used, so the paired comparison decides: D loses about two points, and that
# is a real loss. C is a tie with A: its interval in pairs holds zero and leaves room for a loss of less than one point.
# My choice costs 35 seconds at the first start. Before the release I would time it on the slowest laptop that we support,
# and test it on newer films.
#
# **Rubric** (5 points): 1 for a choice that respects both rules and names them (C; or D, with a reason why nine megabytes
# are worth a real loss); 1 for rejecting E because of the leak, not because of its size or its name; 1 for using the
# paired columns: C ties with A, D really loses, overlapping intervals prove nothing; 1 for saying what the choice costs (the compilation,
# or D's accuracy); 1 for a measurement that could change the decision.
# ### END SOLUTION
