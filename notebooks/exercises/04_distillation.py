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
# ---

# %% [markdown]
# # Exercises: incremental bits and distillation
#
# You plan a fair schedule of widths, write the distillation loss and one step with a teacher, match hidden states without their padding, and
# spend a budget of bytes layer by layer. Last, you decide what to ship. Plan about ninety minutes. Under each exercise a test cell tells you what
# is wrong; run it as often as you like. There are 23 points in all, the last 4 of them graded by hand.

# %% nbgrader={"grade": false, "grade_id": "setup", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "code"}
import copy
import itertools
import math
import os

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qft_utils import allocation

# %% [markdown] nbgrader={"grade": false, "grade_id": "e1_schedule_text", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "markdown"}
# ## 1. Falling bits, equal steps (2 points)
#
# A falling schedule trains at eight bits, then at six, at four, at two. To compare it with two bits from the first step on, both must take
# the *same number of steps in all*. So the stages share the steps.
#
# Write down the width of each step. All stages have the same whole number of steps, as many as fit. What is left over goes to the last width,
# the one in which the network has to live. Before you run the test: of ten steps and the widths 8, 6, 4, 2, how many are taken at two bits?

# %% nbgrader={"grade": false, "grade_id": "e1_schedule", "locked": false, "points": 0, "schema_version": 3, "solution": true, "task": false, "cell_type": "code"}
def width_of_each_step(widths: list[int], steps: int) -> list[int]:
    """The width in bits of step 0, 1, ..., steps - 1: a list of length `steps`.

    widths: one for each stage, in the order of training.
    steps: of all stages together; at least as many as there are stages.
    """
    ### BEGIN SOLUTION
    length = steps // len(widths)
    # No stage starts after the last one, so it takes the remainder.
    return [widths[min(step // length, len(widths) - 1)] for step in range(steps)]
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "e1_schedule_test", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false, "cell_type": "code"}
_got = list(width_of_each_step([8, 6, 4, 2], 10))
assert len(_got) <= 10, f"the schedule has {len(_got)} steps instead of 10: all stages together share the steps, or the rival gets too few"
assert len(_got) >= 10, f"the schedule has {len(_got)} steps instead of 10: the steps that are left over belong to the last width"
assert _got[0] == 8, f"training begins at {_got[0]} bits: take the widths in the order in which they are given"
assert _got == sorted(_got, reverse=True), f"{_got}: the widths go down and up again; finish one stage before you begin the next"
assert _got.count(8) == 2, f"{_got.count(8)} steps at 8 bits: 10 steps and 4 stages make 2 whole steps each; round down, and leave the rest to the last stage"
assert _got == [8, 8, 6, 6, 4, 4, 2, 2, 2, 2], f"two steps each, and the two that are left over at 2 bits: yours is {_got}"
assert list(width_of_each_step([2, 3, 4], 6)) == [2, 2, 3, 3, 4, 4], "rising widths are a schedule, too: do not sort them"
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(int(os.environ.get("QFT_SEED", "2026")))
for _ in range(20):
    _count = int(torch.randint(1, 6, (), generator=_generator))
    _widths = (torch.randperm(7, generator=_generator)[:_count] + 2).tolist()
    _steps = int(torch.randint(_count, 60, (), generator=_generator))
    _want = [width for width in _widths[:-1] for _ in range(_steps // _count)]
    _want += [_widths[-1]] * (_steps - len(_want))
    assert list(width_of_each_step(list(_widths), _steps)) == _want, f"widths {_widths} in {_steps} steps: expected {_want}"
### END HIDDEN TESTS

# %% [markdown] nbgrader={"grade": false, "grade_id": "e2_loss_text", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "markdown"}
# ## 2. What the student learns from (4 points)
#
# The distillation loss compares two softened distributions, and the student's answer with the label:
#
# $$\alpha\, T^2\, \mathrm{KL}\big(p^{\text{teacher}}_T \,\|\, p^{\text{student}}_T\big) + (1-\alpha)\, \mathrm{CE}(\text{labels}, p^{\text{student}}_1),
# \qquad p_T = \mathrm{softmax}(\text{logits}/T), \qquad \mathrm{KL}(p \,\|\, q) = \sum_c p_c \log \frac{p_c}{q_c}.$$
#
# Both terms are means over the examples. You may write the sum out, or use `F.kl_div`; if you do, read its documentation slowly. Its arguments
# come in an order that surprises many, and so does what its `reduction` means. The test works with a teacher that says three to one and a student that cannot tell, so that you
# can check every number on paper.

# %% nbgrader={"grade": false, "grade_id": "e2_loss", "locked": false, "points": 0, "schema_version": 3, "solution": true, "task": false, "cell_type": "code"}
def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, alpha: float) -> Tensor:
    """The loss above, of shape ().

    student_logits, teacher_logits: (N, C), float32 or float64. labels: (N,), int64 classes.
    alpha: the weight of the teacher, from 0 to 1.
    """
    ### BEGIN SOLUTION
    log_q = F.log_softmax(student_logits / temperature, dim=-1)  # N, C
    log_p = F.log_softmax(teacher_logits / temperature, dim=-1)  # N, C
    # F.kl_div(log_q, log_p) is KL(p || q); "batchmean" divides by N, "mean" would divide by N * C.
    soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return alpha * temperature**2 * soft + (1 - alpha) * F.cross_entropy(student_logits, labels)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "e2_loss_test", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false, "cell_type": "code"}
_labels = torch.tensor([0, 0, 0])
_even, _three_to_one = torch.zeros(3, 2), torch.tensor([[math.log(3), 0.0]] * 3)  # probabilities 1/2, 1/2 and 3/4, 1/4
_kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
_reversed = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)


def _close(a, b):
    return abs(float(a) - float(b)) < 1e-5 * max(1, abs(float(b)))


_soft = distillation_loss(_even, _three_to_one, _labels, temperature=1.0, alpha=1.0)
assert _soft.shape == (), f"the loss has shape {tuple(_soft.shape)}: take the sum over classes and the mean over examples"
assert not _close(_soft, math.log(2)), "alpha=1 gives you the cross-entropy: alpha is the weight of the teacher, 1 - alpha that of the labels"
assert not _close(_soft, _reversed), "this is KL(student || teacher): the teacher's probabilities weigh the logarithms. F.kl_div takes the student's logarithms first"
assert not _close(_soft, _kl / 2), "your soft term is divided by the number of classes as well: reduction='mean' does that; use 'batchmean'"
assert not _close(_soft, _kl * 3), "your soft term is a sum over the examples: divide by their number, or the loss grows with the batch"
assert _close(_soft, _kl), f"with T=1 and alpha=1 the loss is 3/4 log(3/2) + 1/4 log(1/2) = {_kl:.4f}; yours is {float(_soft):.4f}"

_soft = distillation_loss(_even, 2 * _three_to_one, _labels, temperature=2.0, alpha=1.0)  # T=2 makes it three to one again
assert not _close(_soft, _kl), "T^2 is missing: without it the teacher's gradient fades as T grows, and alpha means something else at each T"
assert not _close(_soft, 2 * _kl), "you multiply by T: the gradient shrinks by T twice over, so the factor is T^2"
assert _close(_soft, 4 * _kl), f"at T=2 this teacher is softened to three to one: the loss is 4 KL = {4 * _kl:.4f}; yours is {float(_soft):.4f}"

_hard = distillation_loss(_three_to_one, _even, _labels, temperature=2.0, alpha=0.0)
_softened = math.log(1 + 3**-0.5)
assert not _close(_hard, _softened), "you soften the student for the labels, too: the cross-entropy takes its logits as they are, T is for the teacher's term"
assert _close(_hard, math.log(4 / 3)), f"with alpha=0 the loss is the cross-entropy, log(4/3) = {math.log(4 / 3):.4f} here; yours is {float(_hard):.4f}"
_mixed = distillation_loss(_even, _three_to_one, _labels, temperature=1.0, alpha=0.25)
assert _close(_mixed, 0.25 * _kl + 0.75 * math.log(2)), "alpha=0.25 takes a quarter of the teacher's term and three quarters of the cross-entropy"
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(int(os.environ.get("QFT_SEED", "2026")))
for _ in range(10):
    _n, _c = (int(torch.randint(2, 12, (), generator=_generator)) for _ in range(2))
    _s, _t = (torch.randn(_n, _c, generator=_generator, dtype=torch.float64) * 2 for _ in range(2))
    _y = torch.randint(_c, (_n,), generator=_generator)
    _temperature, _alpha = (1 + 4 * torch.rand((), generator=_generator)).item(), torch.rand((), generator=_generator).item()
    _log_q, _log_p = (F.log_softmax(z / _temperature, -1) for z in (_s, _t))
    _want = _alpha * _temperature**2 * F.kl_div(_log_q, _log_p, reduction="none", log_target=True).sum() / _n + (1 - _alpha) * F.cross_entropy(_s, _y)
    _loss = distillation_loss(_s, _t, _y, temperature=_temperature, alpha=_alpha)
    assert _close(_loss, _want), f"{_n} examples, {_c} classes, T={_temperature:.2f}, alpha={_alpha:.2f}: {float(_loss):.5f} instead of {float(_want):.5f}"
    assert _close(distillation_loss(_s, _s.clone(), _y, temperature=_temperature, alpha=1.0), 0), "a student that says what its teacher says has a soft term of 0"
    _z = _s.clone().requires_grad_()
    _grad = torch.autograd.grad(distillation_loss(_z, _t, _y, temperature=1e3, alpha=1.0), _z)[0] * _n
    _limit = ((_s - _s.mean(-1, keepdim=True)) - (_t - _t.mean(-1, keepdim=True))) / _c
    assert torch.allclose(_grad, _limit, atol=0.02), "at a high temperature the student's gradient should be the difference of centred logits over C"
### END HIDDEN TESTS

# %% [markdown] nbgrader={"grade": false, "grade_id": "e3_step_text", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "markdown"}
# ## 3. One step with a teacher (4 points)
#
# At a high temperature distillation only matches logits. So take the mean squared error of the two models' logits as the loss, and write one
# step of training. It is short, and there are four ways to get it wrong without a crash:
#
# - the teacher answers in evaluation mode: no dropout, and no batch statistics that drift;
# - the student learns in training mode;
# - the student gets gradients, the teacher none;
# - the gradients of the step before do not count.
#
# Do not trust the modes in which the models come. The test hands you a teacher in training mode and a student in evaluation mode, as they are after somebody
# has trained the one and tested the other.

# %% nbgrader={"grade": false, "grade_id": "e3_step", "locked": false, "points": 0, "schema_version": 3, "solution": true, "task": false, "cell_type": "code"}
def distillation_step(student: nn.Module, teacher: nn.Module, inputs: Tensor, optimizer: torch.optim.Optimizer) -> float:
    """One step of the student towards the teacher; returns the loss before the step.

    student, teacher: (N, D) -> logits (N, C), in any mode. inputs: (N, D).
    optimizer: holds the student's parameters. The loss is the mean squared error over all N * C logits.
    """
    ### BEGIN SOLUTION
    student.train()
    teacher.eval()
    with torch.no_grad():  # also saves the memory of the teacher's graph
        wanted = teacher(inputs)
    loss = F.mse_loss(student(inputs), wanted)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "e3_step_test", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false, "cell_type": "code"}
