"""Reads text files of all formats as a stream of documents, strictly: malformed text is an error with file and line.

Preparation and tokenizer training read through this file, so both see the same documents. Several
processes can each read a range of a file: together they see what one process would.
"""

import codecs
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from deberta_dist.errors import ConfigError, DataError
from deberta_dist.preparation.reading.documents import Document, DocumentMaker, TextReadOptions
from deberta_dist.preparation.reading.inputs import ARTICLES, PARQUET, RECORDS, FileRange, InputFile, list_inputs
from deberta_dist.preparation.reading.parquet import read_rows, row_groups
from deberta_dist.preparation.reading.records import WHOLE_ARRAY, WHOLE_OBJECT
from deberta_dist.preparation.reading.splitting import Extent, Refuse, line_before, line_runs, split_blocks, split_lines
from deberta_dist.preparation.reading.streams import open_input, text_chunks
from deberta_dist.preparation.reading.wikiextractor import split_articles

__all__ = ["Document", "RowRange", "TextReadOptions", "cut", "document_kind", "read_documents", "read_texts"]


@dataclass(frozen=True, kw_only=True)
class RowRange:
    """Rows ``[first, last)`` of a Parquet file; ``last`` None: to the end."""

    first: int
    last: int | None


def document_kind(file: InputFile, *, options: TextReadOptions) -> str:
    """What a document of this file is: "line", "block", "record", "article" or "file".

    ``options.document`` is about text files; JSON lines and Parquet files hold records whatever it says.
    """
    if file.kind in (RECORDS, PARQUET):
        return "record"
    if file.kind == ARTICLES:
        return "article"
    return "block" if options.document == "auto" else options.document


