"""Tile sizes and warps of the fused kernels, by head size and architecture.

Chosen without a GPU, by registers and spills of offline compilation (``fused_resources``), so provisional where two
tiles are equal by that measure.
"""

from dataclasses import dataclass

import torch

HEAD_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Tile:
    """What one program of a kernel works on.

    Attributes:
        rows: tokens the program owns: queries forward, keys backward.
        columns: tokens of the other side per step of its loop.
        num_warps: 32 threads each.
        num_stages: steps whose loads are in flight.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tiles:
    """The tiles of the kernels that loop."""

    forward: Tile
    backward: Tile
    row_sums: Tile
    token_gradient: Tile


_SMALL = Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 1), Tile(64, 64, 4, 3))
TILES = {(h, f, a): _SMALL for h in HEAD_SIZES for f in (False, True) for a in (8, 9)}

def tiles_of(head_size: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    """Tiles for tensors of a head size in ``HEAD_SIZES``; those of the nearest older architecture in the table."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return TILES[head_size, dtype == torch.float32, 9 if major >= 9 else 8]
