"""How far a preparation is, reported every few seconds by one thread of the first rank."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from deberta_dist.preparation.pipeline.workers import progress


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A moment of a phase.

    Attributes:
        phase: what is being done.
        done_bytes, total_bytes: bytes of input; 0 of 0 where a phase does not count them.
        num_tokens: made since the start.
        speed: bytes of text per second since the start.
        seconds_left: None where nothing is known yet.
    """

    phase: str
    done_bytes: int = 0
    total_bytes: int = 0
    num_tokens: int = 0
    speed: float = 0.0
    seconds_left: float | None = None

    def __str__(self) -> str:
        """One line; MB are 10**6 bytes."""
        if not self.total_bytes:
            return self.phase
        if self.seconds_left is None:
            left_bytes = self.total_bytes - self.done_bytes
            found = f", {self.done_bytes / 1e6:,.1f} MB were finished before" if self.done_bytes else ""
            return f"{self.phase}: {left_bytes / 1e6:,.1f} MB to read{found}"
        return (
            f"{self.phase}: {100 * self.done_bytes / self.total_bytes:.1f}% of {self.total_bytes / 1e6:,.1f} MB, "
            f"{self.num_tokens:,} tokens, {self.speed / 1e6:.1f} MB/s, {_clock(self.seconds_left)} left"
        )


class Monitor:
    """Reports the progress of all workers of a start; a context manager.

    Args:
        directory: where the workers of this start write how far they are.
        report: called with the progress; None: nobody asks.
        seconds: between two reports.
    """

    def __init__(self, directory: Path, *, report: Callable[[Progress], None] | None, seconds: float) -> None:
        self._directory = directory
        self._report = report
        self._seconds = seconds
        self._phase = ""
        self._total_bytes = self._found_bytes = 0
        self._began = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._report_often, name="progress", daemon=True)

    def phase(self, name: str, *, total_bytes: int = 0, found_bytes: int = 0) -> None:
        """Begins a phase and reports it.

        Args:
            name: begins every line about it.
            total_bytes: bytes of input; 0: they are not counted.
            found_bytes: those of them that an earlier start has done.
        """
        self._phase, self._total_bytes, self._found_bytes = name, total_bytes, found_bytes
        self._began = time.monotonic()
        self._report_now()

    def _report_now(self) -> None:
        if self._report is None:
            return
        if not self._total_bytes:
            self._report(Progress(phase=self._phase))
            return
        num_bytes, num_tokens, done = progress(self._directory)
        seconds = max(time.monotonic() - self._began, 1e-9)
        left = self._total_bytes - self._found_bytes - done
        self._report(
            Progress(
                phase=self._phase,
                done_bytes=self._found_bytes + done,
                total_bytes=self._total_bytes,
                num_tokens=num_tokens,
                speed=num_bytes / seconds,
                seconds_left=left * seconds / done if done else None,
            )
        )

    def _report_often(self) -> None:
        while not self._end.wait(self._seconds):
            self._report_now()

    def __enter__(self) -> "Monitor":
        if self._report is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        if self._report is not None:
            self._thread.join()


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
