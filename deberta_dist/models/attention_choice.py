"""Which attention a model will run with, in words for a log: on a GPU a slower one should not go unnoticed."""

import torch

from deberta_dist.kernels import describe_choice
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.positions import relative_positions


def describe_attention(config: DebertaConfig, *, dtype: torch.dtype, device: torch.device) -> str:
    """One line: the implementation, and why it is not the fused one.

    Args:
        config: of the model.
        dtype: of its weights.
        device: that it runs on.
    """
    key_BNSH = torch.empty(1, config.num_attention_heads, 1, config.head_size, dtype=dtype, device=device)
    positions = relative_positions(
        num_buckets=config.position_buckets, max_distance=config.max_relative_distance, device=device
    )
    # Masks are of segments: padding and documents alike.
    return f"attention: {describe_choice(key_BNSH, positions=positions, mask=None)}"
