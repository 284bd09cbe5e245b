"""Plans fine-tuning: every task with every setting, checked against data and checkpoint before a process group exists."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deberta_dist.config import (
    FineTuneConfig,
    load_config,
    read_recipes,
    resolve_finetuning,
    smallest_world_size,
)
from deberta_dist.errors import ConfigError, DataError
from deberta_dist.finetuning.arguments import ALL, FineTuneArguments
from deberta_dist.finetuning.batches import LENGTH_MULTIPLE, TrainingOrder
from deberta_dist.finetuning.sift import SiftSettings
from deberta_dist.finetuning.starting_point import StartingPoint
from deberta_dist.models.config import DebertaConfig
from deberta_dist.parallel.layout import Layout, classifier_layout
from deberta_dist.planning.deepspeed import checked_deepspeed
from deberta_dist.tasks.base import TEST, TRAIN, Features, Head, Release, Split, Task, encode_split
from deberta_dist.tasks.data_files import DataFiles
from deberta_dist.tasks.encoding import SequenceLengths

RECIPES = "finetune_recipes"
# Smallest hidden size -> file of recipes; the paper's ranges are for three sizes, the last is the demo's.
_SIZES = ((1536, "1.5b"), (1024, "large"), (384, "base"), (0, "tiny"))


@dataclass(frozen=True)
class TaskPlan:
    """One task, ready to be trained with any of its seeds.

    Attributes:
        config: Settings with the recipe and the overrides in them and no `"auto"` left.
        deepspeed: DeepSpeed's configuration with everything filled in.
        model_config: The starting point's, with the dropout before the head that the run asks for.
        layout: Who holds what.
        features: By split, of all that the task has.
        diagnostics: Test features of the diagnostics that this task's model answers.
        recipe: File of the recipe, for messages.
        deepspeed_notes: What the JSON leaves to DeepSpeed, one line each.
        is_intermediate: Whether it is trained for others to start from.
        may_start_from: Name of the intermediate task from whose model it may start; empty for none.
    """

    task: Task
    config: FineTuneConfig
    deepspeed: dict[str, Any]
    model_config: DebertaConfig
    layout: Layout
    features: dict[str, Features]
    diagnostics: tuple[Features, ...]
    recipe: Path
    deepspeed_notes: tuple[str, ...] = ()
    is_intermediate: bool = False
    may_start_from: str = ""

    @property
    def seeds(self) -> range:
        """Seeds of its runs. A task from which others start has one."""
        training = self.config.training
        return range(training.seed, training.seed + (1 if self.is_intermediate else training.seeds))

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classifier's rows; empty where one row scores every choice."""
        return () if self.task.head is Head.CHOICE else self.task.labels

    @property
    def starts_from_intermediate(self) -> bool:
        """Whether its recipe prefers the model of an intermediate task."""
        return self.config.training.start == "intermediate" and self.may_start_from != ""

    @property
    def sift(self) -> SiftSettings | None:
        """How to perturb; None without SiFT."""
        settings = self.config.sift.model_dump()
        return SiftSettings(**settings) if settings.pop("enabled") else None

    def order(self, seed: int, *, done: tuple[int, int] = (0, 0)) -> TrainingOrder:
        """The rows of every step; ``done`` are steps and decisions of a shorter run that is resumed."""
        training = self.config.training
        return TrainingOrder(
            self.features["train"],
            epochs=training.epochs,
            global_batch_size=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            max_choices=self.config.data.max_train_choices,
            seed=seed,
            done=done,
        )


def make_plans(arguments: FineTuneArguments, *, toml: Path, start: StartingPoint, world_size: int) -> list[TaskPlan]:
    """Everything that will run, in order.

    Args:
        toml: The launcher's TOML; recipes lie beside it.
        start: The checkpoint that tasks start from; it decides the model's size and so the recipe.
        world_size: Processes; 0 = as few as the TOML asks for.

    Raises:
        ConfigError: settings that contradict each other, the model or the number of processes.
        DataError: a split is missing or a line is not what it should be.
    """
    release = Release(arguments.data, arguments.benchmark)
    recipe = arguments.recipe or toml.parent / RECIPES / f"{recipe_size(start.config)}.toml"
    names = _names(arguments, release)
    if arguments.intermediate and arguments.intermediate not in names:
        names = [arguments.intermediate, *names]
    plans = [
        _plan(name, arguments, toml=toml, recipe=recipe, start=start, world_size=world_size, release=release) for name in names
    ]
    if odd := [plan for plan in plans if plan.config.parallel != plans[0].config.parallel]:
        raise ConfigError(f"{recipe}, [{odd[0].task.name}]: [parallel] cannot differ between tasks: one start runs them all")
    if arguments.intermediate and not any(plan.starts_from_intermediate for plan in plans):
        raise ConfigError(
            f"command line: --intermediate {arguments.intermediate} would serve nothing: of {', '.join(names)} none has "
            f'training.start = "intermediate" in {recipe}'
        )
    return plans


def recipe_size(config: DebertaConfig) -> str:
    """Which of the shipped recipes is for a model of this size."""
    return next(name for hidden_size, name in _SIZES if config.hidden_size >= hidden_size)


def _names(arguments: FineTuneArguments, release: Release) -> list[str]:
    if arguments.tasks != (ALL,):
        return list(arguments.tasks)
    held = {task.name for task in release.tasks(TRAIN)}
    if not held:
        first = next(iter(arguments.benchmark.tasks.values())).data_file(TRAIN)
        raise DataError(f"{arguments.data} holds no training split of any task: {first} and so on are expected")
    return [name for name in arguments.benchmark.order if name in held]


