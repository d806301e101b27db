"""Which layer gets how many bits: measure what narrowing each one costs, then spend a budget where it helps most.

    cost = sensitivity(model, kl_to(float_model, batches), widths=[2, 3, 4, 8])     # prepared, all at 8 bits
    chosen = allocate(cost, sizes(model, [2, 3, 4, 8]), budget=200_000)
    for name, bits in chosen.items():
        set_bits(model, bits, only=[name])

Tables are {layer: {bits: number}}. Layers that share a weight are one entry, under the name of the first.
"""

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, brentq, milp
from scipy.special import softmax
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from qft_utils.packing import packed_size
from qft_utils.qat import set_bits
from qft_utils.qat.inspect import training_layers
from qft_utils.qat.layers import TrainingLayer
from qft_utils.qat.quantizers import WeightQuantizer, check_bits

Table = Mapping[str, Mapping[int, float]]


def sensitivity(
    model: nn.Module, score: Callable[[nn.Module], float], widths: Sequence[int]
) -> dict[str, dict[int, float]]:
    """How much the score rises when the weight of one layer alone is narrowed, for each layer and width.

    model: prepared; all other layers keep the widths that they have. It is in evaluation mode meanwhile, and ends
    as it began, also where `score` fails.
    score: what shall be small, such as a validation loss; called once, and once per entry except for the width that
    the layer has already, which is 0. It must give equal models equal scores. Increases can be negative.
    Raises ValueError for a width outside 2..8 or a model that is not prepared.
    """
    own = {name: layers[0].weight_quantizer.bits for name, layers in _shared(model).items()}
    table = {name: dict.fromkeys(map(check_bits, widths), 0.0) for name in own}
    todo = [(name, bits) for name in table for bits in table[name] if bits != own[name]]
    modes = {module: module.training for module in model.modules()}
    try:
        base = score(model.eval())
        for name, bits in tqdm(todo, "sensitivity", leave=False):
            with _narrowed(model, name, bits):
                table[name][bits] = score(model) - base
    finally:
        for module, mode in modes.items():
            module.training = mode
    return table


@contextmanager
def _narrowed(model: nn.Module, name: str, bits: int) -> Iterator[None]:
    quantizer = training_layers(model)[name].weight_quantizer
    before, state = quantizer.bits, copy.deepcopy(quantizer.state_dict())
    set_bits(model, bits, only=[name])
    try:
        yield
    finally:
        set_bits(model, before, only=[name])
        quantizer.load_state_dict(state)  # a learned step that was scaled there and back is off by a rounding


def kl_to(reference: nn.Module, batches: Collection[Tensor]) -> Callable[[nn.Module], float]:
    """score(model): mean KL(reference || model) of an example, in nats, on batches of inputs (N, ...).

    Outputs are logits (N, classes); of (N, ..., classes), the mean is over every position. Both models are put in
    evaluation mode; the reference runs once. Raises ValueError for no batches.
    """
    if len(batches) == 0:
        raise ValueError("batches is empty: pass at least one batch of inputs")
    expected = list(_logits(reference, batches))

    def score(model: nn.Module) -> float:
        total = count = 0
        for p, q in zip(expected, _logits(model, batches), strict=True):
            log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
            total += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
            count += p[..., 0].numel()
        return total / count

    return score


@torch.no_grad()
def _logits(model: nn.Module, batches: Collection[Tensor]) -> Iterator[Tensor]:
    device = next(model.parameters()).device
    model.eval()
    for batch in batches:
        yield model(batch.to(device)).cpu()


def sizes(model: nn.Module, widths: Sequence[int]) -> dict[str, dict[int, int]]:
    """Bytes of each weight of a prepared model after `convert`: its packed codes and its scales, in float32.

    Raises ValueError for a width outside 2..8 or a model that is not prepared.
    """
    return {
        name: {bits: sum(packed_size(n, bits) + 4 * scales for n, scales in _stored(layers)) for bits in widths}
        for name, layers in _shared(model).items()
    }


def _shared(model: nn.Module) -> dict[str, list[TrainingLayer]]:
    """The layers that have one width together, by the name of the first."""
    names: dict[WeightQuantizer, str] = {}
    found: dict[str, list[TrainingLayer]] = {}
    for name, layer in training_layers(model).items():
        found.setdefault(names.setdefault(layer.weight_quantizer, name), []).append(layer)
    return found


def _stored(layers: list[TrainingLayer]) -> Iterator[tuple[int, int]]:
    """Codes and scales of every weight that `convert` stores: one, unless batch norms make different ones of it."""
    for layer in {(layer.weight, layer.folded): layer for layer in layers}.values():
        weight, quantizer = layer.weight, layer.weight_quantizer
        rows = 1 if quantizer.granularity == "tensor" else len(weight)
        yield weight.numel(), weight.numel() // quantizer.group_size if quantizer.group_size else rows


