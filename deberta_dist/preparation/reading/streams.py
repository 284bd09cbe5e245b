"""Reads the text of one input file in chunks, decompressing it if needed.

The floor below ``texts``: it knows archives and their faults, and nothing of documents. Every archive is read to
its end; several in one file follow each other. What comes out of one step is bounded however well it was packed.
"""

import bz2
import gzip
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from deberta_dist.errors import DataError
from deberta_dist.files.foreign import HEAD_BYTES, format_name, refuse_foreign, refuse_stand_in
from deberta_dist.preparation.reading.inputs import PARQUET, TEXT, InputFile

CHUNK_BYTES = 1 << 20
# zstd can expand 4 bytes to 128 KiB and has no limit for its output: 1 KiB at a time is at most 32 MiB.
_ZSTD_READ_BYTES = 1 << 10
_READ_BYTES = 1 << 16
MAX_WINDOW_BYTES = 1 << 31
"""Memory that unpacking a .zst or .xz file may take: the largest window of zstd, as files of Reddit's dumps have."""
# What xz needs beside its dictionary.
_XZ_BYTES = 1 << 20
_TOO_LARGE = (
    f"takes more than {MAX_WINDOW_BYTES >> 30} GiB of memory to unpack, for its window: pack it again with a smaller one "
    "(zstd --long=27, xz -9), or decompress it first"
)
_NAMES = {".gz": "gzip data", ".bz2": "bzip2 data", ".zst": "zstd data", ".xz": "xz data"}
_NO_TEXT = re.compile(rb"[\0-\x08]|\A%PDF-")


@contextmanager
def open_input(file: InputFile) -> Iterator[BinaryIO]:
    """An input file, open; it has to stay what it was when it was listed, up to the end of the block.

    Yields:
        It, without a buffer.

    Raises:
        DataError: it cannot be opened or read, it is a pointer, a web page or of a format that its name does not say, or
            it has changed. A change explains any other error of the block, and is reported instead.
    """
    try:
        handle = open(file.path, "rb", buffering=0)
    except OSError as error:
        raise DataError(f"input {file.path} cannot be read ({error.strerror})") from error
    with handle:
        require_unchanged(file, handle)
        # A writer at work explains a damaged record better than the record does, so the file is looked at again on errors.
        try:
            _refuse_other(file, handle.read(HEAD_BYTES))
            handle.seek(0)
            yield handle
        except DataError:
            require_unchanged(file, handle)
            raise
        except OSError as error:
            raise DataError(f"input {file.path} cannot be read ({error.strerror or error})") from error
        require_unchanged(file, handle)


def _refuse_other(file: InputFile, head: bytes) -> None:
    """Refuses what the file's name does not say that it is, where the reader would take it for text or for damage."""
    (refuse_stand_in if file.kind == TEXT and not file.compression else refuse_foreign)(head, f"input {file.path}")
    found = format_name(head)
    if found is None or file.kind == PARQUET or found == _NAMES.get(file.compression):
        return
    if file.compression or _NO_TEXT.search(head):
        expected = _NAMES.get(file.compression, "text")
        raise DataError(
            f"input {file.path} begins like {found}, expected {expected} by its name: give it the right extension, or "
            "convert it first"
        )


def require_unchanged(file: InputFile, handle: BinaryIO) -> None:
    """Compares size and time of an open file with its listing.

    Raises:
        DataError: they differ.
    """
    status = os.fstat(handle.fileno())
    if (status.st_size, status.st_mtime_ns) != (file.num_bytes, file.modified_ns):
        raise DataError(
            f"{file.path} changed while it was read ({file.num_bytes:,} bytes when it was listed, "
            f"{status.st_size:,} now): run again when nothing writes to it"
        )


def text_chunks(file: InputFile, handle: BinaryIO, *, start: int = 0) -> Iterator[bytes]:
    """The bytes of the text from ``start`` on.

    Args:
        file: what ``handle`` was opened from.
        handle: from ``open_input``.
        start: byte to begin at; 0 for a compressed file.

    Yields:
        Chunks of about ``CHUNK_BYTES``; the first is not shorter than 3 bytes unless the text is.

    Raises:
        DataError: an archive ends early, is damaged, holds no text but another archive, or something else follows it.
    """
    if not file.compression:
        handle.seek(start)
        while chunk := handle.read(CHUNK_BYTES):
            yield chunk
        return
    assert start == 0, "a compressed file is read from its beginning"
    for number, chunk in enumerate(_unpacked(file, handle)):
        if number == 0:
            _refuse_inside(file, chunk[:HEAD_BYTES])
        yield chunk


def _refuse_inside(file: InputFile, head: bytes) -> None:
    """Refuses an archive in an archive, as a.jsonl.gz that tar made, and a pointer that was packed."""
    inside = f"what {file.path} was packed from"
    refuse_stand_in(head, inside)
    found = format_name(head)
    if found and _NO_TEXT.search(head):
        raise DataError(f"{inside} begins like {found}, expected text: decompress it first")


