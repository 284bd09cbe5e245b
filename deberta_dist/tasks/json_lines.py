"""Reads JSON lines strictly, with line numbers in every message: data, predictions and submissions have this form."""

from collections.abc import Iterator, Mapping
from typing import Any

from deberta_dist.errors import DataError, printable
from deberta_dist.files.foreign import HEAD_BYTES, begins_like, refuse_foreign
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
