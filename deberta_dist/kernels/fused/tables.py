"""Integer tables of relative positions for the fused kernels, computed once per length and device.

Letters: Q queries, S keys, P positions of queries, R rows of the relative table that occur.
"""

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from deberta_dist.errors import ConfigError

# Matrix products are slow where the bytes of a row are not a multiple of 16.
_ROW_MULTIPLE = 8


@dataclass(frozen=True)
class PositionTables:
    """Which row belongs to which distance (query minus key), for distances 1 - S .. P - 1.

    Attributes:
        row_of_distance: row counted from ``first_row``, int16 [S - 1 + P]; entry 0 is distance 1 - S.
        lowest_distance: smallest distance of each row, int32 [R].
        highest_distance: largest distance of each row, int32 [R]; below the smallest if the row does not occur.
        first_row: row of the relative table that row 0 of these tables is.
        num_rows: R, a multiple of 8 where the relative table is large enough.
        first_end: row of the smallest distance.
        last_end: row of the largest distance.
    """

    row_of_distance: Tensor
    lowest_distance: Tensor
    highest_distance: Tensor
    first_row: int
    num_rows: int
    first_end: int
    last_end: int


@functools.lru_cache(maxsize=128)
def position_tables(
    row_of_distance: tuple[int, ...],
    *,
    num_positions: int,
    num_keys: int,
    table_rows: int,
    device: torch.device,
) -> PositionTables:
    """Tables for queries at 0 .. num_positions - 1 and keys at 0 .. num_keys - 1.

    Args:
        row_of_distance: row of the relative table for each distance -M .. M, query minus key; farther ones count as M.
        num_positions: P, one more than the largest position of a query.
        num_keys: S, number of keys.
        table_rows: rows of the relative table, of which the result uses a range.
        device: where the kernels read the result.

    Raises:
        ConfigError: the row of a distance falls as the distance grows, or is not in the table.
    """
    _check(row_of_distance, table_rows=table_rows)
    max_distance = len(row_of_distance) // 2
    # A tensor made in inference mode could not be used by the training step that finds it in the cache.
    with torch.inference_mode(False):
        distances = torch.arange(1 - num_keys, num_positions)
        rows = torch.tensor(row_of_distance)[distances.clamp(-max_distance, max_distance) + max_distance]
        first, last = _widened(int(rows[0]), int(rows[-1]), table_rows)
        every = torch.arange(first, last + 1)
        return PositionTables(
            row_of_distance=(rows - first).to(torch.int16).to(device),
            lowest_distance=(torch.searchsorted(rows, every) + 1 - num_keys).int().to(device),
            highest_distance=(torch.searchsorted(rows, every, right=True) - num_keys).int().to(device),
            first_row=first,
            num_rows=last - first + 1,
            first_end=int(rows[0]) - first,
            last_end=int(rows[-1]) - first,
        )


def order_of_positions(positions_BQ: Tensor, *, num_positions: int) -> tuple[Tensor, Tensor]:
    """Queries in the order of their positions, int32 [B, Q], and where each position starts there, int32 [B, P + 1]."""
    sorted_BQ, order_BQ = torch.sort(positions_BQ, dim=1, stable=True)
    every_position = torch.arange(num_positions + 1, device=positions_BQ.device, dtype=sorted_BQ.dtype)
    starts = torch.searchsorted(sorted_BQ, every_position.expand(len(sorted_BQ), -1).contiguous(), out_int32=True)
    return order_BQ.int(), starts


def _widened(first: int, last: int, table_rows: int) -> tuple[int, int]:
    """A range of rows widened to a multiple of `_ROW_MULTIPLE`, as far as the table has rows."""
    wanted = -(-(last - first + 1) // _ROW_MULTIPLE) * _ROW_MULTIPLE
    first = min(first, max(table_rows - wanted, 0))
    return first, min(first + wanted, table_rows) - 1


@functools.lru_cache(maxsize=32)
def falls(row_of_distance: tuple[int, ...]) -> bool:
    """Whether a row is below that of a smaller distance."""
    return any(right < left for left, right in itertools.pairwise(row_of_distance))


def _check(row_of_distance: tuple[int, ...], *, table_rows: int) -> None:
    if falls(row_of_distance):
        raise ConfigError("row_of_distance falls as the distance grows; the fused kernel sums neighbours that share a row")
    if row_of_distance[0] < 0 or row_of_distance[-1] >= min(table_rows, 1 << 15):
        raise ConfigError(
            f"row_of_distance has rows {row_of_distance[0]} .. {row_of_distance[-1]}, but the relative table has "
            f"{table_rows} (at most 32768 with the fused kernel)"
        )
