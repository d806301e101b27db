"""A dense language model, from a hub or just merged, in packed integers: the way there that is no GGUF file."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qft_utils.gguf_blocks import GROUP
from qft_utils.packed import Int4Linear, Int8Embedding, Int8Head
from qft_utils.packed_base import Packed


def pack_model(model: PreTrainedModel, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """In place: linear layers in four bits, the table of words and the head in eight, the rest in `dtype`; all frozen.

    GPT-2's `Conv1D`, a linear layer whose weight lies the other way round, is packed like any other; a search for
    `nn.Linear` alone would leave GPT-2 as it is. Returns the model in evaluation mode. Raises ValueError, before
    anything is changed, for a layer whose inputs are no multiple of 32.
    """
    head, words = model.get_output_embeddings(), model.get_input_embeddings()
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not isinstance(module, Packed) and module is not head
    }
    odd = [name for name, layer in layers.items() if _weight(layer).shape[1] % GROUP]
    if odd:
        inputs = _weight(layers[odd[0]]).shape[1]
        raise ValueError(f"{odd[0]} has {inputs} inputs, no multiple of {GROUP}: leave this model dense")
    for name, layer in layers.items():
        model.set_submodule(name, Int4Linear.from_float(_weight(layer), layer.bias))
    tied = head is None or head.weight is words.weight
    model.set_input_embeddings(table := Int8Embedding.from_float(words.weight, dtype))
    if head is not None:
        model.set_output_embeddings(Int8Head(table if tied else Int8Embedding.from_float(head.weight, dtype)))
    return model.to(dtype).eval().requires_grad_(False)


def _weight(layer: nn.Linear | Conv1D) -> torch.Tensor:
    """(N, K)."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight
