"""The list of a corpus's chunks, on disk: documents at their natural length, cut only where they are too long.

Layout of ``<corpus>.<lengths>.<checksum>.pieces``, little-endian::

    0      header: one line of JSON, padded with zeros up to byte 4096
    4096   chunks, uint64 [num_chunks]: first token << 16 | number of tokens; those of the shortest bucket first

8 bytes per chunk and none of them in memory: a batch reads its own. The list follows from the corpus and the lengths
of the buckets alone, so the first run that needs it writes it, and later runs read it. ``bucketed_dataset.py`` draws from it.
"""

import json
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deberta_dist.data.token_corpus import TokenCorpus
from deberta_dist.errors import ConfigError, DataError
from deberta_dist.files.atomic import new_file
from deberta_dist.files.disk import open_file, read_at
from deberta_dist.files.lock import wait_for_lock

FORMAT = "deberta_dist pieces 1"
HEADER_BYTES = 4096
ENTRY = np.dtype("<u8")
NUM_SPECIAL = 2
"""[CLS] and [SEP] of every sequence."""

_LENGTH_BITS = 16
_MAX_LENGTH = (1 << _LENGTH_BITS) - 1 + NUM_SPECIAL
_MAX_TOKENS = 1 << 64 - _LENGTH_BITS
# Read, cut and written together: a few megabytes.
_DOCUMENTS_TOGETHER, _CHUNKS_TOGETHER = 1 << 16, 1 << 17
_ELSEWHERE = "name a directory for it with data.index_directory"


@dataclass(frozen=True, kw_only=True)
class BucketSizes:
    """What a corpus has for every bucket.

    Attributes:
        lengths: tokens of a sequence, ``[CLS]``, ``[SEP]`` and padding included, ascending.
        num_chunks: chunks whose shortest fitting length is each bucket's.
        num_tokens: tokens of all chunks of each, without ``[CLS]`` and ``[SEP]``.
    """

    lengths: tuple[int, ...]
    num_chunks: tuple[int, ...]
    num_tokens: tuple[int, ...]

    def padding(self, bucket: int) -> float:
        """Share of a bucket's tokens that are padding; 0 where it is empty."""
        tokens = self.num_tokens[bucket] + NUM_SPECIAL * self.num_chunks[bucket]
        return 1 - tokens / self.room[bucket] if tokens else 0.0

    @property
    def room(self) -> tuple[int, ...]:
        """Tokens of all sequences of each bucket, padding included."""
        return tuple(count * length for count, length in zip(self.num_chunks, self.lengths, strict=True))


def count_chunks(corpus: TokenCorpus, lengths: Sequence[int]) -> BucketSizes:
    """Goes through the documents once and keeps nothing.

    Args:
        lengths: of the buckets, tokens, ascending.

    Raises:
        ConfigError: the longest is longer than a chunk can be.
        DataError: the document offsets are damaged.
    """
    if lengths[-1] > _MAX_LENGTH:
        raise ConfigError(f"bucket length = {lengths[-1]} is more than the {_MAX_LENGTH} tokens a chunk can have")
    assert corpus.num_tokens <= _MAX_TOKENS
    num_chunks, num_tokens = np.zeros((2, len(lengths)), np.int64)
    for _, tokens in _cut(corpus, window=lengths[-1] - NUM_SPECIAL):
        buckets = _bucket_of(tokens, lengths)
        num_chunks += np.bincount(buckets, minlength=len(lengths))
        # Exact: 2**17 chunks of fewer than 2**16 tokens are far below 2**53.
        num_tokens += np.bincount(buckets, weights=tokens, minlength=len(lengths)).astype(np.int64)
    return BucketSizes(lengths=tuple(lengths), num_chunks=tuple(num_chunks.tolist()), num_tokens=tuple(num_tokens.tolist()))


