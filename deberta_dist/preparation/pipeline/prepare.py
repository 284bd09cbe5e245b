"""Text to a corpus of token files, by one process or many on any number of nodes, always with the same bytes.

Called by tools/prepare_corpus.py on every rank. Three phases, each divided into work items that any process can take::

    encode        a range of an input      -> spool: ids, lengths, hashes of its documents
    duplicates    a range of hashes        -> documents to drop
    shards        a token file             -> the documents that stay, in the order of the input

What a phase has finished is on disk, so the same command resumes after any end. Memory of a process: a spool file (about 100 MB),
26 bytes for each byte of the longest document, the hashes of a range, nothing that grows with the corpus but a few numbers
per spool file; near-duplicates have a memory of their own.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from deberta_dist.data.corpus_index import INDEX_NAME, write_index
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import ConfigError, DataError
from deberta_dist.files.lock import RunLock
from deberta_dist.preparation.filtering.contamination import NgramSet
from deberta_dist.preparation.pipeline.duplicates import DroppedDocuments, num_ranges
from deberta_dist.preparation.pipeline.encode import Spool, collect_spool
from deberta_dist.preparation.pipeline.phases import EncodePhase, FindDuplicatesPhase, FindNearDuplicatesPhase, WriteShardsPhase
from deberta_dist.preparation.pipeline.progress import Monitor, Progress
from deberta_dist.preparation.pipeline.ranks import PreparationRanks
from deberta_dist.preparation.pipeline.recipe import PreparationRecipe
from deberta_dist.preparation.pipeline.report import Outcome, write_report
from deberta_dist.preparation.pipeline.shards import ShardAssignment, assign_shards
from deberta_dist.preparation.pipeline.spool import SpoolFile
from deberta_dist.preparation.pipeline.work_items import WorkItem, list_work_items
from deberta_dist.preparation.pipeline.workers import WorkerPool
from deberta_dist.preparation.pipeline.workspace import Workspace
from deberta_dist.preparation.reading.inputs import PassedOver

MIN_MEMORY_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class _Start:
    """What rank 0 sends to the others.

    Attributes:
        work_items: ranges of all inputs, in order.
        passed_over: what lies beside them and is not read.
        run: folder of this start's claims and progress; another start has another.
        state: folder of what depends on all work items.
        outcome: of a start that was killed when all was done but the moving; None: there is work.
    """

    work_items: tuple[WorkItem, ...]
    passed_over: PassedOver
    run: Path
    state: Path
    outcome: Outcome | None


def prepare_corpus(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: Tokenizer,
    recipe: PreparationRecipe | None = None,
    held_out_inputs: Sequence[str | Path] = (),
    ngrams: NgramSet | None = None,
    num_workers: int = 1,
    ranks: PreparationRanks | None = None,
    memory_bytes: int = 1 << 30,
    progress: Callable[[Progress], None] | None = None,
    progress_seconds: float = 5.0,
) -> Outcome | None:
    """Makes a corpus; on all ranks together.

    Args:
        inputs: as for ``list_inputs``.
        output: directory to make: ``train/`` (or ``train/NAME/``), ``heldout/``, report.json and report.md.
        tokenizer: turns text into ids.
        recipe: what is done with each document; None: the defaults, for this tokenizer.
        held_out_inputs: further inputs, all of whose documents are held out; they come before the others, so a document
            that is in both is held out.
        ngrams: documents that hold one of them are left out; None: there are none.
        num_workers: workers of this rank, at least 1; a single one works in this process.
        ranks: the group of processes; None: this one alone.
        memory_bytes: of one process for the search for exact duplicates.
        progress: called with the progress every ``progress_seconds``, on rank 0.
        progress_seconds: seconds between two of these.

    Returns:
        What was read and written, on rank 0; None on others.

    Raises:
        ConfigError: settings that cannot be meant, or another preparation in ``output``.
        DataError: ``output`` is complete or foreign, or an input cannot be read with these options. What is finished stays, and the
            same call resumes.
        UnfinishedError: a worker was killed.
    """
    ranks = PreparationRanks() if ranks is None else ranks
    recipe = PreparationRecipe.of(tokenizer) if recipe is None else recipe
    recipe = dataclasses.replace(recipe, contamination=None if ngrams is None else ngrams.fingerprint)
    if num_workers < 1:
        raise ConfigError(f"--workers {num_workers}: expected at least 1")
    if memory_bytes < MIN_MEMORY_BYTES:
        raise ConfigError(f"memory for duplicates of {memory_bytes} bytes: expected at least {MIN_MEMORY_BYTES}")
    workspace = Workspace(Path(output))
    began = time.monotonic()
    with ExitStack() as stack:

        def begin() -> _Start:
            work_items, passed_over = list_work_items(
                inputs, held_out_inputs, range_bytes=recipe.piece_bytes, format=recipe.reading.format
            )
            workspace.refuse_foreign()
            stack.enter_context(RunLock(workspace.directory, key="--output: working directory"))
            workspace.refuse_foreign()  # the process that had the lock may have completed it
            state = workspace.state(recipe, work_items)
            run = workspace.begin(recipe, state=state)
            outcome = workspace.finished(state)
            return _Start(work_items=work_items, passed_over=passed_over, run=run, state=state, outcome=outcome)

        start = ranks.first(begin)
        job = _Preparation(
            start=start,
            workspace=workspace,
            recipe=recipe,
            tokenizer=tokenizer,
            ngrams=ngrams,
            ranks=ranks,
            num_workers=num_workers,
            memory_bytes=memory_bytes,
        )
        report = progress if ranks.rank == 0 else None
        outcome = start.outcome or job.run(report=report, progress_seconds=progress_seconds, began=began)

        def end() -> None:
            workspace.publish(start.state)
            stack.close()  # NFS keeps a directory in which a file is open
            workspace.remove()

        ranks.first(end)
        return outcome if ranks.rank == 0 else None


@dataclass(frozen=True, kw_only=True)
class _Preparation:
    """The phases of one start, on every rank: each ends in a barrier, so that the next finds all files of the one before.

    Attributes:
        start: from rank 0.
        workspace: where everything is until the end.
        recipe: what is done with each document.
        tokenizer: the one that the recipe names.
        ngrams: n-grams of benchmarks, as the recipe names them; None: there are none.
        num_workers: workers of this rank, at least 1; a single one works in this process.
        memory_bytes: of one process, for a range of hashes.
    """

    start: _Start
    workspace: Workspace
    recipe: PreparationRecipe
    tokenizer: Tokenizer
    ngrams: NgramSet | None
    ranks: PreparationRanks
    num_workers: int
    memory_bytes: int

    def run(self, *, report: Callable[[Progress], None] | None, progress_seconds: float, began: float) -> Outcome:
        """All phases; everything is in the working directory when they end.

        Args:
            report: gets the progress; None on all ranks but the first.
            progress_seconds: between two calls of it.
            began: when the preparation began, as ``time.monotonic`` has it.
        """
        with (
            Monitor(self.start.run, report=report, seconds=progress_seconds) as monitor,
            WorkerPool(self.start.run, rank=self.ranks.rank, num_workers=self.num_workers) as pool,
        ):
            spool = self._encode(pool, monitor)
            duplicates = self._find_duplicates(spool.files, pool=pool, monitor=monitor)
            monitor.phase("writing token files")
            assignment = self._write(spool, duplicates, pool=pool)
        return self.ranks.first(lambda: self._finish(spool, assignment, began=began))

    def _encode(self, pool: WorkerPool, monitor: Monitor) -> Spool:
        encode = EncodePhase(
            work_items=self.start.work_items,
            recipe=self.recipe,
            tokenizer=Path(self.tokenizer.path),
            ngrams=self.ngrams,
            directory=self.workspace.spool,
        )
        if self.ranks.rank == 0:
            total = sum(item.input_bytes for item in self.start.work_items)
            monitor.phase("encoding", total_bytes=total, found_bytes=encode.finished_bytes())
        pool.run(encode)
        self.ranks.barrier()
        return self.ranks.first(lambda: _collect(self.start.work_items, directory=self.workspace.spool))

    def _find_duplicates(self, spool: Sequence[SpoolFile], *, pool: WorkerPool, monitor: Monitor) -> dict[str, list[Path]]:
        """Lists of documents to drop, by rule."""
        directory = self.workspace.duplicates(self.start.state)
        found: dict[str, list[Path]] = {}
        if self.recipe.deduplicate:
            monitor.phase("finding duplicates")
            count = num_ranges(sum(file.num_documents for file in spool), memory_bytes=self.memory_bytes)
            exact = FindDuplicatesPhase(spool=spool, count=count, directory=directory)
            pool.run(exact)
            self.ranks.barrier()
            found["duplicate"] = exact.paths
        if (threshold := self.recipe.near_duplicates) is not None:
            monitor.phase("finding near-duplicates")
            path, exact_lists = directory / "near.dropped", found.get("duplicate", [])
            pool.run(FindNearDuplicatesPhase(spool=spool, threshold=threshold, duplicates=exact_lists, path=path))
            self.ranks.barrier()
            found["near_duplicate"] = [path]
        return found

    def _write(self, spool: Spool, duplicates: Mapping[str, Sequence[Path]], *, pool: WorkerPool) -> ShardAssignment:
        assignment: ShardAssignment = self.ranks.first(
            lambda: assign_shards(
                spool.files,
                sources=[self.start.work_items[number].file.source for number in spool.item_numbers],
                duplicates={rule: DroppedDocuments(paths) for rule, paths in duplicates.items()},
                shard_bytes=self.recipe.shard_bytes,
                vocab_size=self.tokenizer.num_tokens,
            )
        )
        if not assignment.shards:
            raise DataError(_nothing_kept(spool.files))
        pool.run(
            WriteShardsPhase(
                assignment=assignment,
                spool=spool.files,
                duplicates=[path for paths in duplicates.values() for path in paths],
                directory=self.workspace.made(self.start.state),
                tokenizer_sha256=self.tokenizer.sha256,
                vocab_size=self.tokenizer.num_tokens,
            )
        )
        self.ranks.barrier()
        return assignment

    def _finish(self, spool: Spool, assignment: ShardAssignment, *, began: float) -> Outcome:
        """Writes the indexes and the report; on rank 0."""
        made = self.workspace.made(self.start.state)
        names = " ".join(dict.fromkeys(item.file.path.name for item in self.start.work_items))
        for folder, shards in assignment.folders().items():
            if not (made / folder / INDEX_NAME).exists():
                write_index(made / folder, [shard.name for shard in shards], source=names[:400])
        outcome = Outcome.of(
            self.start.work_items,
            spool=spool,
            assignment=assignment,
            recipe=self.recipe,
            processes=self.ranks.size * self.num_workers,
            seconds=time.monotonic() - began,
            passed_over=self.start.passed_over,
            ngrams=self.ngrams,
        )
        write_report(outcome, directory=made)
        return outcome


def _collect(work_items: Sequence[WorkItem], *, directory: Path) -> Spool:
    """All spool files, as ``collect_spool``; refuses inputs to be held out in which there is no document."""
    spool = collect_spool(work_items, directory=directory)
    pairs = zip(spool.files, spool.item_numbers, strict=True)
    held_out = [file for file, number in pairs if work_items[number].held_out]
    if held_out and not sum(file.counts.kept for file in held_out):
        raise DataError(f"no document of --held-out-input is left to hold out ({_dropped(held_out)})")
    return spool


def _nothing_kept(spool: Sequence[SpoolFile]) -> str:
    return f"no document is left to write ({_dropped(spool)})"


def _dropped(spool: Sequence[SpoolFile]) -> str:
    """How many documents were left out, by rule."""
    dropped: dict[str, int] = {}
    for spool_file in spool:
        for rule, number in spool_file.counts.dropped.items():
            dropped[rule] = dropped.get(rule, 0) + number
    return ", ".join(f"{number:,} {rule}" for rule, number in sorted(dropped.items())) or "the inputs are empty"
