"""A bijection for every size, another one for every epoch and seed, the same one every time."""

import numpy as np
import pytest

from deberta_dist.data.sampler import Permutation, position
from deberta_dist.errors import ConfigError


@pytest.mark.parametrize("size", [*range(1, 51), 10_007, 1_000_003])
def test_bijective(size: int) -> None:
    order = Permutation(size, seed=7, epoch=3)(np.arange(size))
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(size))


def test_one_by_one_and_in_any_shape_it_is_the_same() -> None:
    permutation = Permutation(1000, seed=1, epoch=0)
    order = permutation(np.arange(1000))
    assert [permutation(i) for i in range(1000)] == order.tolist()
    assert isinstance(permutation(5), int)
    assert np.array_equal(permutation(np.arange(1000).reshape(10, 100)), order.reshape(10, 100))
    assert permutation(np.empty(0, dtype=np.int64)).size == 0


def test_epochs_and_seeds_differ_and_order_is_unlike_the_file() -> None:
    size = 10_007
    index = np.arange(size)
    orders = [Permutation(size, seed=s, epoch=e)(index) for s, e in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for number, order in enumerate(orders):
        assert abs(np.corrcoef(order, index)[0, 1]) < 0.03
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.03
        for other in orders[:number]:
            assert (order == other).mean() < 0.002


def test_the_first_sample_is_spread_over_seeds() -> None:
    first = np.array([Permutation(8, seed=s, epoch=0)(0) for s in range(4000)])
    assert np.abs(np.bincount(first, minlength=8) - 500).max() < 110


def test_the_order_never_changes() -> None:
    """A run resumed by a later version of the program must see the same order."""
    assert Permutation(1_000_003, seed=1234, epoch=5)(np.arange(6)).tolist() == [
        63868,
        475637,
        999078,
        324401,
        92267,
        507278,
    ]


def test_large_sizes_cost_no_memory() -> None:
    size = 1 << 61
    found = Permutation(size, seed=2**64 - 1, epoch=10**6)(np.arange(size - 1000, size))
    assert len(set(found.tolist())) == 1000 and found.min() >= 0 and found.max() < size


def test_position() -> None:
    assert [position(consumed, 10) for consumed in (0, 9, 10, 25)] == [(0, 0), (0, 9), (1, 0), (2, 5)]


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_outside_its_range(seed: int) -> None:
    with pytest.raises(ConfigError, match="seed = "):
        Permutation(10, seed=seed, epoch=0)
