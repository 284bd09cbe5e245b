"""Fine-tuning on SuperGLUE: what the launcher's Python half calls.

command line -> checkpoint, recipes, data, all checked -> process group -> for every task, for every seed:
``run.run_task`` -> table of scores.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from deberta_dist.checkpoint.find import CHECKPOINTS_NAME
from deberta_dist.config import precision
from deberta_dist.config.write import replace_text
from deberta_dist.errors import ConfigError, DataError
from deberta_dist.finetuning.arguments import USAGE, Arguments, parse
from deberta_dist.finetuning.folder import TaskFolder
from deberta_dist.finetuning.plan import TaskPlan, describe, make_plans
from deberta_dist.finetuning.run import identity, run_task
from deberta_dist.finetuning.starting_point import StartingPoint, open_starting_point
from deberta_dist.mesh import discover_launch, local_device, make_mesh, start_process_group
from deberta_dist.models.attention_choice import require_attention
from deberta_dist.planning.layout import DTYPES
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
    start = open_starting_point(
        parsed.init, tokenizer=parsed.tokenizer, verify=launch.rank == 0, options=parsed.read_options
    )
    world_size = (parsed.world_size or 0) if parsed.dry_run else launch.world_size
    plans = make_plans(parsed, toml=launcher.with_suffix(".toml"), start=start, world_size=world_size)
    if parsed.dry_run:
        print(describe(plans, start=start))
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
    if (plans[0].config.run.directory / CHECKPOINTS_NAME).exists():
        raise ConfigError(f"run.directory = {plans[0].config.run.directory} holds a pre-training run: name another one")
    left = _unfinished(plans, parsed, start=start)
    if launch.rank == 0:
        print(describe(plans, start=start), flush=True)
    if left:
        _run_all(left, parsed, start=start, plans=plans)
    if launch.rank == 0:
        _report(plans[0].config.run.directory, parsed, finished_before=not left)


def _through_mnli(plan: TaskPlan, arguments: Arguments) -> bool:
    return arguments.intermediate and plan.starts_from_intermediate


def _folder(plan: TaskPlan, seed: int) -> TaskFolder:
    return TaskFolder(plan.config.run.directory, plan.task, seed)


def _unfinished(plans: Sequence[TaskPlan], arguments: Arguments, *, start: StartingPoint) -> list[tuple[TaskPlan, int]]:
    """What is left to do, in order; raises ConfigError where a folder holds another run."""
    return [
        (plan, seed)
        for plan in plans
        for seed in plan.seeds
        if not _folder(plan, seed).is_done(identity(plan, start=start, intermediate=_through_mnli(plan, arguments)))
    ]


def _run_all(
    left: Sequence[tuple[TaskPlan, int]], arguments: Arguments, *, start: StartingPoint, plans: Sequence[TaskPlan]
) -> None:
    config = plans[0].config
    is_writer = discover_launch().rank == 0
    folders = [_folder(plan, seed) for plan, seed in left]
    if is_writer:
        for folder in folders:
            folder.begin()  # whoever works on one of them is found before the ranks meet
    device = start_process_group(timeout_minutes=config.run.timeout_minutes)
    mesh = make_mesh(mesh_shape(config), device=device, timeout_minutes=config.run.timeout_minutes)
    from_mnli: StartingPoint | None = None
    for (plan, seed), folder in zip(left, folders, strict=True):
        through_mnli = _through_mnli(plan, arguments)
        if through_mnli and from_mnli is None:
            mnli = next(plan for plan in plans if plan.task is MNLI)
            from_mnli = open_starting_point(_folder(mnli, mnli.seeds[0]).weights, tokenizer=None, verify=False)
        run_task(
            plan,
            seed,
            start=from_mnli if through_mnli else start,
            mesh=mesh,
            folder=folder,
            made_from=identity(plan, start=start, intermediate=through_mnli),
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
        replace_text(run_directory / f"scores.{name}", text.rstrip() + "\n")
    print(report.text(), flush=True)
