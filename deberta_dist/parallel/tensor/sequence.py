"""Sequence parallelism: outside of split computation every tensor-parallel rank holds its own part of the tokens.

LayerNorm, dropout and residuals work token by token, so a rank does them for S / t tokens, dimension 1 of [B, S, D]. What
all-reduces and copies do without it is done in two halves:

======== ==================================== ================================ =========================
name     where                                forward                          backward
======== ==================================== ================================ =========================
gather   into split computation               all-gather                       reduce-scatter (sum)
scatter  out of it, partial sums              reduce-scatter (sum)             all-gather
join     into computation that all repeat     all-gather                       own part
======== ==================================== ================================ =========================

Column-parallel layers keep no gathered input for their backward pass: they keep the own part and gather it again, while
the input's gradient is computed. A rank's gradients of weights that are used outside of split computation are parts
of a sum (``plan.in_sequence_region``).

The enhanced mask decoder and the head work on targets, few and unevenly spread: hidden states are joined before them, and
they are computed as without sequence parallelism.

Letters: B batch, S sequence, D hidden, t ranks; ``part`` [B, S / t, ...], ``whole`` [B, S, ...].

Source: arXiv 2205.05198, section 4.2.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deberta_dist.parallel.tensor.layers import product_of


class SequenceRanks:
    """The tensor-parallel ranks as owners of equal parts of the sequence.

    Args:
        group: Their process group.

    Attributes:
        rank: This rank's part.
        size: Number of parts.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def __repr__(self) -> str:
        return f"part {self.rank} of {self.size}"

    def start_gather(self, part: Tensor) -> "Gathering":
        """Begins to gather; all ranks do, in one order."""
        parts = part.new_empty(self.size, *part.shape)
        return Gathering(parts, self.all_gather(parts, part.contiguous()))

    def gather(self, part: Tensor) -> Tensor:
        """The whole of all ranks' parts."""
        return self.start_gather(part).wait()

    def scatter(self, whole: Tensor) -> Tensor:
        """The own part of the sum of what all ranks have."""
        assert whole.shape[1] % self.size == 0, "lengths are checked before any process group exists"
        parts = whole.unflatten(1, (self.size, -1)).transpose(0, 1).contiguous()
        part = torch.empty_like(parts[0])
        self.reduce_scatter(part, parts)
        return part

    def own(self, whole: Tensor) -> Tensor:
        """The own part of what is whole here."""
        length = whole.shape[1] // self.size
        return whole.narrow(1, self.rank * length, length)

    def all_gather(self, parts: Tensor, part: Tensor) -> dist.Work | None:
        """Begins to fill ``parts`` [t, ...]; returns what to wait for."""
        return dist.all_gather_into_tensor(parts.flatten(0, 1), part, group=self.group, async_op=True)

    def reduce_scatter(self, part: Tensor, parts: Tensor) -> None:
        """Fills ``part`` with the sum over ranks of ``parts[rank]``."""
        dist.reduce_scatter_tensor(part, parts.flatten(0, 1), group=self.group)


class Gathering:
    """An all-gather on its way."""

    def __init__(self, parts: Tensor, work: dist.Work | None) -> None:
        self._parts = parts
        self._work = work

    def wait(self) -> Tensor:
        """The whole."""
        if self._work is not None:
            self._work.wait()
        return self._parts.transpose(0, 1).flatten(1, 2)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: SequenceRanks) -> Tensor:
        ctx.ranks = ranks
        return ranks.gather(part)

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
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.ranks.own(gradient), None


class _Exchange(nn.Module):
    """What exchanges tokens and has no parameters.

    Args:
        ranks: The owners of the parts.
    """

    def __init__(self, ranks: SequenceRanks) -> None:
        super().__init__()
        self.ranks = ranks

    def extra_repr(self) -> str:
        return repr(self.ranks)


class EnterSequenceRegion(_Exchange):
    """Takes the place of an ``enter`` identity: gather as a module.

    Args:
        ranks: The owners of the parts.
        recomputes: Whether column-parallel layers save the own part for their backward pass and gather again (the model's
            ``joint_linear``).

    Attributes:
        start_recompute: Begins to make the output of an input anew; None: the output is saved.
    """

    def __init__(self, ranks: SequenceRanks, *, recomputes: bool) -> None:
        super().__init__(ranks)
        self.start_recompute = ranks.start_gather if recomputes else None

    def forward(self, part: Tensor) -> Tensor:
        return _Gather.apply(part, self.ranks)

    plain_forward = forward


class SequenceRowLinear(nn.Linear):
    """A row-parallel layer that leaves every rank its part of the sequence. The bias is added there.

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
        """The own part of the sequence of the product, for who adds the bias in a pass of their own."""
        return _Scatter.apply(self.multiply(input, self, None), self.ranks)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.ranks}"


class ScatterSequence(_Exchange):
    """Scatter as a module: what the vocabulary-parallel embedding does in the place of its all-reduce."""

    def forward(self, whole: Tensor) -> Tensor:
        return _Scatter.apply(whole, self.ranks)


class JoinSequence(_Exchange):
    """Takes the place of the model's ``whole_sequence``: join as a module."""

    def forward(self, part: Tensor) -> Tensor:
        return _Join.apply(part, self.ranks)


class OwnTokens(_Exchange):
    """Takes the place of an ``own_tokens`` identity: the own part of ids, positions or masks, which have no gradient."""

    def forward(self, whole: Tensor) -> Tensor:
        return self.ranks.own(whole)


class ExchangeHalo(_Exchange):
    """Takes the place of the convolution's ``halo``: ``width`` tokens of each neighbour beside the own ones.

    Every rank gathers all borders, 2 t width tokens, and takes those of its neighbours, zeros at the ends of the sequence.
    That is one collective whose counterpart brings the gradients back to the tokens' owners, and a small message either way.

    Args:
        ranks: Who has the neighbouring parts.
        width: Tokens, at most as many as a part has.
    """

    def __init__(self, ranks: SequenceRanks, *, width: int) -> None:
        super().__init__(ranks)
        self.width = width

    def forward(self, part_BSD: Tensor) -> Tensor:
        rank, size, width = self.ranks.rank, self.ranks.size, self.width
        borders = torch.cat([part_BSD[:, :width], part_BSD[:, -width:]], dim=1)
        # [B, rank, first or last, width, D]
        all_borders = _Gather.apply(borders, self.ranks).unflatten(1, (size, 2, width))
        beyond = torch.zeros_like(part_BSD[:, :width])
        before = all_borders[:, rank - 1, 1] if rank > 0 else beyond
        after = all_borders[:, rank + 1, 0] if rank + 1 < size else beyond
        return torch.cat([before, part_BSD, after], dim=1)
