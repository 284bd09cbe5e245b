"""Writing a file that is either complete or absent, and never replaces another.

The tokenizer trainer and the token file writer publish through this one place.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from deberta_dist.errors import NO_ROOM, DataError
from deberta_dist.files.disk import sync_directory


def refuse_existing(path: str | Path) -> None:
    """Refuses an output that is already there.

    Args:
        path: file about to be written.

    Raises:
        DataError: something exists at ``path``.
    """
    if os.path.lexists(path):
        raise DataError(f"{path} exists already and is left as it is: move it away or name another output")


class PublishingWriter(ABC):
    """A context manager whose files appear when its block ends without error, and not at all otherwise.

    A writer opens its files in ``_stack``; ``_finish`` writes what is known at the end only.
    """

    _stack: ExitStack

    @abstractmethod
    def _finish(self) -> None:
        """Completes the files; an error keeps them from appearing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            # Told of the error, the stack removes the unfinished files instead of publishing them.
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            self._finish()


@contextmanager
def new_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file, readable and writable, which appears at ``path`` when the block ends without error.

    It is written beside its destination under a name that starts with a dot, forced to disk and then
    linked to its name, which fails where a file has appeared there in the meantime. An error inside the
    block removes it.

    Args:
        path: where the file is to appear; missing parent folders are made.

    Yields:
        The open file.

    Raises:
        DataError: something exists at ``path``, before or after the block; nothing can be made there; or
            the disk is full.
    """
    path = Path(path)
    refuse_existing(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = open(temporary, "w+b")
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}): name another output") from error
    try:
        with opened as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _publish(temporary, path)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise DataError(f"{path} is not written ({error.strerror}): make room for it") from error
    finally:
        temporary.unlink(missing_ok=True)


def _publish(temporary: Path, path: Path) -> None:
    """Gives a complete file its name, without replacing what may have that name by now."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        refuse_existing(path)
    except OSError:
        # File systems without hard links: the gap between look and rename is the best there is.
        refuse_existing(path)
        os.rename(temporary, path)
    sync_directory(path.parent)
