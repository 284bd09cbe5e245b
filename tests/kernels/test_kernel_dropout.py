"""Which probabilities are dropped: the words written out in Python's integers, and how they are distributed."""

import pytest
import torch

from deberta_dist.kernels.dropout import drop_words_, dropped, keep_probability, mark_dropped_, mix_key, row_words

CPU = torch.device("cpu")


def signed(x: int) -> int:
    """The low 32 bits as a number of two's complement."""
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x >> 31 else x


def is_dropped(seed: int, row: int, column: int, p: float) -> bool:
    """The formula of the module for one element; Python's shift of a negative number is arithmetic."""
    word = mix_key_of_state(seed + (row + 1) * 0x9E3779B97F4A7C15)
    low, high = signed(word), signed(word >> 32)
    x = signed(low + column * 0x9E3779B9)
    x = signed(x ^ (x >> 16))
    x = signed(x * 0x7FEB352D + high)
    x = signed(x ^ (x >> 15))
    x = signed(x * 0x846CA68B)
    return (x >> 1) < round(p * 2**31) - 2**30


def mix_key_of_state(state: int) -> int:
    state &= (1 << 64) - 1
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & ((1 << 64) - 1)
    return state ^ (state >> 31)


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 12345, 2**64 - 1])
def test_words_are_those_of_the_formula(seed):
    shape = (2, 3, 4, 5)
    actual = dropped(seed, p=0.4, shape=shape, device=CPU)
    for b, n, i, j in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        assert actual[b, n, i, j] == is_dropped(seed, (b * 3 + n) * 4 + i, j, 0.4)


def test_a_part_has_the_words_of_the_whole():
    whole = dropped(9, p=0.5, shape=(4, 6, 16, 32), device=CPU)
    words = torch.empty(2, 3, 16, 32, dtype=torch.int32)
    rows = row_words(9, batch=slice(1, 4), heads=slice(2, 4), num_heads=6, num_queries=16, device=CPU)
    drop_words_(words, torch.empty_like(words), rows, p=0.5)
    assert torch.equal(words.transpose(0, 1) < 0, whole[1:4, 2:4])


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.1, 0.5, 0.9])
def test_rate_is_that_asked_for_and_rows_columns_and_neighbours_are_independent(p):
    drops = dropped(mix_key(3), p=p, shape=(4, 16, 128, 128), device=CPU).double()
    assert keep_probability(p) == pytest.approx(1 - p, abs=1e-9)

    def within(values: torch.Tensor, expected: float, deviation: float) -> bool:
        # All of up to 16,384 normal numbers within five standard deviations: 1% of failures for a perfect source.
        return bool(((values - expected).abs() <= 5 * deviation + 1e-12).all())

    variance = p * (1 - p)
    assert within(drops.mean(), p, (variance / drops.numel()) ** 0.5)
    for dim in (0, 1, 2, 3):
        others = [other for other in range(4) if other != dim]
        count = drops.numel() / drops.shape[dim]
        assert within(drops.mean(others), p, (variance / count) ** 0.5)
        centred = drops - p
        shifted = (centred * centred.roll(1, dim)).mean()
        assert within(shifted, 0.0, variance / drops.numel() ** 0.5)
    assert within((drops - p).mean((0, 1)) @ torch.ones(128).double(), 0.0, (variance * 128 / 64) ** 0.5)


def test_seeds_that_differ_in_one_bit_have_unrelated_masks():
    first = dropped(1 << 40, p=0.5, shape=(1, 4, 128, 128), device=CPU)
    for seed in (0, (1 << 40) + 1, 1 << 41, (1 << 40) + (1 << 63)):
        agreement = (first == dropped(seed, p=0.5, shape=(1, 4, 128, 128), device=CPU)).double().mean()
        assert abs(agreement - 0.5) < 5 * 0.5 / first.numel() ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_marks_are_signs(dtype):
    probabilities = torch.rand(1, 1, 8, 8, dtype=dtype)
    marked, words = probabilities.clone(), torch.randint(-(2**30), 2**30, (1, 1, 8, 8), dtype=torch.int32)
    mark_dropped_(marked, words.clone())
    assert torch.equal(marked.abs(), probabilities) and torch.equal(marked < 0, words < 0)
