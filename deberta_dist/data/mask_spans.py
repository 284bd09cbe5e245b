"""Chooses masked spans by the two methods of ``masking.py``, for all rows of a batch at once.

Both get the draws of every row and its number of words, and return words in the order in which they are taken until
the quota. Legend: R rows, N draws per row. *Ragged* arrays hold the entries of row 0, then those of row 1, and so on.
"""

from typing import NamedTuple

import numpy as np

_LAST = 2.0  # sorts behind every draw


class ChosenWords(NamedTuple):
    """Words in the order they are taken.

    Attributes:
        words: ragged int64, numbered from 0 within each row.
        counts: int64 [R], how many of them belong to each row.
        num_draws: int64 [R], draws used up; the row's next number is behind them.
    """

    words: np.ndarray
    counts: np.ndarray
    num_draws: np.ndarray


def starts_of(counts: np.ndarray) -> np.ndarray:
    """Where every row of a ragged array begins, from the rows' counts."""
    return np.cumsum(counts) - counts


def within(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... count - 1 for every row, ragged."""
    return np.arange(counts.sum()) - np.repeat(starts_of(counts), counts)


def official_draws(num_words: np.ndarray, *, window: int) -> np.ndarray:
    """Draws that ``official_words`` uses in each row: two per window, and a window has at least ``window`` words."""
    return 2 * -(-num_words // window)


def official_words(draws: np.ndarray, num_words: np.ndarray, *, window: int, max_ngram: int) -> ChosenWords:
    """Words of one span per window, ascending; the quota has no say in where spans lie.

    Args:
        draws: float64 [R, N], N at least ``official_draws`` of every row.
        num_words: int64 [R], at least 1 each.
        window: words per window for each word of its span.
        max_ngram: longest span, words.
    """
    num_draws = official_draws(num_words, window=window)
    half = num_draws // 2
    column = np.arange(half.max())
    lengths = _ngram_lengths(draws[:, : column.size], max_ngram=max_ngram)
    fraction = _shifted(draws, half, column)
    widths = lengths * window
    spans = np.floor(fraction * widths).astype(np.int64)
    steps = np.maximum(widths, spans + lengths)
    offsets = np.cumsum(steps, axis=1) - steps
    inside = (offsets < num_words[:, None]) & (column < half[:, None])
    counts = np.count_nonzero(inside, axis=1)
    # Only the last window can be cut off by the end, and what follows it does not count.
    last = np.arange(counts.size), counts - 1
    spans[last] = fraction[last] * np.minimum(widths[last], num_words - offsets[last])
    starts = (offsets + spans)[inside]
    span_lengths = np.minimum(lengths[inside], np.repeat(num_words, counts) - starts)
    words = _expand(starts, span_lengths)
    return ChosenWords(words, np.add.reduceat(span_lengths, starts_of(counts)), num_draws)


def uniform_draws(num_words: np.ndarray, *, quotas: np.ndarray) -> np.ndarray:
    """Most draws that ``uniform_words`` uses in each row: it depends on the first of them how many follow."""
    return num_words + 2 * np.minimum(quotas, num_words) + 1


def uniform_words(draws: np.ndarray, num_words: np.ndarray, *, quotas: np.ndarray, max_ngram: int) -> ChosenWords:
    """As many words as the quota (or all) in disjoint spans, span after span in random order.

    A word has at least one token, hence as many words as the quota are always enough.

    Args:
        draws: float64 [R, N], N at least ``uniform_draws`` of every row.
        num_words: int64 [R], at least 1 each.
        quotas: int64 [R], at least 1 each.
        max_ngram: longest span, words.
    """
    wanted = np.minimum(quotas, num_words)
    lengths = _ngram_lengths(draws[:, : wanted.max()], max_ngram=max_ngram)
    ends = np.cumsum(lengths, axis=1)
    counts = np.count_nonzero(ends < wanted[:, None], axis=1) + 1
    rows = np.arange(counts.size)
    # The last span is shortened, so that the spans have exactly the words that are wanted.
    lengths[rows, counts - 1] -= ends[rows, counts - 1] - wanted
    column = np.arange(counts.max())
    is_span = column < counts[:, None]
    lengths = lengths[:, : column.size]
    before = np.cumsum(lengths, axis=1) - lengths - column

    # Spans are spread over the slots that they and the remaining words have in a row.
    num_slots = counts + num_words - wanted
    position = np.arange(num_slots.max())
    # The smallest random keys of a row choose the slots of its spans: a subset without replacement, for all rows at once.
    keys = _shifted(draws, wanted, position)
    keys[position >= num_slots[:, None]] = _LAST
    taken = np.argsort(keys, axis=1)[:, : column.size][is_span]
    occupied = np.zeros(keys.shape, dtype=bool)
    occupied[np.repeat(rows, counts), taken] = True
    starts = np.flatnonzero(occupied) - np.repeat(rows * position.size, counts) + before[is_span]

    # One draw turns the row with its ends joined; otherwise words near the ends would be chosen less often.
    turned_at = wanted + num_slots
    angle = (draws[rows, turned_at] * num_words).astype(np.int64)
    keys = _shifted(draws, turned_at + 1, column)
    keys[~is_span] = _LAST
    order = (np.argsort(keys, axis=1) + starts_of(counts)[:, None])[is_span]
    words = _expand(starts[order], lengths[is_span][order]) + np.repeat(angle, wanted)
    ends = np.repeat(num_words, wanted)
    words -= np.where(words >= ends, ends, 0)
    return ChosenWords(words, wanted, turned_at + 1 + counts)


def _shifted(draws: np.ndarray, first: np.ndarray, column: np.ndarray) -> np.ndarray:
    """draws[row, first[row] + column], float64 [R, columns]; a copy. Past the row's end stands anything."""
    at = (np.arange(first.size) * draws.shape[1] + first)[:, None] + column
    return draws.reshape(-1).take(at, mode="clip")


def _ngram_lengths(uniforms: np.ndarray, *, max_ngram: int) -> np.ndarray:
    """Span lengths, int64, from uniform numbers: p(n) proportional to 1/n for n = 1 .. max_ngram."""
    cumulative = np.cumsum(1 / np.arange(1, max_ngram + 1))
    return np.searchsorted(cumulative, uniforms * cumulative[-1], side="right") + 1


def _expand(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... start + length - 1 of every span, one span after another."""
    return np.repeat(starts, lengths) + within(lengths)
