"""The bytes of one input file's text, chunk by chunk, whatever the file is compressed with.

The floor below ``reading``: it knows archives and their faults, and nothing of documents. Every archive is read to
its end; several in one file follow each other. What comes out of one step is bounded however well it was packed.
"""

import bz2
import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from deberta_dist.corpus.inputs import InputFile
from deberta_dist.errors import DataError

CHUNK_BYTES = 1 << 20
# zstd makes up to 128 KiB of 4 bytes and cannot be told to stop earlier: 1 KiB at a time is at most 32 MiB.
_ZSTD_READ_BYTES = 1 << 10
_BZ2_READ_BYTES = 1 << 16


@contextmanager
def open_input(file: InputFile) -> Iterator[BinaryIO]:
    """An input file, open; it has to stay what it was when it was listed, up to the end of the block.

    Args:
        file: the file.

    Yields:
        It, without a buffer.

    Raises:
        DataError: it cannot be opened or read, or it has changed. A change explains any other error of the block,
            and is told in its place.
    """
    try:
        handle = open(file.path, "rb", buffering=0)
    except OSError as error:
        raise DataError(f"input {file.path} cannot be read ({error.strerror})") from error
    with handle:
        require_unchanged(file, handle)
        try:
            yield handle
        except DataError:
            require_unchanged(file, handle)
            raise
        except OSError as error:
            raise DataError(f"input {file.path} cannot be read ({error.strerror or error})") from error
        require_unchanged(file, handle)


def require_unchanged(file: InputFile, handle: BinaryIO) -> None:
    """Compares size and time of an open file with its listing.

    Raises:
        DataError: they differ.
    """
    status = os.fstat(handle.fileno())
    if (status.st_size, status.st_mtime_ns) != (file.num_bytes, file.modified_ns):
        raise DataError(
            f"{file.path} changed while it was read ({file.num_bytes:,} bytes when it was listed, "
            f"{status.st_size:,} now): start again when nothing writes to it"
        )


def text_chunks(file: InputFile, handle: BinaryIO, *, start: int = 0) -> Iterator[bytes]:
    """The bytes of the text from ``start`` on.

    Args:
        file: what ``handle`` was opened from.
        handle: the open file.
        start: byte to begin at; 0 for a compressed file.

    Yields:
        Chunks of about ``CHUNK_BYTES``; the first is not shorter than 3 bytes unless the text is.

    Raises:
        DataError: an archive ends early, is damaged, or something else follows it.
    """
    if not file.compression:
        handle.seek(start)
        while chunk := handle.read(CHUNK_BYTES):
            yield chunk
        return
    assert start == 0, "a compressed file is read from its beginning"
    unpack = {".gz": _unpack_gzip, ".bz2": _unpack_bz2, ".zst": _unpack_zstd}[file.compression]
    num_bytes = 0
    waiting: list[bytes] = []
    waiting_bytes = 0
    try:
        for part in unpack(file, handle):
            waiting.append(part)
            waiting_bytes += len(part)
            num_bytes += len(part)
            if waiting_bytes >= CHUNK_BYTES // 2:
                yield waiting[0] if len(waiting) == 1 else b"".join(waiting)
                waiting, waiting_bytes = [], 0
    except EOFError as error:
        name = file.compression[1:]
        raise DataError(f"{file.path} is cut short: its {name} data ends after {num_bytes:,} bytes of text") from error
    except _Damaged as error:
        name = file.compression[1:]
        raise DataError(f"{file.path} has damaged {name} data after {num_bytes:,} bytes of text ({error})") from error
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
    """Compressed data that cannot be: one class for what three libraries raise."""


def _unpack_gzip(file: InputFile, handle: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=handle) as unpacked:
        while True:
            try:
                part = unpacked.read(CHUNK_BYTES)
            except (gzip.BadGzipFile, zlib.error) as error:
                raise _Damaged(str(error)) from error
            if not part:
                return
            yield part


def _unpack_bz2(file: InputFile, handle: BinaryIO) -> Iterator[bytes]:
    def decompress(decoder: bz2.BZ2Decompressor, data: bytes) -> tuple[bytes, bool]:
        part = decoder.decompress(data, CHUNK_BYTES)
        return part, not decoder.eof and not decoder.needs_input

    return _unpack(handle, bz2.BZ2Decompressor, decompress, errors=(OSError,), read_bytes=_BZ2_READ_BYTES)


def _unpack_zstd(file: InputFile, handle: BinaryIO) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(
            f"{file.path} needs the package zstandard: pip install zstandard (extra zstd of this package), "
            "or decompress the file first"
        ) from error
    context = zstandard.ZstdDecompressor()

    def decompress(decoder: Any, data: bytes) -> tuple[bytes, bool]:
        return decoder.decompress(data), False

    return _unpack(
        handle, context.decompressobj, decompress, errors=(zstandard.ZstdError,), read_bytes=_ZSTD_READ_BYTES
    )


def _unpack(
    handle: BinaryIO,
    new_decoder: Callable[[], Any],
    decompress: Callable[[Any, bytes], tuple[bytes, bool]],
    *,
    errors: tuple[type[Exception], ...],
    read_bytes: int,
) -> Iterator[bytes]:
    """Archive after archive up to the end of the file.

    The readers of bz2 and zstandard take what follows the first archive, or an early end, for the end of the text.

    Args:
        handle: the open file.
        new_decoder: makes the decoder of one archive; it has ``eof`` and ``unused_data``.
        decompress: (decoder, data) -> (text, whether the decoder holds more that needs no data).
        errors: what ``decompress`` raises on damage.
        read_bytes: bytes to read at once.
    """
    decoder, data, has_more = None, b"", False
    while has_more or data or (data := handle.read(read_bytes)):
        decoder = decoder or new_decoder()
        try:
            part, has_more = decompress(decoder, data)
        except errors as error:
            raise _Damaged(str(error)) from error
        if part:
            yield part
        if decoder.eof:
            data, decoder, has_more = decoder.unused_data, None, False
        else:
            data = b""
    if decoder is not None:
        raise EOFError
