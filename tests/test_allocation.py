"""Bits for each layer: the optimum against trying everything, sizes against stored tensors, KL against scipy."""

import copy
import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_qat import MODELS, images, logits, seeded_net, train
from torch import nn

from qft_utils.allocation import allocate, kl_to, random_allocations, sensitivity, sizes
from qft_utils.qat import convert, prepare, set_bits
from qft_utils.qat.inspect import packed_layers, training_layers

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTHS = [2, 3, 4, 6, 8]


def everything(table):
    """All allocations of a table."""
    return [dict(zip(table, widths, strict=True)) for widths in product(*table.values())]


def total(table, chosen):
    return math.fsum(table[name][bits] for name, bits in chosen.items())


@st.composite
def problems(draw):
    """Costs of any size and sign, resources, and a budget between the least and somewhat above the most."""
    unit = 10.0 ** draw(st.integers(-6, 3))
    widths = {f"layer{i}": draw(st.lists(st.sampled_from(WIDTHS), min_size=1, unique=True)) for i in range(4)}
    cost = {n: {b: unit * draw(st.integers(-1000, 100_000)) / 1000 for b in bits} for n, bits in widths.items()}
    resource = {n: {b: draw(st.integers(1, 10**8)) for b in bits} for n, bits in widths.items()}
    sums = sorted(total(resource, chosen) for chosen in everything(resource))
    budget = draw(st.sampled_from(sums)) + draw(st.sampled_from([0, 0, 1, sums[-1]]))
    return cost, resource, budget


def assert_best(cost, resource, budget):
    allowed = [chosen for chosen in everything(cost) if total(resource, chosen) <= budget]
    best = min(total(cost, chosen) for chosen in allowed)
    chosen = allocate(cost, resource, budget)
    assert chosen in allowed, f"{chosen} takes {total(resource, chosen)}, more than {budget}"
    span = max(max(of.values()) - min(of.values()) for of in cost.values())
    assert total(cost, chosen) <= best + 1e-10 * span


@settings(deadline=None, max_examples=150)
@given(problems())
def test_no_other_allocation_is_better(problem):
    assert_best(*problem)


def test_a_rounded_sum_fits_the_budget_it_stands_for():
    resource = {"a": {4: 0.1, 8: 0.2}, "b": {4: 0.1, 8: 0.2}}
    cost = {"a": {4: 1.0, 8: 0.0}, "b": {4: 2.0, 8: 0.0}}
    assert 0.1 + 0.2 > 0.3
    assert allocate(cost, resource, 0.3) == {"a": 4, "b": 8}
    resource["b"][8] += 1e-11  # within the solver's tolerance
    assert allocate(cost, resource, 0.3) == {"a": 8, "b": 4}, "what is above the budget was taken"


@settings(deadline=None, max_examples=50)
@given(problems(), st.integers(0, 10**8))
def test_a_larger_budget_never_costs_more(problem, more):
    cost, resource, budget = problem
    before, after = (total(cost, allocate(cost, resource, b)) for b in (budget, budget + more))
    assert after <= before + 1e-10 * abs(before)


@pytest.mark.parametrize("seed", range(12))
def test_as_good_as_dynamic_programming_on_many_layers(seed):
    rng, names = np.random.default_rng(seed), [f"layer{i}" for i in range(40)]
    cost = {n: {b: float(rng.lognormal(0, 4) * 4.0**-b) for b in WIDTHS} for n in names}
    resource = {n: {b: int(b * size) for b in WIDTHS} for n, size in zip(names, rng.integers(1, 1000, 40), strict=True)}
    budget = sum(int(0.45 * of[8]) for of in resource.values())
    best = np.zeros(budget + 1)  # [r]: least cost of the layers so far, if they take r at most
    for name in names:
        ways = [(resource[name][b], cost[name][b]) for b in WIDTHS]
        best = np.min([np.r_[np.full(r, np.inf), best[: budget + 1 - r]] + c for r, c in ways], 0)
    chosen = allocate(cost, resource, budget)
    assert total(resource, chosen) <= budget
    assert total(cost, chosen) == pytest.approx(best[budget], rel=1e-9, abs=0)


