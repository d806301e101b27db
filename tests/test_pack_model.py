"""Packing a dense model, against the same model with its weights rounded in place."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from qft_utils.pack_model import pack_model
from qft_utils.packed import Int4Linear, Int8Embedding
from tests.tiny_gguf import CONFIG

GPT2 = GPT2Config(vocab_size=100, n_positions=64, n_embd=64, n_layer=2, n_head=2)
UNTIED = LlamaConfig(**CONFIG.to_dict() | {"tie_word_embeddings": False})
IDS = torch.randint(100, (2, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def rounded(model):
    """By the layers' own dequantize, which test_packed.py holds against the `gguf` package."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, Conv1D):
            module.weight.copy_(Int4Linear.from_float(module.weight.T).dequantize().T)
        elif isinstance(module, nn.Linear) and module is not head:
            module.weight.copy_(Int4Linear.from_float(module.weight).dequantize())
    for table in {model.get_input_embeddings().weight, head.weight}:
        table.copy_(Int8Embedding.from_float(table).dequantize())
    return model.eval()


KINDS = [(GPT2LMHeadModel, GPT2), (LlamaForCausalLM, CONFIG), (LlamaForCausalLM, UNTIED)]


@pytest.mark.parametrize("kind, config", KINDS)
def test_packed_is_the_rounded_model(kind, config):
    torch.manual_seed(0)
    dense = kind(config)
    packed = kind(config)
    packed.load_state_dict(dense.state_dict())
    pack_model(packed, torch.float32)
    assert sum(isinstance(m, Int4Linear) for m in packed.modules()) == (8 if kind is GPT2LMHeadModel else 14)
    assert not any(isinstance(m, Conv1D) for m in packed.modules())
    with torch.no_grad():
        torch.testing.assert_close(packed(IDS).logits, rounded(dense)(IDS).logits, rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in packed.parameters())


def test_it_generates_in_bf16():
    torch.manual_seed(0)
    model = pack_model(GPT2LMHeadModel(GPT2))
    assert model.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0).shape[1] > 20


def test_an_odd_width_is_refused_and_nothing_changed():
    model = LlamaForCausalLM(LlamaConfig(**CONFIG.to_dict() | {"intermediate_size": 100}))
    with pytest.raises(ValueError, match=r"down_proj has 100 inputs, no multiple of 32"):
        pack_model(model)
    assert not any(isinstance(m, Int4Linear) for m in model.modules())
