"""Token files: the ids of a corpus, with a header that names the tokenizer by hash.

Layout of ``<name>.tokens``, little-endian::

    0      magic, 8 bytes
    8      format version, header length, CRC-32 of the header: 3 x uint32
    20     header, JSON, padded with zeros up to byte 4096
    4096   ids, uint16 or uint32 [num_tokens], padded to a multiple of 8 bytes
    ...    document offsets, int64 [num_documents + 1], from 0 to num_tokens

Header and index live in the same file as the ids: there is nothing to mix up when a corpus is copied or
renamed, and one rename publishes all of it. Preparation writes these files, the loader reads them.
"""

import hashlib
import json
import os
import struct
import weakref
import zlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import DataError
from deberta_dist.files.disk import open_file, read_at
from deberta_dist.files.foreign import begins_like, refuse_foreign

MAGIC = b"DDTOKENS"
FORMAT_VERSION = 1

FIXED = struct.Struct("<8s3I")
PAYLOAD_START = 4096
OFFSET_DTYPE = np.dtype("<i8")
COPY_BYTES = 1 << 22
_AGAIN = "copy it again or prepare the corpus again with tools/prepare_corpus.py"


def id_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every id below ``vocab_size``: uint16 or uint32."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def index_start_of(num_tokens: int, dtype: np.dtype) -> int:
    """Byte at which the document offsets begin, aligned to 8 for the mapped int64."""
    return (PAYLOAD_START + num_tokens * dtype.itemsize + 7) // 8 * 8


def pack_header(header: Mapping[str, Any]) -> bytes:
    """What a token file begins with, up to the zeros before its ids."""
    text = json.dumps(header).encode("ascii")
    assert FIXED.size + len(text) <= PAYLOAD_START
    return FIXED.pack(MAGIC, FORMAT_VERSION, len(text), zlib.crc32(text)) + text


