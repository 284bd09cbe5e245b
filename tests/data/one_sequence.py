"""One sequence masked by itself, in steps that can be read one after another: what ``mask_batch`` must agree with."""

from collections.abc import Sequence

import numpy as np

from deberta_dist.data.masking import NOT_A_TARGET, MaskingConfig

_LONGEST_WORD = 16
_STREAM = 0x6D61736B


def sample_rng(seed: int, *, epoch: int, sample: int) -> np.random.Generator:
    """The generator of one sample's mask in one epoch, made anew."""
    key = np.array([seed, _STREAM], dtype=np.uint64)
    counter = np.array([0, 0, epoch, sample], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def mask_sequence(
    ids: np.ndarray,
    *,
    is_word_start: np.ndarray,
    special_ids: Sequence[int],
    mask_id: int,
    vocab_size: int,
    rng: np.random.Generator,
    config: MaskingConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids, labels), int64 [S] each, of one sequence [S] without padding."""
    input_ids = np.array(ids, dtype=np.int64)
    labels = np.full_like(input_ids, NOT_A_TARGET)
    maskable = np.ones(input_ids.shape, dtype=bool)
    for special in special_ids:
        maskable &= input_ids != special
    places = np.flatnonzero(maskable)
    if places.size == 0:
        return input_ids, labels

    begins = np.ones(places.size, dtype=bool) if config.max_ngram == 1 else is_word_start[input_ids[places]]
    if config.method == "uniform":
        begins = _split_long_words(begins)
    unit_of_place = np.cumsum(begins) - begins[0]
    unit_lengths = np.bincount(unit_of_place)
    quota = config.quota(input_ids.size)
    choose = _official_units if config.method == "official" else _uniform_units
    units = choose(unit_lengths.size, quota=quota, rng=rng, config=config)
    enough = np.searchsorted(np.cumsum(unit_lengths[units]), quota) + 1
    taken = np.zeros(unit_lengths.size, dtype=bool)
    taken[units[:enough]] = True
    targets = places[taken[unit_of_place]]

    originals = input_ids[targets]
    labels[targets] = originals
    kind, random_id = rng.random((2, targets.size))
    keep_until = config.mask_token_fraction + config.keep_fraction
    replaced = np.where(kind < keep_until, originals, (random_id * vocab_size).astype(np.int64))
    input_ids[targets] = np.where(kind < config.mask_token_fraction, mask_id, replaced)
    return input_ids, labels


def _split_long_words(begins: np.ndarray) -> np.ndarray:
    """``begins``, bool [T], with every token of a word longer than 16 tokens beginning one."""
    starts = np.flatnonzero(begins)
    starts = starts if begins[0] else np.concatenate(([0], starts))
    lengths = np.diff(starts, append=begins.size)
    if lengths.max() <= _LONGEST_WORD:
        return begins
    return begins | np.repeat(lengths > _LONGEST_WORD, lengths)


def _ngram_lengths(uniforms: np.ndarray, *, max_ngram: int) -> np.ndarray:
    """Span lengths, int64, from uniform numbers: p(n) proportional to 1/n for n = 1 .. max_ngram."""
    cumulative = np.cumsum(1 / np.arange(1, max_ngram + 1))
    return np.searchsorted(cumulative, uniforms * cumulative[-1], side="right") + 1


def _official_units(num_units: int, *, quota: int, rng: np.random.Generator, config: MaskingConfig) -> np.ndarray:
    """Units of one span per window, ascending; the quota plays no part in where spans lie."""
    window = int(1 / config.mask_probability)
    # A window is at least this long, so this many draws are always enough.
    kind, place = rng.random((2, -(-num_units // window)))
    lengths = _ngram_lengths(kind, max_ngram=config.max_ngram)
    widths = lengths * window
    spans = np.floor(place * widths).astype(np.int64)
    offsets = np.concatenate(([0], np.cumsum(np.maximum(widths, spans + lengths))[:-1]))
    count = int(np.searchsorted(offsets, num_units))
    # Only the last window can be cut off by the end, and what follows it does not count.
    last_width = min(widths[count - 1], num_units - offsets[count - 1])
    spans[count - 1] = int(place[count - 1] * last_width)
    starts = offsets[:count] + spans[:count]
    ends = np.minimum(starts + lengths[:count], num_units)
    return _expand(starts, ends - starts)


def _uniform_units(num_units: int, *, quota: int, rng: np.random.Generator, config: MaskingConfig) -> np.ndarray:
    """``quota`` units (or all) in disjoint spans, span after span in random order.

    A unit has at least one token, hence ``quota`` units are always enough.
    """
    wanted = min(quota, num_units)
    lengths = _ngram_lengths(rng.random(wanted), max_ngram=config.max_ngram)
    ends = np.cumsum(lengths)
    count = int(np.searchsorted(ends, wanted)) + 1
    lengths = lengths[:count]
    lengths[-1] -= ends[count - 1] - wanted
    slots = np.argsort(rng.random(count + num_units - wanted))[:count]
    slots.sort()
    starts = slots + np.cumsum(lengths) - lengths - np.arange(count)
    angle = int(rng.random() * num_units)
    order = np.argsort(rng.random(count))
    return (_expand(starts[order], lengths[order]) + angle) % num_units


def _expand(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... start + length - 1 of every span, one span after another."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(starts - ends + lengths, lengths)
