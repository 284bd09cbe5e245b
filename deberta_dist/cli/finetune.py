"""Fine-tunes a checkpoint on a benchmark: what ``launchers/finetune_superglue.sh`` does.

deberta-dist finetune --task RTE --data superglue/ --init hf/ --out runs/rte --num_gpus 8
deberta-dist finetune my_tasks.toml --task all --data superglue/ --init hf/ --sift
"""

import sys

from deberta_dist.cli.start import run_toml, start
from deberta_dist.errors import ConfigError, with_exit_code
from deberta_dist.files.shipped import is_installed, shipped

TOML = "launchers/finetune_superglue.toml"
USAGE = f"""usage: deberta-dist finetune [RUN.toml] [DeepSpeed flags] --task NAME[,NAME] --data DIR --init CHECKPOINT ...

RUN.toml is {TOML} by default. DeepSpeed flags are all of `deepspeed --help`: --num_gpus 8, ...
"""


@with_exit_code
def main() -> int:
    """Becomes DeepSpeed's launcher; returns only for ``--help`` and errors."""
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        from deberta_dist.finetuning.arguments import usage
        from deberta_dist.tasks.registry import DEFAULT

        print(f"{USAGE}\n{usage(DEFAULT)}", end="")
        return 0
    if arguments and not arguments[0].startswith("-"):
        return start("finetune", run_toml("finetune", arguments[0]), arguments[1:])
    if is_installed() and not any(word.partition("=")[0] in ("--out", "--run.directory", "--dry-run") for word in arguments):
        raise ConfigError("finetune needs --out DIR, the run directory: the shipped TOML has one for a checkout alone")
    return start("finetune", shipped(TOML), arguments)
