"""The training loop against hand-written ones, closed forms, and itself after it was killed.

Run as a script, this file trains on a checkpoint and kills itself in the middle of an epoch.
"""

import copy
import math
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from qft_utils import measure, qat, training

EPOCHS, FEATURES, CLASSES = 4, 6, 3
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


pytestmark = pytest.mark.usefixtures("one_thread")


def examples(count: int = 37, seed: int = 0) -> TensorDataset:
    """Classes that a linear model finds for most, but not for all."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator)
    noise = torch.randn(count, CLASSES, generator=generator)
    return TensorDataset(x, (x[:, :CLASSES] + noise).argmax(-1))


def shuffled(seed: int = 1) -> DataLoader:
    """Five batches, the last of five examples."""
    return DataLoader(examples(), 8, shuffle=True, generator=torch.Generator().manual_seed(seed))


def validation() -> DataLoader:
    return DataLoader(examples(21, seed=9), 16)


def network(seed: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, CLASSES)
    )


def tools(model: nn.Module, epochs: int = EPOCHS) -> dict:
    """Optimizer, schedule and number of epochs: what `fit` needs besides the data."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, epochs=epochs, steps_per_epoch=5)
    return {"optimizer": optimizer, "schedule": schedule, "epochs": epochs}


def fit(model: nn.Module, train=None, **changed) -> training.History:
    return training.fit(model, train or shuffled(), validation(), **tools(model) | changed)


class Stop(Exception):
    pass


def stop():
    raise Stop


def breaking(at_call: int, act=stop):
    """A cross-entropy that acts up when it is called for the n-th time; an epoch here has seven calls."""
    calls = []

    def loss(outputs, targets):
        calls.append(1)
        return act() if len(calls) == at_call else F.cross_entropy(outputs, targets)

    return loss


def columns(history: training.History) -> dict:
    """All but the time."""
    return {name: values for name, values in asdict(history).items() if name != "seconds"}


def assert_same_bits(one: dict, other: dict) -> None:
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


# ----- what it computes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("clip_norm", [None, 0.05])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_loop_written_by_hand_gives_the_same_bits(clip_norm, autocast, device):
    model = network().to(device)
    torch.manual_seed(3)
    history = fit(model, clip_norm=clip_norm, autocast=autocast)

    hand = network().to(device)
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW(hand.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=20)
    train, held_out = shuffled(), validation()
    accuracies, weights = [], []
    for _ in range(4):
        hand.train()
        for x, y in train:
            with torch.autocast(device, torch.bfloat16, enabled=autocast is not None):
                loss = nn.functional.cross_entropy(hand(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            if clip_norm:
                nn.utils.clip_grad_norm_(hand.parameters(), clip_norm)
            optimizer.step()
            schedule.step()
        hand.eval()
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=autocast is not None):
            right = sum((hand(x.to(device)).argmax(1).cpu() == y).sum().item() for x, y in held_out)
        accuracies.append(right / 21)
        weights.append(copy.deepcopy(hand.state_dict()))

    assert history.validation_accuracy == pytest.approx(accuracies, abs=1e-12)
    assert_same_bits(model.state_dict(), weights[accuracies.index(max(accuracies))])


def test_gradient_descent_reaches_the_least_squares_solution():
    x, y = examples(40).tensors
    model = nn.Linear(FEATURES, CLASSES).double()
    batches, optimizer = [(x.double(), y)] * 1_500, torch.optim.SGD(model.parameters(), lr=0.3)

    def squared_error(outputs, targets):
        return F.mse_loss(outputs, F.one_hot(targets, CLASSES).double())

    history = training.fit(model, batches, batches[:1], optimizer=optimizer, epochs=1, loss=squared_error)
    with_ones = torch.cat([x.double(), torch.ones(40, 1)], 1)
    exact = torch.linalg.lstsq(with_ones, F.one_hot(y, CLASSES).double())
    torch.testing.assert_close(
        torch.cat([model.weight.T, model.bias[None]]), exact.solution, rtol=0, atol=1e-9
    )
    residual = (with_ones @ exact.solution - F.one_hot(y, CLASSES)).square().mean().item()
    assert history.validation_loss == pytest.approx([residual], abs=1e-12)


def test_schedule_moves_at_every_step():
    model, used = network(), []
    settings = tools(model)
    settings["optimizer"].register_step_pre_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
    history = fit(model, **settings)

    other = torch.optim.AdamW(network().parameters(), lr=0.02)
    schedule, expected = torch.optim.lr_scheduler.OneCycleLR(other, 0.02, total_steps=20), []
    for _ in range(20):
        expected.append(schedule.get_last_lr()[0])
        other.step()
        schedule.step()
    assert used == expected
    assert history.learning_rate == expected[::5]


def test_without_schedule_the_rate_stays():
    model = network()
    history = fit(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), schedule=None)
    assert history.learning_rate == [0.1] * 4


