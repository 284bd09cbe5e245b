"""Disentangled attention in Triton kernels for NVIDIA GPUs: checks and preparation before they are launched.

Nothing of size [queries, keys] is saved for the backward pass: queries, keys, values, relative tables, context and the rows'
log-sum-exp are, and the rest is recomputed. Importing this module needs no Triton; calling `fused_attention` does.

Letters: B batch, N heads here, Q queries, S keys, H head size, R rows of the relative table.
"""

from torch import Tensor

from deberta_dist.errors import ConfigError
from deberta_dist.kernels.fused.availability import triton_reason, unavailable_reason, unsupported_reason
from deberta_dist.kernels.fused.call import Call
from deberta_dist.kernels.fused.tables import PositionTables, order_of_positions, position_tables
from deberta_dist.kernels.fused.tiles import tiles_of
from deberta_dist.kernels.inputs import AttentionCall, AttentionMask, RelativePositions


def fused_attention(
    query_BNQH: Tensor,
    key_BNSH: Tensor,
    value_BNSH: Tensor,
    rel_key_NRH: Tensor | None,
    rel_query_NRH: Tensor | None,
    call: AttentionCall,
) -> Tensor:
    """Context [B, N, Q, H], a transposed view of contiguous [B, Q, N, H]; for the arguments see `disentangled_attention`.

    All tensors have the same dtype and device. Products with the relative table are rounded to that dtype; scores, softmax
    and all sums are float32. Two calls with the same arguments agree in every bit, in the backward pass too. There is no
    second derivative. Triton's interpreter runs the kernels on CPU tensors.

    Positions of queries are not checked to lie in 0 .. S - 1, because that would wait for the GPU.

    Raises:
        ConfigError: dtypes, shapes, positions or mask are not supported.
    """
    _check_operands(query_BNQH, key_BNSH, value_BNSH, rel_key_NRH, rel_query_NRH)
    _check_positions_and_mask(query_BNQH, key_BNSH, call)
    reason = unsupported_reason(key_BNSH, positions=call.positions, mask=call.mask) or triton_reason()
    if reason is not None:
        raise ConfigError(reason)
    from deberta_dist.kernels.fused import autograd, launch

    if not launch.INTERPRETED:
        reason = unavailable_reason(key_BNSH, positions=call.positions, mask=call.mask)
        if reason is not None:
            raise ConfigError(reason)
    batch, _, num_queries, head_size = query_BNQH.shape
    num_keys = key_BNSH.shape[2]
    has_positions = call.positions.query_positions_BQ is not None
    num_positions = num_keys if has_positions else num_queries
    table = rel_key_NRH if rel_key_NRH is not None else rel_query_NRH
    tables = positions = order = starts = None
    if table is not None:
        tables = _tables(call, num_positions=num_positions, num_keys=num_keys, table=table)
        if has_positions:
            positions, order, starts = _ordered_positions(call.positions, batch=batch, num_keys=num_keys)
    query_ids, key_ids = _segments(call.mask, batch=batch)
    prepared = Call(
        tables=tables,
        num_positions=num_positions,
        num_keys=num_keys,
        positions_BQ=positions,
        order_BQ=order,
        order_starts_BP=starts,
        query_ids_BQ=query_ids,
        key_ids_BS=key_ids,
        scale=call.scale,
        dropout_p=call.dropout_p,
        dropout_seed=call.dropout_seed,
        counted_queries=num_queries if call.counted_queries is None else call.counted_queries,
        tiles=tiles_of(head_size, query_BNQH.dtype, query_BNQH.device),
    )
    return autograd.FusedAttention.apply(query_BNQH, key_BNSH, value_BNSH, rel_key_NRH, rel_query_NRH, prepared)


def _tables(call: AttentionCall, *, num_positions: int, num_keys: int, table: Tensor) -> PositionTables:
    return position_tables(
        call.positions.host_rows,
        num_positions=num_positions,
        num_keys=num_keys,
        table_rows=table.shape[1],
        device=table.device,
    )


def _ordered_positions(positions: RelativePositions, *, batch: int, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """The queries' positions, int32 [B, Q], and `order_of_positions`, computed once for all layers that share them."""

    def make() -> tuple[Tensor, Tensor, Tensor]:
        assert positions.query_positions_BQ is not None
        positions_BQ = _numbers(positions.query_positions_BQ, batch=batch)
        return positions_BQ, *order_of_positions(positions_BQ, num_positions=num_keys)

    return positions.derived(("fused", batch, num_keys), make)


def _segments(mask: AttentionMask | None, *, batch: int) -> tuple[Tensor | None, Tensor | None]:
    """Segments of queries and keys, int32 [B, Q] and [B, S], computed once for all layers that share ``mask``."""
    if mask is None:
        return None, None

    def make() -> tuple[Tensor, Tensor]:
        assert mask.key_segments_BS is not None, "pairs are not for this implementation"
        keys = _numbers(mask.key_segments_BS, batch=batch)
        return keys if mask.query_segments_BQ is None else _numbers(mask.query_segments_BQ, batch=batch), keys

    return mask.derived(("fused", batch), make)


def _numbers(x_BT: Tensor, *, batch: int) -> Tensor:
    return x_BT.int().expand(batch, -1).contiguous()


def _check_positions_and_mask(query_BNQH: Tensor, key_BNSH: Tensor, call: AttentionCall) -> None:
    batch, _, num_queries, _ = query_BNQH.shape
    num_keys = key_BNSH.shape[2]
    given = {"query_positions_BQ": (call.positions.query_positions_BQ, num_queries)}
    if call.mask is not None and call.mask.pairs_BQS is None:
        keys, queries = call.mask.key_segments_BS, call.mask.query_segments_BQ
        given["key_segments_BS"] = keys, num_keys
        given["query_segments_BQ"] = (keys if queries is None else queries), num_queries
    for name, (tensor, length) in given.items():
        if tensor is not None and tuple(tensor.shape) not in ((batch, length), (1, length)):
            raise ConfigError(f"{name} is {tuple(tensor.shape)}; expected {(batch, length)}")


def _check_operands(
    query_BNQH: Tensor, key_BNSH: Tensor, value_BNSH: Tensor, rel_key_NRH: Tensor | None, rel_query_NRH: Tensor | None
) -> None:
    batch, heads, _, head_size = query_BNQH.shape
    num_keys = key_BNSH.shape[2]
    table_rows = next((table.shape[1] for table in (rel_key_NRH, rel_query_NRH) if table is not None), 0)
    expected = {
        "key_BNSH": (key_BNSH, (batch, heads, num_keys, head_size)),
        "value_BNSH": (value_BNSH, (batch, heads, num_keys, head_size)),
        "rel_key_NRH": (rel_key_NRH, (heads, table_rows, head_size)),
        "rel_query_NRH": (rel_query_NRH, (heads, table_rows, head_size)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype != query_BNQH.dtype or tensor.device != query_BNQH.device:
            raise ConfigError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; expected {query_BNQH.dtype} "
                f"{shape} on {query_BNQH.device}, as query_BNQH has it"
            )
