"""Disentangled attention in Triton kernels for NVIDIA GPUs: where it can run, and the function.

The formula and its meaning are those of ``attention.disentangled_attention``. Nothing of size [queries, keys] is saved for
backward: queries, keys, values, relative tables, context and the rows' log-sum-exp are, and the rest is made again.
Importing this module needs no Triton; calling `fused_attention` does.

Letters: B batch, N heads here, Q queries, S keys, H head size, R rows of the relative table.
"""

import importlib.metadata
import importlib.util

import torch
from torch import Tensor

from deberta_dist.errors import ConfigError
from deberta_dist.kernels.attention import attention_scale
from deberta_dist.kernels.fused_call import Call
from deberta_dist.kernels.fused_tables import order_of_positions, position_tables
from deberta_dist.kernels.fused_tiles import HEAD_SIZES, tiles_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LEAST_CAPABILITY = (8, 0)
_LEAST_TRITON = (3, 7)


def unavailable_reason(
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_size: int,
    needs_probabilities: bool = False,
    needs_pair_mask: bool = False,
) -> str | None:
    """Why `fused_attention` cannot run here, in words, or None if it can. The one place that decides it.

    Args:
        device: of the queries, keys and values.
        dtype: likewise.
        head_size: likewise.
        needs_probabilities: the caller wants the attention probabilities.
        needs_pair_mask: the mask cannot be said by a key mask and document numbers.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the fused attention needs an NVIDIA GPU; the tensors are on {device}"
    if (capability := torch.cuda.get_device_capability(device)) < _LEAST_CAPABILITY:
        return (
            f"the fused attention needs compute capability {'.'.join(map(str, _LEAST_CAPABILITY))} or more; "
            f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}"
        )
    return _unsupported(dtype, head_size, needs_probabilities, needs_pair_mask) or _triton_missing()


def is_available(*, device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether `fused_attention` can run on such tensors; `unavailable_reason` says why not."""
    return unavailable_reason(device=device, dtype=dtype, head_size=head_size) is None


def _unsupported(dtype: torch.dtype, head_size: int, needs_probabilities: bool, needs_pair_mask: bool) -> str | None:
    if dtype not in DTYPES:
        return f"the fused attention takes {', '.join(map(str, DTYPES))}; given {dtype}"
    if head_size not in HEAD_SIZES:
        return f"the fused attention takes heads of {', '.join(map(str, HEAD_SIZES))}; given {head_size}"
    if needs_probabilities:
        return "the fused attention never holds the probabilities that are asked for"
    if needs_pair_mask:
        return "the fused attention takes a mask of keys and document numbers, not one of [queries, keys]"
    return None


def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the fused attention needs Triton: pip install 'deberta_dist[triton]'"
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < _LEAST_TRITON:
        return f"the fused attention needs Triton {'.'.join(map(str, _LEAST_TRITON))} or newer; installed is {version}"
    return None