GOOD = {"a": {2: 1.0, 8: 0.0}, "b": {2: 3.0, 8: 0.0}}


@pytest.mark.parametrize(
    ("cost", "resource", "budget", "message"),
    [
        (GOOD, GOOD, -1, r"budget=-1 is below 0\.0"),
        (GOOD, GOOD, math.nan, "budget=nan"),
        (GOOD, {"a": GOOD["a"]}, 9, r"same layers, .*\('b', 2\), \('b', 8\)"),
        (GOOD, GOOD | {"b": {2: 1}}, 9, r"same widths, .*\('b', 8\)"),
        (GOOD, GOOD | {"c": {2: 1}}, 9, r"\('c', 2\)"),
        (GOOD | {"b": {}}, GOOD | {"b": {}}, 9, "one at least"),
        ({}, {}, 9, "one at least"),
        (GOOD | {"b": {2: math.nan, 8: 0}}, GOOD, 9, "cost of b at 2 bits is nan: leave this width out"),
        (GOOD, GOOD | {"b": {2: 1, 8: math.inf}}, 9, "resource of b at 8 bits is inf"),
    ],
)
def test_what_cannot_be_allocated_is_refused(cost, resource, budget, message):
    with pytest.raises(ValueError, match=message):
        allocate(cost, resource, budget)


@pytest.mark.parametrize(("budget", "slack"), [(60, 0.2), (100, 0.1), (120, 0.1), (42, 0.2)])
def test_random_allocations_are_equally_likely(budget, slack):
    numbers = np.random.default_rng(0).integers(1, 6, 5)
    resource = {f"layer{i}": {b: int(b * n) for b in (2, 4, 8)} for i, n in enumerate(numbers)}
    inside = [c for c in everything(resource) if (1 - slack) * budget <= total(resource, c) <= budget]
    drawn = Counter(map(str, random_allocations(resource, budget, count=3000, seed=1, slack=slack)))
    assert set(drawn) <= set(map(str, inside))
    assert len(inside) > 5
    counts = [drawn[str(chosen)] for chosen in inside]
    assert stats.chisquare(counts).pvalue > 1e-4


