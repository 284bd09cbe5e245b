"""Measures this machine's processors and messages for ``deberta-dist plan --calibration FILE``.

deberta-dist calibrate this_machine.json
deberta-dist calibrate this_machine.json --processes 1,2,4 --rounds 5

Gloo on the CPU. A calibration holds for the numbers of processes that it was measured with.
"""

import argparse
import json
from pathlib import Path

from deberta_dist.errors import ConfigError, require_packages, with_exit_code
from deberta_dist.files.atomic import new_file, refuse_existing

MOST_PROCESSES = 256


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Measure this machine for plan: matrix products, passes over memory and messages, in minutes.",
        epilog="Other work on the machine makes the numbers worse: measure while it is quiet. Gloo on the CPU.",
    )
    parser.add_argument("output", type=Path, metavar="FILE.json", help="calibration to make; never replaced")
    parser.add_argument(
        "--processes",
        default="1,2,4,8",
        metavar="N,...",
        help="numbers of processes to measure, as plan will be asked for them; 1 is always among them (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is measured (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a round (default: %(default)s)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=1800,
        metavar="SECONDS",
        help="limit for all measurements together (default: %(default)s)",
    )
    return parser.parse_args()


def counts_of(text: str) -> list[int]:
    """``1,2,4`` -> the numbers in order, 1 among them.

    Raises:
        ConfigError: one is not a number from 1 to ``MOST_PROCESSES``.
    """
    for word in text.split(","):
        if not (word.isascii() and word.isdigit() and 1 <= int(word[:9]) <= MOST_PROCESSES):
            raise ConfigError(f"--processes {text}: {word!r} is not a number of processes, 1 to {MOST_PROCESSES}")
    return sorted({1, *map(int, text.split(","))})


@with_exit_code
def main() -> int:
    """Runs the verb; the exit code is 0, or that of the error printed."""
    arguments = parse_arguments()
    if arguments.steps < 1 or arguments.rounds < 1:
        raise ConfigError(f"--steps {arguments.steps} and --rounds {arguments.rounds} must be positive")
    counts = counts_of(arguments.processes)
    refuse_existing(arguments.output)
    require_packages("torch", "deepspeed")
    # DeepSpeed comes in with the ranks' module; a wrong flag is reported before.
    import deberta_dist.operations.calibration as measuring
    from deberta_dist.operations.measure import machine

    about = machine()
    rounds = measuring.measure(
        [measuring.CALIBRATES], counts=counts, rounds=arguments.rounds, steps=arguments.steps, timeout=arguments.timeout
    )
    table = measuring.calibrated_table(rounds, cores=about["cores"])
    table["about"] = {"machine": about, "command": "deberta-dist calibrate", "rounds": arguments.rounds}
    with new_file(arguments.output) as file:
        file.write((json.dumps(table, indent=1) + "\n").encode("utf-8"))
    for count, numbers in table["processes"].items():
        print(
            f"{count:>4} processes: products {numbers['product_rate'] / 1e9:.3g} GFLOP/s, memory "
            f"{numbers['memory_bandwidth'] / 1e9:.3g} GB/s, {numbers['seconds_per_call'] * 1e6:.3g} us per operation"
        )
    print(f"written: {arguments.output}; deberta-dist plan RUN.toml --gpus N --calibration {arguments.output} reads it")
    return 0
