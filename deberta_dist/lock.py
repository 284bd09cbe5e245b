"""One process per directory that is being written: a second one is refused and told who has it.

Two runs on one run directory would sweep each other's half-written checkpoints away; two preparations of one corpus would
remove each other's parts.
"""

import errno
import fcntl
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from deberta_dist.errors import ConfigError

LOCK_NAME = ".lock"


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
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(
                f"{key} = {self.directory} cannot be written to ({error.strerror}): name another one"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self._file, 4096).decode("utf-8", "replace").strip()
            os.close(self._file)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ConfigError(
                    f"{key} = {self.directory} is in use by another run ({holder or 'which has just started'}): "
                    "stop that one, or name another directory"
                ) from error
            raise ConfigError(
                f"{key} = {self.directory} is on a file system without locks ({error.strerror}): name one "
                "that two runs cannot use at once unnoticed"
            ) from error
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        try:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, (json.dumps(holder) + "\n").encode("utf-8"), 0)
        except OSError as error:
            os.close(self._file)
            raise ConfigError(
                f"{key} = {self.directory} cannot be written to ({error.strerror}): make room, or name another one"
            ) from error
        self.is_held = True

    def release(self) -> None:
        """Gives the directory free. The file stays: removing it could remove the next holder's."""
        if self.is_held:
            self.is_held = False
            os.ftruncate(self._file, 0)
            os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
