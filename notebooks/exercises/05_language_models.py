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
# # Exercises: fine-tuning quantized language models
#
# You measure a language model by its tokens, press four-bit codes into bytes, quantize in groups, pin an adapter to a frozen layer, and let several documents share a row without a leak.
# Plan an hour and a half to two hours. Under each exercise a test cell tells you what is wrong, and how to mend it; the last exercise is answered in words.
# There are 24 points in all.

# %% nbgrader={"grade": false, "grade_id": "setup", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "code"}
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def unpack_halves(packed: Tensor) -> Tensor:
    """The codes, uint8 (N, K), of bytes (N, K/2): first all low halves, then all high halves."""
    return torch.cat([packed & 15, packed >> 4], -1)


class Lora(NamedTuple):
    """What exercise 4 returns: the adapter's two matrices, and two functions that use them."""

    A: nn.Parameter  # r, K
    B: nn.Parameter  # N, r
    forward: Callable[[Tensor], Tensor]  # (M, K) -> (M, N)
    merged: Callable[[], Tensor]  # () -> (N, K)


def tiny_model(input_ids: Tensor, position_ids: Tensor, mask: Tensor) -> Tensor:
    """Two layers of attention with fixed random embeddings, for exercise 5: (L,), (L,), bool (L, L) -> (L, 16)."""
    generator = torch.Generator().manual_seed(0)
    tokens, places = torch.randn(64, 16, generator=generator), torch.randn(64, 16, generator=generator)
    x = (tokens[input_ids] + places[position_ids])[None]  # 1, L, 16
    for _ in range(2):
        x = x + F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
    return x[0]


# %% [markdown] nbgrader={"grade": false, "grade_id": "e1_perplexity_text", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "markdown"}
# ## 1. How many words does it hesitate between? (3 points)
#
# The **perplexity** of a model is the exponential of its mean loss, in nats. The mean is over all *predicted tokens* of all documents together: a document of a hundred tokens
# counts a hundred times as much as a document of one. Padding is not predicted, and so it counts neither above nor below the fraction line.
#
# Write `perplexity`. Before you run the test: what should a model get that finds ten tokens equally likely, everywhere?

# %% nbgrader={"grade": false, "grade_id": "e1_perplexity", "locked": false, "points": 0, "schema_version": 3, "solution": true, "task": false, "cell_type": "code"}
def perplexity(nats: Tensor, predicted: Tensor) -> float:
    """exp of the mean loss of a predicted token.

    nats: float (N, L), the loss of each token of N documents; predicted: bool (N, L), False for padding.
    What stands in `nats` at padding means nothing.
    """
    ### BEGIN SOLUTION
    # A boolean index drops the padding and puts all documents in one row, so that each token has the same weight.
    return nats[predicted].mean().exp().item()
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "e1_perplexity_test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false, "cell_type": "code"}
_got = float(perplexity(torch.full((2, 5), math.log(10)), torch.ones(2, 5, dtype=torch.bool)))
assert abs(_got - math.log(10)) > 1e-3, "you return the mean loss itself; the perplexity is its exponential"
assert abs(_got - 2 ** math.log(10)) > 1e-3, "the losses are in nats, so the base is e, not 2: use exp"
assert abs(_got - 10) < 1e-3, f"a model that finds 10 tokens equally likely has perplexity 10; yours is {_got:.4f}"

# The first document has four tokens with a loss of 1; the second one has a single token with a loss of 3, and padding.
_nats = torch.tensor([[1.0, 1.0, 1.0, 1.0], [3.0, 9.0, 9.0, 9.0]])
_predicted = torch.tensor([[True, True, True, True], [True, False, False, False]])
_got = float(perplexity(_nats, _predicted))
assert abs(_got - math.exp(34 / 8)) > 1e-3, "the losses at padding are in your mean; use only those where predicted is True"
assert abs(_got - math.exp(7 / 8)) > 1e-3, "padding still counts as tokens without a loss; divide by the number of predicted tokens, not by N * L"
assert abs(_got - (math.e + math.exp(3)) / 2) > 1e-3, "this is the mean of each document's perplexity; take one mean over all tokens first, then one exponential"
assert abs(_got - math.exp(2)) > 1e-3, "your mean gives each document the same weight; a document with four tokens must count four times as much as one with a single token"
assert abs(_got - math.exp(7 / 5)) < 1e-3, f"five tokens have 7 nats in all, so the perplexity is exp(7/5) = {math.exp(7 / 5):.4f}; yours is {_got:.4f}"
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(int(os.environ.get("QFT_SEED", "2026")))
for _ in range(10):
    _n, _length, _words = (int(torch.randint(2, 9, (), generator=_generator)) for _ in range(3))
    _logits = 2 * torch.randn(_n, _length, _words, generator=_generator)
    _targets = torch.randint(0, _words, (_n, _length), generator=_generator)
    _predicted = torch.arange(_length) < torch.randint(1, _length + 1, (_n, 1), generator=_generator)
    _want = math.exp(F.cross_entropy(_logits[_predicted], _targets[_predicted]).item())
    _nats = F.cross_entropy(_logits.transpose(1, 2), _targets, reduction="none")
    _got = float(perplexity(_nats, _predicted))
    assert abs(_got / _want - 1) < 1e-4, f"{_n} documents, {int(_predicted.sum())} predicted tokens: by F.cross_entropy the perplexity is {_want:.4f}; yours is {_got:.4f}"
