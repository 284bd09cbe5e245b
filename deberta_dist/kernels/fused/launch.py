"""The steps of the fused attention: what each allocates and launches. ``autograd`` calls them in order. Needs Triton.

Letters: B batch, N heads, Q queries, S keys, T either, H head size, R rows of the relative table that occur.
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from deberta_dist.kernels.dropout import keep_probability, signed, threshold
from deberta_dist.kernels.fused.call import Call, Operands
from deberta_dist.kernels.fused.gradients import row_sums_kernel, token_gradient_kernel
from deberta_dist.kernels.fused.kernels import backward_kernel, delta_kernel, forward_kernel, keep_bits_kernel
from deberta_dist.kernels.fused.tiles import DELTA_BLOCK, KEEP_BLOCK

INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
_LOG2_E = math.log2(math.e)


def attend(operands: Operands, call: Call) -> tuple[Tensor, Tensor]:
    """Context [B, Q, N, H] and the rows' log2-sum-exp2 [B, N, Q]."""
    batch, num_queries, heads, _ = operands.query.shape
    context_BQNH = torch.empty_like(operands.query, memory_format=torch.contiguous_format)
    lse_BNQ = torch.empty(batch, heads, num_queries, dtype=torch.float32, device=context_BQNH.device)
    tile = call.tiles.forward
    forward_kernel[triton.cdiv(num_queries, tile.rows), heads, batch](
        **score_arguments(operands, call),
        context=context_BQNH,
        lse=lse_BNQ,
        BLOCK_Q=tile.rows,
        BLOCK_K=tile.columns,
        **tile.options,
    )
    return context_BQNH, lse_BNQ


def backward_of_scores(
    operands: Operands,
    call: Call,
    arguments: dict[str, Any],
    *,
    context_BQNH: Tensor,
    gradient_BQNH: Tensor,
    lse_BNQ: Tensor,
    into_BSNH: Tensor,
) -> tuple[Tensor, Tensor]:
    """Writes the gradient of the values into ``into_BSNH``; returns that of the scores before the scale.

    The latter twice, [B, N, Q, S to a multiple of 8] and [B, N, S, Q to a multiple of 8]: the next steps read it by queries
    and by keys, and reading a column touches as many cache lines as it has elements.
    """
    batch, num_queries, heads, head_size = context_BQNH.shape
    num_keys = operands.key.shape[1]
    delta_BNQ = torch.empty_like(lse_BNQ)
    delta_kernel[triton.cdiv(num_queries, DELTA_BLOCK), heads, batch](
        context_BQNH, gradient_BQNH, delta_BNQ, heads, num_queries, HEAD_SIZE=head_size, BLOCK=DELTA_BLOCK
    )
    score_gradient = context_BQNH.new_empty(batch, heads, num_queries, _multiple_of_8(num_keys))
    transposed_gradient = context_BQNH.new_empty(batch, heads, num_keys, _multiple_of_8(num_queries))
    tile = call.tiles.backward
    backward_kernel[triton.cdiv(num_keys, tile.rows), heads, batch](
        **arguments,
        context_gradient=gradient_BQNH,
        lse=lse_BNQ,
        delta=delta_BNQ,
        value_gradient=into_BSNH,
        score_gradient=score_gradient,
        transposed_gradient=transposed_gradient,
        value_gradient_stride=into_BSNH.stride(1),
        score_stride=score_gradient.shape[-1],
        transposed_stride=transposed_gradient.shape[-1],
        BLOCK_Q=tile.columns,
        BLOCK_K=tile.rows,
        **tile.options,
    )
    return score_gradient, transposed_gradient


