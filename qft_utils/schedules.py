"""Widths that change while a prepared model trains: rising, falling, or any stages.

    bits = falling([8, 4, 3, 2], steps=epochs * len(train_batches))
    rate = OneCycleLR(optimizer, 1e-3, total_steps=bits.steps)
    fit(model, ..., schedule=Together(rate, BitStepper(model, bits)))       # the book's loop
    Trainer(model=model, ..., callbacks=[BitScheduleCallback(bits)])        # transformers

A step is one step of the optimizer, counted from 0; both loops train step k with the widths `bits.at(k)`. A width
changes right after the step before, so what is measured between two stages is measured at the new width. There the
learned steps of the weights start anew, as LSQ starts them (Esser et al. 2020): a range that is right for eight bits is
so wide for two that every weight would round to zero. Those of inputs keep their range.

The widths are not in a model's state dict. A loop that ends with its best weights (`fit`, or the Trainer with
load_best_model_at_end) may end with those of another stage, under the last stage's widths: with a learned step, which
belongs to one width, even its grid is wrong then. Take the last weights, or train the last stage on its own.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qft_utils.qat import set_bits
from qft_utils.qat.inspect import training_layers
from qft_utils.qat.layers import TrainingLayer
from qft_utils.qat.quantizers import LearnedWeightQuantizer, check_bits


class Stage(NamedTuple):
    """The widths from the step `start` on; act_bits=None leaves the inputs' width as it is."""

    start: int
    weight_bits: int
    act_bits: int | None = None


@dataclass(frozen=True)
class BitSchedule:
    """A training of `steps` steps in stages: BitSchedule([(0, 4), (100, 6)], 300), or [(0, 4, 8), ...] for inputs too.

    Raises ValueError for widths outside 2..8, inputs' widths in some stages only, a first stage that does not start
    at 0, starts that are no integers or do not increase, or a stage that starts after the last step.
    """

    stages: Sequence[Stage | tuple[int, ...]]
    steps: int

    def __post_init__(self) -> None:
        stages = tuple(Stage(*stage) for stage in self.stages)
        object.__setattr__(self, "stages", stages)  # the class is frozen
        starts, inputs = [stage.start for stage in stages], [stage.act_bits for stage in stages]
        if starts[:1] != [0]:
            raise ValueError(f"stages start at {starts}: the first must start at step 0")
        if any(type(late) is not int or late <= early for early, late in pairwise(starts)):
            raise ValueError(f"stages start at {starts}: these must be integers that increase, so give more steps")
        if starts[-1] >= self.steps:
            raise ValueError(f"a stage starts at step {starts[-1]} of steps={self.steps}: raise steps, or drop it")
        if None in inputs and any(bits is not None for bits in inputs):
            raise ValueError(f"act_bits={inputs}: give one to every stage, or to none")
        for bits in [stage.weight_bits for stage in stages] + [bits for bits in inputs if bits is not None]:
            check_bits(bits)

    def at(self, step: int) -> Stage:
        """The stage that `step` belongs to; after the end, the last one. Raises ValueError for a negative step."""
        if step < 0:
            raise ValueError(f"step={step}: steps are counted from 0")
        return next(stage for stage in reversed(self.stages) if stage.start <= step)


def rising(
    weight_bits: Sequence[int],
    steps: int,
    *,
    shares: Sequence[float] | None = None,
    act_bits: Sequence[int] | None = None,
) -> BitSchedule:
    """From few bits to many; shares, act_bits: see `staged`. Raises ValueError for bits that do not rise."""
    if any(late <= early for early, late in pairwise(weight_bits)):
        raise ValueError(f"weight_bits={list(weight_bits)} do not rise: sort them, or use staged()")
    return staged(weight_bits, steps, shares=shares, act_bits=act_bits)


def falling(
    weight_bits: Sequence[int],
    steps: int,
    *,
    shares: Sequence[float] | None = None,
    act_bits: Sequence[int] | None = None,
) -> BitSchedule:
    """From many bits to few; shares, act_bits: see `staged`. Raises ValueError for bits that do not fall."""
    if any(late >= early for early, late in pairwise(weight_bits)):
        raise ValueError(f"weight_bits={list(weight_bits)} do not fall: sort them, or use staged()")
    return staged(weight_bits, steps, shares=shares, act_bits=act_bits)


def direct(weight_bits: int, steps: int, *, act_bits: int | None = None) -> BitSchedule:
    """One width throughout: what the others are compared with."""
    return BitSchedule([Stage(0, weight_bits, act_bits)], steps)


