"""Files and directories under their names: complete or absent, whatever goes wrong in between."""

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from deberta_dist.errors import DataError
from deberta_dist.files import atomic
from deberta_dist.files.atomic import new_file, replace_directory, replace_file, sync_files

CALLS = ("replace", "rename", "fsync", "write", "link")


class Stopped(BaseException):
    """Neither an error nor one that any handler expects, as a signal's handler raises it."""


def make_directory(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


def test_replacing_leaves_the_new_content_and_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "name"
    for content in (b"old", b"new"):
        replace_file(path, content)
        assert path.read_bytes() == content and os.listdir(tmp_path) == ["name"]
    for text in ("old", "new"):
        made = make_directory(tmp_path / ".made", text)
        sync_files(made)
        replace_directory(made, tmp_path / "folder", aside=tmp_path / ".aside")
        assert (tmp_path / "folder/file").read_text() == text and sorted(os.listdir(tmp_path)) == ["folder", "name"]


@pytest.fixture(params=[OSError(errno.ENOSPC, "No space left on device"), Stopped()], ids=["full", "signal"])
def failure(request: pytest.FixtureRequest) -> BaseException:
    return request.param


def stopped_at_each_call(monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> Iterator[str]:
    """Makes one call after the other fail, each once; the names of the calls."""
    for name in CALLS:
        with monkeypatch.context() as patch:
            real, calls = getattr(os, name), []

            def call(*arguments, name=name, real=real, calls=calls):
                calls.append(name)
                if len(calls) == 1:
                    raise failure
                return real(*arguments)

            patch.setattr(atomic.os, name, call)
            yield name


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
    path = tmp_path / "name"
    path.write_bytes(b"old")
    failed = []
    for name in stopped_at_each_call(monkeypatch, failure):
        try:
            replace_file(path, b"new")
        except type(failure):
            failed.append(name)
            assert path.read_bytes() in (b"old", b"new")
        else:
            assert path.read_bytes() == b"new"
            path.write_bytes(b"old")
        assert os.listdir(tmp_path) == ["name"]
    assert failed == ["replace", "fsync", "write"]


def test_a_directory_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each of the two renames."""
    final, aside = make_directory(tmp_path / "name", "old"), tmp_path / ".aside"
    for failing in (1, 2):
        made = make_directory(tmp_path / ".made", "new")
        with monkeypatch.context() as patch:
            real, calls = os.rename, []

            def rename(source: Path, target: Path, *, failing=failing, real=real, calls=calls) -> None:
                calls.append(target)
                if len(calls) == failing:
                    raise Stopped
                real(source, target)

            patch.setattr(atomic.os, "rename", rename)
            with pytest.raises(Stopped):
                replace_directory(made, final, aside=aside)
        assert (final / "file").read_text() == "old" and sorted(os.listdir(tmp_path)) == [".made", "name"]
        atomic.remove(made)


def test_what_is_in_the_place_by_then_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "name"
    with pytest.raises(DataError, match="exists already"), new_file(path) as file:
        file.write(b"ours")
        path.write_bytes(b"theirs")
    assert path.read_bytes() == b"theirs" and os.listdir(tmp_path) == ["name"]


def test_a_full_disk_is_said_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EDQUOT, "Disk quota exceeded")))
    with pytest.raises(DataError, match=r"name is not written \(Disk quota exceeded\): make room"), new_file(tmp_path / "name"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "name"
    path.write_bytes(b"old")
    child = os.fork()
    if child == 0:
        atomic.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        replace_file(path, b"new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert [left.read_bytes() for left in tmp_path.glob(".name.*.tmp")] == [b"new"]
