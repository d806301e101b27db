"""Chapter 3's runs, too long for the chapter: `make sweeps` runs them and writes `results/sweeps/bits.json`.

Every run starts from chapter 2's fine-tuned EfficientNet-Lite0 and takes the same extra steps. Parts, by the name in
`part`: "grid" (a learning rate for each kind of contender, by the validation loss), "before" (the test accuracy of each
width ahead of the extra steps: post-training quantization), "bits" (after them, and of the float control), "practices"
(one thing changed at a time, accuracy on the validation part, so that the test part judges no choice; what they are
compared with is in "bits", as `validation_accuracy`).
"""

import copy
from collections.abc import Callable
from functools import partial

import qft_utils.compat  # noqa: F401  first: timm imports torchvision

# isort: split
import torch
from torch import Tensor, nn

from qft_utils import assets, fashion, measure, qat, recovery, training
from qft_utils.observers import MinMax, Percentile
from qft_utils.sweeps import Journal

CODE = ["experiments/sweep_bits.py"]
CODE += [f"qft_utils/{name}.py" for name in ("data", "fashion", "models", "observers", "recovery", "training")]
CODE += ["qft_utils/measure.py", "qft_utils/quantization.py"]
CODE += [
    f"qft_utils/qat/{name}.py"
    for name in ("inspect", "layers", "prepare", "quantizers", "rounding", "tracing", "verbs")
]

SEEDS = (0, 1, 2)
RATES = (1e-4, 3e-4, 1e-3)
TUNED_BY = {"float": "float", "w8a8": "w8a8", "w6a6": "w8a8", "w4a4": "w4a4", "w3a3": "w2a4", "w2a2": "w2a4",
            "w2a4": "w2a4"}  # fmt: skip

Model = nn.Module
Narrow = Callable[[Model, list[Tensor]], Model]


def as_float(model: Model, calibration: list[Tensor]) -> Model:
    return copy.deepcopy(model)


def ranged(weight_bits: int, act_bits: int) -> Narrow:
    return lambda model, calibration: recovery.narrow(model, weight_bits, act_bits, calibration)


def learned(weight_bits: int, act_bits: int) -> Narrow:
    return lambda model, calibration: recovery.narrow_learned(model, weight_bits, act_bits, calibration)


CONTENDERS = {"float": as_float, "w8a8": ranged(8, 8), "w6a6": ranged(6, 6), "w4a4": ranged(4, 4),
              "w3a3": learned(3, 3), "w2a2": learned(2, 2), "w2a4": learned(2, 4)}  # fmt: skip


def varied(*, ends: bool = True, observing: bool = False, norms: bool = True, bits=(4, 4), **options) -> Narrow:
    """`recovery.narrow` with one of its choices made otherwise."""

    def narrow(model: Model, calibration: list[Tensor]) -> Model:
        narrowed = qat.prepare(model, *bits, **{"observer": partial(Percentile, 99.9)} | options)
        if ends:
            qat.set_bits(narrowed, 8, 8, only=recovery.ENDS)
        qat.calibrate(narrowed, calibration)
        qat.freeze(narrowed, observers=not observing, batch_norm=not norms)
        return narrowed

    return narrow


PRACTICES = {
    "min_max": varied(observer=MinMax),
    "still_observing": varied(observing=True),
    "norms_frozen": varied(norms=False),
    "per_tensor": varied(granularity="tensor"),
    "narrow_ends": varied(ends=False),
    "learned_step": learned(4, 4),
    "w2a4_ranges": varied(bits=(2, 4)),
}


def tested(model: Model, split: str, count: int | None = None) -> dict[str, float]:
    batches = fashion.evaluation_batches(split, fashion.Settings(), count)
    loss, predictions, labels = training.evaluate(model, batches)
    accuracy = measure.accuracy(predictions, labels)
    return {"loss": loss, "accuracy": accuracy.value, "low": accuracy.low, "high": accuracy.high}


def recovered(base: Model, narrow: Narrow, rate: float, seed: int) -> Model:
    """Narrow, and take the extra steps."""
    settings = recovery.Settings(rate, seed=seed)
    model = narrow(base, recovery.calibration_batches(seed))
    return recovery.recover(model, recovery.recovery_batches(settings), settings)


def tried(base: Model, narrow: Narrow, rate: float, seed: int = 0, count: int | None = None) -> dict[str, float]:
    """On the validation part, all of it or its first `count` pictures."""
    return tested(recovered(base, narrow, rate, seed), "validation", count)


def reported(base: Model, name: str, rate: float, seed: int) -> dict[str, float]:
    """On the test part, and where the practices need it, on the validation part as well."""
    model = recovered(base, CONTENDERS[name], rate, seed)
    more = {"validation_accuracy": tested(model, "validation")["accuracy"]} if name in ("w4a4", "w2a4") else {}
    return tested(model, "test") | more


def before(base: Model, name: str) -> dict[str, float]:
    """Test accuracy of the width `name`, by ranges, without any training."""
    weight_bits, act_bits = int(name[1]), int(name[3])
    return tested(recovery.narrow(base, weight_bits, act_bits, recovery.calibration_batches()), "test")


def main() -> None:
    torch.set_num_threads(2)
    base, journal, chosen = assets.trained("fashion").model, Journal("bits", CODE), {}
    base = base.to(memory_format=torch.channels_last)
    for name in ("float", "w8a8", "w4a4", "w2a4"):
        losses = {}
        for rate in RATES:
            keys = {"part": "grid", "contender": name, "learning_rate": rate}
            losses[rate] = journal.run(keys, partial(tried, base, CONTENDERS[name], rate, count=2_000))["loss"]
        chosen[name] = min(losses, key=losses.get)
        print(f"{name}: {chosen[name]}", flush=True)
    for name in [name for name in CONTENDERS if name != "float"]:
        journal.run({"part": "before", "contender": name}, partial(before, base, name))
    for seed in SEEDS:
        for name in CONTENDERS:
            rate = chosen[TUNED_BY[name]]
            keys = {"part": "bits", "contender": name, "learning_rate": rate, "seed": seed}
            journal.run(keys, partial(reported, base, name, rate, seed))
        for name, narrow in PRACTICES.items():
            rate = chosen["w2a4" if name.startswith("w2a4") else "w4a4"]
            keys = {"part": "practices", "contender": name, "learning_rate": rate, "seed": seed}
            journal.run(keys, partial(tried, base, narrow, rate, seed))
    print(f"wrote {journal.write().name}")


if __name__ == "__main__":
    main()