def staged(
    weight_bits: Sequence[int],
    steps: int,
    *,
    shares: Sequence[float] | None = None,
    act_bits: Sequence[int] | None = None,
) -> BitSchedule:
    """One stage for each of weight_bits, and of act_bits if there are any.

    shares: relative lengths of the stages, None for equal ones. Stage i starts at round(steps * what the shares
    before it are of all). Raises ValueError for numbers of values that differ, and what BitSchedule raises it for.
    """
    shares = [1] * len(weight_bits) if shares is None else shares
    act_bits = [None] * len(weight_bits) if act_bits is None else act_bits
    if not len(weight_bits) == len(shares) == len(act_bits) > 0:
        got = f"{len(weight_bits)} weight_bits, {len(shares)} shares, {len(act_bits)} act_bits"
        raise ValueError(f"every stage takes one of each, and there must be one: got {got}")
    if not all(share > 0 for share in shares):
        raise ValueError(f"shares={list(shares)}: each must be greater than 0")
    starts = [round(steps * before / sum(shares)) for before in accumulate(shares[:-1], initial=0)]
    return BitSchedule([Stage(*stage) for stage in zip(starts, weight_bits, act_bits, strict=True)], steps)


def _begin_step(model: nn.Module, schedule: BitSchedule, step: int, only: Sequence[str] | None) -> None:
    """Set the widths if `step` is the first of a stage."""
    stage = schedule.at(step)
    if stage.start == step:
        before = {name: layer.weight_quantizer.bits for name, layer in training_layers(model).items()}
        set_bits(model, stage.weight_bits, stage.act_bits, only=only)
        _restart(layer for name, layer in training_layers(model).items() if layer.weight_quantizer.bits != before[name])


@torch.no_grad()
def _restart(layers: Iterable[TrainingLayer]) -> None:
    """Let learned steps start from the weights as they are now."""
    for layer in layers:
        quantizer = layer.weight_quantizer
        if isinstance(quantizer, LearnedWeightQuantizer):
            start = quantizer.bits, quantizer.granularity, layer.weight, layer.factor_of_grid()
            quantizer.step.copy_(LearnedWeightQuantizer(*start).step)


def _go_on(model: nn.Module, schedule: BitSchedule, step: int, only: Sequence[str] | None) -> None:
    """Set the widths of `step` in a model whose state was loaded, learned steps and all."""
    stage, state = schedule.at(step), copy.deepcopy(model.state_dict())
    set_bits(model, stage.weight_bits, stage.act_bits, only=only)
    model.load_state_dict(state)


class BitStepper:
    """Sets the widths of a prepared model: those of the first stage at once, the others step by step.

    only: names of the layers whose widths change, None for all. The others keep theirs.
    """

    def __init__(self, model: nn.Module, schedule: BitSchedule, *, only: Sequence[str] | None = None) -> None:
        self.model, self.schedule, self.only, self.done = model, schedule, only, 0
        _begin_step(model, schedule, 0, only)

    def step(self) -> None:
        """To be called after each step of the optimizer."""
        self.done += 1
        _begin_step(self.model, self.schedule, self.done, self.only)

    def state_dict(self) -> dict[str, Any]:
        stages, only = [list(stage) for stage in self.schedule.stages], self.only and list(self.only)
        return {"done": self.done, "stages": stages, "steps": self.schedule.steps, "only": only}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. The model's own state must be that of the same moment, learned steps and all.

        Raises ValueError for the state of another schedule or other layers.
        """
        for name, here in self.state_dict().items():
            if name != "done" and state[name] != here:
                raise ValueError(f"{name} is {state[name]} in the state and {here} here: make the same BitStepper")
        self.done = state["done"]
        _go_on(self.model, self.schedule, self.done, self.only)


class Together:
    """Several schedules as one, for example Together(learning_rate_schedule, bit_stepper)."""

    def __init__(self, *schedules: Any) -> None:
        self.schedules = schedules

    def step(self) -> None:
        for schedule in self.schedules:
            schedule.step()

    def state_dict(self) -> dict[str, Any]:
        kinds = [type(schedule).__name__ for schedule in self.schedules]
        return {"kinds": kinds, "states": [schedule.state_dict() for schedule in self.schedules]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for the state of schedules of other kinds, or in another order."""
        kinds = self.state_dict()["kinds"]
        if state["kinds"] != kinds:
            raise ValueError(f"the state is of {state['kinds']}, not of {kinds}: pass the same schedules")
        for schedule, its in zip(self.schedules, state["states"], strict=True):
            schedule.load_state_dict(its)


class BitScheduleCallback(TrainerCallback):
    """Does in transformers' Trainer what BitStepper does in the book's loop, also with resume_from_checkpoint."""

    def __init__(self, schedule: BitSchedule, *, only: Sequence[str] | None = None) -> None:
        self.schedule, self.only = schedule, only

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        begin = _go_on if state.global_step else _begin_step
        begin(model, self.schedule, state.global_step, self.only)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        _begin_step(model, self.schedule, state.global_step, self.only)
