"""What DeepSpeed starts in every process of ``deberta-dist pretrain`` and ``finetune``.

    python -m deberta_dist.cli.rank [--local_rank=N] VERB RUN.toml [arguments]

A launcher's Python half does the same for ``deepspeed LAUNCHER.sh``.
"""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    """Ends the process with the run's exit code."""
    local_rank = [word for word in arguments[:1] if word.startswith("--local_rank=")]
    verb, toml, *rest = arguments[len(local_rank) :]
    if verb == "pretrain":
        from deberta_dist.training.pretrain import main as start
    else:
        assert verb == "finetune", verb
        from deberta_dist.finetuning.finetune import main as start
    start(toml, [*local_rank, *rest])


if __name__ == "__main__":
    main(sys.argv[1:])
