#!/usr/bin/env python
"""Lists the layouts of a run on a number of GPUs, with what each costs: one line each, the best guess first.

    tools/plan_layout.py launchers/pretrain_1.5b.toml --world-size 64 [--section.key value ...]
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# A checkout works without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deberta_dist.errors import ConfigError, with_exit_code  # noqa: E402


@dataclass(frozen=True)
class Candidate:
    """One layout that can run.

    Attributes:
        tensor, pipeline, data: Parallel sizes.
        micro_batches: Per step and pipeline.
        peak: Bytes on the device of the fullest rank.
        sent: Bytes that the busiest rank communicates per step.
        bubble: Share of the step in which a rank waits for the pipeline.
        imbalance: FLOPs of the busiest rank over the mean.
        seconds: Estimate of a step.
    """

    tensor: int
    pipeline: int
    data: int
    micro_batches: int
    peak: int
    sent: int
    bubble: float
    imbalance: float
    seconds: float


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what is left of it: overrides of the TOML."""
    parser = argparse.ArgumentParser(
        description="List the layouts of a run on N GPUs. --section.key value overrides the TOML as in a launcher.",
        allow_abbrev=False,
    )
    parser.add_argument("toml", help="a launcher's TOML; its parallel sizes are replaced by every possible one")
    parser.add_argument("--world-size", type=int, required=True, help="number of processes, one per GPU")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="GB of one GPU (default: %(default)s)")
    parser.add_argument(
        "--bandwidth", type=float, default=50.0, help="GB/s of one GPU's messages, for the estimate (default: %(default)s)"
    )
    found, overrides = parser.parse_known_args(arguments)
    if found.world_size < 1 or found.gpu_memory <= 0 or found.bandwidth <= 0:
        parser.error("--world-size, --gpu-memory and --bandwidth must be positive")
    return found, overrides


def candidates(toml: str, overrides: Sequence[str], *, world_size: int, bandwidth: float) -> Iterator[Candidate]:
    """Every layout that passes the checks of a run.

    Args:
        toml: The launcher's TOML.
        overrides: As on a launcher's command line; those of parallel sizes are replaced.
        world_size: Processes.
        bandwidth: GB/s.
    """
    from deberta_dist.config import load_config
    from deberta_dist.planning.dry_run import bubble_fraction, rank_reports, step_seconds
    from deberta_dist.planning.plan import check_plan, read_model_config

    config = load_config(toml, overrides)
    layers = read_model_config(config).num_hidden_layers
    divisors = [size for size in range(1, world_size + 1) if world_size % size == 0]
    sizes = [(t, p) for t in divisors for p in divisors if world_size % (t * p) == 0 and p <= layers]
    for tensor, pipeline in sizes:
        changed = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline, "layers_per_stage": "auto"}
        parallel = config.parallel.model_copy(update=changed | {"data_parallel_size": "auto"})
        training = config.training.model_copy(update={"num_micro_batches": "auto"})
        try:
            plan = check_plan(
                config.model_copy(update={"parallel": parallel, "training": training}), world_size=world_size
            )
        except ConfigError:
            continue  # heads, layers or the batch do not divide
        reports = rank_reports(plan)
        bubble, loads = bubble_fraction(plan), [report.flops for report in reports]
        sent = max(report.communication.total for report in reports)
        imbalance = max(loads) * len(loads) / sum(loads)
        yield Candidate(
            tensor=tensor,
            pipeline=pipeline,
            data=plan.config.parallel.data_parallel_size,
            micro_batches=plan.config.training.num_micro_batches,
            peak=max(report.memory.peak for report in reports),
            sent=sent,
            bubble=bubble,
            imbalance=imbalance,
            seconds=step_seconds(plan) * imbalance / (1 - bubble) + sent / (bandwidth * 1e9),
        )


@with_exit_code
def main() -> int:
    """Runs the tool; the exit code is 0, or that of the error printed."""
    arguments, overrides = parse_arguments()
    options = {"world_size": arguments.world_size, "bandwidth": arguments.bandwidth}
    found = list(candidates(arguments.toml, overrides, **options))
    if not found:
        raise ConfigError(
            f"{arguments.toml}: no layout fits --world-size {arguments.world_size}; its heads, layers or "
            "global_batch_size do not divide. --dry-run of the launcher says which"
        )
    limit = arguments.gpu_memory * 1e9
    found.sort(key=lambda one: (one.peak > limit, one.seconds))
    print("tensor pipeline  data  micro-batches   peak GB   sent GB   bubble  busiest/mean   s/step")
    for one in found:
        print(
            f"{one.tensor:6} {one.pipeline:8} {one.data:5} {one.micro_batches:14} {one.peak / 1e9:9.2f} "
            f"{one.sent / 1e9:9.2f} {one.bubble:8.1%} {one.imbalance:13.3f} {one.seconds:8.2f}"
            + (f"   over {arguments.gpu_memory:g} GB" if one.peak > limit else "")
        )
    print(
        "\nOf the fullest and the busiest rank; GB = 1e9 bytes; sent per optimizer step. s/step orders the lines, no more:\n"
        f"an H100 at 40% of its peak, stretched by bubble and imbalance, plus the messages at {arguments.bandwidth:g} GB/s\n"
        "without overlap. Messages of a tensor size beyond one node are slower than that."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
