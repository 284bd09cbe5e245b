"""Files inside a preparation's working directory: each complete or absent, whoever is killed when."""

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from deberta_dist.errors import NO_ROOM, DataError

# An NFS client may believe for so long that a file which another node has made is not there.
_VISIBLE_SECONDS = 60.0


@contextmanager
def making(path: Path) -> Iterator[None]:
    """Says what a full disk means to who prepares a corpus, for a block that makes ``path``.

    Raises:
        DataError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise DataError(
            f"{path} is not written ({error.strerror}): make room and run the same command again; what is finished stays"
        ) from error


def publish(path: Path, content: bytes) -> None:
    """Writes a file under another name, forces it to disk and gives it its name, replacing what is there.

    Raises:
        DataError: the disk is full.
    """
    # Containers on two nodes may agree in their names and numbers of processes.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    with making(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


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
