"""Stands in for DeepSpeed's ZeRO-3 engine under the product's weight store.

`deberta_dist.parallel.zero.WeightStore` is the product's own and runs as it is, its copies and reductions included. What it calls of
DeepSpeed is replaced: ``initialize`` and the engine it gives, ``GatheredParameters``, and the two accessors of master
weights. The numbers are right (shards of float32 master weights, gradients averaged over the data axis, a norm over all
ranks, clipping, the optimizer that the product made), so that losses fall as with DeepSpeed. What DeepSpeed itself launches
and waits for is not there: nothing of the stand-in is recorded, so what is recorded is the product's.

DeepSpeed runs on a pretended device too (`deepspeed_on_device`). It takes seconds to start, so one test has it.
"""

import contextlib
import math
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import deepspeed.utils
import torch
import torch.distributed as dist
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import Tensor, nn

from deberta_dist.parallel.zero import weight_store

Paused = Callable[[], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def replaced_deepspeed(paused: Paused) -> Iterator[None]:
    """Weight stores made in the block have a stand-in.

    Args:
        paused: `PretendDevice.paused`, or ``contextlib.nullcontext`` where nothing is recorded.
    """

    def initialize(*, model: nn.Module, optimizer: Any, config: dict[str, Any], mpu: Any) -> tuple[Any, ...]:
        return Engine(model, optimizer=optimizer, config=config, mpu=mpu, paused=paused), None, None, None

    library = types.SimpleNamespace(initialize=initialize)
    with (
        # As DeepSpeed does with every linear layer of a process; the engine decides.
        mock.patch.object(torch.nn.functional, "linear", torch.nn.functional.linear),
        mock.patch.object(weight_store, "import_deepspeed", lambda: library),
        mock.patch.object(partition_parameters, "GatheredParameters", GatheredParameters),
        mock.patch.object(deepspeed.utils, "safe_set_local_fp32_param", lambda p, value: p.shard.set_master(value)),
        mock.patch.object(deepspeed.utils, "safe_get_local_fp32_param", lambda p: p.shard.master),
    ):
        yield


@contextlib.contextmanager
def deepspeed_on_device() -> Iterator[None]:
    """No stand-in: DeepSpeed itself, which takes the device for a GPU."""

    class Accelerator(CUDA_Accelerator):
        """NVTX is a part of CUDA builds of torch."""

        def range_push(self, *_: Any, **__: Any) -> None:
            pass

        def range_pop(self, *_: Any, **__: Any) -> None:
            pass

    with (
        mock.patch.object(real_accelerator, "ds_accelerator", Accelerator()),
        mock.patch.object(torch.nn.functional, "linear", torch.nn.functional.linear),
    ):
        yield


class Shard:
    """This rank's part of one flat parameter, which is empty between steps.

    Attributes:
        master: Float32, what the optimizer steps.
        weights: In the compute dtype, what is gathered.
    """

    def __init__(self, parameter: nn.Parameter, *, group: dist.ProcessGroup, paused: Paused) -> None:
        self._parameter, self._group, self._paused = parameter, group, paused
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self.weights = parameter.detach().chunk(size)[rank].clone()
        self.master = nn.Parameter(self.weights.float())
        self._size = parameter.numel()
        self.release()

    def set_master(self, value: Tensor) -> None:
        """Weights that were never rounded."""
        with self._paused(), torch.no_grad():
            self.master.copy_(value)

    def gather(self) -> None:
        """Fills the parameter."""
        with self._paused():
            whole = self.weights.new_empty(self._size)
            dist.all_gather_into_tensor(whole, self.weights, group=self._group)
            self._parameter.data = whole

    def scatter(self) -> None:
        """Takes what has been written into the parameter."""
        with self._paused():
            self.weights.copy_(self._parameter.detach().chunk(dist.get_world_size(self._group))[dist.get_rank(self._group)])

    def release(self) -> None:
        """Empties the parameter."""
        self._parameter.data = self.weights.new_empty(0)

    def take_gradient(self, *, scale: float) -> None:
        """Means over the data axis become the gradient of the master weights."""
        whole, self._parameter.grad = self._parameter.grad.float() / scale, None
        gradient = torch.empty_like(self.master)
        dist.reduce_scatter_tensor(gradient, whole, group=self._group)
        self.master.grad = gradient / dist.get_world_size(self._group)

    def round(self) -> None:
        """What the next gather gives."""
        self.weights.copy_(self.master.detach())


class GatheredParameters:
    """``deepspeed.zero.GatheredParameters``.

    Args:
        parameters: Of an `Engine`'s model.
        modifier_rank: Not None: the parameters are written to inside of the block, by every rank alike.
    """

    def __init__(self, parameters: Sequence[Any], modifier_rank: int | None = None) -> None:
        self._shards: list[Shard] = [parameter.shard for parameter in parameters]
        self._is_modified = modifier_rank is not None

    def __enter__(self) -> None:
        for shard in self._shards:
            shard.gather()

    def __exit__(self, *_: object) -> None:
        for shard in self._shards:
            if self._is_modified:
                shard.scatter()
            shard.release()


class LossScaler:
    """Of fp16: halves at an overflow. DeepSpeed's grows again, which no test waits for."""

    def __init__(self) -> None:
        self.cur_scale, self.cur_iter, self.last_overflow_iter, self.cur_hysteresis = 2.0**16, 0, -1, 1
        self.raise_error_at_min_scale = True

    def update_scale(self, overflow: bool) -> None:
        """After a step, or in the place of one."""
        self.cur_scale /= 2 if overflow else 1
        self.cur_iter += 1


class Engine:
    """What ``deepspeed.initialize`` gives, and in one object what DeepSpeed calls the engine's optimizer.

    Args:
        model: Flat parameters and nothing else.
        optimizer: Over them.
        config: DeepSpeed's JSON.
        mpu: Says which ranks share a gradient, and which the model.
        paused: See `replaced_deepspeed`.
    """

    def __init__(self, model: nn.Module, *, optimizer: Any, config: dict[str, Any], mpu: Any, paused: Paused) -> None:
        self._model, self._mpu, self._paused = model, mpu, paused
        if config["zero_optimization"].get("memory_efficient_linear", True):
            torch.nn.functional.linear = zero3_linear_wrap
        self._clipping = config.get("gradient_clipping", 0.0)
        self.optimizer = types.SimpleNamespace(
            optimizer=optimizer, param_groups=optimizer.param_groups, offload_optimizer=False
        )
        self.loss_scaler = self.optimizer.loss_scaler = LossScaler()
        self._has_scaler = config.get("fp16", {}).get("enabled", False)
        self.skipped_steps = 0
        group = mpu.get_data_parallel_group()
        with paused(), torch.no_grad():
            self._shards = [Shard(parameter, group=group, paused=paused) for parameter in model.parameters()]
        for parameter, shard in zip(model.parameters(), self._shards, strict=True):
            parameter.shard, parameter.ds_tensor = shard, shard.weights
        self.optimizer.fp32_partitioned_groups_flat = [shard.master for shard in self._shards]
        for param_group, shard in zip(optimizer.param_groups, self._shards, strict=True):
            param_group["params"] = [shard.master]
        self.optimizer.loss_scale = self._scale

    @property
    def _scale(self) -> float:
        return self.loss_scaler.cur_scale if self._has_scaler else 1.0

    def __call__(self, *args: Any) -> Tensor:
        return self._model(*args)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the shards."""
        (loss * self._scale).backward()
        with self._paused(), torch.no_grad():
            for shard in self._shards:
                shard.take_gradient(scale=self._scale)
            # With the loss scale, as the store takes norms of them.
            self.optimizer.averaged_gradients = {
                number: [shard.master.grad * self._scale] for number, shard in enumerate(self._shards)
            }

    def step(self) -> None:
        """Clips and steps; declines a norm that is not finite."""
        with self._paused(), torch.no_grad():
            norm = float(torch.linalg.vector_norm(torch.stack(self.optimizer._get_norm_groups()))) / self._scale
            is_finite = math.isfinite(norm)
            if self._clipping and is_finite:
                for shard in self._shards:
                    shard.master.grad.mul_(min(1.0, self._clipping / (norm + 1e-6)))
            if is_finite:
                self.optimizer.optimizer.step()
            for shard in self._shards:
                shard.master.grad = None
                shard.round()
        self.skipped_steps += not is_finite
        self.loss_scaler.update_scale(not is_finite)
        self.optimizer.loss_scale = self._scale
