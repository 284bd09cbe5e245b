"""Tile sizes and warps of the fused kernels, by head size, width of the dtype and architecture.

Chosen without a GPU by offline compilation with every feature on (``resources``): the largest tiles of those tried
that leave no registers on the stack, with Triton 3.9. Times on a GPU may choose otherwise; they belong here too.
"""

from typing import NamedTuple

import torch

HEAD_SIZES = (32, 64, 128)


class Tile(NamedTuple):
    """What one program of a kernel works on.

    Attributes:
        rows: tokens that the program owns: queries forward, keys backward.
        columns: tokens of the other side, or rows of the relative table, per step of its loop.
        num_warps: of 32 threads each.
        num_stages: steps whose loads are in flight.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """The tiles of the kernels that loop."""

    forward: Tile
    backward: Tile
    row_sums: Tile
    token_gradient: Tile


_ROW_SUMS = Tile(64, 32, 4, 2)
# (head size, bytes of the dtype, first digit of the compute capability)
TILES = {
    (32, 2, 8): Tiles(Tile(64, 32, 4, 2), Tile(32, 64, 4, 2), _ROW_SUMS, Tile(64, 64, 4, 2)),
    (64, 2, 8): Tiles(Tile(64, 64, 4, 2), Tile(32, 64, 4, 2), _ROW_SUMS, Tile(64, 64, 4, 2)),
    (128, 2, 8): Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), _ROW_SUMS, Tile(64, 64, 8, 2)),
    (32, 2, 9): Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), _ROW_SUMS, Tile(64, 64, 4, 2)),
    (64, 2, 9): Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), _ROW_SUMS, Tile(64, 64, 4, 2)),
    (128, 2, 9): Tiles(Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), _ROW_SUMS, Tile(64, 64, 8, 2)),
    (32, 4, 8): Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), _ROW_SUMS, Tile(64, 32, 8, 1)),
    (64, 4, 8): Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), _ROW_SUMS, Tile(64, 32, 8, 1)),
    (128, 4, 8): Tiles(Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), _ROW_SUMS, Tile(32, 32, 8, 1)),
    (32, 4, 9): Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), _ROW_SUMS, Tile(64, 32, 8, 1)),
    (64, 4, 9): Tiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 1), _ROW_SUMS, Tile(64, 32, 8, 1)),
    (128, 4, 9): Tiles(Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), _ROW_SUMS, Tile(32, 32, 8, 1)),
}


def tiles_of(head_size: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    """Tiles for tensors of a head size in ``HEAD_SIZES``; newer architectures take those of the newest in the table."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return TILES[head_size, dtype.itemsize, 9 if major >= 9 else 8]
