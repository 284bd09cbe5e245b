"""The phases of a preparation as tasks for a ``Crew``: what the workers are sent, and what they do with it."""

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
    """Pieces of the inputs to parts; a unit is a piece.

    Attributes:
        pieces: all of them, in the order of the input.
        recipe: what is done with each document.
        tokenizer: path of its model.
        ngrams: n-grams of benchmarks; None: there are none.
        directory: where parts are written.
    """

    pieces: Sequence[WorkItem]
    recipe: PreparationRecipe
    tokenizer: Path
    ngrams: NgramSet | None
    directory: Path

    @cached_property
    def order(self) -> list[int]:
        """Large pieces first, such as compressed files, which cannot be cut: begun last they would be waited for."""
        return sorted(range(len(self.pieces)), key=lambda number: -self.pieces[number].input_bytes)

    @property
    def units(self) -> Sequence[str]:
        """Names of the pieces."""
        return [self.pieces[number].name for number in self.order]

    def run(self, number: int, *, worker: Worker) -> None:
        """Encodes one piece."""
        piece = self.pieces[self.order[number]]
        if self._encoder.encode(piece, worker=worker):
            worker.report(input_bytes=piece.input_bytes)

    def finished_bytes(self) -> int:
        """Bytes of the inputs whose parts were there already."""
        return sum(unit.input_bytes for unit in self.pieces if finished_spool_files(self.directory, unit)[1])

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
    """Exact duplicates; a unit is a range of hashes.

    Attributes:
        parts: all parts, in the order of the input.
        count: number of ranges.
        directory: where the lists are written.
    """

    parts: Sequence[SpoolFile]
    count: int
    directory: Path

    @property
    def units(self) -> Sequence[str]:
        """Numbers of the ranges."""
        return [f"{number}-of-{self.count}" for number in range(self.count)]

    @property
    def paths(self) -> list[Path]:
        """The lists, for ``DroppedDocuments``."""
        return [self.directory / f"{unit}.dropped" for unit in self.units]

    def run(self, number: int, *, worker: Worker) -> None:
        """Searches one range, unless its list is there."""
        path = self.paths[number]
        if not path.exists():
            find_duplicates(self.parts, number=number, count=self.count, path=path)


@dataclass(frozen=True, kw_only=True)
class FindNearDuplicatesPhase:
    """Near-duplicates; one unit for one process, for the order decides.

    Attributes:
        parts: all parts, in the order of the input.
        threshold: least similarity.
        duplicates: lists of exact duplicates.
        path: the list to write.
    """

    parts: Sequence[SpoolFile]
    threshold: float
    duplicates: Sequence[Path]
    path: Path

    @property
    def units(self) -> Sequence[str]:
        """The one unit."""
        return ["all"]

    def run(self, number: int, *, worker: Worker) -> None:
        """Searches all, unless the list is there."""
        if not self.path.exists():
            find_near_duplicates(
                self.parts, threshold=self.threshold, dropped=DroppedDocuments(self.duplicates), path=self.path
            )


@dataclass(frozen=True, kw_only=True)
class WriteShardsPhase:
    """Documents to token files; a unit is a token file.

    Attributes:
        plan: which documents go where.
        parts: all parts, in the order of the input.
        duplicates: lists of documents that go nowhere.
        directory: where the folders of token files are made.
        tokenizer_sha256, vocab_size: of the tokenizer that made the parts; its file may be another by now.
    """

    plan: ShardAssignment
    parts: Sequence[SpoolFile]
    duplicates: Sequence[Path]
    directory: Path
    tokenizer_sha256: str
    vocab_size: int

    @property
    def units(self) -> Sequence[str]:
        """Names of the token files."""
        return [f"{shard.folder}/{shard.name}".replace(os.sep, "+") for shard in self.plan.shards]

    def run(self, number: int, *, worker: Worker) -> None:
        """Writes one token file, unless it is there."""
        write_shard(
            self.plan.shards[number],
            parts=self.parts,
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
