"""Files and directories that are complete or absent under their names, whenever a process is killed.

`new_file` never replaces another file, `replace_file` and `replace_directory` put a complete one in another's place. Each
is made under a name beside its own, forced to disk and then renamed. Code that sweeps up after killed processes knows these
names: ``.NAME.*.tmp`` for files; directories are the caller's, see `replace_directory`.
"""

import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from deberta_dist.errors import NO_ROOM, DataError
from deberta_dist.files.disk import open_file, sync_directory, write_all


def refuse_existing(path: str | Path) -> None:
    """Refuses an output that is already there.

    Args:
        path: file about to be written.

    Raises:
        DataError: something exists at ``path``.
    """
    if os.path.lexists(path):
        raise DataError(f"{path} exists already and is not overwritten: move it away or name another output")


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
            # The stack sees the error, so it removes the unfinished files instead of publishing them.
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
        with explained_full_disk(path, advice="make room for it"):
            with opened as file:
                yield file
                # Before the name is given: after a power failure a name may be on disk and the content not.
                file.flush()
                os.fsync(file.fileno())
            _publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def explained_full_disk(path: Path, *, advice: str) -> Iterator[None]:
    """Says what a full disk means, for a block that makes ``path``.

    Raises:
        DataError: the disk is full; with the file and the ``advice``.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise DataError(f"{path} is not written ({error.strerror}): {advice}") from error


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


def write_and_sync(path: Path, content: bytes) -> None:
    """Writes a small file and forces it to disk. Raises OSError; what was written stays."""
    file = open_file(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        write_all(lambda rest: os.write(file, rest), content)
        os.fsync(file)
    finally:
        os.close(file)


def replace_file(path: Path, content: bytes, *, temporary: Path | None = None) -> None:
    """Writes a small file, replacing what is there; a reader sees the old content or the new one.

    Args:
        content: Whole content: it is held in memory.
        temporary: Where it is written first, in the same directory, for who sweeps by another name; one process at a time.

    Raises:
        OSError: It cannot be written; what was there stays.
    """
    # Containers on two nodes may agree in their names and numbers of processes.
    temporary = temporary or path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        write_and_sync(temporary, content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def replace_directory(temporary: Path, final: Path, *, aside: Path) -> None:
    """Renames a complete directory; what stands in its way is moved aside first and removed afterwards.

    The files in it have been forced to disk, and so have its entries (`sync_directory`, `sync_files`). Between the two
    renames of a process that is killed there is nothing under the name; then ``aside`` holds what was there, see `restore`.

    Args:
        temporary: The complete directory, on the same file system.
        final: Its name, on the same file system.
        aside: Where what stands in its way waits.

    Raises:
        OSError: It could not be renamed; then what stood there stands there again.
    """
    try:
        if os.path.lexists(final):
            remove(aside)
            os.rename(final, aside)
        os.rename(temporary, final)
        sync_directory(final.parent)
    except BaseException:  # a signal as well: between the two renames the old one must not be lost
        if os.path.lexists(temporary):
            restore(aside, final)
        raise
    finally:
        # Only once the new directory has its name; otherwise `aside` is the only copy.
        if not os.path.lexists(temporary):
            remove(aside)


def restore(aside: Path, final: Path) -> bool:
    """Gives what waits aside its name again where nothing has taken it; returns whether it did. Raises OSError."""
    if os.path.lexists(final) or not os.path.lexists(aside):
        return False
    os.rename(aside, final)
    return True


def remove(path: Path) -> None:
    """Removes a file or directory, as far as possible, or nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_files(directory: Path) -> None:
    """Forces the files in a directory, and its entries, to disk. Raises OSError."""
    for path in directory.iterdir():
        file = open_file(path, os.O_RDWR)
        try:
            os.fsync(file)
        finally:
            os.close(file)
    sync_directory(directory)
