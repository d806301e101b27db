"""Chapter 3's recovery, its own and the package's: pictures, what is narrowed and what holds still, training."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import TensorDataset

from qft_utils import data, fashion, qat, recovery, training
from qft_utils.qat.inspect import training_layers
from qft_utils.qat.quantizers import LearnedInputQuantizer, LearnedWeightQuantizer

SETTINGS = recovery.Settings(learning_rate=0.01)
INSIDE = ("conv", "wide")

pytestmark = pytest.mark.usefixtures("one_thread")


class Tiny(nn.Module):
    """The names of EfficientNet-Lite0's first and last layer, around two others."""

    def __init__(self):
        super().__init__()
        self.conv_stem, self.bn1 = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.conv, self.bn2 = nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4)
        self.relu, self.wide, self.drop = nn.ReLU6(), nn.Linear(4, 8), nn.Dropout(0.1)
        self.classifier = nn.Linear(8, 3)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv_stem(x)))
        x = self.relu(self.bn2(self.conv(x))).mean((2, 3))
        return self.classifier(self.drop(self.wide(x)))


@pytest.fixture
def model() -> nn.Module:
    """In evaluation mode, with running statistics that fit the inputs."""
    torch.manual_seed(5)
    model = Tiny()
    for _ in range(20):
        model(torch.randn(64, 1, 8, 8))
    return model.eval()


@pytest.fixture
def calibration() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 1, 8, 8, generator=generator) for _ in range(4)]


