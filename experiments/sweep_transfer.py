"""Chapter 2's comparisons, too long for the chapter: `make sweeps` runs them and writes `results/sweeps/transfer.json`.

Parts, by the name in `part`: "grid" (a learning rate and a weight decay for each contender, by the validation loss),
"start" (from scratch, frozen, fine-tuned, and the last one's way into int8), "choices" (optimizer, loss, augmentation)
and "small" (overfitting on few pictures, in float and under fake quantization). All 10,000 test pictures count.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

import qft_utils.compat  # noqa: F401  first: timm imports torchvision

# isort: split
import timm
import torch
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from qft_utils import data, fashion, measure, models, qat, training
from qft_utils.sweeps import Journal

CODE = ["experiments/sweep_transfer.py"]
CODE += [f"qft_utils/{name}.py" for name in ("data", "fashion", "models", "training", "observers")]
CODE += [f"qft_utils/qat/{name}.py" for name in ("layers", "prepare", "quantizers", "rounding", "tracing", "verbs")]

SETTINGS = fashion.Settings()
SEEDS = (0, 1, 2)
GRID_IMAGES = 6_000  # of the grid and of the choices, which are compared at the budget that they were tuned for
SMALL = replace(SETTINGS, images=300, epochs=20, batch_size=32)
GRIDS = {
    "adamw": {"learning_rate": (1e-3, 2e-3, 4e-3), "weight_decay": (0.01, 0.1)},
    "sgd": {"learning_rate": (0.01, 0.03, 0.1), "weight_decay": (1e-4, 1e-3)},
}
HEAD_EPOCHS = 20  # of the frozen contender, whose pictures pass through the body once all the same
FLIP_AND_SHIFT = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(28, padding=2)])

validation = fashion.evaluation_batches("validation", SETTINGS, 2_000)
few_validation = fashion.evaluation_batches("validation", SETTINGS, 500)  # after each of many epochs
test = fashion.evaluation_batches("test", SETTINGS)


def pretrained(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return fashion.new_head(models.load_cnn())


def untrained(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return fashion.new_head(timm.create_model("efficientnet_lite0", bn_eps=1e-3))


def sgd(model: nn.Module, batches: DataLoader, validation: DataLoader, settings: fashion.Settings) -> training.History:
    """SGD with momentum; its learning rate falls to a tenth after each third of the steps."""
    rates = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    optimizer = torch.optim.SGD(model.parameters(), **rates, momentum=0.9, nesterov=True)
    third = -(-settings.epochs * len(batches) // 3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, third, gamma=0.1)
    run = {"optimizer": optimizer, "schedule": schedule, "epochs": settings.epochs, "clip_norm": 1.0}
    return training.fit(model, batches, validation, **run)


def batches_of(settings: fashion.Settings, augment: Callable | None = None) -> DataLoader:
    images, labels = data.fashion_mnist("train")
    part = fashion.Pictures(images[: settings.images], labels[: settings.images], settings.pixels, augment)
    return fashion.loader(part, settings.batch_size, settings.seed)


def measured(model: nn.Module, history: training.History, batches: DataLoader = test) -> dict:
    _, predictions, labels = training.evaluate(model, batches)
    accuracy = measure.accuracy(predictions, labels)
    return {"accuracy": accuracy.value, "low": accuracy.low, "high": accuracy.high, "history": asdict(history)}


def fully(
    build: Callable,
    train: Callable,
    settings: fashion.Settings,
    augment: Callable | None = None,
    tuning: bool = False,
    **options,
) -> dict:
    model = build(settings.seed)
    history = train(model, batches_of(settings, augment), validation, settings, **options)
    return {"history": asdict(history)} if tuning else measured(model, history)


def frozen(settings: fashion.Settings, tuning: bool = False) -> dict:
    """The head alone learns, from features that are computed once."""
    model = pretrained(settings.seed)
    body = fashion.body_of(model)
    seen = fashion.features(body, batches_of(settings))
    torch.manual_seed(settings.seed)
    head = nn.Linear(model.num_features, fashion.CLASSES)
    run = replace(settings, epochs=HEAD_EPOCHS)
    kept = fashion.loader(fashion.features(body, validation), 250)
    history = fashion.fine_tune(head, fashion.loader(seen, run.batch_size, run.seed), kept, run)
    if tuning:
        return {"history": asdict(history)}
    return measured(head, history, fashion.loader(fashion.features(body, test), 250))


def ways_into_int8(model: nn.Module, settings: fashion.Settings) -> dict[str, float]:
    """Test accuracy of three FX models: seven bits, eight bits on either engine, and the latter's float reference."""
    images, _ = data.fashion_mnist("train")
    calibration = [fashion.to_input(part, settings.pixels) for part in images[:256].split(64)]

    def accuracy(mapping: str, engine: str, convert: Callable = convert_fx) -> float:
        torch.backends.quantized.engine = engine
        prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(mapping), (calibration[0],))
        with torch.no_grad():
            for batch in calibration:
                prepared(batch)
            quantized = convert(prepared)
            right = [(quantized(inputs).argmax(1) == labels).sum().item() for inputs, labels in test]
        return sum(right) / 10_000

    return {
        "int8_seven_bits": accuracy("x86", "x86"),
        "int8_eight_bits_x86": accuracy("onednn", "x86"),
        "int8_eight_bits_onednn": accuracy("onednn", "onednn"),
        "int8_eight_bits_reference": accuracy("onednn", "x86", convert_to_reference_fx),
    }


