"""The core runs where POSIX's own modules and calls are missing, as on Windows, and without what only extras bring."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from deberta_dist.files import disk
from deberta_dist.tasks.base import Release
from deberta_dist.tasks.superglue.benchmark import SUPERGLUE
from tests.conversion.small_models import FOLDER, export, make_model, published_tensors
from tests.tasks.conftest import write_release, write_run
from tests.test_architecture import PACKAGE, python_files

POSIX_MODULES = frozenset("fcntl grp posix pty pwd readline resource syslog termios tty".split())
POSIX_CALLS = {
    "os": frozenset(
        """chown chroot confstr ctermid eventfd fchdir fchmod fchown fork forkpty fpathconf getegid geteuid getgid getgroups
        getloadavg getpgid getpgrp getpriority getresuid getsid getuid initgroups killpg lchown lockf major makedev minor
        mkfifo mknod nice openpty pathconf pipe2 posix_fadvise posix_fallocate posix_spawn pread preadv pwrite pwritev
        register_at_fork sched_getaffinity sched_setaffinity sched_yield sendfile setegid seteuid setgid setpgid setpriority
        setsid setuid statvfs sync sysconf tcgetpgrp uname wait wait3 wait4 waitid O_ASYNC O_CLOEXEC O_DIRECT O_DIRECTORY
        O_DSYNC O_NOATIME O_NOFOLLOW O_NONBLOCK O_PATH O_SYNC O_TMPFILE SCHED_OTHER kill""".split()
    ),
    "signal": frozenset(
        """SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2 SIGWINCH alarm getitimer
        pause pthread_kill pthread_sigmask setitimer siginterrupt sigpending sigtimedwait sigwait sigwaitinfo SIG_BLOCK
        SIG_SETMASK SIG_UNBLOCK""".split()
    ),
}
# Path -> why. Each asks whether the system has the call before it is made.
ASKS_FIRST = {
    f"{PACKAGE}/files/disk.py": POSIX_CALLS["os"],
    f"{PACKAGE}/preparation/pipeline/workers.py": POSIX_CALLS["signal"],
}
# Nothing of what `pip install deberta_dist` brings without an extra.
ONLY_EXTRAS = ("deepspeed", "scipy", "transformers", "mpi4py", "pyarrow", "zstandard", "rensa", "onnx", "sklearn", "peft")
# Measurements are made on Linux.
LINUX_ONLY = ("benchmarks/", f"{PACKAGE}/operations/")


def posix_only(text: str) -> set[str]:
    """POSIX's modules and calls in a program, e.g. {"fcntl", "os.fork"}."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [f"{node.value.id}.{node.attr}"]
        for name in names:
            room, _, call = name.partition(".")
            if room in POSIX_MODULES or call in POSIX_CALLS.get(room, ()):
                found.add(name)
    return found


def test_only_a_short_list_asks_for_posix() -> None:
    found = {}
    for path in python_files(FOLDER):
        here = path.relative_to(FOLDER).as_posix()
        if not here.startswith(LINUX_ONLY):
            names = set(posix_only(path.read_text(encoding="utf-8")))
            names -= {f"{room}.{call}" for room, calls in POSIX_CALLS.items() for call in calls & ASKS_FIRST.get(here, set())}
            found |= {here: names} if names else {}
    assert found == {}


def test_the_search_finds_what_it_is_for() -> None:
    text = "import fcntl\nfrom os import fork\nimport os, signal\nos.O_DIRECTORY\nsignal.SIGKILL\nos.open\nsignal.SIGTERM"
    assert posix_only(text) == {"fcntl", "os.fork", "os.O_DIRECTORY", "signal.SIGKILL"}


WINDOWS = """
import os, runpy, shutil, signal, sys, tempfile
import torch, filelock  # whose own ways around are not what is tried here
for name in {modules!r}:
    sys.modules[name] = None
for module, names in ((os, {calls!r}), (signal, {signals!r})):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
shutil._use_fd_functions = tempfile._O_TMPFILE_WORKS = False
opened, renamed = os.open, os.rename
def open_file(path, flags, *rest, **more):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return opened(path, flags, *rest, **more)
def rename(a, b, **more):
    if os.path.lexists(b):
        raise FileExistsError(17, "File exists", str(b))
    renamed(a, b, **more)
os.open, os.rename = open_file, rename
sys.path.insert(0, {root!r})
import json
for arguments in {commands!r}:
    sys.argv = arguments
    try:
        runpy.run_path(os.path.join({root!r}, "tools", arguments[0]), run_name="__main__")
    except SystemExit as stop:
        print("exit", stop.code, flush=True)
print("torch's compiler is", "there" if "torch._dynamo" in sys.modules else "missing")
"""


