"""Chapter 3's runs, too long for the chapter: `make sweeps` runs them and writes `results/sweeps/bits.json`.

Every run starts from chapter 2's fine-tuned EfficientNet-Lite0 and takes the same extra steps. Parts, by the name in
`part`: "grid" (a learning rate for each contender, by the validation loss), "before" (test accuracy ahead of the extra
steps: post-training quantization), "norms" (the same pictures without any gradient: only the batch norms' statistics
follow), "bits" (the extra steps, and those of the float control), "practices" (one thing changed at a time, accuracy on
the validation part, so that the test part judges no choice; "bits" has the recipe's own as `validation_accuracy`).
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import qft_utils.compat  # noqa: F401  first: timm imports torchvision

# isort: split
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qft_utils import assets, fashion, measure, qat, recovery, training, tuning
from qft_utils.observers import MinMax, Percentile
from qft_utils.sweeps import Journal

CODE = ["experiments/sweep_bits.py"]
CODE += [f"qft_utils/{name}.py" for name in ("data", "fashion", "measure", "models", "observers", "quantization")]
CODE += [f"qft_utils/{name}.py" for name in ("recovery", "training", "tuning")]
CODE += [
    f"qft_utils/qat/{name}.py"
    for name in ("inspect", "layers", "prepare", "quantizers", "rounding", "tracing", "verbs")
]

SEEDS = (0, 1, 2)
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # the search begins with three, from BEGIN on: see `tuning.search`
BEGIN = 1

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
OTHERWISE = {"w4a4_learned": learned(4, 4), "w2a4_ranges": ranged(2, 4)}  # the other kind of step at the same widths
BORROWS = {"w6a6": "w8a8"}  # has the learning rate of another; everyone else has a grid
REFRESHED = ("w6a6", "w4a4", "w3a3", "w2a2", "w2a4", "w2a4_ranges")
CHOICES = 3_000  # pictures of the validation part that the practices are judged on; the grid takes 2,000


def varied(*, ends: bool = True, observing: bool = False, norms: bool = True, **options) -> Narrow:
    """`recovery.narrow` to four bits, with one of its choices made otherwise."""

    def narrow(model: Model, calibration: list[Tensor]) -> Model:
        narrowed = qat.prepare(model, 4, 4, **{"observer": partial(Percentile, 99.9)} | options)
        if ends:
            qat.set_bits(narrowed, 8, 8, only=recovery.ENDS)
        qat.calibrate(narrowed, calibration)
        qat.freeze(narrowed, observers=not observing, batch_norm=not norms)
        return narrowed

    return narrow


@dataclass(frozen=True)
class Practice:
    narrow: Narrow
    tuned_as: str = "w4a4"
    halfway: Callable[[Model], None] | None = None  # done to the model after half of the steps


PRACTICES = {
    "min_max": Practice(varied(observer=MinMax)),
    "observing": Practice(varied(observing=True)),
    "observing_half": Practice(varied(observing=True), halfway=partial(qat.freeze, batch_norm=False)),
    "norms_frozen": Practice(varied(norms=False)),
    "norms_frozen_half": Practice(ranged(4, 4), halfway=qat.freeze),
    "per_tensor": Practice(varied(granularity="tensor")),
    "narrow_ends": Practice(varied(ends=False)),
    "learned_step": Practice(learned(4, 4), "w4a4_learned"),
    "w2a4_ranges": Practice(ranged(2, 4), "w2a4_ranges"),
}


class Halfway:
    """Batches that call `act` when half of them have been taken."""

    def __init__(self, batches: DataLoader, act: Callable[[], None]) -> None:
        self.batches, self.act = batches, act

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator:
        for taken, batch in enumerate(self.batches):
            if taken == len(self.batches) // 2:
                self.act()
            yield batch


def tested(model: Model, split: str, count: int | None = None) -> dict[str, float]:
    """On a part, or on its first `count` pictures."""
    loss, predictions, labels = training.evaluate(model, fashion.evaluation_batches(split, fashion.Settings(), count))
    accuracy = measure.accuracy(predictions, labels)
    return {"loss": loss, "accuracy": accuracy.value, "low": accuracy.low, "high": accuracy.high}


def recovered(base: Model, practice: Practice, rate: float, seed: int) -> Model:
    """Narrow, and take the extra steps."""
    settings = recovery.Settings(rate, seed=seed)
    model, batches = practice.narrow(base, recovery.calibration_batches(seed)), recovery.recovery_batches(settings)
    if practice.halfway is not None:
        batches = Halfway(batches, partial(practice.halfway, model))
    return recovery.recover(model, batches, settings)


def tried(base: Model, practice: Practice, rate: float) -> dict[str, float | None]:
    """The validation loss of a run of the grid; one that diverged has none."""
    try:
        loss = tested(recovered(base, practice, rate, 0), "validation", 2_000)["loss"]
    except FloatingPointError:
        loss = math.nan
    return {"loss": loss if math.isfinite(loss) else None}


def before(base: Model, narrow: Narrow, seed: int) -> dict[str, float]:
    return tested(narrow(base, recovery.calibration_batches(seed)), "test")


def refreshed(base: Model, narrow: Narrow, seed: int) -> dict[str, float]:
    model, settings = narrow(base, recovery.calibration_batches(seed)), recovery.Settings(0, seed=seed)
    return tested(recovery.refresh_norms(model, recovery.recovery_batches(settings)), "test")


def reported(base: Model, narrow: Narrow, rate: float, seed: int) -> dict[str, float]:
    model = recovered(base, Practice(narrow), rate, seed)
    return tested(model, "test") | {"validation_accuracy": tested(model, "validation", CHOICES)["accuracy"]}


def judged(base: Model, practice: Practice, rate: float, seed: int) -> dict[str, float]:
    return tested(recovered(base, practice, rate, seed), "validation", CHOICES)


def main() -> None:
    torch.set_num_threads(2)
    base = assets.trained("fashion").model.to(memory_format=torch.channels_last)
    journal, chosen, everyone = Journal("bits", CODE), {}, CONTENDERS | OTHERWISE

    def loss_at(name: str, rate: float) -> float:
        keys = {"part": "grid", "contender": name, "learning_rate": rate}
        loss = journal.run(keys, partial(tried, base, Practice(everyone[name]), rate))["loss"]
        return math.inf if loss is None else loss

    for name in [name for name in everyone if name not in BORROWS]:
        chosen[name] = tuning.search(partial(loss_at, name), RATES, BEGIN)
        print(f"{name}: {chosen[name]}", flush=True)
    chosen |= {name: chosen[lender] for name, lender in BORROWS.items()}
    for seed in SEEDS:
        for name in [name for name in everyone if name != "float"]:
            keys = {"part": "before", "contender": name, "seed": seed}
            journal.run(keys, partial(before, base, everyone[name], seed))
        for name in REFRESHED:
            keys = {"part": "norms", "contender": name, "seed": seed}
            journal.run(keys, partial(refreshed, base, everyone[name], seed))
        for name, narrow in CONTENDERS.items():
            keys = {"part": "bits", "contender": name, "learning_rate": chosen[name], "seed": seed}
            journal.run(keys, partial(reported, base, narrow, chosen[name], seed))
        for name, practice in PRACTICES.items():
            rate = chosen[practice.tuned_as]
            keys = {"part": "practices", "contender": name, "learning_rate": rate, "seed": seed}
            journal.run(keys, partial(judged, base, practice, rate, seed))
    print(f"wrote {journal.write().name}")


if __name__ == "__main__":
    main()
