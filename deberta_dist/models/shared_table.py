"""The word embeddings as both their users see them: the look-up of the input, and the product that computes the logits.

The product's gradient is as large as the table. The look-up's gradient is a few rows of it, but torch allocates a second
table of zeros for them and a third for the sum. Here the rows wait and are added in place to the product's gradient, which
saves two tables of memory and, on a CPU, more time than the product takes. If the table has a ``main_grad``
(`models.fused_qkv`), both users add to that, and there is no other table.

Letters: B batch, S sequence, V vocabulary, W width of the embeddings.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from deberta_dist.models.fused_qkv import is_asked_for
from deberta_dist.models.plain import is_plain

WaitingRows = list[tuple[Tensor, Tensor]]
"""Ids [N] and gradients [N, W]."""


class SharedTable:
    """A table for one forward pass.

    Args:
        weight_VW: The word embeddings' parameter.
        main_grad: The sum that its gradient is added to. None: autograd has it.

    Attributes:
        weight_VW: The same values, for one use whose gradient is a whole table that nothing else refers to: the waiting
            rows are added to that table in place.
    """

    def __init__(self, weight_VW: Tensor, *, main_grad: Tensor | None = None) -> None:
        self._waiting: WaitingRows = []
        self.main_grad = main_grad
        self.weight_VW = weight_VW if main_grad is not None else _Whole.apply(weight_VW, self._waiting)

    def rows(self, ids_BS: Tensor, *, padding_idx: int | None) -> Tensor:
        """Rows of the table, [B, S, W]; those of ``padding_idx`` have no gradient."""
        if self.main_grad is not None:
            return _AddedRows.apply(self.weight_VW, ids_BS, padding_idx, self.main_grad)
        return _Rows.apply(self.weight_VW, ids_BS, padding_idx, self._waiting)


def look_up(ids_BS: Tensor, words: nn.Module, table: SharedTable | None) -> Tensor:
    """Word embeddings of ids, [B, S, W]: from ``table``, their weight, if ``words`` is a plain module.

    A vocabulary-parallel embedding takes the table as an argument.
    """
    if table is None or not is_plain(words):
        return words(ids_BS)
    if type(words) is not nn.Embedding:
        return words(ids_BS, table)
    is_ordinary = words.max_norm is None and not words.scale_grad_by_freq and not words.sparse
    return table.rows(ids_BS, padding_idx=words.padding_idx) if is_ordinary else words(ids_BS)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VW: Tensor, waiting: WaitingRows) -> Tensor:
        ctx.waiting = waiting
        ctx.like = weight_VW.new_empty(0)
        ctx.shape = weight_VW.shape
        ctx.set_materialize_grads(False)
        return weight_VW.view_as(weight_VW)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_VW: Tensor | None) -> tuple[Tensor | None, ...]:
        waiting, ctx.waiting[:] = list(ctx.waiting), []
        if gradient_VW is None and waiting:
            gradient_VW = ctx.like.new_zeros(ctx.shape)
        for ids, rows in waiting:
            assert gradient_VW is not None
            _add_rows_(gradient_VW, ids, rows)
        return gradient_VW, None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VW: Tensor, ids_BS: Tensor, padding_idx: int | None, waiting: WaitingRows) -> Tensor:
        ctx.save_for_backward(ids_BS)
        ctx.padding_idx, ctx.waiting = padding_idx, waiting
        return F.embedding(ids_BS, weight_VW)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BSW: Tensor) -> tuple[Tensor | None, ...]:
        (ids_BS,) = ctx.saved_tensors
        rows_BSW = _without_padding(gradient_BSW, ids_BS, ctx.padding_idx)
        ctx.waiting.append((ids_BS.flatten(), rows_BSW.flatten(0, -2)))
        return None, None, None, None


class _AddedRows(torch.autograd.Function):
    """A look-up that adds its gradient to the table's ``main_grad``."""

    @staticmethod
    def forward(ctx: Any, weight_VW: Tensor, ids_BS: Tensor, padding_idx: int | None, total_VW: Tensor) -> Tensor:
        ctx.save_for_backward(ids_BS)
        ctx.parameter, ctx.padding_idx, ctx.total = weight_VW, padding_idx, total_VW
        return F.embedding(ids_BS, weight_VW)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BSW: Tensor) -> tuple[Tensor | None, ...]:
        (ids_BS,) = ctx.saved_tensors
        if is_asked_for(ctx.parameter):
            total_VW = ctx.total
            rows_BSW = _without_padding(gradient_BSW, ids_BS, ctx.padding_idx)
            _add_rows_(total_VW, ids_BS.flatten(), rows_BSW.flatten(0, -2).to(total_VW.dtype))
        return None, None, None, None


def _without_padding(rows_BSW: Tensor, ids_BS: Tensor, padding_idx: int | None) -> Tensor:
    """Rows with zeros for padding."""
    if padding_idx is None:
        return rows_BSW
    return rows_BSW.masked_fill((ids_BS == padding_idx).unsqueeze(-1), 0.0)


def _add_rows_(table_VW: Tensor, ids_N: Tensor, rows_NW: Tensor) -> None:
    """Adds rows to a table, in the same order in every run."""
    if table_VW.is_cuda:
        # Sorts; index_add_ would add in the order in which threads arrive.
        table_VW.index_put_((ids_N,), rows_NW, accumulate=True)
    else:
        # One after the other; index_put_ would use atomics with several threads.
        table_VW.index_add_(0, ids_N, rows_NW)
