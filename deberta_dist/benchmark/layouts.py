"""Step time of layouts of a small model, measured beside what the planner's cost model predicts from primitives.

Gloo on the CPU. Measured first, with as many processes at once as the layouts have: passes of single stages (from which
seconds per FLOP, per byte through memory and per operation follow), and messages of two sizes of every kind. The layout
1x1x1, alone, gives what a step costs once, in processor time. All other layouts are predicted from that and from nothing of their own;
processes share the cores of this machine, and the model knows it. Rounds are interleaved, figures are medians.
"""

import argparse
import itertools
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deberta_dist.benchmark.measure import ROOT, BenchmarkError, machine
from deberta_dist.errors import ConfigError

if TYPE_CHECKING:  # torch is loaded where it is needed
    from deberta_dist.benchmark.layouts_rank import Case
    from deberta_dist.planning.machine import Machine
    from deberta_dist.planning.pass_work import Work

LAYOUTS = "1x1x1,1x1x2,1x2x1,2x1x1,2x2x1,1x2x2,2x1x2,1x4x1,1x1x4,2x2x2"
CALIBRATES = "1x1x1"
# (tensor, first layer, layer behind the last, sequences): ends and middles, whole and cut, few and many tokens.
STAGES = ((1, 1, 3, 2), (1, 1, 2, 2), (1, 1, 2, 8), (2, 1, 3, 2), (2, 1, 2, 8), (1, 0, 2, 2), (1, 6, 8, 2), (2, 6, 8, 2))
TOLERANCE = 0.25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("--layouts", default=LAYOUTS, metavar="TxPxD,...", help=f"tensor x pipeline x data (default: {LAYOUTS})")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a layout and round (default: 4)")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="write what was measured for tools/plan_layout.py here")
    parser.add_argument("--timeout", type=float, default=1800, metavar="SECONDS", help="for everything (default: 1800)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures, calibrates, predicts, prints a table and returns it as JSON.

    Raises:
        ConfigError: a layout that the model does not have, or numbers that are not positive.
        BenchmarkError: a rank failed or hung.
    """
    if arguments.steps < 1 or arguments.rounds < 1:
        raise ConfigError(f"--steps {arguments.steps} and --rounds {arguments.rounds} must be positive")
    cases = parse_layouts(arguments.layouts)
    before = machine()
    cores = before["cores"]
    deadline = time.monotonic() + arguments.timeout
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-layouts-") as name:
        worlds = {count: World(count, folder=Path(name), deadline=deadline) for count in sorted({c.processes for c in cases})}
        try:
            for number in range(arguments.rounds):
                print(f"round {number + 1} of {arguments.rounds}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
                rounds.append(_one_round(worlds, cases, steps=arguments.steps))
        finally:
            for world in worlds.values():
                world.end()
    table = calibration(rounds, cores=cores)
    measured, processor = (
        {case.name: [s for one in rounds for s in one[key][case.name]] for case in cases} for key in ("layouts", "processor")
    )
    table["processes"] = with_step_seconds(table, statistics.median(processor[CALIBRATES]))
    rows = compare(measured, processor, table, cases)
    print(describe(rows, cores=cores, load=(before["load"][0], os.getloadavg()[0]), rounds=arguments.rounds, steps=arguments.steps))
    if arguments.calibration is not None:
        about = {"machine": before, "command": "tools/benchmark.py layouts", "rounds": arguments.rounds}
        arguments.calibration.write_text(json.dumps(table | {"about": about}, indent=1) + "\n", encoding="utf-8")
    return {"machine": before, "load_after": os.getloadavg(), "rows": rows, "calibration": table, "rounds": rounds}


def parse_layouts(text: str) -> list["Case"]:
    """The layouts, the calibrating one first.

    Raises:
        ConfigError: one that is not three sizes, or that the model or the batch cannot be cut into.
    """
    from deberta_dist.benchmark.layouts_rank import GLOBAL_BATCH, MICRO_BATCH, Case, plan_of

    cases = []
    for name in dict.fromkeys([CALIBRATES, *text.split(",")]):
        sizes = name.split("x")
        if len(sizes) != 3 or not all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes):
            raise ConfigError(f"--layouts: {name!r} is no layout; expected tensor x pipeline x data, e.g. 2x1x2")
        case = Case(*map(int, sizes))
        if (GLOBAL_BATCH // MICRO_BATCH) % case.data:
            raise ConfigError(f"--layouts: {name}: data {case.data} does not divide {GLOBAL_BATCH // MICRO_BATCH} micro-batches")
        plan_of(case)
        cases.append(case)
    return cases


class World:
    """The processes of one world size, waiting for commands.

    Args:
        count: How many.
        folder: Where they meet and leave what they print.
        deadline: On the monotonic clock.
    """

    def __init__(self, count: int, *, folder: Path, deadline: float) -> None:
        self._deadline = deadline
        self._logs = [folder / f"world-{count}-rank-{rank}.log" for rank in range(count)]
        self._processes = [self._start(rank, count, folder) for rank in range(count)]

    def _start(self, rank: int, count: int, folder: Path) -> subprocess.Popen:
        launcher = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }
        command = [sys.executable, "-m", "deberta_dist.benchmark.layouts_rank", str(folder)]
        with open(self._logs[rank], "wb") as log:
            return subprocess.Popen(
                command, env=os.environ | launcher, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def ask(self, do: str, **options: Any) -> list[Any]:
        """What every rank answers, by rank.

        Raises:
            BenchmarkError: a rank ended, or gave no answer in time.
        """
        for rank, process in enumerate(self._processes):
            try:
                process.stdin.write(json.dumps({"do": do, **options}) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                raise BenchmarkError(f"rank {rank} has ended: {self._last_words(rank)}") from None
        answers: dict[int, Any] = {}
        while len(answers) < len(self._processes):
            waiting = {p.stdout: rank for rank, p in enumerate(self._processes) if rank not in answers}
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
        """Kills the processes, whatever they do."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()

    def _last_words(self, rank: int) -> str:
        return self._logs[rank].read_text(encoding="utf-8", errors="replace")[-1000:].strip() or "nothing"


def _one_round(worlds: Mapping[int, World], cases: Sequence["Case"], *, steps: int) -> dict[str, Any]:
    """Primitives and layouts once; of several ranks the mean, of a collective step rank 0."""
    found: dict[str, Any] = {"load": os.getloadavg()[0], "products": {}, "stages": {}, "messages": {}, "layouts": {}, "processor": {}}
    for count, world in worlds.items():
        repeats = max(3, 8 // count)
        found["products"][count] = statistics.mean(world.ask("product", repeats=repeats))
        found["stages"][count] = [
            statistics.mean(world.ask("stage", tensor=t, start=start, stop=stop, micro_batch=size, repeats=repeats))
            for t, start, stop, size in STAGES
        ]
        if count > 1:
            answers = world.ask("messages", repeats=30)
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
    from deberta_dist.benchmark.layouts_rank import MESSAGES, Case, plan_of
    from deberta_dist.planning.pass_work import stage_work

    works = []
    for tensor, start, stop, size in STAGES:
        plan = plan_of(Case(tensor, 1, 1, size))
        forward, backward = stage_work(plan, range(start, stop), has_fused_attention=False)
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


def _fit(works: Sequence["Work"], seconds: Sequence[float], *, per_product: float) -> tuple[float, float]:
    """(seconds per byte, seconds per call) of least squared relative error; neither is less than next to nothing.

    Products have been measured by themselves: they grow with the tokens as bytes do, and stages alone could not tell
    one from the other.
    """
    # One unknown after the other in closed form: the best of both, or of one alone where the other would be negative.
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
    """The tables by number of processes with what the layout of one process leaves over of its processor time for a step."""
    from deberta_dist.benchmark.layouts_rank import Case, plan_of
    from deberta_dist.planning.step_cost import step_cost

    cost = step_cost(plan_of(Case(1, 1, 1)), _machine(table, 1))
    once = max(measured - (cost.seconds - cost.once), 1e-6)
    return {count: {**one, "step_seconds": once} for count, one in table["processes"].items()}


def _machine(table: Mapping[str, Any], processes: int) -> "Machine":
    from deberta_dist.planning.machine import GPUS, calibrated

    return calibrated(GPUS["h100"], table, processes=processes, source="this machine")


def compare(
    measured: Mapping[str, Sequence[float]],
    processor: Mapping[str, Sequence[float]],
    table: Mapping[str, Any],
    cases: Sequence["Case"],
) -> list[dict[str, Any]]:
    """One row per layout, fastest first as measured."""
    from deberta_dist.benchmark.layouts_rank import plan_of
    from deberta_dist.planning.step_cost import step_cost

    rows = []
    for case in cases:
        cost = step_cost(plan_of(case), _machine(table, case.processes))
        seconds = statistics.median(measured[case.name])
        rows.append(
            {
                "layout": case.name,
                "processes": case.processes,
                "measured": seconds,
                "range": [min(measured[case.name]), max(measured[case.name])],
                "busy": statistics.median(processor[case.name]) / seconds / table["cores"],
                "predicted": cost.seconds,
                "error": cost.seconds / seconds - 1,
                "tensor_seconds": cost.tensor,
                "pipeline_seconds": cost.pipeline,
                "around_seconds": cost.before + cost.after + cost.once,
            }
        )
    return sorted(rows, key=lambda row: row["measured"])


def describe(rows: Sequence[Mapping[str, Any]], *, cores: int, load: tuple[float, float], rounds: int, steps: int) -> str:
    """The table, whether the order is right, and whether every prediction is near enough."""
    from deberta_dist.benchmark.layouts_rank import GLOBAL_BATCH, LENGTH, MICRO_BATCH, model_config

    model = model_config()
    lines = [
        f"{model.num_hidden_layers} layers of hidden size {model.hidden_size}, {GLOBAL_BATCH} x {LENGTH} tokens per step in micro-batches "
        f"of {MICRO_BATCH}, float32, gloo, {cores} cores shared by all processes",
        f"medians of {rounds} interleaved rounds of {steps} steps; load average {load[0]:.1f} before, {load[1]:.1f} after",
        "tensor x pipeline x data  processes   measured ms (range)     cores busy    predicted ms    error",
    ]
    for row in rows:
        low, high = row["range"]
        note = "   calibrates" if row["layout"] == CALIBRATES else ""
        spread = f"({low * 1e3:.0f} to {high * 1e3:.0f})"
        lines.append(
            f"{row['layout']:>24} {row['processes']:10} {row['measured'] * 1e3:13.1f} {spread:<14} "
            f"{row['busy']:6.0%} {row['predicted'] * 1e3:15.1f} {row['error']:+8.1%}{note}"
        )
    by_prediction = [row["layout"] for row in sorted(rows, key=lambda row: row["predicted"])]
    pairs = list(itertools.combinations(rows, 2))
    wrong = [(one["layout"], other["layout"]) for one, other in pairs if one["predicted"] > other["predicted"]]
    is_right = by_prediction == [row["layout"] for row in rows]
    off = [row["layout"] for row in rows if abs(row["error"]) > TOLERANCE and row["layout"] != CALIBRATES]
    lines.append(
        f"order as predicted: {'right' if is_right else 'wrong'}; {len(pairs) - len(wrong)} of {len(pairs)} pairs are in order"
        + "".join(f"\n  not in order: {one} before {other}" for one, other in wrong)
    )
    predicted = len(rows) - 1
    lines.append(
        f"within {TOLERANCE:.0%}: {predicted - len(off)} of {predicted} predictions" + (f"; not {', '.join(off)}" if off else "")
    )
    return "\n".join(lines)
