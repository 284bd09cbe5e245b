"""Cross entropy of the targets, the last step of the head, in little memory.

For logits x and label y of one target: loss = log sum_j exp(x_j - max) - (x_y - max), gradient softmax(x) - onehot(y).
Sums and exponentials are float32 (float64 if given float64), a few rows at a time. `CrossEntropy.of_product` saves only the
logits for the backward pass, and writes their gradient over them; in chunks of the vocabulary it saves not even those.

Where the vocabulary is divided over tensor ranks, each has a slice of the logits, and a `Join` combines three numbers of
every target over the ranks: largest logit, sum of exponentials, the label's logit.

Letters: T targets, V rows of the vocabulary here, W width of the embeddings, C a chunk of V.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deberta_dist.models.fused_qkv import add_product_, is_asked_for
from deberta_dist.models.targets import WHOLE, require_below, require_tensor

ELEMENTS_AT_ONCE_ON_CPU = 2**19
"""Logits whose float32 copies stay in a core's cache."""
ELEMENTS_AT_ONCE = 2**23
"""On a GPU: 32 MiB of float32."""
COLUMNS_AT_ONCE_ON_CPU, ROWS_AT_ONCE_ON_CPU = 1024, 8192
"""Size of the products for logits and the table's gradient: 25% faster than one product (MKL, 151 x 768 x 128,100)."""
ALIGNED_ELEMENTS = 64
"""Rows of logits start at multiples of this: 128 bytes of 16-bit numbers."""


class Join:
    """Combines numbers of every target over the ranks that divide the vocabulary; this one is for a single rank."""

    def largest(self, values_T: Tensor) -> Tensor:
        """Elementwise maximum."""
        return values_T

    def total(self, values_NT: Tensor) -> Tensor:
        """Elementwise sum."""
        return values_NT

    def smallest(self, ids_T: Tensor) -> Tensor:
        """Elementwise minimum."""
        return ids_T


