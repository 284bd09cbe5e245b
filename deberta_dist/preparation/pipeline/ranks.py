"""The processes of ``mpirun -n K``, or one alone; the only door to mpi4py.

Ranks share a file system and little else: work is claimed there (``workers``), so MPI carries what was decided, not work.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from deberta_dist.errors import ConfigError
from deberta_dist.files.disk import num_usable_cores

T = TypeVar("T")

_POLL_SECONDS = 0.01
# Set by Open MPI, by MPICH and what descends from it, by PMIx (also srun --mpi=pmix), by MVAPICH.
_STARTED_BY_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MV2_COMM_WORLD_SIZE")


class PreparationRanks:
    """A group of processes that run the same program.

    Attributes:
        rank: number of this process in the group, from 0.
        size: how many there are.
    """

    def __init__(self, communicator: Any = None) -> None:
        """Wraps a communicator of mpi4py; None: this process alone."""
        self._communicator = communicator
        self.rank: int = communicator.Get_rank() if communicator else 0
        self.size: int = communicator.Get_size() if communicator else 1

    @classmethod
    def of_environment(cls) -> "PreparationRanks":
        """All processes of the mpirun that started this one; this one alone where none did.

        Raises:
            ConfigError: mpi4py, or the MPI library it needs, is missing.
        """
        if not cls.is_started_by_mpi():
            return cls()
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise ConfigError(
                f"started by mpirun, but mpi4py cannot be used ({error}): pip install 'deberta_dist[mpi]', or start "
                "without mpirun, with --workers N"
            ) from error
        return cls(MPI.COMM_WORLD)

    def barrier(self) -> None:
        """Waits for all ranks, without taking processor time: MPI's own waiting keeps a core busy."""
        if self.size > 1:
            request = self._communicator.Ibarrier()
            while not request.Test():
                time.sleep(_POLL_SECONDS)

    def first(self, function: Callable[[], T]) -> T:
        """What ``function`` returns on rank 0, on all ranks. An error there has to end all (``abort``)."""
        if self.size == 1:
            return function()
        result = function() if self.rank == 0 else None
        self.barrier()
        return self._communicator.bcast(result, root=0)

    def gather(self, value: T) -> list[T] | None:
        """The values of all ranks, on rank 0; None elsewhere."""
        if self.size == 1:
            return [value]
        self.barrier()
        return self._communicator.gather(value, root=0)

    def unused_cores(self, *, num_workers: int) -> str | None:
        """A warning where mpirun has bound this rank to fewer cores than its workers could use; else None."""
        if not self.is_started_by_mpi():
            return None
        bound, present = num_usable_cores(), os.cpu_count() or 1
        if bound >= min(num_workers, present):
            return None
        return (
            f"{num_workers} workers of each rank share {bound} of {present} cores, for mpirun has bound the ranks: "
            "mpirun --bind-to none lets them use all"
        )

    @staticmethod
    def is_started_by_mpi() -> bool:
        """Whether mpirun, or what does its work, started this process."""
        return any(name in os.environ for name in _STARTED_BY_MPI)

    def run(self, main: Callable[[], int]) -> int:
        """Runs ``main``; what goes wrong on one rank ends all; the others would wait for ever.

        Returns:
            Its exit code.
        """
        if self.size == 1:
            return main()
        try:
            code = main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        if code:
            sys.stdout.flush()
            sys.stderr.flush()
            self._communicator.Abort(code)
        return code
