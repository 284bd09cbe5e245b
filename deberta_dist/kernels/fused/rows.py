"""Triton kernels on rows of activations: dropout, and dropout, residual sum and LayerNorm in one pass.

Which elements are dropped is a function of seed, row number and column (`kernels.dropout`), computed where it is used: no mask
is drawn or saved. No kernel uses atomics, so two runs agree in every bit. Needs Triton.

Layouts: x, residual, sum, output and their gradients [R, D], contiguous; mean, rstd float32 [R]; partial sums float32
[3, P, D] of P programs. Row r has the number (r // length) stride + r % length + offset; see `kernels.rows.RowNumbers`.

Letters: R rows, D columns.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deberta_dist.kernels.dropout import signed, threshold
from deberta_dist.kernels.fused.words import keeps, words_of_row

ROWS_PER_PROGRAM = 16
"""In the backward pass. Fewer rows give more partial sums to add; more leave multiprocessors without work."""
_SEEDS = ["seed_low", "seed_high", "threshold"]


class Dropping(NamedTuple):
    """What decides which elements are dropped.

    Attributes:
        p: probability of dropping, 0 for none.
        seed: 64 bits, mixed with a row's number.
        length: with ``stride`` and ``offset``, how rows are numbered; see `kernels.rows.RowNumbers`.
    """

    p: float
    seed: int
    length: int
    stride: int
    offset: int


@triton.jit
def _words_of_row(row, seed_low, seed_high, length, stride, offset):
    """The two 32-bit words of a row."""
    number = (row // length).to(tl.int64) * stride + row % length + offset
    return words_of_row(number, seed_low, seed_high)


@triton.jit
def _kept(row, columns, seed_low, seed_high, threshold, length, stride, offset):
    """Whether each column of a row is kept."""
    low, high = _words_of_row(row, seed_low, seed_high, length, stride, offset)
    return keeps(low, high, columns, threshold)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def row_words_kernel(low, high, seed_low, seed_high, num_rows, length, stride, offset, BLOCK: tl.constexpr):
    """The words of all rows, int32 [R] each."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low_words, high_words = _words_of_row(rows, seed_low, seed_high, length, stride, offset)
    tl.store(low + rows, low_words, mask=rows < num_rows)
    tl.store(high + rows, high_words, mask=rows < num_rows)


@triton.jit(do_not_specialize=_SEEDS)
def dropout_kernel(
    x, output, seed_low, seed_high, threshold, inverse_keep, num_columns, length, stride, offset, BLOCK: tl.constexpr
):  # fmt: skip
    """output = x where kept, over the kept share; one program a row."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    at = row.to(tl.int64) * num_columns + columns
    kept = _kept(row, columns, seed_low, seed_high, threshold, length, stride, offset)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + at, tl.where(kept, value * inverse_keep, 0.0).to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SEEDS)
def residual_norm_kernel(
    x, bias, residual, weight, norm_bias, sums, output, mean, rstd,
    seed_low, seed_high, threshold, inverse_keep, eps, num_columns, length, stride, offset,
    HAS_DROPOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """output = LayerNorm(dropout(x + bias) + residual); keeps the rounded sum and the rows' statistics."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    at = row.to(tl.int64) * num_columns + columns
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_DROPOUT:
        kept = _kept(row, columns, seed_low, seed_high, threshold, length, stride, offset)
        value = tl.where(kept, value * inverse_keep, 0.0)
    value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    # The backward pass finds the rounded sum, so the statistics are of that.
    rounded = value.to(sums.dtype.element_ty)
    tl.store(sums + at, rounded, mask=inside)
    value = rounded.to(tl.float32)
    row_mean = tl.sum(value, 0) / num_columns
    centred = tl.where(inside, value - row_mean, 0.0)
    row_rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / num_columns + eps)
    scaled = centred * row_rstd * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    scaled += tl.load(norm_bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + at, scaled.to(output.dtype.element_ty), mask=inside)
    tl.store(mean + row, row_mean)
    tl.store(rstd + row, row_rstd)


