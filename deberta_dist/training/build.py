"""The architecture on one page: how the parts of a run are built and connected, in this order.

    model on the meta device -> this rank's layers -> sharding rules -> weight store -> pipeline runner

With tensor and pipeline parallel size 1 the middle steps change nothing, and the result is a plain torch model under ZeRO-3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deberta_dist.checkpoint.slices import shard_slices
from deberta_dist.config import FineTuneConfig, Optimizer, RunConfig, precision
from deberta_dist.models.attention_dispatch import set_attention
from deberta_dist.models.initialisation import initial_tensor
from deberta_dist.models.layers import ResidualOutput
from deberta_dist.models.plain import require_unchanged
from deberta_dist.parallel.flat_layout import FlatLayout
from deberta_dist.parallel.layout import DTYPES, Layout, flat_layout
from deberta_dist.parallel.mesh import Mesh, MeshShape
from deberta_dist.parallel.pipeline.runner import PipelineRunner
from deberta_dist.parallel.pipeline.ties import TiedWeights, make_tie_groups
from deberta_dist.parallel.sharded_model import ShardedModel
from deberta_dist.parallel.tensor.apply import apply_sharding_rules, cut_tensor, split_sequence
from deberta_dist.parallel.tensor.sequence import SequenceRanks
from deberta_dist.parallel.zero import WeightStore
from deberta_dist.training.objectives.base import trained
from deberta_dist.training.optimizer import make_optimizer


@dataclass(frozen=True)
class TrainingComponents:
    """What the trainer drives of one network on this rank.

    Attributes:
        layout: Which rank runs, holds, owns and borrows what.
        sharded_model: This rank's weights, gathered and reduced once per step.
        runner: Runs this rank's stages for all micro-batches of a step.
    """

    layout: Layout
    sharded_model: ShardedModel
    runner: PipelineRunner


def mesh_shape(config: RunConfig | FineTuneConfig) -> MeshShape:
    """The mesh's sizes in a resolved configuration."""
    parallel = config.parallel
    return MeshShape(
        pipeline=parallel.pipeline_parallel_size,
        data=parallel.replicas,
        tensor=parallel.tensor_parallel_size,
    )


def build(
    config: RunConfig,
    *,
    layout: Layout,
    deepspeed_config: dict[str, Any],
    mesh: Mesh,
    shards: Sequence[Tensor] | None = None,
) -> TrainingComponents:
    """Builds this rank's part of one network of a run. Collective.

    Args:
        config: The run's TOML, with every "auto" resolved.
        layout: From ``plan_layout`` for the same configuration and a network of the objective.
        deepspeed_config: DeepSpeed JSON without "auto"; it says the precision.
        mesh: Has the sizes of ``config``; groups for the ties are added to it.
        shards: This rank's initial shard of every flat parameter, float32 on the host. None: random initial weights, which
            depend only on (seed, name).
    """
    network = trained(layout.network)
    here = mesh.mesh_rank
    if shards is None:
        shards = shards_of(layout, mesh=mesh, load=partial(initial_value, layout=layout, seed=config.training.seed))

    model = network.meta_model()
    model.recompute = config.training.recompute  # type: ignore[assignment]  # nn.Module's attributes are declared as tensors and modules
    set_attention(model, config.training.attention)
    if hasattr(model, "vocabulary_chunks"):  # a model with a head over the vocabulary
        model.vocabulary_chunks = config.training.vocabulary_chunks  # type: ignore[assignment]  # nn.Module's attributes are declared as tensors and modules
    for module in model.modules():
        if isinstance(module, ResidualOutput):
            module.joined = config.training.compile
    # First the layers, then the sharding rules: modules of other stages need not be divided.
    model.keep_layers(layout.layers_of_rank(here.pipeline))  # type: ignore[operator]  # every network's model has it
    sharded_model = build_sharded_model(
        model, layout=layout, optimizer=config.optimizer, deepspeed_config=deepspeed_config, mesh=mesh, shards=shards
    )

    runner = PipelineRunner(
        model,
        stages=layout.stages,
        local_stages=layout.stages_by_rank[here.pipeline],
        mesh=mesh,
        schedule=config.parallel.schedule,
        num_micro_batches=config.training.micro_batches,
        micro_batch_shapes=config.micro_batch_shapes,
        hidden_size=layout.config.hidden_size,
        sequence_shards=layout.sequence_shards,
        dtype=DTYPES[precision(deepspeed_config)],
        num_results=len(network.results),
        hands_on=network.hands_on,
        after_backward=sharded_model.accumulate,
    )
    return TrainingComponents(layout=layout, sharded_model=sharded_model, runner=runner)


