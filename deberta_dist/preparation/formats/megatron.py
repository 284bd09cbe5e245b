"""Megatron's indexed datasets, the ids of a corpus as Megatron-LM keeps them: the format, and reading it strictly.

A dataset is ``<prefix>.bin``, the ids of all sequences one after another, and ``<prefix>.idx``, little-endian::

    0      magic, "MMIDIDX" and two zeros, 9 bytes
    9      format version, uint64, 1
    17     code of the type of an id, uint8
    18     number of sequences S, number of document indices D: 2 x uint64
    34     sequence lengths in ids, int32 [S]
    ...    sequence pointers, bytes into the .bin, int64 [S]
    ...    document indices, the sequence that each document begins with, and S: int64 [D]
    ...    sequence modes, int8 [S], only in datasets with more than text

fairseq's mmap datasets have the same magic, version and codes, then S, lengths and pointers, and no documents.

A document has any number of sequences, so D is the number of documents and one. Neither file knows the tokenizer
or has a checksum. ``megatron_writer.py`` writes them; both are used by ``convert.py``.

Source: megatron/core/datasets/indexed_dataset.py and tools/preprocess_data.py of NVIDIA/Megatron-LM@d98e8a64;
fairseq/data/indexed_dataset.py of facebookresearch/fairseq.
"""

import os
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from deberta_dist.errors import DataError
from deberta_dist.files.foreign import HEAD_BYTES, begins_like, head_of, refuse_foreign

MAGIC = b"MMIDIDX\x00\x00"
OLD_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1

FIXED = struct.Struct("<9sQBQQ")
ID_TYPES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOAT_TYPES = {6: "float64", 7: "float32"}
LENGTH_TYPE, INDEX_TYPE = np.dtype("<i4"), np.dtype("<i8")
# Where the lengths begin in fairseq's index.
_WITHOUT_DOCUMENTS = FIXED.size - 8
_BLOCK = 1 << 18
_AGAIN = "copy it again, or make it again with Megatron's tools/preprocess_data.py"


def paths(prefix: str | Path) -> tuple[Path, Path]:
    """The .idx and the .bin of a prefix, which may itself have dots."""
    return Path(f"{prefix}.idx"), Path(f"{prefix}.bin")


