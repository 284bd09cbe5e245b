"""Committing, saving a step again, pruning, disks that are full, locks."""

import dataclasses
import errno
import os
import resource
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from deberta_dist.checkpoint import shard_file
from deberta_dist.checkpoint import writer as writer_module
from deberta_dist.checkpoint.errors import CheckpointWriteError
from deberta_dist.checkpoint.find import checkpoints, newest_complete
from deberta_dist.checkpoint.publish import sweep
from deberta_dist.checkpoint.reader import open_checkpoint
from deberta_dist.checkpoint.writer import CheckpointWriter
from deberta_dist.files.lock import RunLock
from tests.checkpoint.test_slices import Case, assert_readable, known_tensors, write_checkpoint

CASE = Case(data=2)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def begin(directory: Path, *, step: int = 100, offset: int = 0, case: Case = CASE) -> list[CheckpointWriter]:
    """All ranks' writers, their files begun."""
    writers = [CheckpointWriter(directory, rank=rank) for rank in range(case.shape.world_size)]
    for rank, writer in enumerate(writers):
        writer.begin(step, shards=case.shards(known_tensors("v2", offset), rank), token="abc")
    return writers


def test_a_checkpoint_appears_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    real = shard_file.file_header
    monkeypatch.setattr(shard_file, "file_header", lambda shards: (go.wait(), real(shards))[1])
    writers = begin(tmp_path)
    assert {writer.state.status for writer in writers} == {"pending"}
    assert writers[0].wait(timeout=0.01).status == "pending"
    go.set()
    assert {writer.wait().status for writer in writers} == {"written"}
    assert checkpoints(tmp_path) == [] and newest_complete(tmp_path, on_skip=print) is None
    path = writers[0].commit(CASE.manifest(), keep_last=2)
    assert path == tmp_path / "step-00000100"
    assert names(path) == ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"]
    assert names(tmp_path) == ["latest", "step-00000100"]
    assert (tmp_path / "latest").read_text() == "step-00000100\n"
    manifest = open_checkpoint(path).manifest
    assert dataclasses.replace(manifest, files={}, model_config={}) == dataclasses.replace(CASE.manifest(), model_config={})
    assert writers[0].state.status == "idle"


def test_abandoned_by_all_nothing_is_left(tmp_path: Path) -> None:
    writers = begin(tmp_path / "checkpoints")
    for writer in writers:
        writer.abandon()
        writer.abandon()
        assert writer.state.status == "idle"
    assert names(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("missing", ["rank-00001.json", "rank-00001.safetensors"])
def test_a_commit_without_a_rank_is_refused(tmp_path: Path, missing: str) -> None:
    write_checkpoint(tmp_path, CASE, step=50)
    writers = begin(tmp_path)
    for writer in writers:
        writer.wait()
    (tmp_path / ".tmp-step-00000100-abc" / missing).unlink()
    with pytest.raises(CheckpointWriteError, match="is not written"):
        writers[0].commit(CASE.manifest(), keep_last=1)
    assert names(tmp_path) == ["latest", "step-00000050"]
    open_checkpoint(tmp_path / "step-00000050")


def test_the_same_state_again_is_done_already(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, CASE)
    inode = path.stat().st_ino
    assert write_checkpoint(tmp_path, CASE) == path
    assert path.stat().st_ino == inode and names(tmp_path) == ["latest", "step-00000100"]


def test_the_same_counts_with_other_numbers_are_replaced(tmp_path: Path) -> None:
    """Another run's, that somebody has left in the directory."""
    path = write_checkpoint(tmp_path, CASE)
    write_checkpoint(tmp_path, CASE, offset=1000)
    assert_readable(open_checkpoint(path), Case(), known_tensors("v2", 1000))
    assert names(tmp_path) == ["latest", "step-00000100"]


def test_a_damaged_one_in_the_place_is_replaced(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, CASE)
    (path / "rank-00001.safetensors").write_bytes(b"")
    write_checkpoint(tmp_path, Case(tensor=2))
    assert_readable(open_checkpoint(path), Case(pipeline=2), known_tensors("v2"))
    assert names(tmp_path) == ["latest", "step-00000100"]


def test_another_state_in_the_place_is_replaced(tmp_path: Path) -> None:
    """After a rollback the same step comes again with other data behind it."""
    path = write_checkpoint(tmp_path, CASE)
    writers = begin(tmp_path, offset=1000)
    for writer in writers:
        writer.wait()
    writers[0].commit(dataclasses.replace(CASE.manifest(), consumed_samples=5), keep_last=2)
    assert_readable(open_checkpoint(path), Case(), known_tensors("v2", 1000))
    assert names(tmp_path) == ["latest", "step-00000100"]


@pytest.mark.parametrize("in_the_way", ["file", "empty", "full"])
def test_anything_in_the_place_is_replaced(tmp_path: Path, in_the_way: str) -> None:
    place = tmp_path / "step-00000100"
    if in_the_way == "file":
        place.write_text("x")
    else:
        place.mkdir()
    if in_the_way == "full":
        (place / "x").mkdir()
    open_checkpoint(write_checkpoint(tmp_path, CASE))
    assert names(tmp_path) == ["latest", "step-00000100"]


def test_pruning(tmp_path: Path) -> None:
    for step in range(10, 100, 10):
        write_checkpoint(tmp_path, Case(), step=step)
    (tmp_path / "step-00000080" / "rank-00000.safetensors").unlink()
    (tmp_path / "step-00000020" / "manifest.json").unlink()
    writer = begin(tmp_path, case=Case())[0]
    writer.wait()
    writer.commit(Case().manifest(), keep_last=3, keep_every=40)
    # 100, 90 and 70 are the newest complete ones; 80 is not whole and younger than they are; 40 is a fortieth.
    assert [int(path.name[5:]) for path in checkpoints(tmp_path)] == [100, 90, 80, 70, 40]
    assert names(tmp_path)[0] == "latest"


def test_what_is_known_to_be_damaged_does_not_count(tmp_path: Path) -> None:
    for step in (50, 60, 98, 99):
        write_checkpoint(tmp_path, Case(), step=step)
    writer = begin(tmp_path, case=Case())[0]
    writer.wait()
    damaged = {tmp_path / "step-00000098", tmp_path / "step-00000099"}
    writer.commit(Case().manifest(), keep_last=2, damaged=damaged)
    assert [int(path.name[5:]) for path in checkpoints(tmp_path)] == [100, 99, 98, 60]


def test_the_one_just_written_stays_beside_later_ones(tmp_path: Path) -> None:
    for step in (200, 300):
        write_checkpoint(tmp_path, Case(), step=step)
    write_checkpoint(tmp_path, Case(), step=100, keep_last=1)
    assert [int(path.name[5:]) for path in checkpoints(tmp_path)] == [300, 100]


def test_sweep(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, CASE)
    for name in (".tmp-step-00000200-x", ".gone-step-00000001", ".old-step-00000100-x", ".old-step-00000050-x"):
        shutil.copytree(path, tmp_path / name)
    (tmp_path / ".tmp-latest").write_text("x")
    (tmp_path / ".hidden").write_text("somebody's")
    said: list[str] = []
    with RunLock(tmp_path.parent / "run") as lock:
        sweep(tmp_path / "nowhere", lock=lock)
        sweep(tmp_path, lock=lock, on_remove=said.append)
    assert names(tmp_path) == [".hidden", "latest", "step-00000050", "step-00000100"]
    assert len(said) == 5


class _FullDisk:
    """``os.write`` that fails for files whose name contains ``part``."""

    def __init__(self, part: str) -> None:
        self.part, self.real = part, os.write

    def __call__(self, file: int, content: bytes) -> int:
        if self.part in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.real(file, content)


def test_full_disk_while_ranks_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, CASE, step=50)
    monkeypatch.setattr(os, "write", _FullDisk("rank-00001.safetensors"))
    writers = begin(tmp_path)
    good, bad = (writer.wait() for writer in writers)
    assert (good.status, good.error, bad.status) == ("written", None, "failed")
    for words in (
        f"{tmp_path}/.tmp-step-00000100-abc/rank-00001.safetensors",
        "No space left",
        " bytes are needed, ",
        " are free",
    ):
        assert words in bad.error
    for writer in writers:
        writer.abandon()
    assert names(tmp_path) == ["latest", "step-00000050"]
    monkeypatch.undo()
    open_checkpoint(write_checkpoint(tmp_path, CASE))