def fused_attention(
    query_BNQH: Tensor,
    key_BNSH: Tensor,
    value_BNSH: Tensor,
    *,
    row_of_distance: tuple[int, ...],
    max_distance: int,
    query_positions_BQ: Tensor | None = None,
    rel_key_NRH: Tensor | None = None,
    rel_query_NRH: Tensor | None = None,
    key_mask_BS: Tensor | None = None,
    document_ids_BS: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
) -> Tensor:
    """Attention whose scores see content and relative position apart; see ``attention.disentangled_attention``.

    Products with the relative table are rounded to the operands' dtype; scores, softmax and all sums are float32. The
    dropout mask depends on (seed, batch * N + head, query, key) alone; p is taken to the nearest 1/65536. Two calls
    with the same arguments agree in every bit, backward too. There is no second derivative.

    Args:
        query_BNQH: content queries, of a dtype in ``DTYPES`` and a head size in ``HEAD_SIZES``.
        key_BNSH: content keys, same dtype.
        value_BNSH: content values, same dtype.
        row_of_distance: row of the relative table for each distance -max_distance .. max_distance (query minus key),
            not falling; ``models.positions.position_row_of_distance`` makes it.
        max_distance: tokens; distances beyond count as this.
        query_positions_BQ: place of each query among the keys, int, each in 0 .. S - 1 (not checked: that would wait
            for the GPU); 0 .. Q - 1 if absent.
        rel_key_NRH: projected relative table for content-to-position (c2p); absent means no such term.
        rel_query_NRH: the same for position-to-content (p2c).
        key_mask_BS: bool, real tokens: the others are not seen, and as queries see nothing.
        document_ids_BS: int, documents see only themselves; 0 neither sees nor is seen.
        dropout_p: probability of dropping, in [0, 1).
        dropout_seed: 64-bit seed of the dropout mask.

    Returns:
        Context [B, N, Q, H], a transposed view of contiguous [B, Q, N, H]. Queries that see nothing get exactly zero,
        and no gradient.

    Raises:
        ConfigError: the tensors cannot be taken (device, dtype, head size, shapes), ``dropout_p`` is out of range, or
            ``row_of_distance`` does not fit.
    """
    _check_tensors(query_BNQH, key_BNSH, value_BNSH, rel_key_NRH, rel_query_NRH)
    _check_numbers(
        query_BNQH,
        key_BNSH,
        positions=query_positions_BQ,
        key_mask=key_mask_BS,
        document_ids=document_ids_BS,
        dropout_p=dropout_p,
    )
    if (missing := _triton_missing()) is not None:
        raise ConfigError(missing)
    from deberta_dist.kernels import fused_autograd, fused_launch

    if not fused_launch.INTERPRETED:
        reason = unavailable_reason(device=query_BNQH.device, dtype=query_BNQH.dtype, head_size=query_BNQH.shape[-1])
        if reason is not None:
            raise ConfigError(reason)
    num_queries, num_keys = query_BNQH.shape[2], key_BNSH.shape[2]
    ids_BS = _ids(key_mask_BS, document_ids_BS)
    table = rel_key_NRH if rel_key_NRH is not None else rel_query_NRH
    tables = positions = order = starts = None
    num_positions = num_queries if query_positions_BQ is None else num_keys
    if table is not None:
        tables = position_tables(
            tuple(row_of_distance),
            max_distance=max_distance,
            num_positions=num_positions,
            num_keys=num_keys,
            table_rows=table.shape[1],
            device=query_BNQH.device,
        )
        if query_positions_BQ is not None:
            positions = query_positions_BQ.int().contiguous()
            order, starts = order_of_positions(query_positions_BQ, num_positions=num_keys)
    call = Call(
        tables=tables,
        num_positions=num_positions,
        num_keys=num_keys,
        positions_BQ=positions,
        order_BQ=order,
        order_starts_BP=starts,
        query_ids_BQ=None if ids_BS is None else _ids_of_queries(ids_BS, query_positions_BQ, num_queries),
        key_ids_BS=ids_BS,
        scale=attention_scale(query_BNQH.shape[-1], has_c2p=rel_key_NRH is not None, has_p2c=rel_query_NRH is not None),
        dropped_of_65536=min(round(dropout_p * 65536), 65535),
        seed=dropout_seed,
        tiles=tiles_of(query_BNQH.shape[-1], query_BNQH.dtype, query_BNQH.device),
    )
    return fused_autograd.FusedAttention.apply(query_BNQH, key_BNSH, value_BNSH, rel_key_NRH, rel_query_NRH, call)


def _ids(key_mask_BS: Tensor | None, document_ids_BS: Tensor | None) -> Tensor | None:
    """Numbers that decide who sees whom: those equal and not 0, int32 [B, S]."""
    if document_ids_BS is None:
        return None if key_mask_BS is None else key_mask_BS.bool().int().contiguous()
    ids = document_ids_BS.int()
    return (ids if key_mask_BS is None else ids.masked_fill(~key_mask_BS.bool(), 0)).contiguous()


def _ids_of_queries(ids_BS: Tensor, positions_BQ: Tensor | None, num_queries: int) -> Tensor:
    return ids_BS[:, :num_queries].contiguous() if positions_BQ is None else ids_BS.gather(1, positions_BQ.long())


def _check_numbers(
    query_BNQH: Tensor,
    key_BNSH: Tensor,
    *,
    positions: Tensor | None,
    key_mask: Tensor | None,
    document_ids: Tensor | None,
    dropout_p: float,
) -> None:
    batch, _, num_queries, _ = query_BNQH.shape
    num_keys = key_BNSH.shape[2]
    expected = {
        "query_positions_BQ": (positions, (batch, num_queries)),
        "key_mask_BS": (key_mask, (batch, num_keys)),
        "document_ids_BS": (document_ids, (batch, num_keys)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ConfigError(f"{name} is {tuple(tensor.shape)}; expected {shape}")
    if positions is None and num_queries > num_keys and (key_mask is not None or document_ids is not None):
        raise ConfigError(
            f"{num_queries} queries and a mask of {num_keys} keys: queries without positions are the first keys; "
            "give query_positions_BQ"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ConfigError(f"dropout_p is {dropout_p}; expected a probability in [0, 1)")


def _check_tensors(
    query_BNQH: Tensor, key_BNSH: Tensor, value_BNSH: Tensor, rel_key_NRH: Tensor | None, rel_query_NRH: Tensor | None
) -> None:
    reason = _unsupported(query_BNQH.dtype, query_BNQH.shape[-1], False, False)
    if reason is not None:
        raise ConfigError(reason)
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
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; expected {query_BNQH.dtype} {shape} "
                f"on {query_BNQH.device}, as query_BNQH has it"
            )