### END HIDDEN TESTS

# %% [markdown] nbgrader={"grade": false, "grade_id": "e2_pack_text", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "markdown"}
# ## 2. Two codes to a byte (3 points)
#
# Four-bit codes that are stored one to a byte save nothing over eight bits. The chapter takes GGUF's bytes apart with `& 15` and `>> 4`; here `unpack_halves` does that. You write the way in.
#
# A row has K codes. Byte j holds code j in its low half (the last four bits) and code j + K/2 in its high half. So the codes 1, 2, 3, 4 become two bytes, in hexadecimal `31` and `42`.
# A row with an odd number of codes cannot be split like this: raise a `ValueError` then, rather than lose a code without a word.

# %% nbgrader={"grade": false, "grade_id": "e2_pack", "locked": false, "points": 0, "schema_version": 3, "solution": true, "task": false, "cell_type": "code"}
def pack_halves(codes: Tensor) -> Tensor:
    """Bytes, uint8 (N, K/2), of codes, uint8 (N, K) with values 0..15.

    Byte j of a row: code j in the low half, code j + K/2 in the high half. Raises ValueError for odd K.
    """
    ### BEGIN SOLUTION
    half, rest = divmod(codes.shape[1], 2)
    if rest:
        raise ValueError(f"{codes.shape[1]} codes in a row: need an even number, two to a byte")
    # The low half has only its last four bits set and the shifted one only its first four, so "or" puts them together.
    return codes[:, :half] | codes[:, half:] << 4
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "e2_pack_test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false, "cell_type": "code"}
_codes = torch.tensor([[1, 2, 3, 4], [15, 0, 0, 15]], dtype=torch.uint8)
_got = pack_halves(_codes)
assert _got.shape == (2, 2), f"2 rows of 4 codes make 2 rows of 2 bytes; yours have the shape {tuple(_got.shape)}"
assert _got.dtype is torch.uint8, f"your bytes are stored as {_got.dtype}, which takes {_got.element_size()} bytes for two codes and saves nothing; return uint8"
_first = [f"{_byte:02x}" for _byte in _got[0].tolist()]
assert _first != ["21", "43"], "you pair neighbours, codes 0 and 1; pair code j with code j + K/2, from the other half of the row"
assert _first != ["13", "24"], "your halves are swapped: the first half of the row belongs in the low four bits, the second half is shifted by four"
assert _first == ["31", "42"], f"the codes 1, 2, 3, 4 become the bytes 31 42; yours are {' '.join(_first)}. A byte is low + 16 * high; mind the brackets, since + binds tighter than <<"
assert torch.equal(unpack_halves(_got), _codes), "unpack_halves does not return the codes that you packed; look at the second row, 15 0 0 15"
try:
    pack_halves(torch.ones(2, 3, dtype=torch.uint8))
    _error = None
except Exception as _caught:
    _error = _caught
assert isinstance(_error, ValueError), f"3 codes are an odd number and must raise a ValueError; yours gives {type(_error).__name__ if _error else 'no error, and other codes'}"
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(int(os.environ.get("QFT_SEED", "2026")))
for _ in range(10):
    _n, _half = (int(torch.randint(1, 20, (), generator=_generator)) for _ in range(2))
    _codes = torch.randint(0, 16, (_n, 2 * _half), generator=_generator, dtype=torch.uint8)
    _given = _codes.clone()
    _got = pack_halves(_codes)
    _want = (_given[:, :_half].long() + 16 * _given[:, _half:].long()).to(torch.uint8)
    assert torch.equal(_codes, _given), "pack_halves changes the codes that it is given; work on a copy"
    assert _got.shape == _want.shape and _got.dtype is torch.uint8 and torch.equal(_got, _want), f"with {_n} rows of {2 * _half} codes, byte j is not code j + 16 * code (j + K/2) everywhere"
    try:
        pack_halves(torch.zeros(_n, 2 * _half + 1, dtype=torch.uint8))
        _error = None
    except Exception as _caught:
        _error = _caught
    assert isinstance(_error, ValueError), f"{2 * _half + 1} codes in a row are odd and must raise a ValueError"
