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
# # Exercises: transfer learning
#
# Here you do by hand what the chapter did with a real network: freeze a body, smooth labels, keep the best weights, calibrate a
# range, and find the layer that is to blame. Everything is tiny, so each cell answers at once; plan an hour and a half.
# The test cell under each exercise tells you what is wrong, and what to try. There are 24 points in all.

# %% nbgrader={"grade": false, "grade_id": "setup", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "code"}
import copy
import math
import os
import warnings
from collections import OrderedDict
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qft_utils import quantization


def unit(inputs: int, outputs: int) -> nn.Sequential:
    """A convolution, its batch norm and its activation."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(outputs), act=nn.ReLU()))


class Creature(nn.Module):
    """A body of a few units, and a linear head: pictures (N, 3, height, width) in, logits (N, classes) out."""

    def __init__(self, widths: tuple[int, ...] = (8, 12, 16), classes: int = 5) -> None:
        super().__init__()
        self.body = nn.Sequential(*map(unit, (3, *widths), widths))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def drawn(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """The same model, its weights drawn from the generator, with variance 2 / inputs, its biases small."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                spread = math.sqrt(2 / layer.weight[0].numel())
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * spread)
                if layer.bias is not None:
                    layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator) * 0.1)
    return model


def blow_up(model: Creature, place: int, channel: int, factor: float) -> Creature:
    """Make one output channel of a convolution `factor` times as large; its batch norm divides it back."""
    with torch.no_grad():
        model.body[place].conv.weight[channel] *= factor
        model.body[place].norm.running_mean[channel] *= factor
        model.body[place].norm.running_var[channel] *= factor**2
    return model


# %% [markdown] nbgrader={"grade": false, "grade_id": "e1_freeze_text", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "markdown"}
# ## 1. Frozen means frozen (3 points)
#
# A `Creature` (see the cell above) has a `body` that you borrow and a `head` that shall learn. Freeze the body. Three things belong
# to it:
#
# - no parameter of the body asks for a gradient, and every parameter of the head does, whatever they did before;
# - the body is in evaluation mode. A batch norm in training mode moves its running statistics each time it sees a batch,
#   even if its parameters are frozen. The head is in training mode;
# - you return how many numbers are left to train. A weight matrix of 5 by 16 counts as 80.


# %% nbgrader={"grade": false, "grade_id": "e1_freeze", "locked": false, "points": 0, "schema_version": 3, "solution": true, "task": false, "cell_type": "code"}
def freeze_body(model: Creature) -> int:
    """Freeze model.body in place, let model.head learn.

    Returns the number of trainable values (elements, not tensors) in the whole model.
    """
    ### BEGIN SOLUTION
    model.body.requires_grad_(False)  # the method, with its underscore, reaches every parameter inside
    model.head.requires_grad_(True)
    model.body.eval()  # batch norms use their running statistics, and leave them alone
    model.head.train()
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "e1_freeze_test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false, "cell_type": "code"}
_generator = torch.Generator().manual_seed(1)
_model = drawn(Creature(), _generator)
_count = freeze_body(_model)
assert not any(p.requires_grad for p in _model.body.parameters()), (
    "a parameter of the body still asks for a gradient. Writing body.requires_grad = False only hangs a new attribute on the module: "
    "call body.requires_grad_(False), or set the flag of every one of body.parameters()"
)
assert all(p.requires_grad for p in _model.head.parameters()), "the head is frozen as well: nothing is left that could learn"
assert _count is not None, "return the number of trainable values"
assert _count != 2, "2 is the number of tensors in the head; count their elements, p.numel()"
assert _count == 85, f"the head has 5 * 16 weights and 5 biases, 85 trainable values; you return {_count}"
_before = copy.deepcopy(_model.body.state_dict())
_optimizer = torch.optim.SGD(_model.parameters(), lr=0.1)
_loss = F.cross_entropy(_model(torch.randn(16, 3, 8, 8, generator=_generator)), torch.arange(16) % 5)
_loss.backward()
_optimizer.step()
assert all(torch.equal(value, _before[name]) for name, value in _model.body.state_dict().items()), (
    "one step of training changed the running statistics of a batch norm: freeze them too, with body.eval()"
)
assert _model.head.training, "put the head in training mode: a dropout in it would otherwise sleep"
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(int(os.environ.get("QFT_SEED", "2026")))
for _ in range(5):
    _widths = tuple(torch.randint(2, 9, (3,), generator=_generator).tolist())
    _classes = int(torch.randint(2, 9, (), generator=_generator))
    for _was in (True, False):  # trained before, or wholly frozen and asleep before
        _model = drawn(Creature(_widths, _classes), _generator).requires_grad_(_was).train(_was)
        _count, _want = freeze_body(_model), (_widths[-1] + 1) * _classes
        assert _count == _want, f"{_classes} classes and {_widths[-1]} features leave {_want} values to train; you return {_count}"
        assert all(p.requires_grad for p in _model.head.parameters()), "a head that was frozen before must be made to learn again"
        assert not any(p.requires_grad for p in _model.body.parameters()), "some parameter of the body still asks for a gradient"
        assert not any(m.training for m in _model.body.modules()), "some layer of the body is still in training mode"
        assert _model.head.training, "a head that was in evaluation mode before must be put in training mode"
