"""Proportions in every window, exact at any distance, and the same however positions are asked for."""

from fractions import Fraction

import numpy as np
import pytest

from deberta_dist.data.blend import Blend

WEIGHTS = [[7], [1, 1], [7, 3], [1, 60], [2, 2, 2, 2, 2], [12, 6, 38, 31, 78], [1] * 6 + [50], [97, 1, 3, 11, 29]]


def largest_deviations(blend: Blend, weights: list[int]) -> list[Fraction]:
    """Of each source, over all windows of up to two periods at any place, counted one by one."""
    period, found = sum(weights), []
    sources = np.array(blend.sources_at(0, 3 * period))
    for source, weight in enumerate(weights):
        before = np.concatenate(([0], np.cumsum(sources == source)))
        found.append(max(
            Fraction(int(np.abs((before[length:] - before[:-length]) * period - weight * length).max()), period)
            for length in range(1, 2 * period + 1)
        ))  # fmt: skip
    return found


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_window_has_the_proportions(weights: list[int]) -> None:
    blend = Blend(weights)
    assert blend.shares == [Fraction(weight, sum(weights)) for weight in weights]
    for deviation, bound in zip(largest_deviations(blend, weights), blend.bounds, strict=True):
        assert deviation < bound or len(weights) == 1
    expected = {1: 0, 2: 1}.get(len(weights))
    assert blend.bounds == [expected] * len(weights) if len(weights) < 3 else max(blend.bounds) < 3.36


def test_no_weights_have_a_bound_above_that_of_fibonacci() -> None:
    weights, joined, beside = [1, 10**6], 10**6 + 1, 10**6 + 1
    for _ in range(15):  # each is just too heavy to be joined before
        weights.append(beside)
        joined, beside = joined + beside, max(joined, beside) + 1
    assert 3.35 < max(Blend(weights).bounds) < 3.36
    rng = np.random.default_rng(0)
    for _ in range(300):
        weights = [int(weight) for weight in np.exp(rng.uniform(0, 20, rng.integers(3, 40)))]
        assert min(Blend(weights).bounds) >= 1 and max(Blend(weights).bounds) < 3.36


def test_nothing_is_rounded_and_any_position_is_reached_at_once() -> None:
    weights = [123_456_789_123, 987_654_321, 5, 31_415_926_535]
    blend, total = Blend(weights), 123_456_789_123 + 987_654_321 + 5 + 31_415_926_535
    assert blend.consumed(1000 * total) == [1000 * weight for weight in weights]
    assert blend.sources_at(1000 * total + 3, 200) == blend.sources_at(3, 200)
    tenths = [Fraction("0.1"), Fraction("0.2"), Fraction("0.7")]
    assert Blend(tenths).consumed(10**15) == [10**14, 2 * 10**14, 7 * 10**14]


def test_what_is_consumed_are_the_sources_before() -> None:
    blend = Blend([5, 3, 2, 2])
    sources = blend.sources_at(0, 500)
    for start in (0, 1, 9, 12, 123):
        assert blend.sources_at(start, 40) == sources[start : start + 40]
        assert blend.consumed(start) == np.bincount(sources[:start], minlength=4).tolist()
