"""The grid of ranks: who shares tensors, stages and data with whom.

One object, made once by ``training/build.py`` and passed to whoever communicates; nothing here is global.
The grid is ``[pipeline, data, tensor]`` with tensor innermost, so that the ranks which talk in every layer
are neighbours on one node. Starting the process group is here too, because this file and the launchers are
the only places that read environment variables.
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
    """Where a rank stands on the grid."""

    pipeline: int
    data: int
    tensor: int


@dataclass(frozen=True)
class MeshShape:
    """Sizes of the grid. A pure value: no process group is needed to reason about a layout."""

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
        """Coordinate of global ``rank``."""
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return MeshRank(pipeline=pipeline, data=data, tensor=tensor)


@dataclass(frozen=True)
class Launch:
    """What the launcher told this process: its rank among how many, and where they meet."""

    rank: int
    world_size: int
    local_rank: int


def discover_launch() -> Launch:
    """Reads this process's rank from what the launcher exported.

    Understands the DeepSpeed launcher and torchrun (RANK ...), Open MPI, MPICH and Slurm; with none of them
    this is a world of one. MASTER_ADDR is filled in for Slurm and for one node.

    Raises:
        ConfigError: under MPI over several nodes when MASTER_ADDR is not exported.
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
    # Under srun with PMI2 there is a PMI_RANK without a local rank: then Slurm's own variables know it.
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
        raise ConfigError(f"{found[0]} is there and {found[2]} is not: a rank must know its number on its node")
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
                "MASTER_ADDR is not exported and scontrol does not tell the first host of SLURM_STEP_NODELIST: export "
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
    """The grid of ranks with its process groups, seen from one of them.

    Attributes:
        shape: Sizes of the grid.
        rank: Global rank of this process.
        device: Where this rank computes.
        groups: Process group of this rank along each axis, and ``"model"``: all ranks that hold the same data.
        timeout: What a message of a further group may take.
        subgroups: Further groups by their global ranks (see ``new_subgroups``).
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
        """Where this rank stands."""
        return self.shape.mesh_rank(self.rank)

    def new_subgroups(self, rank_sets: Sequence[tuple[int, ...]]) -> None:
        """Makes a group for each new set of global ranks. Collective: every rank passes the same sets in one order."""
        new = [ranks for ranks in dict.fromkeys(rank_sets) if ranks not in self._made]
        self._made.update(new)
        self.subgroups.update(_make_groups(new, rank=self.rank, device=self.device, timeout=self.timeout))

    def broadcast_number(self, number: int) -> int:
        """Rank 0's number, 64 bits, on every rank. Collective; the host waits for the device."""
        value = torch.tensor([number], dtype=torch.int64, device=self.device)
        dist.broadcast(value, src=0)
        return int(value)

    @torch.no_grad()
    def warm_up(self) -> None:
        """A message over every group, in one order on all ranks. Collective; after the last group is made.

        A library makes a communicator at its first message. In the middle of a step the first messages of two groups could
        come in two orders on two ranks, and each wait for the other; here they come one after the other.
        """
        number = torch.zeros(1, device=self.device)
        for group in (dist.group.WORLD, *self.groups.values(), *self.subgroups.values()):
            dist.all_reduce(number, group=group)
        # Down the pipeline and up: a message that goes one way alone may have a communicator of its two ranks.
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
    """Sets of ranks in as few rounds as they fit in one after the other, no rank twice in a round."""
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
    """The groups that ``rank`` is in, of those of all sets, whose ranks ascend. Collective over the world.

    NCCL splits the world once for all sets that have no rank in common; a group of its own for each would be a split of
    the whole world for each. gloo, on which torch 2.11 to 2.14 cannot split, makes them one by one.
    Each needs a timeout: the world's is not passed on.
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
    """Where this rank computes: a GPU of its own, or the CPU where the node has none.

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
        # A run that goes on is bit-equal: the convolution's weight gradient is with these algorithms alone.
        torch.backends.cudnn.deterministic = True
        backend = "cpu:gloo,cuda:nccl"
    else:
        backend = "gloo"
        if "OMP_NUM_THREADS" not in os.environ:
            # DeepSpeed's launcher leaves every rank all cores: many times more threads than there are.
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
    """Makes the groups of every axis. Collective over the world, whose size is ``shape.world_size``.

    Args:
        shape: Sizes of the grid.
        device: Of this rank.
        timeout_minutes: What a message of a group may take; the world's is that of `start_process_group`.
    """
    assert dist.get_world_size() == shape.world_size, "sizes are checked against the world before this"
    rank, timeout = dist.get_rank(), timedelta(minutes=timeout_minutes)
    groups: dict[str, dist.ProcessGroup] = {}
    for name, varying in [*((axis, (axis,)) for axis in AXES), ("model", ("pipeline", "tensor"))]:
        sets = _rank_sets(shape, varying)
        if name in AXES and len(sets) == 1:
            world = dist.group.WORLD  # a second communicator of everyone would be a waste
            assert world is not None, "initialised above"
            groups[name] = world
        else:
            (groups[name],) = _make_groups(sets, rank=rank, device=device, timeout=timeout).values()
    return Mesh(shape=shape, rank=rank, device=device, groups=groups, timeout=timeout)


def _rank_sets(shape: MeshShape, varying: tuple[str, ...]) -> list[tuple[int, ...]]:
    """The ranks that differ in the ``varying`` axes alone, a set for each place on the others."""
    sets: dict[tuple[int, ...], list[int]] = {}
    for rank in range(shape.world_size):
        place = shape.mesh_rank(rank)
        sets.setdefault(tuple(getattr(place, axis) for axis in AXES if axis not in varying), []).append(rank)
    return [tuple(ranks) for ranks in sets.values()]
