"""Layers that store packed integers and compute, in float, on what they unpack.

They show what a width costs in accuracy and saves on disk. They are not fast: that takes a runtime's integer kernels.
"""

import math

import torch
from torch import Tensor, nn

from qft_utils.packing import pack, unpack
from qft_utils.qat.layers import TrainingConv2d, TrainingEmbedding, TrainingLayer, TrainingLinear
from qft_utils.qat.quantizers import Grid
from qft_utils.qat.rounding import round_to_grid
from qft_utils.quantization import QParams, dequantize, quantize


class PackedWeight(nn.Module):
    """Symmetric integers of `bits` bits, offset to be positive, without a wasted bit.

    codes: uint8, (ceil(count * bits / 8),). scale: float32, () per tensor, (C,) per channel, (C, groups) per group.
    """

    def __init__(self, q: Tensor, qparams: QParams, bits: int) -> None:
        super().__init__()
        self.bits, self.shape, self.group_size = bits, q.shape, qparams.group_size
        self.register_buffer("codes", pack(q.long() - qparams.qmin, bits))
        self.register_buffer("scale", qparams.scale)

    def integers(self) -> Tensor:
        """int8 of the weight's shape, in -2**(bits-1)..2**(bits-1) - 1."""
        codes = unpack(self.codes, self.bits, math.prod(self.shape))
        return (codes.short() - 2 ** (self.bits - 1)).to(torch.int8).reshape(self.shape)

    def forward(self) -> Tensor:
        """The weight in float32."""
        return dequantize(self.integers(), symmetric(self.scale, self.bits, self.group_size))


def symmetric(scale: Tensor, bits: int, group_size: int | None) -> QParams:
    """QParams of a weight's symmetric grid; () is per tensor, (C,) per channel, (C, groups) per group."""
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    axis = 0 if scale.ndim == 1 else None
    return QParams(scale, zero_point, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, axis, group_size)


class FixedQuantizer(nn.Module):
    """Rounds an input to a grid that no longer changes."""

    def __init__(self, grid: Grid, bits: int) -> None:
        super().__init__()
        self.bits = bits
        for name, value in zip(("scale", "zero_point", "qmin", "qmax"), grid, strict=True):
            self.register_buffer(name, value.clone() if name == "scale" else value.int())

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.qmin - self.zero_point, self.qmax - self.zero_point
        return round_to_grid(x, self.scale, low, high)


class PackedLayer(nn.Module):
    """Mixin: `weight` unpacks, and the input is rounded before the float layer's own forward."""

    packed: PackedWeight
    input_quantizer: FixedQuantizer | None
    folded_name: str | None

    @property
    def weight(self) -> Tensor:
        return self.packed()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.input_quantizer is None else self.input_quantizer(x))


class PackedLinear(PackedLayer, nn.Linear):
    pass


class PackedConv2d(PackedLayer, nn.Conv2d):
    pass


class PackedEmbedding(PackedLayer, nn.Embedding):
    pass


PACKED: dict[type[TrainingLayer], type[PackedLayer]] = {
    TrainingLinear: PackedLinear,
    TrainingConv2d: PackedConv2d,
    TrainingEmbedding: PackedEmbedding,
}


@torch.no_grad()
def pack_weight(layer: TrainingLayer) -> PackedWeight:
    """The integers that the layer trains with, and their scale; a batch norm's factor goes into the scale."""
    quantizer, factor = layer.weight_quantizer, layer.factor_of_grid()
    scale = quantizer.scale(quantizer.grouped(layer.weight), factor)  # broadcasts, and has the factor's sign
    shape = [len(layer.weight), -1] if quantizer.group_size else [-1]
    rows = scale.reshape(-1).expand(len(layer.weight)) if not quantizer.group_size else scale.reshape(shape)
    q = quantize(layer.weight, symmetric(rows, quantizer.bits, quantizer.group_size))
    if factor is not None:
        scale = scale * layer.fold_factor().reshape(factor.shape)
    stored = scale.flatten()[0] if quantizer.granularity == "tensor" else scale.reshape(shape)
    return PackedWeight(q, symmetric(stored.clone(), quantizer.bits, quantizer.group_size), quantizer.bits)


@torch.no_grad()
def folded_bias(layer: TrainingConv2d) -> Tensor:
    """Bias of a convolution with its batch norm folded: beta + (b - mean) gamma / sqrt(variance + eps)."""
    norm = layer.folded
    own = 0 if layer.bias is None else layer.bias
    return (norm.bias + (own - norm.running_mean) * layer.fold_factor()).to(norm.bias.dtype)


def packed_layer(layer: TrainingLayer, weight: PackedWeight) -> PackedLayer:
    """`layer` in its packed form; takes over what it keeps of it, so `layer` must not be used again."""
    bias = layer.bias if hasattr(layer, "bias") else None
    if layer.folded is not None:
        bias = nn.Parameter(folded_bias(layer))
    quantizer = layer.input_quantizer
    fixed = None if quantizer is None else FixedQuantizer(quantizer.grid(), quantizer.bits)
    new = PACKED[type(layer)].__new__(PACKED[type(layer)])
    new.__dict__ = layer.__dict__
    for name in ("weight", "bias"):
        new._parameters.pop(name, None)
    for name in ("weight_quantizer", "input_quantizer", "folded"):
        new._modules.pop(name, None)
        new.__dict__.pop(name, None)
    new.packed, new.input_quantizer = weight, fixed
    if not isinstance(new, nn.Embedding):
        new.bias = None if bias is None else bias.requires_grad_(False)  # alone, it would train unnoticed
    return new
