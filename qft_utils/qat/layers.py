"""Layers that train with fake quantization, and the registry that says which layer becomes which.

A new kind of layer is one class here, with its entry in `TRAINING`, and its packed form in `packed.py`.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qft_utils.qat.quantizers import InputQuantizer, LearnedInputQuantizer, LearnedWeightQuantizer, WeightQuantizer
from qft_utils.quantization import MIN_SCALE


class TrainingLayer(nn.Module):
    """Mixin of the layers that `prepare` makes: the float layer's own attributes, and two quantizers."""

    weight: nn.Parameter
    weight_quantizer: WeightQuantizer
    input_quantizer: InputQuantizer | LearnedInputQuantizer | None
    folded: nn.BatchNorm2d | None
    folded_name: str | None

    @classmethod
    def from_float(cls, layer: nn.Module) -> "TrainingLayer":
        """A layer that takes over all of `layer`, its parameters and hooks too; quantizers are added later."""
        new = cls.__new__(cls)
        new.__dict__ = layer.__dict__
        new.weight_quantizer = new.input_quantizer = new.folded = new.folded_name = None
        return new

    def factor_of_grid(self) -> Tensor | None:
        """What folding multiplies the rows of the weight's grid by; None where nothing is folded."""
        return None

    training_factor = factor_of_grid

    def quantized_input(self, x: Tensor) -> Tensor:
        return x if self.input_quantizer is None else self.input_quantizer(x)

    def quantized_weight(self) -> Tensor:
        """The fake-quantized weight, in the weight's shape."""
        return self.weight_quantizer(self.weight, self.training_factor())


class TrainingLinear(TrainingLayer, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.quantized_input(x), self.quantized_weight(), self.bias)


class TrainingEmbedding(TrainingLayer, nn.Embedding):
    """Its input is an index, so the weight alone is quantized: row by row, where rows have grids of their own."""

    def _look_up(self, ids: Tensor, table: Tensor) -> Tensor:
        return F.embedding(
            ids, table, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )

    def forward(self, ids: Tensor) -> Tensor:
        quantizer = self.weight_quantizer
        if isinstance(quantizer, LearnedWeightQuantizer) or quantizer.granularity == "tensor" or not ids.numel():
            return self._look_up(ids, self.quantized_weight())
        rows = self._look_up(ids, self.weight)  # few beside the table
        return quantizer(rows.flatten(0, -2)).reshape(rows.shape)


class TrainingConv2d(TrainingLayer, nn.Conv2d):
    """A convolution, with the batch norm behind it if it has one.

    In training the batch norm uses the statistics of the batch, and the weight is quantized on the grid that it
    has when folded with the running ones, w * gamma / sqrt(variance + eps): Krishnamoorthi 2018, section 3.2.2.
    That grid is divided by the same factor again before the convolution, so one convolution and the ordinary batch
    norm do it, at the cost of a few operations on C numbers. With a grid per channel only the factor's sign is left.

    norm_frozen: the batch norm uses its running statistics, in training too.
    """

    norm_frozen = False

    def forward(self, x: Tensor) -> Tensor:
        out = self._conv_forward(self.quantized_input(x), self.quantized_weight(), self.bias)
        return out if self.folded is None else self.folded(out)

    def fold_factor(self) -> Tensor:
        """gamma / sqrt(running variance + eps), shape (C,); a zero becomes the least float that has a reciprocal."""
        norm = self.folded
        factor = norm.weight.detach().float() * torch.rsqrt(norm.running_var + norm.eps)
        return torch.where(factor < 0, -1.0, 1.0) * factor.abs().clamp_min(math.sqrt(MIN_SCALE))

    def factor_of_grid(self) -> Tensor | None:
        """The factor itself for one grid per tensor, else its sign: its size cancels out. (C, 1, ...)"""
        if self.folded is None:
            return None
        factor, quantizer = self.fold_factor(), self.weight_quantizer
        factor = factor if quantizer.granularity == "tensor" else factor.sign()
        return factor.reshape(-1, 1, 1) if quantizer.group_size else factor.reshape(-1, 1, 1, 1)

    def training_factor(self) -> Tensor | None:
        """None also where the sign makes no difference: a maximum's grid is used symmetrically."""
        quantizer = self.weight_quantizer
        learned = isinstance(quantizer, LearnedWeightQuantizer)
        return self.factor_of_grid() if learned or quantizer.granularity == "tensor" else None

    def train(self, mode: bool = True) -> "TrainingConv2d":
        super().train(mode)
        if self.folded is not None and self.norm_frozen:
            self.folded.eval()
        return self


def linear_from_conv1d(layer: nn.Module) -> nn.Linear:
    """The nn.Linear that computes what transformers' Conv1D does: that one stores its weight transposed."""
    linear = nn.utils.skip_init(nn.Linear, *layer.weight.shape, device=layer.weight.device)
    linear.weight, linear.bias = nn.Parameter(layer.weight.detach().t().contiguous()), layer.bias
    linear.weight.requires_grad_(layer.weight.requires_grad)
    return linear.train(layer.training)


TRAINING: dict[type, type[TrainingLayer]] = {
    nn.Linear: TrainingLinear,
    nn.Conv2d: TrainingConv2d,
    nn.Embedding: TrainingEmbedding,
}


def training_class(layer: nn.Module) -> type[TrainingLayer] | None:
    """The class that `layer` becomes, None if none. Types must match exactly: a subclass may compute otherwise."""
    return TrainingLinear if is_conv1d(layer) else TRAINING.get(type(layer))


def is_conv1d(layer: nn.Module) -> bool:
    """Whether this is the Conv1D of transformers, which need not be installed."""
    return type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers.")
