"""Searches the layouts of a run for the fastest ones that fit into a machine's memory.

Candidates are all combinations of tensor, pipeline and data parallel size, micro-batch size, schedule, recompute mode and
offload that pass the checks of a run. They are taken in the order of a lower bound on their step time
(``step_cost.least_seconds``, which has no waiting). For each, memory is computed as in the dry run and the pipeline simulated,
until no remaining candidate can be faster; so the result is exact. Called by ``deberta-dist plan``.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from deberta_dist.config import Parallel, RunConfig
from deberta_dist.errors import ConfigError
from deberta_dist.kernels.fused.availability import unsupported_reason
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.flops import ForwardFlops
from deberta_dist.models.positions import relative_positions
from deberta_dist.parallel.layout import Layout, plan_layout
from deberta_dist.parallel.network import Network
from deberta_dist.parallel.pipeline.stages import balance_stages
from deberta_dist.planning.deepspeed import checked_deepspeed
from deberta_dist.planning.machine import Machine
from deberta_dist.planning.plan import MakeObjective, Plan, network_flops, read_model_config
from deberta_dist.planning.search_memory import MemorySearch, RankedLayout
from deberta_dist.planning.step_cost import least_seconds, step_cost
from deberta_dist.training.objectives.masked_lm import masked_lm
from deberta_dist.values import INTERLEAVED, RECOMPUTE


@dataclass(frozen=True)
class Space:
    """The combinations to try.

    Attributes:
        deepspeed: Paths of DeepSpeed JSONs, e.g. with and without offload.
        tensor: Tensor parallel sizes; None for all that divide the world size.
        pipeline: Pipeline parallel sizes; None for all that divide the rest.
        micro_batch: Sequences per micro-batch; None for all divisors of a data rank's sequences up to
            ``largest_micro_batch``.
        largest_micro_batch: Most sequences per micro-batch.
        recompute: Values of ``training.recompute``.
        schedules: Values of ``parallel.schedule``.
        stages_per_rank: Values of ``parallel.stages_per_rank`` for interleaved schedules.
    """

    deepspeed: tuple[Path, ...]
    tensor: tuple[int, ...] | None = None
    pipeline: tuple[int, ...] | None = None
    micro_batch: tuple[int, ...] | None = None
    largest_micro_batch: int = 32
    recompute: tuple[str, ...] = RECOMPUTE
    schedules: tuple[str, ...] = ("1f1b", INTERLEAVED)
    stages_per_rank: tuple[int, ...] = (2, 3, 4, 6)


@dataclass(frozen=True)
class Candidate:
    """A plan that adds up, and the least its step can take (seconds)."""

    plan: Plan
    least: float

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(tensor, pipeline, data)."""
        parallel = self.plan.config.parallel
        return parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.data_parallel_size


@dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Attributes:
        choices: The fastest variant of each (tensor, pipeline, data), fastest first.
        candidates: Number of candidates.
        measured: Number of candidates whose memory was computed.
        smallest: Smallest peak (bytes) among those that do not fit; None if all fit.
    """

    choices: list[RankedLayout]
    candidates: int
    measured: int
    smallest: int | None


def search(
    config: RunConfig,
    *,
    world_size: int,
    machine: Machine,
    memory_limit: float,
    space: Space,
    count: int,
    make_objective: MakeObjective = masked_lm,
) -> SearchResult:
    """Finds the fastest layouts.

    Args:
        config: As loaded; what ``space`` tries is replaced in it.
        world_size: Processes.
        machine: What they run on; a fused attention counts where the model and its batches can have it.
        memory_limit: Bytes that the peak of a rank may reach.
        space: What is tried.
        count: How many different (tensor, pipeline, data) to find.
        make_objective: What is trained; every layout is one of all its networks.

    Raises:
        ConfigError: the model or the DeepSpeed JSON cannot be read, or no candidate passes the checks.
    """
    model = read_model_config(config)
    objective = make_objective(config, model)
    can_be_fused = all(_can_be_fused(network.config) for network in objective.networks)
    machine = dataclasses.replace(machine, has_fused_attention=machine.has_fused_attention and can_be_fused)
    start = Plan(config, {}, model, objective, layouts=(), network_flops=())
    found = sorted(candidates(start, world_size=world_size, machine=machine, space=space), key=lambda one: one.least)
    if not found:
        raise ConfigError(
            f"{config.source}: no layout of {world_size} processes passes the checks of a run: its heads, layers or "
            f"training.global_batch_size = {config.training.global_batch_size} do not divide; --dry-run of the launcher says which"
        )
    memory = MemorySearch(memory_limit, make_objective=make_objective)
    best: dict[tuple[int, int, int], RankedLayout] = {}
    for candidate in found:
        ranking = sorted(choice.cost.seconds for choice in best.values())
        if len(ranking) >= count and candidate.least >= ranking[count - 1]:
            break
        before = best.get(candidate.sizes)
        if before is not None and candidate.least >= before.cost.seconds:
            continue
        if not memory.may_fit(candidate.plan):
            continue
        cost = step_cost(candidate.plan, machine)
        if before is not None and cost.seconds >= before.cost.seconds:
            continue
        choice = memory.find(candidate.plan, cost, world_size=world_size)
        if choice is not None:
            best[candidate.sizes] = choice
    choices = sorted(best.values(), key=lambda choice: choice.cost.seconds)[:count]
    return SearchResult(choices=choices, candidates=len(found), measured=memory.measured, smallest=memory.smallest)


def _can_be_fused(model: DebertaConfig) -> bool:
    """Whether the kernels of ``kernels/fused`` can do what a model's attention asks, given the right device."""
    positions = relative_positions(
        num_buckets=model.position_buckets, max_distance=model.max_relative_distance, device=torch.device("cpu")
    )
    key_BNSH = torch.empty(1, model.num_attention_heads, 1, model.head_size, dtype=torch.bfloat16, device="meta")
    # Padding and documents reach the kernels as segments, which they support.
    return unsupported_reason(key_BNSH, positions=positions, mask=None) is None


