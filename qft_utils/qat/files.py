"""Converted models on disk: one safetensors file, whose metadata says how to read it."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from qft_utils.qat.inspect import packed_layers, training_layers
from qft_utils.qat.layers import is_conv1d, training_class
from qft_utils.qat.packed import PackedLayer
from qft_utils.qat.prepare import prepare
from qft_utils.qat.verbs import convert

FORMAT = "qft_utils.qat 1"


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Write a converted model to `path`, whole or not at all. Tied weights are written once.

    Raises ValueError for a model that is not converted.
    """
    layers = packed_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} is not converted: pass what convert() returned")
    described = {name: _describe(layer) for name, layer in layers.items()}
    metadata = {"format": FORMAT, "architecture": type(model).__name__, "layers": json.dumps(described)}
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        save_model(model, os.path.join(folder, "model"), metadata)
        os.replace(os.path.join(folder, "model"), path)


def load(
    path: str | os.PathLike,
    architecture: nn.Module,
    *,
    weight_bits: int | None = None,
    act_bits: int | None = None,
) -> nn.Module:
    """The converted model in `path`; `architecture` is the float model it was prepared from, with any weights.

    weight_bits, act_bits: what every layer must have; None takes what the file says.
    Raises ValueError, with the name of what differs, for another architecture, other widths, or a file that
    `save` did not write.
    """
    metadata = _metadata(Path(path))
    layers = json.loads(metadata["layers"])
    _check_architecture(Path(path), layers, architecture)
    for name, layer in layers.items():
        _check_bits(name, "weights", layer["weight_bits"], weight_bits)
        if layer["kind"] != "PackedEmbedding":  # its input is an index
            _check_bits(name, "inputs", layer["act_bits"], act_bits)
    model = _skeleton(architecture, layers)
    try:
        load_model(model, path)
    except RuntimeError as error:  # names the missing and the unexpected tensors
        raise ValueError(f"{path} does not fit {type(architecture).__name__}: {error}") from error
    return model


def _describe(layer: PackedLayer) -> dict[str, Any]:
    weight, fixed = layer.packed, layer.input_quantizer
    return {
        "kind": type(layer).__name__,
        "weight_bits": weight.bits,
        "act_bits": None if fixed is None else fixed.bits,
        "granularity": weight.group_size or ("channel" if weight.scale.ndim else "tensor"),
        "shape": list(weight.shape),
        "batch_norm": layer.folded_name,
    }


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} holds no converted model (its format is {metadata.get('format')!r}): use save()")
    return metadata


def _check_bits(name: str, what: str, stored: int | None, wanted: int | None) -> None:
    if wanted is not None and stored != wanted:
        raise ValueError(f"{name}: the file holds {what} of {stored} bits, you ask for {wanted}")


def _check_architecture(path: Path, layers: dict[str, Any], architecture: nn.Module) -> None:
    modules = dict(architecture.named_modules())
    for name, layer in layers.items():
        found = modules.get(name)
        if found is None or training_class(found) is None:
            what = "nothing" if found is None else type(found).__name__
            raise ValueError(f"{path}: {name} is a quantized layer there, {what} in {type(architecture).__name__}")
        shape = list(found.weight.shape)[:: -1 if is_conv1d(found) else 1]
        if shape != layer["shape"]:
            where = f"{shape} in {type(architecture).__name__}"
            raise ValueError(f"{path}: the weight of {name} has shape {layer['shape']} there, {where}")


def _skeleton(architecture: nn.Module, layers: dict[str, Any]) -> nn.Module:
    """A converted model of the right shape, to be filled from the file."""
    others = [n for n, m in architecture.named_modules() if training_class(m) is not None and n not in layers]
    pairs = {name: layer["batch_norm"] for name, layer in layers.items() if layer["batch_norm"]}
    granularity = next(layer["granularity"] for layer in layers.values())
    model = prepare(architecture, granularity=granularity, skip=others, pairs=pairs)
    for name, layer in training_layers(model).items():
        layer.weight_quantizer.set_bits(layers[name]["weight_bits"])
        if layers[name]["act_bits"] is None:
            layer.input_quantizer = None
        elif layer.input_quantizer is not None:
            layer.input_quantizer.set_bits(layers[name]["act_bits"])
            layer.input_quantizer.observer.merge(torch.tensor(0.0), torch.tensor(0.0))
    return convert(model)
