"""Batches of random tokens with masks, for benchmarks that train models on nothing in particular."""

import torch

from deberta_dist.data.loader import Batch


def masked_batch(
    shape: tuple[int, int], *, vocab_size: int, num_targets: int, seed: int, rows: slice = slice(None)
) -> Batch:
    """Rows of a batch [B, S]; every sequence has the same number of targets, in the place of which is the last token.

    Args:
        shape: Of the whole batch, which decides the numbers.
        vocab_size: Tokens are 5 to the last but one.
        num_targets: Of each sequence.
        seed: Decides tokens and targets.
        rows: Which of the sequences.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, vocab_size - 1, shape, generator=generator)
    is_target = torch.rand(shape, generator=generator).argsort(dim=1) < num_targets
    return Batch(
        input_ids=torch.where(is_target, vocab_size - 1, ids)[rows],
        attention_mask=torch.ones_like(ids)[rows],
        labels=torch.where(is_target, ids, 0)[rows],
    )
