"""Bit schedules: where stages begin, that both loops see the same widths, and that a resumed run is the same run."""

import math
from itertools import groupby, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from transformers import Trainer, TrainingArguments

from qft_utils import schedules
from qft_utils.qat import prepare, set_bits
from qft_utils.qat.inspect import training_layers
from qft_utils.schedules import (
    BitSchedule,
    BitScheduleCallback,
    BitStepper,
    Stage,
    Together,
    direct,
    falling,
    rising,
    staged,
)
from qft_utils.training import fit

pytestmark = pytest.mark.usefixtures("one_thread")


class Tiny(nn.Module):
    """Two Linears; with labels it gives the loss too, as the Trainer wants it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x, labels=None):
        logits = self.last(self.first(x).relu())
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def tiny(**kwargs):
    torch.manual_seed(0)
    return prepare(Tiny(), **kwargs)


def examples(count=32):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
    return x, x[:, :3].argmax(1)


def batches(size=4):
    return list(zip(*(t.split(size) for t in examples()), strict=True))


def widths(model):
    """(bits of the weight, bits of the input) of each layer."""
    return [(m.weight_quantizer.bits, m.input_quantizer.bits) for m in training_layers(model).values()]


def record(model):
    """What `widths` says at each pass in training mode, in a list that grows."""
    seen = []
    model.register_forward_pre_hook(lambda module, _: seen.append(widths(module)) if module.training else None)
    return seen


# Stages


@given(st.integers(1, 7), st.integers(7, 10_000))
def test_equal_stages_start_at_their_share_of_the_steps(count, steps):
    bits = list(range(8, 8 - count, -1))
    schedule = falling(bits, steps)
    starts = [round(i * steps / count) for i in range(count)]
    assert schedule.stages == tuple(Stage(start, b) for start, b in zip(starts, bits, strict=True))
    assert schedule.steps == steps
    assert rising(bits[::-1], steps).stages == tuple(map(Stage, starts, bits[::-1]))


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=7), st.integers(1000, 9999))
def test_each_step_has_one_width_for_as_long_as_its_share(shares, steps):
    schedule = rising(range(2, 2 + len(shares)), steps, shares=shares)
    lengths = [(bits, len(list(run))) for bits, run in groupby(schedule.at(k).weight_bits for k in range(steps))]
    assert [bits for bits, _ in lengths] == list(range(2, 2 + len(shares)))
    expected = np.array(shares) * steps / math.fsum(shares)
    assert np.abs(np.array([length for _, length in lengths]) - expected).max() <= 1 + 1e-9


@given(st.integers(1, 1000), st.data())
def test_custom_stages_hold_from_their_start_to_the_next(steps, data):
    starts = sorted({0, *data.draw(st.lists(st.integers(0, steps - 1), max_size=6))})
    stages = [(start, *data.draw(st.tuples(st.integers(2, 8), st.integers(2, 8)))) for start in starts]
    schedule = BitSchedule(stages, steps)
    for stage, after in pairwise([*stages, (steps, 0, 0)]):
        assert schedule.at(stage[0]) == schedule.at(after[0] - 1) == stage
    assert schedule.at(10 * steps) == stages[-1]
    with pytest.raises(ValueError, match="step=-1"):
        schedule.at(-1)


def test_shares_need_not_sum_to_one_and_inputs_have_stages_too():
    assert staged([4, 8, 4], 10, shares=[1, 1, 3]).stages == ((0, 4, None), (2, 8, None), (4, 4, None))
    assert falling([8, 2], 100, shares=[0.29, 0.71], act_bits=[8, 4]).stages == ((0, 8, 8), (29, 2, 4))
    assert direct(2, 7).stages == ((0, 2, None),)
    assert direct(2, 7, act_bits=4).at(6) == (0, 2, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rising([4, 8, 6], 10), r"\[4, 8, 6\] do not rise"),
        (lambda: rising([4, 4], 10), "do not rise"),
        (lambda: falling([8, 8], 10), r"\[8, 8\] do not fall"),
        (lambda: falling([9, 2], 10), "got 9"),
        (lambda: direct(4, 10, act_bits=0), "got 0"),
        (lambda: direct(4, 0), "step 0 of steps=0: raise steps"),
        (lambda: rising([2, 3, 4], 2), r"\[0, 1, 1\]: .* so give more steps"),
        (lambda: rising([], 9), "0 weight_bits"),
        (lambda: rising([2, 4], 9, shares=[1]), "2 weight_bits, 1 shares"),
        (lambda: rising([2, 4], 9, act_bits=[8]), "2 shares, 1 act_bits"),
        (lambda: rising([2, 4], 9, shares=[1, 0]), r"shares=\[1, 0\]"),
        (lambda: rising([2, 4], 9, shares=[math.nan, 1]), "greater than 0"),
        (lambda: BitSchedule([], 9), "first must start at step 0"),
        (lambda: BitSchedule([(1, 4)], 9), r"\[1\]: the first must start at step 0"),
        (lambda: BitSchedule([(0, 4), (5, 6), (5, 8)], 9), "integers that increase"),
        (lambda: BitSchedule([(0, 4), (2.5, 6)], 9), "integers that increase"),
        (lambda: BitSchedule([(0, 4), (9, 6)], 9), "step 9 of steps=9: raise steps"),
        (lambda: BitSchedule([(0, 4, 8), (5, 6)], 9), r"act_bits=\[8, None\]: give one to every stage"),
        (lambda: BitSchedule([(0, 4, 0), (5, 6)], 9), r"act_bits=\[0, None\]"),
    ],
)
def test_impossible_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# In a loop


@pytest.mark.parametrize("only", [None, ["last"]])
def test_the_widths_are_set_when_a_stage_begins_and_not_again(monkeypatch, only):
    calls, model = [], tiny()
    monkeypatch.setattr(schedules, "set_bits", lambda *a, **k: calls.append(a[1:]) or set_bits(*a, **k))
    stepper = BitStepper(model, falling([6, 4, 3], 9, act_bits=[8, 6, 6]), only=only)
    seen = [widths(model)]
    for _ in range(12):
        stepper.step()
        seen.append(widths(model))
    last = [(6, 8)] * 3 + [(4, 6)] * 3 + [(3, 6)] * 7
    assert seen == [[(8, 8) if only else pair, pair] for pair in last]
    assert calls == [(6, 8), (4, 6), (3, 6)]


def test_unknown_layers_and_unprepared_models_are_refused():
    with pytest.raises(ValueError, match="head"):
        BitStepper(tiny(), direct(4, 9), only=["head"])
    with pytest.raises(ValueError, match="not prepared"):
        BitStepper(Tiny(), direct(4, 9))


SCHEDULE = BitSchedule([(0, 8, 8), (3, 5, 8), (8, 3, 4), (20, 2, 4)], 24)  # the third with an epoch of 8 steps


def run(model, checkpoint=None, *, until=24, bits=SCHEDULE):
    """Three epochs of 8 steps; the loss fails after `until` steps."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    rate, calls = OneCycleLR(optimizer, 0.1, total_steps=24), []

    def loss(logits, targets):
        calls.append(model.training)
        if sum(calls) > until:
            raise KeyboardInterrupt
        return F.cross_entropy(logits, targets)

    schedule = Together(rate, BitStepper(model, bits))
    settings = {"optimizer": optimizer, "epochs": 3, "loss": loss, "schedule": schedule, "checkpoint": checkpoint}
    return fit(model, batches(), batches(), **settings), rate.get_last_lr()