class _Recorder(nn.Identity):
    """Passes its input on and notes the mode in which it does."""

    def __init__(self):
        super().__init__()
        self.modes = []

    def forward(self, x):
        self.modes.append("training" if self.training else "evaluation")
        return x


def _drawn(model, generator):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def _step(student, *others):
    try:
        return float(distillation_step(student, *others))
    except RuntimeError as error:
        assert "does not require grad" not in str(error), "backward finds no graph: only the teacher belongs under torch.no_grad(), the student runs outside"
        raise


_generator = torch.Generator().manual_seed(0)
_student = _drawn(nn.Sequential(_Recorder(), nn.Linear(5, 3, bias=False)), _generator).eval()
_teacher = _drawn(nn.Sequential(_Recorder(), nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)), _generator).train()
_x, _before = torch.randn(12, 5, generator=_generator), _student[1].weight.detach().clone()
_target = copy.deepcopy(_teacher).eval()(_x).detach()
_optimizer = torch.optim.SGD(_student.parameters(), lr=0.1)
_loss = _step(_student, _teacher, _x, _optimizer)
assert _teacher[0].modes, "the teacher was not asked: call it on the inputs"
assert set(_teacher[0].modes) == {"evaluation"}, "the teacher answers in training mode: its dropout makes the targets random and its batch norm drifts; call teacher.eval()"
assert set(_student[0].modes) == {"training"}, "the student learns in evaluation mode: call student.train() before its forward pass"
assert not torch.equal(_student[1].weight, _before), "the student has not moved: its logits must keep their graph, and the optimizer must step after backward"
assert all(p.grad is None for p in _teacher.parameters()), "the teacher has gradients: run it under torch.no_grad(), or detach its logits"


