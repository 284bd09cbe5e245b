"""The fused attention as an autograd function: the saved tensors and the order of the steps. Needs Triton.

Forward: c2p and p2c by matrix products, the batch folded into their rows; one kernel for the rest. Backward: they are
recomputed; one kernel gives dV and the scores' gradient dS; sums over rows of the relative table overwrite c2p and p2c; the
rest are products: dQ = dS K + dc2p Kr, dK = dS^T Q + dp2c Qr, dKr = dc2p^T Q, dQr = dp2c^T K.

Letters: B batch, N heads, Q queries, S keys, T either, H head size, R rows of the relative table.
"""

from typing import Any

import torch
from torch import Tensor

from deberta_dist.kernels.fused.call import Call, Operands
from deberta_dist.kernels.fused.launch import (
    attend,
    backward_of_scores,
    empty_table_gradients,
    rows_that_occur,
    score_arguments,
    sum_rows,
    table_gradient,
    token_gradient,
    token_rows,
)
from deberta_dist.kernels.inputs import empty_token_gradients, refuse_second_derivative


class FusedAttention(torch.autograd.Function):
    """context = dropout(softmax(scores)) V, for arguments that `attention.fused_attention` has checked."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BNQH: Tensor,
        key_BNSH: Tensor,
        value_BNSH: Tensor,
        rel_key_NRH: Tensor | None,
        rel_query_NRH: Tensor | None,
        call: Call,
    ) -> Tensor:
        tokens = [token_rows(x_BNTH) for x_BNTH in (query_BNQH, key_BNSH, value_BNSH)]
        tables = [rows_that_occur(table_NRH, call) for table_NRH in (rel_key_NRH, rel_query_NRH)]
        operands = Operands(*tokens, *tables)
        # Triton launches on the current device, whatever the tensors are on.
        with torch.cuda.device_of(query_BNQH):
            context_BQNH, lse_BNQ = attend(operands, call)
        ctx.save_for_backward(*operands, context_BQNH, lse_BNQ)
        ctx.call = call
        ctx.table_rows = next((table.shape[1] for table in (rel_key_NRH, rel_query_NRH) if table is not None), 0)
        return context_BQNH.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, gradient_BNQH: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("fused")
        *saved, context_BQNH, lse_BNQ = ctx.saved_tensors
        operands, call = Operands(*saved), ctx.call
        arguments = score_arguments(operands, call)
        gradient_BQNH = gradient_BNQH.transpose(1, 2).contiguous()
        query, key, value, rel_key, rel_query = operands
        of_query, of_key, of_value = empty_token_gradients(*(x.transpose(1, 2) for x in (query, key, value)))
        score_gradient, transposed_gradient = backward_of_scores(
            operands,
            call,
            arguments,
            context_BQNH=context_BQNH,
            gradient_BQNH=gradient_BQNH,
            lse_BNQ=lse_BNQ,
            into_BSNH=of_value.transpose(1, 2),
        )
        # The products c2p and p2c are no longer needed: their gradients reuse their memory.
        c2p_gradient = p2c_gradient = None
        if rel_key is not None:
            c2p_gradient = arguments["c2p"]
            sum_rows(score_gradient, c2p_gradient, call, of_keys=False)
        if rel_query is not None:
            p2c_gradient = arguments["p2c"]
            sum_rows(transposed_gradient, p2c_gradient, call, of_keys=True)
        needs_query, needs_key, _, needs_rel_key, needs_rel_query, _ = ctx.needs_input_grad
        if needs_query:
            token_gradient(score_gradient, key, c2p_gradient, rel_key, call, into_BTNH=of_query.transpose(1, 2))
        if needs_key:
            token_gradient(transposed_gradient, query, p2c_gradient, rel_query, call, into_BTNH=of_key.transpose(1, 2))
        tables = (("key", rel_key, needs_rel_key), ("query", rel_query, needs_rel_query))
        wanted = {name: table for name, table, is_needed in tables if is_needed and table is not None}
        of_tables = empty_table_gradients(wanted, call, table_rows=ctx.table_rows)
        if needs_rel_key and c2p_gradient is not None:
            table_gradient(c2p_gradient, query, call, into_NRH=of_tables["key"])
        if needs_rel_query and p2c_gradient is not None:
            table_gradient(p2c_gradient, key, call, into_NRH=of_tables["query"])
        return (
            of_query if needs_query else None,
            of_key if needs_key else None,
            of_value,
            of_tables.get("key"),
            of_tables.get("query"),
            None,
        )
