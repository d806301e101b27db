"""The verbs for a prepared model: set its widths, calibrate it, freeze what it observes, convert it."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qft_utils.qat.inspect import replace, training_layers
from qft_utils.qat.layers import TrainingConv2d, TrainingLayer
from qft_utils.qat.packed import pack_weight, packed_layer
from qft_utils.qat.quantizers import check_bits


def set_bits(
    model: nn.Module,
    weight_bits: int | None = None,
    act_bits: int | None = None,
    *,
    only: Iterable[str] | None = None,
) -> None:
    """Change the widths of a prepared model in place; None leaves a width as it is. `only`: names of layers.

    Ranges stay: a learned step grows or shrinks with the width. Weights that are tied have one width.
    Raises ValueError for a width outside 2..8, an unknown name, or a model that is not prepared.
    """
    layers = training_layers(model)
    names = list(layers) if only is None else list(only)
    unknown = [name for name in names if name not in layers]
    if unknown:
        raise ValueError(f"{unknown} are not layers of the prepared model: choose from {list(layers)}")
    for bits in (weight_bits, act_bits):
        check_bits(8 if bits is None else bits)
    if weight_bits is not None:
        for quantizer in {layers[name].weight_quantizer for name in names}:
            quantizer.set_bits(weight_bits)
    if act_bits is not None:
        for quantizer in {layers[name].input_quantizer for name in names} - {None}:
            quantizer.set_bits(act_bits)


def freeze(model: nn.Module, *, observers: bool = True, batch_norm: bool = True) -> None:
    """Stop the observers, and let the folded batch norms use their running statistics, for the rest of training.

    In place, and calling `.train()` does not undo it. Jacob et al. 2018, section 3.1, and Krishnamoorthi 2018,
    section 3.2.2, do both near the end. Raises ValueError for a model that is not prepared.
    """
    for layer in training_layers(model).values():
        if observers and layer.input_quantizer is not None:
            layer.input_quantizer.observing = False
        if batch_norm and isinstance(layer, TrainingConv2d):
            layer.norm_frozen = True
            layer.train(layer.training)


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Let the observers of a prepared model see batches of inputs, in evaluation mode: nothing else changes.

    With `convert` after it, this is post-training quantization. Raises ValueError for a model not prepared.
    """
    quantizers = {layer.input_quantizer for layer in training_layers(model).values()} - {None}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        _set_calibrating(quantizers, True)
        for batch in batches:
            model(batch)
    finally:
        _set_calibrating(quantizers, False)
        for module, mode in modes.items():
            module.training = mode


def convert(model: nn.Module) -> nn.Module:
    """A copy of a prepared model that stores packed integers, in evaluation mode; `model` stays as it is.

    A layer computes in float on what it unpacks, so it gives the prepared model's results and a small file, and no
    speed: that belongs to the runtimes, which have integer kernels. Sums in another order can move a value across
    a rounding boundary, hence by one step of the next grid.
    Raises ValueError for a model that is not prepared, RuntimeError where an input was never observed.
    """
    model = copy.deepcopy(model).eval()
    layers, shared = training_layers(model), {}
    for name, layer in layers.items():
        _check_seen(name, layer)
        key = layer.weight, layer.weight_quantizer, layer.folded  # equal for weights that are tied
        shared[key] = shared.get(key) or pack_weight(layer)
    keys = {layer: (layer.weight, layer.weight_quantizer, layer.folded) for layer in layers.values()}
    return replace(model, {layer: packed_layer(layer, shared[key]) for layer, key in keys.items()})


def _check_seen(name: str, layer: TrainingLayer) -> None:
    if layer.input_quantizer is not None:
        try:
            layer.input_quantizer.check_seen()
        except RuntimeError as error:
            raise RuntimeError(f"{name}: {error}") from error


def _set_calibrating(quantizers: Iterable[nn.Module], on: bool) -> None:
    for quantizer in quantizers:
        quantizer.calibrating = on
