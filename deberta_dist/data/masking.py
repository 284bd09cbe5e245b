"""Whole-word n-gram masking as a pure function of (seed, epoch, sample).

The loader calls ``mask_batch`` while it makes a batch; nothing is masked in advance. Every draw comes from the
sample's own stream (``sample_draws``), so masks depend neither on the number of ranks and threads nor on how many
samples were drawn before or are drawn beside it. All sequences of a batch are masked together, without a loop over
tokens or words: in ragged arrays one row's entries follow another's, and counts say how many belong to each row.

Both methods share the words, the quota and the replacement:

* *Words.* Tokens other than special ones, in order. With ``max_ngram`` > 1 a word is a token that
  begins one and the following tokens that do not (special tokens are passed over, not boundaries). With
  ``max_ngram`` = 1 every token is a word.
* *Spans.* n words in a row, n from 1 to ``max_ngram`` with probability proportional to 1/n.
* *Quota.* round(p * len), at least 1, at most ``max_targets``; len counts special tokens too, padding not. Words are
  taken whole, in the method's order, until the tokens taken reach the quota: the number of targets is
  below the quota plus the length of the longest word.
* *Replacement.* A target becomes ``[MASK]`` (80%), stays (10%), or becomes any id of the vocabulary,
  special ones included (10%), independently.

Where spans lie is drawn in ``mask_spans.py``.

``official``: the published sampling. The words are walked through in windows of n * int(1/p) (6n for 0.15),
n drawn per window, and a span of n words begins at a uniform place of each window; it may reach into the
next one, which then begins behind it. That takes about 1/6 of the words and the quota is counted from the
left, so the end of a sequence is hardly masked (last tenth of 512 tokens: 1% instead of 16% for single
tokens), and a sequence whose spans fall short of the quota keeps fewer targets.

``uniform``: the same spans without that bias. As many words as the quota asks for are laid out as disjoint
spans with the remaining words between them in random order, the whole is turned by a random angle with its
ends joined, and spans are taken in random order until the quota. Turning makes every word equally likely,
and the quota is always reached. A word of more than 16 tokens (text without spaces) counts as single tokens.

Source: NGramMaskGenerator in DeBERTa/apps/tasks/mlm_task.py, microsoft/DeBERTa, for ``official`` (the same
distribution, not the same random numbers; its cap is the constant 80, computed for 512 tokens).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deberta_dist.data.mask_spans import (
    official_draws,
    official_words,
    starts_of,
    uniform_draws,
    uniform_words,
    within,
)
from deberta_dist.data.sampler import check_seed
from deberta_dist.errors import ConfigError
from deberta_dist.values import MASKING_METHODS, MaskingMethod

NOT_A_TARGET = 0

_LONGEST_WORD = 16
_LONGEST_WINDOW = 1 << 40  # more words than any sequence has; beyond, widths of windows leave int64
_BLOCK_TOKENS = 1 << 15  # what is masked together stays within a core's cache
_SPECIAL, _CONTINUES, _BEGINS = range(3)


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """How targets are chosen and replaced.

    Attributes:
        method: ``official`` or ``uniform``, see the module's text.
        mask_probability: fraction of tokens that become targets.
        max_ngram: longest span in words.
        mask_token_fraction: fraction of targets replaced by ``[MASK]``.
        keep_fraction: fraction of targets left as they are; the rest become random ids.
        max_targets: most targets of a sequence (last word excepted); None: ceil(p * len / 10) * 10, which
            is 80 for 512 tokens.
    """

    method: MaskingMethod = "uniform"
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
        if self.method not in MASKING_METHODS:
            raise ConfigError(f"masking method = {self.method!r}, expected one of {', '.join(MASKING_METHODS)}")
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


_STREAM = 0x6D61736B  # keeps these numbers apart from those of any other use of the seed


def mask_batch(
    ids: np.ndarray,
    *,
    is_word_start: np.ndarray,
    special_ids: Sequence[int],
    mask_id: int,
    vocab_size: int,
    seed: int,
    epochs: np.ndarray,
    samples: np.ndarray,
    config: MaskingConfig,
    lengths: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Masks a batch of sequences, each as if it were alone.

    Args:
        ids: integers [B, S], each below ``vocab_size``, special tokens anywhere; a shorter sequence is filled up with
            a special id behind its end.
        is_word_start: bool [vocab_size], whether an id begins a word.
        special_ids: ids that are never targets, 0 (padding) among them.
        mask_id: id of ``[MASK]``.
        vocab_size: number of ids random replacements are drawn from.
        seed: 0 .. 2**64 - 1.
        epochs: integers [B]: a sequence's mask depends on its epoch and sample.
        samples: integers [B].
        lengths: integers [B], tokens of every sequence without padding; None: S of all.

    Returns:
        (input_ids, labels), int64 [B, S] each. labels holds the original id of targets and 0 elsewhere. A
        sequence has at least one target unless all its tokens are special.

    Raises:
        ConfigError: ``seed`` is outside 0 .. 2**64 - 1.
    """
    num_rows, width = ids.shape
    # Token files hold uint16 or uint32; torch's embedding and loss take int64.
    input_ids = ids.astype(np.int64)
    labels = np.full_like(input_ids, NOT_A_TARGET)
    kinds = np.where(is_word_start | (config.max_ngram == 1), _BEGINS, _CONTINUES).astype(np.uint8)
    kinds[list(special_ids)] = _SPECIAL
    sizes = np.full(num_rows, width) if lengths is None else lengths
    quota_of = {size: config.quota(size) for size in set(sizes.tolist())}
    quotas = np.array([quota_of[size] for size in sizes.tolist()], dtype=np.int64)
    rows_together = max(1, _BLOCK_TOKENS // max(width, 1))
    for first in range(0, num_rows, rows_together):
        rows = slice(first, first + rows_together)
        block_ids, block_labels = input_ids[rows].reshape(-1), labels[rows].reshape(-1)  # views
        block_kinds = kinds.take(input_ids[rows])
        # Rows without a token that can be masked stay as they are.
        live = np.flatnonzero(block_kinds.any(axis=1))
        if live.size == 0:  # reduceat and max below have no answer for no rows
            continue
        targets, kind, random_id = _targets(
            block_kinds,
            live,
            quotas=quotas[rows][live],
            seed=seed,
            epochs=epochs[rows][live],
            samples=samples[rows][live],
            config=config,
        )
        originals = block_ids[targets]
        block_labels[targets] = originals
        keep_until = config.mask_token_fraction + config.keep_fraction
        replaced = np.where(kind < keep_until, originals, (random_id * vocab_size).astype(np.int64))
        block_ids[targets] = np.where(kind < config.mask_token_fraction, mask_id, replaced)
    return input_ids, labels


def _targets(
    kinds: np.ndarray,
    live: np.ndarray,
    *,
    quotas: np.ndarray,
    seed: int,
    epochs: np.ndarray,
    samples: np.ndarray,
    config: MaskingConfig,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chooses the targets of the rows ``live`` of a block.

    Args:
        kinds: uint8 [B, S], what every token is: special, within a word or beginning one.
        live: int64 [R], ascending, the rows which have a token that is not special.
        quotas: int64 [R].
        seed, epochs, samples: as for ``mask_batch``, [R] each.

    Returns:
        Three arrays over all targets: the position in ``kinds`` as one row, ascending, and the two uniform numbers that
        decide on what stands there instead.
    """
    flat_kinds = kinds.reshape(-1)
    maskable = np.flatnonzero(flat_kinds)
    num_maskable = np.count_nonzero(kinds, axis=1)[live]
    row_starts = starts_of(num_maskable)
    begins = flat_kinds[maskable] == _BEGINS
    # A sequence may begin in the middle of a word; what is left of it counts as a word.
    begins[row_starts] = True
    word_starts, word_lengths = _words(begins)
    if config.method == "uniform" and (is_long := word_lengths > _LONGEST_WORD).any():
        begins |= np.repeat(is_long, word_lengths)
        word_starts, word_lengths = _words(begins)
    first_words = np.searchsorted(word_starts, row_starts)
    num_words = np.diff(first_words, append=word_starts.size)

    most_targets = np.minimum(quotas + word_lengths.max() - 1, num_maskable)
    window = int(min(1 / config.mask_probability, _LONGEST_WINDOW))
    if config.method == "official":
        most_draws = official_draws(num_words, window=window) + 2 * most_targets
    else:
        most_draws = uniform_draws(num_words, quotas=quotas) + 2 * most_targets
    draws = sample_draws(int(most_draws.max()), seed=seed, epochs=epochs, samples=samples)
    if config.method == "official":
        chosen = official_words(draws, num_words, window=window, max_ngram=config.max_ngram)
    else:
        chosen = uniform_words(draws, num_words, quotas=quotas, max_ngram=config.max_ngram)

    words = chosen.words + np.repeat(first_words, chosen.counts)
    taken_before = np.cumsum(word_lengths[words]) - word_lengths[words]
    # The sum ran on through all rows: each has to begin at 0.
    taken_before -= np.repeat(taken_before[starts_of(chosen.counts)], chosen.counts)
    is_target = np.zeros(word_starts.size, dtype=bool)
    is_target[words[taken_before < np.repeat(quotas, chosen.counts)]] = True
    targets = maskable[np.repeat(is_target, word_lengths)]

    counts = np.diff(np.searchsorted(targets, (live + 1) * kinds.shape[1]), prepend=0)
    # Behind the draws that chose the words: one for each target's kind of replacement, then one for each target's id.
    row_draws = np.arange(live.size) * draws.shape[1] + chosen.num_draws
    at = np.repeat(row_draws, counts) + within(counts)
    return targets, draws.reshape(-1)[at], draws.reshape(-1)[at + np.repeat(counts, counts)]


def _words(begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First position and length of every word, from bool [maskable], whether one begins there."""
    starts = np.flatnonzero(begins)
    return starts, np.diff(starts, append=begins.size)


def sample_draws(count: int, *, seed: int, epochs: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """The first ``count`` numbers of every sample's stream.

    The streams are those of ``np.random.Philox``; only the bit generator is made once and moved from sample to sample,
    which costs an eighth of making it anew. Philox is counter-based: (seed, epoch, sample) are its key and the upper half of its counter, so streams of
    different samples never meet, and any of them is reached at once.

    Args:
        count: numbers per sample.
        seed: 0 .. 2**64 - 1.
        epochs: integers [B], from 0.
        samples: integers [B], from 0.

    Returns:
        float64 [B, count], uniform in [0, 1): row i is ``Generator(Philox(key=[seed, "mask"], counter=[0, 0, epoch,
        sample])).random(count)``.

    Raises:
        ConfigError: ``seed`` is outside 0 .. 2**64 - 1.
    """
    philox = np.random.Philox(key=np.array([check_seed(seed), _STREAM], dtype=np.uint64))
    generator = np.random.Generator(philox)
    state = philox.state  # of a stream's begin: nothing is left over in its buffer
    counter = state["state"]["counter"]
    draws = np.empty((len(samples), count))
    for row, epoch, sample in zip(draws, epochs.tolist(), samples.tolist(), strict=True):
        counter[2], counter[3] = epoch, sample
        philox.state = state
        generator.random(out=row)
    return draws