def batches_of(seed: int = 0):
    """96 small pictures of three classes, told apart by their brightness."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (96,), generator=generator)
    images = torch.randn(96, 1, 8, 8, generator=generator) + 1.5 * (labels - 1).reshape(-1, 1, 1, 1)
    return fashion.loader(TensorDataset(images, labels), 8, seed)


def state_of(model) -> dict[str, torch.Tensor]:
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    return {name: value.clone() for name, value in tensors.items()}


def changed(before: dict, model: nn.Module) -> set[str]:
    after = state_of(model)
    assert after.keys() == before.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# The pictures


@pytest.fixture
def numbered(monkeypatch):
    """A training part in which each picture is its own number, and stays so."""
    numbers = torch.arange(data.FASHION_TRAIN)
    monkeypatch.setattr(data, "fashion_mnist", lambda split: {"train": (numbers, numbers)}[split])
    monkeypatch.setattr(fashion, "to_input", lambda images, pixels: images)


@pytest.fixture
def blank(monkeypatch):
    images = torch.zeros(1, 28, 28, dtype=torch.uint8).expand(data.FASHION_TRAIN, -1, -1)
    monkeypatch.setattr(data, "fashion_mnist", lambda split: (images, torch.zeros(data.FASHION_TRAIN)))


def seen_in_fine_tuning() -> set[int]:
    return set(torch.cat([labels for _, labels in fashion.train_batches(fashion.Settings())]).tolist())


def test_calibration_takes_pictures_that_the_fine_tuning_has_seen(numbered):
    drawn = [torch.cat(recovery.calibration_batches(*seed)).tolist() for seed in ((), (0,), (1,))]
    assert [len(batch) for batch in recovery.calibration_batches()] == [256]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(set(numbers)) == 256 for numbers in drawn)
    assert set(drawn[0]) | set(drawn[2]) <= seen_in_fine_tuning()
    assert len(set(drawn[0]) & set(drawn[2])) < 20
    assert drawn[0] != sorted(drawn[0])


def test_calibration_leaves_the_global_generator_alone(blank):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    recovery.calibration_batches(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_are_inputs_of_the_fine_tuned_network(blank):
    black = fashion.to_input(torch.zeros(64, 28, 28, dtype=torch.uint8), fashion.Settings().pixels)
    for inputs in (recovery.calibration_batches()[0], next(iter(recovery.recovery_batches(SETTINGS)))[0]):
        assert inputs.shape[1:] == (3, 64, 64)
        assert inputs.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(inputs[:64], black)


def test_recovery_takes_each_unseen_picture_once(numbered):
    batches = list(recovery.recovery_batches(SETTINGS))
    order = torch.cat([inputs for inputs, _ in batches]).tolist()
    assert torch.cat([labels for _, labels in batches]).tolist() == order
    assert {len(labels) for _, labels in batches} == {64}
    assert len(order) == len(set(order)) == SETTINGS.images
    assert not set(order) & seen_in_fine_tuning()
    assert not set(order) & set(torch.cat(recovery.calibration_batches()).tolist())


def test_the_order_of_recovery_follows_the_seed(numbered):
    def order(**change):
        return torch.cat([labels for _, labels in recovery.recovery_batches(replace(SETTINGS, **change))]).tolist()

    assert order() == order() != order(seed=1)
    assert sorted(order()) == sorted(order(seed=1)) != order()
    assert len(order(images=100, batch_size=30)) == 100


# What is narrowed


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(4, 4), (2, 4), (8, 3)])
@pytest.mark.parametrize("narrow", [recovery.narrow, recovery.narrow_learned])
def test_ends_have_eight_bits_and_others_the_asked_width(model, calibration, narrow, weight_bits, act_bits):
    before = state_of(model)
    layers = training_layers(narrow(model, weight_bits, act_bits, calibration))
    widths = {name: (layer.weight_quantizer.bits, layer.input_quantizer.bits) for name, layer in layers.items()}
    assert widths == dict.fromkeys(recovery.ENDS, (8, 8)) | dict.fromkeys(INSIDE, (weight_bits, act_bits))
    assert not changed(before, model)  # the float model is left as it was
    assert not model.training


@pytest.mark.parametrize("narrow", [recovery.narrow, recovery.narrow_learned])
def test_weights_lie_on_the_levels_of_their_width(model, calibration, narrow):
    layers = training_layers(narrow(model, 3, 3, calibration))
    for name in INSIDE:
        for row in layers[name].quantized_weight().detach().flatten(1):
            assert len(row.unique()) <= 2**3
    for name in recovery.ENDS:
        assert max(len(row.unique()) for row in layers[name].quantized_weight().detach().flatten(1)) > 3


def test_sixteen_times_the_levels_come_nearer_to_float(model, calibration):
    x = torch.randn(64, 1, 8, 8)
    errors = []
    with torch.no_grad():
        for bits in (2, 4, 8):
            narrowed = recovery.narrow(model, bits, bits, calibration).eval()
            errors.append((narrowed(x) - model(x)).square().mean().item())
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


def test_ranges_are_averaged_percentiles_of_the_calibration(model, calibration):
    """NumPy's quantiles of the first layer's inputs; the average gives a new batch one hundredth."""
    observer = training_layers(recovery.narrow(model, 4, 4, calibration))["conv_stem"].input_quantizer.observer
    for end, quantile in ((observer.low, 0.001), (observer.high, 0.999)):
        first, *others = (np.quantile(batch.numpy(), quantile) for batch in calibration)
        for other in others:
            first += 0.01 * (other - first)
        assert end.item() == pytest.approx(first, rel=1e-5)


def test_training_moves_batch_norms_and_weights_but_no_range(model, calibration):
    narrowed = recovery.narrow(model, 4, 4, calibration)
    before = state_of(narrowed)
    far = [(100 * images, labels) for images, labels in batches_of()]  # what an observer would not overlook
    recovery.recover(narrowed, far, SETTINGS)
    moved = changed(before, narrowed)
    assert not {name for name in moved if ".observer." in name}
    assert {"wide.weight", "classifier.bias"} <= moved
    for conv in ("conv_stem", "conv"):
        learned = {f"{conv}.folded.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
        assert learned | {f"{conv}.weight"} <= moved
    assert len([name for name in before if ".observer." in name]) == 2 * 4


def test_learned_steps_start_from_the_first_batch_and_then_learn(model, calibration):
    """Esser et al. 2020, section 2.1: the step starts as 2 mean|x| / sqrt(qmax); signed, of eight bits: 127."""
    narrowed = recovery.narrow_learned(model, 4, 4, calibration)
    layers = training_layers(narrowed)
    assert all(isinstance(layer.weight_quantizer, LearnedWeightQuantizer) for layer in layers.values())
    assert all(isinstance(layer.input_quantizer, LearnedInputQuantizer) for layer in layers.values())
    step = layers["conv_stem"].input_quantizer.step.item()
    assert step == pytest.approx(2 * calibration[0].abs().mean().item() / math.sqrt(127), rel=1e-5)
    weight = layers["wide"].weight.detach().abs().mean(1, keepdim=True)
    torch.testing.assert_close(layers["wide"].weight_quantizer.step.detach(), 2 * weight / math.sqrt(7))
    before = state_of(narrowed)
    recovery.recover(narrowed, batches_of(), SETTINGS)
    steps = {name for name in before if name.endswith(".step")}
    assert len(steps) == 2 * 4
    assert steps <= changed(before, narrowed)


def test_learned_ends_start_as_those_of_eight_bits_do(model, calibration):
    narrowed = training_layers(recovery.narrow_learned(model, 2, 4, calibration))
    wide = qat.prepare(model, 8, 8, learned_step=True)
    qat.calibrate(wide, calibration)
    for name in recovery.ENDS:
        expected = training_layers(wide)[name].weight_quantizer
        torch.testing.assert_close(narrowed[name].weight_quantizer.step, expected.step)
        assert narrowed[name].weight_quantizer.ends == expected.ends


# The extra steps and the chapter


@pytest.fixture(scope="module")
def chapter(defined_in) -> dict:
    return defined_in("03_quantization_aware_training", ["narrow", "recover", "refresh_norms"])


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (2, 5)], ids=str)
def test_the_chapter_narrows_and_recovers_as_the_package_does(chapter, model, calibration, bits):
    made = []
    for module in (vars(recovery), chapter):
        narrowed = module["narrow"](model, *bits, calibration)
        start = state_of(narrowed)
        fresh = state_of(module["refresh_norms"](narrowed, batches_of()))
        made.append((start, fresh, state_of(module["recover"](narrowed, batches_of(), SETTINGS))))
    for ours, theirs in zip(*made, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for earlier, later in zip(made[0], made[0][1:], strict=False):
        assert any(not torch.equal(earlier[name], later[name]) for name in earlier)


def test_refreshed_norms_follow_the_batches_and_nothing_else_moves(model, calibration):
    """PyTorch's own batch norm, with the average of all batches, says where the statistics should go."""
    far = [(3 * images + 1, labels) for images, labels in list(batches_of()) * 12]
    before = state_of(model)
    assert recovery.refresh_norms(model, far) is model
    assert not any(module.training for module in model.modules())
    assert {name.rpartition(".")[2] for name in changed(before, model)} == {
        "running_mean", "running_var", "num_batches_tracked"
    }  # fmt: skip
    assert all(parameter.grad is None for parameter in model.parameters())
    exact = nn.BatchNorm2d(4, momentum=None)
    exact(model.conv_stem(torch.cat([images for images, _ in far])))
    torch.testing.assert_close(model.bn1.running_mean, exact.running_mean, rtol=0.1, atol=0.1)
    torch.testing.assert_close(model.bn1.running_var, exact.running_var, rtol=0.1, atol=0.1)


