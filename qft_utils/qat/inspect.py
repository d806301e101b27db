"""Which parts of a model are quantized, which are not, and how a part is exchanged."""

from collections.abc import Mapping

from torch import nn

from qft_utils.qat.layers import TrainingLayer
from qft_utils.qat.packed import PackedLayer


def training_layers(model: nn.Module) -> dict[str, TrainingLayer]:
    """The layers of a prepared model, by name. Raises ValueError where there are none."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, TrainingLayer)}
    if not found:
        state = "converted already" if packed_layers(model) else "not prepared"
        raise ValueError(f"{type(model).__name__} is {state}: pass what prepare() returned")
    return found


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """The layers of a converted model, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLayer)}


def refuse_quantized(model: nn.Module) -> None:
    """Raises ValueError for a model that is prepared or converted."""
    for name, module in model.named_modules():
        if isinstance(module, TrainingLayer | PackedLayer):
            state = "prepared" if isinstance(module, TrainingLayer) else "converted"
            raise ValueError(f"the model is {state} already ({name or 'itself'}): pass the float model")


def float_layers(model: nn.Module) -> dict[str, str]:
    """{name: type} of every module with parameters of its own that stays float in a prepared or converted model."""
    quantized = TrainingLayer | PackedLayer
    inside = {id(m) for _, layer in model.named_modules() if isinstance(layer, quantized) for m in layer.modules()}
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if id(module) not in inside and any(True for _ in module.parameters(recurse=False))
    }


def replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """`model` with each key of `new` exchanged for its value, wherever it hangs; the value itself if it is a key."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
    return new.get(model, model)
