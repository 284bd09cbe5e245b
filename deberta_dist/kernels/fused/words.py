"""The words of ``kernels.dropout`` within Triton kernels: what dropout keeps. Needs Triton."""

import triton
import triton.language as tl

from deberta_dist.kernels.dropout import COLUMN, FACTORS, FIRST, GOLDEN, SECOND, signed

# Kernels can only read globals that are constexpr. The 32-bit ones are signed, for arithmetic in two's complement.
_GOLDEN, _FACTOR_30, _FACTOR_27 = (tl.constexpr(number) for number in (GOLDEN, *FACTORS))
_COLUMN, _FIRST, _SECOND = (tl.constexpr(signed(number, bits=32)) for number in (COLUMN, FIRST, SECOND))


@triton.jit
def words_of_row(number, seed_low, seed_high):
    """The two 32-bit words of rows by their numbers, int64."""
    seed = (seed_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | seed_low.to(tl.uint32, bitcast=True)
    state = (number + 1).to(tl.uint64) * _GOLDEN + seed
    state = (state ^ (state >> 30)) * _FACTOR_30
    state = (state ^ (state >> 27)) * _FACTOR_27
    state ^= state >> 31
    low = state.to(tl.uint32).to(tl.int32, bitcast=True)
    high = (state >> 32).to(tl.uint32).to(tl.int32, bitcast=True)
    return low, high


@triton.jit
def keeps(low, high, columns, threshold):
    """Whether dropout keeps columns of rows with these words."""
    word = low + columns * _COLUMN
    word = (word ^ (word >> 16)) * _FIRST + high
    word = (word ^ (word >> 15)) * _SECOND
    return (word >> 1) >= threshold
