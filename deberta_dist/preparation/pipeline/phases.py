"""The phases of a preparation: what a ``WorkerPool`` sends to its workers, and what they do with it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import DataError
from deberta_dist.preparation.filtering.contamination import NgramSet
from deberta_dist.preparation.pipeline.duplicates import DroppedDocuments, find_duplicates, find_near_duplicates
from deberta_dist.preparation.pipeline.encode import DocumentEncoder, finished_spool_files
from deberta_dist.preparation.pipeline.recipe import PreparationRecipe
from deberta_dist.preparation.pipeline.shards import ShardAssignment, write_shard
from deberta_dist.preparation.pipeline.spool import SpoolFile
from deberta_dist.preparation.pipeline.work_items import WorkItem
from deberta_dist.preparation.pipeline.workers import Worker


@dataclass(frozen=True, kw_only=True)
class EncodePhase:
    """File ranges of the inputs to spool files; a work item is a file range.

    Attributes:
        work_items: all of them, in the order of the input.
        recipe: what is done with each document.
        tokenizer: path of the model file: each worker loads it for itself.
        ngrams: n-grams of benchmarks; None: there are none.
        directory: where spool files are written.
    """

    work_items: Sequence[WorkItem]
    recipe: PreparationRecipe
    tokenizer: Path
    ngrams: NgramSet | None
    directory: Path

    @cached_property
    def order(self) -> list[int]:
        """Large file ranges first, such as compressed files, which cannot be cut: begun last they would be waited for."""
        return sorted(range(len(self.work_items)), key=lambda number: -self.work_items[number].input_bytes)

    @property
    def item_names(self) -> Sequence[str]:
        """Names of the work items."""
        return [self.work_items[number].name for number in self.order]

    def run(self, number: int, *, worker: Worker) -> None:
        """Encodes one work item."""
        item = self.work_items[self.order[number]]
        if self._encoder.encode(item, worker=worker):
            worker.report(input_bytes=item.input_bytes)

    def finished_bytes(self) -> int:
        """Bytes of the inputs whose spool files were there already."""
        return sum(item.input_bytes for item in self.work_items if finished_spool_files(self.directory, item)[1])

    @cached_property
    def _encoder(self) -> DocumentEncoder:
        tokenizer = Tokenizer(self.tokenizer)
        if tokenizer.sha256 != self.recipe.tokenizer_sha256:
            raise DataError(f"{self.tokenizer} is not the tokenizer that this preparation began with")
        return DocumentEncoder(recipe=self.recipe, tokenizer=tokenizer, ngrams=self.ngrams, directory=self.directory)

    def __getstate__(self) -> dict[str, object]:
        """Without what was made on the way: a tokenizer does not travel."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_encoder", "order")}


@dataclass(frozen=True, kw_only=True)
class FindDuplicatesPhase:
    """Exact duplicates; a work item is a range of hashes.

    Attributes:
        spool: all spool files, in the order of the input.
        count: ranges that the hashes are divided into; decides memory, not the result.
        directory: where the lists are written.
    """

    spool: Sequence[SpoolFile]
    count: int
    directory: Path

    @property
    def item_names(self) -> Sequence[str]:
        """Numbers of the ranges."""
        return [f"{number}-of-{self.count}" for number in range(self.count)]

    @property
    def paths(self) -> list[Path]:
        """The lists, for ``DroppedDocuments``."""
        return [self.directory / f"{name}.dropped" for name in self.item_names]

    def run(self, number: int, *, worker: Worker) -> None:
        """Searches one range, unless its list is there."""
        path = self.paths[number]
        if not path.exists():
            find_duplicates(self.spool, number=number, count=self.count, path=path)


@dataclass(frozen=True, kw_only=True)
class FindNearDuplicatesPhase:
    """Near-duplicates; one work item for one process, for the order decides.

    Attributes:
        spool: all spool files, in the order of the input.
        threshold: least Jaccard similarity of word 5-grams, above 0 and up to 1.
        duplicates: lists of exact duplicates, which are not looked at again.
        path: the list to write, for ``DroppedDocuments``.
    """

    spool: Sequence[SpoolFile]
    threshold: float
    duplicates: Sequence[Path]
    path: Path

    @property
    def item_names(self) -> Sequence[str]:
        """The one work item."""
        return ["all"]

    def run(self, number: int, *, worker: Worker) -> None:
        """Searches all, unless the list is there."""
        if not self.path.exists():
            find_near_duplicates(
                self.spool, threshold=self.threshold, dropped=DroppedDocuments(self.duplicates), path=self.path
            )


@dataclass(frozen=True, kw_only=True)
class WriteShardsPhase:
    """Documents to token files; a work item is a token file.

    Attributes:
        assignment: which documents go where.
        spool: all spool files, in the order of the input.
        duplicates: lists of documents that go nowhere.
        directory: where the folders of token files are made.
        tokenizer_sha256, vocab_size: of the tokenizer that made the spool files; its file may be another by now.
    """

    assignment: ShardAssignment
    spool: Sequence[SpoolFile]
    duplicates: Sequence[Path]
    directory: Path
    tokenizer_sha256: str
    vocab_size: int

    @property
    def item_names(self) -> Sequence[str]:
        """Names of the token files."""
        return [f"{shard.folder}/{shard.name}".replace(os.sep, "+") for shard in self.assignment.shards]

    def run(self, number: int, *, worker: Worker) -> None:
        """Writes one token file, unless it is there."""
        write_shard(
            self.assignment.shards[number],
            spool=self.spool,
            dropped=self._dropped,
            directory=self.directory,
            tokenizer_sha256=self.tokenizer_sha256,
            vocab_size=self.vocab_size,
        )

    @cached_property
    def _dropped(self) -> DroppedDocuments:
        return DroppedDocuments(self.duplicates)

    def __getstate__(self) -> dict[str, object]:
        """Without what was made on the way."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}
