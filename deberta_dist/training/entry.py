"""How a launcher's Python half begins and ends: what the machine must have, one line and an exit code for what goes wrong."""

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
        config: Resolved; its ``training.attention`` is checked, and its ``run.deepspeed`` named.
        deepspeed: Filled-in DeepSpeed JSON, which says the precision.
        model_config: Decides which kernels can compute it.
        device: Where this rank will compute.

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
    """Runs a launcher and ends the process where something goes wrong.

    Args:
        run: Takes the launcher's path and the command line.
        launcher: Its path; the TOML beside it has the same stem.
        arguments: Command line; ``sys.argv[1:]`` by default.
        help_text: What ``--help`` prints.
        goes_on: From where the same command goes on after an interrupt.
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
        # Ranks of one node fail alike: one of them says it.
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
            print(f"interrupted; the same command goes on {goes_on}", file=sys.stderr, flush=True)
        _leave(130)
    except Exception:
        traceback.print_exc()
        _leave(70)


def _leave(code: int) -> None:
    """Ends the process; with peers, at once: an orderly shutdown would wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        os._exit(code)
    sys.exit(code)
