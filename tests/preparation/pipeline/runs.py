"""Starts tools/prepare_corpus.py, alone or under mpirun, waits for a moment of its work, and sees who is left."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOOL = Path(__file__).parents[3] / "tools" / "prepare_corpus.py"
SECONDS = 60.0
# The algebra library reserves memory for every core.
_ENVIRONMENT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OPENBLAS_NUM_THREADS": "1"}


def mpirun() -> str | None:
    """The mpirun beside the interpreter, or else that of the system."""
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else shutil.which("mpirun")


def wait_until(condition: Callable[[], Any], *, what: str) -> None:
    """Looks every millisecond; a test that waits in vain fails."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {SECONDS} s in vain: {what}"
        time.sleep(0.001)


def children(pid: int) -> list[int]:
    """Living processes that a process has started."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue
        if fields[:1] != ["Z"] and fields[1:2] == [str(pid)]:
            found.append(int(entry.name))
    return sorted(found)


def descendants(pid: int) -> list[int]:
    """Its children and theirs."""
    return [one for child in children(pid) for one in (child, *descendants(child))]


def is_alive(pid: int) -> bool:
    """Whether a process is there, and no corpse."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@dataclass
class Start:
    """One start of the tool, in a process group of its own; a context manager.

    Attributes:
        output: its --output.
        arguments: the others.
        num_ranks: of mpirun; None: it is started without.
        memory_bytes: addresses that each process may have; None: any.
    """

    output: Path
    arguments: list[Any]
    num_ranks: int | None = None
    memory_bytes: int | None = None
    _process: subprocess.Popen = field(init=False)
    _family: list[int] = field(init=False, default_factory=list)

    def __enter__(self) -> "Start":
        words = [one if isinstance(one, bytes) else str(one) for one in self.arguments]
        command = [sys.executable, str(TOOL), *words, "--output", str(self.output)]
        if self.num_ranks is not None:
            command = [str(mpirun()), "-n", str(self.num_ranks), "--oversubscribe", *command]
        if self.memory_bytes is not None:
            command = ["sh", "-c", f'ulimit -v {self.memory_bytes >> 10}; exec "$@"', "sh", *command]
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, **_ENVIRONMENT},
            # In the background of a script it is ignored, and that is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        return self

    def __exit__(self, *error: Any) -> None:
        for pid in {self._process.pid, *self._family, *descendants(self._process.pid)}:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        self._process.communicate(timeout=SECONDS)

    @property
    def pid(self) -> int:
        """Of the tool, or of mpirun."""
        return self._process.pid

    def when(self, condition: Callable[[], Any], *, what: str) -> list[int]:
        """Waits for a moment and halts the tool until ``send``; mpirun goes on. Returns its processes."""
        wait_until(lambda: condition() or self._process.poll() is not None, what=what)
        if self.num_ranks is None:
            os.killpg(self._process.pid, signal.SIGSTOP)
        if self._process.poll() is not None:
            if self.num_ranks is None:
                os.killpg(self._process.pid, signal.SIGCONT)  # a halted helper process would keep the pipes open
            raise AssertionError(f"ended before {what}: {self._process.communicate(timeout=SECONDS)[1].decode()}")
        self._family = descendants(self._process.pid)
        return self._family

    def send(self, number: int, *, pid: int | None = None, group: bool = False) -> None:
        """A signal for the tool (or mpirun), for one process, or for all of the group, as a terminal sends it."""
        if group:
            os.killpg(self._process.pid, number)
        else:
            os.kill(self._process.pid if pid is None else pid, number)
        os.killpg(self._process.pid, signal.SIGCONT)

    def end(self) -> tuple[int, str, str]:
        """Waits for its end, and for that of every process seen by ``when``: exit code, standard output and errors."""
        output, errors = self._process.communicate(timeout=SECONDS)
        wait_until(lambda: not any(map(is_alive, self._family)), what="orphans to end")
        return self._process.returncode, output.decode(), errors.decode()


def parts_of(output: Path) -> dict[str, tuple[int, int]]:
    """Finished parts of an unfinished corpus: inode and time of change of each."""
    found = {}
    for path in (output / ".work" / "parts").glob("[!.]*.part"):
        status = path.stat()
        found[path.name] = (status.st_ino, status.st_mtime_ns)
    return found


def shards_of(output: Path) -> dict[str, tuple[int, int]]:
    """Finished token files of an unfinished corpus, as ``parts_of``."""
    found = {}
    for path in _shard_paths(output):
        status = path.stat()
        found[str(path)] = (status.st_ino, status.st_mtime_ns)
    return found


def num_shards(output: Path) -> int:
    """How many ``shards_of`` finds, while they are being made."""
    return len(_shard_paths(output))


def _shard_paths(output: Path) -> list[Path]:
    return list((output / ".work").glob("*/output/*/[!.]*.tokens"))