@pytest.mark.parametrize("part", ["manifest.json", ".tmp-latest"])
def test_full_disk_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    write_checkpoint(tmp_path, CASE, step=50)
    writers = begin(tmp_path)
    for writer in writers:
        writer.wait()
    monkeypatch.setattr(os, "write", _FullDisk(part))
    with pytest.raises(CheckpointWriteError, match="No space left") as caught:
        writers[0].commit(CASE.manifest(), keep_last=1)
    assert caught.value.exit_code == 74
    whole = newest_complete(tmp_path, on_skip=print).manifest.step
    assert ("is complete, but" in str(caught.value), whole) in ((False, 50), (True, 100))
    assert (whole == 100) == (part == ".tmp-latest")
    monkeypatch.undo()
    open_checkpoint(write_checkpoint(tmp_path, CASE, step=150, keep_last=1))
    assert names(tmp_path) == ["latest", "step-00000150"]


def test_any_other_fault_is_reported_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, shards: object) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(writer_module, "write_shard_file", fail)
    state = begin(tmp_path)[0].wait()
    assert state.status == "failed" and "MemoryError: no memory" in state.error


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        state = begin(tmp_path)[0].wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert state.status == "failed" and "File too large" in state.error and "bytes are needed" in state.error


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """On a file system of 1 MiB of its own, where one checkpoint of 280 kB fits twice but not four times."""
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from tests.checkpoint.test_writer import CASE, begin, names
        from tests.checkpoint.test_slices import write_checkpoint
        from deberta_dist.checkpoint.find import newest_complete
        directory = Path(sys.argv[1])
        for step in range(1, 100):
            writers = begin(directory, step=step)
            states = [writer.wait() for writer in writers]
            if any(state.status == "failed" for state in states):
                break
            writers[0].commit(CASE.manifest(step), keep_last=100)
        for writer in writers:
            writer.abandon()
        assert step > 1
        assert newest_complete(directory, on_skip=print).manifest.step == step - 1
        assert not [name for name in names(directory) if name.startswith(".")], names(directory)
        print(next(state.error for state in states if state.error))
        """
    )
    command = f'mount -t tmpfs -o size=1m none "$1" && exec "{sys.executable}" -c "$2" "$1"'
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Urm", "true"], check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", command, "sh", str(tmp_path), program],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "No space left on device" in done.stdout and "bytes are needed" in done.stdout
