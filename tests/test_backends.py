"""Four-bit backends: may an adapter train before, beside and behind them? The chapter's own test, run on each."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = ["packed_q4", "torchao_int4", "torchao_nf4", "bitsandbytes_nf4"]
TRAINS = [name for name in BACKENDS if name != "bitsandbytes_nf4"]


@pytest.fixture(scope="module")
def chapter(defined_in):
    return defined_in("05_language_models", [*BACKENDS, "linear", "adapter_gradients", "gradient_error"])


@pytest.mark.parametrize("evaluate_first", [False, True])
@pytest.mark.parametrize("name", TRAINS)
def test_gradients_are_those_of_the_dequantized_copy(chapter, name, evaluate_first):
    @settings(max_examples=8, deadline=None)
    @given(st.integers(0, 1000), st.sampled_from([(64, 64), (192, 128), (128, 320)]))
    def on_random_layers(seed, shape):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 8
        assert chapter["gradient_error"](chapter[name](weight), evaluate_first) < 1e-5

    on_random_layers()


def test_bitsandbytes_on_a_cpu_is_right_until_it_is_evaluated(chapter):
    """When this fails because the last line holds no more, bitsandbytes was mended: chapter 5 must say so."""
    weight = torch.randn(192, 128, generator=torch.Generator().manual_seed(0)) / 8
    layer = chapter["bitsandbytes_nf4"](weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert chapter["gradient_error"](layer, evaluate_first=False) < 1e-5
        assert chapter["gradient_error"](layer, evaluate_first=True) == 1