### END HIDDEN TESTS

# %% [markdown] nbgrader={"grade": false, "grade_id": "e2_smoothing_text", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "markdown"}
# ## 2. Be a little less sure (3 points)
#
# Cross-entropy asks for all of the probability on one class. **Label smoothing** takes a part $\varepsilon$ of the target's weight and
# spreads it evenly over *all* $K$ classes, the right one included:
#
# $$q_k = (1 - \varepsilon)\,[k = y] + \frac{\varepsilon}{K}, \qquad \text{loss} = -\frac{1}{N}\sum_{n}\sum_{k} q_{nk} \log p_{nk},$$
#
# where $p$ is the softmax of the logits. Compute it by hand, without `F.cross_entropy` or `nn.CrossEntropyLoss`; everything else of
# PyTorch is yours. It must stay finite for logits as far apart as 1000.
#
# Before you run the test: with smoothing, is it still best to be as sure as you can? The last check says.


# %% nbgrader={"grade": false, "grade_id": "e2_smoothing", "locked": false, "points": 0, "schema_version": 3, "solution": true, "task": false, "cell_type": "code"}
def smoothed_loss(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy with label smoothing, the mean over the batch, of shape ().

    logits: float, (N, K). targets: int64, (N,), classes 0..K-1. smoothing: epsilon, in [0, 1).
    """
    ### BEGIN SOLUTION
    log_p = F.log_softmax(logits, dim=1)  # N, K; log(softmax(...)) would be minus infinity where softmax underflows
    wanted = F.one_hot(targets, logits.shape[1]) * (1 - smoothing) + smoothing / logits.shape[1]  # N, K
    return -(wanted * log_p).sum(dim=1).mean()
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "e2_smoothing_test", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false, "cell_type": "code"}
def _by_hand(*arguments):
    with mock.patch.object(F, "cross_entropy", side_effect=AssertionError("by hand, please: without F.cross_entropy or nn.CrossEntropyLoss")):
        return smoothed_loss(*arguments)


_logits, _targets = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.0, 0.0]]), torch.tensor([0, 2])
_got, _log_p = _by_hand(_logits, _targets, 0.3), F.log_softmax(_logits, 1)
_want = F.cross_entropy(_logits, _targets, label_smoothing=0.3)
assert isinstance(_got, Tensor), "return a tensor: a Python number has no gradient, and nothing could learn from it"
assert _got.shape == (), f"return one number, the mean over the batch; yours has shape {tuple(_got.shape)}"
assert not torch.isclose(_got, F.cross_entropy(_logits, _targets)), "your loss is the one without smoothing"
_others = torch.full((2, 3), 0.15).scatter(1, _targets[:, None], 0.7)
assert not torch.isclose(_got, -(_others * _log_p).sum(1).mean()), (
    "you spread epsilon over the K - 1 wrong classes; the right one has its share too: epsilon / K for all of them"
)
_heavy = torch.full((2, 3), 0.1).scatter(1, _targets[:, None], 0.7)
assert not torch.isclose(_got, -(_heavy * _log_p).sum(1).mean()), (
    "the right class has 1 - epsilon in your targets and its share is lost, so a row adds up to less than 1: it gets 1 - epsilon + epsilon / K"
)
assert not torch.isclose(_got, 2 * _want), "you add the examples up: take the mean over the batch"
assert not torch.isclose(_got, _want / 3), "you take the mean over the classes as well: sum over the classes, mean over the batch only"
assert torch.isclose(_got, _want), f"with smoothing 0.3 the loss is {_want:.5f}; yours is {_got:.5f}"
_far = _by_hand(torch.tensor([[1000.0, 0.0, 0.0]]), torch.tensor([0]), 0.1)
assert _far.isfinite(), "logits that are 1000 apart give infinity or NaN: take F.log_softmax, not the logarithm of the softmax"
_best = torch.tensor([[0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3]]).log()  # the logits whose softmax is q itself
_costs = {"as sure as q": _by_hand(_best, torch.tensor([0]), 0.1).item(), "twice as sure": _by_hand(2 * _best, torch.tensor([0]), 0.1).item()}
assert _costs["as sure as q"] < _costs["twice as sure"], "with smoothing the loss must be least where p equals q"
print("the loss, by how sure the network is:", {name: round(cost, 3) for name, cost in _costs.items()}, "- being too sure costs")
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(int(os.environ.get("QFT_SEED", "2026")))
for _ in range(20):
    _n, _k = torch.randint(2, 9, (2,), generator=_generator).tolist()
    _smoothing = 0.9 * torch.rand((), generator=_generator).item()
    _logits = 5 * torch.randn(_n, _k, generator=_generator, dtype=torch.float64)
    _targets = torch.randint(0, _k, (_n,), generator=_generator)
    for _eps in (0.0, _smoothing):
        _mine, _theirs = _logits.clone().requires_grad_(), _logits.clone().requires_grad_()
        _got, _want = _by_hand(_mine, _targets, _eps), F.cross_entropy(_theirs, _targets, label_smoothing=_eps)
        assert torch.isclose(_got.double(), _want, rtol=1e-5), (
            f"{_n} examples of {_k} classes, smoothing {_eps:.2f}: F.cross_entropy gives {_want:.5f}, you {_got:.5f}"
        )
        assert _got.requires_grad, "your loss has no gradient: compute it from the logits without detach() or item()"
        _got.backward()
        _want.backward()
        assert torch.allclose(_mine.grad, _theirs.grad, rtol=1e-4, atol=1e-6), "the value is right, but its gradient is not: detach nothing on the way"
### END HIDDEN TESTS

# %% [markdown] nbgrader={"grade": false, "grade_id": "e3_best_text", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "markdown"}
# ## 3. Keep the best (4 points)
#
# A network that trains for too long learns its pictures by heart. So a loop looks at the **validation** part after every epoch,
# keeps the weights of the best one, and puts them back at the end. The **test** part is looked at once, after that.
#
# You are given two functions. `train_epoch(model)` makes one pass over the training part and changes the model in place.
# `loss_on(model, part)` returns the mean loss on `"validation"` or on `"test"`. Both see to training and evaluation mode themselves.
#
# When you are done, the model that the caller passed in holds the weights of its best epoch. Batch norms count: their
# running statistics are a part of what an epoch leaves behind. Before you run the test: on sixty rows with a few wrong labels, do you expect the best
# of a hundred epochs early or late?


# %% nbgrader={"grade": false, "grade_id": "e3_best", "locked": false, "points": 0, "schema_version": 3, "solution": true, "task": false, "cell_type": "code"}
def train_keeping_best(model: nn.Module, epochs: int, train_epoch, loss_on) -> tuple[int, float]:
    """Train for `epochs` epochs; `model` ends, in place, as it was after its best one.

    train_epoch: called as train_epoch(model). loss_on: called as loss_on(model, "validation") or (model, "test"), returns a float.
    Returns the best epoch (counted from 0: the one with the least validation loss, the earliest of equals)
    and the test loss of the weights that were put back. The test part is looked at exactly once.
    """
    ### BEGIN SOLUTION
    best_loss, best_epoch, best_state = float("inf"), None, None
    for epoch in range(epochs):
        train_epoch(model)
        loss = loss_on(model, "validation")
        if loss < best_loss:  # not <=: of equals the earliest stays
            # A state dict holds the living tensors, which the next epoch overwrites: copy them.
            best_loss, best_epoch, best_state = loss, epoch, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    return best_epoch, loss_on(model, "test")
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "e3_best_test", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false, "cell_type": "code"}
def _scripted(validation, test):
    """A model whose every number is the epoch that wrote it, and functions that play losses from a script."""
    model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    done, looks = [], []

    def train_epoch(model):
        for value in model.state_dict().values():
            value.fill_(len(done))
        done.append(1)

    def loss_on(model, part):
        looks.append(part)
        return {"validation": validation, "test": test}[part][int(model[0].weight[0, 0])]

    return model, train_epoch, loss_on, looks


_validation, _test = [0.9, 0.5, 0.7, 0.5, 0.8], [0.8, 0.6, 0.3, 0.9, 0.95]
_model, _train, _loss, _looks = _scripted(_validation, _test)
_epoch, _reported = train_keeping_best(_model, 5, _train, _loss)
assert _epoch != 2, "epoch 2 is the best on the test part: choose by the validation part, or your report is no honest one any more"
assert _epoch != 0, "epoch 0 has the greatest validation loss: best means the least"
assert _epoch != 3, "epochs 1 and 3 are equally good: keep the earliest, so replace it only if the new loss is less"
assert _epoch == 1, f"the validation losses are {_validation}: the best epoch, counted from 0, is 1; you return {_epoch}"
assert _looks.count("test") == 1, f"you looked at the test part {_looks.count('test')} times: look once, when everything is chosen"
assert all(int(p.flatten()[0]) == 1 for p in _model.parameters()), (
    "the caller's model does not end with the weights of epoch 1. state_dict() hands out the living tensors, and its copy() too: keep "
    "copy.deepcopy(model.state_dict()), and put it back with model.load_state_dict()"
)
assert all(int(b.flatten()[0]) == 1 for b in _model.buffers()), (
    "the weights are back, but the running statistics of the batch norm are not: parameters() leaves buffers out, state_dict() has both"
)
assert _reported == 0.6, f"the best epoch's weights have a test loss of 0.6; you report {_reported}: first put them back, then test"

_model, _train, _loss, _looks = _scripted([700.0, 300.0, 500.0], [0.1, 0.2, 0.3])
_epoch, _reported = train_keeping_best(_model, 3, _train, _loss)
assert _epoch == 1 and _reported == 0.2, "a loss may be of any size, here it is in the hundreds: begin with an infinite best loss, not with 1 or 100"

_generator = torch.Generator().manual_seed(7)
_rows = {}
for _part, _n in {"train": 60, "validation": 300, "test": 300}.items():
    _x = torch.randn(_n, 20, generator=_generator)
    _flipped = torch.rand(_n, generator=_generator) < 0.15
    _rows[_part] = _x, ((_x[:, 0] + _x[:, 1] > 0) ^ _flipped).long()
_model = drawn(nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2)), _generator)
_optimizer, _curve = torch.optim.Adam(_model.parameters(), lr=0.01), []


def _train(model):
    _optimizer.zero_grad()
    F.cross_entropy(model(_rows["train"][0]), _rows["train"][1]).backward()
    _optimizer.step()


def _loss(model, part):
    with torch.no_grad():
        value = F.cross_entropy(model(_rows[part][0]), _rows[part][1]).item()
    if part == "validation":
        _curve.append(value)
    return value


_epoch, _reported = train_keeping_best(_model, 100, _train, _loss)
assert abs(_loss(_model, "validation") - _curve[_epoch]) < 1e-6, "after real training the model is not that of its best epoch"
print(f"best epoch (from 0) {_epoch} of 100: validation loss {_curve[_epoch]:.2f}, after the last epoch {_curve[99]:.2f}; test loss {_reported:.2f}")
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(int(os.environ.get("QFT_SEED", "2026")))
for _ in range(20):
    _epochs = int(torch.randint(1, 9, (), generator=_generator))
    _validation = (torch.randint(2, 9, (_epochs,), generator=_generator) * 10.0 ** torch.randint(-2, 4, (), generator=_generator)).tolist()
    _test = torch.rand(_epochs, generator=_generator).tolist()
    _model, _train, _loss, _looks = _scripted(_validation, _test)
    _epoch, _reported = train_keeping_best(_model, _epochs, _train, _loss)
    _want = _validation.index(min(_validation))
    assert _epoch == _want, f"validation losses {_validation}: the best epoch is {_want}, yours is {_epoch}"
    assert all(int(v.flatten()[0]) == _want for v in _model.state_dict().values()), f"the model does not end as it was after epoch {_want}"
    assert abs(_reported - _test[_want]) < 1e-9 and _looks.count("test") == 1, "report the test loss of the best epoch, from a single look"
### END HIDDEN TESTS

# %% [markdown] nbgrader={"grade": false, "grade_id": "e4_observer_text", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "markdown"}
# ## 4. An observer that is not easily impressed (4 points)
#
# To **calibrate** is to show a network some batches and note the ranges of what flows through it. An **observer** sees one batch at
# a time and keeps two numbers only. Write it as a function over the list of batches:
#
# 1. of each batch, take the (100 - percent)-th and the percent-th percentile of all of its values (`torch.quantile`, which takes fractions
#    and interpolates linearly). With `percent=100` these are the least and the greatest value: that is the min-max observer;
# 2. `low` is the least of the lower ones over the batches, `high` the greatest of the upper ones;
# 3. widen the range, if need be, until it holds zero: `low <= 0 <= high`;
# 4. the levels are the integers 0 to $2^b - 1$: `scale` is the width of the range over the number of *steps*, and `zero_point` is the integer
#    that stands for 0.0, so that `scale * (0 - zero_point)` comes as near as it can to `low`.
#
# Before you run the test: among 10,000 ordinary values there is a single one of forty. Does cutting it off make the mean squared error, over *all*
# values, smaller? At four bits? At eight? The test prints it.


# %% nbgrader={"grade": false, "grade_id": "e4_observer", "locked": false, "points": 0, "schema_version": 3, "solution": true, "task": false, "cell_type": "code"}
def calibrate(batches: list[Tensor], bits: int, percent: float = 100.0) -> tuple[float, int]:
    """scale and zero_point of an affine quantizer with levels 0..2**bits - 1.

    batches: float tensors of any shape, not empty, not all zero. percent: in (50, 100]; 100 is min-max.
    """
    ### BEGIN SOLUTION
    low = high = 0.0  # to begin at zero is to hold it in the range
    for batch in batches:
        tails = torch.tensor([1 - percent / 100, percent / 100], dtype=batch.dtype)
        lower, upper = batch.flatten().quantile(tails).tolist()
        low, high = min(low, lower), max(high, upper)
    scale = (high - low) / (2**bits - 1)
    return scale, round(-low / scale)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "e4_observer_test", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false, "cell_type": "code"}
_batches = [torch.linspace(-1, 1, 11), torch.linspace(-2, 3, 11).reshape(1, 11), torch.linspace(-0.5, 0.5, 11)]
_scale, _zero = calibrate(_batches, 8)
assert abs(_scale - 1 / 255) > 1e-6, "yours is the range of the last batch alone: keep the extremes of all batches"
assert abs(_scale - 8 / 3 / 255) > 1e-6, "you average the ranges of the batches; this observer keeps the least and the greatest"
assert abs(_scale - 5 / 256) > 1e-6, "you divide by the number of levels, 256; there are 255 steps between them"
assert abs(_scale - 5 / 255) < 1e-6, f"the batches lie in [-2, 3], so the scale is 5/255 = {5 / 255:.5f}; yours is {_scale:.5f}"
assert _zero != -102, "your zero_point has the wrong sign: low is scale * (0 - zero_point), so zero_point is -low / scale"
assert _zero == int(_zero), f"zero_point is an integer; yours is {_zero}: round it"
assert _zero == 102, f"-2 is 102 steps of 5/255 below zero, so zero_point is 102; yours is {_zero}"
_scale, _zero = calibrate([torch.linspace(2, 6, 9)], 8)
assert abs(_scale - 6 / 255) < 1e-6 and _zero == 0, (
    f"values in [2, 6] have no zero among them, and zero must have its level: use the range [0, 6], scale {6 / 255:.5f}, zero_point 0"
)
_scale, _zero = calibrate([torch.linspace(-6, -2, 9)], 8)
assert abs(_scale - 6 / 255) < 1e-6 and _zero == 255, "values in [-6, -2] need the range [-6, 0], so zero is the last level, 255"
_t = torch.linspace(-10, 10, 201)
_batches = [_t * _t.abs(), _t]  # -100 ... 100, dense in the middle
_scale, _zero = calibrate(_batches, 8, percent=90.0)
assert abs(_scale - 200 / 255) > 1e-3, "percent changes nothing in yours: take percentiles, not the least and greatest value"
assert abs(_scale - 164 / 255) > 1e-3, "you cut off one end only: the lower percentile is the (100 - percent)-th"
assert abs(_scale - 162 / 255) > 1e-3, "you halve the tail: at percent=90 the range runs from the 10th to the 90th percentile"
_pool = torch.cat(_batches).quantile(torch.tensor([0.1, 0.9]))
assert abs(_scale - (_pool[1] - _pool[0]) / 255) > 1e-3, (
    "yours are the percentiles of all batches together; an observer sees one batch at a time: take those of each, then the extremes of them"
)
assert abs(_scale - 128 / 255) < 1e-3, f"the 10th and 90th percentile of the wider batch are -64 and 64, so the scale is {128 / 255:.5f}; yours is {_scale:.5f}"

_x = torch.randn(10_000, generator=torch.Generator().manual_seed(4)).index_fill(0, torch.tensor([0]), 40.0)
for _bits in (4, 8):
    _errors = []
    for _percent in (100.0, 99.9):
        _scale, _zero = calibrate([_x], _bits, _percent)
        _errors.append((torch.fake_quantize_per_tensor_affine(_x, float(_scale), int(_zero), 0, 2**_bits - 1) - _x).square().mean().item())
    print(f"{_bits} bits, mean squared error: min-max {_errors[0]:.4f}, 99.9 percent {_errors[1]:.4f}")
    assert (_errors[1] < _errors[0]) == (_bits == 4), "cutting off should pay at four bits, where steps are dear, and not at eight: check the percentiles"
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(int(os.environ.get("QFT_SEED", "2026")))
for _ in range(30):
    _bits, _count = int(torch.randint(2, 9, (), generator=_generator)), int(torch.randint(1, 5, (), generator=_generator))
    _shift = 4 * torch.randn((), generator=_generator)
    _batches = [
        torch.randn(3, int(torch.randint(5, 50, (), generator=_generator)), generator=_generator) * (1 + 3 * torch.rand((), generator=_generator)) + _shift
        for _ in range(_count)
    ]
    for _percent in (100.0, 60 + 39 * torch.rand((), generator=_generator).item()):
        _low = min(0.0, *(b.double().quantile(1 - _percent / 100).item() for b in _batches))
        _high = max(0.0, *(b.double().quantile(_percent / 100).item() for b in _batches))
        _want, (_scale, _zero) = (_high - _low) / (2**_bits - 1), calibrate(_batches, _bits, _percent)
        assert abs(_scale / _want - 1) < 1e-4, (
            f"{_count} batches, {_bits} bits, percent {_percent:.1f}: the range is [{_low:.4f}, {_high:.4f}], the scale {_want:.5f}; yours is {_scale:.5f}"
        )
        assert _zero == int(_zero) and abs(_zero + _low / _want) <= 0.501, f"zero_point is the integer next to {-_low / _want:.3f}; yours is {_zero}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _observer = torch.ao.quantization.MinMaxObserver(dtype=torch.quint8, quant_min=0, quant_max=2**_bits - 1)
        for _batch in _batches:
            _observer(_batch)
        _theirs = _observer.calculate_qparams()
    _scale, _zero = calibrate(_batches, _bits)
    assert abs(_scale / _theirs[0].item() - 1) < 1e-4, f"PyTorch's MinMaxObserver finds the scale {_theirs[0].item():.6f}, you {_scale:.6f}"
### END HIDDEN TESTS

# %% [markdown] nbgrader={"grade": false, "grade_id": "e5_blame_text", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "markdown"}
# ## 5. Project: which layer is to blame? (6 points)
#
# A network is good in float and bad as int8. Behind one bad layer everything looks bad, so you change one thing at a time: **quantize
# one layer's weight, leave all others in float**, and see what that alone does to the network's answer.
#
# Write `rank_suspects`. For each `nn.Conv2d` and `nn.Linear`, however deep inside the model:
#
# 1. replace its weight, and nothing else, by `quantization.fake_quantize(weight, quantization.choose_qparams(weight, bits, symmetric=True, axis=axis))`.
#    With `axis=None` one scale serves the whole tensor; with `axis=0` each output channel has its own;
# 2. compute the output of the *whole model* for `x`, and its SQNR against the output of the float model, in decibels:
#    `quantization.sqnr_db(expected, output)`;
# 3. make sure that the next layer's turn begins from the float model again, and that the caller's model ends as it came.
#
# Return pairs of name and decibels, the worst first. The model comes in evaluation mode.
#
# The patient: a `Creature` of which one convolution has a single channel blown up to a hundred times its size. The batch norm behind divides it back,
# so in float nobody notices. Who pays, per tensor? And who, with a scale for each channel? The test prints it. In so small a network errors
# may happen to cancel or to add up, so take a difference of a few decibels for luck, and one of twenty for a finding.


# %% nbgrader={"grade": false, "grade_id": "e5_blame", "locked": false, "points": 0, "schema_version": 3, "solution": true, "task": false, "cell_type": "code"}
def rank_suspects(model: nn.Module, x: Tensor, bits: int, axis: int | None = None) -> list[tuple[str, float]]:
    """(name, SQNR in dB of the model's output with that layer's weight alone quantized), the lowest SQNR first.

    x: a batch of inputs. bits: 2..8. axis: None for a scale per tensor, 0 for a scale per output channel.
    Names are those of model.named_modules(). The model is not changed.
    """
    ### BEGIN SOLUTION
    found = {}
    with torch.no_grad():
        expected = model(x)
        for name, layer in model.named_modules():
            if not isinstance(layer, nn.Conv2d | nn.Linear):
                continue
            patient = copy.deepcopy(model)  # afresh for each suspect, so that it answers for itself alone
            weight = patient.get_submodule(name).weight
            qparams = quantization.choose_qparams(weight, bits, symmetric=True, axis=axis)
            weight.copy_(quantization.fake_quantize(weight, qparams))
            found[name] = quantization.sqnr_db(expected, patient(x))
    return sorted(found.items(), key=lambda pair: pair[1])
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "e5_blame_test", "locked": true, "points": 6, "schema_version": 3, "solution": false, "task": false, "cell_type": "code"}
def _expected_decibels(model, x, bits, axis):
    """By another route: the weights are swapped in a functional call, the rounding is torch's."""
    decibels, top = {}, 2 ** (bits - 1) - 1
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weight = layer.weight.detach()
            if axis is None:
                rounded = torch.fake_quantize_per_tensor_affine(weight, weight.abs().max().item() / top, 0, -top - 1, top)
            else:
                scale = weight.abs().flatten(1).amax(1) / top
                rounded = torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros(len(scale), dtype=torch.int), 0, -top - 1, top)
            with torch.no_grad():
                output, wanted = torch.func.functional_call(model, {f"{name}.weight": rounded}, (x,)), model(x)
            decibels[name] = (10 * torch.log10(wanted.square().sum() / (wanted - output).square().sum())).item()
    return decibels


