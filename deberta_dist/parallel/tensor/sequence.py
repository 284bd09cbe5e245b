"""Sequence parallelism: outside of tensor-parallel regions every tensor rank holds its own shard of each sequence.

LayerNorm, dropout and residuals work token by token, so a rank does them for S / t tokens, dimension 1 of [B, S, D]. The
all-reduces and copies of plain tensor parallelism become pairs:

======== ==================================== ================================ =========================
name     where                                forward                          backward
======== ==================================== ================================ =========================
gather   into a tensor-parallel region        all-gather                       reduce-scatter (sum)
scatter  out of it, partial sums              reduce-scatter (sum)             all-gather
join     into what all ranks compute alike    all-gather                       own shard
======== ==================================== ================================ =========================

Column-parallel layers do not save the gathered input for their backward pass: they save their own shard and gather it again,
overlapped with the product that gives the input's gradient. For weights of the sequence region each rank sees only its own
tokens, so its gradient is a summand (``sharding_rules.in_sequence_region``).

The enhanced mask decoder and the head work on targets, which are few and unevenly spread over a sequence. Hidden states are
joined before them, and they run as without sequence parallelism.

Letters: B batch, S sequence, D hidden, t ranks; ``shard`` [B, S / t, ...], ``whole`` [B, S, ...].

Source: arXiv 2205.05198, section 4.2.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deberta_dist.parallel.tensor.layers import product_of


class SequenceRanks:
    """The tensor ranks as owners of equal shards of every sequence, and their collectives.

    Args:
        group: Process group of the tensor ranks.

    Attributes:
        rank: Tensor rank of this process: the number of its shard.
        size: t, number of tensor ranks and of shards.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def __repr__(self) -> str:
        return f"shard {self.rank} of {self.size}"

    def start_gather(self, shard: Tensor) -> "Gathering":
        """Starts an all-gather without waiting for it. All ranks start them in the same order."""
        shards = shard.new_empty(self.size, *shard.shape)
        return Gathering(shards, self.all_gather(shards, shard.contiguous()))

    def gather(self, shard: Tensor) -> Tensor:
        """The whole sequence from all ranks' shards."""
        return self.start_gather(shard).wait()

    def scatter(self, whole: Tensor) -> Tensor:
        """This rank's shard of the sum over ranks of ``whole``."""
        assert whole.shape[1] % self.size == 0, "lengths are checked before any process group exists"
        shards = whole.unflatten(1, (self.size, -1)).transpose(0, 1).contiguous()
        shard = torch.empty_like(shards[0])
        self.reduce_scatter(shard, shards)
        return shard

    def own(self, whole: Tensor) -> Tensor:
        """This rank's shard of a sequence that it has whole."""
        length = whole.shape[1] // self.size
        return whole.narrow(1, self.rank * length, length)

    def all_gather(self, shards: Tensor, shard: Tensor) -> dist.Work | None:
        """Starts to fill ``shards`` [t, ...] from every rank's ``shard``; returns the work to wait for."""
        return dist.all_gather_into_tensor(shards.flatten(0, 1), shard, group=self.group, async_op=True)

    def reduce_scatter(self, shard: Tensor, shards: Tensor) -> None:
        """Fills ``shard`` with the sum over ranks of ``shards[rank]``."""
        dist.reduce_scatter_tensor(shard, shards.flatten(0, 1), group=self.group)


class Gathering:
    """An all-gather in flight."""

    def __init__(self, shards: Tensor, work: dist.Work | None) -> None:
        self._shards = shards
        self._work = work

    def wait(self) -> Tensor:
        """Waits for it; returns the whole sequence, [B, S, ...]."""
        if self._work is not None:
            self._work.wait()
        return self._shards.transpose(0, 1).flatten(1, 2)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, ranks: SequenceRanks) -> Tensor:
        ctx.ranks = ranks
        return ranks.gather(shard)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.ranks.scatter(gradient), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, ranks: SequenceRanks) -> Tensor:
        ctx.ranks = ranks
        return ranks.scatter(whole)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.ranks.gather(gradient), None


