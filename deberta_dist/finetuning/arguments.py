"""The command line of ``launchers/finetune_superglue.sh``."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from deberta_dist.conversion.options import ReadOptions, add_options, options_of
from deberta_dist.errors import ConfigError
from deberta_dist.tasks.mnli import MNLI
from deberta_dist.tasks.registry import MAIN_TASKS, TASKS
from deberta_dist.training.arguments import parse_arguments

ALL = "all"
# Natural language inference first, then the small tasks, then the long ones.
ORDER = ("RTE", "CB", "COPA", "WSC", "BoolQ", "WiC", "MultiRC", "ReCoRD")
assert sorted(ORDER) == sorted(MAIN_TASKS)

USAGE = """Fine-tunes a DeBERTa on SuperGLUE.

    deepspeed launchers/finetune_superglue.sh --task RTE --data DIR --init CHECKPOINT [--sift] [--seeds 5]

--task NAME[,NAME]    BoolQ, CB, COPA, MultiRC, ReCoRD, RTE, WiC, WSC, MNLI, or all: what the data holds.
                      AX-b and AX-g are answered by the RTE model wherever the data holds them
--data DIR            the official v2 release: its folder, or combined.zip
--init CHECKPOINT     a run's weights/, released weights, a Hugging Face directory
--tokenizer FILE      spm.model, where none lies with the checkpoint
--prefix PREFIX       what stands before the model's own names in the checkpoint
--allow-unmapped PATTERN  keys of the checkpoint that may be left out; may be given again
--recipe FILE         recipes by task; by default finetune_recipes/ has one for the model's size
--intermediate MNLI   train on MNLI first; recipes say which tasks start from that model
--mnli DIR            GLUE's MNLI/ (default: MNLI/ in --data)
--sift                adversarial training; same as --sift.enabled true
--seeds N             runs of every task; same as --training.seeds N
--out DIR             run directory; same as --run.directory DIR
--section.key VALUE   any key of the TOML, for all tasks (deberta_dist/config/finetune.py)
--dry-run             check everything, print the plan, start nothing
--world-size N        processes that a dry run assumes
"""


@dataclass(frozen=True)
class Arguments:
    """What the command line asks for."""

    tasks: tuple[str, ...]
    data: Path
    init: Path
    tokenizer: Path | None
    read_options: ReadOptions
    recipe: Path | None
    mnli: Path | None
    intermediate: bool
    dry_run: bool
    world_size: int | None
    overrides: tuple[str, ...]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message} (--help lists what there is)")


def parse(arguments: Sequence[str]) -> Arguments:
    """Reads the command line.

    Raises:
        ConfigError: something is missing, unknown or of the wrong form.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task", required=True)
    for name in ("--data", "--init"):
        parser.add_argument(name, type=Path, required=True)
    for name in ("--tokenizer", "--recipe", "--mnli"):
        parser.add_argument(name, type=Path)
    add_options(parser, dtype_help=None)
    parser.add_argument("--intermediate", choices=[MNLI.name])
    parser.add_argument("--sift", action="store_true")
    parser.add_argument("--seeds")
    parser.add_argument("--out")
    of_run = parse_arguments(arguments)
    known, overrides = parser.parse_known_args(of_run.rest)
    if known.mnli is not None and known.intermediate is None and MNLI.name not in known.task.split(","):
        raise ConfigError(f"command line: --mnli belongs to --intermediate {MNLI.name} or --task {MNLI.name}")
    short = {"--run.directory": known.out, "--training.seeds": known.seeds}
    overrides += [word for key, value in short.items() if value is not None for word in (key, value)]
    overrides += ["--sift.enabled", "true"] if known.sift else []
    return Arguments(
        tasks=_tasks(known.task),
        data=known.data,
        init=known.init,
        tokenizer=known.tokenizer,
        read_options=options_of(known),
        recipe=known.recipe,
        mnli=known.mnli,
        intermediate=known.intermediate is not None,
        dry_run=of_run.dry_run,
        world_size=of_run.world_size,
        overrides=tuple(overrides),
    )


def _tasks(text: str) -> tuple[str, ...]:
    names = text.split(",")
    if names == [ALL]:
        return (ALL,)
    for name in names:
        if name in TASKS and TASKS[name].is_diagnostic:
            raise ConfigError(f"command line: {name} has no training rows: --task {TASKS[name].answered_by} answers it as well")
        if name not in (*ORDER, MNLI.name):
            raise ConfigError(
                f"command line: --task {text}: {name!r} is none of {', '.join(ORDER)}, {MNLI.name}; or {ALL} alone"
            )
    return tuple(name for name in (MNLI.name, *ORDER) if name in names)
