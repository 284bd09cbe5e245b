"""Fine-tuning on the tasks of a benchmark: what the launcher's Python half calls.

command line -> checkpoint, recipes, data, all checked -> process group -> for every task, for every seed:
``run.run_task`` -> table of scores.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch.distributed as dist

from deberta_dist.checkpoint.find import CHECKPOINTS_NAME
from deberta_dist.errors import ConfigError, DataError
from deberta_dist.files.atomic import replace_file
from deberta_dist.finetuning.arguments import FineTuneArguments, parse, usage
from deberta_dist.finetuning.folder import TaskFolder
from deberta_dist.finetuning.plan import TaskPlan, describe, make_plans
from deberta_dist.finetuning.run import TaskRun, identity, run_task
from deberta_dist.finetuning.starting_point import StartingPoint, open_starting_point
from deberta_dist.finetuning.state import open_earlier
from deberta_dist.parallel.mesh import discover_launch, local_device, make_mesh, start_process_group
from deberta_dist.tasks.base import Benchmark, Release
from deberta_dist.tasks.predictions import prediction_folders, predictions_file
from deberta_dist.tasks.registry import DEFAULT
from deberta_dist.tasks.report import make_report
from deberta_dist.tasks.scores import scored_split
from deberta_dist.training.build import mesh_shape
from deberta_dist.training.entry import require_machine
from deberta_dist.training.entry import start as start_launcher


def main(launcher_file: str, arguments: Sequence[str] | None = None, *, benchmark: Benchmark = DEFAULT) -> None:
    """Entry point of the launcher: runs it and ends the process with the right exit code.

    Args:
        launcher_file: Path of the launcher; its TOML has the same stem.
        arguments: Command line; ``sys.argv[1:]`` by default.
        benchmark: Whose tasks the command line names.
    """
    run = partial(_run, benchmark=benchmark)
    goes_on = "with the first task and seed that are not finished"
    start_launcher(run, Path(launcher_file), arguments, help_text=usage(benchmark), goes_on=goes_on)


def _run(launcher: Path, arguments: Sequence[str], *, benchmark: Benchmark = DEFAULT) -> None:
    parsed = parse(arguments, benchmark)
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
    device = local_device(launch)
    for plan in plans:
        require_machine(plan.config, deepspeed=plan.deepspeed, model_config=plan.model_config, device=device)
    left = _unfinished(plans, parsed, start=start, verify=launch.rank == 0)
    if launch.rank == 0:
        print("\n".join([describe(plans, start=start), *_continuations(left)]), flush=True)
    if left:
        _run_all(left, parsed, start=start, plans=plans)
    if launch.rank == 0:
        _report(plans[0].config.run.directory, parsed, finished_before=not left)


def _through(plan: TaskPlan, arguments: FineTuneArguments) -> str | None:
    """Name of the task from whose model this one starts, where it is asked for."""
    return (arguments.intermediate or None) if plan.starts_from_intermediate else None


def _unfinished(
    plans: Sequence[TaskPlan], arguments: FineTuneArguments, *, start: StartingPoint, verify: bool
) -> list[TaskRun]:
    """What is left to do, in order; raises ConfigError where a folder holds another run."""
    directory = plans[0].config.run.directory
    if (directory / CHECKPOINTS_NAME).exists():
        raise ConfigError(f"run.directory = {directory} holds a pre-training run: name another one")
    left = []
    for plan in plans:
        made_from = identity(plan, start=start, through=_through(plan, arguments))
        for seed in plan.seeds:
            folder = TaskFolder(directory, plan.task, seed)
            if not folder.is_done(made_from):
                earlier = open_earlier(folder, made_from, plan=plan, verify=verify)
                left.append(TaskRun(plan, seed, folder, made_from, earlier))
    return left


def _continuations(left: Sequence[TaskRun]) -> list[str]:
    """One line for each run that continues a shorter one."""
    return [
        f"{run.plan.task.name}, seed {run.seed}: continues {run.folder.final} ({run.earlier.epochs:g} epochs, "
        f"{run.earlier.done[0]} steps)"
        for run in left
        if run.earlier is not None
    ]


def _run_all(left: Sequence[TaskRun], arguments: FineTuneArguments, *, start: StartingPoint, plans: Sequence[TaskPlan]) -> None:
    config = plans[0].config
    if discover_launch().rank == 0:
        for run in left:
            # Whoever works on one of them is found before the ranks meet.
            run.folder.begin(earlier=None if run.earlier is None else run.earlier.run)
    device = start_process_group(timeout_minutes=config.run.timeout_minutes)
    mesh = make_mesh(mesh_shape(config), device=device, timeout_minutes=config.run.timeout_minutes)
    in_between: StartingPoint | None = None
    for run in left:
        through = _through(run.plan, arguments)
        if through is not None and in_between is None:
            trained = next(plan for plan in plans if plan.task.name == through)
            weights = TaskFolder(config.run.directory, trained.task, trained.seeds[0]).weights
            in_between = open_starting_point(weights, tokenizer=None, verify=False)
        run_task(run, start=start if through is None or in_between is None else in_between, mesh=mesh)
    dist.destroy_process_group()


def _report(run_directory: Path, arguments: FineTuneArguments, *, finished_before: bool) -> None:
    """Prints the scores of all that the run directory holds, and writes them there.

    What this start was asked for is done: a directory that also has what cannot be scored here, such as tasks of other
    data, costs the table alone.
    """
    if finished_before:
        print(f"{run_directory}: everything is finished already", flush=True)
    try:
        benchmark = arguments.benchmark
        folders = prediction_folders([run_directory], benchmark)
        files = [predictions_file(folder, task, scored_split(task)) for folder in folders for task in benchmark.tasks.values()]
        if not any(path.is_file() for path in files):
            return  # an intermediate task alone
        report = make_report(folders, Release(arguments.data, benchmark))
    except DataError as error:
        print(f"no table of scores: {error}", flush=True)
        return
    for name, text in {"txt": report.text(), "json": report.json(), "md": report.markdown()}.items():
        replace_file(run_directory / f"scores.{name}", f"{text.rstrip()}\n".encode())
    print(report.text(), flush=True)
