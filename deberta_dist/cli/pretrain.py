"""Starts a pre-training run, as its launcher does; the TOML needs no launcher.

deberta-dist pretrain my_run/my_run.toml --num_gpus 8
deberta-dist pretrain my_run/my_run.toml --hostfile hosts --training.max_steps 1000
deberta-dist pretrain my_run/my_run.toml --dry-run --world-size 64
"""

import sys

from deberta_dist.cli.start import run_toml, start
from deberta_dist.errors import ConfigError, with_exit_code

USAGE = """usage: deberta-dist pretrain RUN.toml [DeepSpeed flags] [--section.key VALUE ...] [--dry-run [--world-size N]]

Starts DeepSpeed's launcher with a pre-training run. An interrupted run is resumed from its last checkpoint.

RUN.toml              what to train; the run's launcher, RUN.sh, names it as well
DeepSpeed flags       --num_gpus 8, --hostfile FILE, --include, ...: all of `deepspeed --help`. Without a GPU and without any
                      of them, as many processes start as [parallel] asks for
--section.key VALUE   overrides a key of the TOML (deberta_dist/config/schema.py explains all of them)
--dry-run             check everything, print layout, memory and communication, start nothing
--world-size N        processes that a dry run assumes"""


@with_exit_code
def main() -> int:
    """Becomes DeepSpeed's launcher; returns only for ``--help`` and errors."""
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return 0
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError("pretrain needs a run first: deberta-dist pretrain RUN.toml [arguments] (--help explains them)")
    return start("pretrain", run_toml("pretrain", arguments[0]), arguments[1:])