class CrossEntropy(nn.Module):
    """Loss and hit per target. A module, so that tensor parallelism can replace it by one for a slice of the vocabulary.

    Args:
        first_row: Number of this slice's first row within the vocabulary.
        num_real_rows: Rows of this slice that belong to the vocabulary (None for all); the rest is padding, whose logits do
            not count.
        join: An object with the methods of `Join`.
    """

    def __init__(self, *, first_row: int = 0, num_real_rows: int | None = None, join: Any = None) -> None:
        super().__init__()
        self.first_row = first_row
        self.num_real_rows = num_real_rows
        self.join = Join() if join is None else join

    def forward(self, logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and hit from logits, which are not overwritten.

        Args:
            logits_TV: Logits of this slice of the vocabulary.
            labels_T: Ids of the whole vocabulary, of any integer dtype.

        Returns:
            Cross entropy, float32 [T], and whether the first of the largest logits is the label's, bool [T].

        Raises:
            ValueError: labels that are not whole numbers [T], or, on a CPU with a single rank, ids beyond the vocabulary.
        """
        labels_T = self._checked(labels_T, num_targets=logits_TV.shape[0], num_rows=logits_TV.shape[1])
        return _OfLogits.apply(logits_TV, labels_T, self)

    def of_product(
        self,
        hidden_TW: Tensor,
        weight_VW: Tensor,
        bias_V: Tensor,
        labels_T: Tensor,
        *,
        num_chunks: int = 1,
        main_grad: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Loss and hit from the logits ``hidden_TW @ weight_VW.T + bias_V``, which are overwritten by their gradient.

        Args:
            hidden_TW: Output of the head's transform.
            weight_VW: Rows of the word embeddings, those of this slice of the vocabulary.
            bias_V: Added to the logits.
            labels_T: Ids of the whole vocabulary, see `forward`.
            num_chunks: With more than one, the logits are computed for a chunk of V at a time, and recomputed in the
                backward pass: a third more products for 1 / num_chunks of the memory.
            main_grad: The sum that the gradient of ``weight_VW``, a parameter, is added to. None: autograd has it.

        Returns:
            What `forward` returns. The backward pass can be run once.

        Raises:
            ValueError: see `forward`.
        """
        labels_T = self._checked(labels_T, num_targets=hidden_TW.shape[0], num_rows=weight_VW.shape[0])
        return _OfProduct.apply(hidden_TW, weight_VW, bias_V, labels_T, self, num_chunks, main_grad)

    def _checked(self, labels_T: Tensor, *, num_targets: int, num_rows: int) -> Tensor:
        require_tensor(
            labels_T, name="labels", shapes=[(num_targets,)], kinds=[WHOLE], user="the cross entropy of these logits"
        )
        if type(self.join) is Join:
            require_below(labels_T, _num_real(self, num_rows), what="a row of")
        return labels_T.long()


class _Running:
    """Per target, over the columns added so far: largest logit, its id, sum of exponentials, and the label's logit."""

    def __init__(self, labels_T: Tensor, module: CrossEntropy, *, dtype: torch.dtype) -> None:
        self._module, self._labels = module, labels_T
        self.largest_T = torch.full_like(labels_T, -math.inf, dtype=dtype)
        self.best_T = torch.zeros_like(labels_T)
        self.sum_T = torch.zeros_like(self.largest_T)
        self.of_label_T = torch.zeros_like(self.largest_T)

    def add(self, logits_TC: Tensor, *, first_row: int) -> None:
        """Adds columns: the logits of the vocabulary's rows from ``first_row`` on, without padding, in ascending order."""
        if logits_TC.shape[1] == 0:
            return
        for rows in _rows_at_once(logits_TC):
            block = _wide(logits_TC[rows])
            largest, best = block.max(dim=-1)
            before = self.largest_T[rows]
            wins = largest > before  # of equal logits the first wins, as in argmax
            best = torch.where(wins, best + first_row, self.best_T[rows])
            largest = torch.maximum(largest, before)
            sums = torch.sub(block, largest[:, None]).exp_().sum(dim=-1)
            self.sum_T[rows] = self.sum_T[rows] * torch.exp(before - largest) + sums
            self.largest_T[rows], self.best_T[rows] = largest, best
            column_T1, is_here_T1 = _columns(self._labels[rows], first_row, logits_TC.shape[1])
            self.of_label_T[rows] += block.gather(-1, column_T1).masked_fill(~is_here_T1, 0.0)[:, 0]

    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Over the whole vocabulary: loss, hit, largest logit, and sum of exponentials of logits minus the largest."""
        join = self._module.join
        largest_T = join.largest(self.largest_T)
        shrink_T = torch.exp(self.largest_T - largest_T)
        sum_T, of_label_T = join.total(torch.stack([self.sum_T * shrink_T, self.of_label_T]))
        # The lowest id with the highest logit wins, as argmax over the whole vocabulary would say.
        no_vote = torch.iinfo(torch.int64).max
        winner_T = join.smallest(torch.where(self.largest_T == largest_T, self.best_T, no_vote))
        loss_T = torch.log(sum_T) - (of_label_T - largest_T)
        return loss_T, winner_T == self._labels, largest_T, sum_T


class _OfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor, module: CrossEntropy) -> tuple[Tensor, Tensor]:
        num_real = _num_real(module, logits_TV.shape[1])
        running = _Running(labels_T, module, dtype=_wide_dtype(logits_TV.dtype))
        running.add(logits_TV[:, :num_real], first_row=module.first_row)
        loss_T, is_hit_T, *softmax = running.finish()
        ctx.save_for_backward(logits_TV, labels_T, *softmax)
        ctx.module = module
        ctx.mark_non_differentiable(is_hit_T)
        return loss_T, is_hit_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_T: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        logits_TV, labels_T, *softmax = ctx.saved_tensors
        num_real = _num_real(ctx.module, logits_TV.shape[1])
        d_logits_TV = torch.zeros_like(logits_TV)
        _write_gradient(
            logits_TV[:, :num_real],
            labels_T,
            softmax,
            gradient_T,
            first_row=ctx.module.first_row,
            into_TC=d_logits_TV[:, :num_real],
        )
        return d_logits_TV, None, None


class _OfProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TW: Tensor,
        weight_VW: Tensor,
        bias_V: Tensor,
        labels_T: Tensor,
        module: CrossEntropy,
        num_chunks: int,
        total_VW: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        running = _Running(labels_T, module, dtype=_wide_dtype(hidden_TW.dtype))
        chunks = _chunks(_num_real(module, weight_VW.shape[0]), num_chunks)
        for rows in chunks:
            logits_TC = _logits(hidden_TW, weight_VW[rows], bias_V[rows])
            running.add(logits_TC, first_row=module.first_row + rows.start)
        loss_T, is_hit_T, *softmax = running.finish()
        ctx.save_for_backward(hidden_TW, weight_VW, bias_V, labels_T, *softmax)
        ctx.logits_TC = logits_TC if len(chunks) == 1 else None
        ctx.module, ctx.chunks, ctx.parameter, ctx.total = module, chunks, weight_VW, total_VW
        ctx.mark_non_differentiable(is_hit_T)
        return loss_T, is_hit_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_T: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.chunks is None:
            raise RuntimeError("the gradient was written over the logits: this backward pass can be run once")
        hidden_TW, weight_VW, bias_V, labels_T, *softmax = ctx.saved_tensors
        d_hidden_TW = torch.zeros_like(hidden_TW, dtype=_wide_dtype(hidden_TW.dtype))
        num_real = _num_real(ctx.module, weight_VW.shape[0])
        total_VW = ctx.total
        adds = total_VW is not None and is_asked_for(ctx.parameter)
        d_weight_VW = torch.empty_like(weight_VW) if total_VW is None else None
        d_bias_V = torch.empty_like(bias_V, dtype=None if total_VW is None else total_VW.dtype)
        for gradient in (d_weight_VW, d_bias_V):
            if gradient is not None and num_real < len(gradient):
                gradient[num_real:] = 0.0
        for rows in ctx.chunks:
            logits_TC = ctx.logits_TC
            if logits_TC is None:
                logits_TC = _logits(hidden_TW, weight_VW[rows], bias_V[rows])
            _write_gradient(
                logits_TC,
                labels_T,
                softmax,
                gradient_T,
                first_row=ctx.module.first_row + rows.start,
                into_TC=logits_TC,
            )
            d_hidden_TW += logits_TC @ weight_VW[rows]
            for at_once in _parts(rows, ROWS_AT_ONCE_ON_CPU if hidden_TW.device.type == "cpu" else num_real):
                columns = slice(at_once.start - rows.start, at_once.stop - rows.start)
                if adds:
                    add_product_(total_VW[at_once], logits_TC[:, columns].T, hidden_TW)
                elif d_weight_VW is not None:
                    torch.mm(logits_TC[:, columns].T, hidden_TW, out=d_weight_VW[at_once])
            torch.sum(logits_TC, dim=0, dtype=d_bias_V.dtype, out=d_bias_V[rows])
        ctx.logits_TC = ctx.chunks = ctx.total = None
        return d_hidden_TW.to(hidden_TW.dtype), d_weight_VW, d_bias_V, None, None, None, None


def _logits(hidden_TW: Tensor, weight_CW: Tensor, bias_C: Tensor) -> Tensor:
    """[T, C], each row at an aligned address: tensor cores read 16 bytes, and 128,100 16-bit numbers are no multiple of that."""
    num_targets, num_columns = hidden_TW.shape[0], weight_CW.shape[0]
    aligned = -(-num_columns // ALIGNED_ELEMENTS) * ALIGNED_ELEMENTS
    logits_TC = hidden_TW.new_empty(num_targets, aligned)[:, :num_columns]
    at_once = COLUMNS_AT_ONCE_ON_CPU if hidden_TW.device.type == "cpu" else num_columns
    for columns in _parts(slice(0, num_columns), at_once):
        torch.addmm(bias_C[columns], hidden_TW, weight_CW[columns].T, out=logits_TC[:, columns])
    return logits_TC


def _write_gradient(
    logits_TC: Tensor,
    labels_T: Tensor,
    softmax: Sequence[Tensor],
    gradient_T: Tensor,
    *,
    first_row: int,
    into_TC: Tensor,
) -> None:
    """Writes (softmax - onehot) times each loss's gradient, from largest logits and sums; ``into_TC`` may be the logits."""
    if logits_TC.shape[1] == 0:
        return
    largest_T, sum_T = softmax
    for rows in _rows_at_once(logits_TC):
        weight_T1 = gradient_T[rows, None]
        block = torch.sub(logits_TC[rows], largest_T[rows, None]).exp_().mul_(weight_T1 / sum_T[rows, None])
        column_T1, is_here_T1 = _columns(labels_T[rows], first_row, logits_TC.shape[1])
        block.scatter_add_(-1, column_T1, -(weight_T1 * is_here_T1).to(block.dtype))
        into_TC[rows] = block


def _columns(labels_T: Tensor, first_row: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Column of every label [T, 1], 0 if it is in another slice or chunk; and whether it is in this one."""
    column_T1 = (labels_T - first_row)[:, None]
    is_here_T1 = (column_T1 >= 0) & (column_T1 < num_columns)
    return column_T1.masked_fill(~is_here_T1, 0), is_here_T1


def _num_real(module: CrossEntropy, num_rows: int) -> int:
    return num_rows if module.num_real_rows is None else module.num_real_rows


def _chunks(num_rows: int, num_chunks: int) -> list[slice]:
    return _parts(slice(0, num_rows), -(-num_rows // num_chunks))


def _parts(whole: slice, size: int) -> list[slice]:
    """``whole`` in slices of ``size``."""
    starts = range(whole.start, whole.stop, max(size, 1))
    return [slice(start, min(start + size, whole.stop)) for start in starts]


def _rows_at_once(logits_TC: Tensor) -> Iterator[slice]:
    elements = ELEMENTS_AT_ONCE_ON_CPU if logits_TC.device.type == "cpu" else ELEMENTS_AT_ONCE
    count = max(elements // max(logits_TC.shape[1], 1), 1)
    return (slice(start, start + count) for start in range(0, logits_TC.shape[0], count))


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_dtype(tensor.dtype))