def score_arguments(operands: Operands, call: Call) -> dict[str, Any]:
    """Arguments shared by the kernels that compute scores, by the names of their parameters."""
    query, key, value, rel_key, rel_query = operands
    batch, num_queries, heads, head_size = query.shape
    tables = call.tables
    has_dropout = call.dropout_p > 0.0
    unused = query  # a kernel needs some tensor for each pointer; it does not read this one
    return {
        "query": query,
        "key": key,
        "value": value,
        "c2p": unused if rel_key is None else _position_products(query, rel_key, call),
        "p2c": unused if rel_query is None else _position_products(key, rel_query, call),
        "row_of_distance": unused if tables is None else tables.row_of_distance,
        "positions": unused if call.positions_BQ is None else call.positions_BQ,
        "query_ids": unused if call.query_ids_BQ is None else call.query_ids_BQ,
        "key_ids": unused if call.key_ids_BS is None else call.key_ids_BS,
        "keep_bits": keep_bits(query, key, call) if has_dropout else unused,
        "query_stride": query.stride(1),
        "key_stride": key.stride(1),
        "value_stride": value.stride(1),
        "batch_size": batch,
        "num_heads": heads,
        "num_queries": num_queries,
        "num_keys": key.shape[1],
        "num_rows": 0 if tables is None else tables.num_rows,
        "scale_log2": call.scale * _LOG2_E,
        "inverse_scale": 1.0 / call.scale,
        "inverse_keep": 1.0 / keep_probability(call.dropout_p),
        "HEAD_SIZE": head_size,
        "HAS_C2P": rel_key is not None,
        "HAS_P2C": rel_query is not None,
        "HAS_POSITIONS": call.positions_BQ is not None,
        "HAS_IDS": call.key_ids_BS is not None,
        "HAS_DROPOUT": has_dropout,
        "PRECISION": _precision(),
    }