_generator = torch.Generator().manual_seed(5)
_model = blow_up(drawn(Creature(), _generator), place=0, channel=3, factor=100.0).eval()
_x, _before = torch.randn(8, 3, 8, 8, generator=_generator), copy.deepcopy(_model.state_dict())
_ranked = rank_suspects(_model, _x, 8)
assert all(torch.equal(value, _before[name]) for name, value in _model.state_dict().items()), (
    "the caller's model has changed: quantize in a copy.deepcopy(model), or put the float weight back (a clone of it) after each turn"
)
_want, _got = _expected_decibels(_model, _x, 8, None), dict(_ranked)
assert set(_got) >= set(_want), f"these layers are missing: {sorted(set(_want) - set(_got))}. named_children() sees the top only, named_modules() all"
assert set(_got) <= set(_want), f"these are neither Conv2d nor Linear: {sorted(set(_got) - set(_want))}"
_weights = {
    name: quantization.sqnr_db(w, quantization.fake_quantize(w, quantization.choose_qparams(w, 8, symmetric=True)))
    for name, w in ((name, _model.get_submodule(name).weight.detach()) for name in _want)
}
assert any(abs(_got[name] - _weights[name]) > 0.1 for name in _want), (
    "yours is the SQNR of the weights: send x through the whole model and compare its outputs. A big channel hides what the small ones lose"
)
_wrong = {name: f"{_got[name]:.1f} dB instead of {_want[name]:.1f}" for name in _want if abs(_got[name] - _want[name]) > 0.1}
assert set(_wrong) != set(_want) - {"body.0.conv"}, (
    f"only the first layer is right; later ones answer for those before them as well: {_wrong}. Begin each turn from the float model"
)
assert not _wrong, f"the decibels are wrong for {_wrong}. Quantize one weight alone, symmetric, and compare the model's outputs"
_order = [decibels for _, decibels in _ranked]
assert _order == sorted(_order), "the worst comes first: sort by the decibels, the lowest SQNR at the front"
_by_channel = dict(rank_suspects(_model, _x, 8, axis=0))
assert abs(_by_channel["body.0.conv"] - _got["body.0.conv"]) > 1, "axis=0 gives what axis=None gives: pass axis on to choose_qparams"
_want = _expected_decibels(_model, _x, 8, 0)
assert all(abs(_by_channel[name] - _want[name]) < 0.1 for name in _want), f"per channel the decibels should be {_want}; yours are {_by_channel}"
assert _ranked[0][0] == "body.0.conv", "the layer with the channel that was blown up should be the first suspect"
for _name, _decibels in _ranked:
    print(f"{_name:12} {_decibels:5.1f} dB with one scale, {_by_channel[_name]:5.1f} dB with one for each channel")