class TokenFile:
    """A token file: opening costs the same whatever its size.

    Samples are drawn with ``read`` and ``read_offsets``. ``ids`` and ``document_offsets`` are mapped where they are
    asked for, by those who go through all of a file: a mapping's pages, once touched, count as resident memory.

    Attributes:
        dtype: type of the ids, uint16 or uint32.
        num_tokens, num_documents: their numbers.
        tokenizer_sha256: SHA-256 of the tokenizer's model file.
        vocab_size: number of ids of that tokenizer.
        checksum: SHA-256 of everything after the header.
        source: where the text came from.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens the file.

        Raises:
            DataError: the file is missing, empty, no token file, of a newer format, damaged in its header,
                longer or shorter than its header says, or holds ids outside its vocabulary.
        """
        self.path = Path(path)
        header = self._read_header()
        self.num_tokens: int = header["num_tokens"]
        self.num_documents: int = header["num_documents"]
        self.tokenizer_sha256: str = header["tokenizer_sha256"]
        self.vocab_size: int = header["vocab_size"]
        self.checksum: str = header["checksum"]
        self.source: str = header["source"]
        self.dtype = id_dtype(self.vocab_size)
        if header["dtype"] != self.dtype.name or not 0 <= header["max_token_id"] < self.vocab_size:
            raise DataError(
                f"{path} holds ids up to {header['max_token_id']} as {header['dtype']}, its vocabulary has "
                f"{self.vocab_size}: {_AGAIN}"
            )
        self._index_start = index_start_of(self.num_tokens, self.dtype)
        expected = self._index_start + (self.num_documents + 1) * OFFSET_DTYPE.itemsize
        # The size follows from the header: a copy that was cut short is found without reading it.
        size = self.path.stat().st_size
        if size != expected or min(self.num_tokens, self.num_documents) < 1:
            kind = "truncated" if size < expected else "damaged"
            raise DataError(
                f"{path} is {kind}: {size:,} bytes, expected {expected:,} for {self.num_tokens:,} tokens "
                f"in {self.num_documents:,} documents; {_AGAIN}"
            )
        self._file = open_file(self.path, os.O_RDONLY)
        # Datasets share the object between threads and nobody owns it: the descriptor is closed with the last reference.
        weakref.finalize(self, os.close, self._file)
        ends = [int(self.read_offsets(number, number + 1)[0]) for number in (0, self.num_documents)]
        if ends != [0, self.num_tokens]:
            raise DataError(f"{path} is damaged: its document offsets do not span its tokens; {_AGAIN}")

    @cached_property
    def ids(self) -> np.memmap:
        """Ids of all documents one after another, uint16 or uint32 [num_tokens], read-only."""
        return np.memmap(self.path, self.dtype, "r", offset=PAYLOAD_START, shape=(self.num_tokens,))

    @cached_property
    def document_offsets(self) -> np.memmap:
        """First id of every document and the end, int64 [num_documents + 1], read-only."""
        return np.memmap(self.path, OFFSET_DTYPE, "r", offset=self._index_start, shape=(self.num_documents + 1,))

    def read(self, start: int, stop: int) -> np.ndarray:
        """A copy of ids ``start`` to ``stop`` - 1, uint16 or uint32 [stop - start]. Safe to call from several threads.

        Raises:
            DataError: the file cannot be read any more, or has become shorter since it was opened.
        """
        assert 0 <= start <= stop <= self.num_tokens
        return self._read(self.dtype, PAYLOAD_START, start, stop)

    def read_offsets(self, start: int, stop: int) -> np.ndarray:
        """A copy of document offsets ``start`` to ``stop`` - 1, int64 [stop - start]; as ``read``."""
        assert 0 <= start <= stop <= self.num_documents + 1
        return self._read(OFFSET_DTYPE, self._index_start, start, stop)

    def _read(self, dtype: np.dtype, begin: int, start: int, stop: int) -> np.ndarray:
        """Items ``start`` to ``stop`` - 1 of the array at byte ``begin``."""
        num_bytes, offset = (stop - start) * dtype.itemsize, begin + start * dtype.itemsize
        try:
            data = read_at(self._file, num_bytes, offset)
            # pread may return less than was asked for, for example at 2 GiB or on network file systems.
            while len(data) < num_bytes and (more := read_at(self._file, num_bytes - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise DataError(f"{self.path} cannot be read at byte {offset} ({error.strerror})") from error
        if len(data) < num_bytes:
            raise DataError(f"{self.path} has become shorter since it was opened; {_AGAIN}")
        return np.frombuffer(data, dtype)

    def _read_header(self) -> dict[str, Any]:
        try:
            with open(self.path, "rb") as file:
                start = file.read(PAYLOAD_START)
        except OSError as error:
            raise DataError(
                f"token file {self.path} cannot be read ({error.strerror}): make it with "
                "tools/prepare_corpus.py or correct the path"
            ) from error
        if not start:
            raise DataError(f"{self.path} is empty; {_AGAIN}")
        refuse_foreign(start, self.path)
        if not start.startswith(MAGIC):
            raise DataError(
                f"{self.path} is not a token file: it begins with {start[:8]!r}{begins_like(start)}; text is turned into one by "
                "tools/prepare_corpus.py"
            )
        if len(start) < PAYLOAD_START:
            raise DataError(f"{self.path} is truncated within its header; {_AGAIN}")
        _, version, length, checksum = FIXED.unpack_from(start)
        if version != FORMAT_VERSION:
            raise DataError(
                f"{self.path} has format version {version}, this program reads {FORMAT_VERSION}: use the "
                "program's version that wrote it, or prepare the corpus again"
            )
        header = start[FIXED.size : FIXED.size + length]
        if zlib.crc32(header) != checksum:
            raise DataError(f"{self.path} is damaged in its header; {_AGAIN}")
        return json.loads(header)

    def require_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuses a tokenizer other than the one the file was made with.

        Raises:
            DataError: its SHA-256 or its number of tokens is another.
        """
        if self.tokenizer_sha256 != tokenizer.sha256 or self.vocab_size != tokenizer.num_tokens:
            raise DataError(
                f"{self.path} was made with the tokenizer {self.tokenizer_sha256[:12]}... of "
                f"{self.vocab_size} tokens, {tokenizer.path} is {tokenizer.sha256[:12]}... of "
                f"{tokenizer.num_tokens}: give the tokenizer it was made with, or prepare the corpus again"
            )

    def blocks(self) -> Iterator[bytes]:
        """What the checksum is of, everything after the header, at most 4 MiB at a time."""
        with open(self.path, "rb") as file:
            file.seek(PAYLOAD_START)
            while block := file.read(COPY_BYTES):
                yield block

    def verify(self) -> None:
        """Reads the whole file and compares its checksum.

        Raises:
            DataError: the ids or offsets are not those that were written.
        """
        found = hashlib.sha256()
        for block in self.blocks():
            found.update(block)
        if found.hexdigest() != self.checksum:
            raise DataError(
                f"{self.path} is damaged: its content has SHA-256 {found.hexdigest()}, its header says "
                f"{self.checksum}; {_AGAIN}"
            )
