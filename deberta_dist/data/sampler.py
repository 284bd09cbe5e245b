"""The order of an epoch as a pure function of (seed, epoch), without a stored permutation.

A run's position in its data is one integer, the number of samples consumed. ``position`` turns it into an
epoch and an index, ``Permutation`` turns the index into a sample. Nothing is stored, so a run resumes on
any number of ranks. The loader calls both.
"""

from typing import TypeVar

import numpy as np

from deberta_dist.errors import ConfigError

IndexT = TypeVar("IndexT", int, np.ndarray)

_NUM_ROUNDS = 6
_WORD = (1 << 64) - 1


def check_seed(seed: int) -> int:
    """The seed itself.

    Raises:
        ConfigError: it is negative or has more than 64 bits.
    """
    if not 0 <= seed <= _WORD:
        raise ConfigError(f"seed = {seed} is not within 0 and 2**64 - 1")
    return seed


def position(consumed: int, size: int) -> tuple[int, int]:
    """Epoch and index within it of the sample that follows ``consumed`` others.

    Args:
        consumed: samples consumed before it since the start of the run.
        size: samples per epoch.
    """
    assert consumed >= 0 and size > 0
    return divmod(consumed, size)


def samples_at(start: int, count: int, *, size: int, seed: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and samples at positions that run on through the epochs.

    Args:
        start: first position, from 0.
        count: positions in a row; they may reach into the next epochs.
        size: samples per epoch.
        seed: of the epochs' orders; None: every epoch in ascending order.

    Returns:
        Epochs and samples, int64 [count] each.

    Raises:
        ConfigError: ``seed`` is outside its range.
    """
    epochs, samples, found = np.empty(count, np.int64), np.empty(count, np.int64), 0
    while found < count:
        epoch, index = position(start + found, size)
        # All that this epoch still has: the permutation is much cheaper per sample on an array.
        here = np.arange(index, min(index + count - found, size))
        rows = slice(found, found + here.size)
        epochs[rows] = epoch
        samples[rows] = here if seed is None else Permutation(size, seed=seed, epoch=epoch)(here)
        found += here.size
    return epochs, samples


def _mix(word: int) -> int:
    """splitmix64's finaliser: every bit of the result depends on every bit of ``word``."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def mix_array(words: np.ndarray) -> np.ndarray:
    """``_mix`` of every element, uint64: one to one, and multiplication wraps as it should.

    Source: the finaliser of SplitMix64 (Steele et al. 2014).
    """
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


class Permutation:
    """A pseudo-random bijection of 0 .. size-1, keyed by seed and epoch.

    A Feistel network permutes the smallest power of four that is at least ``size`` (and at least 4): the
    halves L, R of the index become R, L xor f(R, key) in each of six rounds, which can be undone whatever
    f is. Results outside 0 .. size-1 go through the network again until they are inside (cycle walking,
    fewer than four passes on average), which keeps it a bijection.

    Source: Luby and Rackoff 1988 (Feistel), Black and Rogaway 2002, section 4 (cycle walking).
    """

    def __init__(self, size: int, *, seed: int, epoch: int) -> None:
        """Derives the round keys.

        Args:
            size: samples per epoch, at least 1.
            seed: seed of the run, 0 to 2**64 - 1.
            epoch: number of the epoch, from 0.

        Raises:
            ConfigError: ``seed`` is outside its range.
        """
        assert 1 <= size < 1 << 62 and epoch >= 0
        self.size = size
        key = _mix(_mix(check_seed(seed) ^ 0x9E3779B97F4A7C15) + epoch & _WORD)
        self._keys = [np.uint64(_mix(key + 0x9E3779B97F4A7C15 * (i + 1) & _WORD)) for i in range(_NUM_ROUNDS)]
        half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half_bits = np.uint64(half_bits)
        self._half_mask = np.uint64((1 << half_bits) - 1)
        # Both halves have the same number of bits, so the network covers a power of four: at most 4 x size values.

    def __call__(self, index: IndexT) -> IndexT:
        """The sample at an index of this epoch.

        Args:
            index: an int or an integer array, each 0 .. size-1.

        Returns:
            An int, or int64 of the same shape.
        """
        indices = np.atleast_1d(np.asarray(index, dtype=np.int64))
        assert indices.size == 0 or (indices.min() >= 0 and indices.max() < self.size)
        flat = self._network(indices.reshape(-1).astype(np.uint64))
        # Only those outside go on; the bijection brings each of them back inside after finitely many passes.
        outside = np.flatnonzero(flat >= self.size)
        while outside.size:
            flat[outside] = self._network(flat[outside])
            outside = outside[flat[outside] >= self.size]
        if isinstance(index, np.ndarray):
            return flat.astype(np.int64).reshape(index.shape)
        return int(flat[0])

    def _network(self, values: np.ndarray) -> np.ndarray:
        """One pass of the network over uint64 values below 2**(2 * half_bits)."""
        left, right = values >> self._half_bits, values & self._half_mask
        for key in self._keys:
            left, right = right, left ^ (mix_array(right + key) & self._half_mask)
        return (left << self._half_bits) | right
