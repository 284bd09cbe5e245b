"""What one call of the fused attention is made of: its tensors, and everything beside them that has no gradient.

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
        tables: None without position terms.
        num_positions: positions a query can have.
        num_keys: S.
        positions_BQ: int32, or None for 0 .. Q - 1.
        order_BQ: see ``tables.order_of_positions``; with positions only.
        order_starts_BP: likewise.
        query_ids_BQ: int32; pairs whose numbers are equal and not 0 see each other. None: all do.
        key_ids_BS: likewise.
        scale: of the scores.
        dropout_p: probability of dropping, 0 for none.
        dropout_seed: 64 bits.
        counted_queries: what is dropped is as if there were so many queries; those behind them are padding.
        tiles: of the kernels.
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