def _by_hand(weight):
    """Loss and weight after one step of a linear student, from the closed form of the gradient."""
    error = _x @ weight.T - _target  # N, C
    return error.square().mean().item(), weight - 0.1 * 2 / error.numel() * error.T @ _x


_want, _after = _by_hand(_before)
assert abs(_loss - _want) < 1e-4 * _want, f"the mean squared error before the step is {_want:.4f}; you return {_loss:.4f}"
assert torch.allclose(_student[1].weight, _after, atol=1e-5), "the first step is not the gradient of the mean squared error times the learning rate: step once for each call"
_step(_student, _teacher, _x, _optimizer)
assert torch.allclose(_student[1].weight, _by_hand(_after)[1], atol=1e-5), "the second step still carries the gradient of the first: call optimizer.zero_grad()"
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(int(os.environ.get("QFT_SEED", "2026")))
for _ in range(3):
    _n, _d, _c = (int(torch.randint(4, 16, (), generator=_generator)) for _ in range(3))
    _student = _drawn(nn.Sequential(nn.Linear(_d, 6), nn.Tanh(), _Recorder(), nn.Linear(6, _c)), _generator).eval()
    _teacher = _drawn(nn.Sequential(nn.Linear(_d, 9), nn.BatchNorm1d(9), nn.Dropout(0.3), _Recorder(), nn.Linear(9, _c)), _generator).train()
    _twin, _state = copy.deepcopy(_student), copy.deepcopy(_teacher.state_dict())
    _optimizer, _other = (torch.optim.AdamW(m.parameters(), lr=0.02) for m in (_student, _twin))
    for _ in range(4):
        _x = torch.randn(_n, _d, generator=_generator)
        _student.eval()
        _teacher.train()
        _loss = _step(_student, _teacher, _x, _optimizer)
        _expected = (_twin(_x) - copy.deepcopy(_teacher).eval()(_x).detach()).square().mean()
        _other.zero_grad()
        _expected.backward()
        _other.step()
        assert abs(_loss - _expected.item()) < 1e-4 * max(1, _expected.item()), "in a longer training the returned loss is not the mean squared error before the step"
    assert set(_teacher[3].modes) == {"evaluation"}, "the teacher must be in evaluation mode in every step"
    assert set(_student[2].modes) == {"training"}, "the student must be in training mode in every step"
    assert all(torch.equal(_state[name], value) for name, value in _teacher.state_dict().items()), "the teacher has changed: neither its weights nor its statistics may move"
    assert all(p.grad is None for p in _teacher.parameters()), "the teacher has gradients"
    for _a, _b in zip(_student.parameters(), _twin.parameters(), strict=True):
        assert torch.allclose(_a, _b, atol=1e-3), "after four steps of AdamW the student is not where it should be: one backward and one step for each call"
