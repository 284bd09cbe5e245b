"""A few sizes for the targets of micro-batches, so that a GPU sees few shapes of memory, products and kernels.

Every micro-batch has a different number of targets. On a GPU they are padded to one of at most `NUM_SIZES` sizes for each
shape of a micro-batch: those that pad a sample of the run's micro-batches least. On a CPU a new shape costs nothing, and
nothing is padded.

Letters: B sequences, S tokens, T targets of the sequence that has most, P targets.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

NUM_SIZES = 4
SAMPLED_MICRO_BATCHES = 64
LEAST_SAMPLED_SEQUENCES = 512
_MARGIN = 4  # standard deviations of P beyond the most of the sample
_WIDTH_MULTIPLE = 8

Size = tuple[int, int]
"""(T, P)."""


class TargetSizes:
    """The sizes of a run.

    Args:
        counts: Shape (B, S) of a micro-batch -> numbers of targets of sampled sequences. Micro-batches of a shape without a
            sample are not padded.
    """

    def __init__(self, counts: Mapping[tuple[int, int], Sequence[int]]) -> None:
        self._sizes = {shape: _choose(np.asarray(found), *shape) for shape, found in counts.items() if len(found)}
        self._counts = counts

    def __getitem__(self, shape: tuple[int, int]) -> tuple[Size, ...]:
        """All sizes for micro-batches of a shape, ascending."""
        return self._sizes[shape]

    def of(self, is_target_BS: Tensor) -> Size:
        """The smallest size that a micro-batch fits in; its own if it is larger than all."""
        counts = is_target_BS.sum(dim=1)
        number, width = int(counts.sum()), max(int(counts.max()), 1)
        sizes = self._sizes.get(tuple(is_target_BS.shape), ())
        return next((size for size in sizes if width <= size[0] and number <= size[1]), (width, number))

    def padded_share(self) -> float:
        """Share of the sample's padded targets that is padding, over all shapes."""
        real = padded = 0
        for shape, sizes in self._sizes.items():
            numbers, widths = _micro_batches(np.asarray(self._counts[shape]), shape[0])
            real += int(numbers.sum())
            for number, width in zip(numbers.tolist(), widths.tolist(), strict=True):
                padded += next((p for t, p in sizes if width <= t and number <= p), number)
        return 1 - real / max(padded, 1)


def num_sampled(batch: int) -> int:
    """Number of sequences to sample for micro-batches of B sequences; a multiple of B."""
    return max(SAMPLED_MICRO_BATCHES * batch, LEAST_SAMPLED_SEQUENCES // batch * batch)


def count_targets(labels_BS: Tensor) -> list[int]:
    """Targets of every sequence."""
    return (labels_BS > 0).sum(dim=1).tolist()


def _micro_batches(counts: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """P and T of the micro-batches that consecutive sequences form."""
    rows = counts[: len(counts) // batch * batch].reshape(-1, batch)
    return rows.sum(axis=1), rows.max(axis=1)


def _choose(counts: np.ndarray, batch: int, length: int) -> tuple[Size, ...]:
    """Sizes for micro-batches of ``batch`` sequences whose targets are like ``counts``."""
    numbers, widths = _micro_batches(counts, batch)
    numbers, widths = np.maximum(numbers, 1), np.maximum(widths, 1)
    # The largest size leaves room for more targets than the sample has shown.
    widest = min(length, _round_up(int(1.25 * widths.max()) + _WIDTH_MULTIPLE, _WIDTH_MULTIPLE))
    most = min(batch * widest, math.ceil(numbers.max() + _MARGIN * numbers.std()))
    order = np.argsort(numbers, kind="stable")
    numbers, widths = numbers[order], widths[order]
    sizes = []
    for stop in _cuts(numbers, most):
        width = min(length, _round_up(int(widths[:stop].max()), _WIDTH_MULTIPLE))
        sizes.append((width, min(_aligned(int(numbers[stop - 1])), batch * width)))
    sizes[-1] = (widest, min(max(_aligned(most), sizes[-1][1]), batch * widest))
    return tuple(dict.fromkeys(sizes))


def _cuts(numbers: np.ndarray, most: int) -> list[int]:
    """Where to cut ascending numbers into at most `NUM_SIZES` groups so that padding is least; the last pads to ``most``.

    Exact, by dynamic programming over the cuts.
    """
    total = np.concatenate([[0], np.cumsum(numbers)])
    count = len(numbers)
    # best[stop]: least padding of the first ``stop`` numbers with the current number of groups, and the cuts.
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    finished: list[tuple[float, list[int]]] = []
    for _ in range(NUM_SIZES):
        for start, (padding, cuts) in best.items():
            finished.append((padding + most * (count - start) - (total[count] - total[start]), [*cuts, count]))
        longer: dict[int, tuple[float, list[int]]] = {}
        for stop in range(1, count):
            options = [
                (padding + int(numbers[stop - 1]) * (stop - start) - (total[stop] - total[start]), [*cuts, stop])
                for start, (padding, cuts) in best.items()
                if start < stop
            ]
            if options:
                longer[stop] = min(options)
        best = longer
    return min(finished)[1]


def _aligned(number: int) -> int:
    """Rounds up to a multiple of 8, which tensor cores prefer, if that adds little."""
    return _round_up(number, 8) if number >= 256 else number


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
