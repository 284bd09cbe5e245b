"""Text to a corpus of token files, by one process or many on any number of nodes: the same bytes every time.

Called by tools/prepare_corpus.py on every rank. Three phases, each shared out in units that any process can take::

    encode        a piece of an input      -> parts: ids, lengths, hashes of its documents
    duplicates    a range of hashes        -> documents to drop
    shards        a token file             -> the documents that stay, in the order of the input

What a phase has finished is on disk, so the same command goes on after any end. Memory: a part per process (about 200 MB),
the hashes of a range, nothing that grows with the corpus but one line per part.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deberta_dist.corpus.assemble import Shard, folders, plan_shards
from deberta_dist.corpus.crew import Crew
from deberta_dist.corpus.duplicates import Dropped, num_ranges
from deberta_dist.corpus.encode import finished_parts
from deberta_dist.corpus.inputs import list_inputs
from deberta_dist.corpus.parts import Part
from deberta_dist.corpus.progress import Monitor
from deberta_dist.corpus.ranks import Ranks
from deberta_dist.corpus.reading import cut
from deberta_dist.corpus.recipe import PIECE_BYTES, Recipe, Unit
from deberta_dist.corpus.report import Outcome, write_report
from deberta_dist.corpus.tasks import EncodeTask, FindDuplicatesTask, WriteShardsTask
from deberta_dist.corpus.workspace import Workspace
from deberta_dist.data.token_corpus import write_index
from deberta_dist.data.tokenizer import Tokenizer
from deberta_dist.errors import ConfigError, DataError
from deberta_dist.lock import RunLock

HELD_OUT_INPUT = "held-out input"
_VISIBLE_SECONDS = 60.0  # NFS clients may look at a directory that is so old


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What rank 0 tells the others.

    Attributes:
        units: all pieces of the inputs, in order.
        run: folder of this start.
        state: folder of what depends on all units.
    """

    units: tuple[Unit, ...]
    run: Path
    state: Path


def prepare_corpus(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: Tokenizer,
    recipe: Recipe | None = None,
    held_out_inputs: Sequence[str | Path] = (),
    num_workers: int = 1,
    ranks: Ranks | None = None,
    memory_bytes: int = 1 << 30,
    progress: Callable[[str], None] | None = None,
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
        num_workers: processes of this rank.
        ranks: the group of processes; None: this one alone.
        memory_bytes: of one process for the search for duplicates.
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
    ranks = Ranks() if ranks is None else ranks
    recipe = Recipe.of(tokenizer) if recipe is None else recipe
    if num_workers < 1:
        raise ConfigError(f"--workers {num_workers}: expected at least 1")
    if memory_bytes < 1 << 20:
        raise ConfigError(f"memory for duplicates of {memory_bytes} bytes: expected at least 1 MiB")
    workspace = Workspace(Path(output))
    began = time.monotonic()
    lock: list[RunLock] = []

    def begin() -> Plan:
        units = _list_units(inputs, held_out_inputs)
        workspace.refuse_foreign()
        lock.append(RunLock(workspace.directory, key="--output: working directory"))
        run = workspace.begin(recipe)
        state = workspace.state(recipe, units)
        for name in ("duplicates", "output"):
            (state / name).mkdir(parents=True, exist_ok=True)
        return Plan(units=tuple(units), run=run, state=state)

    try:
        plan = ranks.first(begin)
        with (
            Monitor(plan.run, report=progress if ranks.rank == 0 else None, seconds=progress_seconds) as monitor,
            Crew(plan.run, rank=ranks.rank, num_workers=num_workers) as crew,
        ):
            monitor.phase("encoding", total_bytes=sum(unit.input_bytes for unit in plan.units))
            crew.run(
                EncodeTask(plan.units, recipe=recipe, tokenizer_path=Path(tokenizer.path), directory=workspace.parts)
            )
            ranks.barrier()
            parts, sources, unit_of_part = ranks.first(lambda: _collect(plan.units, directory=workspace.parts))

            monitor.phase("finding duplicates")
            count = num_ranges(sum(part.num_documents for part in parts), memory_bytes=memory_bytes)
            ranges = FindDuplicatesTask(parts, count=count, directory=plan.state / "duplicates")
            if recipe.deduplicate:
                crew.run(ranges)
            ranks.barrier()
            dropped = Dropped(ranges.paths if recipe.deduplicate else ())

            monitor.phase("writing token files")
            shards, totals = ranks.first(
                lambda: plan_shards(
                    parts,
                    sources=sources,
                    dropped=dropped,
                    shard_bytes=recipe.shard_bytes,
                    vocab_size=tokenizer.num_tokens,
                )
            )
            if not shards:
                raise DataError(_nothing_kept(parts))
            made = plan.state / "output"
            crew.run(
                WriteShardsTask(shards, parts=parts, dropped=dropped, directory=made, tokenizer_path=Path(tokenizer.path))
            )
            ranks.barrier()

        def finish() -> Outcome:
            for folder, members in folders(shards).items():
                write_index(made / folder, [shard.name for shard in members], source=_inputs_of(plan.units))
            outcome = Outcome.of(
                plan.units,
                parts=parts,
                unit_of_part=unit_of_part,
                totals=totals,
                shards=shards,
                recipe=recipe,
                num_processes=ranks.size * num_workers,
                seconds=time.monotonic() - began,
            )
            write_report(outcome, directory=made)
            workspace.finish(plan.state)
            return outcome

        outcome = ranks.first(finish)
        return outcome if ranks.rank == 0 else None
    finally:
        for held in lock:
            held.release_if_there()


def _list_units(inputs: Sequence[str | Path], held_out_inputs: Sequence[str | Path]) -> list[Unit]:
    """Pieces of all inputs, in order; refuses a file that is given twice."""
    units: list[Unit] = []
    seen: dict[Path, bool] = {}
    for given, held_out in ((held_out_inputs, True), (inputs, False)):
        for file in list_inputs(given):
            if seen.setdefault(file.path.resolve(), held_out) != held_out:
                raise DataError(f"{file.path} is given as input and as held-out input")
            pieces = cut(file, piece_bytes=PIECE_BYTES)
            units += [
                Unit(file=file, piece=piece, held_out=held_out, input_bytes=file.num_bytes // len(pieces))
                for piece in pieces
            ]
    return units


def _collect(units: Sequence[Unit], *, directory: Path) -> tuple[list[Part], list[str], list[int]]:
    """All parts in order, the source of each, and the number of its unit."""
    parts: list[Part] = []
    unit_of_part: list[int] = []
    for number, unit in enumerate(units):
        deadline = time.monotonic() + _VISIBLE_SECONDS
        found, is_complete = finished_parts(directory, unit)
        while not is_complete:
            if time.monotonic() > deadline:
                raise DataError(f"{unit.file.path}: its parts in {directory} have vanished; run the same command again")
            time.sleep(0.2)
            found, is_complete = finished_parts(directory, unit)
        parts += found
        unit_of_part += [number] * len(found)
    return parts, [units[number].file.source for number in unit_of_part], unit_of_part


def _inputs_of(units: Sequence[Unit]) -> str:
    return " ".join(dict.fromkeys(unit.file.path.name for unit in units))


def _nothing_kept(parts: Sequence[Part]) -> str:
    dropped: dict[str, int] = {}
    for part in parts:
        for rule, number in part.counts.dropped.items():
            dropped[rule] = dropped.get(rule, 0) + number
    why = ", ".join(f"{number:,} {rule}" for rule, number in sorted(dropped.items())) or "the inputs are empty"
    return f"no document is left to write ({why})"
