"""Token files: the ids of a corpus, memory-mapped, with a header that names the tokenizer by hash.

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
import tempfile
import weakref
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from deberta_dist.data.new_file import new_file
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import DataError

MAGIC = b"DDTOKENS"
FORMAT_VERSION = 1

_FIXED = struct.Struct("<8s3I")
_PAYLOAD_START = 4096
_OFFSET_DTYPE = np.dtype("<i8")
_COPY_BYTES = 1 << 22
_MAX_SOURCE_CHARACTERS = 400
_AGAIN = "copy it again or prepare the corpus again with tools/prepare_corpus.py"


def id_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every id below ``vocab_size``: uint16 or uint32."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def _index_start(num_tokens: int, dtype: np.dtype) -> int:
    """Byte at which the document offsets begin, aligned to 8 for the mapped int64."""
    return (_PAYLOAD_START + num_tokens * dtype.itemsize + 7) // 8 * 8


class TokenFileWriter:
    """Writes a token file document by document; a context manager.

    Memory does not grow with the corpus. The file appears when the block ends without error, and not at
    all otherwise.
    """

    def __init__(self, path: str | Path, *, tokenizer_sha256: str, vocab_size: int, source: str = "") -> None:
        """Opens the file beside its destination.

        Args:
            path: file to make.
            tokenizer_sha256: SHA-256 of the tokenizer's model file, in hexadecimal.
            vocab_size: number of ids of that tokenizer; each id written is below it.
            source: where the text came from, for people; cut after 400 characters.

        Raises:
            DataError: ``path`` exists.
        """
        self.path = Path(path)
        self.num_tokens = 0
        self.num_documents = 0
        self._vocab_size = vocab_size
        self._dtype = id_dtype(vocab_size)
        self._max_token_id = 0
        self._header = {
            "dtype": self._dtype.name,
            "tokenizer_sha256": tokenizer_sha256,
            "vocab_size": vocab_size,
            "source": source[:_MAX_SOURCE_CHARACTERS],
        }
        self._hash = hashlib.sha256()
        with ExitStack() as stack:
            self._file: BinaryIO = stack.enter_context(new_file(self.path))
            # Beside the output, where there is room for it, and without a name: it leaves nothing behind.
            self._index: BinaryIO = stack.enter_context(tempfile.TemporaryFile(dir=self.path.parent))
            self._stack = stack.pop_all()
        self._file.seek(_PAYLOAD_START)
        self._index.write(np.zeros(1, _OFFSET_DTYPE).tobytes())

    def add_document(self, ids: Sequence[int] | np.ndarray) -> None:
        """Appends one document.

        Args:
            ids: its ids, at least one.

        Raises:
            DataError: an id is negative or not below ``vocab_size``.
        """
        array = np.asarray(ids)
        self.add_documents(array, np.array([array.size]))

    def add_documents(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Appends several documents at once.

        Args:
            ids: their ids one after another, integers [sum of lengths].
            lengths: ids of each, integers [N], each at least 1.

        Raises:
            DataError: an id is negative or not below ``vocab_size``.
        """
        if len(lengths) == 0:
            return
        assert ids.ndim == 1 and lengths.min() > 0 and lengths.sum(dtype=np.int64) == ids.size, "no empty documents"
        ends = np.cumsum(lengths, dtype=np.int64)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._vocab_size:
            place = int(np.argmax((ids < 0) | (ids >= self._vocab_size)))
            document = self.num_documents + int(np.searchsorted(ends, place, side="right"))
            raise DataError(
                f"{self.path}: id {int(ids[place])} of document {document} is outside the tokenizer's "
                f"{self._vocab_size} tokens"
            )
        self._max_token_id = max(self._max_token_id, high)
        self._write(ids.astype(self._dtype, copy=False).tobytes())
        self._index.write((self.num_tokens + ends).astype(_OFFSET_DTYPE, copy=False).tobytes())
        self.num_tokens += ids.size
        self.num_documents += len(lengths)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)

    def _finish(self) -> None:
        if self.num_tokens == 0:
            raise DataError(f"{self.path} is not written: there is no document to put into it")
        self._write(bytes(_index_start(self.num_tokens, self._dtype) - self._file.tell()))
        self._index.seek(0)
        while block := self._index.read(_COPY_BYTES):
            self._write(block)
        header = json.dumps(
            self._header
            | {
                "num_tokens": self.num_tokens,
                "num_documents": self.num_documents,
                "max_token_id": self._max_token_id,
                "checksum": self._hash.hexdigest(),
            }
        ).encode("ascii")
        assert _FIXED.size + len(header) <= _PAYLOAD_START
        self._file.seek(0)
        self._file.write(_FIXED.pack(MAGIC, FORMAT_VERSION, len(header), zlib.crc32(header)) + header)

    def __enter__(self) -> "TokenFileWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            # Told of the error, the stack removes the unfinished file instead of publishing it.
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            self._finish()


