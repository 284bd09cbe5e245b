"""Fine-tuning on SuperGLUE: what the launcher's Python half calls.

command line -> checkpoint, recipes, data, all checked -> process group -> for every task, for every seed:
``run.run_task`` -> table of scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deberta_dist.checkpoint.find import CHECKPOINTS_NAME
from deberta_dist.config import precision
from deberta_dist.errors import ConfigError, DataError
from deberta_dist.files.atomic import replace_file
from deberta_dist.finetuning.arguments import USAGE, Arguments, parse
from deberta_dist.finetuning.folder import TaskFolder
from deberta_dist.finetuning.plan import TaskPlan, describe, make_plans
from deberta_dist.finetuning.run import identity, run_task
from deberta_dist.finetuning.starting_point import StartingPoint, open_starting_point
from deberta_dist.finetuning.state import Earlier, open_earlier
from deberta_dist.models.attention_choice import require_attention
from deberta_dist.parallel.layout import DTYPES
from deberta_dist.parallel.mesh import discover_launch, local_device, make_mesh, start_process_group
from deberta_dist.tasks.mnli import MNLI
from deberta_dist.tasks.predictions import prediction_folders, predictions_file
from deberta_dist.tasks.registry import TASKS
from deberta_dist.tasks.release import Release
from deberta_dist.tasks.report import make_report
from deberta_dist.tasks.scores import scored_split
from deberta_dist.training.build import mesh_shape
from deberta_dist.training.entry import start as start_launcher


def main(launcher_file: str, arguments: Sequence[str] | None = None) -> None:
    """Entry point of the launcher: runs it and ends the process with the right exit code.

    Args:
        launcher_file: Path of the launcher; its TOML has the same stem.
        arguments: Command line; ``sys.argv[1:]`` by default.
    """
    goes_on = "with the first task and seed that are not finished"
    start_launcher(_run, Path(launcher_file), arguments, help_text=USAGE, goes_on=goes_on)


def _run(launcher: Path, arguments: Sequence[str]) -> None:
    parsed = parse(arguments)
    launch = discover_launch()
    if parsed.dry_run and launch.rank != 0:
        return
    start = open_starting_point(parsed.init, tokenizer=parsed.tokenizer, verify=launch.rank == 0, options=parsed.read_options)
    world_size = (parsed.world_size or 0) if parsed.dry_run else launch.world_size
    plans = make_plans(parsed, toml=launcher.with_suffix(".toml"), start=start, world_size=world_size)
    if parsed.dry_run:
        left = _unfinished(plans, parsed, start=start, verify=False)
        print("\n".join([describe(plans, start=start), *_continuations(left)]))
        return
    if any(precision(plan.deepspeed) == "fp16" for plan in plans) and not torch.cuda.is_available():
        raise ConfigError(
            f"run.deepspeed = {plans[0].config.run.deepspeed} asks for fp16, which needs a GPU; bf16 and fp32 run here"
        )
    device = local_device(launch)
    for plan in plans:
        require_attention(
            plan.config.training.attention,
            plan.model_config,
            dtype=DTYPES[precision(plan.deepspeed)],
            device=device,
            where=f"{plan.config.source}: training.attention",
        )
    left = _unfinished(plans, parsed, start=start, verify=launch.rank == 0)
    if launch.rank == 0:
        print("\n".join([describe(plans, start=start), *_continuations(left)]), flush=True)
    if left:
        _run_all(left, parsed, start=start, plans=plans)
    if launch.rank == 0:
        _report(plans[0].config.run.directory, parsed, finished_before=not left)


def _through_mnli(plan: TaskPlan, arguments: Arguments) -> bool:
    return arguments.intermediate and plan.starts_from_intermediate


@dataclass(frozen=True)
class _Job:
    """A task with a seed that is left to do, and the shorter run that it continues."""

    plan: TaskPlan
    seed: int
    folder: TaskFolder
    made_from: dict[str, Any]
    earlier: Earlier | None


def _unfinished(plans: Sequence[TaskPlan], arguments: Arguments, *, start: StartingPoint, verify: bool) -> list[_Job]:
    """What is left to do, in order; raises ConfigError where a folder holds another run."""
    directory = plans[0].config.run.directory
    if (directory / CHECKPOINTS_NAME).exists():
        raise ConfigError(f"run.directory = {directory} holds a pre-training run: name another one")
    left = []
    for plan in plans:
        made_from = identity(plan, start=start, intermediate=_through_mnli(plan, arguments))
        for seed in plan.seeds:
            folder = TaskFolder(directory, plan.task, seed)
            if not folder.is_done(made_from):
                earlier = open_earlier(folder, made_from, plan=plan, verify=verify)
                left.append(_Job(plan, seed, folder, made_from, earlier))
    return left


def _continuations(left: Sequence[_Job]) -> list[str]:
    """One line for each run that continues a shorter one."""
    return [
        f"{job.plan.task.name}, seed {job.seed}: continues {job.folder.final} ({job.earlier.epochs:g} epochs, "
        f"{job.earlier.done[0]} steps)"
        for job in left
        if job.earlier is not None
    ]


def _run_all(left: Sequence[_Job], arguments: Arguments, *, start: StartingPoint, plans: Sequence[TaskPlan]) -> None:
    config = plans[0].config
    if discover_launch().rank == 0:
        for job in left:
            # Whoever works on one of them is found before the ranks meet.
            job.folder.begin(earlier=None if job.earlier is None else job.earlier.run)
    device = start_process_group(timeout_minutes=config.run.timeout_minutes)
    mesh = make_mesh(mesh_shape(config), device=device, timeout_minutes=config.run.timeout_minutes)
    from_mnli: StartingPoint | None = None
    for job in left:
        through_mnli = _through_mnli(job.plan, arguments)
        if through_mnli and from_mnli is None:
            mnli = next(plan for plan in plans if plan.task is MNLI)
            weights = TaskFolder(config.run.directory, MNLI, mnli.seeds[0]).weights
            from_mnli = open_starting_point(weights, tokenizer=None, verify=False)
        run_task(
            job.plan,
            job.seed,
            start=from_mnli if through_mnli else start,
            mesh=mesh,
            folder=job.folder,
            made_from=job.made_from,
            earlier=job.earlier,
        )
    dist.destroy_process_group()


def _report(run_directory: Path, arguments: Arguments, *, finished_before: bool) -> None:
    """Prints the scores of all that the run directory holds, and writes them there.

    What this start was asked for is done: a directory that also has what cannot be scored here, such as tasks of other
    data, costs the table alone.
    """
    if finished_before:
        print(f"{run_directory}: everything is finished already", flush=True)
    try:
        folders = prediction_folders([run_directory])
        files = [predictions_file(folder, task, scored_split(task)) for folder in folders for task in TASKS.values()]
        if not any(path.is_file() for path in files):
            return  # MNLI alone
        report = make_report(folders, Release(arguments.data))
    except DataError as error:
        print(f"no table of scores: {error}", flush=True)
        return
    for name, text in {"txt": report.text(), "json": report.json(), "md": report.markdown()}.items():
        replace_file(run_directory / f"scores.{name}", f"{text.rstrip()}\n".encode())
    print(report.text(), flush=True)
