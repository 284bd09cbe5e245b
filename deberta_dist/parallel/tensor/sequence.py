"""Sequence parallelism: outside of split computation every tensor-parallel rank holds its own shard of the tokens.

LayerNorm, dropout and residuals work token by token, so a rank does them for S / t tokens, dimension 1 of [B, S, D]. What
all-reduces and copies do without it is done in two halves:

======== ==================================== ================================ =========================
name     where                                forward                          backward
======== ==================================== ================================ =========================
gather   into split computation               all-gather                       reduce-scatter (sum)
scatter  out of it, partial sums              reduce-scatter (sum)             all-gather
join     into computation that all repeat     all-gather                       own shard
======== ==================================== ================================ =========================

Column-parallel layers keep no gathered input for their backward pass: they keep the own shard and gather it again, while
the input's gradient is computed. A rank's gradients of weights that are used outside of split computation are shards
of a sum (``plan.in_sequence_region``).

The enhanced mask decoder and the head work on targets, few and unevenly spread: hidden states are joined before them, and
they are computed as without sequence parallelism.

Letters: B batch, S sequence, D hidden, t ranks; ``shard`` [B, S / t, ...], ``whole`` [B, S, ...].

Source: arXiv 2205.05198, section 4.2.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deberta_dist.parallel.tensor.layers import product_of


class SequenceRanks:
    """The tensor-parallel ranks as owners of equal shards of the sequence.

    Args:
        group: Their process group.

    Attributes:
        rank: This rank's shard.
        size: Number of shards.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def __repr__(self) -> str:
        return f"shard {self.rank} of {self.size}"

    def start_gather(self, shard: Tensor) -> "Gathering":
        """Begins to gather; all ranks do, in one order."""
        shards = shard.new_empty(self.size, *shard.shape)
        return Gathering(shards, self.all_gather(shards, shard.contiguous()))

    def gather(self, shard: Tensor) -> Tensor:
        """The whole of all ranks' shards."""
        return self.start_gather(shard).wait()

    def scatter(self, whole: Tensor) -> Tensor:
        """The own shard of the sum of what all ranks have."""
        assert whole.shape[1] % self.size == 0, "lengths are checked before any process group exists"
        shards = whole.unflatten(1, (self.size, -1)).transpose(0, 1).contiguous()
        shard = torch.empty_like(shards[0])
        self.reduce_scatter(shard, shards)
        return shard

    def own(self, whole: Tensor) -> Tensor:
        """The own shard of what is whole here."""
        length = whole.shape[1] // self.size
        return whole.narrow(1, self.rank * length, length)

    def all_gather(self, shards: Tensor, shard: Tensor) -> dist.Work | None:
        """Begins to fill ``shards`` [t, ...]; returns what to wait for."""
        return dist.all_gather_into_tensor(shards.flatten(0, 1), shard, group=self.group, async_op=True)

    def reduce_scatter(self, shard: Tensor, shards: Tensor) -> None:
        """Fills ``shard`` with the sum over ranks of ``shards[rank]``."""
        dist.reduce_scatter_tensor(shard, shards.flatten(0, 1), group=self.group)


class Gathering:
    """An all-gather on its way."""

    def __init__(self, shards: Tensor, work: dist.Work | None) -> None:
        self._shards = shards
        self._work = work

    def wait(self) -> Tensor:
        """The whole."""
        if self._work is not None:
            self._work.wait()
        return self._shards.transpose(0, 1).flatten(1, 2)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shard: Tensor, ranks: SequenceRanks) -> Tensor:
        ctx.ranks = ranks
        return ranks.gather(shard)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return ctx.ranks.scatter(gradient), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, whole: Tensor, ranks: SequenceRanks) -> Tensor:
        ctx.ranks = ranks
        return ranks.scatter(whole)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return ctx.ranks.gather(gradient), None


class _Join(_Gather):
    @staticmethod
    def backward(ctx, gradient: Tensor):
        return ctx.ranks.own(gradient), None


class _Exchange(nn.Module):
    """What exchanges tokens and has no parameters.

    Args:
        ranks: The owners of the shards.
    """

    def __init__(self, ranks: SequenceRanks) -> None:
        super().__init__()
        self.ranks = ranks

    def extra_repr(self) -> str:
        return repr(self.ranks)


class EnterSequenceRegion(_Exchange):
    """Takes the place of an ``enter`` identity: gather as a module.

    Args:
        ranks: The owners of the shards.
        recomputes: Whether column-parallel layers save the own shard for their backward pass and gather again (the model's
            ``joint_linear``).

    Attributes:
        start_recompute: Begins to make the output of an input anew; None: the output is saved.
    """

    def __init__(self, ranks: SequenceRanks, *, recomputes: bool) -> None:
        super().__init__(ranks)
        self.start_recompute = ranks.start_gather if recomputes else None

    def forward(self, shard: Tensor) -> Tensor:
        return _Gather.apply(shard, self.ranks)

    plain_forward = forward


class SequenceRowLinear(nn.Linear):
    """A row-parallel layer that leaves every rank its shard of the sequence. The bias is added there.

    Args:
        cut: The layer as this rank has it; its sizes, dtype and device are used.
        ranks: Who has the others.
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
        """The own shard of the sequence of the product, for who adds the bias in a pass of their own."""
        return _Scatter.apply(self.multiply(input, self, None), self.ranks)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.ranks}"


class ScatterSequence(_Exchange):
    """Scatter as a module: what the vocabulary-parallel embedding does in the place of its all-reduce."""

    def forward(self, whole: Tensor) -> Tensor:
        return _Scatter.apply(whole, self.ranks)


class JoinSequence(_Exchange):
    """Takes the place of the model's ``whole_sequence``: join as a module."""

    def forward(self, shard: Tensor) -> Tensor:
        return _Join.apply(shard, self.ranks)


class OwnTokens(_Exchange):
    """Takes the place of an ``own_tokens`` identity: the own shard of ids, positions or masks, which have no gradient."""

    def forward(self, whole: Tensor) -> Tensor:
        return self.ranks.own(whole)


class ExchangeHalo(_Exchange):
    """Takes the place of the convolution's ``halo``: ``width`` tokens of each neighbour beside the own ones.

    Every rank gathers all borders, 2 t width tokens, and takes those of its neighbours, zeros at the ends of the sequence.
    That is one collective whose counterpart brings the gradients back to the tokens' owners, and a small message either way.

    Args:
        ranks: Who has the neighbouring shards.
        width: Tokens, at most as many as a shard has.
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
