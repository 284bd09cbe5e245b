"""One text column of a Parquet file, row by row; the only door to pyarrow.

``texts`` makes documents of the rows, and cuts a file between its row groups.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO

from deberta_dist.errors import DataError, printable
from deberta_dist.files.foreign import begins_like, head_of
from deberta_dist.preparation.reading.inputs import InputFile

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

_BATCH_BYTES = 4 << 20
_MAX_BATCH_ROWS = 4096
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """A part of a Parquet file that can be read without the rest.

    Attributes:
        num_rows: rows of the group, from the file's footer.
        num_bytes: bytes of all its columns in the file.
        text_bytes: bytes of the text column before compression, about.
    """

    num_rows: int
    num_bytes: int
    text_bytes: int


def row_groups(file: InputFile, handle: BinaryIO, *, field: str | None) -> list[RowGroup]:
    """What the end of the file says about its row groups.

    Args:
        handle: the file, from ``open_input``.
        field: the text column, or the text in a struct column; None: ``text_bytes`` counts all columns.

    Raises:
        DataError: the file is damaged, has no such column, or pyarrow is missing.
    """
    with _errors_of(file) as parquet:
        opened = parquet.ParquetFile(handle)
        if field is not None:
            _require_text(file, opened, field=field)
        found = []
        for number in range(opened.num_row_groups):
            group = opened.metadata.row_group(number)
            columns = [group.column(i) for i in range(group.num_columns)]
            text = [c for c in columns if field is None or c.path_in_schema == field]
            found.append(
                RowGroup(
                    num_rows=group.num_rows,
                    num_bytes=sum(c.total_compressed_size for c in columns),
                    text_bytes=sum(c.total_uncompressed_size for c in text),
                )
            )
    return found


def read_rows(
    file: InputFile, handle: BinaryIO, *, field: str, first: int, last: int | None
) -> Iterator[tuple[int, bytes | None]]:
    """Rows ``[first, last)`` of the text column.

    Args:
        handle: the file, from ``open_input``.
        field: name of the text column; dots lead into struct columns.
        first, last: numbers of rows within the file, from 0; None: to the end.

    Yields:
        (number of the row, its bytes, which need not be UTF-8; None where the row has no value).

    Raises:
        DataError: as ``row_groups``.
    """
    begin = 0
    for number, group in enumerate(row_groups(file, handle, field=field)):
        end = begin + group.num_rows
        if begin < (end if last is None else last) and end > first and group.num_rows:
            rows = max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES * group.num_rows // max(1, group.text_bytes)))
            row = begin
            for values in _batches(file, handle, field=field, group=number, num_rows=rows):
                for value in values:
                    if last is not None and row >= last:
                        return
                    if row >= first:
                        yield row, value
                    row += 1
        begin = end


def read_columns(file: InputFile, handle: BinaryIO) -> Iterator[list[dict[str, Any]]]:
    """All columns that hold text at any depth, batch after batch.

    Args:
        handle: the file, from ``open_input``.

    Yields:
        Rows, by name of the column: values as Python has them, in lists and dictionaries where they are nested.

    Raises:
        DataError: as ``row_groups``; a text is not UTF-8.
    """
    with _errors_of(file) as parquet:
        opened = parquet.ParquetFile(handle)
        names = [field.name for field in opened.schema_arrow if _has_text(field.type)]
        batches = opened.iter_batches(batch_size=_MAX_BATCH_ROWS // 16, columns=names, use_threads=False)
    while names:
        with _errors_of(file):
            try:
                batch = next(batches, None)
                if batch is None:
                    return
                rows = batch.to_pylist()
            except UnicodeDecodeError as error:
                raise DataError(f"{file.path} holds text that is not UTF-8 ({error.reason}): convert it first") from error
        yield rows


def _batches(file: InputFile, handle: BinaryIO, *, field: str, group: int, num_rows: int) -> Iterator[list[bytes | None]]:
    with _errors_of(file) as parquet:
        import pyarrow
        import pyarrow.compute

        # Pre-buffering would hold a row group's whole column in memory, and row groups may have any size.
        opened = parquet.ParquetFile(handle, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True)
        path = _require_text(file, opened, field=field)
        # One thread: the workers of a preparation are processes, and have the cores already.
        batches = opened.iter_batches(batch_size=num_rows, row_groups=[group], columns=[field], use_threads=False)
    while True:
        with _errors_of(file):
            batch = next(batches, None)
            if batch is None:
                return
            # Names with a dot in them may have let in another column.
            column = batch.column(batch.schema.names.index(path[0]))
            for name in path[1:]:
                # Missing where what it is part of is missing.
                column = pyarrow.compute.struct_field(column, name)
            if pyarrow.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            # Strings would be decoded by pyarrow, which stops at bytes that are not UTF-8.
            values = column.cast(pyarrow.large_binary()).to_pylist()
        yield values


def _path_of(field: str, schema: "pyarrow.Schema") -> list[str] | None:
    """The column, and the fields of structs below it, that "doc.text" names; a column of that name comes first."""
    if schema.names.count(field) == 1:
        return [field]
    path = field.split(".")
    if schema.names.count(path[0]) != 1:
        return None
    kind = schema.field(path[0]).type
    for name in path[1:]:
        if not hasattr(kind, "get_field_index") or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(name).type
    return path


def _require_text(file: InputFile, opened: "pyarrow.parquet.ParquetFile", *, field: str) -> list[str]:
    schema = opened.schema_arrow
    path = _path_of(field, schema)
    if path is None:
        found = printable(", ".join(_names(schema)) or "none")
        raise DataError(f"{file.path} has no column {field!r}; its columns: {found}: give --text-field")
    kind = schema.field(path[0]).type
    for name in path[1:]:
        kind = kind.field(name).type
    if not _is_text(kind.value_type if hasattr(kind, "index_type") else kind):
        raise DataError(f"{file.path}: column {field!r} holds {printable(str(kind))}, expected text: give --text-field")
    return path


def _names(fields: "Iterable[pyarrow.Field]", prefix: str = "") -> Iterator[str]:
    """Names of columns, and of fields in structs as --text-field takes them."""
    for field in fields:
        if hasattr(field.type, "get_field_index"):
            yield from _names((field.type.field(i) for i in range(field.type.num_fields)), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def _has_text(kind: "pyarrow.DataType") -> bool:
    """Whether values of a type are texts, or hold some."""
    if hasattr(kind, "value_type"):
        return _has_text(kind.value_type)
    return _is_text(kind) or any(_has_text(kind.field(i).type) for i in range(kind.num_fields))


def _is_text(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    return any(test(kind) for test in tests)


@contextmanager
def _errors_of(file: InputFile) -> Iterator[ModuleType]:
    """pyarrow.parquet, with one line for what it raises."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(
            f"{file.path} needs the package pyarrow: pip install pyarrow (extra data of this package), "
            "or convert the file to .jsonl first"
        ) from error
    try:
        yield parquet
    except (pyarrow.ArrowException, OSError) as error:
        message = printable(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise DataError(f"{file.path} is not a Parquet file, or is damaged or cut short ({message}){_format(file)}") from error


def _format(file: InputFile) -> str:
    head = head_of(file.path)
    return "" if head.startswith(b"PAR1") else begins_like(head)
