"""Times commands and functions side by side: interleaved rounds, medians, spread and ratios.

Imports nothing heavy: the peak memory of a measured process includes what its parent held when it was forked.
"""

import argparse
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deberta_dist.errors import DebertaDistError
from deberta_dist.files.disk import num_usable_cores
from deberta_dist.values import ATTENTION, AUTO

TRAINER_NEEDS = ("deepspeed", "pydantic", "sentencepiece")
"""Packages, by the names they are imported by, that the trainer needs and kernels and models do not."""
PAGE_CACHE_CHUNK = 64 * 2**20
STEADY_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
"""Environment that keeps glibc from returning large temporaries to the system at once, which would charge page faults to
whichever contestant allocates more of them."""


def add_attention_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--attention``, with the values of ``training.attention``."""
    parser.add_argument(
        "--attention",
        choices=ATTENTION,
        default=AUTO,
        help="implementation of our attention; an error if it is not available (default: %(default)s)",
    )


class BenchmarkError(DebertaDistError):
    """A contestant failed, or contestants that must agree do not."""

    exit_code = 70


@dataclass(frozen=True)
class Sample:
    """One run of a contestant.

    Attributes:
        wall_seconds: Elapsed time, seconds.
        cpu_seconds: User and system time of the process and its children, seconds.
        peak_bytes: Peak resident memory of any of its processes, bytes.
    """

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int


Contestant = Callable[[], Sample]


def run_command(command: Sequence[str]) -> Sample:
    """Runs a command to its end.

    Raises:
        BenchmarkError: its exit code was not 0; the message has the end of its output.
    """
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise BenchmarkError(f"{' '.join(command)[:200]} ended with {process.returncode}: {output[-500:].strip()}")
    return Sample(
        wall_seconds=time.monotonic() - started,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_bytes=usage.ru_maxrss * 1024,
    )


def interleaved(contestants: Mapping[str, Contestant], *, rounds: int) -> dict[str, list[Sample]]:
    """Runs every contestant once per round, so that disturbances of the machine affect all of them."""
    samples: dict[str, list[Sample]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            samples[name].append(contestant())
    return samples


def warm(directory: Path) -> int:
    """Reads every file of a directory once, so that all contestants find it in memory; returns its bytes."""
    total = 0
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(PAGE_CACHE_CHUNK):
                total += len(chunk)
    return total


def summary(samples: Mapping[str, Sequence[Sample]], *, against: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Medians, spread and ratios, as JSON.

    Args:
        samples: Name of a contestant -> its samples, one per round.
        against: Contestants whose median wall times the others' are divided by.
    """
    found: dict[str, dict[str, Any]] = {}
    medians = {name: statistics.median(s.wall_seconds for s in values) for name, values in samples.items()}
    for name, values in samples.items():
        found[name] = {
            "wall_seconds": medians[name],
            "wall_seconds_range": [min(s.wall_seconds for s in values), max(s.wall_seconds for s in values)],
            "cpu_seconds": statistics.median(s.cpu_seconds for s in values),
            "peak_bytes": max(s.peak_bytes for s in values),
            "rounds": [asdict(sample) for sample in values],
            "ratios": {other: medians[name] / medians[other] for other in against if other != name},
        }
    return found


def machine() -> dict[str, Any]:
    """What has to be recorded with every measurement: processor, cores, memory, system, date, load."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "processor": model,
        "cores": num_usable_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": os.getloadavg(),
    }


def add_model_arguments(parser: argparse.ArgumentParser, *, batch_size: int, official: bool = True) -> None:
    """Adds the flags of verbs that run a model, or part of one, in this process."""
    parser.add_argument("--batch-size", type=int, default=batch_size, help="sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    if official:
        parser.add_argument("--official", type=Path, metavar="PATH", help="checkout of microsoft/DeBERTa, measured as well")


def describe(title: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per contestant: median, spread, processor time, memory, ratios."""
    lines = [title]
    for name, row in found.items():
        low, high = row["wall_seconds_range"]
        ratios = "".join(f"  {ratio:.2f}x {other}" for other, ratio in row["ratios"].items())
        lines.append(
            f"  {name:<28} {row['wall_seconds']:8.2f} s ({low:.2f} to {high:.2f})  cpu {row['cpu_seconds']:7.2f} s  "
            f"peak {row['peak_bytes'] / 2**20:7.0f} MiB{ratios}"
        )
    return "\n".join(lines)
