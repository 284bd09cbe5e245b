"""Starts the ranks of a multi-process test and collects what they return; runs a script as Python would.

Ranks are forked from one server that has imported torch and deepspeed already, which saves seconds per rank;
they meet through a file, and a rank that dies or hangs ends the test with its traceback.
"""

import io
import multiprocessing as mp
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any

TIMEOUT_SECONDS = 240


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT_SECONDS) -> list[Any]:
    """Runs ``function(*arguments)`` on every rank of a gloo world and returns the results by rank.

    Args:
        world_size: Number of processes.
        function: A module-level function; inside it the process group does not exist yet, but the
            environment is a launcher's and MEETING_FILE names the rendezvous.
        arguments: Picklable.
        timeout: Seconds until everything is killed and the test fails.
    """
    context = _server()
    with tempfile.TemporaryDirectory() as directory:
        rendezvous_file = str(Path(directory) / "meeting")
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            context.Process(
                target=_rank_main, args=(rank, world_size, rendezvous_file, pipes[rank][1], function, arguments), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for _, sender in pipes:
            sender.close()
        try:
            return _collect(ranks, [receiver for receiver, _ in pipes], time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.kill()
            for process in ranks:
                process.join()


def run_script(
    words: Sequence[object], *, cwd: Path | str = ".", env: Mapping[str, str] | None = None, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """What ``subprocess.run([sys.executable, *words])`` captures, without the seconds in which Python imports torch.

    The process is forked from the server, so what the script may not import is not seen here.

    Args:
        words: The script's path and its arguments.
        cwd: Where it runs.
        env: All of its environment; None: this process's.
        timeout: Seconds.

    Raises:
        subprocess.TimeoutExpired: The script was killed.
    """
    with tempfile.TemporaryDirectory() as directory:
        output, errors = Path(directory) / "output", Path(directory) / "errors"
        with output.open("wb") as to_output, errors.open("wb") as to_errors:
            process = ForkedPython([sys.executable, *words], cwd=cwd, env=env, stdout=to_output, stderr=to_errors)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired as late:
            process.kill()
            process.wait()
            late.output, late.stderr = output.read_text(), errors.read_text()
            raise
        return subprocess.CompletedProcess(process.args, code, output.read_text(), errors.read_text())


class ForkedPython:
    """What ``subprocess.Popen`` is for ``[sys.executable, script or -m module, ...]``, forked from the server.

    Whatever the environment says to the interpreter or the C library at their start, it says too late.

    Args:
        command: The interpreter, then a script's path or -m and a module's name, then arguments.
        cwd: Where it runs; None: here.
        env: All of its environment; None: this process's.
        stdin: None: nothing to read; PIPE.
        stdout: An open file, or PIPE.
        stderr: An open file, or STDOUT.
        text: Whether pipes are of text.
    """

    def __init__(
        self,
        command: Sequence[object],
        *,
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: int | None = None,
        stdout: IO[Any] | int,
        stderr: IO[Any] | int,
        text: bool = False,
    ) -> None:
        self.args = [str(word) for word in command]
        opened: list[int] = []
        to_child, self.stdin = self._pipe(opened, writes=True, text=text) if stdin == subprocess.PIPE else (None, None)
        if stdout == subprocess.PIPE:
            output, self.stdout = self._pipe(opened, writes=False, text=text)
        else:
            output, self.stdout = stdout.fileno(), None
        errors = output if stderr == subprocess.STDOUT else stderr.fileno()
        environment = dict(os.environ if env is None else env)
        streams = (to_child, output, errors)
        self._process = _server().Process(
            target=_python_main, args=(self.args[1:], str(cwd or os.getcwd()), environment, _Streams(streams)), daemon=True
        )
        self._process.start()
        for descriptor in opened:
            os.close(descriptor)

    @staticmethod
    def _pipe(opened: list[int], *, writes: bool, text: bool) -> tuple[int, IO[Any]]:
        reading, writing = os.pipe()
        ours, theirs = (writing, reading) if writes else (reading, writing)
        opened.append(theirs)
        stream = io.open(ours, "wb" if writes else "rb")
        return theirs, io.TextIOWrapper(stream, encoding="utf-8", write_through=writes) if text else stream

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


def free_port() -> int:
    """A port for ranks that meet as a launcher's do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _server() -> mp.context.ForkServerContext:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    return context


class _Streams:
    """Standard input, output and errors of a process that is being started; no input is the null device."""

    def __init__(self, descriptors: tuple[int | None, int, int]) -> None:
        self._descriptors = descriptors

    def __getstate__(self) -> list[Any]:
        return [None if descriptor is None else DupFd(descriptor) for descriptor in self._descriptors]

    def __setstate__(self, sent: list[Any]) -> None:
        null = os.open(os.devnull, os.O_RDONLY)
        self._descriptors = tuple(null if one is None else one.detach() for one in sent)

    def take(self) -> None:
        """Makes them this process's."""
        for number, descriptor in enumerate(self._descriptors):
            os.dup2(descriptor, number)
        for descriptor in set(self._descriptors):
            os.close(descriptor)


def _python_main(words: list[str], cwd: str, env: dict[str, str], streams: _Streams) -> None:
    streams.take()
    # The server's are closed or another's.
    sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


def _collect(ranks: list[mp.Process], receivers: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while len(results) + len(failures) < len(ranks):
        waiting = [r for rank, r in enumerate(receivers) if rank not in results and rank not in failures]
        # After a first failure the others are given a moment only: they may wait for the dead for ever.
        patience = deadline - time.monotonic() if not failures else 3.0
        ready = mp.connection.wait(waiting, timeout=max(patience, 0.0))
        if not ready:
            break
        for receiver in ready:
            rank = receivers.index(receiver)
            try:
                is_error, value = receiver.recv()
            except EOFError:
                ranks[rank].join(5)
                is_error, value = True, f"ended without a word, exit code {ranks[rank].exitcode}"
            (failures if is_error else results)[rank] = value
    if failures:
        raise AssertionError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
    if len(results) < len(ranks):
        raise TimeoutError(f"ranks {sorted(set(range(len(ranks))) - set(results))} gave no result in time")
    return [results[rank] for rank in range(len(ranks))]


def _rank_main(
    rank: int, world_size: int, rendezvous_file: str, sender: Connection, function: Callable[..., Any], arguments: tuple
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
        RENDEZVOUS_FILE=rendezvous_file,
    )
    try:
        sender.send((False, function(*arguments)))
    except BaseException:
        sender.send((True, traceback.format_exc()))
    sender.close()
    # No interpreter shutdown: gloo's threads may wait for peers that are gone.
    os._exit(0)
