"""Disentangled attention on plain tensors: the operator every model layer calls.

With d(i, j) the row of the relative table for query i and key j:

    score[i, j] = (q_i . k_j + q_i . Kr[d(i, j)] + k_j . Qr[d(i, j)]) / sqrt(H (1 + [c2p] + [p2c]))
    out_i       = sum_j dropout(softmax_j(score))[i, j] v_j

Both position terms use d(i, j). The paper's Eq. 4 has d(j, i) in the last one; the released weights were
trained with d(i, j). This is the plain form with autograd's own backward; a faster one takes the same
arguments and is held to its numbers.

Letters: B batch, N heads here, Q queries, S keys, H head size, R rows of the relative table.

Source: arXiv 2006.03654 Eq. 4; microsoft/DeBERTa DeBERTa/deberta/disentangled_attention.py@4d7fe0bd.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def attention_scale(head_size: int, *, has_c2p: bool, has_p2c: bool) -> float:
    """1 / sqrt(H (1 + [c2p] + [p2c])): the scores' variance stays that of one term."""
    return 1.0 / math.sqrt(head_size * (1 + has_c2p + has_p2c))


def position_scores(content_BNSH: Tensor, table_NRH: Tensor, *, scale: float) -> Tensor:
    """Products of every token with every row of the relative table, scaled; float32 [B, N, S, R].

    The batch is folded into the rows of one product per head, so the table is not repeated over it.
    """
    batch, heads, length, head_size = content_BNSH.shape
    content = _scores_dtype(content_BNSH).transpose(0, 1).reshape(heads, batch * length, head_size)
    scores = torch.bmm(content, (_scores_dtype(table_NRH) * scale).transpose(1, 2))
    return scores.view(heads, batch, length, -1).transpose(0, 1)


def disentangled_attention(
    query_BNQH: Tensor,
    key_BNSH: Tensor,
    value_BNSH: Tensor,
    *,
    relative_index: Tensor,
    rel_key_NRH: Tensor | None = None,
    rel_query_NRH: Tensor | None = None,
    p2c_BNSR: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: Callable[[Tensor], Tensor] | None = None,
    return_probabilities: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention whose scores see content and relative position apart.

    Scores and softmax are float32 (float64 if given float64) whatever the inputs are.

    Args:
        query_BNQH: content queries.
        key_BNSH: content keys.
        value_BNSH: content values; their dtype is the output's.
        relative_index: row of the relative table for each (query, key), int64 [Q, S] or [B, Q, S].
        rel_key_NRH: projected relative table for content-to-position (c2p); absent means no such term.
        rel_query_NRH: the same for position-to-content (p2c).
        p2c_BNSR: `position_scores` of the keys with ``rel_query_NRH``, for callers that attend to the same keys
            more than once; replaces ``rel_query_NRH``.
        mask: bool, broadcastable to [B, 1, Q, S]; a query that sees no key gets exactly zero.
        dropout: applied to the probabilities.
        return_probabilities: also return the probabilities, before dropout.

    Returns:
        context [B, N, Q, H], and probabilities [B, N, Q, S] (float32) or None.

    Raises:
        ValueError: both ``rel_query_NRH`` and ``p2c_BNSR`` are given.
    """
    if rel_query_NRH is not None and p2c_BNSR is not None:
        raise ValueError("rel_query_NRH and p2c_BNSR are two forms of one term; give one of them")
    has_p2c = rel_query_NRH is not None or p2c_BNSR is not None
    scale = attention_scale(query_BNQH.shape[-1], has_c2p=rel_key_NRH is not None, has_p2c=has_p2c)
    batch, heads, num_queries, _ = query_BNQH.shape
    num_keys = key_BNSH.shape[-2]
    index_BNQS = (relative_index if relative_index.dim() == 2 else relative_index.unsqueeze(1)).expand(
        batch, heads, num_queries, num_keys
    )

    # The scale goes into an operand: unscaled products would leave half precision's range in a fused form.
    query, key = _scores_dtype(query_BNQH), _scores_dtype(key_BNSH)
    scores = torch.matmul(query * scale, key.transpose(-1, -2))
    if rel_key_NRH is not None:
        scores = scores + position_scores(query, rel_key_NRH, scale=scale).gather(-1, index_BNQS)
    if rel_query_NRH is not None:
        p2c_BNSR = position_scores(key, rel_query_NRH, scale=scale)
    if p2c_BNSR is not None:
        # Gathered along contiguous rows with the index transposed: dim=-2 would stride over R at every step.
        scores = scores + p2c_BNSR.gather(-1, index_BNQS.transpose(-1, -2)).transpose(-1, -2)

    # softmax subtracts the row's largest score. The lowest finite score instead of -inf keeps rows that see
    # nothing finite; the second fill makes them zero, and their gradients with them.
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    probabilities = torch.softmax(scores, dim=-1)
    if mask is not None:
        probabilities = probabilities.masked_fill(~mask, 0.0)
    attended = probabilities.to(value_BNSH.dtype)
    context = torch.matmul(attended if dropout is None else dropout(attended), value_BNSH)
    return context, probabilities if return_probabilities else None


def _scores_dtype(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