### END HIDDEN TESTS

# %% [markdown] nbgrader={"grade": false, "grade_id": "e4_hidden_text", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "markdown"}
# ## 4. Hidden states, without the padding (3 points)
#
# A student can also copy what its teacher thinks on the way: the hidden states of a layer. Sentences of a batch differ in length, so the short ones are
# padded. What stands at the padding means nothing, and nobody shall learn it.
#
# Write the mean squared error over the *real tokens* of the whole batch, and over the width. Every real token counts the same, whether its sentence
# is long or short. The mask comes as a tokenizer makes it: integers, 1 for a token and 0 for padding.

# %% nbgrader={"grade": false, "grade_id": "e4_hidden", "locked": false, "points": 0, "schema_version": 3, "solution": true, "task": false, "cell_type": "code"}
def hidden_loss(student_hidden: Tensor, teacher_hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over real tokens and width, of shape ().

    student_hidden, teacher_hidden: (N, L, D), floating. mask: (N, L), int64, with at least one 1.
    """
    ### BEGIN SOLUTION
    kept = mask.bool()  # an integer mask would pick rows by their number
    return F.mse_loss(student_hidden[kept], teacher_hidden[kept])  # M, D each, for M real tokens
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "e4_hidden_test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false, "cell_type": "code"}
# Two sentences, of three tokens and of one. The student is off by 1 in the first, by 3 in the second, and by 10 at the padding.
_mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
_off = torch.tensor([[1.0, 1.0, 1.0], [3.0, 10.0, 10.0]])[:, :, None].expand(2, 3, 2)
_teacher = torch.full((2, 3, 2), 0.5)
_got = hidden_loss(_teacher + _off, _teacher, _mask)
assert _got.shape == (), f"the loss has shape {tuple(_got.shape)}: take one mean over all real tokens and the width"
_got = float(_got)
_mistakes = {
    (3 + 9 + 200) / 6: "the padding is in your mean: leave out the positions where the mask is 0",
    12 / 6: "you divide by all positions, padding and all: masked errors are 0, but they still count. Divide by the number of real tokens",
    24 / 4: "you divide by the number of tokens alone: the mean is over the width, too, so divide by tokens times width",
    (1 + 9) / 2: "you average within each sentence first: then one token of a short sentence weighs more. Take one mean over all real tokens",
    100.0: "you keep the padding and drop the tokens: the mask is 1 at a token",
    (4 * (9 + 200) / 3 + 2) / 6: "a mask of integers picks rows by their number: turn it into bool before you index with it",
}
for _value, _message in _mistakes.items():
    assert abs(_got - _value) > 1e-4, _message
assert abs(_got - 3) < 1e-4, f"three tokens with a squared error of 1 and one of 9: the mean is 3, yours is {_got:.4f}"
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(int(os.environ.get("QFT_SEED", "2026")))
for _ in range(10):
    _n, _l, _d = (int(torch.randint(2, 9, (), generator=_generator)) for _ in range(3))
    _s, _t = (torch.randn(_n, _l, _d, generator=_generator, dtype=torch.float64) for _ in range(2))
    _lengths = torch.randint(1, _l + 1, (_n, 1), generator=_generator)
    _mask = (torch.arange(_l) < _lengths).long()
    _mask = _mask.flip(1) if torch.rand((), generator=_generator) < 0.5 else _mask  # some tokenizers pad on the left
    _errors = [(_s[i, j] - _t[i, j]).square().mean() for i in range(_n) for j in range(_l) if _mask[i, j]]
    _want = sum(_errors) / len(_errors)
    _z = _s.clone().requires_grad_()
    _loss = hidden_loss(_z, _t, _mask)
    assert torch.isclose(_loss, _want), f"({_n}, {_l}, {_d}) with {len(_errors)} real tokens: {_loss.item():.5f} instead of {_want.item():.5f}"
    _loss.backward()
    assert _z.grad[_mask == 0].abs().sum() == 0, "the student gets a gradient at the padding"
    assert torch.isclose(hidden_loss(_s + 5 * (1 - _mask)[:, :, None], _t, _mask), _want), "what stands at the padding changes your loss"
### END HIDDEN TESTS

# %% [markdown] nbgrader={"grade": false, "grade_id": "e5_bits_text", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "markdown"}
# ## 5. A small project: bits where they help (6 points)
#
# The next cell trains a network of four layers, and narrows one layer at a time. You get two tables, `{layer: {bits: number}}`: the *harm*, the
# KL divergence from the float network in nats, and the *size* in bytes. You have as many bytes as four bits for every layer take.
#
# Find one width for each layer so that the sum of harms is least and the sum of bytes is *at most* the budget. This is an integer program. A network has few
# layers here, so you may simply try every combination; there are a few hundred. Do not trade greedily, one layer after the other: the test knows a case in which
# the best single trade is not part of the best plan. Do not assume either that more bits always harm less: harms are measured, and a
# measured one can be slightly negative. If nothing fits, raise a `ValueError`.
#
# Before you run the test, predict: your plan has at most the harm of four bits everywhere, *in the table*. Will the network that you make of it
# be nearer to the float one, too? Layers interact, so the table does not promise it. The test cell prints what it measures.

# %% nbgrader={"grade": false, "grade_id": "e5_bits_table", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "code"}
def quantized_rows(weight: Tensor, bits: int) -> Tensor:
    """A symmetric grid with one scale for each row."""
    top = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(1) / top
    return torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros(len(weight), dtype=torch.int32), 0, -top, top)


def narrowed(model: nn.Module, plan: dict[str, int]) -> nn.Module:
    """A copy of the model whose layers in `plan` have that many bits."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, bits in plan.items():
            layer = model.get_submodule(name)
            layer.weight.copy_(quantized_rows(layer.weight, bits))
    return model


@torch.no_grad()
def kl_to_float(model: nn.Module) -> float:
    """Mean KL(float || model) of an example, in nats."""
    log_p, log_q = network(rows).log_softmax(-1), model(rows).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


seed = torch.Generator().manual_seed(1)
rows = torch.randn(400, 8, generator=seed)
classes = (rows @ torch.randn(8, 6, generator=seed)).relu().matmul(torch.randn(6, 4, generator=seed)).argmax(-1)
network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
with torch.no_grad():
    for parameter in network.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=seed) * (2 / parameter.shape[-1]) ** 0.5 * (parameter.dim() == 2))
