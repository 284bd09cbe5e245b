"""A process that is killed at every single step of writing: no torn checkpoint is ever picked."""

import dataclasses
import hashlib
import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deberta_dist.checkpoint.find import newest_complete
from deberta_dist.checkpoint.publish import sweep
from deberta_dist.checkpoint.writer import CheckpointWriter
from deberta_dist.files.lock import RunLock
from tests.checkpoint.test_slices import Case, assert_readable, known_tensors, write_checkpoint

CASE = Case(data=2, model="v1")
READER = Case(tensor=2, model="v1")
CALLS = ("open", "write", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir")
OLD, AFTER = 50, 100
# Step -> what its numbers start from: other checkpoints have other numbers.
OFFSETS = {OLD: 5000, AFTER: 0}
EARLIER = 9000


def _save(directory: Path, *, before_commit: Callable[[], None] = lambda: None) -> None:
    """Step 100 as two ranks and their commit would write it, one after another, pruning what is older."""
    writers = [CheckpointWriter(directory, rank=rank) for rank in range(2)]
    for rank, writer in enumerate(writers):
        writer.begin(AFTER, shards=CASE.shards(known_tensors("v1"), rank), token="new")
        assert writer.wait().status == "written", writer.state
    before_commit()
    writers[0].commit(CASE.manifest(AFTER), keep_last=1)


def _killed_at(point: int) -> None:
    """From now on, the ``point``-th call that changes the disk is this process's last; a write is done by half."""
    count = itertools.count(1)

    def trap(real: Callable) -> Callable:
        def call(*arguments, **options):
            if next(count) == point:
                if real is real_write:
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    real_write = os.write
    for name in CALLS:
        setattr(os, name, trap(getattr(os, name)))


def _run_child(directory: Path, point: int, *, only_commit: bool) -> bool:
    """Saves in a process that dies at ``point`` (of the commit); False when it came to the end before."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if only_commit:
                _save(directory, before_commit=lambda: _killed_at(point))
            else:
                _killed_at(point)
                _save(directory)
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


def _fresh(directory: Path) -> None:
    write_checkpoint(directory, CASE, step=OLD, offset=OFFSETS[OLD])


def _over_damaged(directory: Path) -> None:
    _fresh(directory)
    path = write_checkpoint(directory, CASE, step=AFTER, offset=EARLIER)
    (path / "rank-00001.safetensors").write_bytes(b"torn")


def _over_other_state(directory: Path) -> None:
    _fresh(directory)
    writers = [CheckpointWriter(directory, rank=rank) for rank in range(2)]
    for rank, writer in enumerate(writers):
        writer.begin(AFTER, shards=CASE.shards(known_tensors("v1", EARLIER), rank), token="earlier")
        writer.wait()
    writers[0].commit(dataclasses.replace(CASE.manifest(AFTER), consumed_samples=1), keep_last=2)


def _over_same_state(directory: Path) -> None:
    """Killed between the rename and ``latest``, then saved again."""
    _fresh(directory)
    write_checkpoint(directory, CASE, step=AFTER)
    (directory / "latest").write_text("step-00000050\n")


def _check_picked(directory: Path, known: set[tuple[int, str]]) -> int:
    """Step of the checkpoint that is picked, all of whose numbers are read, unless files of the same bytes have been."""
    reader = newest_complete(directory, on_skip=lambda message: None)
    assert reader is not None
    step = reader.manifest.step
    offset = EARLIER if reader.manifest.consumed_samples == 1 else OFFSETS[step]
    files = sorted(reader.directory.iterdir())
    content = hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()
    if (offset, content) not in known:
        assert_readable(reader, READER, known_tensors("v1", offset))
        known.add((offset, content))
    return step


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """A directory in memory: a killed process does not need a disk, and forcing files to one takes its time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as directory:
        yield Path(directory)


@pytest.mark.parametrize("prepare", [_fresh, _over_damaged, _over_other_state, _over_same_state])
def test_every_point_of_death(memory_path: Path, prepare: Callable[[Path], None]) -> None:
    start = memory_path / "start"
    prepare(start)
    before = newest_complete(start, on_skip=lambda message: None).manifest.step
    READER.layout, CASE.table  # noqa: B018  made once, before the processes part
    picked, known = [], set()
    for point in itertools.count(1):
        directory = memory_path / f"point-{point}" / "checkpoints"
        shutil.copytree(start, directory)
        # Until the commit nothing depends on what is there already.
        if not _run_child(directory, point, only_commit=prepare is not _fresh):
            break
        picked.append(_check_picked(directory, known))
        with RunLock(directory.parent) as lock:
            sweep(directory, lock=lock)
        # What an earlier start had saved is there again, also when it died while replacing it.
        assert newest_complete(directory, on_skip=print).manifest.step >= max(before, picked[-1])
        assert not [path.name for path in directory.iterdir() if path.name.startswith(".")]
        if point % 5 == 0:
            _save(directory)
            assert _check_picked(directory, known) == AFTER
            assert sorted(path.name for path in directory.iterdir()) == ["latest", "step-00000100"]
        shutil.rmtree(directory)
    assert len(picked) > (40 if prepare is _fresh else 15)
    assert picked == sorted(picked) or before == AFTER
    assert picked[-1] == AFTER