### END HIDDEN TESTS

# %% [markdown] nbgrader={"grade": false, "grade_id": "e3_groups_text", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "markdown"}
# ## 3. Sixteen drawers for every 32 weights (4 points)
#
# Q4_1 is affine quantization in groups. Each group of 32 neighbours in a row has its own scale s and its own minimum m, and a weight is restored as $w = s\,q + m$ with a code q from 0 to 15.
# The smallest weight of a group gets code 0, the largest gets code 15, and no weight is off by more than s/2.
#
# In a group whose weights are all equal, there is no range to divide by. Its codes are 0 there, and all its weights must come back as they were.
#
# Keep the codes as whole numbers in float32: there a NaN shows, while a cast to uint8 may turn it into an innocent 0. (GGUF also rounds s and m to float16. Leave that out.)

# %% nbgrader={"grade": false, "grade_id": "e3_groups", "locked": false, "points": 0, "schema_version": 3, "solution": true, "task": false, "cell_type": "code"}
def quantize_groups(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and minimum of groups of 32, so that weight is about scale * code + minimum.

    weight: float32 (N, K), K a multiple of 32. Returns codes, float32 (N, K) with whole numbers 0..15;
    scale and minimum, float32 (N, K/32).
    """
    ### BEGIN SOLUTION
    groups = weight.unflatten(1, (-1, 32))  # N, K/32, 32
    minimum, maximum = groups.amin(-1), groups.amax(-1)
    scale = (maximum - minimum) / 15  # 16 codes, 15 steps between them
    # Where all weights are equal the distance to the minimum is 0, so any divisor but 0 gives code 0.
    divisor = torch.where(scale > 0, scale, 1.0)
    codes = ((groups - minimum[..., None]) / divisor[..., None]).round().clamp(0, 15)
    return codes.flatten(1), scale, minimum
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "e3_groups_test", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false, "cell_type": "code"}
_ramp = torch.linspace(0, 1, 32)
_weight = torch.stack([torch.cat([0.3 * _ramp - 0.11, 3 * _ramp + 1]), torch.cat([-1.5 * _ramp.square(), 0.6 * _ramp.sqrt() - 0.2])])
_codes, _scale, _minimum = quantize_groups(_weight)
assert _codes.shape == (2, 64), f"there is one code for each weight, (2, 64); yours have the shape {tuple(_codes.shape)}"
assert _scale.shape == _minimum.shape == (2, 2), f"rows of 64 weights have 2 groups of 32, so scale and minimum are (2, 2); yours are {tuple(_scale.shape)} and {tuple(_minimum.shape)}"
assert _codes.dtype is torch.float32, f"keep the codes in float32 in this exercise, where a NaN shows; yours are {_codes.dtype}"
_want = torch.tensor([[0.02, 0.2], [0.1, 0.04]])
assert not torch.allclose(_scale, _want * 15 / 16), "your scale divides by 16; sixteen codes have 15 steps between them"
assert not torch.allclose(_scale, _weight.view(2, 2, 32).abs().amax(-1) / 7, rtol=1e-3), "your scale is symmetric, from the largest absolute value; Q4_1 covers the range from minimum to maximum"
_all = [(_weight.max() - _weight.min()).expand(2, 2) / 15, (_weight.amax(1) - _weight.amin(1))[:, None].expand(2, 2) / 15]
assert not any(torch.allclose(_scale, _wide) for _wide in _all), "your scale covers a whole row, or the whole tensor; take the range of each group of 32"
assert torch.allclose(_scale, _want, atol=1e-5), f"the ranges of the groups over 15 are {_want.tolist()}; your scales are {_scale.tolist()}"
assert torch.allclose(_minimum, torch.tensor([[-0.11, 1.0], [-1.5, -0.2]]), atol=1e-5), f"the minimum is the smallest weight of each group; yours are {_minimum.tolist()}"
assert torch.equal(_codes, _codes.round()) and _codes.min() >= 0 and _codes.max() <= 15, "codes are whole numbers from 0 to 15; round them, and clamp them"
_off = (_codes.view(2, 2, 32) * _scale[..., None] + _minimum[..., None] - _weight.view(2, 2, 32)).abs() / _scale[..., None]
assert _off.max() < 0.501, f"a weight is off by {_off.max():.2f} of its scale; with the nearest code it is 0.5 at most. Subtract the minimum first, divide, and round last, to the nearest"
assert _codes.view(2, 2, 32).amin(-1).eq(0).all() and _codes.view(2, 2, 32).amax(-1).eq(15).all(), "in each group the smallest weight has code 0 and the largest code 15"
_flat = torch.cat([torch.full((1, 32), 0.3), torch.zeros(1, 32)], 1)
_codes, _scale, _minimum = quantize_groups(_flat)
assert all(_part.isfinite().all() for _part in (_codes, _scale, _minimum)), "a group with equal weights gives NaN: its range is 0, and 0/0 is no number. Divide by something else where the scale is 0"
assert _codes.eq(0).all() and torch.allclose(_minimum.repeat_interleave(32, 1), _flat), "in a group with equal weights all codes are 0, and the minimum is that weight"
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(int(os.environ.get("QFT_SEED", "2026")))
for _ in range(10):
    _n, _groups = (int(torch.randint(1, 6, (), generator=_generator)) for _ in range(2))
    _spread = 10 ** (2 * torch.rand(_n, _groups, 1, generator=_generator) - 2)  # another range in each group
    _weight = (_spread * (torch.randn(_n, _groups, 32, generator=_generator) + torch.randn(_n, _groups, 1, generator=_generator))).flatten(1)
    _weight[0, :32] = torch.randn((), generator=_generator)  # one group of equal weights
    _given = _weight.clone()
    _codes, _scale, _minimum = quantize_groups(_weight)
    assert torch.equal(_weight, _given), "quantize_groups changes the weight that it is given; work on a copy"
    assert _codes.shape == _weight.shape and _scale.shape == _minimum.shape == (_n, _groups), f"wrong shapes for a weight of {tuple(_weight.shape)}"
    assert all(_part.isfinite().all() for _part in (_codes, _scale, _minimum)), "a group with equal weights gives NaN or infinity; do not divide by a scale of 0"
    assert torch.equal(_codes, _codes.round()) and _codes.min() >= 0 and _codes.max() <= 15, "codes are whole numbers from 0 to 15"
    _in = _weight.view(_n, _groups, 32)
    _low, _high = _in.amin(-1), _in.amax(-1)
    _varied = _high > _low
    assert torch.allclose(_minimum, _low), "the minimum is not the smallest weight of each group"
    assert torch.allclose(_scale[_varied], ((_high - _low) / 15)[_varied], rtol=1e-3), "the scale is not (maximum - minimum) / 15 of each group"
    _each = _codes.view(_n, _groups, 32)
    assert _each.amin(-1).eq(0).all() and _each.amax(-1)[_varied].eq(15).all(), "in each group the smallest weight has code 0 and the largest code 15"
    assert _each[~_varied].eq(0).all(), "in a group with equal weights all codes are 0"
    _off = (_each * _scale[..., None] + _minimum[..., None] - _in).abs()
    assert (_off <= 0.502 * _scale[..., None] + 1e-5).all(), "a weight is off by more than half its scale; round to the nearest code"
### END HIDDEN TESTS

# %% [markdown] nbgrader={"grade": false, "grade_id": "e4_lora_text", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "markdown"}
# ## 4. A slip of paper (4 points)
#
# An adapter adds two thin matrices to a layer that does not move:
#
# $$y = x W^\top + b + \frac{\alpha}{r}\, x A^\top B^\top,\qquad A \in \mathbb R^{r \times K},\ B \in \mathbb R^{N \times r}.$$
#
# Write `add_lora`. It freezes the base layer's weight and bias, makes A and B, and returns them in a `Lora` with two functions: `forward(x)` computes y, and `merged()` gives the one weight that,
# with the base's bias, does the same as both together. `merged()` is a report, not an operation: it leaves the base as it is.
#
# $B$ begins at zero and $A$ at small random numbers, so the layer begins as it was. Before you run the test: in the first step, which of the two matrices gets a gradient that is not zero?

# %% nbgrader={"grade": false, "grade_id": "e4_lora", "locked": false, "points": 0, "schema_version": 3, "solution": true, "task": false, "cell_type": "code"}
def add_lora(base: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> Lora:
    """An adapter beside a frozen layer of K inputs and N outputs.

    A: nn.Parameter (rank, K), normal numbers from the generator, divided by sqrt(K); B: nn.Parameter (N, rank), zeros.
    forward: x (M, K) -> y (M, N), with the values that A and B have when it is called.
    merged: () -> (N, K), so that F.linear(x, merged(), base.bias) equals forward(x).
    """
    ### BEGIN SOLUTION
    base.requires_grad_(False)
    A = nn.Parameter(torch.randn(rank, base.in_features, generator=generator) / base.in_features**0.5)
    B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(x: Tensor) -> Tensor:
        # Two thin products, x A^T first: the full N x K matrix B A is never made.
        return base(x) + alpha / rank * (x @ A.T @ B.T)

    def merged() -> Tensor:
        # Transpose (x A^T B^T) and x goes away: B A is what is added to W.
        return base.weight + alpha / rank * (B @ A)

    return Lora(A, B, forward, merged)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "e4_lora_test", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false, "cell_type": "code"}
_generator = torch.Generator().manual_seed(0)
_base = nn.utils.skip_init(nn.Linear, 8, 8)
with torch.no_grad():
    for _p in _base.parameters():
        _p.copy_(torch.randn(_p.shape, generator=_generator))
_x, _before = torch.randn(5, 8, generator=_generator), _base.weight.detach().clone()
_start = _base(_x).detach()
_layer = add_lora(_base, 2, 6.0, _generator)
assert _layer.A.shape == (2, 8) and _layer.B.shape == (8, 2), f"A is (rank, K) = (2, 8) and B is (N, rank) = (8, 2); yours are {tuple(_layer.A.shape)} and {tuple(_layer.B.shape)}"
assert all(isinstance(_p, nn.Parameter) and _p.requires_grad for _p in (_layer.A, _layer.B)), "A and B are what trains: make both an nn.Parameter"
assert not any(_p.requires_grad for _p in _base.parameters()), "the base layer would still train; freeze its weight and its bias with requires_grad_(False)"
assert not torch.allclose(_layer.forward(_x), _start - _base.bias), "your forward loses the bias of the base layer; call base(x) for the frozen part"
assert _layer.B.eq(0).all(), "B must begin at zero; otherwise the first step does not begin from the model as it was"
assert _layer.A.ne(0).any(), "A and B are both zero: then each one's gradient is zero as well, and nothing ever trains. Draw A at random"
assert torch.allclose(_layer.forward(_x), _start, atol=1e-5), "with B at zero, forward(x) must be what the base layer gave alone"
_layer.forward(_x).square().sum().backward()
assert _layer.B.grad is not None and _layer.B.grad.ne(0).any(), "no gradient reaches B; do not detach in forward"
assert _layer.A.grad is not None and _layer.A.grad.eq(0).all(), "in the first step the gradient of A is zero, because B is: yours is not, or A is left out"
with torch.no_grad():
    _layer.A.copy_(torch.randn(2, 8, generator=_generator))
    _layer.B.copy_(torch.randn(8, 2, generator=_generator))
_got, _added = (_layer.forward(_x) - _start).detach(), (_x @ _layer.A.T @ _layer.B.T).detach()
assert _got.ne(0).any(), "forward does not use the values that A and B have when it is called"
for _factor, _name in ((1, "1"), (6, "alpha"), (1 / 2, "1 / rank"), (12, "alpha * rank"), (1 / 3, "rank / alpha")):
    assert not torch.allclose(_got, _factor * _added, rtol=1e-3, atol=1e-3), f"the adapter's part is multiplied by {_name}; it should be alpha / rank"
assert torch.allclose(_got, 3 * _added, rtol=1e-3, atol=1e-3), "the adapter's part of forward is not alpha / rank * x A^T B^T"
_weight = _layer.merged().detach().clone()
assert torch.equal(_base.weight, _before), "merged() changes the base layer, so that forward would add the adapter twice; return a new tensor"
assert _weight.shape == (8, 8) and not torch.allclose(_weight, _before + 3 * (_layer.B @ _layer.A).T, rtol=1e-3, atol=1e-3), "your merged change is transposed, or of another shape; for an nn.Linear weight of (N, K) it is B A, not A^T B^T"
assert torch.allclose(F.linear(_x, _weight, _base.bias), _layer.forward(_x), rtol=1e-3, atol=1e-3), "the merged weight does not compute what forward does; it is W + alpha / rank * B A"
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(int(os.environ.get("QFT_SEED", "2026")))
for _ in range(8):
    _inputs, _outputs, _rank = (int(torch.randint(2, 12, (), generator=_generator)) for _ in range(3))
    _alpha = 0.5 + 8 * torch.rand((), generator=_generator).item()
    _bias = bool(torch.randint(0, 2, (), generator=_generator))
    _base = nn.utils.skip_init(nn.Linear, _inputs, _outputs, bias=_bias)
    with torch.no_grad():
        for _p in _base.parameters():
            _p.copy_(torch.randn(_p.shape, generator=_generator))
    _layer, _x = add_lora(_base, _rank, _alpha, _generator), torch.randn(3, _inputs, generator=_generator)
    assert _layer.A.shape == (_rank, _inputs) and _layer.B.shape == (_outputs, _rank), f"A or B has a wrong shape for {_inputs} inputs, {_outputs} outputs and rank {_rank}"
    assert _layer.B.eq(0).all() and _layer.A.ne(0).any() and not any(_p.requires_grad for _p in _base.parameters()), "at the start B is zero, A is not, and the base is frozen"
    with torch.no_grad():
        _layer.B.copy_(torch.randn(_outputs, _rank, generator=_generator))
    _want = _base(_x) + _alpha / _rank * _x @ _layer.A.T @ _layer.B.T
    assert torch.allclose(_layer.forward(_x), _want, rtol=1e-3, atol=1e-3), f"forward is not base(x) + alpha / rank * x A^T B^T at rank {_rank} and alpha {_alpha:.2f}"
    assert torch.allclose(F.linear(_x, _layer.merged(), _base.bias), _want, rtol=1e-3, atol=1e-3), f"the merged weight does not compute what forward does at {_inputs} inputs and {_outputs} outputs"
### END HIDDEN TESTS

# %% [markdown] nbgrader={"grade": false, "grade_id": "e5_rows_text", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "markdown"}
# ## 5. A small project: neighbours who do not listen (6 points)
#
# Short documents share a row, so that little of a batch is padding. Write `packed_row`, which returns all that a training step needs to keep them apart:
#
# - `input_ids`: the documents in their order, one after the other, then `pad` up to the length;
# - `position_ids`: places that begin anew at 0 with each document. Each padding token has position 0, as if it were a document of its own;
# - `labels`: at each place the token that stands there (the model's loss does the shifting by one), but -100, which no loss counts, for the first token of each document and for padding.
#   The first token has nothing before it in its own document from which it could be predicted;
# - `mask`: `mask[i, j]` is True where token i may look at token j: j is in the same document, and not later than i. A token looks at itself. You need nothing but the positions: a document begins wherever they are 0.
#
# Mind that `pad` is often the same number as the token that ends a document. That last token is to be learned all the same.
#
# Before you run the test, decide what you expect: two documents go through a small model of attention, once together and once each alone. Do their outputs agree, to rounding?
# And if a token in the first document is replaced, how much do the outputs of the second one change?

# %% nbgrader={"grade": false, "grade_id": "e5_rows", "locked": false, "points": 0, "schema_version": 3, "solution": true, "task": false, "cell_type": "code"}
def packed_row(documents: list[list[int]], length: int, pad: int) -> dict[str, Tensor]:
    """One row of `length` tokens that holds all the documents (each of two or more tokens).

    Returns input_ids, position_ids and labels, int64 (length,), and mask, bool (length, length).
    Raises ValueError where the documents have more than `length` tokens in all.
    """
    ### BEGIN SOLUTION
    rest = length - sum(map(len, documents))
    if rest < 0:
        raise ValueError(f"{length - rest} tokens do not fit into a row of {length}")
    # Lengths, not token ids, say what is padding: an end token may have the same id.
    ids = [token for part in documents for token in part] + [pad] * rest
    labels = [label for part in documents for label in [-100, *part[1:]]] + [-100] * rest
    positions = torch.tensor([place for part in documents for place in range(len(part))] + [0] * rest)
    document = positions.eq(0).cumsum(0)  # 1, 1, 1, 2, 2, 3 ...: grows wherever a document begins
    mask = (document[:, None] == document) & torch.ones(length, length, dtype=torch.bool).tril()
    return {"input_ids": torch.tensor(ids), "position_ids": positions, "labels": torch.tensor(labels), "mask": mask}
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "e5_rows_test", "locked": true, "points": 6, "schema_version": 3, "solution": false, "task": false, "cell_type": "code"}
_documents, _pad = [[5, 6, 7, 2], [8, 9, 2]], 2
_row = packed_row(_documents, 9, _pad)
for _key in ("input_ids", "position_ids", "labels", "mask"):
    assert isinstance(_row.get(_key), Tensor), f"the dictionary that you return needs a tensor by the name of {_key}"
_ids, _positions, _labels, _mask = (_row[_key] for _key in ("input_ids", "position_ids", "labels", "mask"))
assert _ids.tolist() == [5, 6, 7, 2, 8, 9, 2, 2, 2], f"input_ids: the documents in a row, then the padding; yours are {_ids.tolist()}"
assert _positions.tolist()[:7] != list(range(7)), "your positions run on through the row; they begin anew at 0 with each document"
assert _positions.tolist()[0] == 0, "your positions begin at 1; the first token of a document has position 0"
assert _positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 0], f"position_ids should be 0 1 2 3, 0 1 2, and 0 for each padding token; yours are {_positions.tolist()}"
assert _labels.tolist()[:3] != [6, 7, 2] and _labels.tolist()[:2] != [-100, 5], "your labels are shifted by one; the model's loss does that, so label i is token i"
assert _labels[0] == -100 and _labels[4] == -100, "the first token of each document has the label -100; nothing in its own document comes before it, so it would be predicted from its neighbour"
assert _labels[3] == 2 and _labels[6] == 2, "the token that ends a document has lost its label, because it has the same id as padding; find padding by the lengths, not by the id"
assert _labels.tolist()[7:] == [-100, -100], "padding has the label -100; otherwise the model learns to predict padding"
assert _labels.tolist() == [-100, 6, 7, 2, -100, 9, 2, -100, -100], f"labels should be -100 6 7 2, -100 9 2, -100 -100; yours are {_labels.tolist()}"
assert _mask.dtype is torch.bool and _mask.shape == (9, 9), f"the mask is bool, (9, 9), True where a token may look; yours is {_mask.dtype}, {tuple(_mask.shape)}"
assert not _mask.triu(1).any(), "a token looks at later tokens, which it is to predict; allow j <= i only"
assert _mask.diagonal().all(), "each token must see itself, padding too; a row of the mask without a True makes the softmax NaN"
assert not _mask[4:7, :4].any(), "the second document looks into the first one; count where positions are 0 to number the documents, and compare the numbers"
assert not _mask[7:, :7].any() and not _mask[8, 7], "a padding token looks at its neighbours; each of them has position 0, so each is a document of its own"
assert _mask[:4, :4].sum() == 10 and _mask[4:7, 4:7].sum() == 6, "a token must see all of its own document up to itself"
_together, _start = tiny_model(_ids, _positions, _mask), 0
for _document in _documents:
    _size = len(_document)
    _alone = tiny_model(torch.tensor(_document), torch.arange(_size), torch.ones(_size, _size, dtype=torch.bool).tril())
    assert torch.allclose(_together[_start : _start + _size], _alone, atol=1e-4), f"the document {_document} gets another output in the row than alone"
    _start += _size
_other = tiny_model(_ids.clone().index_fill_(0, torch.tensor([1]), 40), _positions, _mask)
assert torch.allclose(_other[4:], _together[4:], atol=1e-5), "a token in the first document was replaced, and the outputs of the second one changed: it leaks"
try:
    packed_row(_documents, 6, _pad)
    _error = None
except Exception as _caught:
    _error = _caught
assert isinstance(_error, ValueError), f"7 tokens do not fit into a row of 6 and must raise a ValueError; yours gives {type(_error).__name__ if _error else 'no error'}"
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(int(os.environ.get("QFT_SEED", "2026")))
for _ in range(8):
    _sizes = torch.randint(2, 7, (int(torch.randint(1, 6, (), generator=_generator)),), generator=_generator).tolist()
    _pad, _rest = (int(torch.randint(0, 5, (), generator=_generator)) for _ in range(2))
    _documents = [[*torch.randint(0, 64, (_size - 1,), generator=_generator).tolist(), _pad] for _size in _sizes]
    _length = sum(_sizes) + _rest
    _row = packed_row(_documents, _length, _pad)
    _case = f"documents of {_sizes} tokens and {_rest} of padding"
    _ends = torch.tensor([0, *_sizes]).cumsum(0).tolist()
    _want_positions, _want_labels = torch.zeros(_length, dtype=torch.long), torch.full((_length,), -100)
    _want_mask = torch.eye(_length, dtype=torch.bool)
    for _document, _begin, _end in zip(_documents, _ends[:-1], _ends[1:], strict=True):
        _want_positions[_begin:_end] = torch.arange(_end - _begin)
        _want_labels[_begin + 1 : _end] = torch.tensor(_document[1:])
        _want_mask[_begin:_end, _begin:_end] = torch.ones(_end - _begin, _end - _begin, dtype=torch.bool).tril()
    assert _row["input_ids"].tolist() == sum(_documents, []) + [_pad] * _rest, f"input_ids are wrong for {_case}"
    assert _row["position_ids"].tolist() == _want_positions.tolist(), f"position_ids are wrong for {_case}"
    assert _row["labels"].tolist() == _want_labels.tolist(), f"labels are wrong for {_case}"
    assert _row["mask"].shape == _want_mask.shape and torch.equal(_row["mask"], _want_mask), f"the mask is wrong for {_case}"
    _together = tiny_model(_row["input_ids"], _row["position_ids"], _row["mask"])
    for _document, _begin, _end in zip(_documents, _ends[:-1], _ends[1:], strict=True):
        _size = _end - _begin
        _alone = tiny_model(torch.tensor(_document), torch.arange(_size), torch.ones(_size, _size, dtype=torch.bool).tril())
        assert torch.allclose(_together[_begin:_end], _alone, atol=1e-3), f"a document gets another output in the row than alone, with {_case}"
    try:
        packed_row(_documents, sum(_sizes) - 1, _pad)
        _error = None
    except Exception as _caught:
        _error = _caught
    assert isinstance(_error, ValueError), f"a row that is one token too short must raise a ValueError, with {_case}"
### END HIDDEN TESTS

# %% [markdown] nbgrader={"grade": false, "grade_id": "e6_ship_text", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "markdown"}
# ## 6. Which model would you ship? (4 points)
#
# A film archive wants a model that tells plots, on a small computer at its entrance. The weights may take 150 MB of memory, and visitors lose patience under 25 tokens per second.
# Four candidates are fine-tunings of the same four-bit file, or the file itself; the last one is another model altogether.
#
# **All numbers in this table are made up for this exercise.** Perplexity is on 200 plots that nobody trained on or chose by. The ratio compares with candidate B on the same plots, document by document. Brackets are 95 % intervals.
#
# | candidate | perplexity | ratio to B | weights in memory | tokens per second |
# |---|---|---|---|---|
# | A: four-bit file, as it came | 46.0 [41.4, 51.1] | 1.24 [1.21, 1.28] | 100 MB | 40 |
# | B: four-bit file with its adapter beside it | 37.0 [33.3, 41.1] | 1 | 110 MB | 32 |
# | C: adapter merged, stored in bf16 | 36.9 [33.2, 41.0] | 1.00 [0.99, 1.01] | 270 MB | 21 |
# | D: adapter merged, rounded back to four bits | 41.8 [37.6, 46.5] | 1.13 [1.11, 1.15] | 100 MB | 40 |
# | E: another four-bit model, with a tokenizer of its own | 24.0 [21.9, 26.3] | – | 105 MB | 38 |
#
# Which one would you ship? Defend it in 80 to 150 words. Say why each of the others is out, what your choice costs, and which measurement could change your mind.

# %% [markdown] nbgrader={"grade": true, "grade_id": "e6_ship", "locked": false, "points": 4, "schema_version": 3, "solution": true, "task": false, "cell_type": "markdown"}
# ### BEGIN SOLUTION
# I ship B. It keeps both limits, with 110 MB and 32 tokens per second. C is as good, but takes 270 MB and is too slow. A and D are smaller and faster than anyone needs, and worse. The intervals of B and D
# overlap, but they hold the spread between plots, which both models share; the paired ratio, 1.13 [1.11, 1.15], leaves no doubt. Rounding took back about half of what the adapter had gained. E I cannot judge: it cuts
# text into other tokens, so its perplexity is not comparable.
#
# B costs a second file and a program that can load an adapter. If only one plain file can be read, D is next. Two measurements could change my mind: E's loss per character on the same plots, and visitors who compare stories
# blindly, since perplexity is not the same as a good story.
#
# **Rubric** (4 points): 1 for a choice that keeps both limits, and for excluding C by them; 1 for deciding between B and A or D by the paired ratio, not by overlapping intervals (D is accepted where the answer gives a reason such as a program that
# reads one file only, and names the loss); 1 for saying that E's perplexity counts other tokens and cannot be compared; 1 for naming what the choice costs, and a measurement that could change it.
# ### END SOLUTION
