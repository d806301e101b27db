"""Packed layers: bytes against the `gguf` package, products against dense layers, gradients against autograd's own."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional as F

from qft_utils.gguf_blocks import group_parts, quantized, to_blocks
from qft_utils.packed import KERNEL_ROWS, Int4Linear, Int8Embedding, Int8Head, kernel_interleaves

KINDS = {4: Kind.Q4_1, 8: Kind.Q8_0}


def weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def dense(blocks: torch.Tensor, bits: int) -> torch.Tensor:
    """What the `gguf` package makes of the blocks."""
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), KINDS[bits]))


def close(have: torch.Tensor, want: torch.Tensor, relative: float) -> None:
    error = (have.float() - want).norm() / want.norm()
    assert error <= relative, f"off by {error:.2g} of the norm, {relative:.2g} allowed"


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 10), st.sampled_from([4, 8]))
def test_blocks_are_those_of_the_gguf_package(rows, groups, seed, bits):
    blocks = quantized(weight(rows, 32 * groups, seed), bits)
    assert torch.equal(to_blocks(*group_parts(blocks, bits)), blocks)
    layer = Int4Linear if bits == 4 else Int8Embedding
    packed = layer.from_blocks(blocks)
    assert torch.equal(packed.blocks(), blocks)
    have = packed.dequantize() if bits == 4 else packed(torch.arange(rows))
    # addcmul may round once where the package rounds twice
    torch.testing.assert_close(have, dense(blocks, bits), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [64, 128, 96, 7])
def test_rounding_is_at_most_half_a_step(rows):
    """Up to the rounding of scale and minimum to float16: half a unit in their last place, 15 and 1 times."""
    exact = weight(rows, 96)
    layer = Int4Linear.from_float(exact)
    scale, minimum = (v.float().repeat_interleave(32, 1) for v in (layer.scale, layer.minimum))
    bound = scale * (0.5 + 15 * 2**-11 * 2) + minimum.abs() * 2**-11 * 2
    assert ((layer.dequantize() - exact).abs() <= bound).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_a_constant_weight_is_exact(value):
    assert torch.equal(Int4Linear.from_float(torch.full((64, 32), value)).dequantize(), torch.full((64, 32), value))


def test_half_a_byte_a_weight():
    layer = Int4Linear.from_float(weight(128, 256))
    assert layer.codes.numel() * layer.codes.element_size() == 128 * 256 // 2
    assert not list(layer.parameters())
    saved = layer.state_dict()
    assert [v.numel() * v.element_size() for v in saved.values()] == [128 * 256 // 32 * 20]


@pytest.mark.parametrize("rows", [64, 40])
def test_float32_product_is_that_of_the_dequantized_weight(rows):
    layer, x = Int4Linear.from_float(weight(rows, 64), torch.ones(rows)), weight(3, 64, 1)
    torch.testing.assert_close(layer(x), F.linear(x, layer.dequantize(), torch.ones(rows)))


@pytest.mark.parametrize("count", [1, 5, KERNEL_ROWS[4], KERNEL_ROWS[4] + 1])
def test_bf16_product_to_the_rounding_of_bf16(count):
    """bf16 keeps 8 bits: each product may be off by 2**-9 three times over, for weight, input and result."""
    layer, x = Int4Linear.from_float(weight(128, 64)), weight(count, 64, 1).bfloat16()
    close(layer(x), x.float() @ layer.dequantize().T, 3 * 2**-9)
    assert layer(x).dtype is torch.bfloat16


def test_the_kernel_is_used_where_it_is_there():
    layer = Int4Linear.from_float(weight(64, 64))
    assert layer.takes_kernel(torch.zeros(1, 64, dtype=torch.bfloat16)) == kernel_interleaves(layer.unpacked())
    for x in (torch.zeros(1, 64), torch.zeros(0, 64).bfloat16(), torch.zeros(KERNEL_ROWS[4] + 1, 64).bfloat16()):
        assert not layer.takes_kernel(x)
    assert not Int4Linear.from_float(weight(40, 64)).interleaved


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (0, 64)])
def test_shapes(shape):
    for dtype in (torch.float32, torch.bfloat16):
        assert Int4Linear.from_float(weight(64, 64))(torch.zeros(shape, dtype=dtype)).shape == (*shape[:-1], 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 200])
def test_gradient_of_the_input_is_that_of_the_dequantized_copy(dtype, count):
    layer = Int4Linear.from_float(weight(64, 96))
    x = weight(count, 96, 1).to(dtype).requires_grad_()
    copy = layer.dequantize(dtype, as_in_kernel=layer.takes_kernel(x))
    grad = weight(count, 64, 2).to(dtype)
    (have,) = torch.autograd.grad(layer(x), x, grad)
    (want,) = torch.autograd.grad(F.linear(x, copy), x, grad)
    torch.testing.assert_close(have, want)


def test_gradcheck():
    layer = Int4Linear.from_float(weight(64, 32))
    assert torch.autograd.gradcheck(layer, weight(2, 32, 1).double().requires_grad_())


@pytest.mark.parametrize("autocast", [False, True])
def test_lora_gets_the_gradient_it_has_on_a_dequantized_copy(autocast):
    """Also after a forward without gradients in between, which some backends do not survive."""

    def gradients(linear: nn.Module) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        norm, last = nn.LayerNorm(64).requires_grad_(False), Int4Linear.from_float(weight(64, 64, 3))
        model = nn.Sequential(linear, norm, last)
        inject_adapter_in_model(LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False), model)
        x = weight(150, 64, 1)
        with torch.no_grad():
            model.eval()(x[:1])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model.train()(x).square().mean().backward()
        return {name: value.grad for name, value in model.named_parameters() if value.requires_grad}

    packed = Int4Linear.from_float(weight(64, 64))
    copy = nn.Linear(64, 64, bias=False).requires_grad_(False)
    copy.weight.data = packed.dequantize()
    have, want = gradients(packed), gradients(copy)
    assert len(have) == 4 and have.keys() == want.keys()
    for name in have:
        assert have[name].abs().sum() > 0
        torch.testing.assert_close(have[name], want[name], rtol=2e-2 if autocast else 1e-4, atol=1e-4)


def test_a_merge_into_integers_is_refused():
    model = nn.Sequential(Int4Linear.from_float(weight(64, 64)), nn.LayerNorm(64))
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["0"]), model)
    for safe in (False, True):
        with pytest.raises(TypeError, match="packed integers take no float weight"):
            model[0].merge(safe_merge=safe)


def test_an_initialization_that_writes_the_weight_is_refused():
    """PiSSA takes its part out of the base weight: unnoticed, the layer would have that part twice."""
    model = nn.Sequential(Int4Linear.from_float(weight(64, 64)), nn.LayerNorm(64))
    with pytest.raises(TypeError, match="packed integers take no float weight"):
        inject_adapter_in_model(LoraConfig(r=4, target_modules=["0"], init_lora_weights="pissa"), model)


def test_another_precision_leaves_the_scales_alone():
    layer = Int4Linear.from_float(weight(64, 64)).to(torch.bfloat16).double().float()
    assert layer.scale.dtype is torch.float16
    torch.testing.assert_close(layer.dequantize(), Int4Linear.from_float(weight(64, 64)).dequantize())


def test_state_dict_brings_the_layer_back():
    for make in (Int4Linear, Int8Embedding):
        first, second = (make.from_float(weight(64, 64, seed)) for seed in (0, 1))
        assert not torch.equal(first.blocks(), second.blocks())
        second.load_state_dict(first.state_dict())
        assert torch.equal(first.blocks(), second.blocks())
        with pytest.raises(ValueError, match="do not fit"):
            make.from_float(weight(64, 32)).load_state_dict(first.state_dict())


@pytest.mark.parametrize("count", [1, KERNEL_ROWS[8], KERNEL_ROWS[8] + 1])
@pytest.mark.parametrize("dtype, relative", [(torch.float32, 1e-6), (torch.bfloat16, 3 * 2**-9)])
def test_head_is_the_transposed_table(count, dtype, relative):
    embedding = Int8Embedding.from_float(weight(50, 64))
    head, x = Int8Head(embedding), weight(count, 64, 1).to(dtype).requires_grad_()
    table = embedding(torch.arange(50))
    assert torch.equal(table, head.dequantize())
    close(head(x).detach(), x.detach().float() @ table.T, relative)
    copy = head.dequantize(dtype, as_in_kernel=head.takes_kernel(x))
    (have,), (want,) = (torch.autograd.grad(f(x).square().sum(), x) for f in (head, lambda x: F.linear(x, copy)))
    close(have, want.float(), relative)


def test_head_shares_the_codes():
    embedding = Int8Embedding.from_float(weight(50, 64))
    model = nn.ModuleDict({"embedding": embedding, "head": Int8Head(embedding)})
    assert len(list(model.buffers())) == len(list(embedding.buffers()))


def bad(**changes):
    parts = {"codes": torch.zeros(4, 64, dtype=torch.uint8), "scale": torch.zeros(4, 2).half(),
             "minimum": torch.zeros(4, 2).half()}  # fmt: skip
    return Int4Linear(**(parts | changes))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: bad(codes=torch.full((4, 64), 16, dtype=torch.uint8)), "code 16 is outside 0..15"),
        (lambda: bad(codes=torch.zeros(4, 64)), "float32"),
        (lambda: bad(scale=torch.zeros(4, 2)), "scale torch.float32"),
        (lambda: bad(minimum=torch.zeros(4, 3).half()), r"minimum .*\(4, 3\)"),
        (lambda: Int4Linear.from_float(weight(4, 33)), r"\(4, 33\).*multiple of 32"),
        (lambda: Int4Linear.from_float(weight(4, 32) / 0), "infinities or NaN"),
        (lambda: Int4Linear.from_blocks(torch.zeros(4, 21, dtype=torch.uint8)), "20 bytes a group"),
        (lambda: Int8Embedding(torch.zeros(4, 32), torch.zeros(4, 1).half()), "int8"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_no_rows():
    assert quantized(torch.zeros(0, 32), 4).shape == (0, 20)
    assert np.prod(Int4Linear.from_float(torch.zeros(0, 32))(torch.zeros(2, 32)).shape) == 0