def keep_bits(query_BQNH: Tensor, key_BSNH: Tensor, call: Call) -> Tensor:
    """Dropout's bits, uint8 [B, N, Q, ceil(S / 8)]: a sixteenth of what the scores' gradient takes in 16 bits."""
    batch, num_queries, heads, _ = query_BQNH.shape
    num_bytes = -(-key_BSNH.shape[1] // 8)
    bits = torch.empty(batch, heads, num_queries, num_bytes, dtype=torch.uint8, device=query_BQNH.device)
    keep_bits_kernel[triton.cdiv(num_queries * num_bytes, KEEP_BLOCK), heads, batch](
        bits,
        # Signed, so that Triton gives every seed the same type (int32) and compiles once.
        signed(call.dropout_seed, bits=32),
        signed(call.dropout_seed >> 32, bits=32),
        threshold(call.dropout_p),
        heads,
        num_queries,
        call.counted_queries,
        num_bytes,
        BLOCK=KEEP_BLOCK,
    )
    return bits


def _position_products(tokens_BTNH: Tensor, table_NRH: Tensor, call: Call) -> Tensor:
    """Scaled products of every token with every row of the table, [N, B * T, R]."""
    tokens_NTH = _by_head(tokens_BTNH)
    products = tokens_NTH.new_empty(*tokens_NTH.shape[:2], table_NRH.shape[1])
    # The scale is the product's alpha: cuBLAS applies it to the float32 sum, before rounding to 16 bits.
    return torch.baddbmm(products, tokens_NTH, table_NRH.transpose(1, 2), beta=0, alpha=call.scale, out=products)


def sum_rows(score_gradient: Tensor, sums: Tensor, call: Call, *, of_keys: bool) -> None:
    """Writes the gradient of c2p or p2c, [N, B * T, R], over ``sums``; of p2c, ``of_keys``, from the transposed one."""
    assert call.tables is not None
    batch, heads, owners, score_stride = score_gradient.shape
    tile = call.tiles.row_sums
    has_positions = call.positions_BQ is not None
    num_queries = 0 if call.positions_BQ is None else call.positions_BQ.shape[1]
    # Two programs more than the rows need: one for each of the two longest ranges.
    grid = triton.cdiv(owners, tile.rows) * (2 + triton.cdiv(call.tables.num_rows, tile.columns)), heads, batch
    row_sums_kernel[grid](
        score_gradient,
        sums,
        call.tables.lowest_distance,
        call.tables.highest_distance,
        call.positions_BQ if has_positions else sums,
        call.order_BQ if has_positions else sums,
        call.order_starts_BP if has_positions else sums,
        score_stride,
        batch,
        heads,
        num_queries,
        owners,
        call.num_positions if of_keys else call.num_keys,
        call.tables.num_rows,
        call.tables.first_end,
        call.tables.last_end,
        OF_KEYS=of_keys,
        HAS_POSITIONS=has_positions,
        BLOCK_O=tile.rows,
        BLOCK_R=tile.columns,
        **tile.options,
    )


def token_gradient(
    score_gradient: Tensor,
    other_BTNH: Tensor,
    products_gradient: Tensor | None,
    table_NRH: Tensor | None,
    call: Call,
    *,
    into_BTNH: Tensor,
) -> None:
    """Writes the gradient of the queries, or of the keys from the transposed scores' gradient, into ``into_BTNH``."""
    batch, num_owners, heads, head_size = into_BTNH.shape
    num_others = other_BTNH.shape[1]
    tile = call.tiles.token_gradient
    has_rows = products_gradient is not None
    token_gradient_kernel[triton.cdiv(num_owners, tile.rows), heads, batch](
        score_gradient,
        other_BTNH,
        products_gradient if has_rows else score_gradient,
        table_NRH if has_rows else other_BTNH,
        into_BTNH,
        score_gradient.shape[-1],
        other_BTNH.stride(1),
        into_BTNH.stride(1),
        0 if table_NRH is None else table_NRH.stride(0),
        0 if table_NRH is None else table_NRH.stride(1),
        batch,
        heads,
        num_owners,
        num_others,
        0 if products_gradient is None else products_gradient.shape[-1],
        call.scale,
        HAS_ROWS=has_rows,
        HEAD_SIZE=head_size,
        BLOCK_O=tile.rows,
        BLOCK_T=tile.columns,
        PRECISION=_precision(),
        **tile.options,
    )


def table_gradient(products_gradient: Tensor, tokens_BTNH: Tensor, call: Call, *, into_NRH: Tensor) -> None:
    """Writes the gradient of the rows that occur into ``into_NRH``; the sum over the batch is inside the product."""
    assert call.tables is not None
    rows = into_NRH[:, call.tables.first_row : call.tables.first_row + call.tables.num_rows]
    products_NRT, tokens_NTH = products_gradient.transpose(1, 2), _by_head(tokens_BTNH)
    torch.baddbmm(rows, products_NRT, tokens_NTH, beta=0, alpha=call.scale, out=rows)


def empty_table_gradients(tables: dict[str, Tensor], call: Call, *, table_rows: int) -> dict[str, Tensor]:
    """For each of ``tables`` [N, table_rows, H]: uninitialised where `table_gradient` writes, zero elsewhere.

    They lie side by side, [table_rows, tables, N, H], in the order in which the tables lie in memory: if these are the
    outputs of one product, nobody has to copy their gradients.
    """
    if not tables:
        return {}
    assert call.tables is not None
    names = sorted(tables, key=lambda name: tables[name].storage_offset())
    table_NRH = tables[names[0]]
    shape = table_rows, len(names), table_NRH.shape[0], table_NRH.shape[2]
    whole = table_NRH.new_empty(shape) if call.tables.num_rows == table_rows else table_NRH.new_zeros(shape)
    return {name: part.transpose(0, 1) for name, part in zip(names, whole.unbind(1), strict=True)}


def token_rows(x_BNTH: Tensor) -> Tensor:
    """[B, T, N, H] with one stride between tokens and the heads of a token side by side; copied only if it must be."""
    x_BTNH = x_BNTH.transpose(1, 2)
    _, length, heads, head_size = x_BTNH.shape
    stride = x_BTNH.stride(1)
    wanted = (length * stride, stride, head_size, 1)
    if x_BTNH.stride() == wanted and stride >= heads * head_size:
        return x_BTNH
    # Through one dimension: contiguous() leaves the strides of dimensions of size one as they are.
    return x_BTNH.contiguous().flatten().view(x_BTNH.shape)


def _by_head(tokens_BTNH: Tensor) -> Tensor:
    """[N, B * T, H]: a view, so the batch is folded into the rows of one product per head."""
    return tokens_BTNH.flatten(0, 1).transpose(0, 1)


def rows_that_occur(table_NRH: Tensor | None, call: Call) -> Tensor | None:
    if table_NRH is None or call.tables is None:
        return None
    rows = table_NRH[:, call.tables.first_row : call.tables.first_row + call.tables.num_rows]
    return rows if rows.stride(2) == 1 else rows.contiguous()


def _multiple_of_8(number: int) -> int:
    return -(-number // 8) * 8


def _precision() -> str:
    """Of float32 products: what torch's own use."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
