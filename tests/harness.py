"""Starts the ranks of a multi-process test and collects what they return; runs a script as Python would.

Ranks are forked from one server that has imported torch and deepspeed already, which saves seconds per rank;
they meet through a file, and a rank that dies or hangs ends the test with its traceback.
"""

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
from pathlib import Path
from typing import Any

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
    command = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as directory:
        output, errors = Path(directory) / "output", Path(directory) / "errors"
        process = _server().Process(
            target=_script_main, args=(command, str(cwd), dict(os.environ if env is None else env), str(output), str(errors))
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout, output.read_text(), errors.read_text())
        return subprocess.CompletedProcess(command, process.exitcode, output.read_text(), errors.read_text())


def free_port() -> int:
    """A port for ranks that meet as a launcher's do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _server() -> mp.context.ForkServerContext:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    return context


def _script_main(words: list[str], cwd: str, env: dict[str, str], output: str, errors: str) -> None:
    for path, number in ((output, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
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