def test_clipping_shortens_the_gradient_and_keeps_its_direction():
    def gradients(clip_norm):
        model, seen = network(), []
        settings = tools(model)
        settings["optimizer"].register_step_pre_hook(
            lambda *_: seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        )
        fit(model, **settings, clip_norm=clip_norm)
        return seen

    free, clipped = gradients(None), gradients(0.1)
    assert min(g.norm() for g in free) > 0.1
    assert all(g.norm() == pytest.approx(0.1, rel=1e-4) for g in clipped)
    # The first step starts from the same weights.
    torch.testing.assert_close(clipped[0], free[0] * 0.1 / free[0].norm(), rtol=1e-4, atol=1e-7)


def test_only_what_is_trained_counts_for_clipping():
    """The gradients of a layer that no optimizer clears would grow, and with them the norm."""
    weights = []
    for frozen in (True, False):
        model = network()
        model[0].requires_grad_(not frozen)
        optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1)
        fit(model, optimizer=optimizer, schedule=None, clip_norm=0.05)
        weights.append(model[4].state_dict())
    assert_same_bits(*weights)


# ----- the best weights


def test_weights_of_the_best_epoch_come_back():
    """Training on the opposite labels makes a right model worse from epoch to epoch."""
    x = torch.linspace(-1, 1, 20)[:, None]
    right, wrong = (x[:, 0] > 0).long(), (x[:, 0] <= 0).long()

    def train(epochs):
        model = nn.Linear(1, 2)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[-3.0], [3.0]]))
            model.bias.copy_(torch.tensor([0.2, 0.0]))
        optimizer = torch.optim.SGD(model.parameters(), lr=2.5)
        return model, training.fit(model, [(x, wrong)], [(x, right)], optimizer=optimizer, epochs=epochs)

    (model, history), (first, _) = train(8), train(1)
    accuracies = history.validation_accuracy
    assert accuracies[0] > accuracies[-1] and accuracies == sorted(accuracies, reverse=True)
    assert history.best_epoch == 0
    assert_same_bits(model.state_dict(), first.state_dict())
    loss, predictions, _ = training.evaluate(model, [(x, right)])
    assert loss == history.validation_loss[0]
    assert measure.accuracy(predictions, right).value == accuracies[0]


def test_of_equal_epochs_the_earliest_is_best():
    history = training.History(validation_accuracy=[0.5, 0.8, 0.8, 0.7], seconds=[1.0] * 4)
    assert history.best_epoch == 1