def test_random_allocations_follow_the_seed_and_find_large_models():
    names = {f"layer{i}": 10 ** (i % 4) * 100 for i in range(60)}
    resource = {name: {b: n * b // 8 for b in range(2, 9)} for name, n in names.items()}
    for fraction in (0.3, 0.5, 0.9):
        budget = int(fraction * total(resource, dict.fromkeys(names, 8)))
        first, again, other = (random_allocations(resource, budget, count=9, seed=seed) for seed in (0, 0, 1))
        assert first == again != other
        assert all(0.97 * budget <= total(resource, chosen) <= budget for chosen in first + other)


@pytest.mark.parametrize("budget", [3, 9, 100])
def test_random_allocations_that_do_not_exist(budget):
    with pytest.raises(ValueError, match="0 of 5 allocations found .* raise slack"):
        random_allocations({"a": {2: 4, 8: 16}}, budget, count=5, seed=0)


def three_kinds():
    """An embedding, a convolution with a bias, and a Linear; no size is a multiple of 8 codes."""
    return nn.ModuleDict({"rows": nn.Embedding(7, 6), "conv": nn.Conv2d(2, 5, 3), "fc": nn.Linear(6, 11, bias=False)})


KINDS = [
    *product([three_kinds], ["channel", "tensor", 3], [False, True]),
    *product([MODELS["gpt2"]], ["channel", "tensor", 4], [False, True]),  # its head and its embedding are tied
    (seeded_net, "channel", False),  # convolutions with batch norms, one of them depthwise
    (seeded_net, "tensor", True),
]


@pytest.mark.parametrize(("make", "granularity", "learned_step"), KINDS)
def test_sizes_are_those_of_the_stored_tensors(make, granularity, learned_step):
    model, stored = prepare(make(), 8, None, granularity=granularity, learned_step=learned_step), {}
    for bits in WIDTHS:
        set_bits(model, bits)
        weights = {}
        for name, layer in packed_layers(convert(model)).items():
            weights.setdefault(layer.packed, (name, sum(t.nbytes for t in layer.packed.state_dict().values())))
        for name, size in weights.values():
            stored.setdefault(name, {})[bits] = size
    assert sizes(model, WIDTHS) == stored


def test_a_weight_with_two_batch_norms_is_stored_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
            self.bn1, self.bn2, self.conv2.weight = nn.BatchNorm2d(4), nn.BatchNorm2d(4), self.conv1.weight

        def forward(self, x):
            return self.bn2(self.conv2(self.bn1(self.conv1(x))))

    model = prepare(Twice(), 3, None)
    packed = {layer.packed for layer in packed_layers(convert(model)).values()}
    assert len(packed) == 2
    assert sizes(model, [3]) == {"conv1": {3: sum(t.nbytes for p in packed for t in p.state_dict().values())}}


@pytest.mark.parametrize("learned_step", [False, True])
def test_sensitivity_is_the_increase_of_the_score_and_changes_nothing(learned_step):
    model = prepare(seeded_net(), 6, learned_step=learned_step)
    train(model, images())
    model.conv2.eval()
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    scored = []

    def score(scoring):
        assert not scoring.training and not scoring.conv1.weight_quantizer.training
        scored.append([layer.weight_quantizer.bits for layer in training_layers(scoring).values()])
        return logits(scoring, images()).square().sum().item()

    table = sensitivity(model, score, [2, 6, 3])
    assert scored == [[6, 6, 6], [2, 6, 6], [3, 6, 6], [6, 2, 6], [6, 3, 6], [6, 6, 2], [6, 6, 3]]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    direct, base = copy.deepcopy(model), score(copy.deepcopy(model).eval())
    set_bits(direct, 2, only=["fc"])
    assert table["fc"] == {2: score(direct.eval()) - base, 6: 0.0, 3: table["fc"][3]}
    assert list(table) == ["conv1", "conv2", "fc"] and table["fc"][2] != 0 != table["fc"][3]


def test_sensitivity_of_a_tied_weight_and_after_a_failure():
    model, calls = prepare(MODELS["gpt2"](), act_bits=None), []

    def score(scoring):
        calls.append([n for n, m in training_layers(scoring).items() if m.weight_quantizer.bits != 8])
        if len(calls) == 3:
            raise OverflowError
        return 0.0

    with pytest.raises(OverflowError):
        sensitivity(model, score, [4])
    assert calls[1] == ["transformer.wte", "lm_head"]
    assert {layer.weight_quantizer.bits for layer in training_layers(model).values()} == {8} and model.training
    assert "lm_head" not in sensitivity(model, lambda _: 0.0, [8])
    with pytest.raises(ValueError, match="got 9"):
        sensitivity(model, score, [4, 9])
    assert len(calls) == 3, "it scored before it looked at all widths"


@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_kl_is_that_of_scipy(shape):
    torch.manual_seed(0)
    p, q = (nn.Sequential(nn.Linear(4, math.prod(shape)), nn.Unflatten(1, shape)) for _ in range(2))
    batches = [torch.randn(n, 4) * 5 for n in (7, 2, 1)]  # the last ones are smaller: examples count, not batches
    with torch.no_grad():
        of_p, of_q = (net(torch.cat(batches)).double().softmax(-1).numpy() for net in (p, q))
    expected = stats.entropy(of_p, of_q, axis=-1).mean()
    assert kl_to(p, batches)(q) == pytest.approx(expected, rel=1e-6)
    assert kl_to(q, batches)(p) != pytest.approx(expected, rel=1e-2)
    assert kl_to(p, batches)(p) == 0.0
    with pytest.raises(ValueError, match="batches is empty"):
        kl_to(p, [])


def test_kl_is_taken_without_dropout_and_of_the_reference_as_it_was():
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3))
    score, other = kl_to(net, [torch.ones(2, 4)]), copy.deepcopy(net).train()
    assert score(other) == 0.0
    with torch.no_grad():
        net[1].weight.mul_(-1)
    assert score(other) == 0.0 < score(net)