adam = torch.optim.Adam(network.parameters(), lr=0.005)
for _ in range(150):
    adam.zero_grad()
    F.cross_entropy(network(rows), classes).backward()
    adam.step()

layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
harm = {name: {bits: kl_to_float(narrowed(network, {name: bits})) for bits in (2, 3, 4, 6, 8)} for name in layers}
size = {name: {bits: math.ceil(layer.weight.numel() * bits / 8) + 4 * len(layer.weight) for bits in (2, 3, 4, 6, 8)} for name, layer in layers.items()}
budget = sum(of[4] for of in size.values())
for name in layers:
    print(f"layer {name}: harm {', '.join(f'{value:.4f} at {bits} bits' for bits, value in harm[name].items())}; bytes {size[name]}")
print(f"budget: {budget} bytes")


# %% nbgrader={"grade": false, "grade_id": "e5_bits", "locked": false, "points": 0, "schema_version": 3, "solution": true, "task": false, "cell_type": "code"}
def spend(harm: dict[str, dict[int, float]], size: dict[str, dict[int, int]], budget: int) -> dict[str, int]:
    """{layer: bits} with the least sum of harms among all plans that take at most `budget` bytes.

    harm, size: {layer: {bits: nats}} and {layer: {bits: bytes}}, with the same layers and widths. Layers may differ in
    the widths that they offer. Up to six layers. Of several best plans any will do.
    Raises ValueError if no plan fits.
    """
    ### BEGIN SOLUTION
    plans = (dict(zip(harm, bits, strict=True)) for bits in itertools.product(*harm.values()))
    fitting = [plan for plan in plans if sum(size[name][bits] for name, bits in plan.items()) <= budget]
    if not fitting:
        raise ValueError(f"no plan fits into {budget} bytes: raise the budget")
    # The sum is an estimate, as layers interact; but it is all that the table knows.
    return min(fitting, key=lambda plan: sum(harm[name][bits] for name, bits in plan.items()))
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "e5_bits_test", "locked": true, "points": 6, "schema_version": 3, "solution": false, "task": false, "cell_type": "code"}
def _sum(table, plan):
    return sum(table[name][bits] for name, bits in plan.items())


