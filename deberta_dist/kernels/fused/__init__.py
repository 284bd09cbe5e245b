"""Disentangled attention in Triton kernels for NVIDIA GPUs. Importing it needs no Triton; `fused_attention` does."""

from deberta_dist.kernels.fused.attention import fused_attention
from deberta_dist.kernels.fused.availability import unavailable_reason

__all__ = ["fused_attention", "unavailable_reason"]
