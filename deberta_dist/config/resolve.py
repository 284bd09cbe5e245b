"""Fills in every ``auto`` that follows from the number of processes, and makes the checks that need it.

The batch equation is solved and checked here and nowhere else::

    world size        = tensor_parallel_size x pipeline_parallel_size x data_parallel_size
    global_batch_size = micro_batch_size x num_micro_batches x data_parallel_size

Pure functions of numbers: called before any process group, by training and by the dry run. Two
``auto`` stay: ``optimizer.name`` (depends on what is installed) and ``parallel.layers_per_stage``
(depends on the model).
"""

from collections.abc import Sequence

from deberta_dist.config.finetune import FineTuneConfig
from deberta_dist.config.schema import RunConfig
from deberta_dist.errors import ConfigError
from deberta_dist.values import AUTO, INTERLEAVED


def resolve(config: RunConfig, world_size: int) -> RunConfig:
    """Replaces ``auto`` in the sizes by numbers and checks that everything multiplies.

    Args:
        config: As loaded; a resolved one comes back unchanged.
        world_size: Number of processes: tensor x pipeline x data parallel size.

    Raises:
        ConfigError: Sizes that do not multiply to the world or to the global batch, a schedule that
            cannot run with them; all problems in one message.
    """
    assert world_size >= 1
    problems: list[str] = []
    data_parallel_size = _data_parallel_size(config, world_size, problems)
    num_micro_batches = _num_micro_batches(config, data_parallel_size, problems)
    problems += _pipeline_problems(config, num_micro_batches)
    problems += _sequence_problems(config)
    _refuse(problems, config, world_size)
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update={"data_parallel_size": data_parallel_size}),
            "training": config.training.model_copy(update={"num_micro_batches": num_micro_batches}),
        }
    )


def resolve_finetuning(config: FineTuneConfig, world_size: int) -> FineTuneConfig:
    """The same for fine-tuning, whose batches need not come out even.

    Raises:
        ConfigError: Sizes that do not multiply to the world.
    """
    problems: list[str] = []
    data_parallel_size = _data_parallel_size(config, world_size, problems)
    _refuse(problems, config, world_size)
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"data_parallel_size": data_parallel_size})})


def _refuse(problems: Sequence[str], config: RunConfig | FineTuneConfig, world_size: int) -> None:
    head = f"{config.source} does not fit {world_size} processes:"
    if len(problems) == 1:
        raise ConfigError(f"{head} {problems[0]}")
    if problems:
        raise ConfigError("\n".join([head, *(f"  {problem}" for problem in problems)]))


def smallest_world_size(config: RunConfig | FineTuneConfig) -> int:
    """Processes the configuration needs; a data_parallel_size of ``auto`` counts as 1."""
    parallel = config.parallel
    replicas = 1 if parallel.data_parallel_size == AUTO else parallel.data_parallel_size
    return parallel.tensor_parallel_size * parallel.pipeline_parallel_size * replicas


def _data_parallel_size(config: RunConfig | FineTuneConfig, world_size: int, problems: list[str]) -> int | None:
    parallel = config.parallel
    tensor, pipeline = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    sizes = f"parallel.tensor_parallel_size = {tensor} x pipeline_parallel_size = {pipeline}"
    model_size = tensor * pipeline
    if parallel.data_parallel_size == AUTO:
        if world_size % model_size == 0:
            return world_size // model_size
        fits = _multiples_beside(world_size, model_size)
        problems.append(f"{sizes} = {model_size} does not divide {world_size} processes; start {fits} of them")
        return None
    if model_size * parallel.data_parallel_size != world_size:
        cure = (
            f'data_parallel_size = {world_size // model_size} or "auto" fits'
            if world_size % model_size == 0
            else f"start {model_size * parallel.data_parallel_size} of them"
        )
        problems.append(
            f"{sizes} x data_parallel_size = {parallel.data_parallel_size} makes "
            f"{model_size * parallel.data_parallel_size} processes, but there are {world_size}; {cure}"
        )
    # As written even when the world differs, so that the batch is checked in the same round.
    return parallel.data_parallel_size