def _plan(
    name: str,
    arguments: FineTuneArguments,
    *,
    toml: Path,
    recipe: Path,
    start: StartingPoint,
    world_size: int,
    release: Release,
) -> TaskPlan:
    benchmark = arguments.benchmark
    recipes = read_recipes(recipe, name, known=tuple(benchmark.trainable))
    config = load_config(toml, arguments.overrides, schema=FineTuneConfig, recipes=recipes)
    config = resolve_finetuning(config, world_size or smallest_world_size(config))
    task = benchmark.trainable[name]
    is_intermediate = task in benchmark.intermediate
    model_config = _model_config(config, start)
    try:
        layout = classifier_layout(
            model_config, num_outputs=task.num_outputs, tensor_parallel_size=config.parallel.tensor_parallel_size
        )
    except ConfigError as error:
        raise ConfigError(f"{config.source}: {error}") from None
    deepspeed = checked_deepspeed(config)
    features, diagnostics = _features(task, arguments, config=config, start=start, release=release)
    plan = TaskPlan(
        task=task,
        config=config,
        deepspeed=deepspeed.values,
        deepspeed_notes=deepspeed.notes,
        model_config=model_config,
        layout=layout,
        features=features,
        diagnostics=diagnostics,
        recipe=recipe,
        is_intermediate=is_intermediate,
        may_start_from="" if is_intermediate else " or ".join(other.name for other in benchmark.intermediate),
    )
    _check_steps(plan)
    return plan


def _model_config(config: FineTuneConfig, start: StartingPoint) -> DebertaConfig:
    length = config.data.max_seq_length
    most = start.config.max_position_embeddings // LENGTH_MULTIPLE * LENGTH_MULTIPLE
    if start.config.position_biased_input and length > most:
        raise ConfigError(
            f"{config.source}: data.max_seq_length = {length}, but {start.path} has absolute positions for {most} tokens "
            f"(a multiple of {LENGTH_MULTIPLE})"
        )
    rate = config.training.classifier_dropout
    # The classifier that the starting point may have had was another task's.
    model_config = dataclasses.replace(start.config, problem_type=None)
    return model_config if rate is None else dataclasses.replace(model_config, cls_drop_out=rate)


def _features(
    task: Task, arguments: FineTuneArguments, *, config: FineTuneConfig, start: StartingPoint, release: Release
) -> tuple[dict[str, Features], tuple[Features, ...]]:
    data = config.data
    lengths = SequenceLengths(data.max_seq_length, data.window_overlap, data.max_windows)
    if task in arguments.benchmark.intermediate:
        files = DataFiles.folder(arguments.intermediate_data.get(task.name, arguments.data / task.name))
        splits = [task.read(files, split) for split in task.splits]
    else:
        splits = [release.read(task, split) for split in task.splits]
    others = [release.read(other, TEST) for other in task.diagnostics if release.has(other, TEST)]

    def encoded(split: Split) -> Features:
        features = encode_split(split, start.tokenizer, lengths)
        # The rows of the largest task are a gigabyte on every rank, and nobody reads them again.
        return dataclasses.replace(features, split=dataclasses.replace(split, rows=()))

    return {split.name: encoded(split) for split in splits}, tuple(map(encoded, others))


def _check_steps(plan: TaskPlan) -> None:
    training, train = plan.config.training, plan.features["train"]
    where = f"{plan.task.name} in {plan.config.source} and {plan.recipe}"
    if not any(example.gold for example in train.examples):
        raise DataError(f"{train.split.where}: {plan.task.unlearnable}")
    if plan.sift is not None and plan.sift.loss == "mse" and plan.task.head is Head.CHOICE:
        raise ConfigError(
            f'{where}: sift.loss = "mse" compares classes, of which every row has as many; choices take kl or symmetric_kl'
        )
    order = plan.order(training.seed)
    warmup = plan.config.schedule.warmup_steps
    if warmup > order.num_steps:
        raise ConfigError(
            f"{where}: schedule.warmup_steps = {warmup} is more than the {order.num_steps} steps of training.epochs = "
            f"{training.epochs:g} with training.global_batch_size = {training.global_batch_size}"
        )


def describe(plans: Sequence[TaskPlan], *, start: StartingPoint) -> str:
    """The plan in words."""
    lines = [f"starts from {start.path} ({start.description})", *start.notes, f"recipes: {plans[0].recipe}"]
    for plan in plans:
        training, optimizer, order = plan.config.training, plan.config.optimizer, plan.order(plan.seeds[0])
        lines.append(
            f"{plan.task.name}: {len(plan.features['train'].examples):,} decisions, {training.epochs:g} epochs of "
            f"{order.steps_per_epoch} steps of {training.global_batch_size}, learning rate {optimizer.learning_rate:g}, "
            f"warm-up {plan.config.schedule.warmup_steps}, {plan.config.data.max_seq_length} tokens"
            + (f", SiFT {plan.sift.weight:g} x {plan.sift.loss}" if plan.sift else "")
            + f", seeds {', '.join(map(str, plan.seeds))}"
            + (f", from the {plan.may_start_from} model where there is one" if plan.starts_from_intermediate else "")
        )
        for features in (*plan.features.values(), *plan.diagnostics):
            lines += [f"  {note}" for note in features.notes]
    parallel = plans[0].config.parallel
    lines.append(
        f"tensor {parallel.tensor_parallel_size} x data {parallel.data_parallel_size}, {plans[0].config.run.deepspeed}"
    )
    lines += dict.fromkeys(f"  {note}" for plan in plans for note in plan.deepspeed_notes)
    return "\n".join(lines)
