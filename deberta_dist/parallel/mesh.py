"""The mesh of ranks: who shares tensors, stages and data with whom.

A run makes one mesh (``training/pretrain.py``, ``finetuning/finetune.py``) and passes it to everything that communicates; nothing
here is global. Its axes are ``[pipeline, data, tensor]``, tensor innermost: ranks that communicate in every layer are then
neighbours on one node. The process group starts here too, because only this file and the launchers read environment
variables.
"""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from deberta_dist.errors import ConfigError

AXES = ("pipeline", "data", "tensor")


@dataclass(frozen=True)
class MeshRank:
    """A rank's three numbers on the mesh, each from 0."""

    pipeline: int
    data: int
    tensor: int


@dataclass(frozen=True)
class MeshShape:
    """Number of ranks along each axis. A plain value: reasoning about a layout needs no process group."""

    pipeline: int = 1
    data: int = 1
    tensor: int = 1

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pipeline * self.data * self.tensor

    def rank(self, mesh_rank: MeshRank) -> int:
        """Global rank at ``mesh_rank``."""
        return (mesh_rank.pipeline * self.data + mesh_rank.data) * self.tensor + mesh_rank.tensor

    def mesh_rank(self, rank: int) -> MeshRank:
        """Mesh rank of global ``rank``."""
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return MeshRank(pipeline=pipeline, data=data, tensor=tensor)


@dataclass(frozen=True)
class Launch:
    """What the launcher exported to this process: its global rank, the world size, its rank on its node."""

    rank: int
    world_size: int
    local_rank: int


def discover_launch() -> Launch:
    """Reads this process's rank from what the launcher exported.

    Understands the DeepSpeed launcher and torchrun (RANK ...), Open MPI, MPICH and Slurm; without any of them the world size
    is 1. MASTER_ADDR is filled in under Slurm and on a single node.

    Raises:
        ConfigError: under MPI on several nodes without MASTER_ADDR, or without a local rank.
    """
    names = (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
        # The step's size, not the job's: a shell inside an allocation is a step of one.
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    )
    env = os.environ
    # srun with PMI2 sets PMI_RANK but no local rank; Slurm's own variables have it.
    present = [n for n in names if env.get(n[0]) and env.get(n[1])]
    found = next((n for n in present if n[0] == "RANK" or env.get(n[2])), next(iter(present), None))
    if found is None or (found[0] == "SLURM_PROCID" and "SLURM_STEP_ID" not in env):
        # Inside a Slurm batch script but not under srun the variables describe the script, not a rank.
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        found = names[0]
    launch = Launch(rank=int(env[found[0]]), world_size=int(env[found[1]]), local_rank=int(env.get(found[2]) or "0"))
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = _master_address(found[0], launch)
    if launch.world_size > 1 and found[0] != "RANK" and not env.get(found[2]):
        raise ConfigError(f"{found[0]} is set and {found[2]} is not: export each rank's number on its node as {found[2]}")
    env.setdefault("MASTER_PORT", "29500")
    env.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size), LOCAL_RANK=str(launch.local_rank))
    return launch


