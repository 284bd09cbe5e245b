"""One optimizer step of any model: weights gathered once, all micro-batches, one hand-over, agreed by all ranks.

The host reads the device once, at the end, everything in one tensor: until then it only queues work, so that the device
never waits for the host.
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from deberta_dist.parallel.mesh import Mesh
from deberta_dist.parallel.sharded_model import ShardedModel


def optimizer_step(
    model: ShardedModel,
    *,
    mesh: Mesh,
    count: Tensor,
    learning_rate: float,
    forward_backward: Callable[[Tensor], Tensor],
    known: Tensor | None = None,
) -> tuple[list[float], float | None]:
    """Takes a step whose loss is a mean over ``count`` targets of all ranks. Collective.

    Args:
        model: This rank's weights.
        mesh: The grid.
        count: Targets of the step over all data-parallel ranks, a scalar on the device.
        learning_rate: For this step.
        forward_backward: Runs this rank's micro-batches with gradients of its argument times the sum of losses; returns
            float32 sums on the device, e.g. of losses and targets, equal on all tensor-parallel ranks.
        known: Further numbers on the device, the same on all ranks, that the host wants to read.

    Returns:
        (the sums over all ranks, then ``known``; gradient norm before clipping, None where a gradient was not finite on
        some rank, so that no rank stepped).
    """
    loss_scale = model.store.loss_scale
    model.gather(with_gradients=True)
    # DeepSpeed averages gradients over the data axis; the loss is a mean over the targets of all of it.
    sums = forward_backward(loss_scale * mesh.shape.data / count.clamp(min=1))
    norms = model.hand_over(loss_scale=loss_scale)
    parts = [world_totals(sums, mesh=mesh), norms, *([] if known is None else [known])]
    numbers = torch.cat([part.double() for part in parts]).tolist()
    norms_end = len(sums) + len(norms)
    norms = numbers[len(sums) : norms_end]
    model.step(norms, learning_rate=learning_rate)
    return numbers[: len(sums)] + numbers[norms_end:], norms[0] if math.isfinite(norms[0]) else None


def world_totals(sums: Tensor, *, mesh: Mesh) -> Tensor:
    """Sums over the data and pipeline axes, float64; all tensor-parallel ranks computed the same. Collective."""
    totals = sums.double() if mesh.coordinate.tensor == 0 else torch.zeros_like(sums, dtype=torch.float64)
    dist.all_reduce(totals)
    return totals