def _plan(harm, size, budget):
    plan = spend(copy.deepcopy(harm), copy.deepcopy(size), budget)
    assert isinstance(plan, dict), f"return a dictionary {{layer: bits}}, not {type(plan).__name__}"
    assert set(plan) == set(harm), f"every layer gets one width: the plan is for {sorted(plan)}, the table for {sorted(harm)}"
    assert all(bits in harm[name] for name, bits in plan.items()), f"{plan} has a width that its layer does not offer in the table"
    return plan


_size = {"a": {4: 6, 8: 12}, "b": {4: 5, 8: 10}, "c": {4: 5, 8: 10}}
_harm = {"a": {4: 7.0, 8: 0.0}, "b": {4: 5.0, 8: 0.0}, "c": {4: 5.0, 8: 0.0}}
_got = _plan(_harm, _size, 26)
assert _sum(_size, _got) <= 26, f"your plan takes {_sum(_size, _got)} bytes of 26: keep only the plans whose sum of bytes is within the budget"
_got = _plan(_harm, _size, 32)
assert _sum(_size, _got) != 16, "you spend the fewest bytes: the budget is there to be used; minimise the harm, not the size"
assert _sum(_harm, _got) == 0, "32 bytes are exactly enough for 8 bits everywhere: a plan may take the whole budget (compare with <=), and layers may take unequal shares of it"
_got = _plan(_harm, _size, 26)
assert len(set(_got.values())) > 1, "every layer has the same width in your plan: let each layer choose its own"
assert _sum(_harm, _got) == 7, f"narrowing `a` alone fits into 26 bytes and harms 7; yours is {_got} with {_sum(_harm, _got):g}. Taking the best single trade first misses it: try all combinations"
_got = _plan({"a": {4: -0.5, 8: 0.0}, "b": {4: 5.0, 8: 0.0}}, {"a": {4: 6, 8: 12}, "b": {4: 5, 8: 10}}, 30)
assert _got == {"a": 4, "b": 8}, f"layer `a` harms less at 4 bits than at 8, and both fit: more bits are not always better, read the table. Yours is {_got}"
try:
    spend(copy.deepcopy(_harm), copy.deepcopy(_size), 15)
    _raised = False
