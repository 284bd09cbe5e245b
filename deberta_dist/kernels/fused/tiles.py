"""Tile sizes and warps of the fused kernels, by head size, width of the dtype and architecture.

Chosen without a GPU by offline compilation with every feature on (``tests/kernels/fused_resources.py``). One
table serves Triton 3.6 to 3.9: no tile leaves registers on the stack with any of them. Times on a GPU may choose otherwise; they belong here too.

What decided, for heads of 64 in bfloat16 on capability 9.0: instructions that a warp executes in the inner loop per 512
pairs, and how many programs' registers fit a multiprocessor, both with Triton 3.6 / 3.7 / 3.9.

    forward    64 x 32, 4 warps, 1 stage     954 /  949 / 1001     3 / 3 / 4    taken
               64 x 32, 4 warps, 2 stages    942 /  919 / 1038     2 / 2 / 4
               64 x 64, 4 warps, 2 stages   1002 /  916 /  927     2 / 2 / 2
               64 x 64, 8 warps, 2 stages   1394 / 1192 / 1261     1 / 1 / 1
    backward   64 x 32, 4 warps, 2 stages   1212 / 1046 / 1088     2 / 2 / 2    taken
               32 x 64, 4 warps, 2 stages   1317 / 1130 / 1181     2 / 2 / 2
               64 x 64, 4 warps, 2 stages   spills with 3.6 and 3.9
               64 x 64, 8 warps, 2 stages   spills with 3.6

Four warps with 64 rows are one group for the matrix instructions of capability 9.0; with eight, two groups do all that
belongs to a row. Forward, the first three counts are close, and more programs hide the gathers, which no stage
prefetches.
"""

from typing import Any, NamedTuple

import torch

HEAD_SIZES = (32, 64, 128)
# Bytes and queries per program of the kernels that do not loop.
KEEP_BLOCK, DELTA_BLOCK = 1024, 32


class Tile(NamedTuple):
    """What one program of a kernel works on.

    Attributes:
        rows: tokens that the program owns: queries forward, keys backward.
        columns: tokens of the other side, or rows of the relative table, per step of its loop.
        num_warps: of 32 threads each.
        num_stages: steps whose loads are in flight.
        max_registers: per thread; None leaves it to the assembler.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What Triton compiles a kernel with."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
            "enable_fp_fusion": True,
        }


class Tiles(NamedTuple):
    """The tiles of the kernels that loop."""

    forward: Tile
    backward: Tile
    row_sums: Tile
    token_gradient: Tile


_ROW_SUMS = Tile(64, 32, 4, 2)
# Products of float32 hold a row of each factor in registers. Left alone, the assembler gives 16 warps 64 registers a
# thread and spills some.
_BACKWARD_OF_512_BYTES = Tile(16, 16, 16, 1, max_registers=96)
# (head size, bytes of the dtype, first digit of the compute capability)
TILES = {
    (32, 2, 8): Tiles(Tile(64, 32, 4, 2), Tile(32, 64, 4, 2), _ROW_SUMS, Tile(64, 64, 4, 2)),
    (64, 2, 8): Tiles(Tile(64, 32, 4, 2), Tile(32, 64, 4, 2), _ROW_SUMS, Tile(64, 64, 4, 2)),
    (128, 2, 8): Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), _ROW_SUMS, Tile(64, 64, 8, 2)),
    (32, 2, 9): Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), _ROW_SUMS, Tile(64, 64, 4, 2)),
    (64, 2, 9): Tiles(Tile(64, 32, 4, 1), Tile(64, 32, 4, 2), _ROW_SUMS, Tile(64, 64, 4, 2)),
    (128, 2, 9): Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), _ROW_SUMS, Tile(64, 64, 8, 2)),
    (32, 4, 8): Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), _ROW_SUMS, Tile(64, 32, 8, 1)),
    (64, 4, 8): Tiles(Tile(32, 32, 8, 1), Tile(16, 32, 8, 1), _ROW_SUMS, Tile(64, 32, 8, 1)),
    (128, 4, 8): Tiles(Tile(32, 32, 8, 1), _BACKWARD_OF_512_BYTES, _ROW_SUMS, Tile(32, 32, 8, 1)),
    (32, 4, 9): Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), _ROW_SUMS, Tile(64, 32, 8, 1)),
    (64, 4, 9): Tiles(Tile(32, 32, 8, 2), Tile(16, 32, 8, 1), _ROW_SUMS, Tile(64, 32, 8, 1)),
    (128, 4, 9): Tiles(Tile(32, 32, 8, 1), _BACKWARD_OF_512_BYTES, _ROW_SUMS, Tile(32, 32, 8, 1)),
}


def tiles_of(head_size: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    """Tiles for tensors of a head size in ``HEAD_SIZES``; newer architectures take those of the newest in the table."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return TILES[head_size, dtype.itemsize, 9 if major >= 9 else 8]