def fine_tuned(settings: fashion.Settings) -> dict:
    model = pretrained(settings.seed)
    history = fashion.fine_tune(model, batches_of(settings), validation, settings)
    return measured(model, history) | ways_into_int8(model, settings)


def small(settings: fashion.Settings, bits: int | None) -> dict:
    """Few pictures, many epochs, with weights of `bits` bits and inputs of eight, simulated; None is float."""
    model = pretrained(settings.seed)
    if bits is not None:
        model = qat.prepare(model, bits, 8)
    return measured(model, fashion.fine_tune(model, batches_of(settings), few_validation, settings))


CONTENDERS = {
    "scratch": ("adamw", partial(fully, untrained, fashion.fine_tune)),
    "frozen": ("adamw", frozen),
    "fine_tuned": ("adamw", partial(fully, pretrained, fashion.fine_tune)),
    "sgd": ("sgd", partial(fully, pretrained, sgd)),
}
CHOICES = {
    "adamw": ("fine_tuned", {}),
    "sgd": ("sgd", {}),
    "label_smoothing": ("fine_tuned", {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}),
    "augmentation": ("fine_tuned", {"augment": FLIP_AND_SHIFT}),
}


def main() -> None:
    torch.set_num_threads(2)
    warnings.filterwarnings("ignore")  # the FX route is deprecated; the chapter says so
    journal, chosen = Journal("transfer", CODE), {}
    for name, (grid, train) in CONTENDERS.items():
        tried = []
        for rate in GRIDS[grid]["learning_rate"]:
            for decay in GRIDS[grid]["weight_decay"]:
                run = replace(SETTINGS, images=GRID_IMAGES, learning_rate=rate, weight_decay=decay)
                keys = {"part": "grid", "contender": name, "learning_rate": rate, "weight_decay": decay}
                tried.append(journal.run(keys, lambda run=run, train=train: train(run, tuning=True)))
        best = min(tried, key=lambda made: min(made["history"]["validation_loss"]))
        chosen[name] = {key: best[key] for key in ("learning_rate", "weight_decay")}
        print(f"{name}: {chosen[name]}", flush=True)
    for seed in SEEDS:
        for name, train in {"scratch": CONTENDERS["scratch"][1], "frozen": frozen, "fine_tuned": fine_tuned}.items():
            run = replace(SETTINGS, seed=seed, **chosen[name])
            keys = {"part": "start", "contender": name, "seed": seed, **chosen[name]}
            journal.run(keys, lambda run=run, train=train: train(run))
        for name, (tuned, options) in CHOICES.items():
            run = replace(SETTINGS, seed=seed, images=GRID_IMAGES, **chosen[tuned])
            keys = {"part": "choices", "contender": name, "seed": seed, **chosen[tuned]}
            journal.run(keys, lambda run=run, t=tuned, options=options: CONTENDERS[t][1](run, **options))
        for bits in (None, 4):
            run = replace(SMALL, seed=seed, **chosen["fine_tuned"])
            keys = {"part": "small", "contender": f"w{bits}" if bits else "float", "seed": seed}
            journal.run(keys, lambda run=run, bits=bits: small(run, bits))
    print(f"wrote {journal.write().name}")


if __name__ == "__main__":
    main()
