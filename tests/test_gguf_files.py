"""GGUF files in and out: against transformers' own dense reader, and byte for byte against the file itself."""

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GgufConfig, LlamaForCausalLM

from qft_utils import assets, gguf_files
from qft_utils.packed import Int4Linear, Int8Embedding, Int8Head
from tests.tiny_gguf import CONFIG, TOKENS, tensors, write


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def dense(file):
    config = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, quantization_config=config).eval()


def ids(count: int = 40) -> torch.Tensor:
    return torch.randint(len(TOKENS), (2, count), generator=torch.Generator().manual_seed(1))


def test_logits_are_those_of_the_dense_model(file, dense):
    model, _ = gguf_files.load(file, torch.float32)
    torch.testing.assert_close(model(ids()).logits, dense(ids()).logits, rtol=1e-4, atol=1e-4)


def test_in_bf16_to_the_rounding_of_bf16(file, dense):
    model, _ = gguf_files.load(file)
    have, want = model(ids()).logits.float(), dense.bfloat16()(ids()).logits.float()
    exact = dense.float()(ids()).logits
    assert (have - exact).norm() < 3 * (want - exact).norm()


def test_every_weight_is_packed_and_none_trains(file):
    model, _ = gguf_files.load(file)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == 15 and all(isinstance(m, Int4Linear | Int8Head) for m in linear)
    assert isinstance(model.get_input_embeddings(), Int8Embedding)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_the_tokenizer_comes_along(file):
    _, tokenizer = gguf_files.load(file)
    assert tokenizer.decode(tokenizer("the moth").input_ids) == "the moth"
    assert TOKENS.index("the") in tokenizer("the moth").input_ids
    assert tokenizer.pad_token is not None


def test_saved_again_it_is_the_same_file(file, tmp_path):
    model, _ = gguf_files.load(file, torch.float32)
    again = gguf_files.save(model, tmp_path / "again.gguf", like=file)
    assert again.read_bytes() == file.read_bytes()


def test_a_dense_model_is_rounded_once(file, tmp_path):
    """The rows of q and k go back to llama.cpp's order: the dense reader gets the same model from the new file."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    path = gguf_files.save(model, tmp_path / "new.gguf", like=file)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data = Int4Linear.from_float(module.weight).dequantize()
    model.model.embed_tokens.weight.data = Int8Embedding.from_float(model.model.embed_tokens.weight).dequantize()
    packed, _ = gguf_files.load(path, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True)
    )
    with torch.no_grad():
        want = model(ids()).logits
        torch.testing.assert_close(packed(ids()).logits, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(theirs(ids()).logits, want, rtol=1e-4, atol=1e-4)


def test_an_untied_head(tmp_path):
    weights = tensors() | {"output.weight": torch.randn(len(TOKENS), 64)}
    path = write(tmp_path / "untied.gguf", weights)
    model, _ = gguf_files.load(path, torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True)
    )
    torch.testing.assert_close(model(ids()).logits, dense(ids()).logits, rtol=1e-4, atol=1e-4)
    assert gguf_files.save(model, tmp_path / "again.gguf", like=path).read_bytes() == path.read_bytes()


def test_adapters_train_on_it(file):
    model, _ = gguf_files.load(file)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_an_adapter_must_be_gone_before_it_is_saved(file, tmp_path):
    model, _ = gguf_files.load(file)
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge or remove the adapter"):
        gguf_files.save(model, tmp_path / "no.gguf", like=file)
    assert not list(tmp_path.iterdir())


def without(name):
    return {k: v for k, v in tensors().items() if k != name}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weights": tensors() | {"blk.0.surprise.weight": torch.zeros(64)}}, "'blk.0.surprise.weight' has no place"),
        ({"weights": tensors() | {"blk.7.attn_norm.weight": torch.zeros(64)}}, "blk.7.attn_norm.weight"),
        ({"weights": tensors() | {"rope_freqs.weight": torch.zeros(8)}}, "'rope_freqs.weight' has no place"),
        ({"weights": without("blk.1.ffn_norm.weight")}, "no tensor for model.layers.1.post_attention_layernorm.weight"),
        ({"weights": tensors() | {"blk.0.attn_v.weight": torch.zeros(64, 64)}}, r"\(64, 64\), but .*\(32, 64\)"),
        ({"kinds": {"blk.0.attn_v.weight": Kind.Q8_0}}, "'blk.0.attn_v.weight' is Q8_0"),
        ({"kinds": {"blk.0.attn_v.weight": Kind.Q4_0}}, "'blk.0.attn_v.weight' is Q4_0"),
        ({"tokens": [*TOKENS[:-1], "extra", TOKENS[-1]]}, "not its tokenizer"),
        ({"architecture": "gpt2"}, "'gpt2' model"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        gguf_files.load(write(tmp_path / "odd.gguf", **change))


@pytest.mark.parametrize("share", [0, 0.0005, 0.3, 0.9, 0.999])
def test_a_file_cut_short_is_refused(file, tmp_path, share):
    whole = file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(assets.CorruptAsset, match="cut.gguf is no whole GGUF file"):
        gguf_files.load(tmp_path / "cut.gguf")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.gguf is not there"):
        gguf_files.load(tmp_path / "none.gguf")
