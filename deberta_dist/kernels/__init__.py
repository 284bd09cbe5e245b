"""The disentangled attention operator, behind one function."""

from deberta_dist.kernels.attention import attention_scale, disentangled_attention, position_scores

__all__ = ["attention_scale", "disentangled_attention", "position_scores"]