def cut(file: InputFile, *, range_bytes: int) -> list[FileRange]:
    """Ranges of about ``range_bytes`` of the file, in order; together the whole file.

    A document belongs to the range in which its first byte lies (behind a byte order mark): of a line, its first
    byte; of a block, the first byte of its first line that is not blank; of a file that is one document, byte 0.
    Any other positions would serve as well.

    Args:
        file: the file; a compressed one is one range, a .parquet file is cut between row groups.
        range_bytes: about how many bytes of the file a range has, at least 1.

    Returns:
        At least one range, unless the file is empty.

    Raises:
        ConfigError: ``range_bytes`` is less than 1.
        DataError: as ``row_groups``.
    """
    if range_bytes < 1:
        raise ConfigError(f"range_bytes = {range_bytes}, expected at least 1")
    if file.compression or not file.num_bytes:
        return [FileRange(start=0, stop=file.num_bytes)] if file.num_bytes else []
    if file.kind == PARQUET:
        with open_input(file) as handle:
            groups = row_groups(file, handle, field=None)
        ranges, start, num_bytes = [], 0, 0
        for number, group in enumerate(groups, start=1):
            num_bytes += group.num_bytes
            if num_bytes >= range_bytes or number == len(groups):
                ranges.append(FileRange(start=start, stop=number))
                start, num_bytes = number, 0
        return ranges
    count = max(1, round(file.num_bytes / range_bytes))
    bounds = [file.num_bytes * i // count for i in range(count + 1)]
    return [FileRange(start=a, stop=b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def read_documents(
    file: InputFile, *, options: TextReadOptions, file_range: FileRange | RowRange | None = None
) -> Iterator[Document]:
    """The documents of one file, or of one range of it.

    Blank lines are no records, and end blocks. A document's text is without its last line end.

    Args:
        file: the file, in UTF-8; a byte order mark at its start is dropped.
        options: what a document is and what becomes of bad ones.
        file_range: the range, from ``cut`` or any other; rows of a Parquet file instead. None: the whole file.

    Yields:
        Documents; those with a ``fault`` that begins with "dropped", "bad" or "too" are empty, for counting.

    Raises:
        DataError: the file cannot be read, is damaged or changes while it is read; or, with file and line or row,
            what ``options`` make an error.
    """
    kind = document_kind(file, options=options)
    maker = DocumentMaker(file=file, options=options, kind=kind)
    with open_input(file) as handle:
        if file.kind == PARQUET:
            yield from _rows(file, handle, maker=maker, file_range=file_range)
            return
        assert not isinstance(file_range, RowRange), "a text file has no rows"
        file_range = file_range or FileRange(start=0, stop=file.num_bytes)
        if file_range.stop <= file_range.start:
            return
        done = file_range.start
        for start, end, content in _extents(file, handle, kind=kind, file_range=file_range, maker=maker):
            if start < file_range.start:
                done = max(done, end)
                continue
            document = maker.document(start=start, content=content, num_bytes=end - done)
            if document is not None:
                done = end
                yield document


def read_texts(inputs: Iterable[str | Path], *, options: TextReadOptions | None = None) -> Iterator[str]:
    """The texts of all documents that are not dropped.

    Args:
        inputs: as for ``list_inputs``.
        options: as for ``read_documents``; None: the defaults.

    Raises:
        DataError: as ``list_inputs`` and ``read_documents``.
    """
    options = options or TextReadOptions()
    for file in list_inputs(inputs, format=options.format):
        for document in read_documents(file, options=options):
            if not document.is_dropped:
                yield document.text


def _extents(file: InputFile, handle: BinaryIO, *, kind: str, file_range: FileRange, maker: DocumentMaker) -> Iterator[Extent]:
    """Where documents lie, and their bytes; the first may belong to the range before."""
    limit = maker.options.max_document_bytes
    stop = None if file.compression else file_range.stop

    def refuse(start: int) -> None:
        if start >= file_range.start:
            maker.refuse_long(start)

    if kind == "file":
        return _whole(text_chunks(file, handle), limit=limit, refuse=refuse) if file_range.start == 0 else iter(())
    inside, is_inside = None, False
    if file.compression:
        begin, chunks = _behind_mark(text_chunks(file, handle))
    else:
        handle.seek(0)
        first = _mark_bytes(handle.read(len(codecs.BOM_UTF8)))
        begin = max(first, file_range.start)
        is_inside = begin > first
        if is_inside:
            inside = begin = line_before(handle, start=begin, first=first) if kind == "block" else begin - 1
        chunks = text_chunks(file, handle, start=begin)
    if kind == "record" and file_range.start == 0:
        chunks = _lines_of_json(file, chunks)
    runs = line_runs(chunks, offset=begin, limit=limit, refuse=refuse)
    if kind == "block":
        return split_blocks(runs, stop=stop, limit=limit, inside=inside, refuse=refuse)
    if kind == "article":
        return split_articles(runs, stop=stop, limit=limit, inside=is_inside, refuse=refuse)
    return split_lines(runs, stop=stop, limit=limit)


def _mark_bytes(data: bytes) -> int:
    return len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0


def _behind_mark(chunks: Iterator[bytes]) -> tuple[int, Iterator[bytes]]:
    """Where a text begins behind its byte order mark, and what is there."""
    head = next(chunks, b"")
    begin = _mark_bytes(head)
    return begin, itertools.chain([head[begin:]], chunks)


def _lines_of_json(file: InputFile, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The chunks of a text; refuses one that is a single JSON value, of which no line is a record."""
    head = next(chunks, b"")
    for form, name, advice in ((WHOLE_ARRAY, "array", " '.[]'"), (WHOLE_OBJECT, "object over many lines", " .")):
        if form.match(head.lstrip()):
            raise DataError(
                f"{file.path} is one JSON {name}, expected one object a line: jq -c{advice} {file.path.name} > NEW.jsonl "
                "makes such lines"
            )
    return itertools.chain([head], chunks)


def _whole(chunks: Iterator[bytes], *, limit: int, refuse: Refuse) -> Iterator[Extent]:
    """All of a text as one document."""
    begin, chunks = _behind_mark(chunks)
    kept, num_bytes = bytearray(), 0
    for chunk in chunks:
        num_bytes += len(chunk)
        if num_bytes > limit:
            refuse(0)
            kept.clear()
        else:
            kept += chunk
    yield 0, begin + num_bytes, kept if num_bytes <= limit else None


def _rows(
    file: InputFile, handle: BinaryIO, *, maker: DocumentMaker, file_range: FileRange | RowRange | None
) -> Iterator[Document]:
    """Rows of a Parquet file as documents."""
    if isinstance(file_range, FileRange):
        sizes = [group.num_rows for group in row_groups(file, handle, field=None)]
        file_range = RowRange(first=sum(sizes[: file_range.start]), last=sum(sizes[: file_range.stop]))
    file_range = file_range or RowRange(first=0, last=None)
    field = maker.options.text_field
    for row, content in read_rows(file, handle, field=field, first=file_range.first, last=file_range.last):
        yield maker.row(row=row, content=content)
