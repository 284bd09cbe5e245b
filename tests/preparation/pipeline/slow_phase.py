"""A phase whose first worker is slow; in a module of its own, which worker processes import."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deberta_dist.preparation.pipeline.workers import Worker


@dataclass(frozen=True)
class SlowPhase:
    """Whoever takes the first work item is at it until all others are done by others."""

    directory: Path
    count: int

    @property
    def item_names(self) -> Sequence[str]:
        """Their names."""
        return [str(number) for number in range(self.count)]

    def run(self, number: int, *, worker: Worker) -> None:
        """Notes who did it."""
        deadline = time.monotonic() + 30
        while number == 0 and len(self.done()) < self.count - 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        (self.directory / f"{number}.{os.getpid()}").touch()

    def done(self) -> list[int]:
        """The process of each work item that is done, in no order."""
        return [int(path.suffix[1:]) for path in self.directory.iterdir()]
