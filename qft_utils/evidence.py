"""Chapter 4's exhibit B: how much one layer alone harms where the steps are learned.

`allocation.sensitivity` keeps a learned step's range when it narrows a layer, and a range that suits eight bits rounds
nearly every two-bit weight to zero. Here the steps start anew, as they do when a layer is narrowed for training.
"""

import copy
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from qft_utils import allocation, narrowing, qat
from qft_utils.qat.inspect import training_layers


def fresh_sensitivity(
    student: nn.Module, score: Callable[[nn.Module], float], widths: Sequence[int]
) -> dict[str, dict[int, float]]:
    """How much the score rises when one layer of the body alone is narrowed, for each layer and width.

    student: prepared; it is in evaluation mode meanwhile and ends with the widths and the state that it had.
    score: what shall be small, such as `allocation.kl_to`; called once, and once for each entry but for the width that
    a layer has, which is 0. Increases can be negative. Raises ValueError for a width outside 2..8.
    """
    modes = {module: module.training for module in student.modules()}
    layers, table = training_layers(student), {name: dict.fromkeys(widths, 0.0) for name in narrowing.body(student)}
    try:
        base = score(student.eval())
        for name, of in table.items():
            quantizer = layers[name].weight_quantizer
            own, state = quantizer.bits, copy.deepcopy(quantizer.state_dict())
            try:
                for bits in [bits for bits in widths if bits != own]:
                    narrowing.narrow(student, {name: bits})
                    of[bits] = score(student) - base
            finally:
                qat.set_bits(student, own, only=[name])
                quantizer.load_state_dict(state)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return table


def body_sizes(student: nn.Module, widths: Sequence[int]) -> Mapping[str, Mapping[int, int]]:
    """`allocation.sizes` of the layers whose widths change."""
    sizes = allocation.sizes(student, widths)
    return {name: sizes[name] for name in narrowing.body(student)}
