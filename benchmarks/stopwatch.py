"""Passes of models timed side by side in one process, and what they keep for the backward pass.

On a CPU the time is the thread's own, so that a neighbour's load does not count; on a GPU it is between two events.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deberta_dist.operations.measure import STEADY_ALLOCATOR, BenchmarkError


@dataclass(frozen=True)
class TimedPass:
    """One implementation.

    Attributes:
        forward: Computes what is differentiated.
        backward: Takes that and computes gradients; None if ``forward`` is all.
        prepare: Called outside of the clock before every run.
    """

    forward: Callable[[], Any]
    backward: Callable[[Any], None] | None = None
    prepare: Callable[[], None] = lambda: None

    def run(self) -> None:
        """Both passes."""
        result = self.forward()
        if self.backward is not None:
            self.backward(result)


def seconds(contestant: TimedPass, device: torch.device, *, repeats: int = 1) -> float:
    """One run; the mean of several in a row, which a GPU can be given ahead, with ``repeats``."""
    contestant.prepare()
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            contestant.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / repeats
    begun = time.thread_time()
    for _ in range(repeats):
        contestant.run()
    return (time.thread_time() - begun) / repeats


def race(
    contestants: Mapping[str, TimedPass], *, rounds: int, warm_up: int, device: torch.device, repeats: int = 1
) -> dict[str, dict[str, Any]]:
    """Runs every contestant ``repeats`` times per round; median, range and all times of one run in seconds by name."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(warm_up + rounds):
        for name, contestant in contestants.items():
            found = seconds(contestant, device, repeats=repeats)
            if number >= warm_up:
                times[name].append(found)
    return {
        name: {"seconds": statistics.median(values), "range": [min(values), max(values)], "rounds": values}
        for name, values in times.items()
    }


def kernel_seconds(run: Callable[[], Any], device: torch.device, *, rounds: int = 3) -> dict[str, float]:
    """Seconds of one run that each kernel takes on the device, by name, the longest first; operators on a CPU."""
    activity = torch.profiler.ProfilerActivity
    on_gpu = device.type == "cuda"
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as profile:
        for _ in range(rounds):
            run()
        if on_gpu:
            torch.cuda.synchronize(device)
    kind = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    # Launches are events as well, on the host.
    where = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [event for event in profile.key_averages() if event.device_type == where]
    found = {event.key: getattr(event, kind) / 1e6 / rounds for event in events}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def saved_bytes(forward: Callable[[], Any], *, without: list[Tensor]) -> int:
    """Bytes of the storages that autograd saves from ``forward`` to backward, but for those of ``without``."""
    known = {x.untyped_storage()._cdata for x in without}
    saved: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        saved.setdefault(x.untyped_storage()._cdata, x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = forward()
    del result
    return sum(x.untyped_storage().nbytes() for key, x in saved.items() if key not in known)


def differences(found: Mapping[str, list[Tensor]], *, oracle: str) -> dict[str, float]:
    """Largest difference over largest value, the worst of all tensors, by name."""
    return {
        name: max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(tensors, found[oracle], strict=True))
        for name, tensors in found.items()
    }


def require_agreement(found: Mapping[str, list[Tensor]], *, oracle: str, tolerance: float) -> dict[str, float]:
    """`differences`, if they are small.

    Raises:
        BenchmarkError: one is beyond the tolerance: speeds of different results are not compared.
    """
    errors = differences(found, oracle=oracle)
    for name, error in errors.items():
        if not error <= tolerance:
            raise BenchmarkError(
                f"{name} differs from {oracle} by {error:.1e} of the largest value; at most {tolerance:.0e} is "
                "expected of float32"
            )
    return errors


def settings(device: torch.device, threads: int) -> dict[str, Any]:
    """What the times depend on and a caller may have forgotten; says so if the allocator is as it comes."""
    allocator = {name: os.environ.get(name) for name in STEADY_ALLOCATOR}
    if device.type == "cpu" and None in allocator.values():
        print(f"note: {' and '.join(STEADY_ALLOCATOR)} are not set; temporaries cost page faults, most where there are most")
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": threads,
        "allocator": allocator,
        "torch": torch.__version__,
    }


def describe(title: str, figures: Mapping[str, Mapping[str, Any]], *, against: tuple[str, ...]) -> str:
    """One contestant a line: median, range, ratio of others' medians to its own, bytes."""
    lines = [title]
    for name, row in figures.items():
        low, high = row["range"]
        ratios = "".join(
            f"  {figures[other]['seconds'] / row['seconds']:5.2f}x {other}" for other in against if other in figures
        )
        saved = f"  saves {row['saved_bytes'] / 2**20:6.1f} MiB" if "saved_bytes" in row else ""
        saved += f"  peak {row['peak_bytes'] / 2**20:7.1f} MiB" if "peak_bytes" in row else ""
        lines.append(f"  {name:<28} {row['seconds'] * 1e3:9.1f} ms ({low * 1e3:.1f} to {high * 1e3:.1f}){ratios}{saved}")
    return "\n".join(lines)
