"""The bubble of every pipeline schedule, measured, beside the formula (p - 1) / (v m + p - 1) for v stages a rank.

Processes run torch's schedules with stages that sleep instead of computing: a forward pass the time asked for, a backward
pass twice that, half of it for the gradient of the input and half for those of the weights. What is measured is how well a
schedule keeps its ranks at work, messages included, on any number of cores. A rank with several stages has as much work as
one with a single stage. The two zero-bubble schedules are for comparison: runs cannot choose them (docs/limits.md).
"""

import argparse
import statistics
from typing import Any

from deberta_dist.errors import ConfigError
from deberta_dist.operations.measure import BenchmarkError, machine
from deberta_dist.operations.ranks import start_ranks

# torch's name -> stages of a rank.
SCHEDULES = {"GPipe": 1, "1F1B": 1, "Interleaved1F1B": 2, "InterleavedZeroBubble": 2, "ZBVZeroBubble": 2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("--processes", type=int, default=4, metavar="P", help="pipeline ranks (default: 4)")
    parser.add_argument("--micro-batches", default="4,8,16", metavar="M,...", help="multiples of P (default: 4,8,16)")
    parser.add_argument("--milliseconds", type=float, default=20.0, help="of a rank's forward pass (default: 20)")
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="for everything (default: 600)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints a table and returns figures as JSON.

    Raises:
        ConfigError: numbers that make no pipeline.
        BenchmarkError: a rank failed or hung.
    """
    processes, counts = arguments.processes, _counts(arguments.micro_batches, processes=arguments.processes)
    if processes < 2 or arguments.milliseconds <= 0:
        raise ConfigError(
            f"--processes {processes}, --milliseconds {arguments.milliseconds:g}: expected 2 or more processes and a time"
        )
    seconds = arguments.milliseconds / 1000
    cases = [
        {"schedule": name, "stages_per_rank": stages, "micro_batches": count}
        for name, stages in SCHEDULES.items()
        for count in counts
    ]
    plan = {"cases": cases, "forward_seconds": seconds, "rounds": arguments.rounds}
    found = start_ranks("benchmarks.pipeline_rank", plan, processes=processes, timeout=arguments.timeout)
    rows = []
    for number, case in enumerate(cases):
        of_steps = zip(*(rank[number] for rank in found), strict=True)
        steps = [max(end for _, end in times) - min(begun for begun, _ in times) for times in of_steps]
        bubbles = [1 - case["micro_batches"] * 3 * seconds / step for step in steps]
        if min(bubbles) < 0:
            raise BenchmarkError(f"{case}: a step took {min(steps):.3f} s, less than the work in it")
        rows.append({**case, "steps": steps, "bubble": statistics.median(bubbles), "range": [min(bubbles), max(bubbles)]})
    print(describe(rows, processes=processes, milliseconds=arguments.milliseconds))
    return {"machine": machine(), "processes": processes, "forward_seconds": seconds, "rows": rows}


def formula(*, processes: int, micro_batches: int, stages_per_rank: int) -> float:
    """Share of a step in which a rank waits if messages and switching between passes took no time."""
    return (processes - 1) / (stages_per_rank * micro_batches + processes - 1)


def describe(rows: list[dict[str, Any]], *, processes: int, milliseconds: float) -> str:
    """One schedule a line, a number of micro-batches a column."""
    counts = sorted({row["micro_batches"] for row in rows})
    table = {"micro-batches": [str(count) for count in counts]}
    for stages in sorted(set(SCHEDULES.values())):
        shares = [formula(processes=processes, micro_batches=count, stages_per_rank=stages) for count in counts]
        table[f"formula, {_stages(stages)}"] = [f"{share:.1%}" for share in shares]
    for name, stages in SCHEDULES.items():
        found = {row["micro_batches"]: row["bubble"] for row in rows if row["schedule"] == name}
        table[f"{name}, {_stages(stages)}"] = [f"{found[count]:.1%}" for count in counts]
    width = max(map(len, table))
    title = f"bubble of {processes} pipeline ranks, {milliseconds:g} ms forward and {2 * milliseconds:g} ms backward, medians"
    lines = [f"  {name:<{width}}" + "".join(f"{cell:>9}" for cell in cells) for name, cells in table.items()]
    return "\n".join([title, *lines])


def _stages(count: int) -> str:
    return f"{count} stage{'s' * (count > 1)} a rank"


def _counts(text: str, *, processes: int) -> list[int]:
    words = text.split(",")
    good = all(word.isascii() and word.isdigit() and int(word) > 0 and int(word) % processes == 0 for word in words)
    if not good:
        raise ConfigError(
            f"--micro-batches {text!r}: expected positive multiples of --processes {processes}, e.g. "
            f"{processes},{2 * processes}"
        )
    return sorted({int(word) for word in words})
