"""Chapter 4's runs, too long for the chapter: `make sweeps NAME=schedules` writes `results/sweeps/schedules.json`.

Every run starts from chapter 1's sentiment classifier and takes the same 48 extra steps, on sentences that its own
fine-tuning has not seen. Parts, by the name in `part`: "grid" (a learning rate for each pair of schedule and loss, by
the validation loss), "ptq" (narrowed, not trained), "main" (schedules and losses), "control" (float), "budget" (bits
per layer at equal bytes; "cost" has the sensitivities that they were allocated by), "teacher" (a weaker one),
"temperature" (judged on the validation part), "hidden" (a hidden state is matched, too; the learning rate is
borrowed). Every student is packed, saved and weighed.
"""

import copy
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial

import qft_utils.compat  # noqa: F401  first: transformers' Trainer imports torchvision

# isort: split
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from qft_utils import allocation, assets, data, measure, models, narrowing, qat, schedules, sentiment, tuning
from qft_utils.narrowing import Settings
from qft_utils.sweeps import Journal

CODE = ["experiments/sweep_schedules.py"]
CODE += [
    f"qft_utils/{name}.py"
    for name in ("allocation", "data", "distillation", "measure", "models", "narrowing", "packing")
]
CODE += [f"qft_utils/{name}.py" for name in ("quantization", "schedules", "sentiment", "tuning")]
CODE += [f"qft_utils/qat/{name}.py" for name in ("files", "inspect", "layers", "packed", "prepare")]
CODE += [f"qft_utils/qat/{name}.py" for name in ("quantizers", "rounding", "verbs")]

SEEDS = (0, 1, 2)
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)  # the search begins with three, from BEGIN on: see `tuning.search`
BEGIN = 1
STEPS = Settings(0).steps
SCHEDULES = {
    "rising": schedules.rising((2, 3, 4, 8), STEPS),
    "falling": schedules.falling((8, 4, 3, 2), STEPS),
    "direct": schedules.direct(2, STEPS),
}
LOSSES = {"labels": 0.0, "distillation": 0.5, "label_free": 1.0}  # alpha, the teacher's weight
TEMPERATURES = (1.0, 4.0)  # the main runs have 2
WIDTHS = (2, 3, 4, 8)


class Bench:
    """What all runs share: the teacher, the sentences with its logits, and how a model is judged."""

    def __init__(self) -> None:
        self.teacher, (_, self.tokenizer) = assets.trained("sentiment").model.eval(), models.load_encoder()
        self.pad = DataCollatorWithPadding(self.tokenizer)
        self.sentences = narrowing.unseen(self.tokenizer)
        self.examples = narrowing.with_teacher(self.teacher, self.sentences, self.tokenizer)
        self.parts = {
            part: sentiment.ReviewDataset(data.reviews(part), self.tokenizer) for part in ("validation", "test")
        }

    def student(self, seed: int) -> nn.Module:
        return narrowing.prepared(self.teacher, narrowing.calibration_batches(self.tokenizer, seed=seed))

    @torch.inference_mode()
    def judged(self, model: nn.Module, part: str) -> dict[str, float]:
        """Loss, and accuracy with its interval over the sentences."""
        dataset, total = self.parts[part], 0.0
        order = sorted(range(len(dataset)), key=lambda i: len(dataset.tokens[i]))
        predicted, labels = [], []
        for batch in DataLoader(dataset, 256, sampler=order, collate_fn=self.pad):
            truth = batch.pop("labels")
            logits = model.eval()(**batch).logits
            total += F.cross_entropy(logits, truth, reduction="sum").item()
            predicted.append(logits.argmax(-1))
            labels.append(truth)
        accuracy = measure.accuracy(torch.cat(predicted), torch.cat(labels))
        return {"loss": total / len(dataset), "accuracy": accuracy.value, "low": accuracy.low, "high": accuracy.high}

    def reported(self, model: nn.Module) -> dict[str, float]:
        """On the test part, with the packed file's bytes and the time that the packed model takes for a sentence."""
        with tempfile.TemporaryDirectory() as folder:
            packed, path = qat.convert(model), os.path.join(folder, "model.safetensors")
            qat.save(packed, path)
            size = os.path.getsize(path)
        batch = self.pad([{"input_ids": self.sentences.tokens[0]}])
        with torch.inference_mode():
            timed = measure.latency({"packed": lambda: packed(**batch)}, rounds=10, warmup=2)["packed"]
        return self.judged(model, "test") | {"bytes": size, "latency_ms": timed.median}


def tried(bench: Bench, make: Callable[[float], nn.Module], rate: float) -> dict[str, float | None]:
    """The validation loss of a run of the grid; one that diverged has none."""
    loss = bench.judged(make(rate), "validation")["loss"]
    return {"loss": loss if math.isfinite(loss) else None}


def by_schedule(bench: Bench, schedule: str, loss: str, seed: int, rate: float, **options: float) -> nn.Module:
    settings = Settings(rate, **{"alpha": LOSSES[loss], "seed": seed} | options)
    return narrowing.train(
        bench.student(seed), bench.examples, bench.tokenizer, settings, SCHEDULES[schedule], bench.teacher
    )


def in_float(bench: Bench, seed: int, rate: float) -> nn.Module:
    model = copy.deepcopy(bench.teacher)
    return narrowing.train(model, bench.examples, bench.tokenizer, Settings(rate, seed=seed))


def at_widths(bench: Bench, bits: int | Mapping[str, int], seed: int, rate: float) -> nn.Module:
    """Direct, from the teacher alone."""
    student = narrowing.narrow(bench.student(seed), bits)
    return narrowing.train(student, bench.examples, bench.tokenizer, Settings(rate, alpha=1.0, seed=seed))


