"""Dropout, residual sum and LayerNorm of rows of activations on a GPU, where dropout's mask is a function of a key.

On a CPU masks are drawn from a generator (`models.dropout`) and torch's own operators do the rest; runs go on to the same
bits. A GPU has no such runs, so there the mask is made where it is used, of seed, row number and column, as the attention's
is: nothing is drawn, written or kept, and one kernel takes the place of seven operators.

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

    Rows have the numbers that they have in a whole of which the activation is a part: where a sequence is split, or where
    samples are padded to more rows than are counted.

    Attributes:
        length: rows here of a sample; 1 with stride 1: row r has number r.
        stride: rows of the whole of a sample.
        offset: number of a sample's first row here.
    """

    length: int = 1
    stride: int = 1
    offset: int = 0

    def of(self, num_rows: int, device: torch.device) -> Tensor:
        """Numbers of all rows, int64 [R]."""
        rows = torch.arange(num_rows, device=device)
        return rows // self.length * self.stride + rows % self.length + self.offset


def row_dropout(x: Tensor, *, p: float, seed: int, numbers: RowNumbers) -> Tensor:
    """x where kept, over the kept share, by seed, row number and column; [..., D]."""
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

    Where `fuses_rows` says so. Everything but the output and the kept sum is float32; gradients of the three vectors are
    float32, summed in the same order in every run. There is no second derivative.

    Args:
        x: [..., D].
        bias: [D].
        residual: like ``x``.
        weight: of the LayerNorm, [D].
        norm_bias: of the LayerNorm, [D].
        eps: of the LayerNorm.
        p: probability of dropping, 0 for none.
        seed: 64 bits.
        numbers: of the rows.
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
        output, *kept = rows.residual_norm(
            x.contiguous(), bias, residual.contiguous(), weight, norm_bias, eps=eps, **ctx.dropping
        )
        ctx.save_for_backward(weight, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("residual_norm was differentiated with create_graph=True; it has no second derivative")
        from deberta_dist.kernels.fused import rows

        weight, *kept = ctx.saved_tensors
        of_x, of_residual, of_vectors = rows.residual_norm_backward(
            gradient.contiguous(), kept[0], weight, *kept[1:], **ctx.dropping
        )
        of_weight, of_norm_bias, of_bias = of_vectors
        return of_x, of_bias, of_residual, of_weight, of_norm_bias, None, None, None, None
