"""A corpus: one token file, or a directory of them (shards, ``corpus_index.py``) read as one.

Tokens and documents are numbered through the shards: where one ends and the next begins is not seen by a reader.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path

import numpy as np

from deberta_dist.data.corpus_index import AGAIN, INDEX_NAME, TOKENS_SUFFIX, CorpusShard, Index, read_index, shard_of
from deberta_dist.data.token_file import OFFSET_DTYPE, TokenFile, id_dtype
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import DataError

# Files that a corpus keeps open at most, each one descriptor: a run has several corpora and a limit, often of 1,024.
_MAX_OPEN_FILES = 128
# Document offsets that are read at once: a page.
_OFFSETS_PER_READ = 512


class TokenCorpus:
    """One or more token files read as one; made by ``open_corpus``.

    No more than 128 files are open at a time, and none is mapped: memory does not grow with the corpus. Safe to use
    from several threads.

    Attributes:
        path: the token file, or the directory.
        shards: token files in the order in which their documents follow each other.
        num_tokens, num_documents: of all files.
        dtype: of the ids, uint16 or uint32.
        tokenizer_sha256: SHA-256 of the tokenizer's model file.
        vocab_size: number of ids of that tokenizer.
        checksum: of a token file its own; of a directory SHA-256 over the shards' checksums, 32 bytes each, in order.
        source: where the text came from.
    """

    def __init__(self, path: Path, index: Index, *, is_directory: bool) -> None:
        """Of files that ``open_corpus`` has looked at."""
        shards = index.shards
        self.path = path
        self.shards = shards
        self.tokenizer_sha256 = index.tokenizer_sha256
        self.vocab_size = index.vocab_size
        self.source = index.source
        self.dtype = id_dtype(index.vocab_size)
        self.checksum = shards[0].checksum
        if is_directory:
            self.checksum = hashlib.sha256(b"".join(bytes.fromhex(shard.checksum) for shard in shards)).hexdigest()
        # Where the shards begin, and the end, [num_shards + 1] each; lists, because bisect is faster on them.
        self._tokens = list(accumulate((shard.num_tokens for shard in shards), initial=0))
        self._documents = list(accumulate((shard.num_documents for shard in shards), initial=0))
        self.num_tokens = self._tokens[-1]
        self.num_documents = self._documents[-1]
        self._directory = path if is_directory else path.parent
        # Of a function that knows no corpus: files are closed with it, not when a cycle is collected. One that is put
        # aside stays open until its last reader, of any thread, lets go of it.
        self._file = lru_cache(maxsize=_MAX_OPEN_FILES)(partial(_open_shard, self._directory, shards))

    def files(self) -> Iterator[TokenFile]:
        """The token files in order, for going through all of the corpus once; none is kept open.

        Raises:
            DataError: one is missing, damaged, or another than when the corpus was opened.
        """
        return (_open_shard(self._directory, self.shards, number) for number in range(len(self.shards)))

    def require_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuses a tokenizer other than the one the corpus was made with.

        Raises:
            DataError: its SHA-256 or its number of tokens is another.
        """
        self._file(0).require_tokenizer(tokenizer)

    def verify(self) -> None:
        """Reads all files and compares their checksums.

        Raises:
            DataError: the ids or offsets of a file are not those that were written.
        """
        for file in self.files():
            file.verify()

    def read(self, start: int, stop: int) -> np.ndarray:
        """A copy of ids ``start`` to ``stop`` - 1, uint16 or uint32 [stop - start].

        Raises:
            DataError: a file cannot be read any more.
        """
        assert 0 <= start <= stop <= self.num_tokens
        arrays = [self._file(number).read(a, b) for number, a, b in _within_shards(self._tokens, start, stop)]
        return arrays[0] if len(arrays) == 1 else np.concatenate([np.empty(0, self.dtype), *arrays])

    def document_offsets(self, start: int, stop: int) -> np.ndarray:
        """Tokens at which documents ``start`` to ``stop`` - 1 begin, int64 [stop - start].

        Args:
            start: number of a document, from 0.
            stop: at most num_documents + 1: the last offset is the corpus's end.

        Raises:
            DataError: a file cannot be read any more.
        """
        assert 0 <= start <= stop <= self.num_documents + 1
        arrays = [
            self._file(number).read_offsets(a, b) + self._tokens[number]
            for number, a, b in _within_shards(self._documents, start, min(stop, self.num_documents))
        ]
        end = [self.num_tokens] if start <= self.num_documents < stop else []
        return np.concatenate([*arrays, np.array(end, OFFSET_DTYPE)])

    def document_at(self, position: int, *, num_separators: int = 0) -> int:
        """Number of the document that a position lies in, where separators are put behind every document.

        Document d begins at the position (its first token) + d x num_separators; its separators count as its own.

        Args:
            position: from 0, counted in tokens and separators.
            num_separators: behind each document.

        Raises:
            DataError: a file cannot be read any more.
        """
        assert 0 <= position < self.num_tokens + self.num_documents * num_separators
        shards = range(len(self.shards))
        number = bisect_right(shards, position, key=lambda k: self._tokens[k] + self._documents[k] * num_separators) - 1
        file = self._file(number)
        position -= self._tokens[number] + self._documents[number] * num_separators

        def begins(first: int, stop: int) -> np.ndarray:
            return file.read_offsets(first, stop) + num_separators * np.arange(first, stop)

        def page_of(first: int) -> np.ndarray:
            return begins(first, min(first + _OFFSETS_PER_READ, file.num_documents) + 1)

        # The page where the document lies if all are equally long; where it does not, that page is sought, from pages'
        # beginnings. Nothing of the offsets is kept.
        pages = range(0, file.num_documents, _OFFSETS_PER_READ)
        guess = position * file.num_documents // (file.num_tokens + num_separators * file.num_documents)
        first = pages[guess // _OFFSETS_PER_READ]
        page = page_of(first)
        if not page[0] <= position < page[-1]:
            first = pages[bisect_right(pages, position, key=lambda start: int(begins(start, start + 1)[0])) - 1]
            page = page_of(first)
        return self._documents[number] + first + int(np.searchsorted(page, position, side="right")) - 1


def open_corpus(path: str | Path) -> TokenCorpus:
    """Opens a corpus: a token file, or a directory with an ``index.json``.

    Of every file the header is read and compared with the index.

    Raises:
        DataError: ``path`` is neither; the index is damaged or of a newer format; a file it names is missing,
            damaged, or another than the index says; the directory has a token file that it does not name.
    """
    path = Path(path)
    if path.is_dir():
        index = read_index(path)
        _compare(path, index)
        return TokenCorpus(path, index, is_directory=True)
    file = TokenFile(path)
    index = Index(
        tokenizer_sha256=file.tokenizer_sha256, vocab_size=file.vocab_size, source=file.source, shards=(shard_of(file),)
    )
    return TokenCorpus(path, index, is_directory=False)


def _open_shard(directory: Path, shards: Sequence[CorpusShard], number: int) -> TokenFile:
    file = TokenFile(directory / shards[number].name)
    if shard_of(file) != shards[number]:
        raise DataError(f"{file.path} has changed since it was opened: {AGAIN}")
    return file


def _compare(directory: Path, index: Index) -> None:
    names = {shard.name for shard in index.shards}
    found = {path.name for path in directory.glob(f"*{TOKENS_SUFFIX}")}
    if unnamed := sorted(found - names):
        raise DataError(
            f"{directory / unnamed[0]} is not in {INDEX_NAME} beside it, which names {len(names)} other files: move it "
            "away, or prepare the corpus again"
        )
    for shard in index.shards:
        path = directory / shard.name
        if shard.name not in found:
            missing = len(names - found)
            raise DataError(f"{path} is missing, as {missing} of {len(names)} files of {INDEX_NAME} beside it: {AGAIN}")
        file = TokenFile(path)
        if (file.tokenizer_sha256, file.vocab_size) != (index.tokenizer_sha256, index.vocab_size):
            raise DataError(
                f"{path} was made with the tokenizer {file.tokenizer_sha256[:12]}..., its corpus with "
                f"{index.tokenizer_sha256[:12]}...: it is of another one; {AGAIN}"
            )
        if shard_of(file) != shard:
            raise DataError(
                f"{path} is not the file that {INDEX_NAME} beside it names: it has {file.num_tokens:,} tokens, "
                f"checksum {file.checksum[:12]}..., expected {shard.num_tokens:,}, {shard.checksum[:12]}...; {AGAIN}"
            )


def _within_shards(bounds: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(shard, from, to) of a range, from and to within the shard; ``bounds`` are where shards begin, and the end."""
    number = bisect_right(bounds, start) - 1
    while start < stop:
        begin, end = bounds[number : number + 2]
        yield number, start - begin, min(stop, end) - begin
        start, number = end, number + 1