def _bucket_of(tokens: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """The smallest bucket that holds each chunk, int64 [P]."""
    return np.searchsorted(np.array(lengths) - NUM_SPECIAL, tokens)


def _cut(corpus: TokenCorpus, *, window: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """First tokens and lengths of the chunks in the order of the text, int64 [P] each, some at a time."""
    for first in range(0, corpus.num_documents, _DOCUMENTS_TOGETHER):
        last = min(first + _DOCUMENTS_TOGETHER, corpus.num_documents)
        offsets = corpus.document_offsets(first, last + 1)
        counts = -(-np.diff(offsets) // window)
        if counts.min() < 1:
            raise DataError(f"{corpus.path} is damaged: a document between {first} and {last} ends before it begins")
        ends = np.cumsum(counts)
        for begin in range(0, int(ends[-1]), _CHUNKS_TOGETHER):
            numbers = np.arange(begin, min(begin + _CHUNKS_TOGETHER, int(ends[-1])))
            documents = np.searchsorted(ends, numbers, side="right")
            starts = offsets[documents] + (numbers - ends[documents] + counts[documents]) * window
            yield starts, np.minimum(offsets[documents + 1] - starts, window)


class ChunkList:
    """The chunks of a corpus by bucket; made by ``open_chunks``. Safe to use from several threads.

    Attributes:
        sizes: what the buckets hold.
    """

    def __init__(self, path: Path, sizes: BucketSizes, *, file: int) -> None:
        """Takes over an open file whose header has been looked at."""
        self.path, self.sizes = path, sizes
        self._file = file
        weakref.finalize(self, os.close, file)
        self._first_entry = np.cumsum([0, *sizes.num_chunks]).tolist()
        windows = [length - NUM_SPECIAL for length in sizes.lengths]
        self._tokens_within = list(zip([0, *windows[:-1]], windows, strict=True))

    def read(self, bucket: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First tokens and numbers of tokens of some chunks, int64 [B] each.

        Args:
            bucket: number of the bucket, from 0, the shortest first.
            numbers: of chunks within it, int64 [B].

        Raises:
            DataError: the file cannot be read any more, or is damaged.
        """
        offsets = HEADER_BYTES + (self._first_entry[bucket] + numbers) * ENTRY.itemsize
        try:
            data = b"".join(read_at(self._file, ENTRY.itemsize, offset) for offset in offsets.tolist())
        except OSError as error:
            raise DataError(f"{self.path} cannot be read ({error.strerror})") from error
        if len(data) < numbers.size * ENTRY.itemsize:
            raise DataError(f"{self.path} has become shorter since it was opened; remove it")
        entries = np.frombuffer(data, ENTRY)
        starts = (entries >> np.uint64(_LENGTH_BITS)).astype(np.int64)
        tokens = (entries & np.uint64((1 << _LENGTH_BITS) - 1)).astype(np.int64)
        more_than, at_most = self._tokens_within[bucket]
        if tokens.min() <= more_than or tokens.max() > at_most:
            raise DataError(f"{self.path} is damaged: bucket {bucket} holds other lengths; remove it")
        return starts, tokens


def open_chunks(corpus: TokenCorpus, lengths: Sequence[int], *, directory: Path | None = None) -> ChunkList:
    """The chunks of a corpus, from the list that is there or a new one.

    One process makes it, those who ask meanwhile wait. One that is not whole is replaced.

    Args:
        lengths: of the buckets, tokens, ascending.
        directory: where the list is kept; by default beside the corpus.

    Raises:
        ConfigError: the longest bucket is longer than a chunk can be, or the directory cannot be written to.
        DataError: something else has the list's name, the disk is full, or the corpus is damaged.
    """
    folder = corpus.path.parent if directory is None else directory
    # With the text's checksum: corpora of one name can share a directory, and a new text has a new list.
    path = folder / f"{corpus.path.name}.{'-'.join(map(str, lengths))}.{corpus.checksum[:12]}.pieces"
    found = _open(path, corpus, lengths)
    if found is None:
        with _alone(path):
            # Another process may have made it while this one waited.
            found = _open(path, corpus, lengths)
            if found is None:
                _write(path, corpus, lengths)
                found = _open(path, corpus, lengths)
                assert found is not None
    return found


def _open(path: Path, corpus: TokenCorpus, lengths: Sequence[int]) -> ChunkList | None:
    """The list at a path; None where there is none, or one that is not whole or of another text."""
    try:
        file = open_file(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    chunks = None
    try:
        # Of a directory there is nothing to read: it is refused as any other foreign thing.
        checksum, sizes = _header(b"" if path.is_dir() else read_at(file, HEADER_BYTES, 0), path)
        expected = HEADER_BYTES + sum(sizes.num_chunks) * ENTRY.itemsize
        is_of_corpus = (checksum, sum(sizes.num_tokens)) == (corpus.checksum, corpus.num_tokens)
        if is_of_corpus and sizes.lengths == tuple(lengths) and os.fstat(file).st_size == expected:
            chunks = ChunkList(path, sizes, file=file)
    finally:
        if chunks is None:
            os.close(file)
    return chunks


def _header(data: bytes, path: Path) -> tuple[str, BucketSizes]:
    """Checksum of the text that a list is of, and what its buckets hold."""
    try:
        header = json.loads(data.rstrip(b"\0"))
        lengths, num_chunks, num_tokens = (tuple(map(int, header[name])) for name in ("lengths", "num_pieces", "num_tokens"))
        if header["format"] == FORMAT:
            return header["checksum"], BucketSizes(lengths=lengths, num_chunks=num_chunks, num_tokens=num_tokens)
    except (ValueError, LookupError, TypeError):
        pass
    raise DataError(f"{path} is not a list of chunks that this version reads: move it away, or {_ELSEWHERE}")


def _write(path: Path, corpus: TokenCorpus, lengths: Sequence[int]) -> None:
    """Writes the list, complete or not at all: two passes over the offsets, the first to count."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed here
        left.unlink()
    sizes = count_chunks(corpus, lengths)
    path.unlink(missing_ok=True)  # of another text, or not whole; new_file replaces nothing
    with new_file(path) as file:
        header = {
            "format": FORMAT,
            "checksum": corpus.checksum,
            "lengths": sizes.lengths,
            "num_pieces": sizes.num_chunks,
            "num_tokens": sizes.num_tokens,
        }
        text = json.dumps(header).encode("ascii")
        assert len(text) <= HEADER_BYTES
        file.write(text.ljust(HEADER_BYTES, b"\0"))
        ends = np.cumsum([0, *sizes.num_chunks])[:-1]
        for starts, tokens in _cut(corpus, window=lengths[-1] - NUM_SPECIAL):
            buckets = _bucket_of(tokens, lengths)
            entries = (starts << _LENGTH_BITS | tokens).astype(ENTRY)
            for bucket in np.unique(buckets).tolist():
                own = entries[buckets == bucket]
                file.seek(HEADER_BYTES + int(ends[bucket]) * ENTRY.itemsize)
                file.write(own.tobytes())
                ends[bucket] += own.size


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Waits until no other process is making the same list. The lock's file stays: others may be waiting on it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open_file(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise ConfigError(f"{path} cannot be made ({error.strerror}): {_ELSEWHERE}") from error
    try:
        try:
            wait_for_lock(file)
        except OSError as error:
            raise ConfigError(f"{path} is on a file system without locks ({error.strerror}): {_ELSEWHERE}") from error
        yield
    finally:
        os.close(file)