class _Join(_Gather):
    # All ranks compute the same after it and have the same gradient: a sum, as in _Gather, would be t times too large.
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.ranks.own(gradient), None


class _Exchange(nn.Module):
    """A module that exchanges tokens between the ranks and has no parameters.

    Args:
        ranks: Owners of the shards.
    """

    def __init__(self, ranks: SequenceRanks) -> None:
        super().__init__()
        self.ranks = ranks

    def extra_repr(self) -> str:
        return repr(self.ranks)


class EnterSequenceRegion(_Exchange):
    """Replaces an ``enter`` identity: gather as a module.

    Args:
        ranks: Owners of the shards.
        recomputes: Whether column-parallel layers save only their own shard for the backward pass and gather it again (see
            ``models.fused_qkv.joint_linear``).

    Attributes:
        start_recompute: Starts to gather an input again; None where the gathered input is saved.
    """

    def __init__(self, ranks: SequenceRanks, *, recomputes: bool) -> None:
        super().__init__(ranks)
        self.start_recompute = ranks.start_gather if recomputes else None

    def forward(self, shard: Tensor) -> Tensor:
        return _Gather.apply(shard, self.ranks)

    plain_forward = forward


class SequenceRowLinear(nn.Linear):
    """A row-parallel layer that leaves every rank its shard of the sequence, to which the bias is added.

    Args:
        cut: This rank's RowParallelLinear; only its sizes, dtype and device are used.
        ranks: Owners of the shards.
    """

    def __init__(self, cut: nn.Linear, *, ranks: SequenceRanks) -> None:
        super().__init__(cut.in_features, cut.out_features, cut.bias is not None, cut.weight.device, cut.weight.dtype)
        self.ranks = ranks
        self.multiply = product_of(cut)

    def forward(self, input: Tensor) -> Tensor:
        output = self.without_bias(input)
        return output if self.bias is None else output + self.bias

    plain_forward = forward

    def without_bias(self, input: Tensor) -> Tensor:
        """This rank's shard of the summed product, for a caller that fuses the bias into its own next pass."""
        return _Scatter.apply(self.multiply(input, self, None), self.ranks)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.ranks}"


class ScatterSequence(_Exchange):
    """Scatter as a module: it replaces the all-reduce of the vocabulary-parallel embedding."""

    def forward(self, whole: Tensor) -> Tensor:
        return _Scatter.apply(whole, self.ranks)


class JoinSequence(_Exchange):
    """Replaces the model's ``whole_sequence`` identity: join as a module."""

    def forward(self, shard: Tensor) -> Tensor:
        return _Join.apply(shard, self.ranks)


class OwnTokens(_Exchange):
    """Replaces an ``own_tokens`` identity: this rank's shard of ids, positions or masks, which have no gradient."""

    def forward(self, whole: Tensor) -> Tensor:
        return self.ranks.own(whole)


class ExchangeHalo(_Exchange):
    """Replaces the convolution's ``halo`` identity: adds ``width`` tokens of each neighbour beside the rank's own.

    Every rank gathers all borders, 2 t width tokens, and picks those of its neighbours; beyond the ends of the sequence are
    zeros. It costs a little more than sends between neighbours, but is one collective in an order that all ranks share, and
    its backward pass returns the gradients to the tokens' owners.

    Args:
        ranks: Owners of the shards.
        width: Tokens from each side, at most as many as a shard has.
    """

    def __init__(self, ranks: SequenceRanks, *, width: int) -> None:
        super().__init__(ranks)
        self.width = width

    def forward(self, shard_BSD: Tensor) -> Tensor:
        rank, size, width = self.ranks.rank, self.ranks.size, self.width
        borders = torch.cat([shard_BSD[:, :width], shard_BSD[:, -width:]], dim=1)
        # [B, rank, first or last, width, D]
        all_borders = _Gather.apply(borders, self.ranks).unflatten(1, (size, 2, width))
        beyond = torch.zeros_like(shard_BSD[:, :width])
        before = all_borders[:, rank - 1, 1] if rank > 0 else beyond
        after = all_borders[:, rank + 1, 0] if rank + 1 < size else beyond
        return torch.cat([before, shard_BSD, after], dim=1)
