"""One run at a time in a run directory."""

import errno
import fcntl
import os
import resource
from pathlib import Path

import pytest

from deberta_dist.errors import ConfigError
from deberta_dist.files.lock import RunLock


def test_two_runs_on_one_directory(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run")
    with pytest.raises(ConfigError, match=rf'run is in use by another run .*"pid": {os.getpid()}, "started": "20'):
        RunLock(tmp_path / "run")
    lock.release()
    lock.release()
    with RunLock(tmp_path / "run") as again:
        assert again.is_held
    with RunLock(tmp_path / "run"):
        pass


def test_a_directory_that_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be written to"):
        RunLock(tmp_path / "file")

    def fail(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(ConfigError, match="file system without locks"):
        RunLock(tmp_path / "run")


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(ConfigError, match="run.directory = .* cannot be written to .*make room"):
            RunLock(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    RunLock(tmp_path / "run").release()
