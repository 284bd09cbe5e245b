"""The result of a search as text: the table of ``deberta-dist plan``, the terms of its best line, its TOML."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deberta_dist.config import RunConfig
from deberta_dist.config.write import to_toml
from deberta_dist.planning.machine import Machine
from deberta_dist.planning.pipeline_timeline import ZERO_BUBBLE
from deberta_dist.planning.search import SearchResult
from deberta_dist.planning.search_memory import RankedLayout
from deberta_dist.planning.step_cost import play_step

HEAD = "tensor pipeline  data  micro-batch  schedule          recompute  offload   s/step    MFU  peak GB  sent GB  bubble     days"
SIMULATION = "A simulation, not a measurement: nothing here has been run on these GPUs."


@dataclass(frozen=True)
class Prices:
    """Length and price of a run: optimizer steps, and the price of one GPU for an hour (None: no costs are shown)."""

    steps: int
    per_hour: float | None

    def days(self, choice: RankedLayout) -> float:
        """Days that all steps take."""
        return choice.cost.seconds * self.steps / 86400

    def cost(self, choice: RankedLayout) -> float:
        """Of all GPUs for these days."""
        return self.days(choice) * 24 * choice.plan.world_size * (self.per_hour or 0.0)


def describe(found: SearchResult, *, machine: Machine, limit: float, prices: Prices) -> str:
    """The table, the terms of its first line, and notes on the numbers."""
    blocks = [
        "\n".join([_head(prices), *(_row(choice, prices) for choice in found.choices)]),
        _terms(found.choices[0], machine),
        _notes(found, machine=machine, limit=limit, prices=prices),
    ]
    return "\n\n".join(blocks)


def scaling(config: RunConfig, rows: Sequence[tuple[int, SearchResult]], *, machine: Machine, prices: Prices) -> str:
    """The best layout for each number of GPUs, and its speed-up over the first."""
    lines = [f"  GPUs  {_head(prices)}  tokens/s  speed-up/ideal"]
    first = rows[0][1].choices[0].cost.seconds * rows[0][0]
    tokens = config.training.global_batch_size * config.data.max_seq_length
    for processes, found in rows:
        best = found.choices[0]
        seconds = best.cost.seconds
        lines.append(f"{processes:6}  {_row(best, prices)}  {tokens / seconds:8.3g}  {first / (seconds * processes):14.1%}")
    return "\n".join([*lines, "", f"{SIMULATION} {machine.name}, global batch {config.training.global_batch_size}."])


def nothing_fits(found: SearchResult, *, processes: int, limit: float) -> str:
    """The message if no layout fits."""
    least = "" if found.smallest is None else f"; the smallest that was measured needs {found.smallest / 1e9:.2f} GB"
    return (
        f"none of {found.candidates} layouts of {processes} processes fits into {limit / 1e9:.2f} GB per GPU{least}: use more "
        "GPUs, less --memory-margin, a smaller training.global_batch_size, or allow what --recompute, --offload, --micro-batch, "
        "--tensor and --pipeline exclude"
    )


def toml_of(choice: RankedLayout, *, machine: Machine, folder: Path) -> str:
    """TOML of the run with this layout; relative paths are written for a file in ``folder``."""
    config, cost = choice.plan.config, choice.cost
    head = (
        f"Written by tools/plan_layout.py for {choice.plan.world_size} x {machine.name}: {cost.seconds:.3f} s per step, "
        f"{choice.peak / 1e9:.1f} GB at the peak.",
        "These numbers are estimates. Model, data and recipe are those of " + config.source + ".",
        "Every key is explained in deberta_dist/config/schema.py. Relative paths start from this folder.",
    )
    return to_toml(config, head=head, deepspeed=config.run.deepspeed, folder=folder)


def _head(prices: Prices) -> str:
    return HEAD + ("" if prices.per_hour is None else "         cost")


def _row(choice: RankedLayout, prices: Prices) -> str:
    parallel, training, cost = choice.plan.config.parallel, choice.plan.config.training, choice.cost
    loops = f" x {parallel.stages_per_rank}" if parallel.stages_per_rank > 1 else ""
    price = "" if prices.per_hour is None else f" {prices.cost(choice):12,.0f}"
    utilisation = f"{cost.utilisation:6.1%}" if cost.utilisation else "     -"
    return (
        f"{parallel.tensor_parallel_size:6} {parallel.pipeline_parallel_size:8} {parallel.data_parallel_size:5} "
        f"{training.micro_batch_size:12}  {parallel.schedule.removesuffix('_1f1b') + loops:<16}  {training.recompute:<9}  "
        f"{'cpu' if choice.host else 'none':<7} {cost.seconds:8.3f} {utilisation} {choice.peak / 1e9:8.2f} "
        f"{choice.sent / 1e9:8.2f} {cost.bubble:7.1%} {prices.days(choice):8.1f}{price}"
    )


def _terms(choice: RankedLayout, machine: Machine) -> str:
    plan, cost = choice.plan, choice.cost
    waits = cost.pipeline - cost.ideal
    rows = (
        ("micro-batches: products, passes over memory", cost.ideal - cost.tensor),
        ("micro-batches: all-reduces over the tensor axis", cost.tensor),
        (f"micro-batches: waiting for the pipeline{' and for cores' if machine.cores else ''}", max(waits, 0.0)),
        ("weights gathered and lent, gradients zeroed", cost.before),
        ("gradients reduced, checked; Adam", cost.after),
        ("calls of engine and optimizer", cost.once),
    )
    lines = [f"The first line's step, seconds ({plan.config.training.num_micro_batches} micro-batches per pipeline):"]
    lines += [f"  {label:<54} {seconds:9.4f}  {seconds / cost.seconds:6.1%}" for label, seconds in rows]
    if choice.host:
        lines.append(f"  the optimizer takes {choice.host / 1e9:.2f} GB of the host for the rank with most")
    if plan.config.parallel.pipeline_parallel_size > 1 and plan.config.parallel.stages_per_rank == 1:
        other = play_step(plan, machine, schedule=ZERO_BUBBLE)
        seconds = cost.seconds - cost.pipeline + other.seconds
        lines.append(f"  with a zero-bubble schedule (not offered): {seconds:.3f} s per step, bubble {other.bubble:.1%}")
    return "\n".join(lines)


def _notes(found: SearchResult, *, machine: Machine, limit: float, prices: Prices) -> str:
    where = f"{machine.cores} cores shared by all processes" if machine.cores else f"nodes of {machine.node_size}"
    peak = f" of {machine.peak / 1e12:.0f}" if machine.peak else ""
    return (
        f"{SIMULATION}\n{machine.name}, {where}: products {machine.product_rate / 1e12:.3g}{peak} TFLOP/s, memory "
        f"{machine.memory_bandwidth / 1e9:.3g} GB/s, {machine.seconds_per_call * 1e6:.3g} us per\noperation, messages "
        f"{machine.node.bandwidth / 1e9:.3g} GB/s and {machine.node.latency * 1e6:.3g} us in a node, "
        f"{machine.network.bandwidth / 1e9:.3g} GB/s and {machine.network.latency * 1e6:.3g} us between nodes.\n"
        f"{found.candidates:,} layouts, the memory of {found.measured} found as --dry-run finds it; at most {limit / 1e9:.2f} GB. "
        f"Peak and sent are of the\nfullest and the busiest rank (GB = 1e9 bytes), days of {prices.steps:,} steps. Waiting is "
        "that of the busiest rank, bubble the mean."
    )
