"""The files that a benchmark is distributed as, a folder or a zip file of one, and the JSON lines in them.

Data, predictions and submissions are JSON lines: `json_lines` reads them strictly, with line numbers in every message.
"""

import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from deberta_dist.errors import DataError, printable
from deberta_dist.files.foreign import HEAD_BYTES, begins_like, head_of, refuse_foreign
from deberta_dist.files.strict_json import loads


def json_lines(content: bytes, *, where: str, may_be_blank: bool = True) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not empty.

    Args:
        content: UTF-8 text, one JSON object a line.
        where: Prefix of messages, before the number of the line.
        may_be_blank: Whether empty lines are passed over; the end of the last line is none.

    Raises:
        DataError: a line is not an object of JSON in UTF-8, or has a key twice.
    """
    refuse_foreign(content, where)
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            if may_be_blank or (number == len(lines) and not line):
                continue
            raise DataError(f"{where}, line {number}: empty")
        try:
            value = loads(line, any_numbers=True)
        except ValueError as error:
            like = begins_like(content[:HEAD_BYTES])
            if isinstance(error, UnicodeDecodeError) and not like:
                byte = f"0x{line[error.start]:02x}, byte {error.start} of the line"
                raise DataError(f"{where}, line {number}: not UTF-8 ({byte}): convert the file to UTF-8") from error
            raise DataError(f"{where}, line {number}: not valid JSON ({error}){like}") from error
        if not isinstance(value, dict):
            raise DataError(f"{where}, line {number}: {type(value).__name__}, where an object is expected")
        yield number, value


def integer(value: Any, *, at: str, name: str) -> int:
    """A whole number from 0 on.

    Raises:
        DataError: it is something else.
    """
    if type(value) is not int or value < 0:
        raise DataError(f"{at}: {name} is {printable(repr(value))}, a whole number from 0 on is expected")
    return value


def require_fields(row: Mapping[str, Any], fields: Mapping[str, type], *, at: str) -> None:
    """Checks that an object has fields of these types.

    Raises:
        DataError: one is missing or of another type.
    """
    for name, kind in fields.items():
        if type(row.get(name)) is not kind:
            found = f"is {type(row[name]).__name__}" if name in row else "is missing"
            raise DataError(f"{at}: {name} {found}, {kind.__name__} is expected")


def as_object(value: Any, *, at: str) -> Mapping[str, Any]:
    """The value, which has to be a JSON object.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(value, dict):
        raise DataError(f"{at}: {type(value).__name__}, where an object is expected")
    return value


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