def _unpacked(file: InputFile, handle: BinaryIO) -> Iterator[bytes]:
    unpack = {".gz": _unpack_gzip, ".bz2": _unpack_bz2, ".zst": _unpack_zstd, ".xz": _unpack_xz}[file.compression]
    num_bytes = 0
    waiting: list[bytes] = []
    waiting_bytes = 0
    try:
        for chunk in unpack(file, handle):
            waiting.append(chunk)
            waiting_bytes += len(chunk)
            num_bytes += len(chunk)
            if waiting_bytes >= CHUNK_BYTES // 2:
                yield waiting[0] if len(waiting) == 1 else b"".join(waiting)
                waiting, waiting_bytes = [], 0
    except EOFError as error:
        name = file.compression[1:]
        raise DataError(f"{file.path} is cut short: its {name} data ends after {num_bytes:,} bytes of text") from error
    except _Damaged as error:
        name = file.compression[1:]
        raise DataError(f"{file.path} has damaged {name} data after {num_bytes:,} bytes of text ({error})") from error
    except _Refused as error:
        raise DataError(f"{file.path} {error}") from error
    if waiting:
        yield b"".join(waiting)


def line_number(file: InputFile, *, offset: int) -> int:
    """The line, from 1, that byte ``offset`` of the text lies in; reads everything before it once more."""
    line, left = 1, offset
    with open_input(file) as handle:
        for chunk in text_chunks(file, handle):
            line += chunk.count(b"\n", 0, left)
            left -= len(chunk)
            if left <= 0:
                break
    return line


class _Damaged(Exception):
    """Compressed data that cannot be: one class for what all libraries raise."""


class _Refused(Exception):
    """Compressed data that is sound and that this program does not unpack; says why and what to do."""


def _unpack_gzip(file: InputFile, handle: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=handle) as unpacked:
        while True:
            try:
                chunk = unpacked.read(CHUNK_BYTES)
            except (gzip.BadGzipFile, zlib.error) as error:
                raise _Damaged(str(error)) from error
            if not chunk:
                return
            yield chunk


def _unpack_bz2(file: InputFile, handle: BinaryIO) -> Iterator[bytes]:
    def decompress(decoder: bz2.BZ2Decompressor, data: bytes) -> tuple[bytes, bool]:
        chunk = decoder.decompress(data, CHUNK_BYTES)
        return chunk, not decoder.eof and not decoder.needs_input

    return _unpack(handle, bz2.BZ2Decompressor, decompress, errors=(OSError,), read_bytes=_READ_BYTES)


def _unpack_xz(file: InputFile, handle: BinaryIO) -> Iterator[bytes]:
    def new_decoder() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(memlimit=MAX_WINDOW_BYTES + _XZ_BYTES)

    def decompress(decoder: lzma.LZMADecompressor, data: bytes) -> tuple[bytes, bool]:
        try:
            chunk = decoder.decompress(data, CHUNK_BYTES)
        except lzma.LZMAError as error:
            if "Memory usage limit" in str(error):
                raise _Refused(_TOO_LARGE) from error
            raise
        return chunk, not decoder.eof and not decoder.needs_input

    errors = (lzma.LZMAError, EOFError)
    return _unpack(handle, new_decoder, decompress, errors=errors, read_bytes=_READ_BYTES, padding=b"\0")


def _unpack_zstd(file: InputFile, handle: BinaryIO) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(
            f"{file.path} needs the package zstandard: pip install zstandard (extra data of this package), "
            "or decompress the file first"
        ) from error
    context = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)

    def decompress(decoder: Any, data: bytes) -> tuple[bytes, bool]:
        try:
            return decoder.decompress(data), False
        except zstandard.ZstdError as error:
            if "too much memory" in str(error):
                raise _Refused(_TOO_LARGE) from error
            if "Dictionary mismatch" in str(error):
                raise _Refused("was compressed with a dictionary: decompress it first, with zstd -d -D") from error
            raise

    return _unpack(handle, context.decompressobj, decompress, errors=(zstandard.ZstdError,), read_bytes=_ZSTD_READ_BYTES)


def _unpack(
    handle: BinaryIO,
    new_decoder: Callable[[], Any],
    decompress: Callable[[Any, bytes], tuple[bytes, bool]],
    *,
    errors: tuple[type[Exception], ...],
    read_bytes: int,
    padding: bytes = b"",
) -> Iterator[bytes]:
    """Archive after archive up to the end of the file.

    The readers of bz2 and zstandard take what follows the first archive, or an early end, for the end of the text.

    Args:
        handle: from ``open_input``.
        new_decoder: makes the decoder of one archive; it has ``eof`` and ``unused_data``.
        decompress: (decoder, data) -> (text, whether the decoder holds more that needs no data).
        errors: what ``decompress`` raises on damage.
        read_bytes: compressed bytes that are read at once; bounds what one call can unpack to.
        padding: byte that may fill space behind an archive; empty: there is none.
    """
    decoder, data, has_more = None, b"", False
    while has_more or data or (data := handle.read(read_bytes)):
        if decoder is None and padding and not (data := data.lstrip(padding)):
            continue
        decoder = decoder or new_decoder()
        try:
            chunk, has_more = decompress(decoder, data)
        except errors as error:
            raise _Damaged(str(error)) from error
        if chunk:
            yield chunk
        if decoder.eof:
            data, decoder, has_more = decoder.unused_data, None, False
        else:
            data = b""
    if decoder is not None:
        raise EOFError
