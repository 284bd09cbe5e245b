"""Text to a corpus of token files, by one process or many on any number of nodes: the same bytes every time.

Called by tools/prepare_corpus.py on every rank. Three phases, each shared out in units that any process can take::

    encode        a piece of an input      -> parts: ids, lengths, hashes of its documents
    duplicates    a range of hashes        -> documents to drop
    shards        a token file             -> the documents that stay, in the order of the input

What a phase has finished is on disk, so the same command goes on after any end. Memory of a process: a part (about 100 MB),
26 bytes for each byte of the longest document, the hashes of a range, nothing that grows with the corpus but a few numbers
per part; near-duplicates have a memory of their own.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from deberta_dist.data.corpus_index import INDEX_NAME, write_index
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import ConfigError, DataError
from deberta_dist.files.lock import RunLock
from deberta_dist.preparation.filtering.contamination import NgramSet
from deberta_dist.preparation.pipeline.duplicates import DroppedDocuments, num_ranges
from deberta_dist.preparation.pipeline.encode import collect_spool
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
    """What rank 0 tells the others.

    Attributes:
        units: all pieces of the inputs, in order.
        passed_over: what lies beside them and is not read.
        run: folder of this start.
        state: folder of what depends on all units.
        outcome: of a start that was killed when all was done but the moving; None: there is work.
    """

    units: tuple[WorkItem, ...]
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
        num_workers: processes of this rank.
        ranks: the group of processes; None: this one alone.
        memory_bytes: of one process for the search for exact duplicates.
        progress: told how far it is, every ``progress_seconds``, on rank 0.
        progress_seconds: seconds between two of these.

    Returns:
        What was read and written, on rank 0; None on others.

    Raises:
        ConfigError: settings that cannot be meant, or another preparation in ``output``.
        DataError: ``output`` is complete or foreign, or an input cannot be read as told. What is finished stays, and the
            same call goes on with it.
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
            units, passed_over = list_work_items(
                inputs, held_out_inputs, piece_bytes=recipe.piece_bytes, format=recipe.reading.format
            )
            workspace.refuse_foreign()
            stack.enter_context(RunLock(workspace.directory, key="--output: working directory"))
            workspace.refuse_foreign()  # whoever had the lock may have completed it
            state = workspace.state(recipe, units)
            run = workspace.begin(recipe, state=state)
            outcome = workspace.finished(state)
            return _Start(units=units, passed_over=passed_over, run=run, state=state, outcome=outcome)

        start = ranks.first(begin)
        outcome = start.outcome or _prepare(
            start,
            workspace=workspace,
            recipe=recipe,
            tokenizer=tokenizer,
            ngrams=ngrams,
            num_workers=num_workers,
            ranks=ranks,
            memory_bytes=memory_bytes,
            progress=progress,
            progress_seconds=progress_seconds,
            began=began,
        )

        def end() -> None:
            workspace.publish(start.state)
            stack.close()  # NFS keeps a directory in which a file is open
            workspace.remove()

        ranks.first(end)
        return outcome if ranks.rank == 0 else None


def _prepare(
    start: _Start,
    *,
    workspace: Workspace,
    recipe: PreparationRecipe,
    tokenizer: Tokenizer,
    ngrams: NgramSet | None,
    num_workers: int,
    ranks: PreparationRanks,
    memory_bytes: int,
    progress: Callable[[Progress], None] | None,
    progress_seconds: float,
    began: float,
) -> Outcome:
    """The phases; everything is in the working directory when they end."""
    made = workspace.made(start.state)
    with (
        Monitor(start.run, report=progress if ranks.rank == 0 else None, seconds=progress_seconds) as monitor,
        WorkerPool(start.run, rank=ranks.rank, num_workers=num_workers) as crew,
    ):
        encode = EncodePhase(
            pieces=start.units,
            recipe=recipe,
            tokenizer=Path(tokenizer.path),
            ngrams=ngrams,
            directory=workspace.parts,
        )
        if ranks.rank == 0:
            total = sum(unit.input_bytes for unit in start.units)
            monitor.phase("encoding", total_bytes=total, found_bytes=encode.finished_bytes())
        crew.run(encode)
        ranks.barrier()
        parts, item_of_spool_file = ranks.first(lambda: _collect(start.units, directory=workspace.parts))

        duplicates = _find_duplicates(
            parts,
            directory=workspace.duplicates(start.state),
            recipe=recipe,
            memory_bytes=memory_bytes,
            crew=crew,
            ranks=ranks,
            monitor=monitor,
        )
        monitor.phase("writing token files")
        plan: ShardAssignment = ranks.first(
            lambda: assign_shards(
                parts,
                sources=[start.units[number].file.source for number in item_of_spool_file],
                duplicates={rule: DroppedDocuments(paths) for rule, paths in duplicates.items()},
                shard_bytes=recipe.shard_bytes,
                vocab_size=tokenizer.num_tokens,
            )
        )
        if not plan.shards:
            raise DataError(_nothing_kept(parts))
        crew.run(
            WriteShardsPhase(
                plan=plan,
                parts=parts,
                duplicates=[path for paths in duplicates.values() for path in paths],
                directory=made,
                tokenizer_sha256=tokenizer.sha256,
                vocab_size=tokenizer.num_tokens,
            )
        )
        ranks.barrier()

    def finish() -> Outcome:
        names = " ".join(dict.fromkeys(unit.file.path.name for unit in start.units))
        for folder, shards in plan.folders().items():
            if not (made / folder / INDEX_NAME).exists():
                write_index(made / folder, [shard.name for shard in shards], source=names[:400])
        outcome = Outcome.of(
            start.units,
            parts=parts,
            item_of_spool_file=item_of_spool_file,
            plan=plan,
            recipe=recipe,
            processes=ranks.size * num_workers,
            seconds=time.monotonic() - began,
            passed_over=start.passed_over,
            ngrams=ngrams,
        )
        write_report(outcome, directory=made)
        return outcome

    return ranks.first(finish)


def _find_duplicates(
    parts: Sequence[SpoolFile],
    *,
    directory: Path,
    recipe: PreparationRecipe,
    memory_bytes: int,
    crew: WorkerPool,
    ranks: PreparationRanks,
    monitor: Monitor,
) -> dict[str, list[Path]]:
    """Lists of documents to drop, by rule."""
    found: dict[str, list[Path]] = {}
    if recipe.deduplicate:
        monitor.phase("finding duplicates")
        count = num_ranges(sum(part.num_documents for part in parts), memory_bytes=memory_bytes)
        exact = FindDuplicatesPhase(parts=parts, count=count, directory=directory)
        crew.run(exact)
        ranks.barrier()
        found["duplicate"] = exact.paths
    if recipe.near_duplicates is not None:
        monitor.phase("finding near-duplicates")
        path = directory / "near.dropped"
        crew.run(
            FindNearDuplicatesPhase(
                parts=parts, threshold=recipe.near_duplicates, duplicates=found.get("duplicate", []), path=path
            )
        )
        ranks.barrier()
        found["near_duplicate"] = [path]
    return found


def _collect(units: Sequence[WorkItem], *, directory: Path) -> tuple[list[SpoolFile], list[int]]:
    """All parts, as ``collect_spool``; refuses inputs to be held out in which there is no document."""
    parts, item_of_spool_file = collect_spool(units, directory=directory)
    held_out = [part for part, number in zip(parts, item_of_spool_file, strict=True) if units[number].held_out]
    if held_out and not sum(part.counts.kept for part in held_out):
        raise DataError(f"no document of --held-out-input is left to hold out ({_dropped(held_out)})")
    return parts, item_of_spool_file


def _nothing_kept(parts: Sequence[SpoolFile]) -> str:
    return f"no document is left to write ({_dropped(parts)})"


def _dropped(parts: Sequence[SpoolFile]) -> str:
    """How many documents were left out, by rule."""
    dropped: dict[str, int] = {}
    for part in parts:
        for rule, number in part.counts.dropped.items():
            dropped[rule] = dropped.get(rule, 0) + number
    return ", ".join(f"{number:,} {rule}" for rule, number in sorted(dropped.items())) or "the inputs are empty"
