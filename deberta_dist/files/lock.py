"""One process per directory that is being written: a second one is refused, and the message names the first.

Two runs on one run directory would sweep each other's half-written checkpoints away; two preparations of one corpus would
remove each other's parts. The only door to filelock, of which the native locks are used alone: the system releases them
with the process, however it dies, while a file that merely exists would stay.
"""

import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import lock_descriptor

from deberta_dist.errors import ConfigError
from deberta_dist.files.disk import open_file, read_at, write_at

LOCK_NAME = ".lock"
# Windows locks byte 0 against reading too: who has the lock stands behind it.
_HOLDER_OFFSET = 1


class RunLock:
    """Holds a directory until ``release`` or the end of the process; a context manager. For rank 0 only.

    Args:
        directory: Made if it is missing.
        key: What the user calls it, for messages.

    Raises:
        ConfigError: another process has it, or it cannot be locked.
    """

    def __init__(self, directory: str | Path, *, key: str = "run.directory") -> None:
        self.directory = Path(directory)
        path = self.directory / LOCK_NAME
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._file = open_file(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise ConfigError(f"{key} = {self.directory} cannot be written to ({error.strerror}): name another one") from error
        try:
            is_ours = lock_descriptor(self._file, blocking=False)
        except OSError as error:
            os.close(self._file)
            raise ConfigError(
                f"{key} = {self.directory} is on a file system without locks ({error.strerror}): name one "
                "on which two runs cannot collide unnoticed"
            ) from error
        if not is_ours:
            holder = _holder(self._file)
            os.close(self._file)
            raise ConfigError(
                f"{key} = {self.directory} is in use by another run ({holder or 'which has just started'}): "
                "stop that one, or name another directory"
            )
        ours = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        try:
            # A process that died leaves its text behind, which may be longer than ours.
            os.ftruncate(self._file, _HOLDER_OFFSET)
            write_at(self._file, (json.dumps(ours) + "\n").encode("utf-8"), _HOLDER_OFFSET)
        except OSError as error:
            os.close(self._file)
            raise ConfigError(
                f"{key} = {self.directory} cannot be written to ({error.strerror}): make room, or name another one"
            ) from error
        self.is_held = True

    def release(self) -> None:
        """Releases the directory. The file stays: removing it could remove the next holder's."""
        if self.is_held:
            self.is_held = False
            # While we still hold the lock: afterwards the text may be the next holder's.
            os.ftruncate(self._file, _HOLDER_OFFSET)
            os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def _holder(file: int) -> str:
    return read_at(file, 4096, _HOLDER_OFFSET).decode("utf-8", "replace").strip("\0 \n")


def wait_for_lock(file: int) -> None:
    """Waits until no other process has locked an open file; closing the file unlocks it.

    Raises:
        OSError: its file system has no locks.
    """
    lock_descriptor(file)
