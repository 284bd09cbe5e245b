"""Entering and leaving a tensor-parallel region: communication that comes in forward/backward pairs.

======== ==================== ===================
name     forward              backward
======== ==================== ===================
copy_to  identity             all-reduce (sum)
reduce_from all-reduce (sum)  identity
======== ==================== ===================

Source: the conjugate operators f and g of Megatron-LM (arXiv 1909.08053, section 3).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # A copy: autograd may pass the same gradient to another branch, which must not see the sum.
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        tensor = tensor.contiguous().clone()
        dist.all_reduce(tensor, group=group)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None


def copy_to_tensor_parallel_region(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Enters a tensor-parallel region with a replicated activation, whose gradient is summed over ``group``."""
    return _CopyTo.apply(tensor, group)


def reduce_from_tensor_parallel_region(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Leaves a tensor-parallel region: sums the ranks' partial results over ``group``."""
    return _ReduceFrom.apply(tensor, group)


class EnterTensorParallelRegion(nn.Module):
    """Replaces an ``enter`` identity of the model: copy_to as a module."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def forward(self, tensor: Tensor) -> Tensor:
        return copy_to_tensor_parallel_region(tensor, self.group)


class JoinOverRanks:
    """Combines the cross entropies of the tensor ranks, each over its own slice of the vocabulary.

    Three small all-reduces over the targets, so that full logits exist nowhere: the largest logit; the sum of exponentials
    together with the label's logit; and the id of the largest logit. The gradient needs no communication.

    Args:
        group: Process group of the tensor ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def largest(self, values_T: Tensor) -> Tensor:
        """Elementwise maximum."""
        return self._reduced(values_T, dist.ReduceOp.MAX)

    def total(self, values_NT: Tensor) -> Tensor:
        """Elementwise sum."""
        return self._reduced(values_NT, dist.ReduceOp.SUM)

    def smallest(self, ids_T: Tensor) -> Tensor:
        """Elementwise minimum."""
        return self._reduced(ids_T, dist.ReduceOp.MIN)

    def _reduced(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        values = values.clone()
        dist.all_reduce(values, op=operation, group=self.group)
        return values