def test_best_weights_are_no_views_of_the_model():
    """A model that improves until the end keeps its last weights, and later changes do not undo it."""
    x = torch.linspace(-1, 1, 30)[:, None]
    y = (x[:, 0] > 0).long()
    model = nn.Linear(1, 2)
    nn.init.zeros_(model.weight)
    nn.init.constant_(model.bias[:1].data, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    last = []
    optimizer.register_step_post_hook(lambda *_: last.append(copy.deepcopy(model.state_dict())))
    history = training.fit(model, [(x, y)] * 3, [(x, y)], optimizer=optimizer, epochs=6)
    assert history.best_epoch > 0
    assert_same_bits(model.state_dict(), last[3 * history.best_epoch + 2])


# ----- modes, formats, evaluation


class Spy(nn.Module):
    """Notes in which mode and with which gradients it runs."""

    def __init__(self):
        super().__init__()
        self.inner, self.seen = nn.Linear(FEATURES, CLASSES), []

    def forward(self, x):
        self.seen.append((self.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return self.inner(x)


def test_modes_of_training_and_validation():
    spy = Spy().eval()
    fit(spy)
    assert spy.seen == ([(True, True, False)] * 5 + [(False, False, False)] * 2) * EPOCHS
    assert not spy.training and not spy.inner.training


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_batch_norm_keeps_its_statistics(frozen):
    model = nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Linear(FEATURES, CLASSES))
    model[0].requires_grad_(not frozen)
    x, y = examples().tensors
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    training.fit(model, [(x, y)], [(x, y)], optimizer=optimizer, epochs=1)
    mean = torch.zeros(FEATURES) if frozen else 0.1 * x.mean(0)  # momentum 0.1, from zero
    torch.testing.assert_close(model[0].running_mean, mean)
    assert not any(module.training for module in model.modules())


def test_batch_norm_without_parameters_learns_its_statistics():
    model = nn.Sequential(nn.BatchNorm1d(FEATURES, affine=False), nn.Linear(FEATURES, CLASSES))
    fit(model)
    assert model[0].num_batches_tracked > 0


def test_channels_last_stays():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 9, 2))
    model, formats = model.to(memory_format=torch.channels_last), []
    x = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    model[0].register_forward_pre_hook(
        lambda _, inputs: formats.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    batches = [(x, torch.tensor([0, 1, 0, 1]))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training.fit(model, batches, batches, optimizer=optimizer, epochs=2)
    assert formats == [True] * 4
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_autocast_reaches_the_model_and_leaves_the_weights():
    model, types = network(), []
    model[4].register_forward_hook(lambda *call: types.append(call[-1].dtype))
    fit(model, autocast=torch.bfloat16)
    assert types == [torch.bfloat16] * 7 * EPOCHS
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_evaluate_weighs_batches_by_their_size():
    model, data = network().eval(), examples(21, seed=9)
    loss, predictions, labels = training.evaluate(model, DataLoader(data, 8))
    x, y = data.tensors
    outputs = model(x)
    assert loss == pytest.approx(F.cross_entropy(outputs, y).item(), rel=1e-6)
    assert torch.equal(predictions, outputs.argmax(1)) and torch.equal(labels, y)
    assert not predictions.requires_grad


def test_train_loss_is_the_mean_over_examples():
    """With a learning rate of zero the weights stay, and the loss is that of all the examples at once."""
    model = nn.Linear(FEATURES, CLASSES)
    x, y = examples().tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    history = fit(model, optimizer=optimizer, schedule=None)
    assert history.train_loss == pytest.approx([F.cross_entropy(model(x), y).item()] * 4, rel=1e-6)


class Counted(list):
    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def test_batches_are_passed_through_once_an_epoch():
    """Each iterator of a DataLoader draws a random number, and starts its workers."""
    train = Counted(in_a_list())
    fit(network(), train)
    assert train.passes == EPOCHS


def test_one_line_an_epoch(capsys, tmp_path):
    fit(network(), checkpoint=tmp_path / "run.pt")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"epoch {n} of 4" for n in (1, 2, 3, 4)]
    assert all("validation accuracy 0." in line for line in lines)
    fit(network(), checkpoint=tmp_path / "run.pt")
    assert capsys.readouterr().out == "4 of 4 epochs come from run.pt\n"


# ----- interruptions


def by_sampler() -> DataLoader:
    data, generator = examples(), torch.Generator().manual_seed(4)
    return DataLoader(data, 8, sampler=RandomSampler(data, generator=generator))


def by_batch_sampler() -> DataLoader:
    data, generator = examples(), torch.Generator().manual_seed(4)
    batches = torch.utils.data.BatchSampler(RandomSampler(data, generator=generator), 8, drop_last=False)
    return DataLoader(data, batch_sampler=batches)


def by_global_state() -> DataLoader:
    return DataLoader(examples(), 8, shuffle=True)


class Augmented(TensorDataset):
    """Adds noise of its own generator."""

    def __init__(self):
        super().__init__(*examples().tensors)
        self.generator = torch.Generator().manual_seed(5)

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn(x.shape, generator=self.generator), y


def by_dataset() -> DataLoader:
    return DataLoader(Augmented(), 8)


def in_a_list() -> list:
    return list(DataLoader(examples(), 8))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "loader", [shuffled, by_sampler, by_batch_sampler, by_global_state, by_dataset, in_a_list]
)
def test_after_an_exception_the_result_is_the_same(tmp_path, loader, device):
    whole = network().to(device)
    history = fit(whole, loader())
    after = torch.rand(3)

    broken = network().to(device)
    with pytest.raises(Stop):
        fit(broken, loader(), loss=breaking(17), checkpoint=tmp_path / "run.pt")
    resumed = network(seed=77).to(device)  # other weights, and another global state
    again = fit(resumed, loader(), checkpoint=tmp_path / "run.pt")
    assert columns(again) == columns(history)
    assert_same_bits(resumed.state_dict(), whole.state_dict())
    assert torch.equal(torch.rand(3), after)
    assert os.listdir(tmp_path) == ["run.pt"]


