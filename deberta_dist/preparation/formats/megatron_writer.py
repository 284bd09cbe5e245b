"""Writes Megatron's indexed datasets; ``megatron.py`` documents the format. Called by ``convert.py``."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from deberta_dist.errors import DataError
from deberta_dist.files.atomic import PublishingWriter, new_file
from deberta_dist.preparation.formats.megatron import FIXED, ID_TYPES, INDEX_TYPE, LENGTH_TYPE, MAGIC, VERSION, paths

_UINT16_CODE, _INT32_CODE = 8, 4
# Megatron's own choice: ids of smaller vocabularies are uint16, those of others int32.
_MIN_INT32_VOCAB = 65500
_MAX_LENGTH = (1 << 31) - 1
_BLOCK = 1 << 18


class MegatronWriter(PublishingWriter):
    """Writes an indexed dataset document by document, each as one sequence; a context manager.

    Memory does not grow with the corpus. Both files appear when the block ends without error, the .idx last,
    and neither of them otherwise.
    """

    def __init__(self, prefix: str | Path, *, vocab_size: int, append_eod: int | None = None) -> None:
        """Opens both files beside their destinations.

        Args:
            prefix: path of the two without ``.idx`` and ``.bin``.
            vocab_size: number of ids of the tokenizer; each id written is below it.
            append_eod: id to put at the end of each document.

        Raises:
            DataError: one of the files exists.
        """
        self.index_path, self.bin_path = paths(prefix)
        self.num_tokens = 0
        self.num_documents = 0
        self._vocab_size = vocab_size
        self._code = _UINT16_CODE if vocab_size < _MIN_INT32_VOCAB else _INT32_CODE
        self._dtype = np.dtype(ID_TYPES[self._code])
        assert append_eod is None or 0 <= append_eod < vocab_size
        self._eod = np.array([] if append_eod is None else [append_eod], self._dtype)
        self._bin_stat: os.stat_result | None = None
        with ExitStack() as stack:
            stack.push(self._take_back)
            self._index: BinaryIO = stack.enter_context(new_file(self.index_path))
            self._bin: BinaryIO = stack.enter_context(new_file(self.bin_path))
            self._bin_stat = os.fstat(self._bin.fileno())
            # Beside the output, where there is room for it, and without a name: it leaves nothing behind.
            self._lengths: BinaryIO = stack.enter_context(tempfile.TemporaryFile(dir=self.bin_path.parent))
            self._stack = stack.pop_all()

    def add_document(self, ids: Sequence[int] | np.ndarray) -> None:
        """Appends one document.

        Args:
            ids: its ids, at least one.

        Raises:
            DataError: an id is negative or not below ``vocab_size``; or there are 2**31 of them or more.
        """
        array = np.asarray(ids)
        assert array.ndim == 1 and array.size > 0, "a document is a non-empty sequence of ids"
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= self._vocab_size:
            raise DataError(
                f"{self.bin_path}: id {low if low < 0 else high} of document {self.num_documents} is outside "
                f"the tokenizer's {self._vocab_size} tokens"
            )
        length = array.size + self._eod.size
        if length > _MAX_LENGTH:
            raise DataError(
                f"{self.bin_path}: document {self.num_documents} has {length:,} ids, the format holds {_MAX_LENGTH:,}"
            )
        self._bin.write(array.astype(self._dtype).tobytes() + self._eod.tobytes())
        self._lengths.write(np.array([length], LENGTH_TYPE).tobytes())
        self.num_tokens += length
        self.num_documents += 1

    def _finish(self) -> None:
        if self.num_documents == 0:
            raise DataError(f"{self.index_path} is not written: there are no documents to put into it")
        count = self.num_documents
        self._index.write(FIXED.pack(MAGIC, VERSION, self._code, count, count + 1))
        self._lengths.seek(0)
        shutil.copyfileobj(self._lengths, self._index)
        self._lengths.seek(0)
        position = 0
        while block := self._lengths.read(_BLOCK * LENGTH_TYPE.itemsize):
            ends = position + np.cumsum(np.frombuffer(block, LENGTH_TYPE), dtype=INDEX_TYPE) * self._dtype.itemsize
            self._index.write(np.concatenate(([position], ends[:-1])).astype(INDEX_TYPE).tobytes())
            position = int(ends[-1])
        for start in range(0, count + 1, _BLOCK):
            self._index.write(np.arange(start, min(start + _BLOCK, count + 1), dtype=INDEX_TYPE).tobytes())

    def _take_back(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Removes the .bin again where the .idx could not follow it; one that somebody else put there stays."""
        if kind is None or self._bin_stat is None or not os.path.lexists(self.bin_path):
            return
        if os.path.samestat(os.lstat(self.bin_path), self._bin_stat):
            self.bin_path.unlink()