def both_ends(bench: Bench, schedule: str, model: nn.Module) -> dict[str, float]:
    """The test part; a schedule that ends wide is also judged when it is narrowed to two bits, without training."""
    measured = bench.reported(model)
    if SCHEDULES[schedule].stages[-1].weight_bits > 2:
        measured |= {f"{name}_w2": value for name, value in bench.reported(narrowing.narrow(model, 2)).items()}
    return measured


def cost_table(bench: Bench) -> dict[str, dict]:
    """KL to the float model when one layer alone is narrowed, nats a sentence, and the bytes of each width."""
    batches = narrowing.calibration_batches(bench.tokenizer, 96, seed=1)
    student, score = bench.student(0), allocation.kl_to(narrowing.Unpacked(bench.teacher), batches)
    cost = allocation.sensitivity(student, lambda model: score(narrowing.Unpacked(model)), WIDTHS)
    sizes = allocation.sizes(student, WIDTHS)
    return {"cost": {name: cost[name] for name in narrowing.body(student)},
            "sizes": {name: sizes[name] for name in narrowing.body(student)}}  # fmt: skip


def tables(stored: Mapping[str, Mapping]) -> tuple[dict, dict]:
    """JSON makes texts of the widths."""
    return tuple(
        {name: {int(b): v for b, v in of.items()} for name, of in stored[k].items()} for k in ("cost", "sizes")
    )


def weak_teacher(bench: Bench) -> nn.Module:
    """Half of the teacher's layers, its student for as many sentences as the teacher was fine-tuned on."""
    settings = Settings(1e-4, alpha=1.0, sentences=3_488)
    return narrowing.train(narrowing.shallow(bench.teacher), bench.examples, bench.tokenizer, settings)


def main() -> None:
    torch.set_num_threads(2)
    journal, bench, chosen = Journal("schedules", CODE), Bench(), {}

    def run(keys: Mapping, make: Callable[[], Mapping]) -> dict:
        return journal.run(keys, make)

    def search(keys: Mapping, make: Callable[[float], nn.Module]) -> float:
        def loss_at(rate: float) -> float:
            loss = run(keys | {"part": "grid", "learning_rate": rate}, partial(tried, bench, make, rate))["loss"]
            return math.inf if loss is None else loss

        return tuning.search(loss_at, RATES, BEGIN)

    for loss in LOSSES:
        for schedule in SCHEDULES:
            keys = {"schedule": schedule, "loss_of": loss}
            chosen[schedule, loss] = search(keys, partial(by_schedule, bench, schedule, loss, 0))
            print(keys, chosen[schedule, loss], flush=True)
    chosen["float"] = search({"schedule": "float", "loss_of": "labels"}, partial(in_float, bench, 0))
    stored = run({"part": "cost"}, partial(cost_table, bench))
    cost, sizes = tables(stored)
    budget = sum(of[3] for of in sizes.values())
    allocated, rate = allocation.allocate(cost, sizes, budget), chosen["direct", "label_free"]
    drawn = allocation.random_allocations(sizes, budget, count=len(SEEDS), seed=0, slack=0.05)
    weak = None
    for seed in SEEDS:
        for bits in WIDTHS:
            keys = {"part": "ptq", "bits": bits, "seed": seed}
            run(keys, lambda b=bits, s=seed: bench.reported(narrowing.narrow(bench.student(s), b)))
        for schedule in SCHEDULES:
            for loss in LOSSES:
                own = chosen[schedule, loss]
                keys = {"part": "main", "schedule": schedule, "loss_of": loss, "learning_rate": own, "seed": seed}
                run(keys, lambda k=schedule, o=loss, r=own, s=seed: both_ends(bench, k, by_schedule(bench, k, o, s, r)))
        keys = {"part": "control", "learning_rate": chosen["float"], "seed": seed}
        run(keys, lambda s=seed: bench.judged(in_float(bench, s, chosen["float"]), "test"))
        for name, bits in {"3": 3, "4": 4, "8": 8, "allocated": allocated, "random": drawn[seed]}.items():
            keys = {"part": "budget", "name": name, "widths": bits, "learning_rate": rate, "seed": seed}
            run(keys, lambda b=bits, s=seed: bench.reported(at_widths(bench, b, s, rate)))
    for seed in SEEDS:
        weak = weak or weak_teacher(bench)
        keys = {"part": "teacher", "learning_rate": rate, "seed": seed}
        run(keys, partial(taught_by, bench, weak, seed, rate))
        for temperature in TEMPERATURES:
            own = chosen["direct", "distillation"]
            keys = {"part": "temperature", "temperature": temperature, "learning_rate": own, "seed": seed}
            model = partial(by_schedule, bench, "direct", "distillation", seed, own, temperature=temperature)
            run(keys, lambda m=model: bench.judged(m(), "validation"))
        keys = {"part": "hidden", "learning_rate": rate, "seed": seed}
        run(keys, lambda s=seed: bench.reported(by_schedule(bench, "direct", "label_free", s, rate, hidden=1.0)))
    print(f"wrote {journal.write().name}")


def taught_by(bench: Bench, teacher: nn.Module, seed: int, rate: float) -> dict[str, float]:
    examples = narrowing.with_teacher(teacher, bench.sentences, bench.tokenizer)
    settings = Settings(rate, alpha=1.0, seed=seed)
    student = narrowing.train(bench.student(seed), examples, bench.tokenizer, settings, SCHEDULES["direct"])
    return bench.reported(student) | {"teacher_accuracy": bench.judged(teacher, "test")["accuracy"]}


if __name__ == "__main__":
    main()
