"""The files that a benchmark is distributed as: a folder, or a zip file of one."""

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from deberta_dist.errors import DataError
from deberta_dist.files.foreign import begins_like, head_of, refuse_foreign


class DataFiles:
    """A folder of files, or a zip of one; in a zip they may lie in a folder of their own.

    Args:
        path: Folder or zip file.
        names: Paths in it that may be asked for.
        what: Whose files they are, for messages.

    Raises:
        DataError: it is neither, or a zip holds one of the names twice.
    """

    def __init__(self, path: str | Path, *, names: Iterable[str], what: str) -> None:
        self.path = Path(path)
        self._members: dict[str, str] = {}
        if self.path.is_dir():
            return
        try:
            with zipfile.ZipFile(self.path) as archive:
                there = archive.namelist()
        except (OSError, zipfile.BadZipFile) as error:
            head = head_of(self.path)
            refuse_foreign(head, path)
            raise DataError(f"{path} is neither a folder nor a zip file of {what} ({error}){begins_like(head)}") from error
        for wanted in names:
            found = [name for name in there if name == wanted or name.endswith(f"/{wanted}")]
            if len(found) > 1:
                raise DataError(f"{path} holds {wanted} twice: {', '.join(found)}")
            if found:
                self._members[wanted] = found[0]

    @classmethod
    def folder(cls, path: Path) -> Self:
        """A folder as it is: whether it is there shows when a file is read."""
        files = cls.__new__(cls)
        files.path, files._members = path, {}
        return files

    def has(self, name: str) -> bool:
        """Whether a file is there. A link that leads nowhere counts: a task must not go missing without a word."""
        return name in self._members or os.path.lexists(self.path / name)

    def where(self, name: str) -> str:
        """A file for messages."""
        return str(self.path / name)

    def content(self, name: str) -> bytes:
        """Reads a file.

        Raises:
            DataError: it cannot be read.
        """
        try:
            if not self._members:
                return (self.path / name).read_bytes()
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(self._members[name])
        # Damaged and encrypted archives fail in every part of the reader, each with an error of its own.
        except Exception as error:
            link = self.path / name
            if link.is_symlink() and not link.exists():
                to = os.readlink(link)
                raise DataError(f"{link} is a link that leads nowhere, to {to}: fix or remove it") from error
            raise DataError(f"{link} cannot be read ({type(error).__name__}: {error})") from error
