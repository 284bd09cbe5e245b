"""One optimizer step of any network in two halves, with the same outcome on all ranks.

The first half gathers weights once, runs all micro-batches, reduces gradients once and frees both. The second updates the
weights. Between the halves of one network another may run its first half, and several may run their second together.

The host reads the device once, at the end, everything in one tensor. Until then it only queues work, so that the device
never waits for the host.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from deberta_dist.parallel.mesh import Mesh
from deberta_dist.parallel.sharded_model import ShardedModel


@dataclass(frozen=True)
class Half:
    """The first half of a network's step, on the device: nothing has been read by the host.

    Attributes:
        model: This rank's weights, which `apply_halves` updates.
        totals: Float64 sums over all ranks of what the micro-batches returned.
        norms: From `WeightStore.reduce`, float64 [1 + F].
    """

    model: ShardedModel
    totals: Tensor
    norms: Tensor


def reduce_half(
    model: ShardedModel,
    *,
    mesh: Mesh,
    count: Tensor,
    forward_backward: Callable[[Tensor], Tensor],
    weight: float = 1.0,
) -> Half:
    """Gathers a network's weights, runs its micro-batches and reduces their gradients; frees both. Collective.

    Args:
        model: This rank's weights, neither gathered before nor after.
        mesh: The sums are taken over all its ranks.
        count: Number that the loss is the mean over (e.g. targets), of the whole step on all data ranks; a scalar on the
            device.
        forward_backward: Runs this rank's micro-batches with gradients of its argument times the sum of losses; returns
            float32 sums on the device, e.g. of losses and targets, equal on all tensor ranks.
        weight: Factor on the loss, e.g. of one network among several.
    """
    loss_scale = model.store.loss_scale
    model.gather(with_gradients=True)
    # DeepSpeed divides summed gradients by the data-parallel size; this loss is divided by the targets of all data ranks
    # already, so the factor undoes DeepSpeed's mean.
    sums = forward_backward(loss_scale * weight * mesh.shape.data / count.clamp(min=1))
    norms = model.reduce(loss_scale=loss_scale)
    return Half(model=model, totals=world_totals(sums, mesh=mesh), norms=norms)


def apply_halves(
    halves: Sequence[Half], *, learning_rates: Sequence[float], may_step: bool = True, known: Tensor | None = None
) -> tuple[list[list[float]], list[float], float | None]:
    """Takes the steps whose first halves are done, all or none of them, after one read of the device.

    Args:
        halves: Of one network, or of several that are clipped by one norm.
        learning_rates: Of each in this step.
        may_step: False where a network before these could not step: then none does.
        known: Further numbers on the device, the same on all ranks, that the host wants to read.

    Returns:
        (sums over all ranks of each half; ``known``; their gradient norm before clipping, None where a gradient was not
        finite on some rank, so that no rank stepped).
    """
    parts = [part for half in halves for part in (half.totals, half.norms)]
    numbers = torch.cat([part.double() for part in [*parts, *([] if known is None else [known])]]).tolist()
    read, start = [], 0
    for part in parts:
        read.append(numbers[start : start + len(part)])
        start += len(part)
    sums, norms = read[::2], read[1::2]
    norm = norms[0][0] if len(norms) == 1 else math.sqrt(sum(one[0] ** 2 for one in norms))
    if not may_step:
        norm = math.inf
    for half, own, learning_rate in zip(halves, norms, learning_rates, strict=True):
        half.model.apply(own, learning_rate=learning_rate, joint_norm=None if len(norms) == 1 and may_step else norm)
    return sums, numbers[start:], norm if math.isfinite(norm) else None


def optimizer_step(
    model: ShardedModel,
    *,
    mesh: Mesh,
    count: Tensor,
    learning_rate: float,
    forward_backward: Callable[[Tensor], Tensor],
) -> tuple[list[float], float | None]:
    """Takes a step of one network. Collective.

    Args:
        model: See `reduce_half`, as for ``mesh``, ``count`` and ``forward_backward``.
        learning_rate: The schedule's value at this step.

    Returns:
        (sums over all ranks; gradient norm before clipping, or None in a skipped step).
    """
    half = reduce_half(model, mesh=mesh, count=count, forward_backward=forward_backward)
    (sums,), _, norm = apply_halves([half], learning_rates=[learning_rate])
    return sums, norm


def world_totals(sums: Tensor, *, mesh: Mesh) -> Tensor:
    """Float64 sums over the data and pipeline axes. Collective.

    Tensor ranks hold equal sums, so only the first of them counts; one all-reduce over the world then serves all axes.
    """
    totals = sums.double() if mesh.mesh_rank.tensor == 0 else torch.zeros_like(sums, dtype=torch.float64)
    dist.all_reduce(totals)
    return totals
