"""The grid as arithmetic, and the launch as each launcher announces it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from deberta_dist.errors import ConfigError
from deberta_dist.parallel.mesh import Launch, MeshRank, MeshShape, discover_launch

PREFIXES = ("OMPI_", "PMI_", "MPI_", "SLURM_", "MASTER_")
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE")


@pytest.fixture(autouse=True)
def bare_environment() -> Iterator[None]:
    """No launcher at first, and nothing of a test is left behind: discover_launch writes into os.environ."""
    saved = dict(os.environ)
    for name in saved:
        if name in NAMES or name.startswith(PREFIXES):
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(saved)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 4), (4, 1, 2), (1, 5, 1), (3, 2, 1)])
def test_rank_and_coordinate_are_inverse(sizes: tuple[int, int, int]) -> None:
    shape = MeshShape(pipeline=sizes[0], data=sizes[1], tensor=sizes[2])
    found = [shape.mesh_rank(rank) for rank in range(shape.world_size)]
    assert found == [
        MeshRank(pipeline=p, data=d, tensor=t) for p in range(sizes[0]) for d in range(sizes[1]) for t in range(sizes[2])
    ]
    assert [shape.rank(mesh_rank) for mesh_rank in found] == list(range(shape.world_size))


def test_no_launcher_is_a_world_of_one() -> None:
    assert discover_launch() == Launch(rank=0, world_size=1, local_rank=0)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    assert int(os.environ["MASTER_PORT"]) > 0


def test_deepspeed_and_torchrun() -> None:
    os.environ.update(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", MASTER_ADDR="node1", MASTER_PORT="1234")
    # A shell of another launcher around it: what the nearer launcher says counts.
    os.environ.update(OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="2", SLURM_PROCID="0", SLURM_NTASKS="2")
    assert discover_launch() == Launch(rank=5, world_size=8, local_rank=1)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("node1", "1234")


def test_open_mpi_on_one_node() -> None:
    os.environ.update(OMPI_COMM_WORLD_RANK="3", OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_LOCAL_RANK="3")
    os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"] = "4"
    assert discover_launch() == Launch(rank=3, world_size=4, local_rank=3)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    # Libraries read the usual names.
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["3", "4", "3"]


def test_mpich_on_one_node() -> None:
    os.environ.update(PMI_RANK="1", PMI_SIZE="2", MPI_LOCALRANKID="1", MPI_LOCALNRANKS="2")
    assert discover_launch() == Launch(rank=1, world_size=2, local_rank=1)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"


def test_a_rank_without_its_number_on_the_node_ends() -> None:
    os.environ.update(PMI_RANK="5", PMI_SIZE="8", MASTER_ADDR="node1")
    with pytest.raises(ConfigError, match="MPI_LOCALRANKID is not"):
        discover_launch()


def test_slurm_knows_the_local_rank_where_pmi2_does_not() -> None:
    os.environ.update(PMI_RANK="5", PMI_SIZE="8", MASTER_ADDR="node1")
    os.environ.update(SLURM_PROCID="5", SLURM_NTASKS="8", SLURM_LOCALID="1", SLURM_STEP_ID="0")
    assert discover_launch() == Launch(rank=5, world_size=8, local_rank=1)


def test_a_shell_inside_a_slurm_allocation_is_a_world_of_one() -> None:
    os.environ.update(SLURM_PROCID="0", SLURM_NTASKS="8", SLURM_STEP_NUM_TASKS="1", SLURM_LOCALID="0")
    os.environ.update(SLURM_STEP_ID="4294967290", MASTER_ADDR="node1")
    assert discover_launch() == Launch(rank=0, world_size=1, local_rank=0)


@pytest.mark.parametrize(
    "launcher",
    [
        {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
         "OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
        {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"},
    ],
    ids=["openmpi", "mpich"],
)  # fmt: skip
def test_mpi_over_nodes_needs_an_address(launcher: dict[str, str]) -> None:
    os.environ.update(launcher)
    with pytest.raises(ConfigError, match="MASTER_ADDR is not exported.*--launcher_args='-x MASTER_ADDR=<host>'"):
        discover_launch()
    assert "MASTER_ADDR" not in os.environ
    os.environ["MASTER_ADDR"] = "node1"
    found = discover_launch()
    assert (found.rank, found.world_size) == (5, 8)
    assert os.environ["MASTER_ADDR"] == "node1"


def put_scontrol(directory: Path, script: str) -> None:
    program = directory / "scontrol"
    program.write_text("#!/bin/sh\n" + script)
    program.chmod(0o755)
    os.environ["PATH"] = f"{directory}:{os.environ['PATH']}"


def srun(rank: int = 6) -> None:
    os.environ.update(SLURM_PROCID=str(rank), SLURM_NTASKS="8", SLURM_LOCALID="2", SLURM_STEP_ID="0")
    os.environ["SLURM_JOB_NODELIST"] = "gpu[07-08]"


def test_slurm_step_meets_on_the_first_host(tmp_path: Path) -> None:
    put_scontrol(tmp_path, 'test "$*" = "show hostnames gpu[07-08]" || exit 1\necho gpu07\necho gpu08\n')
    srun()
    assert discover_launch() == Launch(rank=6, world_size=8, local_rank=2)
    assert os.environ["MASTER_ADDR"] == "gpu07"


def test_slurm_asks_nobody_when_the_address_is_given(tmp_path: Path) -> None:
    put_scontrol(tmp_path, "exit 1\n")
    srun()
    os.environ["MASTER_ADDR"] = "node1"
    assert discover_launch().rank == 6
    assert os.environ["MASTER_ADDR"] == "node1"


def test_slurm_with_a_failing_scontrol_ends(tmp_path: Path) -> None:
    put_scontrol(tmp_path, "exit 1\n")
    srun()
    with pytest.raises(ConfigError, match="scontrol"):
        discover_launch()


def test_slurm_batch_script_without_a_step_is_a_world_of_one(tmp_path: Path) -> None:
    put_scontrol(tmp_path, "exit 1\n")
    os.environ.update(SLURM_PROCID="0", SLURM_NTASKS="8", SLURM_LOCALID="0", SLURM_JOB_NODELIST="gpu[07-08]")
    assert discover_launch() == Launch(rank=0, world_size=1, local_rank=0)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    assert os.environ["WORLD_SIZE"] == "1"


def test_second_look_says_the_same() -> None:
    os.environ.update(OMPI_COMM_WORLD_RANK="3", OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_LOCAL_RANK="3")
    os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"] = "4"
    assert discover_launch() == discover_launch()
