"""The processes of ``mpirun -n K``, or one alone; the only door to mpi4py.

Ranks share a file system and little else: work is claimed there (``crew``), so MPI carries plans, not work.
"""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from deberta_dist.errors import ConfigError

T = TypeVar("T")

_POLL_SECONDS = 0.01


class Ranks:
    """A group of processes that run the same program.

    Attributes:
        rank: this one's number.
        size: how many there are.
    """

    def __init__(self, communicator: Any = None) -> None:
        """Wraps a communicator of mpi4py; None: this process alone."""
        self._communicator = communicator
        self.rank: int = communicator.Get_rank() if communicator else 0
        self.size: int = communicator.Get_size() if communicator else 1

    @classmethod
    def of_mpi(cls) -> "Ranks":
        """All processes of this mpirun.

        Raises:
            ConfigError: mpi4py, or the MPI library it needs, is missing.
        """
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

    def abort(self, exit_code: int) -> None:
        """Ends all ranks; returns where this is the only one. Ranks in a barrier would wait for ever otherwise."""
        if self.size > 1:
            self._communicator.Abort(exit_code)
