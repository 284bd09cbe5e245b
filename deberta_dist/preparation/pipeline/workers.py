"""Worker processes that divide the work items of a phase among themselves, on all ranks, without a master.

A work item belongs to the process that first makes its claim, a file in a folder of this start on the shared file system. So
fast processes take more work items than slow ones, one and many processes run the same code, and the claims of a start that
was killed mean nothing to the next.
"""

import multiprocessing
import os
import signal
import struct
import threading
import traceback
from collections.abc import Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Protocol, cast

from deberta_dist.errors import DebertaDistError, UnfinishedError
from deberta_dist.files.disk import open_file, write_at
from deberta_dist.preparation.pipeline.publish import making

_PROGRESS = struct.Struct("<3Q")
_PROGRESS_NAME = "progress-"
_AGAIN = (
    "run the same command again, what is finished stays; where memory is short, with fewer --workers or a smaller "
    "--max-document-bytes"
)


class Worker:
    """One process at its work items: what a phase may ask of it and report to it.

    Args:
        directory: folder of this start, on a file system that all ranks share.
        name: of the worker, in no other process.

    Raises:
        DataError: here and in every method: the disk is full.
    """

    def __init__(self, directory: Path, *, name: str) -> None:
        self.directory = directory
        self._totals = [0, 0, 0]
        self._path = directory / f"{_PROGRESS_NAME}{name}"
        with making(self._path):
            self._file = open_file(self._path, os.O_WRONLY | os.O_CREAT)

    def claim(self, item: str) -> bool:
        """Whether a work item is this worker's."""
        path = self.directory / f"claim-{item}"
        try:
            with making(path):
                # O_EXCL is atomic, on NFS since version 3: of all ranks exactly one makes the file.
                os.close(open_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def report(self, *, num_bytes: int = 0, num_tokens: int = 0, input_bytes: int = 0) -> None:
        """Adds to what this worker has done, for ``progress``."""
        for i, more in enumerate((num_bytes, num_tokens, input_bytes)):
            self._totals[i] += more
        with making(self._path):
            write_at(self._file, _PROGRESS.pack(*self._totals), 0)

    def close(self) -> None:
        """Closes its file: NFS does not remove a directory with open files in it."""
        os.close(self._file)


def progress(directory: Path) -> tuple[int, int, int]:
    """What all workers of a start have reported: bytes of text, tokens, bytes of input."""
    totals = [0, 0, 0]
    for path in directory.glob(f"{_PROGRESS_NAME}*"):
        content = path.read_bytes()
        # A worker that has just begun has an empty file.
        if len(content) == _PROGRESS.size:
            totals = [total + one for total, one in zip(totals, _PROGRESS.unpack(content), strict=True)]
    return totals[0], totals[1], totals[2]


class Phase(Protocol):
    """A phase of the work; picklable."""

    @property
    def item_names(self) -> Sequence[str]:
        """Names of the work items, in the order in which they are claimed."""

    def run(self, number: int, *, worker: Worker) -> None:
        """Does work item ``number``."""


def _work(phase: Phase, worker: Worker) -> None:
    for number, item in enumerate(phase.item_names):
        if worker.claim(f"{type(phase).__name__}-{item}"):
            try:
                phase.run(number, worker=worker)
            except MemoryError as error:
                raise UnfinishedError(f"there is not enough memory: {_AGAIN}") from error


def _serve(connection: Connection, directory: Path, name: str) -> None:
    """Life of a worker process: a phase in, None or an error out, until the other end closes."""
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    try:
        worker = Worker(directory, name=name)
        while True:
            phase = connection.recv()
            try:
                _work(phase, worker)
            except (DebertaDistError, OSError) as error:
                connection.send(error)
            except Exception:
                # As text: an exception of a library may not survive pickling.
                connection.send(RuntimeError(traceback.format_exc()))
            else:
                connection.send(None)
    except (EOFError, ConnectionError):  # the parent has ended, or does
        return


def _end_with_parent() -> None:
    """Waits for the parent's end, by whatever, and ends this process: a new start may be at the same work by then."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class WorkerPool:
    """The workers of this rank; a context manager. One works in this process, several in processes of their own.

    Args:
        directory: folder of this start, the same on all ranks.
        rank: number of this rank; goes into the names of its workers.
        num_workers: how many, at least 1.
    """

    def __init__(self, directory: Path, *, rank: int, num_workers: int) -> None:
        self._members: list[tuple[BaseProcess, Connection]] = []
        self._worker: Worker | None = None
        if num_workers == 1:
            self._worker = Worker(directory, name=f"{rank}")
            return
        # Not fork: MPI libraries do not survive it.
        context = multiprocessing.get_context("spawn")
        # Workers inherit that SIGINT is blocked: a terminal interrupts them too, and this process is to end them. The
        # tracker comes first, for its start would lift the block. Windows has neither.
        can_block = hasattr(signal, "pthread_sigmask")
        if can_block:
            resource_tracker.ensure_running()
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for number in range(num_workers):
                ours, theirs = context.Pipe()
                arguments = (theirs, directory, f"{rank}-{number}")
                process = context.Process(target=_serve, args=arguments, name=f"worker {number}", daemon=True)
                process.start()
                theirs.close()
                self._members.append((process, ours))
        finally:
            if can_block:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def run(self, phase: Phase) -> None:
        """Works until no work item of a phase is left to claim; those of other ranks may still be at theirs.

        Raises:
            DebertaDistError: of a worker; the others are ended. What they have published stays.
            UnfinishedError: a worker was killed, or memory was short.
        """
        if self._worker is not None:
            _work(phase, self._worker)
            return
        for process, connection in self._members:
            _send(connection, phase, process=process)
        waiting = {connection: process for process, connection in self._members}
        while waiting:
            for connection in cast(list[Connection], wait(list(waiting))):
                process = waiting.pop(connection)
                try:
                    outcome = connection.recv()
                except (EOFError, ConnectionError):
                    process.join()
                    raise _killed(process) from None
                if outcome is not None:
                    raise outcome

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._worker is not None:
            self._worker.close()
        for process, connection in self._members:
            if kind is not None:
                process.terminate()
            connection.close()
        for process, _ in self._members:
            process.join()


def _send(connection: Connection, phase: Phase, *, process: BaseProcess) -> None:
    try:
        connection.send(phase)
    except ConnectionError:
        process.join()
        raise _killed(process) from None


def _killed(process: BaseProcess) -> UnfinishedError:
    code = process.exitcode or 0
    how = f"was killed by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"ended with code {code}"
    return UnfinishedError(f"{process.name} {how}: {_AGAIN}")