def allocate(cost: Table, resource: Table, budget: float) -> dict[str, int]:
    """The width of each layer that makes the sum of costs least, with the sum of resources at most `budget`.

    It assumes that what several narrow layers cost together is the sum of what they cost alone. So does HAWQ-V3
    (Yao et al. 2021, arXiv 2011.10680), whose integer linear program this is; layers do interact (Deng et al. 2023,
    arXiv 2307.05657), so measure the model that comes out.
    cost: increases of a score, as from `sensitivity`. resource: bytes, milliseconds, or what the budget is in.
    Raises ValueError for a budget that even the least resources exceed, tables that do not have the same layers and
    widths, or a number that is not finite; RuntimeError if the solver gives up.
    """
    choices = _choices(cost, resource)
    least = math.fsum(min(of.values()) for of in resource.values())
    limit = budget * (1 + 1e-12)  # a sum of milliseconds is rounded; one of bytes has no room for one more
    if not limit >= least:
        raise ValueError(f"budget={budget} is below {least}, the least that these widths take: raise it")
    costs, resources = _from_zero(cost, choices), _from_zero(resource, choices)
    unit = (resources.max() or 1) / 1e3  # the solver's tolerances are absolute: large numbers make them strict
    one_each = np.array([[name == layer for name, _ in choices] for layer in cost], float)
    rules = [LinearConstraint(one_each, 1, 1), LinearConstraint(resources / unit, ub=(limit - least) / unit)]
    while True:
        found = milp(costs / (costs.max() or 1) * 1e5, integrality=1, bounds=Bounds(0, 1), constraints=rules,
                     options={"mip_rel_gap": 0})  # fmt: skip
        if found.x is None:
            raise RuntimeError(f"no allocation was found: {found.message}")
        chosen = dict(choice for choice, x in zip(choices, found.x, strict=True) if x > 0.5)
        if math.fsum(resource[name][bits] for name, bits in chosen.items()) <= limit:
            return chosen
        rules.append(LinearConstraint(found.x.round(), ub=len(cost) - 1))  # above the budget within the tolerance


def _choices(cost: Table, resource: Table) -> list[tuple[str, int]]:
    """Every (layer, width), if both tables have the same ones, and finite numbers for them."""
    choices, others = ([(name, bits) for name in table for bits in table[name]] for table in (cost, resource))
    if set(choices) != set(others) or not all(cost.values()) or not cost:
        odd = sorted(set(choices) ^ set(others))
        raise ValueError(f"cost and resource need the same layers, with the same widths, one at least: see {odd}")
    for what, table in (("cost", cost), ("resource", resource)):
        for name, bits in choices:
            if not math.isfinite(table[name][bits]):
                remedy = "leave this width out of both tables, or measure it again"
                raise ValueError(f"{what} of {name} at {bits} bits is {table[name][bits]}: {remedy}")
    return choices


def _from_zero(table: Table, choices: list[tuple[str, int]]) -> np.ndarray:
    """What each choice adds to the least of its layer: the optimum stays where it is, and rounding does less."""
    return np.array([table[name][bits] - min(table[name].values()) for name, bits in choices], float)


def random_allocations(
    resource: Table, budget: float, *, count: int, seed: int, slack: float = 0.03
) -> list[dict[str, int]]:
    """Independent draws from all allocations that take (1 - slack) budget to budget, each equally likely.

    A layer's widths are drawn with probabilities proportional to exp(-tilt * resource), whose tilt brings the sums
    near the budget. Allocations of equal sums are equally likely then, and the others after a rejection in proportion
    to exp(tilt * sum). Equal seeds give equal draws, which can repeat one another.
    Raises ValueError if `count` such allocations are not found in a thousand times as many draws.
    """
    tables = [np.array(list(of.values()), float) for of in resource.values()]
    low = max((1 - slack) * budget, sum(t.min() for t in tables))
    high = min(budget, sum(t.max() for t in tables))
    tilt = _tilt(tables, (low + high) / 2)
    rng, draws = np.random.default_rng(seed), 1000 * count
    picks = np.stack([rng.choice(len(t), draws, p=softmax(-tilt * t)) for t in tables])  # (layers, draws)
    sums = sum(t[pick] for t, pick in zip(tables, picks, strict=True))
    kept = rng.random(draws) < np.exp(np.minimum(tilt * (sums - (high if tilt > 0 else low)), 0))
    found = picks.T[(low <= sums) & (sums <= high) & kept][:count]
    if len(found) < count:
        raise ValueError(f"{len(found)} of {count} allocations found that take {low:g} to {high:g}: raise slack")
    return [{name: list(of)[k] for (name, of), k in zip(resource.items(), row, strict=True)} for row in found]


def _tilt(tables: list[np.ndarray], target: float) -> float:
    """The tilt at which the sum is `target` in the mean; 0 where none is."""

    def excess(tilt: float) -> float:
        return sum(softmax(-tilt * t) @ t for t in tables) - target

    end = 1e6 / max(t.max() for t in tables)
    return brentq(excess, -end, end) if excess(-end) > 0 > excess(end) else 0.0