### BEGIN HIDDEN TESTS
_generator = torch.Generator().manual_seed(int(os.environ.get("QFT_SEED", "2026")))
for _ in range(6):
    _place, _channel = int(torch.randint(0, 3, (), generator=_generator)), int(torch.randint(0, 6, (), generator=_generator))
    _bits, _widths = int(torch.randint(4, 9, (), generator=_generator)), tuple(torch.randint(6, 12, (3,), generator=_generator).tolist())
    _model = nn.Sequential(OrderedDict(inner=blow_up(drawn(Creature(_widths), _generator), _place, _channel, 100.0))).eval()
    _x, _before = torch.randn(4, 3, 6, 6, generator=_generator), copy.deepcopy(_model.state_dict())
    for _axis in (None, 0):
        _want, _ranked = _expected_decibels(_model, _x, _bits, _axis), rank_suspects(_model, _x, _bits, axis=_axis)
        _got = dict(_ranked)
        assert set(_got) == set(_want), f"the suspects are {sorted(_want)}; yours are {sorted(_got)}"
        assert all(abs(_got[name] - _want[name]) < 0.1 for name in _want), f"{_bits} bits, axis={_axis}: the decibels should be {_want}; yours are {_got}"
        assert [d for _, d in _ranked] == sorted(_got.values()), "the worst comes first"
    assert all(torch.equal(value, _before[name]) for name, value in _model.state_dict().items()), "the caller's model has changed"
