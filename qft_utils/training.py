"""The book's training loop: train, validate, keep the best weights, go on after an interruption.

    schedule = OneCycleLR(optimizer, 1e-3, epochs=5, steps_per_epoch=len(train_batches))
    history = fit(model, train_batches, validation_batches, optimizer=optimizer, schedule=schedule, epochs=5)
    loss, predictions, labels = evaluate(model, test_batches)

Batches are what can be passed through again and again and has a length, for example a DataLoader: inputs
(N, ...) and targets (N,). They are moved to the model's device; their memory format stays.
"""

import copy
import math
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from qft_utils import measure

Batches = Collection[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class History:
    """One value per epoch in each list: `pd.DataFrame(asdict(history))` is a table of them."""

    train_loss: list[float] = field(default_factory=list)  # mean over the examples, as the weights change
    validation_loss: list[float] = field(default_factory=list)
    validation_accuracy: list[float] = field(default_factory=list)  # fraction
    learning_rate: list[float] = field(default_factory=list)  # of the first step and first parameter group
    seconds: list[float] = field(default_factory=list)  # training and validation

    @property
    def best_epoch(self) -> int:
        """Index of the epoch with the highest validation accuracy; of equals, the earliest."""
        return max(range(len(self.seconds)), key=self.validation_accuracy.__getitem__)


class Evaluation(NamedTuple):
    """Mean loss of an example; predicted and true classes (N,) on the CPU, in the order of the batches."""

    loss: float
    predictions: Tensor
    labels: Tensor


def fit(
    model: nn.Module,
    train_batches: Batches,
    validation_batches: Batches,
    *,
    optimizer: Optimizer,
    epochs: int,
    loss: Loss = F.cross_entropy,
    schedule: LRScheduler | None = None,
    clip_norm: float | None = None,
    autocast: torch.dtype | None = None,
    checkpoint: str | os.PathLike | None = None,
) -> History:
    """Train `model` in place; it ends in evaluation mode, with the weights of the history's `best_epoch`.

    loss: mean loss, of shape (), of outputs (N, classes) and targets (N,).
    schedule: stepped after every step of the optimizer.
    clip_norm: greatest 2-norm of all gradients together (Pascanu et al. 2013, arXiv 1211.5063, algorithm 1).
    autocast: torch.bfloat16 for mixed precision; None leaves every type as it is.
    checkpoint: a file, written whole after every epoch. If it is there, training goes on after its last epoch
        and ends to the bit as if it had never stopped; a finished run's gives the result at once. It takes
        deterministic kernels, no persistent workers, and random numbers from torch's global state or from a
        `generator` of the batches, a sampler or a data set.
    Batch norms whose parameters are all frozen keep their running statistics, too.
    Raises ValueError for no batches, settings out of range, and another run's checkpoint, by what differs;
    FloatingPointError for a loss that is not finite, and the checkpoint keeps the epoch before.
    """
    _check_batches(train_batches=train_batches, validation_batches=validation_batches)
    if epochs < 1 or not (clip_norm is None or clip_norm > 0) or autocast not in (None, torch.bfloat16):
        got = f"epochs={epochs}, clip_norm={clip_norm}, autocast={autocast}"
        raise ValueError(f"need epochs >= 1, clip_norm > 0 or None, autocast bfloat16 or None: got {got}")
    parts = [model, optimizer] if schedule is None else [model, optimizer, schedule]
    settings = {"epochs": epochs, "steps": len(train_batches), "clip_norm": clip_norm, "autocast": autocast}
    owned = [*_generators(train_batches), *_generators(validation_batches)]
    generators = [torch.default_generator, *owned, *torch.cuda.default_generators]
    run = Run(parts, generators, _describe(settings, model, optimizer, schedule))
    if checkpoint is not None and Path(checkpoint).exists():
        run.load(Path(checkpoint))
        print(f"{run.epochs_done} of {epochs} epochs come from {Path(checkpoint).name}")
    for epoch in range(run.epochs_done, epochs):
        begin, name = time.perf_counter(), f"epoch {epoch + 1} of {epochs}"
        rate = float(optimizer.param_groups[0]["lr"])
        train_loss = train_epoch(model, train_batches, optimizer, loss, schedule, clip_norm, autocast, name)
        validation_loss, *classes = evaluate(model, validation_batches, loss, autocast)
        _check_finite(validation_loss, f"{name}, validation")
        measured = train_loss, validation_loss, measure.accuracy(*classes).value, rate
        print(f"{name}:", run.end_epoch(*measured, time.perf_counter() - begin))
        if checkpoint is not None:
            run.save(Path(checkpoint))
    model.load_state_dict(run.best)
    model.eval()
    return run.history


def train_epoch(
    model: nn.Module,
    batches: Batches,
    optimizer: Optimizer,
    loss: Loss = F.cross_entropy,
    schedule: LRScheduler | None = None,
    clip_norm: float | None = None,
    autocast: torch.dtype | None = None,
    name: str = "epoch",
) -> float:
    """One pass in training mode: the mean loss of an example. `name` is for the bar and for errors."""
    device, total, examples = next(model.parameters()).device, 0.0, 0
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    _train_mode(model)
    # enumerate() inside: tqdm.auto would make an iterator more, and a DataLoader draws a number for each.
    for step, (inputs, targets) in tqdm(enumerate(batches, 1), name, len(batches), leave=False):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            value = loss(model(inputs.to(device)), targets.to(device))
        _check_finite(value.item(), f"{name}, step {step} of {len(batches)}")
        value.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(trained, clip_norm)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        total, examples = total + value.item() * len(targets), examples + len(targets)
    return total / examples


@torch.no_grad()  # inference_mode() could leave tensors in a module's cache that training may not use
def evaluate(
    model: nn.Module, batches: Batches, loss: Loss = F.cross_entropy, autocast: torch.dtype | None = None
) -> Evaluation:
    """Loss and classes in evaluation mode, in which the model stays. Raises ValueError without batches."""
    _check_batches(batches=batches)
    device, total, predictions, labels = next(model.parameters()).device, 0.0, [], []
    model.eval()
    for inputs, targets in batches:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            outputs = model(inputs.to(device))
            total += loss(outputs, targets.to(device)).item() * len(targets)
        predictions.append(outputs.argmax(-1).cpu())
        labels.append(targets.cpu())
    return Evaluation(total / sum(map(len, labels)), torch.cat(predictions), torch.cat(labels))


@dataclass
class Run:
    """What changes while a model trains, which is what a checkpoint holds."""

    parts: list[Any]  # model, optimizer and schedule
    generators: list[torch.Generator]
    made: dict[str, str]  # what must be the same where another run goes on
    history: History = field(default_factory=History)
    best: dict[str, Any] = field(default_factory=dict)  # the state dict of the best epoch

    @property
    def epochs_done(self) -> int:
        return len(self.history.seconds)

    def end_epoch(self, *values: float) -> str:
        """Enter one value per column of the history, keep the weights if they are the best, and report."""
        for column, value in zip(asdict(self.history), values, strict=True):
            getattr(self.history, column).append(value)
        if self.history.best_epoch == self.epochs_done - 1:
            self.best = copy.deepcopy(self.parts[0].state_dict())
        return ", ".join(f"{name.replace('_', ' ')} {c[-1]:.4g}" for name, c in asdict(self.history).items())

    def save(self, path: Path) -> None:
        """Write the checkpoint whole or not at all."""
        state = {"made": self.made, "history": asdict(self.history), "best": self.best}
        state["parts"] = [part.state_dict() for part in self.parts]
        state["random"] = [generator.get_state() for generator in self.generators]
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            torch.save(state, Path(folder, "checkpoint"))
            os.replace(Path(folder, "checkpoint"), path)

    def load(self, path: Path) -> None:
        """Be where the checkpoint is. Raises ValueError, before anything changes, if it is another run's."""
        state = _read(path, self.made)
        self.history, self.best = History(**state["history"]), state["best"]
        for part, of_part in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(of_part)
        # Not strict: a run that began on a GPU may go on without one.
        for generator, random in zip(self.generators, state["random"], strict=False):
            generator.set_state(random)


def _read(path: Path, made: dict[str, str]) -> dict[str, Any]:
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        there = state["made"]
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a checkpoint that fit() wrote ({error}): name another") from error
    for name in made | there:
        if made.get(name) != there.get(name):
            differs = f"{name} is {there.get(name)} there and {made.get(name)} here"
            raise ValueError(f"{path} is another run's: {differs}. Name another file, or delete this one")
    return state


def _describe(
    settings: dict[str, Any], model: nn.Module, optimizer: Optimizer, schedule: LRScheduler | None
) -> dict[str, str]:
    """The run in words, without anything that training changes."""
    said = settings | {"optimizer": type(optimizer).__name__, "schedule": type(schedule).__name__}
    said |= {f"module {name!r}": f"{type(m).__name__}({m.extra_repr()})" for name, m in model.named_modules()}
    said |= {f"shape of {n!r}": list(getattr(t, "shape", ())) for n, t in model.state_dict().items()}
    said |= {f"the optimizer's {name}": value for name, value in optimizer.defaults.items()}
    for index, group in enumerate(optimizer.param_groups):
        said[f"learning rate of group {index}"] = float(group.get("initial_lr", group["lr"]))
        said[f"parameters of group {index}"] = len(group["params"])
    return {name: str(value) for name, value in said.items()}


def _generators(batches: Any) -> Iterator[torch.Generator]:
    """The generators of a loader, its samplers and its data set; a shared one comes more than once."""
    if isinstance(getattr(batches, "generator", None), torch.Generator):
        yield batches.generator
    for name in ("sampler", "batch_sampler", "dataset"):
        if getattr(batches, name, None) is not None:
            yield from _generators(getattr(batches, name))


def _train_mode(model: nn.Module) -> None:
    """Training mode, but for frozen batch norms: what a frozen layer computes shall not change."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            module.train(module.training and any(p.requires_grad for p in module.parameters()))


def _check_finite(value: float, where: str) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(f"{where}: loss {value}. Lower the learning rate, or set clip_norm=1.0")


def _check_batches(**named: Batches) -> None:
    for name, batches in named.items():
        if len(batches) == 0:
            raise ValueError(f"{name} is empty: pass at least one batch (drop_last may have dropped it)")
