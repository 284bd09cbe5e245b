"""Start and end of a launcher's Python half: checks of the machine, and one line and an exit code for every error."""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deberta_dist.config import FineTuneConfig, RunConfig, precision
from deberta_dist.errors import ConfigError, DebertaDistError
from deberta_dist.models.attention_dispatch import require_attention
from deberta_dist.models.config import DebertaConfig
from deberta_dist.parallel.layout import DTYPES
from deberta_dist.training.arguments import HELP
from deberta_dist.training.hostfile import check_front
from deberta_dist.training.launch import FLAGS_WITH_VALUE

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def require_machine(
    config: RunConfig | FineTuneConfig,
    *,
    deepspeed: Mapping[str, Any],
    model_config: DebertaConfig,
    device: torch.device,
) -> None:
    """Refuses what this machine cannot compute, before any process group exists.

    Args:
        config: Resolved; ``training.attention`` is checked, and messages name ``run.deepspeed``.
        deepspeed: DeepSpeed JSON without "auto"; it says the precision.
        model_config: Its head size and position buckets decide which kernels support it.
        device: The device that this rank will use.

    Raises:
        ConfigError: fp16 without a GPU, or an attention that does not run here.
    """
    numbers = precision(deepspeed)
    if numbers == "fp16" and not torch.cuda.is_available():
        raise ConfigError(f"run.deepspeed = {config.run.deepspeed} asks for fp16, which needs a GPU; bf16 and fp32 run here")
    require_attention(
        config.training.attention,
        model_config,
        dtype=DTYPES[numbers],
        device=device,
        where=f"{config.source}: training.attention",
    )


def start(
    run: Callable[[Path, Sequence[str]], None],
    launcher: Path,
    arguments: Sequence[str] | None,
    *,
    help_text: str,
    goes_on: str,
) -> None:
    """Runs a launcher's program, and turns every error into one line and an exit code.

    Args:
        run: The program; takes the launcher's path and the command line.
        launcher: Path of the launcher; the TOML beside it has the same stem.
        arguments: Command line; None for ``sys.argv[1:]``.
        help_text: Printed for ``--help`` instead of running the program.
        goes_on: Ends the line after an interrupt: where the same command resumes, e.g. "from the last checkpoint".
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    is_speaker = os.environ.get("LOCAL_RANK", "0") == "0"
    if any(word in arguments for word in HELP):
        if is_speaker:
            print(help_text)
        return
    try:
        check_front(FLAGS_WITH_VALUE)
        run(launcher, arguments)
    except DebertaDistError as error:
        # Before the process group exists all ranks of a node fail with the same error: one of them prints it.
        if is_speaker or dist.is_initialized():
            print(f"error: {error}", file=sys.stderr, flush=True)
        _leave(error.exit_code)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            traceback.print_exc()
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr, flush=True)
        _leave(74)
    except KeyboardInterrupt:
        if is_speaker:
            print(f"interrupted; the same command resumes {goes_on}", file=sys.stderr, flush=True)
        _leave(130)
    except Exception:
        traceback.print_exc()
        _leave(70)


def _leave(code: int) -> None:
    """Ends the process. With a process group, at once: an orderly exit would wait in its destructors for the other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        os._exit(code)
    sys.exit(code)
