"""The formula itself, with autograd's own backward pass: what every other implementation is compared with.

Letters: B batch, N heads here, Q queries, S keys, H head size, R rows of the relative table.
"""

import torch
from torch import Tensor

from deberta_dist.kernels.dropout import dropped, keep_probability
from deberta_dist.kernels.inputs import AttentionCall, position_scores, widened


def reference_attention(
    query_BNQH: Tensor,
    key_BNSH: Tensor,
    value_BNSH: Tensor,
    rel_key_NRH: Tensor | None,
    rel_query_NRH: Tensor | None,
    p2c_BNSR: Tensor | None,
    call: AttentionCall,
) -> tuple[Tensor, Tensor]:
    """Context and probabilities; for the arguments see `disentangled_attention`."""
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
