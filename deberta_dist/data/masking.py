"""Whole-word n-gram masking as a pure function of (seed, epoch, sample).

The loader calls ``mask_sequence`` with the generator of ``sample_rng`` while it makes a batch; nothing is
masked in advance. Every draw is ``Generator.random`` of a counter-based generator, so masks depend neither
on the number of ranks and threads nor on how many samples were drawn before.

Both methods share the units, the quota and the replacement:

* *Units.* Tokens other than special ones, in order. With ``max_ngram`` > 1 a unit is a word: a token that
  begins one and the following tokens that do not (special tokens are passed over, not boundaries). With
  ``max_ngram`` = 1 every token is a unit.
* *Spans.* n units in a row, n from 1 to ``max_ngram`` with probability proportional to 1/n.
* *Quota.* round(p * len), at least 1, at most ``max_targets``; len counts special tokens too. Units are
  taken whole, in the method's order, until the tokens taken reach the quota: the number of targets is
  below the quota plus the length of the longest word.
* *Replacement.* A target becomes ``[MASK]`` (80%), stays (10%), or becomes any id of the vocabulary,
  special ones included (10%), independently.

``official``: the published sampling. The units are walked through in windows of n * int(1/p) (6n for 0.15),
n drawn per window, and a span of n units begins at a uniform place of each window; it may reach into the
next one, which then begins behind it. That takes about 1/6 of the units and the quota is counted from the
left, so the end of a sequence is hardly masked (last tenth of 512 tokens: 1% instead of 16% for single
tokens), and a sequence whose spans fall short of the quota keeps fewer targets.

``uniform``: the same spans without that bias. As many units as the quota asks for are laid out as disjoint
spans with the remaining units between them in random order, the whole is turned by a random angle with its
ends joined, and spans are taken in random order until the quota. Turning makes every unit equally likely,
and the quota is always reached. A word of more than 16 tokens (text without spaces) counts as single tokens.

Source: NGramMaskGenerator in DeBERTa/apps/tasks/mlm_task.py, microsoft/DeBERTa, for ``official`` (the same
distribution, not the same random numbers; its cap is the constant 80, computed for 512 tokens).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deberta_dist.data.sampler import check_seed
from deberta_dist.errors import ConfigError

METHODS = ("official", "uniform")
NOT_A_TARGET = 0

_LONGEST_WORD = 16
_STREAM = 0x6D61736B  # keeps these numbers apart from those of any other use of the seed


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """How targets are chosen and replaced.

    Attributes:
        method: ``official`` or ``uniform``, see the module's text.
        mask_probability: fraction of tokens that become targets.
        max_ngram: longest span in units.
        mask_token_fraction: fraction of targets replaced by ``[MASK]``.
        keep_fraction: fraction of targets left as they are; the rest become random ids.
        max_targets: most targets of a sequence (last word excepted); None: ceil(p * len / 10) * 10, which
            is 80 for 512 tokens.
    """

    method: str = "uniform"
    mask_probability: float = 0.15
    max_ngram: int = 3
    mask_token_fraction: float = 0.8
    keep_fraction: float = 0.1
    max_targets: int | None = None

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ConfigError: the method is unknown or a number is outside its range.
        """
        if self.method not in METHODS:
            raise ConfigError(f"masking method = {self.method!r}, expected one of {', '.join(METHODS)}")
        if not 0 < self.mask_probability < 1:
            raise ConfigError(f"mask_probability = {self.mask_probability} is not between 0 and 1")
        if self.max_ngram < 1:
            raise ConfigError(f"max_ngram = {self.max_ngram} is less than 1")
        replaced_or_kept = self.mask_token_fraction + self.keep_fraction
        if min(self.mask_token_fraction, self.keep_fraction) < 0 or not replaced_or_kept <= 1:
            raise ConfigError(
                f"mask_token_fraction = {self.mask_token_fraction} and keep_fraction = {self.keep_fraction} "
                "are not two fractions with a sum of at most 1"
            )
        if self.max_targets is not None and self.max_targets < 1:
            raise ConfigError(f"max_targets = {self.max_targets} is less than 1")

    def quota(self, num_tokens: int) -> int:
        """Number of targets aimed at in a sequence of ``num_tokens`` tokens, special ones included."""
        cap = self.max_targets or math.ceil(num_tokens * self.mask_probability / 10) * 10
        return min(cap, max(1, round(num_tokens * self.mask_probability)))


def sample_rng(seed: int, *, epoch: int, sample: int) -> np.random.Generator:
    """The generator of one sample's mask in one epoch.

    Philox is counter-based: (seed, epoch, sample) are its key and counter, so streams of different samples
    never meet and making one costs a few microseconds.

    Raises:
        ConfigError: ``seed`` is outside 0 .. 2**64 - 1.
    """
    key = np.array([check_seed(seed), _STREAM], dtype=np.uint64)
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
    """Masks one sequence.

    Args:
        ids: integers [S], with its special tokens, without padding.
        is_word_start: bool [vocab_size], whether an id begins a word.
        special_ids: ids that are never targets, 0 (padding) among them.
        mask_id: id of ``[MASK]``.
        vocab_size: number of ids random replacements are drawn from.
        rng: generator of this sample, from ``sample_rng``.
        config: how to mask.

    Returns:
        (input_ids, labels), int64 [S] each. labels holds the original id of targets and 0 elsewhere. There
        is at least one target unless every token is special.
    """
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


def _official_units(
    num_units: int, *, quota: int, rng: np.random.Generator, config: MaskingConfig
) -> np.ndarray:
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


def _uniform_units(
    num_units: int, *, quota: int, rng: np.random.Generator, config: MaskingConfig
) -> np.ndarray:
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
