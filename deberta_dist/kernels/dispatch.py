"""Which implementation computes an attention; nothing else decides it.

`torch.export` always gets the formula: the other implementations divide their work by the sizes they see, so that the
exported program would work for those sizes only.
"""

import torch
from torch import Tensor

from deberta_dist.kernels.fused import unavailable_reason
from deberta_dist.kernels.masks import AttentionMask, RelativePositions
from deberta_dist.values import ATTENTION, AUTO

IMPLEMENTATIONS = tuple(name for name in ATTENTION if name != AUTO)


def dispatch_implementation(
    asked: str | None,
    operands: tuple[Tensor | None, ...],
    *,
    positions: RelativePositions,
    mask: AttentionMask | None,
    return_probabilities: bool,
) -> str:
    """One of ``IMPLEMENTATIONS``: the one asked for, or the fastest that supports the arguments.

    Args:
        asked: ``implementation`` of `disentangled_attention`; None for the fastest.
        operands: queries, keys, values, rel_key, rel_query and p2c, as given to `disentangled_attention`.
        positions: its argument of the same name, like the following two.

    Raises:
        ValueError: ``asked`` is unknown or does not support the other arguments.
    """
    if asked is not None and asked not in IMPLEMENTATIONS:
        raise ValueError(f"implementation = {asked!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if return_probabilities and asked == "portable":
        raise ValueError("the portable implementation returns no probabilities; the reference does")
    if torch.compiler.is_exporting():
        return "reference"
    if asked in ("reference", "portable"):
        return asked
    *rest, p2c_BNSR = operands
    key_BNSH = rest[1]
    assert key_BNSH is not None, "only tables may be absent"
    reason = unavailable_reason(
        key_BNSH,
        positions=positions,
        mask=mask,
        needs_probabilities=return_probabilities,
        has_position_scores=p2c_BNSR is not None,
    )
    if asked is not None:
        if reason is not None:
            raise ValueError(f"implementation = {asked!r} is not available: {reason}")
        return asked
    if return_probabilities:
        return "reference"
    are_alike = all(x is None or (x.dtype, x.device) == (key_BNSH.dtype, key_BNSH.device) for x in rest)
    return "fused" if reason is None and are_alike else "portable"


def prefers_position_scores(
    key_BNSH: Tensor,
    *,
    positions: RelativePositions,
    mask: AttentionMask | None,
    implementation: str | None = None,
) -> bool:
    """Whether a caller that attends to the same keys more than once should compute their `position_scores` ahead.

    Not for the fused attention, which computes those products within each call and saves none.
    """
    if torch.compiler.is_exporting():
        return True
    if implementation is not None:
        return implementation != "fused"
    return unavailable_reason(key_BNSH, positions=positions, mask=mask) is not None
