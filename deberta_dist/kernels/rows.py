"""Dropout, residual sum and LayerNorm of rows of activations on a GPU, where dropout's mask is a function of a key.

On a CPU masks are drawn from a generator (`models.dropout`) and torch's own operators do the rest: runs begun by earlier
versions have to resume bit-equal. A GPU has no such runs. There the mask is computed where it is used, from seed, row number
and column, like the attention's: nothing is drawn or saved, and one kernel replaces seven operators.

Letters: R rows, D columns.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from deberta_dist.kernels.dropout import drop_words_, keep_probability, words_of_rows
from deberta_dist.kernels.fused.availability import DTYPES, compiler_reason, device_reason, triton_reason

MOST_COLUMNS = 16384


class RowNumbers(NamedTuple):
    """Numbers of the rows of a flattened activation: (r // length) stride + r % length + offset.

    A rank with a shard of each sequence, or with samples padded to more rows, numbers its rows as one process without
    padding would, and so drops the same elements.

    Attributes:
        length: rows of a sample here; 1 with stride 1 numbers row r by r.
        stride: rows of a whole sample, without padding.
        offset: number of a sample's first row here, within the sample.
    """

    length: int = 1
    stride: int = 1
    offset: int = 0

    def of(self, num_rows: int, device: torch.device) -> Tensor:
        """Numbers of all rows, int64 [R]."""
        rows = torch.arange(num_rows, device=device)
        return rows // self.length * self.stride + rows % self.length + self.offset


def row_dropout(x: Tensor, *, p: float, seed: int, numbers: RowNumbers) -> Tensor:
    """x / keep probability where kept, 0 elsewhere; seed, row number and column decide. [..., D]."""
    return _RowDropout.apply(x, p, seed, numbers)


def residual_norm(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float,
    p: float,
    seed: int,
    numbers: RowNumbers,
) -> Tensor:
    """LayerNorm(dropout(x + bias) + residual) in one kernel, its backward pass in another.

    For rows that `fuses_rows` accepts. Everything is computed in float32; the output and the saved sum have the dtype of
    ``x``. Gradients of the three vectors are float32, summed in the same order in every run. There is no second derivative.

    Args:
        x: a product without its bias, [..., D].
        bias: that product's, [D].
        residual: of the shape and dtype of ``x``.
        weight: the LayerNorm's, [D].
        norm_bias: the LayerNorm's, [D].
        eps: added to the variance.
        p: probability of dropping, 0 for none.
        seed: 64 bits that decide, with a row's number and the column, what is dropped.
        numbers: of the rows of ``x``, flattened to [R, D].
    """
    return _ResidualNorm.apply(x, bias, residual, weight, norm_bias, eps, p, seed, numbers)


def fuses_rows(x: Tensor) -> bool:
    """Whether there are kernels for rows like those of ``x``."""
    if torch.compiler.is_exporting():
        return False
    return _has_kernels(x.device) and x.dtype in DTYPES and x.shape[-1] <= MOST_COLUMNS


def row_words(num_rows: int, *, seed: int, numbers: RowNumbers, device: torch.device) -> tuple[Tensor, Tensor]:
    """The two 32-bit words of every row, int32 [R, 1] each."""
    if _has_kernels(device):
        from deberta_dist.kernels.fused import rows

        return rows.row_words(num_rows, rows.Dropping(0.0, seed, *numbers), device=device)
    return words_of_rows(numbers.of(num_rows, device), seed)


def _has_kernels(device: torch.device) -> bool:
    return device_reason(device) is None and triton_reason() is None and compiler_reason() is None


class _RowDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int, numbers: RowNumbers) -> Tensor:
        ctx.arguments = p, seed, numbers
        return _dropped(x, *ctx.arguments)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _RowDropout.apply(gradient, *ctx.arguments), None, None, None


def _dropped(x: Tensor, p: float, seed: int, numbers: RowNumbers) -> Tensor:
    if fuses_rows(x):
        from deberta_dist.kernels.fused import rows

        return rows.dropout(x, rows.Dropping(p, seed, *numbers), inverse_keep=1 / keep_probability(p))
    words = torch.empty(x.numel() // x.shape[-1], x.shape[-1], dtype=torch.int32, device=x.device)
    drop_words_(words, torch.empty_like(words), row_words(len(words), seed=seed, numbers=numbers, device=x.device), p=p)
    return (x / keep_probability(p)).masked_fill((words < 0).view(x.shape), 0.0)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor,
        residual: Tensor,
        weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        p: float,
        seed: int,
        numbers: RowNumbers,
    ) -> Tensor:
        from deberta_dist.kernels.fused import rows

        ctx.dropping = {"dropping": rows.Dropping(p, seed, *numbers), "inverse_keep": 1 / keep_probability(p)}
        output, *saved = rows.residual_norm(
            x.contiguous(), bias, residual.contiguous(), weight, norm_bias, eps=eps, **ctx.dropping
        )
        ctx.save_for_backward(weight, *saved)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("residual_norm was differentiated with create_graph=True; it has no second derivative")
        from deberta_dist.kernels.fused import rows

        weight, sums, *statistics = ctx.saved_tensors
        of_x, of_residual, of_vectors = rows.residual_norm_backward(
            gradient.contiguous(), sums, weight, *statistics, **ctx.dropping
        )
        of_weight, of_norm_bias, of_bias = of_vectors
        return of_x, of_bias, of_residual, of_weight, of_norm_bias, None, None, None, None
