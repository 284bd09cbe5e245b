"""Who computes an attention: the one place that decides it.

A program that `torch.export` makes holds the formula itself: the other implementations cut their work by the sizes they
see, and would fix them.
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
    """One of ``IMPLEMENTATIONS``: the one asked for, or the fastest that can do what is asked.

    Args:
        asked: see `disentangled_attention`, like the others.
        operands: queries, keys, values, rel_key, rel_query and p2c.

    Raises:
        ValueError: ``asked`` is unknown or cannot do what is asked.
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
            raise ValueError(f"implementation = {asked!r} cannot be had: {reason}")
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
    """Whether who attends to the same keys more than once should make their `position_scores` ahead.

    The fused attention keeps no products of that size: it makes them for each call.
    """
    if torch.compiler.is_exporting():
        return True
    if implementation is not None:
        return implementation != "fused"
    return unavailable_reason(key_BNSH, positions=positions, mask=mask) is not None
