"""The arguments of one call of the fused attention: tensors with gradients, and everything else.

Letters: B batch, N heads, Q queries, S keys, T either, P positions of queries, H head size, R rows that occur.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from deberta_dist.kernels.fused.tables import PositionTables
from deberta_dist.kernels.fused.tiles import Tiles


@dataclass(frozen=True)
class Call:
    """Everything of one call that has no gradient; see ``attention.fused_attention``.

    Attributes:
        tables: rows of the relative table by distance; None without position terms.
        num_positions: P; positions of queries are 0 .. P - 1.
        num_keys: S; keys are at 0 .. S - 1.
        positions_BQ: int32; None for queries at 0 .. Q - 1.
        order_BQ: queries sorted by position, see ``tables.order_of_positions``; None without ``positions_BQ``.
        order_starts_BP: where each position starts in ``order_BQ``; None without ``positions_BQ``.
        query_ids_BQ: int32 segments; a query sees the keys of its own segment, 0 sees nothing. None: all see all.
        key_ids_BS: the keys' segments, int32; None with ``query_ids_BQ``.
        scale: factor on the scores.
        dropout_p: probability of dropping, 0 for none.
        dropout_seed: 64 bits that decide which probabilities are dropped.
        counted_queries: rows are numbered for dropout as if each head had this many queries; further ones are padding.
        tiles: sizes and warps of the kernels, chosen by head size, dtype and device.
    """

    tables: PositionTables | None
    num_positions: int
    num_keys: int
    positions_BQ: Tensor | None
    order_BQ: Tensor | None
    order_starts_BP: Tensor | None
    query_ids_BQ: Tensor | None
    key_ids_BS: Tensor | None
    scale: float
    dropout_p: float
    dropout_seed: int
    counted_queries: int
    tiles: Tiles


class Operands(NamedTuple):
    """What is differentiated: tokens [B, T, N, H] with one stride between tokens, tables [N, R, H] cut to their rows."""

    query: Tensor
    key: Tensor
    value: Tensor
    rel_key: Tensor | None
    rel_query: Tensor | None
