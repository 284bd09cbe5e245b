"""What the fused kernels take of a GPU, found by compiling them without one: registers, stack, shared memory.

A spilled register costs a trip to local memory in the innermost loop, so tiles are chosen (``tiles``) and held (the
tests) by this. Needs Triton with its own ptxas, not interpreted.
"""

import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deberta_dist.kernels.fused import rows
from deberta_dist.kernels.fused.gradients import row_sums_kernel, token_gradient_kernel
from deberta_dist.kernels.fused.kernels import backward_kernel, delta_kernel, forward_kernel, keep_bits_kernel
from deberta_dist.kernels.fused.tiles import DELTA_BLOCK, KEEP_BLOCK, TILES, Tile

_POINTERS = {
    "row_of_distance": "*i16",
    "keep_bits": "*u8",
    "lse": "*fp32",
    "delta": "*fp32",
    **dict.fromkeys(("mean", "rstd", "partial_sums"), "*fp32"),
    **dict.fromkeys(("positions", "order", "order_starts", "query_ids", "key_ids"), "*i32"),
    **dict.fromkeys(("lowest_distance", "highest_distance"), "*i32"),
}
_TENSORS = (
    "query", "key", "value", "c2p", "p2c", "context", "context_gradient", "value_gradient", "score_gradient",
    "transposed_gradient", "sums", "row_sums", "other", "table", "gradient",
    "x", "bias", "residual", "weight", "norm_bias", "output", "x_gradient", "residual_gradient",
)  # fmt: skip
_FLOATS = ("scale_log2", "inverse_scale", "inverse_keep", "scale", "eps")
# As in a batch of sequences of 512: what Triton specialises on when it is launched.
_MULTIPLES_OF_16 = ("num_queries", "num_keys", "num_rows", "num_owners", "num_others", "num_positions", "num_columns")
# delta and keep_bits have no tile to choose.
_FIXED = Tile(64, 64, 4, 1)


class Resources(NamedTuple):
    """Of one compiled kernel.

    Attributes:
        registers: per thread.
        stack_bytes: per thread; spilled registers live there.
        shared_bytes: per program.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int


def compiled_kernel(name: str, tile: Tile, *, head_size: int, dtype: str, capability: int, has_positions: bool = False) -> Any:
    """What Triton makes of one kernel with every feature on: both position terms, document numbers, dropout.

    Args:
        name: a field of `Tiles`, of which sums and token gradients are those of keys, "row_sums_of_queries", "delta" or
            "keep_bits".
        tile: only its options matter to the last two.
        head_size: one of ``HEAD_SIZES``.
        dtype: "bf16", "fp16" or "fp32".
        capability: of the GPU: 80, 90.
        has_positions: queries are anywhere.
    """
    features = dict.fromkeys(("HAS_C2P", "HAS_P2C", "HAS_IDS", "HAS_DROPOUT"), True)
    scores = {"HEAD_SIZE": head_size, **features, "HAS_POSITIONS": has_positions, "PRECISION": "ieee"}
    sums = {"HAS_POSITIONS": has_positions, "BLOCK_O": tile.rows, "BLOCK_R": tile.columns}
    kernels: dict[str, tuple[Any, dict[str, Any]]] = {
        "keep_bits": (keep_bits_kernel, {"BLOCK": KEEP_BLOCK}),
        "delta": (delta_kernel, {"HEAD_SIZE": head_size, "BLOCK": DELTA_BLOCK}),
        "forward": (forward_kernel, {**scores, "BLOCK_Q": tile.rows, "BLOCK_K": tile.columns}),
        "backward": (backward_kernel, {**scores, "BLOCK_Q": tile.columns, "BLOCK_K": tile.rows}),
        "row_sums": (row_sums_kernel, {**sums, "OF_KEYS": True}),
        "row_sums_of_queries": (row_sums_kernel, {**sums, "OF_KEYS": False}),
        "token_gradient": (
            token_gradient_kernel,
            {
                "HAS_ROWS": True, "HEAD_SIZE": head_size,
                "BLOCK_O": tile.rows, "BLOCK_T": tile.columns, "PRECISION": "ieee",
            },
        ),
    }  # fmt: skip
    kernel, constants = kernels[name]
    return _compiled(kernel, constants, dtype, tile.options, capability)


def compiled_kernels(*, head_size: int, dtype: str, capability: int, has_positions: bool = False) -> dict[str, Any]:
    """`compiled_kernel` of every kernel as it is shipped for these, by name."""
    tiles = TILES[head_size, 4 if dtype == "fp32" else 2, capability // 10]
    shipped = {**tiles._asdict(), "row_sums_of_queries": tiles.row_sums, "delta": _FIXED, "keep_bits": _FIXED}
    compiled = functools.partial(
        compiled_kernel, head_size=head_size, dtype=dtype, capability=capability, has_positions=has_positions
    )
    return {name: compiled(name, tile) for name, tile in shipped.items()}


def compiled_row_kernels(*, columns: int, dtype: str, capability: int) -> dict[str, Any]:
    """The kernels of ``rows`` as they are launched on rows of so many columns, by name; with dropout."""
    options = rows.options_of(columns)
    block = {"BLOCK": options.pop("BLOCK")}
    found = {
        "dropout": (rows.dropout_kernel, block),
        "residual_norm": (rows.residual_norm_kernel, {**block, "HAS_DROPOUT": True}),
        "residual_norm_backward": (
            rows.residual_norm_backward_kernel,
            {**block, "HAS_DROPOUT": True, "ROWS": rows.ROWS_PER_PROGRAM},
        ),
    }
    return {name: _compiled(kernel, constants, dtype, options, capability) for name, (kernel, constants) in found.items()}


def _compiled(kernel: Any, constants: dict[str, Any], dtype: str, options: dict[str, Any], capability: int) -> Any:
    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in _TENSORS:
            return f"*{dtype}"
        return _POINTERS.get(name, "fp32" if name in _FLOATS else "i32")

    signature = {name: type_of(name) for name in kernel.arg_names}
    divisible = {
        (number,): [["tt.divisibility", 16]]
        for number, (name, kind) in enumerate(signature.items())
        if kind != "constexpr" and (kind.startswith("*") or name in _MULTIPLES_OF_16 or name.endswith("_stride"))
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=divisible)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled: Any) -> Resources:
    """Of a `compiled_kernel`."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    number = {word: int(value) for word, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    return Resources(number["REG"], number["STACK"], compiled.metadata.shared)
