"""Second half of a preparation: writes the remaining documents, in input order, as token files of bounded size.

``assign_shards`` decides from the lengths alone which document goes where; then every process writes whole token files.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deberta_dist.data.token_file import TokenFile, id_dtype
from deberta_dist.data.token_writer import TokenFileWriter
from deberta_dist.errors import DataError
from deberta_dist.preparation.pipeline.duplicates import DroppedDocuments
from deberta_dist.preparation.pipeline.spool import SpoolFile, damaged

TRAIN, HELD_OUT = "train", "heldout"


@dataclass(frozen=True, kw_only=True)
class SpoolRange:
    """Documents of one spool file that go into one shard: those of its split that stay, within a range.

    Attributes:
        file_number: number of the spool file, from 0, in the order of the input.
        start, stop: documents of the spool file.
    """

    file_number: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class OutputShard:
    """One token file to write.

    Attributes:
        folder: where, below the output: ``train``, ``train/NAME`` or ``heldout``.
        number: of the shard in its folder, from 0.
        ranges: what goes into it, in order.
        num_tokens, num_documents: their sums.
    """

    folder: str
    number: int
    ranges: tuple[SpoolRange, ...]
    num_tokens: int
    num_documents: int

    @property
    def name(self) -> str:
        """File name."""
        return f"{self.number:05}.tokens"


@dataclass(frozen=True, kw_only=True)
class SourceSplit:
    """What of one source goes into one split.

    Attributes:
        documents, tokens, text_bytes: their numbers.
    """

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0

    def __add__(self, other: "SourceSplit") -> "SourceSplit":
        return SourceSplit(
            documents=self.documents + other.documents,
            tokens=self.tokens + other.tokens,
            text_bytes=self.text_bytes + other.text_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class ShardAssignment:
    """Where every document goes.

    Attributes:
        shards: all token files, those of a folder one after another.
        splits: what each source gives to each split.
        dropped: documents of each source that are duplicates, by rule.
    """

    shards: tuple[OutputShard, ...]
    splits: Mapping[tuple[str, str], SourceSplit]
    dropped: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def folders(self) -> dict[str, list[OutputShard]]:
        """Shards by folder, in order."""
        found: dict[str, list[OutputShard]] = {}
        for shard in self.shards:
            found.setdefault(shard.folder, []).append(shard)
        return found


class _Folder:
    """Fills the shards of one folder."""

    def __init__(self, folder: str, *, max_tokens: int) -> None:
        self.folder = folder
        self.shards: list[OutputShard] = []
        self._max_tokens = max_tokens
        self._ranges: list[SpoolRange] = []
        self._num_tokens = self._num_documents = 0

    def add(self, file_number: int, *, documents: np.ndarray, lengths: np.ndarray) -> None:
        """Appends documents, ascending numbers of one spool file, with their lengths."""
        ends = np.cumsum(lengths, dtype=np.int64)
        start = taken = 0
        while start < len(documents):
            room = max(self._max_tokens - self._num_tokens, 0)  # a document alone may be longer
            stop = int(np.searchsorted(ends, taken + room, side="right"))
            if stop == start and self._num_documents == 0:
                stop = start + 1  # longer than a shard: a file of its own
            if stop == start:
                self.close()
                continue
            tokens = int(ends[stop - 1]) - taken
            self._ranges.append(
                SpoolRange(file_number=file_number, start=int(documents[start]), stop=int(documents[stop - 1]) + 1)
            )
            self._num_tokens += tokens
            self._num_documents += stop - start
            start, taken = stop, taken + tokens

    def close(self) -> None:
        """Ends the shard that is being filled."""
        if self._num_documents:
            self.shards.append(
                OutputShard(
                    folder=self.folder,
                    number=len(self.shards),
                    ranges=tuple(self._ranges),
                    num_tokens=self._num_tokens,
                    num_documents=self._num_documents,
                )
            )
        self._ranges, self._num_tokens, self._num_documents = [], 0, 0


def assign_shards(
    spool: Sequence[SpoolFile],
    *,
    sources: Sequence[str],
    duplicates: Mapping[str, DroppedDocuments],
    shard_bytes: int,
    vocab_size: int,
) -> ShardAssignment:
    """Which documents go into which token file.

    Args:
        spool: all spool files, in the order of the input.
        sources: name of the source of each spool file; "" where sources have no names.
        duplicates: documents that go nowhere, by rule.
        shard_bytes: most bytes of ids in one file.
        vocab_size: decides the bytes of an id.
    """
    max_tokens = max(1, shard_bytes // id_dtype(vocab_size).itemsize)
    folders: dict[str, _Folder] = {}
    splits: dict[tuple[str, str], SourceSplit] = {}
    dropped: dict[str, Counter[str]] = {}
    for number, (spool_file, source) in enumerate(zip(spool, sources, strict=True)):
        lengths, num_bytes, held_out = spool_file.read("lengths", "num_bytes", "held_out")
        kept = np.ones(spool_file.num_documents, bool)
        for rule, one in duplicates.items():
            repeated = one.of(number)
            kept[repeated] = False
            dropped.setdefault(source, Counter())[rule] += len(repeated)
        for split in (TRAIN, HELD_OUT):
            documents = np.flatnonzero(kept & (held_out.astype(bool) == (split == HELD_OUT)))
            name = folder_of(source, split=split)
            folder = folders.setdefault(name, _Folder(name, max_tokens=max_tokens))
            folder.add(number, documents=documents, lengths=lengths[documents])
            splits[source, split] = splits.get((source, split), SourceSplit()) + SourceSplit(
                documents=len(documents),
                tokens=int(lengths[documents].sum(dtype=np.int64)),
                text_bytes=int(num_bytes[documents].sum(dtype=np.int64)),
            )
    for folder in folders.values():
        folder.close()
    shards = tuple(shard for folder in folders.values() for shard in folder.shards)
    return ShardAssignment(shards=shards, splits=splits, dropped=dropped)


def folder_of(source: str, *, split: str) -> str:
    """Where documents of a source go: ``train`` or ``train/NAME``; ``heldout`` for all sources together."""
    return f"{TRAIN}/{source}" if split == TRAIN and source else split


def write_shard(
    shard: OutputShard,
    *,
    spool: Sequence[SpoolFile],
    dropped: DroppedDocuments,
    directory: Path,
    tokenizer_sha256: str,
    vocab_size: int,
) -> None:
    """Writes one token file; one that is there, of an earlier start, is compared with its checksum and left.

    Args:
        spool: all spool files, in the order of the input.
        dropped: documents that go nowhere.
        directory: where its folder is made.
        tokenizer_sha256, vocab_size: of the tokenizer that made the spool files.

    Raises:
        DataError: the disk is full, or a spool file or the file that is there is damaged.
    """
    path = directory / shard.folder / shard.name
    if path.exists():
        try:
            TokenFile(path).verify()
        except DataError as error:
            raise damaged(path, "its checksum or header is another") from error
        return
    with TokenFileWriter(path, tokenizer_sha256=tokenizer_sha256, vocab_size=vocab_size, source=shard.folder) as writer:
        for ids, lengths in _documents(shard, spool=spool, dropped=dropped):
            writer.add_documents(ids, lengths)
        # The assignment counted lengths, the writer counts ids: a difference is a fault of ours and ends the corpus.
        assert (writer.num_tokens, writer.num_documents) == (shard.num_tokens, shard.num_documents)


def _documents(
    shard: OutputShard, *, spool: Sequence[SpoolFile], dropped: DroppedDocuments
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids and lengths of each spool range."""
    is_held_out = shard.folder == HELD_OUT
    for spool_range in shard.ranges:
        spool_file = spool[spool_range.file_number]
        ids, lengths, held_out = spool_file.read("ids", "lengths", "held_out")
        kept = dropped.keep(spool_range.file_number, num_documents=spool_file.num_documents)
        kept &= held_out.astype(bool) == is_held_out
        kept[: spool_range.start] = kept[spool_range.stop :] = False
        yield ids[np.repeat(kept, lengths)], lengths[kept]
