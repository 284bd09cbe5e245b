"""The loss of a predictor without context on the same targets: the baseline of a training run.

A masked language model that has learnt anything ends below both numbers; the report at the end of a run
prints them beside its loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deberta_dist.data.token_corpus import TokenCorpus

_BLOCK_TOKENS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class UnigramLoss:
    """Losses in nats per target.

    Attributes:
        loss: mean negative log likelihood of the targets under the training text's unigram distribution,
            one added to every count.
        entropy: entropy of the targets' own distribution; no prediction that ignores the context, however
            fitted, has a lower loss on these targets.
    """

    loss: float
    entropy: float


def unigram_counts(corpus: TokenCorpus, *, vocab_size: int, max_tokens: int | None = None) -> np.ndarray:
    """How often every id occurs, int64 [vocab_size].

    Args:
        vocab_size: at least the corpus's own; ids above that have count 0.
        max_tokens: read at most about so many, in blocks spread evenly over the corpus; None: all of it, once.
    """
    assert vocab_size >= corpus.vocab_size
    starts = range(0, corpus.num_tokens, _BLOCK_TOKENS)
    if max_tokens is not None:
        starts = starts[:: max(1, -(-len(starts) * _BLOCK_TOKENS // max(max_tokens, _BLOCK_TOKENS)))]
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in starts:
        stop = min(start + _BLOCK_TOKENS, corpus.num_tokens)
        counts += np.bincount(corpus.read(start, stop), minlength=vocab_size)
    return counts


def blended_counts(
    corpora: Sequence[TokenCorpus],
    *,
    proportions: Sequence[float],
    vocab_size: int,
    max_tokens: int | None = None,
) -> np.ndarray:
    """How often every id occurs where corpora are mixed, float64 [vocab_size].

    The distributions p_s of the corpora are mixed, not their sizes: counts(t) = N x sum over s of q_s x p_s(t), with
    proportions q_s and N the number of tokens read. One corpus: its counts.

    Args:
        corpora: the corpora of a blend, at least one.
        proportions: share of the samples that each corpus gives; their sum is 1.
        vocab_size: as for ``unigram_counts``.
        max_tokens: of all corpora together; from each in its proportion, at least a block.
    """
    limits = [None if max_tokens is None else int(max_tokens * share) for share in proportions]
    counts = [
        unigram_counts(corpus, vocab_size=vocab_size, max_tokens=limit) for corpus, limit in zip(corpora, limits, strict=True)
    ]
    totals = [int(count.sum()) for count in counts]
    weights = [sum(totals) * share / total for share, total in zip(proportions, totals, strict=True)]
    return sum((count * weight for count, weight in zip(counts, weights, strict=True)), np.zeros(()))


def unigram_loss(counts: np.ndarray, target_ids: np.ndarray, *, vocab_size: int) -> UnigramLoss:
    """Loss of the best constant prediction, learnt from the training text and from the targets themselves.

    loss = -mean log((count(t) + 1) / (sum of counts + vocab_size)) over targets t.

    Args:
        counts: of the training text, from ``unigram_counts`` or ``blended_counts`` [vocab_size].
        target_ids: ids of the targets, integers of any shape, at least one, each below ``vocab_size``.
        vocab_size: number of ids that can be predicted.
    """
    targets = np.bincount(np.asarray(target_ids).reshape(-1), minlength=vocab_size)
    assert counts.shape == targets.shape == (vocab_size,) and targets.sum() > 0
    log_probability = np.log(counts + 1.0) - np.log(counts.sum() + float(vocab_size))
    share = targets / targets.sum()
    present = share[share > 0]
    return UnigramLoss(loss=float(-(share * log_probability).sum()), entropy=float(-(present * np.log(present)).sum()))
