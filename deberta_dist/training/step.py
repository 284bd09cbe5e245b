"""One optimizer step of any model: weights gathered once, all micro-batches, one hand-over, agreed by all ranks."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from deberta_dist.mesh import Mesh
from deberta_dist.training.sharded_model import ShardedModel


def optimizer_step(
    model: ShardedModel,
    *,
    mesh: Mesh,
    count: Tensor,
    learning_rate: float,
    forward_backward: Callable[[Tensor], Tensor],
) -> tuple[Tensor, float | None]:
    """Takes a step whose loss is a mean over ``count`` targets of all ranks. Collective.

    Args:
        model: This rank's weights.
        mesh: The grid.
        count: Targets of the step over all data-parallel ranks, a scalar on the device.
        learning_rate: For this step.
        forward_backward: Runs this rank's micro-batches with gradients of its argument times the sum of losses; returns
            float32 sums on the device, e.g. of losses and targets, equal on all tensor-parallel ranks.

    Returns:
        (the sums over all ranks, float64; gradient norm before clipping, None where a gradient was not finite on some
        rank, so that no rank stepped).
    """
    loss_scale = model.store.loss_scale
    model.gather(with_gradients=True)
    # DeepSpeed averages gradients over the data axis; the loss is a mean over the targets of all of it.
    sums = forward_backward(loss_scale * mesh.shape.data / count.clamp(min=1))
    model.collect_gradients()
    not_finite = (~model.store.gradients_are_finite()).double().reshape(1)
    totals = world_totals(torch.cat([sums, torch.zeros_like(sums[:1])]), mesh=mesh, on_every_rank=not_finite)
    if totals[-1] > 0:
        model.skip()
        return totals[:-1], None
    return totals[:-1], model.step(learning_rate=learning_rate, loss_scale=loss_scale)


def world_totals(sums: Tensor, *, mesh: Mesh, on_every_rank: Tensor | None = None) -> Tensor:
    """Sums over the data and pipeline axes, float64; all tensor-parallel ranks computed the same. Collective.

    Args:
        sums: [N].
        mesh: The grid.
        on_every_rank: [1], added to the last of them on all ranks of the world.
    """
    totals = sums.double() if mesh.coordinate.tensor == 0 else torch.zeros_like(sums, dtype=torch.float64)
    if on_every_rank is not None:
        totals[-1:] += on_every_rank
    dist.all_reduce(totals)
    return totals
