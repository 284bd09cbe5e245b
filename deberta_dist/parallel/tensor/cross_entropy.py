"""Cross entropy over a vocabulary of which every rank holds a slice; full logits exist nowhere.

Three small all-reduces over the targets join the slices: the largest logit, the sum of exponentials together with the
label's logit, and the id of the winner. The gradient is local. The rest is the model's own module.
"""

import torch.distributed as dist
from torch import Tensor


class JoinOverRanks:
    """How the model's cross entropy joins what the ranks of ``group`` know of every target."""

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

    def _reduced(self, values: Tensor, operation: dist.ReduceOp) -> Tensor:
        values = values.clone()
        dist.all_reduce(values, op=operation, group=self.group)
        return values
