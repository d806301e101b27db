"""A small random llama in a GGUF file, in the layout of llama.cpp's own converter."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import LlamaConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

TOKENS = [*bytes_to_unicode().values(), "th", "the", "<|endoftext|>"]
HIDDEN, INNER, KEYS = 64, 96, 32
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS), hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, rope_theta=10000.0,
)  # fmt: skip


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """By GGUF's names, in GGUF's order of rows."""
    shapes = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (KEYS, HIDDEN), "attn_v": (KEYS, HIDDEN),
              "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN),
              "ffn_down": (HIDDEN, INNER), "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}  # fmt: skip
    named = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    named |= {f"blk.{i}.{name}.weight": shape for i in range(2) for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in named.items()}
    return {name: value + 1 if value.dim() == 1 else value for name, value in made.items()}


def write(
    path: Path,
    weights: Mapping[str, torch.Tensor] | None = None,
    kinds: Mapping[str, Kind] | None = None,
    tokens: list[str] = TOKENS,
    architecture: str = "llama",
) -> Path:
    """The file, whole. kinds: the types of tensors that are not to have their usual one."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["t h", "th e"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id):
        add(len(tokens) - 1)
    for name, value in (tensors() if weights is None else weights).items():
        table = name.startswith(("token_embd", "output."))
        usual = Kind.F32 if value.dim() == 1 else Kind.Q8_0 if table else Kind.Q4_1
        kind = (kinds or {}).get(name, usual)
        data = value.numpy() if kind == Kind.F32 else gguf.quants.quantize(value.numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
