"""Batches of random tokens with masks, for benchmarks that train models on nothing in particular."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # the loader needs a tokenizer's library, plain tensors do not
    from deberta_dist.data.loader import Batch


def masked_tokens(shape: tuple[int, int], *, vocab_size: int, num_targets: int, seed: int) -> tuple[Tensor, Tensor]:
    """Input ids and labels [B, S]; every sequence has the same number of targets, in the place of which is the last token.

    Args:
        shape: Sequences and tokens.
        vocab_size: Tokens are 5 to the last but one.
        num_targets: Of each sequence.
        seed: Decides tokens and targets.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, vocab_size - 1, shape, generator=generator)
    is_target = torch.rand(shape, generator=generator).argsort(dim=1) < num_targets
    return torch.where(is_target, vocab_size - 1, ids), torch.where(is_target, ids, 0)


def masked_batch(shape: tuple[int, int], *, vocab_size: int, num_targets: int, seed: int, rows: slice = slice(None)) -> "Batch":
    """Rows of `masked_tokens` as a batch.

    Args:
        shape: Of the whole batch, which decides the numbers.
        vocab_size, num_targets, seed: See there.
        rows: Which of the sequences.
    """
    from deberta_dist.data.loader import Batch

    ids, labels = masked_tokens(shape, vocab_size=vocab_size, num_targets=num_targets, seed=seed)
    return Batch(input_ids=ids[rows], attention_mask=torch.ones_like(ids)[rows], labels=labels[rows])