def test_the_interrupted_objects_themselves_can_go_on(tmp_path):
    """As when a reader stops a cell of a notebook, and runs it again."""
    whole = network()
    history = fit(whole)
    model = network()
    settings = tools(model) | {"train": shuffled(), "checkpoint": tmp_path / "run.pt"}
    with pytest.raises(Stop):
        fit(model, **settings, loss=breaking(17))
    assert columns(fit(model, **settings)) == columns(history)
    assert_same_bits(model.state_dict(), whole.state_dict())


def test_after_a_kill_the_result_is_the_same(tmp_path):
    whole = network()
    history = fit(whole)
    path = tmp_path / "folder" / "run.pt"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    killed = subprocess.run([sys.executable, __file__, path], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    stored = torch.load(path, weights_only=True)["history"]
    assert stored["train_loss"] == history.train_loss[:2]

    resumed = network(seed=77)
    assert columns(fit(resumed, checkpoint=path)) == columns(history)
    assert_same_bits(resumed.state_dict(), whole.state_dict())


def test_a_finished_run_gives_its_result_at_once(tmp_path):
    model = network()
    history = fit(model, checkpoint=tmp_path / "run.pt")
    again = network(seed=77)
    assert fit(again, loss=breaking(1), checkpoint=str(tmp_path / "run.pt")) == history
    assert_same_bits(again.state_dict(), model.state_dict())
    assert not again.training


def small_conv() -> nn.Module:
    torch.manual_seed(2)
    net = [nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 8, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*net, nn.Linear(16, CLASSES))


@pytest.mark.parametrize("learned_step", [False, True])
def test_a_prepared_model_goes_on_with_its_observers(tmp_path, learned_step):
    def prepared():
        return qat.prepare(small_conv(), 4, 4, learned_step=learned_step)

    whole, broken, resumed = prepared(), prepared(), prepared()
    history = fit(whole)
    with pytest.raises(Stop):
        fit(broken, loss=breaking(17), checkpoint=tmp_path / "run.pt")
    assert columns(fit(resumed, checkpoint=tmp_path / "run.pt")) == columns(history)
    assert_same_bits(resumed.state_dict(), whole.state_dict())
    names = [name for name in whole.state_dict() if "input_quantizer" in name]
    assert len(names) == 4  # low and high, or step and what is known of it, of two layers
    assert not any(torch.equal(whole.state_dict()[n], prepared().state_dict()[n]) for n in names)
    x = examples().tensors[0]
    assert torch.equal(qat.convert(resumed)(x), qat.convert(whole)(x))


@pytest.mark.parametrize("scheduler", ["StepLR", "LambdaLR", "SequentialLR", "CosineAnnealingWarmRestarts"])
def test_other_schedules_go_on(tmp_path, scheduler):
    def schedules(optimizer):
        lr = torch.optim.lr_scheduler
        if scheduler == "SequentialLR":
            return lr.SequentialLR(optimizer, [lr.LinearLR(optimizer), lr.ExponentialLR(optimizer, 0.9)], [7])
        argument = {"StepLR": 3, "LambdaLR": lambda n: 1 / (1 + n), "CosineAnnealingWarmRestarts": 4}
        return getattr(lr, scheduler)(optimizer, argument[scheduler])

    def run(**changed):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return fit(model, optimizer=optimizer, schedule=schedules(optimizer), **changed), model.state_dict()

    with pytest.raises(Stop):
        run(loss=breaking(17), checkpoint=tmp_path / "run.pt")
    (history, weights), (again, resumed) = run(), run(checkpoint=tmp_path / "run.pt")
    assert columns(again) == columns(history)
    assert_same_bits(resumed, weights)


# ----- what is refused


def sgd(model):
    return {"optimizer": torch.optim.SGD(model.parameters(), lr=0.02), "schedule": None}


def other_rate(model):
    return {"optimizer": torch.optim.AdamW(model.parameters(), lr=0.5), "schedule": None}


@pytest.mark.parametrize(
    "model, change, message",
    [
        (network, lambda model: {"epochs": 5}, "epochs is 4 there and 5 here"),
        (network, lambda model: {"clip_norm": 1.0}, "clip_norm is None there and 1.0 here"),
        (network, lambda model: {"autocast": torch.bfloat16}, "autocast is None there"),
        (network, lambda model: {"train": in_a_list()[:3]}, "steps is 5 there and 3 here"),
        (network, sgd, "optimizer is AdamW there and SGD here"),
        (network, lambda model: {"schedule": None}, "schedule is OneCycleLR there and NoneType here"),
        (network, lambda model: tools(model) | other_rate(model), "schedule is OneCycleLR"),
        (lambda: nn.Sequential(*network()[:3], nn.Dropout(0.5), network()[4]), lambda model: {},
         r"module '3' is Dropout\(p=0.3, inplace=False\) there and Dropout\(p=0.5"),
        (lambda: nn.Linear(FEATURES, CLASSES), lambda model: {}, "module '' is Sequential.* there and Lin"),
        (lambda: qat.prepare(network()), lambda model: {}, "module '0' is Linear.* there and TrainingLinear"),
    ],
)  # fmt: skip
def test_the_checkpoint_of_another_run_is_refused(tmp_path, model, change, message):
    path = tmp_path / "run.pt"
    fit(network(), checkpoint=path)
    before = path.read_bytes()
    other = model()
    weights = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=message):
        fit(other, checkpoint=path, **change(other))
    assert_same_bits(other.state_dict(), weights)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rate": 0.2}, "learning rate of group 1 is 0.1 there and 0.2 here"),
        ({"momentum": 0.5}, "the optimizer's momentum is 0.9 there and 0.5 here"),
        ({"first": 3}, "parameters of group 0 is 4 there and 3 here"),
        ({"shape": 5}, r"shape of 'extra' is \[4\] there and \[5\] here"),
    ],
)
def test_another_optimizer_or_parameter_is_refused(tmp_path, change, message):
    def run(rate=0.1, momentum=0.9, first=4, shape=4):
        model = network()
        model.extra = nn.Parameter(torch.zeros(shape))
        parameters = [*model[:2].parameters()], [*model[4].parameters()]
        groups = [{"params": parameters[0][:first]}, {"params": parameters[1], "lr": rate}]
        optimizer = torch.optim.SGD(groups, lr=0.01, momentum=momentum)
        return fit(model, optimizer=optimizer, schedule=None, checkpoint=tmp_path / "run.pt")

    run()
    with pytest.raises(ValueError, match=message):
        run(**change)


