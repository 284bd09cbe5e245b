"""Numbers of this machine for the planner, from primitives measured on it: ``deberta-dist calibrate``.

For each number of processes that a layout may have, that many run at once and measure passes of single stages, from which
seconds per FLOP, per byte through memory and per operation follow, and messages of two sizes of every kind. Of layouts only
1x1x1 is measured: its processor time gives what a step costs whatever the model. ``benchmarks/layouts.py`` compares predictions
from these numbers with measured steps. Gloo on the CPU.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deberta_dist.operations.calibration_rank import MESSAGES, LayoutCase, plan_of
from deberta_dist.operations.calibration_world import World
from deberta_dist.planning.machine import GPUS, Machine, calibrated
from deberta_dist.planning.pass_work import Work, stage_work
from deberta_dist.planning.step_cost import step_cost

# (tensor parallel size, first layer, layer after the last, sequences): first, inner and last stages, undivided and divided,
# with few and many tokens, so that the three rates can be told apart.
STAGES = ((1, 1, 3, 2), (1, 1, 2, 2), (1, 1, 2, 8), (2, 1, 3, 2), (2, 1, 2, 8), (1, 0, 2, 2), (1, 6, 8, 2), (2, 6, 8, 2))


CALIBRATES = LayoutCase(1, 1, 1)


def measure(
    cases: Sequence[LayoutCase], *, counts: Sequence[int], rounds: int, steps: int, timeout: float
) -> list[dict[str, Any]]:
    """Starts the processes and measures primitives and layouts in interleaved rounds.

    Args:
        cases: Layouts whose steps are timed; ``counts`` has their numbers of processes.
        counts: Numbers of processes whose primitives are measured.
        rounds: How often every measurement is repeated; results are one dict per round.
        steps: Timed steps per layout and round.
        timeout: Seconds after which the whole call fails.

    Raises:
        BenchmarkError: a rank failed or hung.
    """
    deadline = time.monotonic() + timeout
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="calibration-") as name:
        worlds = {count: World(count, folder=Path(name), deadline=deadline) for count in sorted(counts)}
        try:
            for number in range(rounds):
                print(f"round {number + 1} of {rounds}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
                found.append(one_round(worlds, cases, steps=steps))
        finally:
            for world in worlds.values():
                world.end()
    return found


def calibrated_table(rounds: Sequence[Mapping[str, Any]], *, cores: int) -> dict[str, Any]:
    """The calibration that ``deberta-dist plan --calibration`` reads, with the constant cost of a step."""
    table = calibration(rounds, cores=cores)
    processor = statistics.median(seconds for one in rounds for seconds in one["processor"][CALIBRATES.name])
    return table | {"processes": with_step_seconds(table, processor)}


def one_round(worlds: Mapping[int, World], cases: Sequence[LayoutCase], *, steps: int) -> dict[str, Any]:
    """Measures primitives and layouts once: the mean over ranks, or rank 0 for steps, which all ranks end together."""
    found: dict[str, Any] = {
        "load": os.getloadavg()[0],
        "products": {},
        "stages": {},
        "messages": {},
        "layouts": {},
        "processor": {},
    }
    for count, world in worlds.items():
        repeats = max(3, 8 // count)
        found["products"][count] = statistics.mean(world.ask("product", repeats=repeats))
        found["stages"][count] = [
            statistics.mean(world.ask("stage", tensor=t, start=start, stop=stop, micro_batch=size, repeats=repeats))
            for t, start, stop, size in STAGES
        ]
        if count > 1:
            answers = world.ask("messages", repeats=15)
            found["messages"][count] = {
                kind: [statistics.mean(answer[kind][i] for answer in answers) for i in range(2)] for kind in answers[0]
            }
    for case in cases:
        sizes = {"tensor": case.tensor, "pipeline": case.pipeline, "data": case.data}
        ranks = worlds[case.processes].ask("layout", **sizes, steps=steps)
        found["layouts"][case.name] = [wall for wall, _ in ranks[0]]
        found["processor"][case.name] = [sum(rank[step][1] for rank in ranks) for step in range(steps)]
    return found


def calibration(rounds: Sequence[Mapping[str, Any]], *, cores: int) -> dict[str, Any]:
    """Medians of the primitives as a table for ``planning/machine.py``, by number of processes."""
    works = []
    for tensor, start, stop, size in STAGES:
        plan = plan_of(LayoutCase(tensor, 1, 1, size))
        forward, backward = stage_work(plan.main, range(start, stop), has_fused_attention=False)
        works.append(forward + backward)
    processes: dict[str, Any] = {}
    for count in rounds[0]["stages"]:
        per_product = statistics.median(one["products"][count] for one in rounds)
        seconds = [statistics.median(one["stages"][count][i] for one in rounds) for i in range(len(STAGES))]
        per_byte, per_call = _fit(works, seconds, per_product=per_product)
        table: dict[str, Any] = {
            "product_rate": 1 / per_product,
            "memory_bandwidth": 1 / per_byte,
            "seconds_per_call": per_call,
            "kinds": {},
        }
        for kind in rounds[0]["messages"].get(count, {}):
            small, large = (statistics.median(one["messages"][count][kind][i] for one in rounds) for i in range(2))
            sizes = MESSAGES[kind]
            latencies, share = {"all_reduce": (2, 1.0), "all_gather": (1, 0.5), "reduce_scatter": (1, 0.5)}.get(kind, (1, 1.0))
            per_byte = max(large - small, 1e-12 * sizes[1]) / (sizes[1] - sizes[0])
            latency = max(small - per_byte * sizes[0], 1e-6) / latencies
            table["kinds"][kind] = {"latency": latency, "bandwidth": share / per_byte}
        processes[str(count)] = table
    switches = {"calls_overlap": False, "has_fused_attention": False}
    return {"name": f"CPU, {cores} cores", "cores": cores, **switches, "processes": processes}


def _fit(works: Sequence[Work], seconds: Sequence[float], *, per_product: float) -> tuple[float, float]:
    """(seconds per byte, seconds per call) with the least squared relative error; both are positive.

    Seconds per FLOP are measured separately: FLOPs and bytes both grow with the tokens, so a fit of stages alone could not
    separate them.
    """
    # Closed form of the fit with two unknowns; if one would be negative, the fit with the other alone.
    rest = [max(time - work.products * per_product, 0.0) / time for work, time in zip(works, seconds, strict=True)]
    by_byte = [work.bytes / time for work, time in zip(works, seconds, strict=True)]
    by_call = [work.calls / time for work, time in zip(works, seconds, strict=True)]

    def dot(one: Sequence[float], other: Sequence[float]) -> float:
        return sum(a * b for a, b in zip(one, other, strict=True))

    determinant = dot(by_byte, by_byte) * dot(by_call, by_call) - dot(by_byte, by_call) ** 2
    per_byte = (dot(rest, by_byte) * dot(by_call, by_call) - dot(rest, by_call) * dot(by_byte, by_call)) / determinant
    per_call = (dot(rest, by_call) * dot(by_byte, by_byte) - dot(rest, by_byte) * dot(by_byte, by_call)) / determinant
    if per_byte <= 0:
        per_byte, per_call = 0.0, dot(rest, by_call) / dot(by_call, by_call)
    elif per_call <= 0:
        per_byte, per_call = dot(rest, by_byte) / dot(by_byte, by_byte), 0.0
    return max(per_byte, 1e-14), max(per_call, 1e-9)


def with_step_seconds(table: Mapping[str, Any], measured: float) -> dict[str, Any]:
    """The tables by number of processes, with ``step_seconds``: what a step of one process took beyond the prediction."""
    cost = step_cost(plan_of(LayoutCase(1, 1, 1)), machine_of(table, 1))
    once = max(measured - (cost.seconds - cost.once), 1e-6)
    return {count: {**one, "step_seconds": once} for count, one in table["processes"].items()}


def machine_of(table: Mapping[str, Any], processes: int) -> Machine:
    """The machine that a calibration describes, running ``processes`` processes."""
    return calibrated(GPUS["h100"], table, processes=processes, source="this machine")
