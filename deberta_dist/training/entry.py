"""How a launcher's Python half begins and ends: its own flags, and one line and an exit code for what goes wrong."""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from deberta_dist.config.section import MOST_RANKS
from deberta_dist.errors import ConfigError, DebertaDistError
from deberta_dist.training.hostfile import check_front
from deberta_dist.training.launch import FLAGS_WITH_VALUE

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


@dataclass(frozen=True)
class Arguments:
    """A launcher's command line."""

    overrides: list[str]
    dry_run: bool
    world_size: int | None


def parse_arguments(arguments: Sequence[str]) -> Arguments:
    """Takes our own flags and DeepSpeed's ``--local_rank`` out; the rest are overrides for ``load_config``."""
    overrides: list[str] = []
    dry_run, world_size = False, None
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name in ("--local_rank", "--local-rank"):
            if not equals:
                rest.pop(0)  # the launcher's environment says it as well
        elif name == "--dry-run":
            dry_run = True
        elif name == "--world-size":
            value = value if equals else (rest.pop(0) if rest else "")
            if not value.isdecimal() or len(value) > 9 or not 1 <= int(value) <= MOST_RANKS:
                raise ConfigError(
                    f"command line: --world-size needs a number of processes, 1 to {MOST_RANKS}, got {value[:40]!r}"
                )
            world_size = int(value)
        else:
            overrides.append(name + equals + value)
    if world_size is not None and not dry_run:
        raise ConfigError("command line: --world-size belongs to --dry-run; a real run has the processes it has")
    return Arguments(overrides=overrides, dry_run=dry_run, world_size=world_size)


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
        launcher: Its path.
        arguments: Command line; ``sys.argv[1:]`` by default.
        help_text: For ``--help``.
        goes_on: From where the same command goes on after an interrupt.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    is_speaker = os.environ.get("LOCAL_RANK", "0") == "0"
    if "--help" in arguments or "-h" in arguments:
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
