"""Linear and embedding layers of which a rank holds one slice as ordinary parameters.

They replace ``nn.Linear`` and ``nn.Embedding`` under the same name, with the same attribute names, so that code which looks
parameters up by published name works unchanged. A layer with a product of its own, ``multiply(x, layer, bias)``, passes it
on to its replacement. ``plain_forward`` marks a class whose weights the model may read directly instead of calling it, as it
does with torch's own classes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from deberta_dist.parallel.tensor.collectives import reduce_from_tensor_parallel_region


class ColumnParallelLinear(nn.Linear):
    """Y = X A + b with A = [A_1, ..., A_p] cut along its output features; rank i computes X A_i + b_i.

    The input must have passed an ``enter`` module (EnterTensorParallelRegion); the output stays divided by features.

    Args:
        full: The whole layer; only its sizes, dtype and device are used.
        size: Number p of tensor ranks; divides ``full.out_features``.
    """

    def __init__(self, full: nn.Linear, *, size: int) -> None:
        super().__init__(
            full.in_features,
            full.out_features // size,
            bias=full.bias is not None,
            device=full.weight.device,
            dtype=full.weight.dtype,
        )
        self.full_out_features = full.out_features
        self.multiply = product_of(full)

    def forward(self, input: Tensor) -> Tensor:
        return self.multiply(input, self, self.bias)

    plain_forward = forward

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, full_out_features={self.full_out_features}"


class RowParallelLinear(nn.Linear):
    """Y = X A + b with A and X cut along the input features: Y = sum_i X_i A_i + b.

    The bias is whole on every rank and added once, after the sum.

    Args:
        full: The whole layer; only its sizes, dtype and device are used.
        size: Number of tensor ranks; divides ``full.in_features``.
        group: Process group that the products are summed over.
    """

    def __init__(self, full: nn.Linear, *, size: int, group: dist.ProcessGroup) -> None:
        super().__init__(
            full.in_features // size,
            full.out_features,
            bias=full.bias is not None,
            device=full.weight.device,
            dtype=full.weight.dtype,
        )
        self.full_in_features = full.in_features
        self.group = group
        self.multiply = product_of(full)

    def forward(self, input: Tensor) -> Tensor:
        output = self.without_bias(input)
        return output if self.bias is None else output + self.bias

    plain_forward = forward

    def without_bias(self, input: Tensor) -> Tensor:
        """sum_i X_i A_i, for a caller that fuses the bias into its own next pass over the output."""
        return reduce_from_tensor_parallel_region(self.multiply(input, self, None), self.group)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, full_in_features={self.full_in_features}"


class VocabParallelEmbedding(nn.Embedding):
    """Embedding of which rank i of p holds rows [i V/p, (i+1) V/p). Other ranks' ids give zeros, and the ranks' sum is whole.

    Args:
        full: The whole table; only its width, padding index, dtype and device are used.
        padded_size: V, rows after padding (``sharding_rules.padded_vocabulary``).
        rank: i, tensor rank of this process.
        size: p, number of tensor ranks.
        group: Process group of the tensor ranks.

    Attributes:
        reduce: Sums the ranks' outputs; sequence parallelism replaces the all-reduce by a reduce-scatter.
    """

    def __init__(self, full: nn.Embedding, *, padded_size: int, rank: int, size: int, group: dist.ProcessGroup) -> None:
        rows = padded_size // size
        self.first_row = rank * rows
        padding = full.padding_idx
        if padding is not None and not self.first_row <= padding < self.first_row + rows:
            padding = None
        super().__init__(
            rows,
            full.embedding_dim,
            padding_idx=None if padding is None else padding - self.first_row,
            device=full.weight.device,
            dtype=full.weight.dtype,
        )
        self.padded_size = padded_size
        self.reduce = partial(reduce_from_tensor_parallel_region, group=group)

    def forward(self, input_ids: Tensor, table: Any = None) -> Tensor:
        """Called like the model's word embeddings, with the table that they share with the head, if there is one."""
        local = input_ids - self.first_row
        foreign = (local < 0) | (local >= self.num_embeddings)
        # A foreign id must not touch any row's gradient: zero the output, not only the index.
        local = local.masked_fill(foreign, 0)
        output = super().forward(local) if table is None else table.rows(local, padding_idx=self.padding_idx)
        output = output.masked_fill(foreign.unsqueeze(-1), 0.0)
        return self.reduce(output)

    plain_forward = forward

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, first_row={self.first_row}, padded_size={self.padded_size}"


def product_of(layer: nn.Linear) -> Callable[[Tensor, nn.Linear, Tensor | None], Tensor]:
    """The function (x, layer with weight W, bias b) -> x W^T + b that a layer multiplies with."""
    return getattr(layer, "multiply", _multiply)


def _multiply(x: Tensor, layer: nn.Linear, bias: Tensor | None) -> Tensor:
    return F.linear(x, layer.weight, bias)


def empty_parameter(shape: torch.Size, like: Tensor) -> nn.Parameter:
    """An uninitialised parameter of ``shape`` with the dtype and device of ``like``."""
    return nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device))