### END HIDDEN TESTS

# %% [markdown] nbgrader={"grade": false, "grade_id": "e6_judgement_text", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "markdown"}
# ## 6. Judgement: which one would you ship? (4 points)
#
# Your network sorts clothes on the computers of many shops. Some have processors with VNNI, some do not, and you do not know
# how many. It must be right on at least 90 % of pictures **on every one of them**, and its file must be at most 5 MB. Among those that are, faster is better.
#
# The table below is **made up** for this exercise. Each accuracy was measured on 2,000 pictures; the cell adds the half-width of a
# 95 % interval. The last column says on which part the variant was picked among its siblings.
#
# Which model would you ship? Defend it in 80 to 150 words. Say what in the table settles it, what is a tie, which row you trust least and why,
# and what you would measure next, or what would change your mind.

# %% nbgrader={"grade": false, "grade_id": "e6_judgement_table", "locked": true, "points": 0, "schema_version": 3, "solution": false, "task": false, "cell_type": "code"}
# name, accuracy with VNNI, without, megabytes, milliseconds with VNNI, without, chosen on. MADE-UP EXAMPLE DATA.
table = [
    ("float32", 0.926, 0.926, 13.6, 38, 41, "validation"),
    ("int8, 7-bit activations, x86", 0.917, 0.917, 3.6, 15, 24, "validation"),
    ("int8, 8 bits, x86", 0.712, 0.655, 3.6, 15, 24, "validation"),
    ("int8, 8 bits, oneDNN, folded", 0.923, 0.803, 3.5, 11, 22, "validation"),
    ("the same, best of 20 observers", 0.931, 0.811, 3.5, 11, 22, "test"),
    ("float head on a frozen int8 body", 0.871, 0.862, 3.5, 11, 22, "validation"),
]
print(f"{'EXAMPLE DATA':34} {'with VNNI':>14} {'without':>14} {'MB':>5} {'ms with':>8} {'without':>8}  chosen on")
for name, *accuracies, megabytes, fast, slow, part in table:
    shown = [f"{100 * p:.1f} ± {196 * math.sqrt(p * (1 - p) / 2000):.1f} %" for p in accuracies]
    print(f"{name:34} {shown[0]:>14} {shown[1]:>14} {megabytes:5.1f} {fast:8} {slow:8}  {part}")

