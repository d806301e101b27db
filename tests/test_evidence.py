"""Exhibit B of chapter 4: one layer at a time, with fresh steps; and the chapter's own losses against the package's."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qft_utils import allocation, distillation, evidence, narrowing, qat
from qft_utils.qat.inspect import training_layers

pytestmark = pytest.mark.usefixtures("one_thread")


class Tiny(nn.Module):
    """A body of two layers, and a head of the name that stays in eight bits."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.classifier = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.classifier(self.second(self.first(x).relu()).relu())


@pytest.fixture
def inputs() -> torch.Tensor:
    return torch.randn(64, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def student(inputs) -> nn.Module:
    torch.manual_seed(0)
    model = qat.prepare(Tiny(), 8, 8, learned_step=True)
    qat.calibrate(model, [inputs])
    return model


@pytest.fixture(scope="module")
def by_hand(defined_in) -> dict:
    return defined_in("04_distillation", ["distillation_loss", "hidden_loss"])


def test_each_entry_is_the_score_of_a_copy_that_was_narrowed_for_training(student, inputs):
    reference = Tiny()
    score = allocation.kl_to(reference, [inputs])
    table = evidence.fresh_sensitivity(student, score, [2, 3, 8])
    healthy = score(student)
    assert sorted(table) == ["first", "second"]
    for name, of in table.items():
        assert of[8] == 0
        for bits in (2, 3):
            assert of[bits] == pytest.approx(score(narrowing.narrow(copy.deepcopy(student), {name: bits})) - healthy)


def test_keeping_the_range_would_measure_a_layer_that_is_gone(student):
    """With the range kept every weight rounds to zero, which says nothing about two bits."""
    kept, fresh = copy.deepcopy(student), narrowing.narrow(copy.deepcopy(student), {"second": 2})
    qat.set_bits(kept, 2, only=["second"])
    layers = [training_layers(model)["second"] for model in (kept, fresh)]
    gone, there = ((layer.weight_quantizer(layer.weight) == 0).float().mean() for layer in layers)
    assert gone == 1 and there < 0.8


def test_the_student_ends_as_it_began_also_where_the_score_fails(student, inputs):
    student.train()
    student.first.eval()
    before = copy.deepcopy(student.state_dict())
    calls = []

    def score(model):
        calls.append(model.training)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 0.0

    evidence.fresh_sensitivity(student, lambda model: 0.0, [2, 4])
    modes = student.training, student.first.training, student.second.training
    assert modes == (True, False, True)
    after = student.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    with pytest.raises(KeyboardInterrupt):
        evidence.fresh_sensitivity(student, score, [2, 4])
    assert (student.training, student.first.training) == (True, False) and calls == [False] * 3


def test_sizes_are_those_of_the_body(student):
    sizes = evidence.body_sizes(student, [2, 8])
    assert sizes == {"first": {2: 8 * 16 // 4 + 64, 8: 8 * 16 + 64}, "second": {2: 16 * 16 // 4 + 64, 8: 16 * 16 + 64}}


def test_widths_out_of_range_are_refused(student):
    with pytest.raises(ValueError, match="got 9"):
        evidence.fresh_sensitivity(student, lambda model: 0.0, [9])


@given(st.integers(1, 16), st.integers(2, 5), st.floats(0.5, 20), st.floats(0, 1), st.integers(0, 2**32))
def test_the_chapters_loss_is_the_packages(by_hand, n, classes, temperature, alpha, seed):
    by_hand = by_hand["distillation_loss"]
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(n, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(classes, (n,), generator=generator)
    expected = distillation.distillation_loss(student, teacher, labels, temperature=temperature, alpha=alpha)
    assert by_hand(student, teacher, labels, temperature, alpha).item() == pytest.approx(expected.item(), rel=1e-9)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**32))
def test_the_chapters_hidden_loss_is_the_packages(by_hand, n, length, width, seed):
    by_hand = by_hand["hidden_loss"]
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(n, length, width, generator=generator) for _ in range(2))
    mask = torch.randint(2, (n, length), generator=generator)
    mask[0, 0] = 1
    expected = distillation.hidden_loss(student, teacher, mask).item()
    assert by_hand(student, teacher, mask).item() == pytest.approx(expected, rel=1e-5)
