"""The weight store: what a rank owns of its stage, sharded by DeepSpeed's ZeRO stage 3."""

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deberta_dist.parallel.flat_layout import FlatLayout, ShardState
from deberta_dist.parallel.mesh import Mesh
from deberta_dist.parallel.zero.flat_module import FlatModule, ModelParallelUnit

_NORM_CHUNK = 1 << 24  # elements: 128 MiB in float64
LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class WeightStore:
    """The weights that a rank owns, their float32 master copies and optimizer state, sharded over the data axis.

    Args:
        shards: This rank's initial shard of every flat parameter, float32 on the host.
        layout: Where each owned tensor lies in the flat parameters.
        make_optimizer: Makes the optimizer of the flat parameters, in the order of ``layout``.
        deepspeed_config: DeepSpeed JSON without "auto": the planner has filled in every value.
        mesh: Its data group carries the all-gather and the reduce-scatter; its model group completes norms.
        dtype: Compute dtype: float32, bfloat16 or float16.
    """

    def __init__(
        self,
        shards: Sequence[Tensor],
        *,
        layout: FlatLayout,
        make_optimizer: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer],
        deepspeed_config: dict[str, Any],
        mesh: Mesh,
        dtype: torch.dtype,
    ) -> None:
        self._deepspeed = import_deepspeed()
        self.layout = layout
        self.dtype = dtype
        self._mesh = mesh
        store = FlatModule([flat.to(dtype) for flat in self._all_gather(shards)])
        for parameter in store.parameters():
            # DeepSpeed counts parameters without this mark into the norm on model-parallel rank 0 only, as replicated. Each
            # of ours has one owner, so every model-parallel rank's has to count.
            setattr(parameter, "model_parallel", True)  # noqa: B010  (DeepSpeed's mark, which torch's class does not know)
        optimizer = make_optimizer(list(store.parameters()))
        self._engine, _, _, _ = self._deepspeed.initialize(
            model=store,
            optimizer=optimizer,
            config=_for_device(deepspeed_config, mesh.device),
            mpu=ModelParallelUnit(mesh),
        )
        self._parameters = list(store.parameters())
        if dtype != torch.float32:
            # DeepSpeed makes its master weights from the rounded ones.
            self._set_master_weights(shards)
        self._gathered: Any = None
        self._gradients: list[Tensor] = []
        self._norm_dtype = torch.float64
        self.optimizer_steps = 0
        """Steps applied so far; skipped ones do not count."""

    @property
    def loss_scale(self) -> float:
        """Factor on the loss with fp16; 1 otherwise."""
        return float(self._engine.optimizer.loss_scale) if self.dtype == torch.float16 else 1.0

    @property
    def skipped_steps(self) -> int:
        """Number of optimizer steps skipped since this store was made."""
        return int(self._engine.skipped_steps)

    def gather(self, *, with_gradients: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All-gathers the owned weights. Collective over the data-parallel group.

        Returns:
            (weights, gradients) by name: views of the gathered flat weights, and zeroed float32 views of the
            flat gradients (empty without ``with_gradients``).
        """
        assert self._gathered is None
        self._gathered = self._gathered_parameters()
        self._gathered.__enter__()
        weights = self.layout.views([parameter.detach() for parameter in self._parameters])
        if not with_gradients:
            return weights, {}
        self._gradients = [torch.zeros(size, dtype=torch.float32, device=self._mesh.device) for size in self.layout.sizes]
        return weights, self.layout.views(self._gradients)

    def release(self) -> None:
        """Frees the gathered weights (after an evaluation, and at the end of `reduce`)."""
        self._gathered.__exit__(None, None, None)
        self._gathered = None
        self._gradients = []

    def reduce(self, *, loss_scale: float) -> Tensor:
        """First half of a step: reduce-scatters the accumulated gradients and takes their norm, without waiting for the device.

        It frees gathered weights and whole gradients, so that another network can be gathered before `apply`.

        Args:
            loss_scale: The ``loss_scale`` that the backward passes ran with.

        Returns:
            Float64 [1 + F] on the device, the same on all ranks. First the global gradient norm before clipping, with every
            weight of the model counted once; it is not finite if a gradient of any rank is not, or overflows the compute
            dtype. Then the norms of the F flat parameters, which `apply` needs.
        """
        loss = self._engine(self._gradients, 1.0 / loss_scale)
        self._gradients = []  # the loss's graph holds them, and drops each once the backward pass has used it
        self._engine.backward(loss)
        self.release()
        norms = self._norms()
        self._norm_dtype = norms.dtype
        norm = torch.linalg.vector_norm(norms).reshape(1) / self._engine.optimizer.loss_scale
        return torch.cat([norm, norms]).double()

    def _norms(self) -> Tensor:
        """Norm of every flat gradient over all ranks, times the loss scale, [F] on the device.

        Float64, or with offload DeepSpeed's float32. It sums what DeepSpeed sums, but on a GPU chunk by chunk: DeepSpeed
        copies the whole gradient to float64 first, 8 bytes per weight.
        """
        optimizer = self._engine.optimizer
        if optimizer.offload_optimizer:  # gradients are on the host, which has waited for them already
            norms = torch.stack([torch.as_tensor(norm) for norm in optimizer._get_norm_groups()])
            return torch.where(norms < 0, math.inf, norms).to(self._mesh.device)
        found = []
        for gradients in optimizer.averaged_gradients.values():
            # On a CPU in one chunk: another order of summation would change the bits of resumed runs.
            size = _NORM_CHUNK if self._mesh.device.type == "cuda" else max(1, *map(Tensor.numel, gradients))
            chunks = [chunk for gradient in gradients for chunk in gradient.split(size)]
            norms = [torch.linalg.vector_norm(chunk, dtype=torch.float64) for chunk in chunks]
            square = torch.stack(norms).square().sum()
            for group in (self._mesh.groups["data"], self._mesh.groups["model"]):
                if dist.get_world_size(group) > 1:
                    dist.all_reduce(square, group=group)
            found.append(square.sqrt())
        return torch.stack(found)

    def apply(self, norms: Sequence[float], *, learning_rate: float, joint_norm: float | None = None) -> None:
        """Second half: one optimizer step with the reduced gradients, or a skipped step if their norm is not finite.

        All ranks pass the same numbers, so if a gradient of one rank is not finite, no rank updates. With fp16 a skipped step
        lowers the loss scale.

        Args:
            norms: What `reduce` returned, copied to the host.
            learning_rate: The schedule's value for this step; it replaces that of every parameter group.
            joint_norm: Norm over several networks that step together; all of them are clipped by it.
        """
        optimizer = self._engine.optimizer
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        is_finite = math.isfinite(norms[0] if joint_norm is None else joint_norm)
        clipped_by = norms[1:] if joint_norm is None else [joint_norm * optimizer.loss_scale]
        known = [torch.tensor(norm, dtype=self._norm_dtype) for norm in (clipped_by if is_finite else [math.inf])]
        later: list[Any] = []
        # DeepSpeed would compute the norm again, and wait for the device to read it and fp16's overflow flag. It also updates
        # the loss scale before it divides the gradients by it, although they were computed with the old one: the update is
        # put off until after the step.
        with _replaced(
            optimizer,
            _get_norm_groups=lambda: known,
            has_overflow=lambda *_, **__: False,
            _update_scale=later.append,
        ):
            if hasattr(optimizer.loss_scaler, "raise_error_at_min_scale"):
                optimizer.loss_scaler.raise_error_at_min_scale = False  # the run counts skipped steps and decides itself
            self._engine.step()
        for has_overflow in later:
            optimizer._update_scale(has_overflow)
        self.optimizer_steps += is_finite

    @torch.no_grad()
    def fold(self, table: str, base: "WeightStore") -> None:
        """Makes the next `gather` return, for ``table``, the sum of this store's and ``base``'s float32 weights, rounded once.

        Master weights do not change; the sum lasts until this store's next step.

        Args:
            table: A tensor with a flat parameter of its own in both stores, or owned by this rank in neither.
            base: Weight store of another network on the same mesh.
        """
        assert (table in self.layout.places) == (table in base.layout.places), table
        if table not in self.layout.places:
            return
        mine, theirs = self.layout.places[table], base.layout.places[table]
        assert mine[1:] == theirs[1:] and self.layout.sizes[mine[0]] == base.layout.sizes[theirs[0]], (mine, theirs)
        parameter = self._parameters[mine[0]]
        own, other = self._flat_states()[mine[0]][0], base._flat_states()[theirs[0]][0]
        at_rest = parameter.ds_tensor.data
        # DeepSpeed never re-reads a shard whose parameter it keeps gathered; and if shard and master weights shared their
        # memory, writing the sum would overwrite the weights.
        assert not parameter.ds_persist, "stage3_param_persistence_threshold must be 0"
        assert at_rest.untyped_storage().data_ptr() != own.untyped_storage().data_ptr()
        at_rest.copy_((own + other).view_as(at_rest))

    @torch.no_grad()
    def copy_shards(self) -> list[ShardState]:
        """Host copies of this rank's master weights and moments of every flat parameter: what an exact resume needs."""
        shards = []
        for flat, state in self._flat_states():
            values = [flat, *(state.get(key) for key in ("exp_avg", "exp_avg_sq"))]
            known = [torch.zeros_like(flat) if value is None else value for value in values]
            shards.append(ShardState(*(value.detach().to("cpu", torch.float32, copy=True) for value in known)))
        return shards

    @torch.no_grad()
    def copy_weights(self) -> list[Tensor]:
        """Host copies of this rank's shard of every flat parameter's master weights, float32."""
        return [flat.detach().to("cpu", torch.float32, copy=True) for flat, _ in self._flat_states()]

    @torch.no_grad()
    def load_weights(self, shards: Sequence[Tensor]) -> None:
        """Sets the weights to what ``copy_weights`` gave; moments stay. Collective over the data-parallel group."""
        self._set_master_weights(shards)
        with self._gathered_parameters(modifier_rank=0):
            for parameter, flat in zip(self._parameters, self._all_gather(shards), strict=True):
                parameter.data.copy_(flat)

    def close(self) -> None:
        """Ends DeepSpeed's engine and frees its memory; the store cannot be used afterwards.

        Dropping the last reference is not enough: DeepSpeed's hooks form cycles that the garbage collector does not find, and
        the next store would need its memory beside this one's. So every tensor's storage is freed by hand.
        """
        optimizer = self._engine.optimizer
        self._engine.destroy()
        own = [vars(parameter) for parameter in self._parameters]
        for tensor in _tensors([self._parameters, own, vars(optimizer), optimizer.optimizer.state]):
            if (storage := tensor.untyped_storage()).resizable():
                storage.resize_(0)

    @torch.no_grad()
    def load_moments(self, shards: Sequence[ShardState], *, optimizer_steps: int) -> None:
        """Sets this rank's moments before the first step. The weights were given to the constructor.

        Args:
            shards: This rank's shard of every flat parameter, in order; only the moments are read.
            optimizer_steps: Steps that were applied to these moments, for Adam's bias correction.
        """
        optimizer = self._engine.optimizer.optimizer
        for (flat, _), shard, group in zip(self._flat_states(), shards, optimizer.param_groups, strict=True):
            state = {"exp_avg": shard.exp_avg.to(flat.device), "exp_avg_sq": shard.exp_avg_sq.to(flat.device)}
            if "fused" in group:  # torch's AdamW counts per parameter, on the device where it is fused
                state["step"] = torch.tensor(float(optimizer_steps), device=flat.device if group["fused"] else "cpu")
            else:  # apex's FusedAdam counts per group
                group["step"] = optimizer_steps
            optimizer.state[flat] = state
        self.optimizer_steps = optimizer_steps

    def loss_scale_state(self) -> dict[str, float] | None:
        """State of fp16's loss scaler; None with other precisions."""
        if self.dtype != torch.float16:
            return None
        scaler = self._engine.optimizer.loss_scaler
        return {key: getattr(scaler, key) for key in LOSS_SCALER_STATE if hasattr(scaler, key)}

    def load_loss_scale_state(self, state: Mapping[str, float] | None) -> None:
        """Restores ``loss_scale_state``; without one (a checkpoint of another precision) the scaler starts afresh."""
        if self.dtype == torch.float16 and state is not None:
            for key in LOSS_SCALER_STATE:
                if key in state:
                    setattr(self._engine.optimizer.loss_scaler, key, state[key])

    def _flat_states(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Master shard and optimizer state of every flat parameter.

        Each flat parameter is a parameter group of its own, and so exactly one DeepSpeed sub-group.
        """
        masters = self._engine.optimizer.fp32_partitioned_groups_flat
        assert len(masters) == len(self._parameters)
        state = self._engine.optimizer.optimizer.state
        return [(master, state.get(master, {})) for master in masters]

    @torch.no_grad()
    def master_weights(self) -> dict[str, Tensor]:
        """Full float32 weights this rank owns, by name, on the CPU. Collective over the data-parallel group."""
        from deepspeed.utils import safe_get_local_fp32_param

        # Copies: DeepSpeed's shard is a view of its own buffers, which a collective must not use.
        shards = (safe_get_local_fp32_param(parameter).detach().clone() for parameter in self._parameters)
        return self.layout.views([flat.cpu() for flat in self._all_gather(shards)])

    def resident_bytes(self) -> dict[str, int]:
        """Bytes that this rank holds between steps, by kind: shards of weights, gathered weights, master weights, moments."""
        at_rest = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in self._parameters)
        gathered = sum(p.numel() * p.element_size() for p in self._parameters)
        masters, moments = 0, 0
        for master, state in self._flat_states():
            masters += master.numel() * master.element_size()
            moments += sum(v.numel() * v.element_size() for v in state.values() if torch.is_tensor(v) and v.ndim)
        return {"weights": at_rest, "gathered": gathered, "master_weights": masters, "optimizer_states": moments}

    def _all_gather(self, shards: Iterable[Tensor]) -> Iterator[Tensor]:
        """Whole flat parameters on the device, one at a time to bound memory. Collective over the data-parallel group."""
        for shard, size in zip(shards, self.layout.sizes, strict=True):
            flat = torch.empty(size, dtype=torch.float32, device=self._mesh.device)
            dist.all_gather_into_tensor(flat, shard.to(self._mesh.device), group=self._mesh.groups["data"])
            yield flat

    def _set_master_weights(self, shards: Sequence[Tensor]) -> None:
        from deepspeed.utils import safe_set_local_fp32_param

        for parameter, shard in zip(self._parameters, shards, strict=True):
            safe_set_local_fp32_param(parameter, shard.to(self._mesh.device))

    def _gathered_parameters(self, *, modifier_rank: int | None = None) -> Any:
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        return GatheredParameters(self._parameters, modifier_rank=modifier_rank)


def _for_device(deepspeed_config: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """DeepSpeed's JSON for a device.

    DeepSpeed replaces torch's linear function in the whole process by one for weights that it gathers itself; no layer has
    such weights here. On a GPU it is switched off, as it costs kernel launches; on a CPU it stays, because it decides the bits
    of resumed runs. DeepSpeed's throughput timer, which nothing reads, would wait for the GPU twice a step.
    """
    if device.type == "cpu":
        return deepspeed_config
    zero = {"memory_efficient_linear": False, **deepspeed_config.get("zero_optimization", {})}
    return {**deepspeed_config, "zero_optimization": zero, "timers": {"throughput": {"enabled": False}}}


@contextmanager
def _replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Shadows attributes of an object's class on that one object while the context lasts."""
    vars(owner).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del vars(owner)[name]


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _tensors(item)


def import_deepspeed() -> Any:
    """Imports deepspeed without its log output and its compilation at start.

    On a CPU DeepSpeed compiles a shared-memory extension when communication starts. That takes minutes, and a process killed
    meanwhile leaves a lock on which every later start hangs. Gloo does the same work.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use.*", category=FutureWarning)
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