def build_sharded_model(
    model: nn.Module,
    *,
    layout: Layout,
    optimizer: Optimizer,
    deepspeed_config: dict[str, Any],
    mesh: Mesh,
    shards: Sequence[Tensor],
) -> ShardedModel:
    """Divides a model by the sharding rules and moves its weights into a weight store. Collective.

    Args:
        model: This rank's layers, on the meta device; changed in place.
        layout: Says what this rank owns and borrows.
        optimizer: ``[optimizer]`` of the configuration.
        deepspeed_config: DeepSpeed JSON without "auto"; it says the precision.
        mesh: Groups for the ties are added to it.
        shards: This rank's initial shard of every flat parameter, float32 on the host.

    Raises:
        ConfigError: modules of the model were replaced, hooked or parametrised.
    """
    # Modules are replaced below and weights move out of them: an adapter or a hook would be lost without a word.
    require_unchanged(model)
    here, shape = mesh.mesh_rank, mesh.shape
    dtype = DTYPES[precision(deepspeed_config)]
    apply_sharding_rules(
        model,
        vocab_size=layout.config.vocab_size,
        rank=here.tensor,
        size=shape.tensor,
        group=mesh.groups["tensor"],
        rules=layout.network.rules,
    )
    if layout.sequence_parallel:
        split_sequence(
            model,
            ranks=SequenceRanks(mesh.groups["tensor"]),
            decoder_layer=layout.network.decoder_layer,
            regathers=model.recompute != "full",
            rules=layout.network.rules,
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    decayed = [group.is_decayed for group in layout.network.flat_groups]
    store = WeightStore(
        shards,
        layout=own_flat_layout(layout, mesh=mesh),
        make_optimizer=lambda flats: make_optimizer(flats, settings=optimizer, decayed=decayed),
        deepspeed_config=deepspeed_config,
        mesh=mesh,
        dtype=dtype,
    )
    make_tie_groups(layout.ties, mesh=mesh)
    # After the last group, before the first step: first messages in a fixed order (see `Mesh.warm_up`).
    mesh.warm_up()
    ties = TiedWeights(layout.ties, mesh=mesh, shapes=shapes, dtype=dtype)
    return ShardedModel(model, store=store, ties=ties, device=mesh.device)


def own_flat_layout(layout: Layout, *, mesh: Mesh) -> FlatLayout:
    """The flat parameters of this rank's weight store."""
    here, size = mesh.mesh_rank, mesh.shape.data
    return flat_layout(layout, pipeline_rank=here.pipeline, tensor_rank=here.tensor, data_parallel_size=size)


def initial_value(name: str, *, layout: Layout, seed: int) -> Tensor:
    """Initial value of a published parameter: the full tensor, float32, a function of (seed, name)."""
    network, shape = layout.network, layout.full_shapes[name]
    if name in network.tables_added:
        return torch.zeros(shape)
    return initial_tensor(network.saved_name(name), shape, seed=seed, std=network.config.initializer_range)


def shards_of(layout: Layout, *, mesh: Mesh, load: Callable[[str], Tensor]) -> list[Tensor]:
    """This rank's shard of every flat parameter, cut from full tensors.

    Args:
        layout: Says which tensor slices this rank owns.
        mesh: Says which rank this is.
        load: Returns the full float32 tensor of a published name. Called only for tensors that this rank's shards contain.
    """
    here, shape = mesh.mesh_rank, mesh.shape
    flat = own_flat_layout(layout, mesh=mesh)
    shards = [torch.zeros(size // shape.data) for size in flat.sizes]
    rules = layout.network.rules
    own = shard_slices(flat, shape=shape, mesh_rank=here, full_shapes=layout.full_shapes, rules=rules)
    for shard, ranges in zip(shards, own, strict=True):
        for flat_range in ranges:
            full = load(flat_range.name)
            values = cut_tensor(full, flat_range.name, rank=here.tensor, size=shape.tensor, rules=rules).flatten()
            stop, end = flat_range.offset + flat_range.count, flat_range.begin + flat_range.count
            shard[flat_range.offset : stop] = values[flat_range.begin : end]
    return shards
