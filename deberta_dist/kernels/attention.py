"""Disentangled attention on plain tensors: the operator that every model layer calls, and the dispatch to an implementation.

With d(i, j) the row of the relative table for query i and key j:

    score[i, j] = (q_i . k_j + q_i . Kr[d(i, j)] + k_j . Qr[d(i, j)]) / sqrt(H (1 + [c2p] + [p2c]))
    out_i       = sum_j dropout(softmax_j(score))[i, j] v_j

Both position terms use d(i, j). The paper's Eq. 4 has d(j, i) in the last one; the released weights were trained with
d(i, j).

`dispatch_implementation` decides which implementation computes it, and nothing else does. `torch.export` always gets the
formula: the other implementations divide their work by the sizes they see, so that the exported program would work for those
sizes only.

Letters: B batch, N heads here, Q queries, S keys, H head size, R rows of the relative table.

Source: arXiv 2006.03654 Eq. 4; microsoft/DeBERTa DeBERTa/deberta/disentangled_attention.py@4d7fe0bd.
"""

import torch
from torch import Tensor

from deberta_dist.kernels.dropout import dropped, keep_probability
from deberta_dist.kernels.fused import fused_attention, unavailable_reason
from deberta_dist.kernels.inputs import (
    AttentionCall,
    AttentionMask,
    RelativePositions,
    attention_scale,
    position_scores,
    widened,
)
from deberta_dist.kernels.portable import portable_attention
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


def disentangled_attention(
    query_BNQH: Tensor,
    key_BNSH: Tensor,
    value_BNSH: Tensor,
    *,
    positions: RelativePositions,
    rel_key_NRH: Tensor | None = None,
    rel_query_NRH: Tensor | None = None,
    p2c_BNSR: Tensor | None = None,
    mask: AttentionMask | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    counted_queries: int | None = None,
    recompute: bool = False,
    return_probabilities: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention with separate scores for content and relative position.

    Scores and softmax are float32 (float64 if given float64) whatever the inputs are. The implementations agree in
    values, gradients and dropout masks.

    It has many parameters because it is an operator: each is one tensor or one number of the formula.

    Args:
        query_BNQH: Projected hidden states of the tokens that attend, divided into heads.
        key_BNSH: Projected hidden states of the tokens that are attended to, divided into heads.
        value_BNSH: What is averaged; its dtype is the output's.
        positions: The row of the relative table for each pair of query and key.
        rel_key_NRH: Projected relative table for content-to-position (c2p) scores; None for no such term.
        rel_query_NRH: Projected relative table for position-to-content (p2c) scores; None for no such term.
        p2c_BNSR: `position_scores` of the keys with ``rel_query_NRH``, for callers that attend to the same keys
            more than once; replaces ``rel_query_NRH``.
        mask: Which query sees which key; a query that sees no key gets exactly zero. None: all see all.
        dropout_p: Share of probabilities to drop, in [0, 1).
        dropout_seed: 64 bits that decide which are dropped (see `kernels.dropout`).
        counted_queries: Queries beyond this number are padding: the others' dropout is as if they were not there. None: no
            padding.
        recompute: Save nothing of size Q x S for the backward pass, which recomputes the probabilities. The fused
            implementation always does this.
        return_probabilities: Also return the probabilities before dropout, which only the reference computes.
        implementation: "reference" (the formula, differentiable any number of times), "portable" (fast on any
            device, differentiable once) or "fused" (Triton kernels for NVIDIA GPUs, differentiable once, see
            `kernels.fused`). None: the fastest that supports the other arguments.

    Returns:
        Context [B, N, Q, H], and probabilities [B, N, Q, S] (float32) or None.

    Raises:
        ValueError: both ``rel_query_NRH`` and ``p2c_BNSR`` are given, ``dropout_p`` is not in [0, 1), or
            ``implementation`` is unknown or does not support the other arguments.
    """
    if rel_query_NRH is not None and p2c_BNSR is not None:
        raise ValueError("rel_query_NRH and p2c_BNSR are two forms of one term; give one of them")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p = {dropout_p} is not in [0, 1)")
    operands = query_BNQH, key_BNSH, value_BNSH, rel_key_NRH, rel_query_NRH, p2c_BNSR
    implementation = dispatch_implementation(
        implementation, operands, positions=positions, mask=mask, return_probabilities=return_probabilities
    )
    has_p2c = rel_query_NRH is not None or p2c_BNSR is not None
    call = AttentionCall(
        scale=attention_scale(query_BNQH.shape[-1], has_c2p=rel_key_NRH is not None, has_p2c=has_p2c),
        positions=positions,
        mask=mask,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        recompute=recompute,
        counted_queries=counted_queries,
    )
    if implementation == "reference":
        context, probabilities = reference_attention(*operands, call)
        return context, probabilities if return_probabilities else None
    if implementation == "fused":
        return fused_attention(*operands[:5], call), None
    return portable_attention(*operands, call), None


def reference_attention(
    query_BNQH: Tensor,
    key_BNSH: Tensor,
    value_BNSH: Tensor,
    rel_key_NRH: Tensor | None,
    rel_query_NRH: Tensor | None,
    p2c_BNSR: Tensor | None,
    call: AttentionCall,
) -> tuple[Tensor, Tensor]:
    """The formula, with autograd's own backward pass: context, and probabilities [B, N, Q, S] before dropout.

    Every other implementation is compared with it.
    """
    batch, heads, num_queries, _ = query_BNQH.shape
    num_keys = key_BNSH.shape[-2]
    shape = (batch, heads, num_queries, num_keys)
    index = call.positions.index(num_queries, num_keys)
    index_BNQS = (index if index.dim() == 2 else index.unsqueeze(1)).expand(shape)

    # The scale is applied to the query, not to the product: the fused kernels do the same, as unscaled products would exceed
    # the range of fp16.
    query, key = widened(query_BNQH), widened(key_BNSH)
    scores = torch.matmul(query * call.scale, key.transpose(-1, -2))
    if rel_key_NRH is not None:
        scores = scores + position_scores(query, rel_key_NRH, scale=call.scale).gather(-1, index_BNQS)
    if rel_query_NRH is not None:
        p2c_BNSR = position_scores(key, rel_query_NRH, scale=call.scale)
    if p2c_BNSR is not None:
        scores = scores + p2c_BNSR.gather(-1, index_BNQS.transpose(-1, -2)).transpose(-1, -2)

    # softmax subtracts the row's largest score. The lowest finite score instead of -inf keeps rows that see
    # nothing finite; the second fill makes them zero, and their gradients with them.
    unseen = None if call.mask is None else ~call.mask.visible().unsqueeze(1)
    if unseen is not None:
        scores = scores.masked_fill(unseen, torch.finfo(scores.dtype).min)
    probabilities = torch.softmax(scores, dim=-1)
    if unseen is not None:
        probabilities = probabilities.masked_fill(unseen, 0.0)
    attended = probabilities.to(value_BNSH.dtype)
    if call.dropout_p > 0.0:
        is_dropped = dropped(
            call.dropout_seed, p=call.dropout_p, shape=shape, device=query.device, counted=call.counted_queries
        )
        attended = attended.masked_fill(is_dropped, 0.0) / keep_probability(call.dropout_p)
    return torch.matmul(attended, value_BNSH), probabilities