@triton.jit(do_not_specialize=_SEEDS)
def residual_norm_backward_kernel(
    gradient, sums, weight, mean, rstd, x_gradient, residual_gradient, partial_sums,
    seed_low, seed_high, threshold, inverse_keep, num_rows, num_columns, length, stride, offset,
    HAS_DROPOUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of x and residual, and this program's part of those of weight, norm_bias and bias.

    With n the normalised sum and g the gradient times the weight: d residual = rstd (g - mean(g) - n mean(g n)), and d x
    is that where kept, over the kept share.
    """
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    of_weight = tl.zeros([BLOCK], tl.float32)
    of_norm_bias = tl.zeros([BLOCK], tl.float32)
    of_bias = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0) * ROWS
    for row in range(first, tl.minimum(first + ROWS, num_rows)):
        at = tl.cast(row, tl.int64) * num_columns + columns
        outer = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        row_rstd = tl.load(rstd + row)
        value = tl.load(sums + at, mask=inside, other=0.0).to(tl.float32)
        normal = tl.where(inside, (value - tl.load(mean + row)) * row_rstd, 0.0)
        of_weight += outer * normal
        of_norm_bias += outer
        scaled = outer * scale
        slope = scaled - tl.sum(scaled, 0) / num_columns - normal * (tl.sum(scaled * normal, 0) / num_columns)
        slope = tl.where(inside, slope * row_rstd, 0.0)
        tl.store(residual_gradient + at, slope.to(residual_gradient.dtype.element_ty), mask=inside)
        if HAS_DROPOUT:
            kept = _kept(row, columns, seed_low, seed_high, threshold, length, stride, offset)
            slope = tl.where(kept, slope * inverse_keep, 0.0)
            tl.store(x_gradient + at, slope.to(x_gradient.dtype.element_ty), mask=inside)
        of_bias += slope
    at = tl.program_id(0).to(tl.int64) * num_columns + columns
    size = tl.num_programs(0).to(tl.int64) * num_columns
    tl.store(partial_sums + at, of_weight, mask=inside)
    tl.store(partial_sums + size + at, of_norm_bias, mask=inside)
    tl.store(partial_sums + 2 * size + at, of_bias, mask=inside)


def row_words(num_rows: int, dropping: Dropping, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """The two words of every row, int32 [R, 1] each."""
    low, high = torch.empty(2, num_rows, 1, dtype=torch.int32, device=device)
    block = 128
    with torch.cuda.device_of(low):
        row_words_kernel[(triton.cdiv(num_rows, block),)](
            low, high, *_seed(dropping), num_rows, *_numbers(dropping), BLOCK=block
        )
    return low, high


def dropout(x: Tensor, dropping: Dropping, *, inverse_keep: float) -> Tensor:
    """Dropout of the last dimension's rows; also its own backward pass."""
    x = x.contiguous()
    output, columns = torch.empty_like(x), x.shape[-1]
    with torch.cuda.device_of(x):
        dropout_kernel[(x.numel() // columns,)](
            x,
            output,
            *_seed(dropping),
            threshold(dropping.p),
            inverse_keep,
            columns,
            *_numbers(dropping),
            **options_of(columns),
        )
    return output


def residual_norm(
    x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, norm_bias: Tensor, *, eps: float, dropping: Dropping,
    inverse_keep: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, and what the backward pass needs: the sum, mean and rstd of its rows. All [..., D] contiguous."""
    output, sums, columns = torch.empty_like(x), torch.empty_like(x), x.shape[-1]
    rows = x.numel() // columns
    mean, rstd = torch.empty(2, rows, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        residual_norm_kernel[(rows,)](
            x, bias, residual, weight, norm_bias, sums, output, mean, rstd,
            *_seed(dropping), threshold(dropping.p), inverse_keep, eps, columns, *_numbers(dropping),
            HAS_DROPOUT=dropping.p > 0.0, **options_of(columns),
        )  # fmt: skip
    return output, sums, mean, rstd


def residual_norm_backward(
    gradient: Tensor, sums: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, *, dropping: Dropping,
    inverse_keep: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, of residual, and float32 [3, D] of weight, norm_bias and bias."""
    residual_gradient, columns = torch.empty_like(sums), sums.shape[-1]
    # Without dropout both gradients are the same: one tensor serves.
    x_gradient = torch.empty_like(sums) if dropping.p > 0.0 else residual_gradient
    rows = sums.numel() // columns
    programs = triton.cdiv(rows, ROWS_PER_PROGRAM)
    partial_sums = torch.empty(3, programs, columns, dtype=torch.float32, device=sums.device)
    with torch.cuda.device_of(sums):
        residual_norm_backward_kernel[(programs,)](
            gradient, sums, weight, mean, rstd, x_gradient, residual_gradient, partial_sums,
            *_seed(dropping), threshold(dropping.p), inverse_keep, rows, columns, *_numbers(dropping),
            HAS_DROPOUT=dropping.p > 0.0, ROWS=ROWS_PER_PROGRAM, **options_of(columns),
        )  # fmt: skip
    return x_gradient, residual_gradient, partial_sums.sum(dim=1)


def _seed(dropping: Dropping) -> tuple[int, int]:
    # Signed, so that Triton gives every seed the same type (int32) and compiles once.
    return signed(dropping.seed, bits=32), signed(dropping.seed >> 32, bits=32)


def _numbers(dropping: Dropping) -> tuple[int, int, int]:
    return dropping.length, dropping.stride, dropping.offset


def options_of(columns: int) -> dict[str, Any]:
    """Compile options of the kernels on rows with this many columns."""
    block = triton.next_power_of_2(columns)
    return {"BLOCK": block, "num_warps": 4 if block <= 2048 else 8 if block <= 4096 else 16}
