"""Batches of random tokens with masks, for benchmarks whose text does not matter."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # the loader needs a tokenizer's library, plain tensors do not
    from deberta_dist.data.loader import Batch


def masked_tokens(shape: tuple[int, int], *, vocab_size: int, num_targets: int, seed: int) -> tuple[Tensor, Tensor]:
    """Input ids and labels, int64 [B, S]; every sequence has the same number of targets, masked by the last id.

    Args:
        shape: (B, S), sequences and tokens.
        vocab_size: Ids are drawn from 5 to ``vocab_size - 2``; ``vocab_size - 1`` is the mask.
        num_targets: Number of targets in each sequence.
        seed: Decides ids and targets.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, vocab_size - 1, shape, generator=generator)
    is_target = torch.rand(shape, generator=generator).argsort(dim=1) < num_targets
    return torch.where(is_target, vocab_size - 1, ids), torch.where(is_target, ids, 0)


def masked_batch(shape: tuple[int, int], *, vocab_size: int, num_targets: int, seed: int, rows: slice = slice(None)) -> "Batch":
    """Rows of `masked_tokens` as a batch.

    Args:
        shape: (B, S) of the whole batch, which decides the ids of every row.
        vocab_size: See `masked_tokens`.
        num_targets: See `masked_tokens`.
        seed: See `masked_tokens`.
        rows: The sequences to return, e.g. those of one rank.
    """
    from deberta_dist.data.loader import Batch

    ids, labels = masked_tokens(shape, vocab_size=vocab_size, num_targets=num_targets, seed=seed)
    return Batch(input_ids=ids[rows], attention_mask=torch.ones_like(ids)[rows], labels=labels[rows])