# %% [markdown] nbgrader={"grade": true, "grade_id": "e6_judgement", "locked": false, "points": 4, "schema_version": 3, "solution": true, "task": false, "cell_type": "markdown"}
# ### BEGIN SOLUTION
# I ship int8 with 7-bit activations on engine x86. Two conditions settle it: 5 MB rules out float32, and 90 % on every machine rules
# out all other rows. Those that fall apart without VNNI compute wrong sums, which no observer mends. The row that is left keeps its whole interval
# above 90 % on both kinds of processor. With VNNI the intervals do not tell it from the folded oneDNN model; a paired comparison on the same
# pictures might. I trust the best of 20 observers least: it was picked on the test part, so its accuracy flatters it. Next I would measure
# the very file that ships, on fresh pictures, on two real processors of each kind. If every shop had VNNI, I would ship the folded oneDNN
# model: it is faster.
#
# **Rubric** (4 points): 1 for a choice that meets both conditions on every processor (7 bits, or two files chosen by a test for VNNI at the start, if well argued); 1 for
# naming what rules the others out (size for float32; the collapse without VNNI, or below 90 %, for the rest); 1 for reading the noise (differences inside the
# intervals are ties, or asks for a paired comparison) and for distrusting the row that was picked on the test part; 1 for a next
# measurement or a condition that would change the choice.
# ### END SOLUTION