def _multiples_beside(number: int, unit: int) -> str:
    """The multiples of ``unit`` on both sides of a number that is none, in words."""
    below = number - number % unit
    return f"{below} or {below + unit}" if below else str(unit)


def _num_micro_batches(config: RunConfig, data_parallel_size: int | None, problems: list[str]) -> int | None:
    training = config.training
    if data_parallel_size is None:
        return None if training.num_micro_batches == AUTO else training.num_micro_batches
    batch, micro = training.global_batch_size, training.micro_batch_size
    left = f"training.global_batch_size = {batch}"
    right = f"micro_batch_size = {micro} x data_parallel_size = {data_parallel_size}"
    unit = micro * data_parallel_size
    if training.num_micro_batches == AUTO:
        if batch % unit == 0:
            return batch // unit
        fits = _multiples_beside(batch, unit)
        problems.append(f"{left} is not a multiple of {right} = {unit}; a global_batch_size of {fits} fits")
        return None
    product = unit * training.num_micro_batches
    if product != batch:
        cure = (
            f'num_micro_batches = {batch // unit} or "auto" fits'
            if batch % unit == 0
            else (f"a global_batch_size of {product} fits")
        )
        problems.append(f"{left}, but num_micro_batches = {training.num_micro_batches} x {right} = {product}; {cure}")
    return training.num_micro_batches


def _sequence_problems(config: RunConfig) -> list[str]:
    size = config.parallel.tensor_parallel_size
    if not config.parallel.sequence_parallel:
        return []
    if size == 1:
        return [
            "parallel.sequence_parallel = true splits sequences over the ranks of parallel.tensor_parallel_size, which is "
            "1; make that 2 or more, or sequence_parallel false"
        ]
    lengths = [length for _, length in config.micro_batch_shapes if length % size]
    if not lengths:
        return []
    key = "data.max_seq_length" if config.data.bucket_lengths is None else "data.bucket_lengths"
    fitting = [n for n in range(2, size + 1) if all(length % n == 0 for _, length in config.micro_batch_shapes)]
    smaller = f", or tensor_parallel_size {' or '.join(map(str, fitting))}" if fitting else ""
    return [
        f"parallel.tensor_parallel_size = {size} does not divide {key} = {' and '.join(map(str, lengths))}, as "
        f"parallel.sequence_parallel = true needs; take multiples of {size}{smaller}"
    ]


def _pipeline_problems(config: RunConfig, num_micro_batches: int | None) -> list[str]:
    parallel = config.parallel
    ranks, per_rank = parallel.pipeline_parallel_size, parallel.stages_per_rank
    problems = []
    interleaved = parallel.schedule == INTERLEAVED
    if per_rank > 1 and not interleaved:
        problems.append(
            f'parallel.stages_per_rank = {per_rank} needs parallel.schedule = "interleaved_1f1b", not "{parallel.schedule}"'
        )
    if per_rank > 1 and ranks == 1:
        problems.append(f"parallel.stages_per_rank = {per_rank} needs a pipeline_parallel_size of 2 or more, not 1")
    layers = parallel.layers_per_stage
    if layers != AUTO and len(layers) != ranks * per_rank:
        problems.append(
            f"parallel.layers_per_stage has {len(layers)} entries, but pipeline_parallel_size = {ranks} x "
            f"stages_per_rank = {per_rank} makes {ranks * per_rank} stages"
        )
    if num_micro_batches is None or ranks == 1:
        return problems
    # torch runs an interleaved schedule in rounds of as many micro-batches as there are ranks.
    rounds = max(1, num_micro_batches // ranks)
    if interleaved and num_micro_batches % rounds:
        below = num_micro_batches - num_micro_batches % ranks
        problems.append(
            f'training.num_micro_batches = {num_micro_batches} does not fill schedule "{parallel.schedule}" on '
            f"{ranks} pipeline ranks; {below} or {below + ranks} does"
        )
    return problems
