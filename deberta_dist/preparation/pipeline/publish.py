"""Files inside a preparation's working directory: each complete or absent, whenever a process is killed."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from deberta_dist.errors import DataError
from deberta_dist.files.atomic import explained_full_disk, replace_file

# An NFS client may believe for so long that a file which another node has made is not there.
_VISIBLE_SECONDS = 60.0


def making(path: Path) -> AbstractContextManager[None]:
    """Says what a full disk means to who prepares a corpus, for a block that makes ``path``: a DataError."""
    return explained_full_disk(path, advice="make room and run the same command again; what is finished stays")


def publish(path: Path, content: bytes) -> None:
    """Writes a file of a working directory, replacing what is there.

    Raises:
        DataError: the disk is full.
    """
    with making(path):
        replace_file(path, content)


def wait_for(what: str, is_there: Callable[[], bool]) -> None:
    """Waits until what is finished can be seen on this node.

    Raises:
        DataError: it cannot after a minute.
    """
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not is_there():
        if time.monotonic() > deadline:
            raise DataError(f"{what} vanished; run the same command again")
        time.sleep(0.2)