except ValueError:
    _raised = True
assert _raised, "even the narrowest plan takes 16 bytes: with 15 there is none, so raise a ValueError instead of returning one that does not fit"

_got, _uniform = _plan(harm, size, budget), dict.fromkeys(layers, 4)
assert _sum(size, _got) <= budget, f"the network's plan takes {_sum(size, _got)} bytes of {budget}"
assert _sum(harm, _got) <= _sum(harm, _uniform), "four bits everywhere fit, and harm less than your plan: you do not look at all plans"
for _name, _of in {"four bits everywhere": _uniform, f"your plan {_got}": _got}.items():
    print(f"{_name}: {_sum(size, _of)} bytes, harm {_sum(harm, _of):.4f} in the table, {kl_to_float(narrowed(network, _of)):.4f} measured together")
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(int(os.environ.get("QFT_SEED", "2026")))
for _ in range(20):
    _harm, _size = {}, {}
    for _name in [f"layer{i}" for i in range(int(torch.randint(1, 6, (), generator=_generator)))]:
        _widths = (torch.randperm(7, generator=_generator)[: int(torch.randint(1, 5, (), generator=_generator))] + 2).tolist()
        _weights, _scales = int(torch.randint(8, 400, (), generator=_generator)), int(torch.randint(1, 9, (), generator=_generator))
        _size[_name] = {bits: math.ceil(_weights * bits / 8) + 4 * _scales for bits in _widths}
        _harm[_name] = {bits: 3 * torch.rand((), generator=_generator).item() * 2.0**-bits - 0.02 for bits in _widths}
    _least, _most = (sum(pick(of.values()) for of in _size.values()) for pick in (min, max))
    _limit = _least + int((_most - _least) * torch.rand((), generator=_generator).item())
    _found = _plan(_harm, _size, _limit)
    assert _sum(_size, _found) <= _limit, f"{_sum(_size, _found)} bytes, {_limit} allowed, for the table {_size}"
    _every = [dict(zip(_harm, bits, strict=True)) for bits in itertools.product(*_harm.values())]
    _want = min(_sum(_harm, plan) for plan in _every if _sum(_size, plan) <= _limit)
    assert _sum(_harm, _found) < _want + 1e-9, f"a harm of {_sum(_harm, _found):.6f}, by trying all plans {_want:.6f}, for {_harm}, {_size}, budget {_limit}"
    _program = allocation.allocate(_harm, _size, _limit)
    assert abs(_sum(_harm, _found) - _sum(_harm, _program)) < 1e-5, "integer programming finds a plan with another harm than yours"
    try:
        spend(_harm, _size, _least - 1)
        _raised = False
    except ValueError:
        _raised = True
    assert _raised, f"nothing fits into {_least - 1} bytes: raise a ValueError"