def candidates(start: Plan, *, world_size: int, machine: Machine, space: Space) -> Iterator[Candidate]:
    """Every plan of the space that passes the checks of a run, without what they cost beyond ``least_seconds``.

    Args:
        start: Configuration, model and objective, with no layout yet.
        world_size, machine, space: See `search`.
    """
    config, networks = start.config, start.objective.networks
    batch, length = config.training.global_batch_size, config.data.max_seq_length
    for tensor, pipeline, data in _sizes(start, world_size=world_size, space=space):
        settings = [(path, _deepspeed(path, config, data=data)) for path in space.deepspeed]
        for micro in _divisors(batch // data, limit=space.largest_micro_batch):
            if space.micro_batch is not None and micro not in space.micro_batch:
                continue
            if any(micro * length % bucket for bucket in config.data.bucket_lengths or ()):
                continue
            training = config.training.model_copy(
                update={"micro_batch_size": micro, "num_micro_batches": batch // data // micro}
            )
            sized = config.model_copy(update={"training": training})
            flops = tuple(network_flops(sized, network) for network in networks)
            for parallel in _schedules(start, (tensor, pipeline, data), training.num_micro_batches, space):
                layouts = tuple(_layout(*one, parallel) for one in zip(networks, flops, strict=True))
                for recompute in space.recompute:
                    for path, deepspeed in settings:
                        changed = {
                            "parallel": parallel,
                            "training": training.model_copy(update={"recompute": recompute}),
                            "run": config.run.model_copy(update={"deepspeed": path}),
                        }
                        plan = dataclasses.replace(
                            start,
                            config=config.model_copy(update=changed),
                            deepspeed=deepspeed,
                            layouts=layouts,
                            network_flops=flops,
                        )
                        yield Candidate(plan, least_seconds(plan, machine))


def _least_layers(plan: Plan) -> int:
    """Of the networks: a pipeline has no more stages than the shallowest has layers."""
    return min(network.config.num_hidden_layers for network in plan.objective.networks)


def _sizes(start: Plan, *, world_size: int, space: Space) -> Iterator[tuple[int, int, int]]:
    models = [network.config for network in start.objective.networks]
    for tensor in _divisors(world_size):
        if any(model.num_attention_heads % tensor or model.intermediate_size % tensor for model in models):
            continue
        for pipeline in _divisors(world_size // tensor, limit=_least_layers(start)):
            data = world_size // tensor // pipeline
            asked = (space.tensor is None or tensor in space.tensor) and (space.pipeline is None or pipeline in space.pipeline)
            if asked and start.config.training.global_batch_size % data == 0:
                yield tensor, pipeline, data


def _schedules(start: Plan, sizes: tuple[int, int, int], micro_batches: int, space: Space) -> Iterator[Parallel]:
    tensor, pipeline, data = sizes
    kinds = [(schedule, 1) for schedule in space.schedules if schedule != INTERLEAVED]
    # torch's interleaved schedule works in rounds, which have to divide the micro-batches.
    if INTERLEAVED in space.schedules and pipeline > 1 and micro_batches % max(1, micro_batches // pipeline) == 0:
        fitting = [loops for loops in space.stages_per_rank if pipeline * loops <= _least_layers(start)]
        kinds += [(INTERLEAVED, loops) for loops in fitting]
    for schedule, loops in kinds if pipeline > 1 else kinds[:1] or [("1f1b", 1)]:
        yield start.config.parallel.model_copy(
            update={
                "tensor_parallel_size": tensor,
                "pipeline_parallel_size": pipeline,
                "data_parallel_size": data,
                "schedule": schedule,
                "stages_per_rank": loops,
                "layers_per_stage": "auto",
            }
        )


def _divisors(number: int, *, limit: int | None = None) -> list[int]:
    return [size for size in range(1, min(number, limit or number) + 1) if number % size == 0]


def _deepspeed(path: Path, config: RunConfig, *, data: int) -> dict[str, Any]:
    parallel = config.parallel.model_copy(update={"data_parallel_size": data})
    run = config.run.model_copy(update={"deepspeed": path})
    return checked_deepspeed(config.model_copy(update={"parallel": parallel, "run": run})).values


def _layout(network: Network, flops: ForwardFlops, parallel: Parallel) -> Layout:
    stages = _balanced(flops.units, parallel.pipeline_parallel_size * parallel.stages_per_rank)
    return _layout_of(
        network,
        parallel.tensor_parallel_size,
        parallel.pipeline_parallel_size,
        parallel.stages_per_rank,
        parallel.schedule,
        stages,
    )


@lru_cache(maxsize=4096)
def _balanced(units: tuple[float, ...], num_stages: int) -> tuple[int, ...]:
    return tuple(len(stage) for stage in balance_stages(units, num_stages=num_stages))


@lru_cache(maxsize=4096)
def _layout_of(network: Network, tensor: int, pipeline: int, loops: int, schedule: str, layers: tuple[int, ...]) -> Layout:
    parallel = Parallel(
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        stages_per_rank=loops,
        schedule=schedule,
        layers_per_stage=layers,
    )
    return plan_layout(network, parallel=parallel, flops=ForwardFlops(units=()))


def restricted(space: Space, **changed: Any) -> Space:
    """``space`` with the attributes of ``changed`` that are not None."""
    return dataclasses.replace(space, **{key: value for key, value in changed.items() if value is not None})
