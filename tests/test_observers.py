"""Observers, and the quantizers and gradients of qft_utils.qat, against torch.ao, torch's kernels and numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.ao.quantization.observer import MinMaxObserver, MovingAverageMinMaxObserver

from qft_utils.observers import MinMax, MovingAverage, Percentile, in_memory_order
from qft_utils.qat.quantizers import InputQuantizer, LearnedWeightQuantizer, ReluInputQuantizer, WeightQuantizer
from qft_utils.qat.rounding import LearnedStep
from qft_utils.quantization import choose_qparams, fake_quantize

PROPERTY = settings(deadline=None, max_examples=25, derandomize=True)
BITS, SEEDS = st.integers(2, 8), st.integers(0, 2**31)


@st.composite
def batches(draw):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    offset, magnitude = draw(st.sampled_from([0.0, 3.0, -3.0])), 10.0 ** draw(st.integers(-20, 20))
    return [(torch.randn(shape) + offset) * magnitude for _ in range(draw(st.integers(1, 4)))]


def watch(observer, batches):
    for batch in batches:
        observer.merge(*observer.range_of(batch))
    return observer.low, observer.high


@PROPERTY
@given(batches())
def test_min_max_equals_torch(batches):
    torchs = MinMaxObserver()
    for batch in batches:
        torchs(batch)
    assert watch(MinMax(), batches) == (torchs.min_val, torchs.max_val)


@PROPERTY
@given(batches(), st.sampled_from([0.01, 0.1, 1.0]))
def test_moving_average_equals_torch(batches, momentum):
    torchs = MovingAverageMinMaxObserver(averaging_constant=momentum)
    for batch in batches:
        torchs(batch)
    expected = [torchs.min_val, torchs.max_val]
    largest = max(batch.abs().max().item() for batch in batches)
    torch.testing.assert_close(list(watch(MovingAverage(momentum), batches)), expected, rtol=0, atol=1e-6 * largest)


@PROPERTY
@given(batches(), st.sampled_from([90.0, 99.9, 100.0]))
def test_percentile_equals_numpy_where_every_value_counts(batches, percent):
    low, high = watch(Percentile(percent), batches[:1])
    expected = np.percentile(batches[0].double().numpy(), [100 - percent, percent])
    scale = batches[0].abs().max().item()
    np.testing.assert_allclose([low, high], expected, rtol=0, atol=1e-5 * scale)


def test_percentile_of_a_sample_sees_every_channel():
    """64 channels, 2**12 samples of 2**16 values: a step of 16 would see 4 channels alone."""
    x = torch.arange(64.0).expand(4, 16, 16, 64).permute(0, 3, 1, 2)
    low, high = watch(Percentile(99.0, samples=2**12), [x])
    assert low < 1 and high > 62


def test_an_outlier_moves_the_percentile_little():
    torch.manual_seed(0)
    x = torch.randn(10_000)
    x[7] = 1e4
    assert watch(MinMax(), [x])[1] == 1e4
    assert watch(Percentile(99.9), [x])[1] < 5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_order_keeps_values_and_makes_contiguous(layout):
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=layout)
    assert in_memory_order(x).is_contiguous()
    assert in_memory_order(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("make", [MinMax, MovingAverage, Percentile])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_types_give_float32(make, dtype):
    low, high = watch(make(), [torch.tensor([-2.0, 0.5, 4.0], dtype=dtype)] * 2)
    assert low.dtype is high.dtype is torch.float32
    assert -2.1 < low < -1.9 and 3.9 < high < 4.1


def test_state_is_saved():
    observer, other = MovingAverage(), MovingAverage()
    watch(observer, [torch.tensor([-1.0, 2.0])])
    other.load_state_dict(observer.state_dict())
    assert (other.low, other.high) == (-1, 2)


@pytest.mark.parametrize("momentum", [0, -0.1, 1.1])
def test_momentum_is_checked(momentum):
    with pytest.raises(ValueError, match="momentum must lie in"):
        MovingAverage(momentum)


@pytest.mark.parametrize("percent", [50, 100.1])
def test_percent_is_checked(percent):
    with pytest.raises(ValueError, match="percent must lie in"):
        Percentile(percent)


@PROPERTY
@given(bits=BITS, seed=SEEDS, offset=st.sampled_from([0.0, 3.0, -3.0]), magnitude=st.integers(-20, 20))
def test_input_quantizer_equals_torchs_kernel(bits, seed, offset, magnitude):
    torch.manual_seed(seed)
    x = ((torch.randn(4, 6, 5) + offset) * 10.0**magnitude).requires_grad_()
    quantizer = InputQuantizer(bits, MinMax())
    quantizer(x.detach() * 0.7)  # so that some of x lies outside
    quantizer.eval()
    scale, zero_point, qmin, qmax = quantizer.grid()
    y = torch.fake_quantize_per_tensor_affine(x, scale, zero_point.int(), int(qmin), int(qmax))
    assert torch.equal(quantizer(x), y)
    expected, got = (torch.autograd.grad(out.sum(), x)[0] for out in (y, quantizer(x)))
    edges = ((x / scale + zero_point - qmin + 0.5).abs() < 1e-3) | ((x / scale + zero_point - qmax - 0.5).abs() < 1e-3)
    assert torch.equal(got[~edges], expected[~edges])


@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU6()])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_absorbed_relu_equals_relu_then_torchs_kernel(relu, bits):
    torch.manual_seed(0)
    x = (torch.randn(4, 3, 16, 16) * 4).requires_grad_()
    quantizer = ReluInputQuantizer(bits, MovingAverage(), 6.0 if isinstance(relu, nn.ReLU6) else float("inf"))
    out = quantizer(x)
    scale = relu(x).max().detach() / (2**bits - 1)
    y = torch.fake_quantize_per_tensor_affine(relu(x), scale, torch.tensor(0, dtype=torch.int32), 0, 2**bits - 1)
    assert torch.equal(out, y)
    expected, got = (torch.autograd.grad(out.sum(), x)[0] for out in (y, out))
    last_half_step = (x > 6) & (x < 6 + scale / 2)  # the ReLU6 ends at 6, the grid's straight-through half a step on
    assert torch.equal(got[~last_half_step], expected[~last_half_step])


@PROPERTY
@given(bits=BITS, seed=SEEDS, granularity=st.sampled_from(["channel", "tensor", 3, 9]))
def test_weight_quantizer_equals_post_training_quantization(bits, seed, granularity):
    torch.manual_seed(seed)
    weight = torch.randn(5, 2, 3, 3) * torch.randint(0, 2, (5, 1, 1, 1)) * 10  # some rows are zero
    where = {"channel": {"axis": 0}, "tensor": {}}.get(granularity, {"group_size": granularity})
    expected = fake_quantize(weight, choose_qparams(weight, bits, symmetric=True, **where))
    assert torch.equal(WeightQuantizer(bits, granularity)(weight), expected)


@PROPERTY
@given(bits=BITS, seed=SEEDS)
def test_learned_step_equals_torchs_kernel(bits, seed):
    torch.manual_seed(seed)
    x, grad = torch.randn(6, 50, requires_grad=True), torch.randn(6, 50)
    scale, low, high = (torch.rand(6, 1) + 0.1).requires_grad_(), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    zeros, step = torch.zeros(6), scale.flatten()
    y = torch._fake_quantize_learnable_per_channel_affine(x, step, zeros, 0, low, high, 1.0)
    assert torch.equal(LearnedStep.apply(x, scale, low, high), y)
    inside = (x / scale > low) & (x / scale < high)
    dx, ds = torch.autograd.grad(LearnedStep.apply(x, scale, low, high), (x, scale), grad)
    assert torch.equal(dx, grad * inside)
    v = x / scale
    paper = torch.where(inside, v.round() - v, v.clamp(low, high)) * grad  # eq. 3, elementwise
    torch.testing.assert_close(ds, paper.sum(1, keepdim=True), rtol=1e-4, atol=1e-3)


def test_learned_step_gradient_is_scaled_as_in_the_paper():
    weight = torch.randn(4, 50)
    quantizer = LearnedWeightQuantizer(3, "channel", weight)
    assert torch.allclose(quantizer.step, 2 * weight.abs().mean(1, keepdim=True) / 3**0.5)
    quantizer(weight).sum().backward()
    step = quantizer.step.detach().clone().requires_grad_()
    LearnedStep.apply(weight, step, -4, 3).sum().backward()
    torch.testing.assert_close(quantizer.step.grad, step.grad / (50 * 3) ** 0.5)