### END HIDDEN TESTS

# %% [markdown] nbgrader={"grade": false, "grade_id": "e6_ship_text", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "markdown"}
# ## 6. Which model would you ship? (4 points)
#
# A reading app wants to tell friendly letters from angry ones, on telephones without a network. The file may take at most **10 MB**, and the app accepts at most **two
# points** less accuracy than the float control. A colleague hands you this table. *It is example data, made up for this exercise; nobody measured it.*
#
# | model | steps | seeds | accuracy (%), mean and interval | file (MB) | how the file was weighed |
# |---|---|---|---|---|---|
# | float control | 1000 | 3 | 84.0 (83.6 to 84.4) | 90.0 | on disk |
# | 8 bits, untrained | 0 | 3 | 83.8 (83.4 to 84.2) | 23.0 | on disk |
# | 4 bits, direct | 1000 | 3 | 83.2 (82.9 to 83.5) | 12.0 | on disk |
# | 3 bits everywhere, direct | 1000 | 3 | 82.1 (81.5 to 82.7) | 9.3 | on disk |
# | 3 bits on average, allocated | 1000 | 3 | 82.8 (82.4 to 83.2) | 9.3 | on disk |
# | 3 bits, falling, with a teacher | 4000 | 1 | 83.4 | 9.3 | computed from the widths |
# | 2 bits, direct, with a teacher | 1000 | 3 | 78.0 (77.0 to 79.0) | 6.2 | on disk |
#
# Intervals are of 95%, over seeds. Which model would you ship? Defend it in 80 to 150 words. Say what you would measure next, and what it would have to show to
# change your mind.

# %% [markdown] nbgrader={"grade": true, "grade_id": "e6_ship", "locked": false, "points": 4, "schema_version": 3, "solution": true, "task": false, "cell_type": "markdown"}
# ### BEGIN SOLUTION
# I ship the allocated model. Float, eight and four bits are above 10 MB; two bits lose six points. The allocated one loses 1.2, and its whole interval lies above
# the limit of 82.0. Three bits everywhere lose 1.9, and the interval reaches below the limit. The two intervals overlap, so I do not claim that allocation is
# certainly better; it is the safer choice.
#
# Falling with a teacher has the highest number of those that fit, but I do not trust it yet: one seed, four times the steps, two changes at once, and a size
# that nobody weighed. Next I run direct and falling, each with and without the teacher, for 1000 steps and five seeds, packed. If falling with a teacher beats
# the allocated model seed by seed, with an interval above zero, I ship it instead.
#
# **Rubric** (4 points): 1 for a model that meets both limits, shown with numbers from the table (uniform three bits only with a word on its interval); 1 for saying why the
# falling model's row cannot be compared (at least two of: steps, one seed, schedule and teacher changed together, computed size); 1 for reading the intervals correctly,
# without claiming a difference that they do not show; 1 for a next measurement that is fair (equal steps, several seeds) with a result that would change the decision.
# ### END SOLUTION
