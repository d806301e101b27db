"""Quantization-aware training: prepare a model, train it with fake quantization, convert it to packed integers.

    model = prepare(float_model, weight_bits=4, act_bits=8)     # a copy; float_layers(model) lists what stays float
    ...                                                         # train it as any model, set_bits(model, ...) if wanted
    freeze(model)                                               # near the end: ranges and batch norms hold still
    small = convert(model)                                      # a copy with packed integers
    save(small, "model.safetensors")
    small = load("model.safetensors", float_model)

Post-training quantization is prepare, calibrate, convert.

Sources: Jacob et al. 2018 (arXiv 1712.05877), Krishnamoorthi 2018 (arXiv 1806.08342), Esser et al. 2020
(arXiv 1902.08153). `quantizers.py` has the grids, `rounding.py` the gradients, `layers.py` the layers.
"""

from qft_utils.qat.files import load, save
from qft_utils.qat.inspect import float_layers
from qft_utils.qat.prepare import prepare
from qft_utils.qat.verbs import calibrate, convert, freeze, set_bits

__all__ = ["calibrate", "convert", "float_layers", "freeze", "load", "prepare", "save", "set_bits"]
