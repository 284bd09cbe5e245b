"""A run's own command line, the same for pre-training and fine-tuning. Imports no torch: `training.launch` reads it too.

DeepSpeed's flags are in `training.launch`, and ``--section.key value`` is `config.load_config`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from deberta_dist.config.section import MOST_RANKS
from deberta_dist.errors import ConfigError

HELP = ("--help", "-h")
DRY_RUN = "--dry-run"


@dataclass(frozen=True)
class RunArguments:
    """What every launcher understands.

    Attributes:
        rest: All other words, in order: ``--section.key value``, and a launcher's own flags.
        dry_run: Check everything, print the plan, start nothing.
        world_size: Number of processes that a dry run assumes; None for the fewest that the TOML allows.
    """

    rest: list[str]
    dry_run: bool
    world_size: int | None


def parse_arguments(arguments: Sequence[str]) -> RunArguments:
    """Takes a run's own flags and DeepSpeed's ``--local_rank`` out of a command line.

    Raises:
        ConfigError: --world-size without --dry-run, or with a value that is not a number of processes.
    """
    rest: list[str] = []
    dry_run, world_size = False, None
    words = list(arguments)
    while words:
        name, equals, value = words.pop(0).partition("=")
        if name in ("--local_rank", "--local-rank"):
            if not equals:
                del words[:1]  # the environment variable LOCAL_RANK has it, too
        elif name == DRY_RUN:
            dry_run = True
        elif name == "--world-size":
            value = value if equals else (words.pop(0) if words else "")
            if not value.isdecimal() or len(value) > 9 or not 1 <= int(value) <= MOST_RANKS:
                raise ConfigError(
                    f"command line: --world-size needs a number of processes, 1 to {MOST_RANKS}, got {value[:40]!r}"
                )
            world_size = int(value)
        else:
            rest.append(name + equals + value)
    if world_size is not None and not dry_run:
        raise ConfigError("command line: --world-size is for --dry-run only; a real run counts its processes")
    return RunArguments(rest=rest, dry_run=dry_run, world_size=world_size)
