"""Writes token files; ``token_file`` documents their layout."""

import hashlib
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from deberta_dist.data.token_file import (
    COPY_BYTES,
    OFFSET_DTYPE,
    PAYLOAD_START,
    id_dtype,
    index_start_of,
    pack_header,
)
from deberta_dist.errors import DataError
from deberta_dist.files.atomic import PublishingWriter, new_file

_MAX_SOURCE_CHARACTERS = 400


class TokenFileWriter(PublishingWriter):
    """Writes a token file document by document; a context manager.

    Memory does not grow with the corpus. The file appears when the block ends without error, and not at
    all otherwise.
    """

    def __init__(self, path: str | Path, *, tokenizer_sha256: str, vocab_size: int, source: str = "") -> None:
        """Opens the file beside its destination.

        Args:
            path: file to make; it appears when the writer is closed without an error.
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
        # The header comes last, when its counts and checksum are known.
        self._file.seek(PAYLOAD_START)
        self._index.write(np.zeros(1, OFFSET_DTYPE).tobytes())

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
            position = int(np.argmax((ids < 0) | (ids >= self._vocab_size)))
            document = self.num_documents + int(np.searchsorted(ends, position, side="right"))
            raise DataError(
                f"{self.path}: id {int(ids[position])} of document {document} is outside the tokenizer's {self._vocab_size} tokens"
            )
        self._max_token_id = max(self._max_token_id, high)
        self._write(ids.astype(self._dtype, copy=False).tobytes())
        self._index.write((self.num_tokens + ends).astype(OFFSET_DTYPE, copy=False).tobytes())
        self.num_tokens += ids.size
        self.num_documents += len(lengths)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)

    def _finish(self) -> None:
        if self.num_tokens == 0:
            raise DataError(f"{self.path} is not written: there are no documents to put into it")
        # Zeros, so that the int64 offsets are aligned when they are mapped; the checksum covers them like the rest.
        self._write(bytes(index_start_of(self.num_tokens, self._dtype) - self._file.tell()))
        self._index.seek(0)
        while block := self._index.read(COPY_BYTES):
            self._write(block)
        counts = {
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "max_token_id": self._max_token_id,
            "checksum": self._hash.hexdigest(),
        }
        self._file.seek(0)
        self._file.write(pack_header(self._header | counts))