class Harmful:
    """Its pickle makes a folder when it is read."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_reading_a_checkpoint_runs_no_code(tmp_path):
    torch.save({"made": Harmful(tmp_path / "made")}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match="run.pt is not a checkpoint that fit"):
        fit(network(), checkpoint=tmp_path / "run.pt")
    assert os.listdir(tmp_path) == ["run.pt"]


@pytest.mark.parametrize("content", ["text", "empty", "cut", "state dict", "tensor"])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "run.pt"
    fit(network(), checkpoint=path)
    if content in ("state dict", "tensor"):
        torch.save(network().state_dict() if content == "state dict" else torch.ones(3), path)
    else:
        whole = path.read_bytes()
        path.write_bytes({"text": b"hello", "empty": b"", "cut": whole[: len(whole) // 2]}[content])
    with pytest.raises(ValueError, match="run.pt is not a checkpoint that fit"):
        fit(network(), checkpoint=path)


def test_a_failing_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    path, save, saves = tmp_path / "run.pt", torch.save, []

    def full(state, file):
        saves.append(1)
        save(state, file)
        if len(saves) == 3:
            file.write_bytes(file.read_bytes()[:100])
            raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        fit(network(), checkpoint=path)
    assert os.listdir(tmp_path) == ["run.pt"]
    assert len(torch.load(path, weights_only=True)["history"]["seconds"]) == 2


def test_a_checkpoint_is_replaced_and_never_written_over(tmp_path):
    path, link = tmp_path / "run.pt", tmp_path / "link.pt"
    with pytest.raises(Stop):
        fit(network(), loss=breaking(10), checkpoint=path)
    os.link(path, link)
    before = path.read_bytes()
    fit(network(), checkpoint=path)
    assert link.read_bytes() == before != path.read_bytes()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("call, where", [(17, "epoch 3 of 4, step 3 of 5"), (21, "epoch 3 of 4, validation")])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, call, where, bad):
    path, model = tmp_path / "run.pt", network()
    settings = tools(model)
    steps = []
    settings["optimizer"].register_step_post_hook(lambda *_: steps.append(1))
    with pytest.raises(FloatingPointError, match=rf"{where}: loss {bad}. Lower the learning rate"):
        fit(model, **settings, loss=breaking(call, lambda: torch.tensor(bad)), checkpoint=path)
    assert len(steps) == (12 if call == 17 else 15)  # the bad loss moved nothing
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert len(torch.load(path, weights_only=True)["history"]["seconds"]) == 2


def test_empty_batches_are_refused():
    model = network()
    some, none = in_a_list(), DataLoader(examples(3), 8, drop_last=True)
    with pytest.raises(ValueError, match="train_batches is empty"):
        training.fit(model, none, some, **tools(model))
    with pytest.raises(ValueError, match="validation_batches is empty"):
        training.fit(model, some, [], **tools(model))
    with pytest.raises(ValueError, match="batches is empty"):
        training.evaluate(model, [])


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"clip_norm": 0.0}, {"clip_norm": math.nan}, {"autocast": torch.float16}],
)
def test_settings_out_of_range_are_refused(wrong):
    model = network()
    weights = copy.deepcopy(model.state_dict())
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"got .*{name}={value}"):
        fit(model, **wrong)
    assert_same_bits(model.state_dict(), weights)


if __name__ == "__main__":
    torch.set_num_threads(1)
    fit(network(), loss=breaking(17, lambda: os.kill(os.getpid(), signal.SIGKILL)), checkpoint=sys.argv[1])
