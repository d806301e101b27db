"""The verb that makes a float model one that trains with fake quantization."""

import copy
from collections.abc import Callable, Iterable, Mapping

from torch import nn

from qft_utils.observers import MovingAverage, Observer
from qft_utils.qat.inspect import refuse_quantized, replace
from qft_utils.qat.layers import TrainingEmbedding, TrainingLayer, is_conv1d, linear_from_conv1d, training_class
from qft_utils.qat.quantizers import (
    Granularity,
    InputQuantizer,
    LearnedInputQuantizer,
    LearnedWeightQuantizer,
    ReluInputQuantizer,
    WeightQuantizer,
    check_bits,
)
from qft_utils.qat.tracing import RELUS, activation_of, find_pairs, find_relus, foldable, trace


def prepare(
    model: nn.Module,
    weight_bits: int = 8,
    act_bits: int | None = 8,
    *,
    granularity: Granularity = "channel",
    observer: Callable[[], Observer] = MovingAverage,
    learned_step: bool = False,
    skip: Iterable[str] = (),
    pairs: Mapping[str, str] | None = None,
) -> nn.Module:
    """A copy of `model` that trains with fake quantization; `model` stays as it is.

    Weights of nn.Linear, nn.Conv2d, nn.Embedding and transformers' Conv1D are quantized, and the inputs of all but
    the embeddings. A batch norm behind a convolution becomes part of it. Make the optimizer from the copy. What
    stays float, `float_layers` lists; what has no parameters (additions, softmax, pooling) computes in float too.
    The batch norms are found by `torch.fx`. So is every ReLU or ReLU6 whose output goes into quantized layers
    alone: it becomes an Identity, as the clamp of those layers' grids does its work (not with a learned step).

    weight_bits, act_bits: 2 to 8; act_bits=None leaves the inputs float.
    granularity: what shares a scale: "channel" (a row of the weight), "tensor", or the size of a group in a row.
    observer: makes the observer of one input, e.g. `partial(Percentile, 99.9)`. Not used with a learned step.
    learned_step: steps are parameters, which the optimizer learns (LSQ, Esser et al. 2020).
    skip: names of modules to leave float, with all inside them.
    pairs: {convolution: batch norm} by name, where the model cannot be traced; None finds them.
    Raises ValueError for a model already prepared or converted, an unknown name, widths outside 2..8, a group size
    that does not divide a row, a model with nothing to quantize, or one with batch norms that cannot be traced.
    """
    refuse_quantized(model)
    check_bits(weight_bits)
    _check_granularity(granularity)
    model = copy.deepcopy(model)
    chosen = _choose(model, list(skip))
    relus: dict[str, list[str]] = {}
    if pairs is None:
        pairs, relus = _trace(model)
    pairs = {conv: norm for conv, norm in pairs.items() if _check_pair(model, conv, norm) and conv in chosen}
    layers = {name: _training_layer(module) for name, module in chosen.items()}
    _fold(model, layers, pairs)
    _add_quantizers(layers, weight_bits, act_bits, granularity, observer, learned_step)
    if act_bits is not None and not learned_step:
        _absorb_relus(model, layers, relus, pairs)
    _keep_out_of_fast_path(model)
    return replace(model, {chosen[name]: layer for name, layer in layers.items()})


def _check_granularity(granularity: Granularity) -> None:
    group = type(granularity) is int and granularity > 0
    if not group and granularity not in ("channel", "tensor"):
        raise ValueError(f"granularity={granularity!r}: choose 'channel', 'tensor' or the size of a group")


def _choose(model: nn.Module, skip: list[str]) -> dict[str, nn.Module]:
    """The modules to quantize, by name."""
    modules = dict(model.named_modules())
    unknown = [name for name in skip if name not in modules]
    if unknown:
        raise ValueError(f"skip={unknown}: the model has no such modules")
    chosen = {
        name: module
        for name, module in modules.items()
        if training_class(module) and module._parameters.get("weight") is not None
        and not any(name == out or name.startswith(f"{out}.") for out in skip)
    }  # fmt: skip
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no layer left to quantize: see `prepare` for what it can")
    return chosen


def _trace(model: nn.Module) -> tuple[dict[str, str], dict[str, list[str]]]:
    """`find_pairs` and `find_relus`, where there is any batch norm to find."""
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return {}, {}
    graph = trace(model)
    pairs = find_pairs(model, graph)
    return pairs, find_relus(model, graph, pairs)


def _check_pair(model: nn.Module, conv: str, norm: str) -> bool:
    modules = dict(model.named_modules())
    if conv not in modules or norm not in modules or not foldable(modules[conv], modules[norm]):
        raise ValueError(f"pairs: {norm!r} is no batch norm that can be folded into a convolution {conv!r}")
    return True


def _training_layer(module: nn.Module) -> TrainingLayer:
    return training_class(module).from_float(linear_from_conv1d(module) if is_conv1d(module) else module)


def _fold(model: nn.Module, layers: dict[str, TrainingLayer], pairs: Mapping[str, str]) -> None:
    """Move batch norms into their convolutions; an activation that was inside one stays in its place."""
    for conv, name in pairs.items():
        norm = model.get_submodule(name)
        plain = nn.BatchNorm2d.__new__(nn.BatchNorm2d)
        plain.__dict__ = norm.__dict__ | {"_modules": {}}
        layers[conv].folded, layers[conv].folded_name = plain, name
        replace(model, {norm: activation_of(norm) or nn.Identity()})


def _add_quantizers(
    layers: dict[str, TrainingLayer],
    weight_bits: int,
    act_bits: int | None,
    granularity: Granularity,
    observer: Callable[[], Observer],
    learned_step: bool,
) -> None:
    tied: dict[nn.Parameter, WeightQuantizer] = {}
    for name, layer in layers.items():
        row = layer.weight[0].numel()
        if isinstance(granularity, int) and row % granularity:
            remedy = "choose a divisor, or leave the layer out with skip"
            raise ValueError(f"{name}: groups of {granularity} do not divide a row of {row} values: {remedy}")
        layer.weight_quantizer = tied.get(layer.weight) or WeightQuantizer(weight_bits, granularity)
        if learned_step and layer.weight not in tied:
            start = layer.weight, layer.factor_of_grid()
            layer.weight_quantizer = LearnedWeightQuantizer(weight_bits, granularity, *start)
        tied[layer.weight] = layer.weight_quantizer
        if act_bits is not None and not isinstance(layer, TrainingEmbedding):
            learned = learned_step and LearnedInputQuantizer(act_bits)
            layer.input_quantizer = learned or InputQuantizer(act_bits, observer())
        layer.to(layer.weight.device).train(layer.training)


def _absorb_relus(
    model: nn.Module,
    layers: dict[str, TrainingLayer],
    relus: Mapping[str, list[str]],
    pairs: Mapping[str, str],
) -> None:
    """Let the quantizers behind a ReLU do its work, and leave an Identity in its place."""
    for name, takers in relus.items():
        relu = model.get_submodule(name)
        known = type(relu) in RELUS  # not so where its batch norm was left out by `skip`
        if known and all(taker in layers for taker in takers):
            for taker in takers:
                old = layers[taker].input_quantizer
                layers[taker].input_quantizer = ReluInputQuantizer(old.bits, old.observer, RELUS[type(relu)])
            replace(model, {relu: nn.Identity()})


def _keep_out_of_fast_path(model: nn.Module) -> None:
    """PyTorch's encoder layers read the weights of their Linears when they evaluate, past any forward()."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