class MegatronFile:
    """An indexed dataset, mapped; its index is read once, in blocks.

    Attributes:
        index_path, bin_path: the two files.
        ids: ids of all sequences one after another, of any integer type [num_tokens], read-only.
        num_sequences, num_documents, num_tokens: their numbers, documents without ids counted.
    """

    def __init__(self, prefix: str | Path) -> None:
        """Maps both files and checks the index.

        Args:
            prefix: path of the two without ``.idx`` and ``.bin``.

        Raises:
            DataError: a file is missing; the index is no such index, of another version, with ids that are no
                integers, longer or shorter than its header says, without tokens, of sequences that do not fill
                the .bin one after another, of documents that do not follow one another from the first sequence
                to the last, or of sequences that are not text; or the .bin is longer or shorter than the index
                says.
        """
        self.index_path, self.bin_path = paths(prefix)
        code, self.num_sequences, num_indices = self._read_header()
        self.num_documents = num_indices - 1
        lengths_end = FIXED.size + self.num_sequences * LENGTH_TYPE.itemsize
        pointers_end = lengths_end + self.num_sequences * INDEX_TYPE.itemsize
        expected = pointers_end + num_indices * INDEX_TYPE.itemsize
        size = self.index_path.stat().st_size
        if size not in (expected, expected + self.num_sequences):
            raise self._damaged(
                f"{size:,} bytes, expected {expected:,} (or one more for each sequence) for {self.num_sequences:,} "
                f"sequences and {num_indices:,} document indices",
                is_short=size < expected,
            )
        if self.num_sequences == 0:
            raise DataError(f"{self.index_path} has no sequence: there is nothing to read")
        self._lengths = self._map(LENGTH_TYPE, FIXED.size, self.num_sequences)
        self._pointers = self._map(INDEX_TYPE, lengths_end, self.num_sequences)
        self._first_sequences = self._map(INDEX_TYPE, pointers_end, num_indices)
        if size > expected:
            self._require_text(self._map(np.dtype("|i1"), expected, self.num_sequences))
        dtype = np.dtype(ID_TYPES[code])
        bin_size = self._check_sequences(dtype)
        self._check_documents()
        self.num_tokens = bin_size // dtype.itemsize
        self._require_bin(bin_size)
        self.ids = np.memmap(self.bin_path, dtype, "r", shape=(self.num_tokens,))

    def documents(self, *, vocab_size: int, strip_eod: int | None = None) -> Iterator[np.ndarray]:
        """Ids of every document in turn, of all its sequences together, [number of tokens]; may be empty.

        Args:
            vocab_size: each id yielded is below it.
            strip_eod: id that is left out where a document ends with it, once; may be outside the vocabulary.

        Raises:
            DataError: an id is negative or not below ``vocab_size``.
        """
        mapped = np.asarray(self.ids)
        for start in range(0, self.num_documents, _BLOCK):
            starts = self._token_starts(self._first_sequences[start : start + _BLOCK + 1])
            for number, (begin, end) in enumerate(pairwise(starts.tolist()), start):
                if strip_eod is not None and end > begin and mapped[end - 1] == strip_eod:
                    end -= 1
                ids = mapped[begin:end]
                if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
                    place = begin + int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
                    raise DataError(
                        f"{self.bin_path}: id {mapped[place]} of document {number} (byte "
                        f"{place * mapped.itemsize}) is outside the tokenizer's {vocab_size} tokens: give the "
                        "tokenizer that made it, and --strip-eod for an id of its own at the end of documents"
                    )
                yield ids

    def _token_starts(self, sequences: np.ndarray) -> np.ndarray:
        """First token of each sequence, int64; of the one after the last, the number of tokens."""
        inside = sequences < self.num_sequences
        starts = self._pointers[np.where(inside, sequences, 0)] // self.ids.itemsize
        return np.where(inside, starts, self.num_tokens)

    def _read_header(self) -> tuple[int, int, int]:
        """Type code, number of sequences and number of document indices."""
        try:
            with open(self.index_path, "rb") as file:
                start = file.read(HEAD_BYTES)
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            hint = self._bin_alone() if isinstance(error, FileNotFoundError) else ": correct the path"
            raise DataError(f"index {self.index_path} cannot be read ({error.strerror}){hint}") from error
        refuse_foreign(start, self.index_path)
        if start.startswith(OLD_MAGIC):
            raise DataError(
                f"{self.index_path} is an index of the older formats of fairseq and Megatron (lazy, cached), which are not "
                "read: build the dataset again as mmap, or prepare the corpus from its text with tools/prepare_corpus.py"
            )
        if not start.startswith(MAGIC):
            raise DataError(
                f"{self.index_path} is not the index of a Megatron dataset: it begins with "
                f"{start[: len(MAGIC)]!r}, expected {MAGIC!r}{begins_like(start)}"
            )
        self._refuse_fairseq(start, size=size)
        if len(start) < FIXED.size:
            raise self._damaged(f"{len(start)} bytes, expected {FIXED.size} of header", is_short=True)
        _, version, code, num_sequences, num_indices = FIXED.unpack_from(start)
        if version != VERSION:
            raise DataError(f"{self.index_path} has format version {version}, this program reads {VERSION}")
        if code not in ID_TYPES:
            kind = _FLOAT_TYPES.get(code, "unknown")
            known = ", ".join(f"{code} {np.dtype(name).name}" for code, name in ID_TYPES.items())
            raise DataError(f"{self.index_path} has ids of type {code} ({kind}), expected an integer type: {known}")
        if num_indices == 0:
            raise self._damaged("no document indices, expected at least 1")
        return code, num_sequences, num_indices

    def _refuse_fairseq(self, start: bytes, *, size: int) -> None:
        """Tells fairseq's index, which has the same magic and no documents: the lengths follow their number at once."""
        num_sequences = int.from_bytes(start[_WITHOUT_DOCUMENTS - 8 : _WITHOUT_DOCUMENTS], "little")
        pointers_start = _WITHOUT_DOCUMENTS + num_sequences * LENGTH_TYPE.itemsize
        if size != pointers_start + num_sequences * INDEX_TYPE.itemsize:
            return
        # A cut may leave as many bytes of Megatron's.
        few = min(num_sequences, _BLOCK)
        lengths = np.fromfile(self.index_path, LENGTH_TYPE, few, offset=_WITHOUT_DOCUMENTS)
        pointers = np.fromfile(self.index_path, INDEX_TYPE, few, offset=pointers_start)
        expected = np.cumsum(lengths[:-1], dtype=np.int64)
        if not pointers[:1].any() and any(np.array_equal(pointers[1:], expected * itemsize) for itemsize in (1, 2, 4, 8)):
            raise DataError(
                f"{self.index_path} is the index of a fairseq dataset (mmap, {num_sequences:,} sequences), not of "
                "Megatron's: its ids are those of fairseq's dict.txt, which no tokenizer here has; prepare the corpus from "
                "its text with tools/prepare_corpus.py"
            )

    def _bin_alone(self) -> str:
        """What to say of a dataset without an index."""
        if not self.bin_path.exists():
            return ": correct the path"
        head = head_of(self.bin_path)
        refuse_foreign(head, self.bin_path)
        return (
            f": it belongs beside {self.bin_path}"
            + (begins_like(head) or ", and ids alone (as nanoGPT writes them) are not read")
            + "; prepare a corpus from its text with tools/prepare_corpus.py"
        )

    def _map(self, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
        return np.memmap(self.index_path, dtype, "r", offset=offset, shape=(count,))

    def _damaged(self, what: str, *, is_short: bool = False) -> DataError:
        return DataError(f"{self.index_path} is {'truncated' if is_short else 'damaged'}: {what}; {_AGAIN}")

    def _require_text(self, modes: np.ndarray) -> None:
        for start in range(0, self.num_sequences, _BLOCK):
            other = np.flatnonzero(modes[start : start + _BLOCK])
            if other.size:
                number = start + int(other[0])
                raise DataError(f"{self.index_path}: sequence {number} has mode {modes[number]}, expected 0: it is not text")

    def _check_sequences(self, dtype: np.dtype) -> int:
        """Refuses sequences that do not follow one another; returns the bytes they take in the .bin."""
        position = 0
        for start in range(0, self.num_sequences, _BLOCK):
            lengths = self._lengths[start : start + _BLOCK]
            negative = np.flatnonzero(lengths < 0)
            if negative.size:
                number = start + int(negative[0])
                raise self._damaged(f"sequence {number} has length {self._lengths[number]}, expected 0 or more")
            ends = position + np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
            expected = np.concatenate(([position], ends[:-1]))
            wrong = np.flatnonzero(self._pointers[start : start + _BLOCK] != expected)
            if wrong.size:
                number = start + int(wrong[0])
                raise self._damaged(
                    f"sequence {number} begins at byte {self._pointers[number]} of the .bin, expected "
                    f"{expected[wrong[0]]}, where the sequences before it end"
                )
            position = int(ends[-1])
        return position

    def _check_documents(self) -> None:
        """Refuses document indices that do not go from 0 to the number of sequences without a step back."""
        indices, last = self._first_sequences, self.num_sequences
        if indices[0] != 0 or indices[-1] != last:
            raise self._damaged(
                f"its document indices go from {indices[0]} to {indices[-1]}, expected from 0 to the number of "
                f"sequences, {last}"
            )
        for start in range(0, self.num_documents, _BLOCK):
            block = indices[start : start + _BLOCK + 1]
            wrong = np.flatnonzero(block[1:] < block[:-1])
            if wrong.size:
                number = start + int(wrong[0])
                raise self._damaged(
                    f"document {number} begins with sequence {indices[number]}, and the next with "
                    f"{indices[number + 1]}; expected ascending numbers"
                )

    def _require_bin(self, expected: int) -> None:
        try:
            size = self.bin_path.stat().st_size
        except OSError as error:
            raise DataError(
                f"{self.bin_path} cannot be read ({error.strerror}): it belongs beside {self.index_path}"
            ) from error
        refuse_foreign(head_of(self.bin_path), self.bin_path)
        if size != expected:
            raise DataError(
                f"{self.bin_path} is {'truncated' if size < expected else 'damaged'}: {size:,} bytes, expected "
                f"{expected:,} by {self.index_path}; {_AGAIN}"
            )
        if expected == 0:
            raise DataError(f"{self.bin_path} has no tokens: there is nothing to read")
