"""The disentangled attention operator, behind one function."""

from deberta_dist.kernels.attention import IMPLEMENTATIONS, disentangled_attention, prefers_position_scores
from deberta_dist.kernels.fused import unavailable_reason
from deberta_dist.kernels.inputs import AttentionMask, RelativePositions, attention_scale, position_scores

__all__ = [
    "IMPLEMENTATIONS",
    "AttentionMask",
    "RelativePositions",
    "attention_scale",
    "disentangled_attention",
    "position_scores",
    "prefers_position_scores",
    "unavailable_reason",
]