class TokenFile:
    """A token file, mapped: opening costs the same whatever its size.

    Samples are drawn with ``read``: a mapping's pages, once touched, count as the process's resident memory.

    Attributes:
        path: the file.
        ids: ids of all documents one after another, uint16 or uint32 [num_tokens], read-only.
        document_offsets: first id of every document and the end, int64 [num_documents + 1], read-only.
        num_tokens, num_documents: their numbers.
        tokenizer_sha256: SHA-256 of the tokenizer's model file.
        vocab_size: number of ids of that tokenizer.
        checksum: SHA-256 of everything after the header.
        source: where the text came from.
    """

    def __init__(self, path: str | Path) -> None:
        """Maps the file.

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
        dtype = id_dtype(self.vocab_size)
        if header["dtype"] != dtype.name or not 0 <= header["max_token_id"] < self.vocab_size:
            raise DataError(
                f"{path} holds ids up to {header['max_token_id']} as {header['dtype']}, its vocabulary has "
                f"{self.vocab_size}: {_AGAIN}"
            )
        index_start = _index_start(self.num_tokens, dtype)
        expected = index_start + (self.num_documents + 1) * _OFFSET_DTYPE.itemsize
        size = self.path.stat().st_size
        if size != expected or min(self.num_tokens, self.num_documents) < 1:
            kind = "truncated" if size < expected else "damaged"
            raise DataError(
                f"{path} is {kind}: {size:,} bytes, expected {expected:,} for {self.num_tokens:,} tokens "
                f"in {self.num_documents:,} documents; {_AGAIN}"
            )
        self.ids = np.memmap(self.path, dtype, "r", offset=_PAYLOAD_START, shape=(self.num_tokens,))
        self.document_offsets = np.memmap(
            self.path, _OFFSET_DTYPE, "r", offset=index_start, shape=(self.num_documents + 1,)
        )
        if self.document_offsets[0] != 0 or self.document_offsets[-1] != self.num_tokens:
            raise DataError(f"{path} is damaged: its document offsets do not span its tokens; {_AGAIN}")
        self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)

    def read(self, start: int, stop: int) -> np.ndarray:
        """A copy of ids ``start`` to ``stop`` - 1, uint16 or uint32 [stop - start]. Safe to call from several threads.

        Raises:
            DataError: the file cannot be read any more, or has become shorter since it was opened.
        """
        assert 0 <= start <= stop <= self.num_tokens
        dtype = self.ids.dtype
        num_bytes, offset = (stop - start) * dtype.itemsize, _PAYLOAD_START + start * dtype.itemsize
        try:
            data = os.pread(self._file, num_bytes, offset)
            # A call may give less than there is.
            while len(data) < num_bytes and (more := os.pread(self._file, num_bytes - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise DataError(f"{self.path} cannot be read at byte {offset} ({error.strerror})") from error
        if len(data) < num_bytes:
            raise DataError(f"{self.path} has become shorter since it was opened; {_AGAIN}")
        return np.frombuffer(data, dtype)

    def _read_header(self) -> dict[str, Any]:
        try:
            with open(self.path, "rb") as file:
                start = file.read(_PAYLOAD_START)
        except OSError as error:
            raise DataError(
                f"token file {self.path} cannot be read ({error.strerror}): make it with "
                "tools/prepare_corpus.py or correct the path"
            ) from error
        if not start:
            raise DataError(f"{self.path} is empty; {_AGAIN}")
        if not start.startswith(MAGIC):
            raise DataError(
                f"{self.path} is not a token file: it begins with {start[:8]!r}; text is turned into one by "
                "tools/prepare_corpus.py"
            )
        if len(start) < _PAYLOAD_START:
            raise DataError(f"{self.path} is truncated within its header; {_AGAIN}")
        _, version, length, checksum = _FIXED.unpack_from(start)
        if version != FORMAT_VERSION:
            raise DataError(
                f"{self.path} has format version {version}, this program reads {FORMAT_VERSION}: use the "
                "program's version that wrote it, or prepare the corpus again"
            )
        header = start[_FIXED.size : _FIXED.size + length]
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
            file.seek(_PAYLOAD_START)
            while block := file.read(_COPY_BYTES):
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
