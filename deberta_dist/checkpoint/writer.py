"""Writes one rank's part of a checkpoint in the background, and commits the whole of it on rank 0.

    every rank   begin(...)             its file is written in the background, into a directory with a dot
                 state                  polled between steps; the ranks agree by a collective of the caller's
    once all have written
      rank 0     commit(...)            manifest, rename, ``latest``, old ones removed
      others     release()
    otherwise    abandon()              on every rank

Nothing here communicates, except through the directory that all ranks share: beside its shard file a rank
leaves a note with size and checksum, which the commit takes into the manifest.
"""

import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deberta_dist.checkpoint.errors import CheckpointError, CheckpointVersionError, CheckpointWriteError, strict_json
from deberta_dist.checkpoint.find import step_name
from deberta_dist.checkpoint.manifest import MANIFEST_NAME, FileEntry, Manifest, file_entry, to_json
from deberta_dist.checkpoint.publish import point_latest, prune, put_in_place, temporary_directory
from deberta_dist.checkpoint.reader import open_checkpoint
from deberta_dist.checkpoint.shard_file import file_bytes, write_shard_file
from deberta_dist.checkpoint.slices import check_table, shard_file_name
from deberta_dist.errors import NO_ROOM
from deberta_dist.files.atomic import remove, write_and_sync
from deberta_dist.files.disk import sync_directory
from deberta_dist.parallel.flat_layout import ShardState


@dataclass(frozen=True)
class WriteState:
    """How far this rank's file is.

    Attributes:
        status: ``idle`` when nothing was begun, else ``pending``, ``written`` (and forced to disk) or ``failed``.
        error: What went wrong, when it failed.
    """

    status: Literal["idle", "pending", "written", "failed"]
    error: str | None = None


@dataclass(frozen=True)
class _PendingWrite:
    step: int
    token: str
    temporary: Path
    thread: threading.Thread


class CheckpointWriter:
    """Writes one checkpoint at a time.

    Args:
        directory: ``<run>/checkpoints``, the same for all ranks; made when it is needed.
        rank: Global rank; each writes a file of its own, and rank 0 the manifest.
    """

    def __init__(self, directory: str | Path, *, rank: int) -> None:
        self.directory = Path(directory)
        self._rank = rank
        self._job: _PendingWrite | None = None
        self._state = WriteState("idle")

    @property
    def state(self) -> WriteState:
        """How far the file is. Does not wait."""
        return self._state

    def begin(self, step: int, *, shards: Sequence[ShardState], token: str) -> None:
        """Starts writing this rank's file. The one before has been committed, released or abandoned.

        Args:
            step: Optimizer steps done; names the checkpoint's directory.
            shards: ``WeightStore.copy_shards()``: host copies nobody changes any more.
            token: Letters and digits, the same on every rank of this run and different in another.
        """
        assert self._job is None, "commit or abandon the checkpoint before"
        assert token.isascii() and token.isalnum(), token
        temporary = temporary_directory(self.directory, step=step, token=token)
        self._state = WriteState("pending")
        # A daemon: a process that ends by an error must not wait for a disk that hangs. What it leaves has a dot and is swept.
        thread = threading.Thread(target=self._write, args=(temporary, list(shards)), name=f"checkpoint {step}", daemon=True)
        self._job = _PendingWrite(step=step, token=token, temporary=temporary, thread=thread)
        thread.start()

    def wait(self, *, timeout: float | None = None) -> WriteState:
        """Waits (seconds; None = as long as it takes) for the file and returns the state."""
        if self._job is not None:
            self._job.thread.join(timeout)
        return self._state

    def commit(self, manifest: Manifest, *, keep_last: int, keep_every: int = 0, damaged: Collection[Path] = ()) -> Path:
        """Makes the written files a checkpoint. For rank 0, when every rank has reported ``written``.

        Where the very same checkpoint exists already, it stays and the new files are dropped; another one in the
        place is replaced.

        Args:
            manifest: What the checkpoint says, ``files`` left empty.
            keep_last: Newest complete checkpoints that stay.
            keep_every: Steps that are multiples of it stay; 0 = none.
            damaged: Checkpoints known not to be whole: they do not count as kept.

        Returns:
            The checkpoint's directory.

        Raises:
            CheckpointWriteError: it could not be finished (disk full, a rank's file missing); the message says
                whether the checkpoint is there. Older ones are as they were.
        """
        job = self._job
        assert job is not None and self._state.status == "written" and job.step == manifest.step
        final = self.directory / step_name(job.step)
        # First of all: whatever fails from here on, the writer can begin the next checkpoint.
        self.release()
        path, content = job.temporary, b""
        try:
            manifest = dataclasses.replace(manifest, files=_collect(job.temporary, manifest))
            check_table(manifest.tensors, files=manifest.files, where=job.temporary)
            if not _is_same(final, manifest):
                path, content = job.temporary / MANIFEST_NAME, to_json(manifest)
                write_and_sync(path, content)
                for rank in range(_world_size(manifest)):
                    os.unlink(_note(job.temporary, rank))
                sync_directory(job.temporary)
                # The rename comes last: what has the final name is whole, whenever the process is killed.
                put_in_place(job.temporary, final, token=job.token)
        except CheckpointError as error:
            raise CheckpointWriteError(f"checkpoint {final} is not written: {error}") from error
        except OSError as error:
            raise CheckpointWriteError(_describe(error, Path(error.filename or path), needed=len(content))) from error
        finally:
            remove(job.temporary)
        try:
            # In this order: `latest` never names a checkpoint that has been removed.
            point_latest(self.directory, final.name)
            prune(self.directory, keep_last=keep_last, keep_every=keep_every, written=final, damaged=damaged)
        except OSError as error:
            raise CheckpointWriteError(
                f"checkpoint {final} is complete, but the checkpoints before it could not be pruned ({error})"
            ) from error
        return final

    def abandon(self) -> None:
        """Waits for this rank's file and removes it; the last rank to do so removes the directory."""
        job = self._job
        if job is None:
            return
        self.wait()
        self.release()
        _remove_own(job.temporary, self._rank)

    def release(self) -> None:
        """Leaves the written file to rank 0's commit. For all other ranks, when every rank has reported ``written``."""
        self._job, self._state = None, WriteState("idle")

    def _write(self, temporary: Path, shards: list[ShardState]) -> None:
        path, needed = temporary / shard_file_name(self._rank), 0
        try:
            needed = file_bytes(shards)
            temporary.mkdir(parents=True, exist_ok=True)
            entry = write_shard_file(path, shards)
            # After the file is on disk: a note stands for a file that is there in full.
            write_and_sync(_note(temporary, self._rank), json.dumps(vars(entry)).encode("ascii"))
            self._state = WriteState("written")
        except OSError as error:
            _remove_own(temporary, self._rank, with_directory=False)
            self._state = WriteState("failed", _describe(error, path, needed=needed))
        except Exception as error:
            # The end of a thread: whatever it was, the ranks must not wait for ever for this file.
            _remove_own(temporary, self._rank, with_directory=False)
            self._state = WriteState("failed", f"{path} is not written ({type(error).__name__}: {error})")


