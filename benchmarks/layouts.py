"""Step time of layouts of a small model, measured beside what the planner's cost model predicts from primitives.

Gloo on the CPU. Measured first, with as many processes at once as the layouts have: passes of single stages (from which
seconds per FLOP, per byte through memory and per operation follow), and messages of two sizes of every kind. The layout
1x1x1, alone, gives what a step costs once, in processor time (``operations/calibration.py``). All other layouts are predicted from that and from nothing of
their own. Processes share the cores of this machine, and the model is told how many there are: what computes takes so many
times as long as there are processes for a core. Rounds are interleaved, figures are medians. Other work on the machine
makes layouts slower and predictions hardly: "cores busy" is what the layout's own processes had of them.
"""

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deberta_dist.errors import ConfigError
from deberta_dist.operations.measure import machine

if TYPE_CHECKING:  # torch is loaded where it is needed
    from deberta_dist.operations.calibration_rank import LayoutCase

LAYOUTS = "1x1x1,1x1x2,1x2x1,2x1x1,2x2x1,1x2x2,2x1x2,1x4x1,1x1x4,2x2x2"
CALIBRATES = "1x1x1"
TOLERANCE = 0.25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument(
        "--layouts", default=LAYOUTS, metavar="TxPxD,...", help=f"tensor x pipeline x data (default: {LAYOUTS})"
    )
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a layout and round (default: 4)")
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="write what was measured for tools/plan_layout.py here; replaced"
    )
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
    from deberta_dist.operations.calibration import calibrated_table, measure

    before = machine()
    cores = before["cores"]
    counts = {case.processes for case in cases}
    rounds = measure(cases, counts=sorted(counts), rounds=arguments.rounds, steps=arguments.steps, timeout=arguments.timeout)
    table = calibrated_table(rounds, cores=cores)
    measured, processor = (
        {case.name: [s for one in rounds for s in one[key][case.name]] for case in cases} for key in ("layouts", "processor")
    )
    rows = compare(measured, processor, table, cases)
    print(
        describe(
            rows, cores=cores, load=(before["load"][0], os.getloadavg()[0]), rounds=arguments.rounds, steps=arguments.steps
        )
    )
    if arguments.calibration is not None:
        about = {"machine": before, "command": "tools/benchmark.py layouts", "rounds": arguments.rounds}
        arguments.calibration.write_text(json.dumps(table | {"about": about}, indent=1) + "\n", encoding="utf-8")
    return {"machine": before, "load_after": os.getloadavg(), "rows": rows, "calibration": table, "rounds": rounds}


def parse_layouts(text: str) -> list["LayoutCase"]:
    """The layouts, the calibrating one first.

    Raises:
        ConfigError: one that is not three sizes, or that the model or the batch cannot be cut into.
    """
    from deberta_dist.operations.calibration_rank import GLOBAL_BATCH, MICRO_BATCH, LayoutCase, plan_of

    cases = []
    for name in dict.fromkeys([CALIBRATES, *text.split(",")]):
        sizes = name.split("x")
        if len(sizes) != 3 or not all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes):
            raise ConfigError(f"--layouts: {name!r} is no layout; expected tensor x pipeline x data, e.g. 2x1x2")
        case = LayoutCase(*map(int, sizes))
        if (GLOBAL_BATCH // MICRO_BATCH) % case.data:
            raise ConfigError(
                f"--layouts: {name}: data {case.data} does not divide {GLOBAL_BATCH // MICRO_BATCH} micro-batches"
            )
        plan_of(case)
        cases.append(case)
    return cases


def compare(
    measured: Mapping[str, Sequence[float]],
    processor: Mapping[str, Sequence[float]],
    table: Mapping[str, Any],
    cases: Sequence["LayoutCase"],
) -> list[dict[str, Any]]:
    """One row per layout, fastest first as measured."""
    from deberta_dist.operations.calibration import machine_of
    from deberta_dist.operations.calibration_rank import plan_of
    from deberta_dist.planning.step_cost import step_cost

    rows = []
    for case in cases:
        cost = step_cost(plan_of(case), machine_of(table, case.processes))
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
    from deberta_dist.operations.calibration_rank import GLOBAL_BATCH, LENGTH, MICRO_BATCH, model_config

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
        f"within {TOLERANCE:.0%}: {predicted - len(off)} of {predicted} predictions"
        + (f"; not {', '.join(off)}" if off else "")
    )
    return "\n".join(lines)