def run_on_windows(commands: list[list[str]], *, cwd: Path) -> str:
    """What tools print where POSIX's modules and calls are missing."""
    # The library itself asks for these; Windows has the first.
    calls = POSIX_CALLS["os"] - {"kill", "register_at_fork", "statvfs", "uname"}
    program = WINDOWS.format(
        modules=[*sorted(POSIX_MODULES - {"posix"}), *ONLY_EXTRAS], calls=sorted(calls), signals=sorted(POSIX_CALLS["signal"]),
        root=str(FOLDER), commands=commands,
    )  # fmt: skip
    run = subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and run.stdout.count("exit 0") == len(commands), run.stdout + run.stderr
    return run.stdout


def test_conversion_where_posix_is_missing(tmp_path: Path) -> None:
    model = make_model("v2")
    export(model, tmp_path / "source")
    commands = [
        ["convert_checkpoint.py", "source", "hf", "--to", "huggingface"],
        ["convert_checkpoint.py", "hf", "ms", "--to", "official", "--report", "report.json"],
        ["convert_checkpoint.py", "ms", "hf", "--to", "deberta_dist", "--force"],
        ["inspect_checkpoint.py", "hf", "--diff", "source"],
        ["train_tokenizer.py", "--input", "text.txt", "--output", "spm.model", "--vocab-size", "60"],
        ["fill_mask.py", "source", "sentence [MASK] .", "--tokenizer", "spm.model", "--top", "1"],
    ]
    (tmp_path / "text.txt").write_text("".join(f"sentence {i} of another text {i * i}\n" for i in range(400)), encoding="utf-8")
    shown = run_on_windows(commands, cwd=tmp_path)
    assert "torch's compiler is missing" in shown, "importing it takes longer than a small conversion"
    assert "mask 1: " in shown
    assert f"{len(published_tensors(model))} tensors are equal bit for bit, 0 have other numbers" in shown


def test_scores_and_submissions_where_posix_is_missing(tmp_path: Path) -> None:
    data = write_release(tmp_path / "data")
    release = Release(data, SUPERGLUE)
    for name, first in (("ours/seed-1", 0.6), ("ours/seed-2", 0.7), ("theirs/seed-1", 0.4), ("theirs/seed-2", 0.6)):
        write_run(tmp_path / name, release, first=first)
    commands = [
        ["report_scores.py", "--predictions", "ours", "--against", "theirs", "--data", "data"],
        ["make_submission.py", "--predictions", "ours", "--data", "data", "--out", "s.zip", "--partial"],
    ]
    shown = run_on_windows(commands, cwd=tmp_path)
    assert "BoolQ" in shown and (tmp_path / "s.partial.zip").is_file()


@pytest.mark.slow  # the same imports as a conversion; the calls of each room are found by the search above
def test_preparation_where_posix_is_missing(tmp_path: Path) -> None:
    texts = [{"text": f"sentence {i} of the text, and another word {i * i}"} for i in range(400)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    commands = [
        ["train_tokenizer.py", "--input", "text.jsonl", "--output", "spm.model", "--vocab-size", "80"],
        ["prepare_corpus.py", "--input", "text.jsonl", "--output", "corpus", "--tokenizer", "spm.model"],
        ["inspect_corpus.py", "corpus/train", "--tokenizer", "spm.model"],
    ]
    run_on_windows(commands, cwd=tmp_path)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(22, "Invalid argument")])
def test_a_directory_that_cannot_be_forced_to_disk(error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise error

    for call in ("fsync", "open"):
        with monkeypatch.context() as patched:
            patched.setattr(disk.os, call, fail)
            disk.sync_directory(tmp_path)
    monkeypatch.setattr(disk.os, "fsync", lambda file: fail_with(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        disk.sync_directory(tmp_path)


def fail_with(error: OSError) -> None:
    raise error


def test_bytes_at_a_place_without_the_calls_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    file = disk.open_file(path, disk.os.O_RDWR)
    for is_posix in (True, False):
        if not is_posix:
            monkeypatch.delattr(disk.os, "pread")
            monkeypatch.delattr(disk.os, "pwrite")
        disk.write_at(file, b"ab", 3)
        assert disk.read_at(file, 4, 2) == b"2ab5"
        disk.write_at(file, b"34", 3)
    disk.os.close(file)
