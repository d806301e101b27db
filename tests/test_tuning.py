"""The search finds the bottom of a valley, wherever it begins, and tries no more than it must."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qft_utils.tuning import search


@given(st.data())
def test_the_bottom_of_a_valley_is_found_from_anywhere(data):
    ladder = sorted(data.draw(st.sets(st.floats(1e-6, 1e3), min_size=3, max_size=12)))
    begin = data.draw(st.integers(0, len(ladder) - 3))
    bottom = data.draw(st.integers(0, len(ladder) - 1))
    tried = []

    def loss_at(value):
        tried.append(value)
        return abs(ladder.index(value) - bottom) ** 1.5

    assert search(loss_at, ladder, begin) == ladder[bottom]
    assert len(tried) == len(set(tried))
    first, last = (edge(map(ladder.index, tried)) for edge in (min, max))
    assert last - first + 1 == len(tried)  # no gaps
    assert first >= min(begin, bottom - 1) and last <= max(begin + 2, bottom + 1)


def test_neighbours_of_the_best_have_been_tried():
    losses, tried = {0.1: 3.0, 0.2: 1.0, 0.4: 2.0, 0.8: 0.0}, []
    assert search(lambda value: tried.append(value) or losses[value], list(losses), 0) == 0.2
    assert tried == [0.1, 0.2, 0.4]  # a second valley stays unseen


def test_runs_that_diverge_lose():
    losses = {1.0: 0.9, 2.0: math.inf, 4.0: math.inf, 0.5: 0.8, 0.25: 0.85}
    assert search(losses.__getitem__, sorted(losses), 2) == 0.5


def test_of_equals_the_earlier_wins():
    assert search(lambda value: 1.0, [1, 2, 3, 4, 5], 1) == 1


@pytest.mark.parametrize(("count", "begin"), [(2, 0), (0, 0), (5, 3), (5, -1)])
def test_three_values_are_needed(count, begin):
    with pytest.raises(ValueError, match=f"begin={begin}.*{count} values"):
        search(lambda value: 1.0, list(range(count)), begin)
