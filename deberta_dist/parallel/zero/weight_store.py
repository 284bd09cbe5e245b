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

_NORM_OF = 1 << 24  # elements
LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class WeightStore:
    """The tensors a rank owns, their float32 master copies and optimizer state, sharded over the data axis.

    Args:
        shards: This rank's part of every flat parameter to start with, float32 on the host.
        layout: Where they lie (``lay_out``).
        make_optimizer: Builds the optimizer from the list of flat parameters.
        deepspeed_config: Filled-in DeepSpeed JSON.
        mesh: The grid.
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
            # Every flat parameter is owned by this rank alone: without the mark DeepSpeed's norm skips it.
            setattr(parameter, "model_parallel", True)  # noqa: B010  (DeepSpeed's mark, which torch's class does not know)
        optimizer = make_optimizer(list(store.parameters()))
        self._engine, _, _, _ = self._deepspeed.initialize(
            model=store,
            optimizer=optimizer,
            config=_for_device(deepspeed_config, mesh.device),
            mpu=ModelParallelUnit(mesh),
        )
        self._parameters: list[Any] = list(store.parameters())  # with what DeepSpeed adds to each
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
        """Factor on the loss under fp16; 1 otherwise."""
        return float(self._engine.optimizer.loss_scale) if self.dtype == torch.float16 else 1.0

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that were declined since the start."""
        return int(self._engine.skipped_steps)

    def gather(self, *, with_gradients: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All-gathers the stage's weights once.

        Returns:
            (weights, gradients) by name: views of the gathered flat weights, and zeroed float32 views of the
            flat gradients (none without ``with_gradients``).
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
        """Gives the gathered weights up (evaluation; the end of `reduce`)."""
        self._gathered.__exit__(None, None, None)
        self._gathered = None
        self._gradients = []

    def reduce(self, *, loss_scale: float) -> Tensor:
        """First half of a step: reduce-scatters the accumulated gradients and takes their norm, without waiting for the device.

        Gathered weights and whole gradients are free after it, for another network that is gathered before `apply`.

        Args:
            loss_scale: The ``loss_scale`` that the backward passes ran with.

        Returns:
            Float64 [1 + F] on the device, the same on all ranks: the global gradient norm before clipping, over every
            weight of the model once and not finite where any gradient of any rank is not, or the compute dtype cannot
            hold it; then those of each of F flat parameters, as `apply` needs them.
        """
        loss = self._engine(self._gradients, 1.0 / loss_scale)
        self._gradients = []  # the loss holds them until the backward pass has taken each
        self._engine.backward(loss)
        self.release()
        norms = self._norms()
        self._norm_dtype = norms.dtype
        norm = torch.linalg.vector_norm(norms).reshape(1) / self._engine.optimizer.loss_scale
        return torch.cat([norm, norms]).double()

    def _norms(self) -> Tensor:
        """Norm of every flat gradient over all ranks, with the loss scale, [F] on the device; float64, float32 of the host's.

        As DeepSpeed adds it up, but on a GPU in pieces: what it copies in float64 is the whole gradient, 8 bytes a
        weight.
        """
        optimizer = self._engine.optimizer
        if optimizer.offload_optimizer:  # of gradients on the host, which has waited for them
            norms = torch.stack([torch.as_tensor(norm) for norm in optimizer._get_norm_groups()])
            return torch.where(norms < 0, math.inf, norms).to(self._mesh.device)
        found = []
        for gradients in optimizer.averaged_gradients.values():
            # On a CPU in one piece: another order of sums would move runs that go on.
            most = _NORM_OF if self._mesh.device.type == "cuda" else max(1, *map(Tensor.numel, gradients))
            each = [torch.linalg.vector_norm(one, dtype=torch.float64) for part in gradients for one in part.split(most)]
            square = torch.stack(each).square().sum()
            for group in (self._mesh.groups["data"], self._mesh.groups["model"]):
                if dist.get_world_size(group) > 1:
                    dist.all_reduce(square, group=group)
            found.append(square.sqrt())
        return torch.stack(found)

    def apply(self, norms: Sequence[float], *, learning_rate: float, joint_norm: float | None = None) -> None:
        """Second half: one optimizer step with the gradients that were reduced, or none where their norm is not finite.

        All ranks give the same numbers, so no weight moves on any rank where a gradient of one is not finite; under
        fp16 the loss scale falls.

        Args:
            norms: What `reduce` returned, as read by the host.
            learning_rate: For this step.
            joint_norm: Of the gradients of several networks that step together, by which all of them are clipped.
        """
        optimizer = self._engine.optimizer
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        is_finite = math.isfinite(norms[0] if joint_norm is None else joint_norm)
        clipped_by = norms[1:] if joint_norm is None else [joint_norm * optimizer.loss_scale]
        known = [torch.tensor(norm, dtype=self._norm_dtype) for norm in (clipped_by if is_finite else [math.inf])]
        later: list[Any] = []
        # DeepSpeed would make the norm again, and read it and the overflow of fp16 from the device. A loss scale that grows
        # it would use at once, for gradients that were made with the one before.
        with _replaced(
            optimizer,
            _get_norm_groups=lambda: known,
            has_overflow=lambda *_, **__: False,
            _update_scale=later.append,
        ):
            if hasattr(optimizer.loss_scaler, "raise_error_at_min_scale"):
                optimizer.loss_scaler.raise_error_at_min_scale = False  # the run's own count of skipped steps decides
            self._engine.step()
        for has_overflow in later:
            optimizer._update_scale(has_overflow)
        self.optimizer_steps += is_finite

    @torch.no_grad()
    def fold(self, table: str, base: "WeightStore") -> None:
        """What is gathered of ``table`` becomes the sum of this store's and ``base``'s float32 weights, rounded once.

        For the next `gather`. The weights themselves stay, and this store's own come back with its next step.

        Args:
            table: A tensor with a flat parameter of its own in both stores, or owned by neither rank.
            base: Of another network on the same mesh.
        """
        assert (table in self.layout.places) == (table in base.layout.places), table
        if table not in self.layout.places:
            return
        mine, theirs = self.layout.places[table], base.layout.places[table]
        assert mine[1:] == theirs[1:] and self.layout.sizes[mine[0]] == base.layout.sizes[theirs[0]], (mine, theirs)
        parameter = self._parameters[mine[0]]
        own, other = self._flat_states()[mine[0]][0], base._flat_states()[theirs[0]][0]
        at_rest = parameter.ds_tensor.data
        # What DeepSpeed keeps gathered it would not read here, and where it shared its memory the weights would be lost.
        assert not parameter.ds_persist, "stage3_param_persistence_threshold must be 0"
        assert at_rest.untyped_storage().data_ptr() != own.untyped_storage().data_ptr()
        at_rest.copy_((own + other).view_as(at_rest))

    @torch.no_grad()
    def copy_shards(self) -> list[ShardState]:
        """Host copies of this rank's shard of every flat parameter: all that an exact resume needs."""
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
        """Ends DeepSpeed's engine and frees the memory it holds; the store cannot be used after it.

        Freed one by one: the engine outlives its last user, since DeepSpeed's hooks tie it into cycles that the
        collector does not find, and the next store would lie beside all of this one.
        """
        optimizer = self._engine.optimizer
        self._engine.destroy()
        own = [vars(parameter) for parameter in self._parameters]
        for tensor in _tensors([self._parameters, own, vars(optimizer), optimizer.optimizer.state]):
            if (storage := tensor.untyped_storage()).resizable():
                storage.resize_(0)

    @torch.no_grad()
    def load_moments(self, shards: Sequence[ShardState], *, optimizer_steps: int) -> None:
        """Sets this rank's moments; the weights came in as ``shards``. Before the first step.

        Args:
            shards: In the order of the flat parameters.
            optimizer_steps: Applied steps behind these moments (Adam's bias correction).
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
        """State of the fp16 loss scaler; None for other precisions."""
        if self.dtype != torch.float16:
            return None
        scaler = self._engine.optimizer.loss_scaler
        return {key: getattr(scaler, key) for key in LOSS_SCALER_STATE if hasattr(scaler, key)}

    def load_loss_scale_state(self, state: Mapping[str, float] | None) -> None:
        """Sets what ``loss_scale_state`` gave; a run of another precision starts its scaler anew."""
        if self.dtype == torch.float16 and state is not None:
            for key in LOSS_SCALER_STATE:
                if key in state:
                    setattr(self._engine.optimizer.loss_scaler, key, state[key])

    def _flat_states(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Master shard and optimizer state of every flat parameter.

        The flat parameters have parameter groups of their own, hence one DeepSpeed sub-group each.
        """
        masters = self._engine.optimizer.fp32_partitioned_groups_flat
        assert len(masters) == len(self._parameters)
        state = self._engine.optimizer.optimizer.state
        return [(master, state.get(master, {})) for master in masters]

    @torch.no_grad()
    def master_weights(self) -> dict[str, Tensor]:
        """Full float32 weights this rank owns, by name, on the CPU. Collective over the data-parallel group."""
        from deepspeed.utils import safe_get_local_fp32_param

        # Copies: DeepSpeed's own shard is a view that a collective may not touch.
        shards = (safe_get_local_fp32_param(parameter).detach().clone() for parameter in self._parameters)
        return self.layout.views([flat.cpu() for flat in self._all_gather(shards)])

    def resident_bytes(self) -> dict[str, int]:
        """Bytes this rank holds between steps: weights at rest and optimizer state (master weights, moments)."""
        at_rest = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in self._parameters)
        gathered = sum(p.numel() * p.element_size() for p in self._parameters)
        masters, moments = 0, 0
        for master, state in self._flat_states():
            masters += master.numel() * master.element_size()
            moments += sum(v.numel() * v.element_size() for v in state.values() if torch.is_tensor(v) and v.ndim)
        return {"weights": at_rest, "gathered": gathered, "master_weights": masters, "optimizer_states": moments}

    def _all_gather(self, shards: Iterable[Tensor]) -> Iterator[Tensor]:
        """Whole flat parameters, one after the other, on the device. Collective over the data-parallel group."""
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

    DeepSpeed puts a function of its own in the place of every linear layer of the process, for weights that it gathers
    itself, which are not here. On a GPU that costs launches; on a CPU it stays, since runs go on to the same bits. Its
    timer of throughput, which nobody reads, waits for a GPU twice a step.
    """
    if device.type == "cpu":
        return deepspeed_config
    zero = {"memory_efficient_linear": False, **deepspeed_config.get("zero_optimization", {})}
    return {**deepspeed_config, "zero_optimization": zero, "timers": {"throughput": {"enabled": False}}}


@contextmanager
def _replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Attributes of one object that hide those of its class for a while."""
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
    """Imports deepspeed, quiet and without its start-up compilation.

    On a CPU DeepSpeed compiles a shared-memory extension when communication starts: minutes, and a process
    killed meanwhile leaves a lock on which every later start hangs. Gloo does its work.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use.*", category=FutureWarning)
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
