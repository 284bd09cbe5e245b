"""What DeepSpeed sees: a module of flat parameters, and the process groups of a rank."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deberta_dist.parallel.mesh import Mesh


class _Surrogate(torch.autograd.Function):
    """A zero whose gradient with respect to the weight is a given tensor: how gradients enter ZeRO-3."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gradient: Tensor, inverse_scale: float) -> Tensor:
        ctx.gradient, ctx.inverse_scale, ctx.dtype = gradient, inverse_scale, weight.dtype
        return torch.zeros((), dtype=torch.float32, device=weight.device)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        # ``outer`` is the engine's loss scale, which it divides out again; ``inverse_scale`` removes the one that the
        # micro-batches ran with.
        gradient, scale = ctx.gradient, outer.float() * ctx.inverse_scale
        ctx.gradient = None
        if gradient.dtype == ctx.dtype:
            return gradient.mul_(scale), None, None  # in place: nothing reads it afterwards
        # Scaled and rounded in one pass: a scaled copy in float32 would be as large as the gradient.
        return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=ctx.dtype)), None, None


class FlatModule(nn.Module):
    """Flat 1-D parameters and nothing else: the model that DeepSpeed sees."""

    def __init__(self, flats: Sequence[Tensor]) -> None:
        super().__init__()
        self.flats = nn.ParameterList([nn.Parameter(flat) for flat in flats])

    def forward(self, gradients: Sequence[Tensor], inverse_scale: float) -> Tensor:
        terms = [_Surrogate.apply(p, g, inverse_scale) for p, g in zip(self.flats, gradients, strict=True)]
        return torch.stack(terms).sum()


class ModelParallelUnit:
    """The ``mpu`` object that DeepSpeed asks for groups. To it, tensor and pipeline ranks together are model-parallel."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self._mesh.groups["model"])

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._mesh.groups["model"])

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.groups["model"]

    def get_data_parallel_rank(self) -> int:
        return self._mesh.mesh_rank.data

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.shape.data

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.groups["data"]
