"""What a predictor without context would reach on the same targets: the yardstick of a training run.

A masked language model that has learnt anything ends below both numbers; the report at the end of a run
prints them beside its loss.
"""

from dataclasses import dataclass

import numpy as np

from deberta_dist.data.token_file import TokenFile

_BLOCK_TOKENS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class UnigramLoss:
    """Losses in nats per target.

    Attributes:
        loss: mean negative log likelihood of the targets under the training file's unigram distribution,
            one added to every count.
        entropy: entropy of the targets' own distribution; no prediction that ignores the context, however
            fitted, has a lower loss on these targets.
    """

    loss: float
    entropy: float


def unigram_counts(token_file: TokenFile, *, vocab_size: int, max_tokens: int | None = None) -> np.ndarray:
    """How often every id occurs, int64 [vocab_size].

    Args:
        token_file: the training file.
        vocab_size: at least the file's own; ids above that have count 0.
        max_tokens: read at most about so many, in blocks spread evenly over the file; None: all of it, once.
    """
    assert vocab_size >= token_file.vocab_size
    starts = range(0, token_file.num_tokens, _BLOCK_TOKENS)
    if max_tokens is not None:
        starts = starts[:: max(1, -(-len(starts) * _BLOCK_TOKENS // max(max_tokens, _BLOCK_TOKENS)))]
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in starts:
        stop = min(start + _BLOCK_TOKENS, token_file.num_tokens)
        counts += np.bincount(token_file.read(start, stop), minlength=vocab_size)
    return counts


def unigram_loss(train: TokenFile | np.ndarray, target_ids: np.ndarray, *, vocab_size: int) -> UnigramLoss:
    """Loss of the best constant prediction, learnt from the training file and from the targets themselves.

    loss = -mean log((count(t) + 1) / (sum of counts + vocab_size)) over targets t.

    Args:
        train: the training file, or its counts, integers [vocab_size].
        target_ids: ids of the targets, integers of any shape, at least one, each below ``vocab_size``.
        vocab_size: number of ids that can be predicted.
    """
    counts = unigram_counts(train, vocab_size=vocab_size) if isinstance(train, TokenFile) else train
    targets = np.bincount(np.asarray(target_ids).reshape(-1), minlength=vocab_size)
    assert counts.shape == targets.shape == (vocab_size,) and targets.sum() > 0
    log_probability = np.log(counts + 1.0) - np.log(counts.sum() + float(vocab_size))
    share = targets / targets.sum()
    present = share[share > 0]
    return UnigramLoss(
        loss=float(-(share * log_probability).sum()), entropy=float(-(present * np.log(present)).sum())
    )
