"""The command line of fine-tuning: the flags of every benchmark, and those of its intermediate tasks."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from deberta_dist.conversion.options import CheckpointReadOptions, add_options, options_of
from deberta_dist.errors import ConfigError
from deberta_dist.tasks.base import Benchmark, Task
from deberta_dist.tasks.registry import DEFAULT
from deberta_dist.training.arguments import parse_arguments

ALL = "all"

_USAGE = """Fine-tunes a DeBERTa on {name}.

    {command} --task {first} --data DIR --init CHECKPOINT [--sift] [--seeds 5]

--task NAME[,NAME]    {tasks}, or all: what the data holds.
{diagnostics}--data DIR            {data}
--init CHECKPOINT     weights to start from: a run's weights/, released weights or a Hugging Face directory
--tokenizer FILE      spm.model, if there is none beside the checkpoint
--prefix PREFIX       prefix of the model's parameter names in the checkpoint
--allow-unmapped PATTERN  keys of the checkpoint that may be left out; repeatable
--recipe FILE         recipes by task (default: the file for the model's size in finetune_recipes/)
{intermediate}--sift                adversarial training; same as --sift.enabled true
--seeds N             runs per task; same as --training.seeds N
--out DIR             run directory; same as --run.directory DIR
--section.key VALUE   overrides a key of the TOML for all tasks (deberta_dist/config/finetune.py)
--dry-run             check everything, print the plan, start nothing
--world-size N        processes that a dry run assumes
"""


@dataclass(frozen=True)
class FineTuneArguments:
    """What the command line asks for.

    Attributes:
        benchmark: Whose tasks they are.
        tasks: Names in the order of training, or ``ALL`` alone.
        data: Folder or zip of the benchmark's release.
        init: Checkpoint to start from.
        tokenizer: SentencePiece model; None for the one beside the checkpoint.
        read_options: What the user says of the checkpoint.
        recipe: File of recipes; None for the one of the model's size.
        intermediate: Task that is trained first, for others to start from; empty for none.
        intermediate_data: Folders of intermediate tasks by name, where they are not in ``data``.
        dry_run: Whether to start nothing.
        world_size: Processes that a dry run assumes.
        overrides: Words of the form --section.key value.
    """

    benchmark: Benchmark
    tasks: tuple[str, ...]
    data: Path
    init: Path
    tokenizer: Path | None
    read_options: CheckpointReadOptions
    recipe: Path | None
    intermediate: str
    intermediate_data: Mapping[str, Path]
    dry_run: bool
    world_size: int | None
    overrides: tuple[str, ...]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message} (--help lists what there is)")


def usage(benchmark: Benchmark) -> str:
    """Text of ``--help``."""
    flags = []
    for task in benchmark.intermediate:
        train = f"train on {task.name} first; recipes say which tasks start from that model"
        data = f"{task.data_help} (default: {task.name}/ in --data)"
        flags += [(f"--intermediate {task.name}", train), (f"{_data_flag(task)} DIR", data)]
    answered = [(task, task.diagnostics) for task in benchmark.tasks.values() if task.diagnostics]
    lines = [
        f"{' and '.join(other.name for other in others)} are answered by the {task.name} model wherever the data holds them"
        for task, others in answered
    ]
    return _USAGE.format(
        name=benchmark.name,
        command=benchmark.command,
        first=benchmark.order[0],
        tasks=", ".join([*benchmark.main_tasks, *(task.name for task in benchmark.intermediate)]),
        diagnostics="".join(f"{'':22}{line}\n" for line in lines),
        data=benchmark.data_help,
        intermediate="".join(f"{flag:22}{text}\n" for flag, text in flags),
    )


def parse(arguments: Sequence[str], benchmark: Benchmark = DEFAULT) -> FineTuneArguments:
    """Reads the command line.

    Args:
        arguments: Words of the command line behind the launcher's name.
        benchmark: Whose tasks it names.

    Raises:
        ConfigError: something is missing, unknown or of the wrong form.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task", required=True)
    for name in ("--data", "--init"):
        parser.add_argument(name, type=Path, required=True)
    intermediate = {task.name: task for task in benchmark.intermediate}
    for name in ("--tokenizer", "--recipe", *map(_data_flag, benchmark.intermediate)):
        parser.add_argument(name, type=Path)
    add_options(parser, dtype_help=None)
    if intermediate:
        parser.add_argument("--intermediate", choices=list(intermediate), default="")
    parser.add_argument("--sift", action="store_true")
    parser.add_argument("--seeds")
    parser.add_argument("--out")
    of_run = parse_arguments(arguments)
    known, overrides = parser.parse_known_args(of_run.rest)
    own_data = {task.name: getattr(known, _data_flag(task).removeprefix("--")) for task in benchmark.intermediate}
    for name, folder in own_data.items():
        if folder is not None and name not in (known.intermediate, *known.task.split(",")):
            flag = _data_flag(intermediate[name])
            raise ConfigError(f"command line: {flag} belongs to --intermediate {name} or --task {name}")
    short = {"--run.directory": known.out, "--training.seeds": known.seeds}
    overrides += [word for key, value in short.items() if value is not None for word in (key, value)]
    overrides += ["--sift.enabled", "true"] if known.sift else []
    return FineTuneArguments(
        benchmark=benchmark,
        tasks=_tasks(known.task, benchmark),
        data=known.data,
        init=known.init,
        tokenizer=known.tokenizer,
        read_options=options_of(known),
        recipe=known.recipe,
        intermediate=known.intermediate if intermediate else "",
        intermediate_data={name: folder for name, folder in own_data.items() if folder is not None},
        dry_run=of_run.dry_run,
        world_size=of_run.world_size,
        overrides=tuple(overrides),
    )


def _data_flag(task: Task) -> str:
    """Flag for the folder of an intermediate task: its name in small letters."""
    return f"--{task.name.lower()}"


def _tasks(text: str, benchmark: Benchmark) -> tuple[str, ...]:
    names = text.split(",")
    if names == [ALL]:
        return (ALL,)
    for name in names:
        if name in benchmark.tasks and benchmark.tasks[name].is_diagnostic:
            other = benchmark.tasks[name].answered_by
            raise ConfigError(f"command line: {name} has no training rows: --task {other} answers it as well")
        if name not in benchmark.trainable:
            known = ", ".join(benchmark.trainable)
            raise ConfigError(f"command line: --task {text}: {name!r} is none of {known}; or {ALL} alone")
    in_order = (*(task.name for task in benchmark.intermediate), *benchmark.order)
    return tuple(name for name in in_order if name in names)
