"""Weights that several ranks use: one owner, and borrowers that receive the weight and return their gradient.

Every stage uses ``encoder.rel_embeddings`` and its LayerNorm; the first stage and the head on the last use
``word_embeddings``; every tensor rank uses the LayerNorms and row-parallel biases. Each tensor slice is owned, stored and
counted once, by the first model-parallel rank that uses it. Ties communicate twice per optimizer step:
``broadcast_weights`` after the owners' all-gather, ``reduce_gradients`` before their reduce-scatter.

Ranks in this file are model-parallel ranks, (pipeline rank, tensor rank): every data rank has the same ties.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from deberta_dist.parallel.mesh import Mesh, MeshRank, MeshShape

ModelParallelRank = tuple[int, int]


@dataclass(frozen=True)
class Tie:
    """Parameters with one owner and the same users.

    Attributes:
        names: Published names, sorted.
        users: Model-parallel ranks that use them, ascending; the first is the owner.
        is_sum: Whether the gradient is the sum of all users'. If not, the users' gradients are equal and the owner's own
            stands.
    """

    names: tuple[str, ...]
    users: tuple[ModelParallelRank, ...]
    is_sum: bool


def find_ties(names_by_rank: Sequence[Sequence[str]], *, kinds: Mapping[str, str], tensor_parallel_size: int) -> list[Tie]:
    """All ties of a layout. Their order, the same on every rank, is that of the collectives.

    Args:
        names_by_rank: Published parameter names used by each pipeline rank.
        kinds: For every name ``"split"`` (each tensor rank has its own slice), ``"replicate"`` (whole on each,
            equal gradients) or ``"partial"`` (whole on each, gradients to be summed).
        tensor_parallel_size: Number of tensor ranks, each of which uses what its pipeline rank does.
    """
    pipeline_users: dict[str, list[int]] = defaultdict(list)
    for pipeline, names in enumerate(names_by_rank):
        for name in names:
            pipeline_users[name].append(pipeline)
    groups: dict[tuple[tuple[ModelParallelRank, ...], bool], list[str]] = defaultdict(list)
    for name, pipelines in pipeline_users.items():
        kind = kinds[name]
        if kind == "split":
            for tensor in range(tensor_parallel_size):
                if len(pipelines) > 1:
                    groups[tuple((p, tensor) for p in pipelines), True].append(name)
            continue
        users = tuple((p, t) for p in pipelines for t in range(tensor_parallel_size))
        # Its gradients are equal within a stage and summands across stages: one sum over all users would count it several
        # times over. No weight of DeBERTa is such.
        assert kind == "partial" or len(pipelines) == 1, name
        if len(users) > 1:
            groups[users, kind == "partial" or len(pipelines) > 1].append(name)
    return [Tie(tuple(sorted(names)), users, is_sum) for (users, is_sum), names in sorted(groups.items())]


def owned_names(names: Sequence[str], *, ties: Sequence[Tie], rank: ModelParallelRank) -> list[str]:
    """Those of ``names`` that ``rank`` owns, in the same order."""
    borrowed = {name for tie in ties if rank in tie.users[1:] for name in tie.names}
    return [name for name in names if name not in borrowed]


def tie_ranks(tie: Tie, *, shape: MeshShape, data: int) -> tuple[int, ...]:
    """Global ranks of the users of ``tie`` in one data-parallel replica, owner first."""
    return tuple(shape.rank(MeshRank(pipeline=p, data=data, tensor=t)) for p, t in tie.users)


def make_tie_groups(ties: Sequence[Tie], *, mesh: Mesh) -> None:
    """Makes the process groups of all ties. Collective over the world: a rank takes part in making groups it is not in."""
    rank_sets = [tie_ranks(tie, shape=mesh.shape, data=d) for tie in ties for d in range(mesh.shape.data)]
    mesh.new_subgroups(list(dict.fromkeys(rank_sets)))


class TiedWeights:
    """The ties that this rank is in, as owner or borrower.

    Args:
        ties: All ties of the layout, in the order of ``find_ties``.
        mesh: The mesh, after ``make_tie_groups``.
        shapes: Local shape of every parameter on this rank.
        dtype: Compute dtype, in which weights are broadcast.
    """

    def __init__(self, ties: Sequence[Tie], *, mesh: Mesh, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        here = mesh.mesh_rank
        self._here = (here.pipeline, here.tensor)
        self._ties = [tie for tie in ties if self._here in tie.users]
        self._mesh = mesh
        self._shapes = shapes
        self._dtype = dtype

    def broadcast_weights(self, owned: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Owners broadcast their weights; returns the borrowed ones by name, as views of one buffer per tie. Collective."""
        borrowed: dict[str, Tensor] = {}
        for tie in self._ties:
            if self._owns(tie):
                buffer = torch.cat([owned[name].reshape(-1) for name in tie.names])
            else:
                buffer = torch.empty(self._size(tie), dtype=self._dtype, device=self._mesh.device)
                borrowed.update(self._views(buffer, tie))
            ranks = tie_ranks(tie, shape=self._mesh.shape, data=self._mesh.mesh_rank.data)
            dist.broadcast(buffer, src=ranks[0], group=self._mesh.subgroups[ranks])
        return borrowed

    def gradient_views(self) -> dict[str, Tensor]:
        """Zeroed float32 gradients of the borrowed weights, by name, as views of one buffer per tie."""
        self._gradients: dict[Tie, Tensor] = {
            tie: torch.zeros(self._size(tie), dtype=torch.float32, device=self._mesh.device)
            for tie in self._ties
            if not self._owns(tie)
        }
        views: dict[str, Tensor] = {}
        for tie, buffer in self._gradients.items():
            views.update(self._views(buffer, tie))
        return views

    def reduce_gradients(self, owned_gradients: Mapping[str, Tensor]) -> None:
        """Adds the borrowers' gradients to the owner's, in place, where a tie is a sum; the owner's stand otherwise."""
        for tie in self._ties:
            if tie.is_sum:
                self._reduce_to_owner(tie, owned_gradients)
        self._gradients = {}

    def _reduce_to_owner(self, tie: Tie, owned_gradients: Mapping[str, Tensor]) -> None:
        ranks = tie_ranks(tie, shape=self._mesh.shape, data=self._mesh.mesh_rank.data)
        if self._owns(tie):
            buffer = torch.cat([owned_gradients[name].reshape(-1) for name in tie.names])
        else:
            buffer = self._gradients[tie]
        dist.reduce(buffer, dst=ranks[0], group=self._mesh.subgroups[ranks])
        if self._owns(tie):
            for name, total in self._views(buffer, tie).items():
                owned_gradients[name].copy_(total)

    def _owns(self, tie: Tie) -> bool:
        return tie.users[0] == self._here

    def _size(self, tie: Tie) -> int:
        return sum(torch.Size(self._shapes[name]).numel() for name in tie.names)

    def _views(self, buffer: Tensor, tie: Tie) -> dict[str, Tensor]:
        views, offset = {}, 0
        for name in tie.names:
            shape = torch.Size(self._shapes[name])
            views[name] = buffer[offset : offset + shape.numel()].view(shape)
            offset += shape.numel()
        return views
