"""Random words as a function of a seed and a position: they decide which attention probabilities are dropped.

The word of (seed, sample b, head n, query i, key j) depends on nothing else, so the mask is the same for any chunking, when
recomputed, on any device, and in every implementation. In 32-bit two's complement with arithmetic shifts:

    (lo, hi) = splitmix64(seed + ((b N + n) Q + i + 1) G)     halves of one 64-bit word per row
    x = lo + j C;  x ^= x >> 16;  x = x M1 + hi;  x ^= x >> 15;  x = x M2;  dropped iff (x >> 1) < round(p 2^31) - 2^30

A few integer passes over the scores cost a fraction of drawing as many numbers from a generator.

Letters: B batch, N heads, Q queries, S keys.

Source: splitmix64 of Steele, Lea, Flood 2014; the constants of the 32-bit rounds are lowbias32's (Wellons 2018).
"""

import torch
from torch import Tensor

_WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
COLUMN, FIRST, SECOND = 0x9E3779B9, 0x7FEB352D, 0x846CA68B
_SIGN = -(2**31)


def mix_key(key: int, *numbers: int) -> int:
    """A 64-bit key derived from ``key`` and each of ``numbers`` in order.

    Source: splitmix64, chained.
    """
    for number in numbers:
        key = _splitmix64((key & _WORD) ^ _splitmix64(number & _WORD))
    return key & _WORD


def keep_probability(p: float) -> float:
    """Exactly the share that is kept when ``p`` is dropped, as thresholds have 31 bits; kept values are divided by it."""
    return 1.0 - round(p * 2**31) / 2**31


def threshold(p: float) -> int:
    """Signed 31-bit words below it are dropped."""
    return round(p * 2**31) - 2**30


def row_words(
    seed: int,
    *,
    batch: slice,
    heads: slice,
    num_heads: int,
    num_queries: int,
    counted: int | None = None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The two 32-bit words of every row, int32 [n, b, Q, 1] each, for n of N ``heads`` and b samples, ``batch``.

    Rows are numbered as if each head had ``counted`` queries (None: all of them). Queries beyond these are padding; their
    rows repeat the words of others.
    """

    def numbers(indices: slice) -> Tensor:
        return torch.arange(indices.start, indices.stop, device=device)

    rows_before = num_queries if counted is None else counted
    rows = (numbers(batch)[None, :, None] * num_heads + numbers(heads)[:, None, None]) * rows_before
    return words_of_rows(rows + numbers(slice(0, num_queries)), seed)


def words_of_rows(numbers: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The two 32-bit words of rows by their numbers, int64 [...] -> int32 [..., 1] each."""
    state = (numbers + 1) * signed(GOLDEN) + signed(seed)
    # torch shifts arithmetically; splitmix64 shifts in zeros.
    for shift, factor in zip((30, 27), FACTORS, strict=True):
        state = (state ^ (state >> shift & (1 << 64 - shift) - 1)) * signed(factor)
    state = state ^ (state >> 31 & (1 << 33) - 1)
    words = state.view(torch.int32).view(*state.shape, 2)
    return words[..., :1].contiguous(), words[..., 1:].contiguous()


def drop_words_(words: Tensor, spare: Tensor, rows: tuple[Tensor, Tensor], *, p: float) -> Tensor:
    """Fills ``words``, int32 [n, b, Q, S], with numbers that are negative exactly where to drop; returns it.

    Args:
        words: memory for the result.
        spare: scratch memory of the same shape and dtype.
        rows: the two words of each row, from `row_words`.
        p: probability of dropping, in [0, 1).
    """
    low, high = rows
    columns = torch.arange(words.shape[-1], device=words.device, dtype=torch.int32) * signed(COLUMN, bits=32)
    torch.add(low, columns, out=words)
    words.bitwise_xor_(torch.bitwise_right_shift(words, 16, out=spare))
    torch.add(high, words, alpha=FIRST, out=words)
    words.bitwise_xor_(torch.bitwise_right_shift(words, 15, out=spare))
    words.mul_(signed(SECOND, bits=32))
    # Halved first: the difference of two 32-bit numbers may not fit, that of two 31-bit numbers does.
    return words.bitwise_right_shift_(1).sub_(threshold(p))


def dropped(
    seed: int, *, p: float, shape: tuple[int, int, int, int], device: torch.device, counted: int | None = None
) -> Tensor:
    """Where to drop, bool [B, N, Q, S]; for ``counted`` see `row_words`."""
    batch, heads, queries, keys = shape
    words = torch.empty(heads, batch, queries, keys, dtype=torch.int32, device=device)
    rows = row_words(
        seed,
        batch=slice(0, batch),
        heads=slice(0, heads),
        num_heads=heads,
        num_queries=queries,
        counted=counted,
        device=device,
    )
    return (drop_words_(words, torch.empty_like(words), rows, p=p) < 0).transpose(0, 1)


def mark_dropped_(probabilities: Tensor, words: Tensor) -> None:
    """Makes the probabilities negative whose words are: one tensor then holds probabilities and mask.

    Args:
        probabilities: not negative; float32 or float64.
        words: from `drop_words_`, of the same shape; overwritten.
    """
    if probabilities.dtype == torch.float32:
        probabilities.view(torch.int32).bitwise_or_(words.bitwise_and_(_SIGN))
    else:
        probabilities.copysign_(words)


def signed(word: int, *, bits: int = 64) -> int:
    """The lowest bits as a signed number in two's complement."""
    word &= (1 << bits) - 1
    return word - (1 << bits) if word >> (bits - 1) else word


def _splitmix64(state: int) -> int:
    state = (state + GOLDEN) & _WORD
    state = ((state ^ (state >> 30)) * FACTORS[0]) & _WORD
    state = ((state ^ (state >> 27)) * FACTORS[1]) & _WORD
    return state ^ (state >> 31)