def test_refreshing_keeps_ranges(model, calibration):
    narrowed = recovery.narrow(model, 4, 4, calibration)
    before = state_of(narrowed)
    recovery.refresh_norms(narrowed, [(100 * images, labels) for images, labels in batches_of()])
    moved = changed(before, narrowed)
    assert moved and all(".folded." in name for name in moved)


@pytest.mark.parametrize("narrow", [recovery.narrow, recovery.narrow_learned, lambda model, *_: model])
def test_the_loss_falls(model, calibration, narrow):
    narrowed = narrow(model, 4, 4, calibration)
    before = training.evaluate(narrowed, batches_of()).loss
    assert recovery.recover(narrowed, batches_of(), replace(SETTINGS, learning_rate=0.05)) is narrowed
    assert not any(module.training for module in narrowed.modules())
    loss, predictions, labels = training.evaluate(narrowed, batches_of())
    assert loss < 0.8 * before
    assert (predictions == labels).float().mean() > 0.5


@pytest.mark.parametrize("narrow", [recovery.narrow, recovery.narrow_learned])
def test_the_same_seed_gives_the_same_weights(model, calibration, narrow):
    """The seed decides the dropout here, whatever has been drawn before."""
    made = []
    for run, torch_seed in ((SETTINGS, 1), (SETTINGS, 2), (replace(SETTINGS, seed=1), 2)):
        torch.manual_seed(torch_seed)
        narrowed = narrow(model, 4, 4, calibration)
        made.append(recovery.recover(narrowed, batches_of(), run))
    first, *others = made
    assert [bool(changed(state_of(first), other)) for other in others] == [False, True]


@pytest.mark.parametrize("change", [{"learning_rate": 0.02}, {"weight_decay": 0.5}], ids=str)
def test_the_weights_depend_on_the_settings(model, calibration, change):
    made = [recovery.narrow(model, 4, 4, calibration) for _ in range(2)]
    for narrowed, run in zip(made, (SETTINGS, replace(SETTINGS, **change)), strict=True):
        recovery.recover(narrowed, batches_of(), run)
    assert "wide.weight" in changed(state_of(made[0]), made[1])


def one_cycle(step: int, steps: int, top: float) -> float:
    """PyTorch's one cycle in a formula: half a cosine from top / 25, up in 0.3 of the steps, and down to 1e-4 of it."""
    up = 0.3 * steps - 1
    start, end, share = (top / 25, top, step / up) if step <= up else (top, top / 25e4, (step - up) / (steps - 1 - up))
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def test_adamw_under_one_cycle_of_the_learning_rate(model, calibration):
    rates, decays, norms = [], set(), []

    def look(optimizer, *_):
        (group,) = optimizer.param_groups
        assert type(optimizer) is torch.optim.AdamW
        rates.append(float(group["lr"]))
        decays.add(group["weight_decay"])
        norms.append(nn.utils.get_total_norm([p.grad for p in group["params"] if p.grad is not None]).item())

    with torch.no_grad():
        model.classifier.weight.mul_(100)  # for gradients that are too long
    handle = register_optimizer_step_pre_hook(look)
    try:
        recovery.recover(recovery.narrow(model, 4, 4, calibration), batches_of(), SETTINGS)
    finally:
        handle.remove()
    assert rates == pytest.approx([one_cycle(step, 12, SETTINGS.learning_rate) for step in range(12)], rel=1e-6)
    assert decays == {SETTINGS.weight_decay}
    assert max(norms) == pytest.approx(1, abs=1e-4)  # clipped