def _master_address(rank_variable: str, launch: Launch) -> str:
    if rank_variable == "SLURM_PROCID":
        try:
            nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
            listing = subprocess.run(["scontrol", "show", "hostnames", nodes], check=True, capture_output=True, text=True)
            return listing.stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            raise ConfigError(
                "MASTER_ADDR is not exported and scontrol cannot list the hosts of SLURM_STEP_NODELIST: export "
                "MASTER_ADDR=<host> before srun"
            ) from None
    local_size = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or os.environ.get("MPI_LOCALNRANKS")
    if launch.world_size == 1 or (local_size is not None and int(local_size) == launch.world_size):
        return "127.0.0.1"
    raise ConfigError(
        "MASTER_ADDR is not exported, so the ranks cannot find each other: with MPI over several nodes give the "
        "first host's address, e.g. deepspeed --launcher openmpi --launcher_args='-x MASTER_ADDR=<host>' ..., or put "
        "MASTER_ADDR=<host> in ~/.deepspeed_env"
    )


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run and their process groups, seen from one of them.

    Attributes:
        shape: Number of ranks along each axis; their product is the world size.
        rank: Global rank of this process, from 0.
        device: This rank's GPU, or the CPU.
        groups: This rank's process group along each axis, and ``"model"``: all ranks that read the same data.
        timeout: How long a collective of a further group may take.
        subgroups: Groups of ties and networks, by their global ranks in ascending order (see ``new_subgroups``).
    """

    shape: MeshShape
    rank: int
    device: torch.device
    groups: dict[str, dist.ProcessGroup]
    timeout: timedelta
    subgroups: dict[tuple[int, ...], dist.ProcessGroup] = field(default_factory=dict)
    _made: set[tuple[int, ...]] = field(default_factory=set)

    @property
    def mesh_rank(self) -> MeshRank:
        """This rank's three numbers."""
        return self.shape.mesh_rank(self.rank)

    def new_subgroups(self, rank_sets: Sequence[tuple[int, ...]]) -> None:
        """Makes a group for each new set of global ranks. Collective: every rank passes the same sets in one order."""
        new = [ranks for ranks in dict.fromkeys(rank_sets) if ranks not in self._made]
        self._made.update(new)
        self.subgroups.update(_make_groups(new, rank=self.rank, device=self.device, timeout=self.timeout))

    def broadcast_number(self, number: int) -> int:
        """Rank 0's number (int64) on every rank. Collective; the host waits for the device."""
        value = torch.tensor([number], dtype=torch.int64, device=self.device)
        dist.broadcast(value, src=0)
        return int(value)

    @torch.no_grad()
    def warm_up(self) -> None:
        """Sends a first message over every group, in the same order on all ranks. Collective; call it after the last group.

        NCCL creates a communicator at its first message, and that is itself collective. Within a step, two ranks could reach
        the first messages of two groups in different orders and wait for each other for ever; here the order is fixed.
        """
        number = torch.zeros(1, device=self.device)
        for group in (dist.group.WORLD, *self.groups.values(), *self.subgroups.values()):
            dist.all_reduce(number, group=group)
        # Sends between two ranks may get a communicator of their own, apart from the group's: exchange one each way.
        pipeline, ranks = self.groups["pipeline"], dist.get_process_group_ranks(self.groups["pipeline"])
        here = ranks.index(self.rank)
        for source, target in ((here - 1, here + 1), (here + 1, here - 1)):
            if 0 <= source < len(ranks):
                dist.recv(number, ranks[source], pipeline)
            if 0 <= target < len(ranks):
                dist.send(number, ranks[target], pipeline)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def disjoint_rounds(rank_sets: Sequence[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Packs sets of ranks greedily into rounds such that no rank is twice in a round."""
    rounds: list[list[tuple[int, ...]]] = []
    for ranks in rank_sets:
        fitting = (one for one in rounds if not set(ranks) & {rank for other in one for rank in other})
        found = next(fitting, None)
        if found is None:
            rounds.append(found := [])
        found.append(ranks)
    return rounds


def _make_groups(
    rank_sets: Sequence[tuple[int, ...]], *, rank: int, device: torch.device, timeout: timedelta
) -> dict[tuple[int, ...], dist.ProcessGroup]:
    """Makes a group for each set (ranks ascending) and returns those that ``rank`` is in. Collective over the world.

    With NCCL one split of the world serves all sets that have no rank in common; a new group for each set would cost a split
    of the whole world each time. torch 2.11 to 2.14 cannot split gloo groups, so on a CPU they are made one by one. Every
    group gets the timeout explicitly: it does not inherit the world's.
    """
    assert all(list(ranks) == sorted(ranks) for ranks in rank_sets)
    found: dict[tuple[int, ...], dist.ProcessGroup] = {}
    if device.type == "cuda":
        for disjoint in disjoint_rounds(rank_sets):
            group = dist.split_group(split_ranks=[list(ranks) for ranks in disjoint], timeout=timeout)
            found.update((ranks, group) for ranks in disjoint if rank in ranks and group is not None)
        return found
    for ranks in rank_sets:
        group = dist.new_group(list(ranks), timeout=timeout)
        if rank in ranks:
            found[ranks] = group
    return found


def local_device(launch: Launch) -> torch.device:
    """The device of this rank: a GPU of its own, or the CPU on a node without GPUs.

    Raises:
        ConfigError: when this node has fewer GPUs than ranks.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if launch.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {launch.local_rank} has no GPU of its own: this node has {torch.cuda.device_count()}; "
            "start at most one rank per GPU (deepspeed --num_gpus)"
        )
    return torch.device("cuda", launch.local_rank)


def start_process_group(*, timeout_minutes: float, init_method: str | None = None) -> torch.device:
    """Joins the process group that the launcher announced and returns the device of this rank.

    ``discover_launch`` has been called before. NCCL serves GPU tensors and gloo CPU tensors; without a GPU
    everything is gloo.

    Raises:
        ConfigError: when this node has fewer GPUs than ranks.
    """
    launch = discover_launch()
    device = local_device(launch)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # A resumed run has to be bit-equal; cuDNN's other algorithms sum the convolution's weight gradient in varying order.
        torch.backends.cudnn.deterministic = True
        backend = "cpu:gloo,cuda:nccl"
    else:
        backend = "gloo"
        if "OMP_NUM_THREADS" not in os.environ:
            # DeepSpeed's launcher lets every rank use all cores: with n ranks, n times more threads than cores.
            ranks_here = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_here))
    dist.init_process_group(
        backend,
        init_method=init_method,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(minutes=timeout_minutes),
        device_id=device if device.type == "cuda" else None,
    )
    return device


def make_mesh(shape: MeshShape, *, device: torch.device, timeout_minutes: float) -> Mesh:
    """Makes the groups of every axis. Collective over the world.

    Args:
        shape: Number of ranks along each axis; ``shape.world_size`` is that of the process group.
        device: From `start_process_group`.
        timeout_minutes: How long a collective of these groups may take; the world's own is that of `start_process_group`.
    """
    assert dist.get_world_size() == shape.world_size, "sizes are checked against the world before this"
    rank, timeout = dist.get_rank(), timedelta(minutes=timeout_minutes)
    groups: dict[str, dist.ProcessGroup] = {}
    for name, varying in [*((axis, (axis,)) for axis in AXES), ("model", ("pipeline", "tensor"))]:
        sets = _rank_sets(shape, varying)
        if name in AXES and len(sets) == 1:
            world = dist.group.WORLD  # a second communicator over all ranks would only cost device memory
            assert world is not None, "initialised above"
            groups[name] = world
        else:
            (groups[name],) = _make_groups(sets, rank=rank, device=device, timeout=timeout).values()
    return Mesh(shape=shape, rank=rank, device=device, groups=groups, timeout=timeout)


def _rank_sets(shape: MeshShape, varying: tuple[str, ...]) -> list[tuple[int, ...]]:
    """Sets of global ranks that differ along the ``varying`` axes alone; ascending, as tensor is the innermost axis."""
    sets: dict[tuple[int, ...], list[int]] = {}
    for rank in range(shape.world_size):
        mesh_rank = shape.mesh_rank(rank)
        sets.setdefault(tuple(getattr(mesh_rank, axis) for axis in AXES if axis not in varying), []).append(rank)
    return [tuple(ranks) for ranks in sets.values()]