def trainer(model, folder, accumulate=1, **kwargs):
    x, labels = examples(32 * accumulate)
    data = [{"x": a, "labels": b} for a, b in zip(x, labels, strict=True)]
    arguments = TrainingArguments(
        str(folder), max_steps=24, per_device_train_batch_size=4, gradient_accumulation_steps=accumulate, save_steps=12,
        learning_rate=0.05, report_to=[], disable_tqdm=True, use_cpu=True, **kwargs)  # fmt: skip
    return Trainer(model, arguments, train_dataset=data, callbacks=[BitScheduleCallback(SCHEDULE)])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_both_loops_train_each_step_with_the_same_widths(tmp_path, accumulate):
    expected = [[SCHEDULE.at(k)[1:]] * 2 for k in range(24)]
    ours, theirs = tiny(), tiny()
    in_ours, in_theirs = record(ours), record(theirs)
    run(ours)
    trainer(theirs, tmp_path, accumulate, save_strategy="no").train()
    assert in_ours == expected
    assert in_theirs == [pairs for pairs in expected for _ in range(accumulate)]
    assert widths(ours) == widths(theirs) == [(2, 4)] * 2


def equal_state(model, other):
    pairs = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == same and torch.equal(t, u) for (name, t), (same, u) in pairs)


@pytest.mark.parametrize("learned_step", [False, True])
@pytest.mark.parametrize("until", [9, 16, 22])
def test_a_run_that_was_interrupted_ends_to_the_bit_as_the_other(tmp_path, learned_step, until):
    whole, killed, resumed = (tiny(learned_step=learned_step) for _ in range(3))
    expected = run(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(killed, tmp_path / "part", until=until)
    seen = record(resumed)
    found = run(resumed, tmp_path / "part")
    first = until // 8 * 8
    assert seen == [[SCHEDULE.at(k)[1:]] * 2 for k in range(first, 24)]
    for column in ("train_loss", "validation_loss"):
        assert getattr(found[0], column) == getattr(expected[0], column)
    assert found[1] == expected[1] and widths(resumed) == widths(whole) and equal_state(resumed, whole)
    last, other = (torch.load(tmp_path / name)["parts"][0] for name in ("whole", "part"))
    assert all(torch.equal(last[name], other[name]) for name in last)
    with pytest.raises(ValueError, match="stages is"):
        run(tiny(learned_step=learned_step), tmp_path / "part", bits=direct(4, 24))


@pytest.mark.parametrize("learned_step", [False, True])
def test_a_trainer_resumes_with_the_widths_of_its_step(tmp_path, learned_step):
    whole, resumed = (tiny(learned_step=learned_step) for _ in range(2))
    trainer(whole, tmp_path).train()
    assert (tmp_path / "checkpoint-12").is_dir()
    seen = record(resumed)
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert seen == [[SCHEDULE.at(k)[1:]] * 2 for k in range(12, 24)]
    assert widths(resumed) == widths(whole) and equal_state(resumed, whole)


def test_together_refuses_the_state_of_others():
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rate, stepper = OneCycleLR(optimizer, 0.1, total_steps=24), BitStepper(model, SCHEDULE)
    with pytest.raises(ValueError, match=r"\['OneCycleLR', 'BitStepper'\], not of \['BitStepper'\]"):
        Together(stepper).load_state_dict(Together(rate, stepper).state_dict())
    with pytest.raises(ValueError, match=r"only is \['last'\] in the state and None here"):
        stepper.load_state_dict(BitStepper(tiny(), SCHEDULE, only=["last"]).state_dict())


@pytest.mark.parametrize("granularity", ["channel", 2])
def test_learned_steps_start_anew_where_the_width_changes_and_only_there(granularity):
    model = tiny(learned_step=True, granularity=granularity)
    layers = training_layers(model)
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.mul_(3)
            layer.weight_quantizer.step.mul_(1.1)
    kept, inputs = (layers["first"].weight_quantizer.step.clone(), layers["last"].input_quantizer.step.clone())
    BitStepper(model, direct(2, 9), only=["last"])
    start = layers["last"].weight.detach().unflatten(1, (-1, 2) if granularity == 2 else (1, -1)).abs().mean(-1) * 2
    assert torch.allclose(layers["last"].weight_quantizer.step.flatten(), start.flatten())  # sqrt(qmax) is 1
    assert torch.equal(layers["first"].weight_quantizer.step, kept)
    assert torch.equal(layers["last"].input_quantizer.step, inputs)
    with torch.no_grad():
        layers["last"].weight_quantizer.step.mul_(1.1)
    BitStepper(model, direct(2, 9), only=["last"])  # the width it has
    assert torch.allclose(layers["last"].weight_quantizer.step.flatten(), 1.1 * start.flatten())
