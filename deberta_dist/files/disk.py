"""File operations on which operating systems differ: POSIX calls with a fallback for Windows.

Each function asks for the ability itself and not for the name of the system, since network file systems lack some too.
"""

import errno
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

# Without it Windows would take every byte 10 for the end of a line. Python closes descriptors in new programs by itself.
_BINARY = getattr(os, "O_BINARY", 0)
_NOT_FOR_DIRECTORIES = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS)
# One position per open file, where there is no os.pread: between moving it and reading nobody else may move it.
_position = threading.Lock()


def open_file(path: str | Path, flags: int) -> int:
    """A descriptor of a binary file. Raises OSError."""
    return os.open(path, flags | _BINARY, 0o666)


def read_at(file: int, num_bytes: int, offset: int) -> bytes:
    """At most ``num_bytes`` of a file from ``offset`` on, for several threads at once. Raises OSError."""
    if hasattr(os, "pread"):
        return os.pread(file, num_bytes, offset)
    with _position:
        os.lseek(file, offset, os.SEEK_SET)
        return os.read(file, num_bytes)


def write_at(file: int, content: bytes, offset: int) -> None:
    """Overwrites a few bytes of a file. Raises OSError."""
    if hasattr(os, "pwrite"):
        os.pwrite(file, content, offset)
        return
    with _position:
        os.lseek(file, offset, os.SEEK_SET)
        os.write(file, content)


def write_all(write: Callable[[memoryview], int], content: bytes | memoryview) -> None:
    """Writes all of ``content``, by as many calls of ``write`` as it takes, each of which returns how much it took."""
    rest = memoryview(content)
    # os.write may take less than it is given: Linux at most 2 GiB at a time, network file systems any number.
    while rest:
        rest = rest[write(rest) :]


def sync_directory(path: str | Path) -> None:
    """Forces a directory's entries to disk where the system can; Windows writes them itself.

    Raises:
        OSError: it is missing, or the disk fails.
    """
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno in _NOT_FOR_DIRECTORIES:
            return
        raise
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _NOT_FOR_DIRECTORIES:
            raise
    finally:
        os.close(folder)


def may_be_alive(pid: int) -> bool:
    """Whether a process of this number may exist here. On Windows always, where the question would interrupt it."""
    if sys.platform == "win32":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def num_usable_cores() -> int:
    """Processor cores that this process may use: those it is bound to, where the system can bind."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
