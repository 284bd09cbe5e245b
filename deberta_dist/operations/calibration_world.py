"""The processes of a calibration or of the layouts benchmark, seen from the process that commands them."""

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from deberta_dist.operations.measure import STEADY_ALLOCATOR, BenchmarkError
from deberta_dist.operations.ranks import launcher_environment


class World:
    """The processes of one world size, waiting for commands (``calibration_rank``).

    Args:
        count: World size.
        folder: Their file rendezvous and logs are written here.
        deadline: Time on the monotonic clock after which `ask` fails.
    """

    def __init__(self, count: int, *, folder: Path, deadline: float) -> None:
        self._deadline = deadline
        self._logs = [folder / f"world-{count}-rank-{rank}.log" for rank in range(count)]
        self._processes = [self._start(rank, count, folder) for rank in range(count)]

    def _start(self, rank: int, count: int, folder: Path) -> subprocess.Popen[str]:
        environment = launcher_environment(rank, processes=count) | STEADY_ALLOCATOR
        command = [sys.executable, "-m", "deberta_dist.operations.calibration_rank", str(folder)]
        with open(self._logs[rank], "wb") as log:
            return subprocess.Popen(
                command, env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def ask(self, do: str, **options: Any) -> list[Any]:
        """Sends a command to all ranks; returns their answers, by rank.

        Raises:
            BenchmarkError: a rank ended, or did not answer before the deadline.
        """
        for rank, process in enumerate(self._processes):
            assert process.stdin is not None, "a pipe"
            try:
                process.stdin.write(json.dumps({"do": do, **options}) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                raise BenchmarkError(f"rank {rank} has ended: {self._last_words(rank)}") from None
        answers: dict[int, Any] = {}
        while len(answers) < len(self._processes):
            waiting = {p.stdout: rank for rank, p in enumerate(self._processes) if rank not in answers and p.stdout is not None}
            ready, _, _ = select.select(list(waiting), [], [], max(0.0, self._deadline - time.monotonic()))
            if not ready:
                late = min(waiting.values())
                raise BenchmarkError(f"rank {late} had not answered {do!r} when --timeout was over: {self._last_words(late)}")
            for stream in ready:
                line = stream.readline()
                if not line:
                    raise BenchmarkError(f"rank {waiting[stream]} ended in {do!r}: {self._last_words(waiting[stream])}")
                answers[waiting[stream]] = json.loads(line)
        return [answers[rank] for rank in range(len(answers))]

    def end(self) -> None:
        """Kills the processes and waits for them."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()

    def _last_words(self, rank: int) -> str:
        return self._logs[rank].read_text(encoding="utf-8", errors="replace")[-1000:].strip() or "nothing"