def _note(temporary: Path, rank: int) -> Path:
    """Where a rank leaves size and checksum of its file."""
    return temporary / f"rank-{rank:05d}.json"


def _world_size(manifest: Manifest) -> int:
    layout = manifest.layout
    return layout.tensor * layout.pipeline * layout.data


def _collect(temporary: Path, manifest: Manifest) -> dict[str, FileEntry]:
    """All ranks' notes, compared with the files as they lie there."""
    files: dict[str, FileEntry] = {}
    for rank in range(_world_size(manifest)):
        name, note = shard_file_name(rank), _note(temporary, rank)
        files[name] = file_entry(name, strict_json.parse(note.read_bytes(), file=note), where=str(note))
        # The note is one node's word; this node has to see the same file before it says that all is there.
        size = os.stat(temporary / name).st_size
        if size != files[name].bytes:
            raise CheckpointError(f"{temporary / name} has {size} bytes, its rank wrote {files[name].bytes}")
    return files


def _is_same(final: Path, manifest: Manifest) -> bool:
    """Whether a whole checkpoint with the same contents stands there, as one does that was saved and then rolled over."""
    if not final.is_dir():
        return False
    try:
        there = open_checkpoint(final).manifest
    except CheckpointVersionError:
        raise
    except CheckpointError:
        return False
    return strict_json.parse(to_json(there), file=final) == strict_json.parse(to_json(manifest), file=final)


def _remove_own(temporary: Path, rank: int, *, with_directory: bool = True) -> None:
    """Removes this rank's file and note, and the directory when nothing else is in it."""
    try:
        for path in (temporary / shard_file_name(rank), _note(temporary, rank)):
            path.unlink(missing_ok=True)
        if with_directory:  # not while another rank may be about to write into it
            temporary.rmdir()
    except OSError:
        pass  # other ranks' files, or a disk that is gone: the next start sweeps


def _describe(error: OSError, path: Path, *, needed: int) -> str:
    """What a user needs to know about a failed write; partial files have been removed."""
    text = f"{path} is not written ({error.strerror or error})"
    if error.errno not in NO_ROOM:
        return text
    existing = next(folder for folder in path.parents if folder.is_dir())
    free = shutil.disk_usage(existing).free
    return f"{text}: {needed} bytes are needed, {free} are free without it on {existing}; earlier checkpoints are whole"
