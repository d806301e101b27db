"""Language models in GGUF files: read without unpacking a weight, written so that llama.cpp reads them.

    model, tokenizer = load("SmolLM2-135M-Instruct.Q4_1.gguf")     # four-bit layers, an eight-bit table, bf16 between
    save(model, "tuned.gguf", like="SmolLM2-135M-Instruct.Q4_1.gguf")

For the architecture that GGUF calls `llama`, with weights in Q4_1 and tables in Q8_0. Others are refused by name:
transformers reads them with `from_pretrained(folder, gguf_file=name)`, dequantized.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qft_utils.assets import CorruptAsset
from qft_utils.gguf_blocks import quantized
from qft_utils.packed import Int4Linear, Int8Embedding, Int8Head

MODULES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
           "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
           "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
           "ffn_norm": "post_attention_layernorm"}  # fmt: skip
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def load(
    path: str | Path, dtype: torch.dtype = torch.bfloat16
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode, its weights packed and frozen, and its tokenizer.

    dtype: of the norms, which it rounds, and of what flows between layers; torch's 4-bit kernel is for bf16.
    Raises CorruptAsset for a file that is cut short or no GGUF; ValueError for a tensor that the architecture lacks or
    misses, a type that is not packed here, and a tokenizer with more tokens than the table has rows.
    """
    path = Path(path)
    reader = _reader(path)
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed, not stored
    _fill(model, reader, dtype)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"{len(tokenizer)} tokens, but a table of {config.vocab_size} rows: not its tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval().requires_grad_(False), tokenizer


def save(model: PreTrainedModel, path: str | Path, like: str | Path) -> Path:
    """Write the model's weights with the metadata and tokenizer of the GGUF file `like`, and each tensor in its type.

    Packed layers are written byte for byte; dense ones, such as a merged adapter leaves, are rounded to the type.
    The file appears whole or not at all. Raises as `load` does for `like`, ValueError for an unmerged adapter.
    """
    reader, path = _reader(Path(like)), Path(path)
    modules = dict(model.named_modules())
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        writer = gguf.GGUFWriter(temporary, arch=_text(reader, "general.architecture"))
        _copy_metadata(reader, writer)
        for tensor in reader.tensors:
            data = _blocks_of(modules, module_name(tensor.name), tensor.tensor_type, model.config)
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return path


def module_name(tensor: str) -> str:
    """The module of transformers' Llama that a GGUF tensor fills. Raises ValueError for a tensor it does not have."""
    stem, _, kind = tensor.rpartition(".")
    block = stem.split(".")
    if kind == "weight" and stem in TOP:
        return TOP[stem]
    if kind == "weight" and len(block) == 3 and block[0] == "blk" and block[1].isdigit() and block[2] in MODULES:
        return f"model.layers.{block[1]}.{MODULES[block[2]]}"
    raise ValueError(f"tensor {tensor!r} has no place in a llama model here: load the file dense, by transformers")


def _reader(path: Path) -> gguf.GGUFReader:
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is not there; `python -m qft_utils.assets` says what brings models")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, OverflowError, KeyError) as error:
        raise CorruptAsset(f"{path.name} is no whole GGUF file ({error}): bring it anew") from error
    if (architecture := _text(reader, "general.architecture")) != "llama":
        raise ValueError(f"{path.name} is a {architecture!r} model, and only 'llama' is packed here")
    return reader


def _text(reader: gguf.GGUFReader, key: str) -> str:
    field = reader.get_field(key)
    return "" if field is None else field.contents()


def _fill(model: PreTrainedModel, reader: gguf.GGUFReader, dtype: torch.dtype) -> None:
    """Replaces every module that has a tensor in the file; what is then still without data is missing there."""
    modules = dict(model.named_modules())
    for tensor in reader.tensors:
        name = module_name(tensor.name)
        if name not in modules:
            raise ValueError(f"tensor {tensor.name!r}: the model that the file describes has no {name}")
        old, new = modules[name], _module(tensor, name, model.config, dtype)
        if getattr(old, "weight", None) is not None and tuple(old.weight.shape) != _shape(new):
            raise ValueError(f"tensor {tensor.name!r} makes {_shape(new)}, but {name} has {tuple(old.weight.shape)}")
        if isinstance(new, nn.Parameter):
            old.weight = new
        else:
            model.set_submodule(name, new)
    if model.config.tie_word_embeddings:
        model.lm_head = Int8Head(model.model.embed_tokens)
    missing = [name for name, value in model.named_parameters() if value.is_meta]
    if missing:
        raise ValueError(f"the file has no tensor for {', '.join(missing[:3])} ({len(missing)} in all)")


def _shape(new: nn.Module | nn.Parameter) -> tuple[int, ...]:
    if isinstance(new, Int8Embedding):
        return new.num_embeddings, new.embedding_dim
    return (new.out_features, new.in_features) if isinstance(new, nn.Linear) else tuple(new.shape)


def _module(tensor, name: str, config: LlamaConfig, dtype: torch.dtype) -> nn.Module | nn.Parameter:
    data = torch.from_numpy(np.array(tensor.data))  # a copy: the file is mapped read-only
    match tensor.tensor_type:
        case Kind.F32:
            return nn.Parameter(data.to(dtype), requires_grad=False)
        case Kind.Q4_1:
            return Int4Linear.from_blocks(data[_rows(name, config, len(data))])
        case Kind.Q8_0 if name in ("model.embed_tokens", "lm_head"):
            table = Int8Embedding.from_blocks(data, dtype)
            return table if name == "model.embed_tokens" else Int8Head(table)
    kind = tensor.tensor_type.name
    raise ValueError(f"tensor {tensor.name!r} is {kind}; Q4_1 is packed here, Q8_0 for tables: load it dense")


def _rows(name: str, config: LlamaConfig, count: int, back: bool = False) -> Tensor:
    """The file's rows in the model's order, or `back`: in q and k, llama.cpp pairs what a rotation turns."""
    order = torch.arange(count)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.rpartition(".")[2])
    if heads is None:
        return order
    halves = (2, -1) if back else (-1, 2)
    return order.view(heads, *halves).transpose(1, 2).flatten()


def _blocks_of(modules: dict[str, nn.Module], name: str, kind: Kind, config: LlamaConfig) -> np.ndarray:
    module = modules.get(name)
    if module is None or hasattr(module, "base_layer"):
        raise ValueError(f"{name} is not a plain layer: merge or remove the adapter first")
    if kind == Kind.F32:
        return module.weight.detach().float().cpu().numpy()
    bits = {Kind.Q4_1: 4, Kind.Q8_0: 8}[kind]
    if isinstance(module, Int8Head):
        module = module.embedding
    packed = isinstance(module, Int4Linear | Int8Embedding) and module.bits == bits
    blocks = module.blocks().cpu() if packed else quantized(module.weight, bits)
    return blocks[_rows(name, config, len(blocks), back=True)].numpy()


def _copy_metadata(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    for field in _own_fields(reader):
        kind, *inner = field.types
        writer.add_key_value(field.name, field.contents(), kind, inner[-1] if inner else None)


def _own_fields(reader: gguf.GGUFReader) -> Iterator[gguf.ReaderField]:
    """All but what the writer itself puts at the head of the file."""
    return (f for f in reader.fields.values() if not f.name.startswith("GGUF.") and f.name != "general.architecture")
