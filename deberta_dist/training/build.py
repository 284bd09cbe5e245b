"""The architecture on one page: how a run's parts are made and joined, in this order.

    model on meta -> keep this rank's layers -> tensor-parallel plan -> weight store -> pipeline runner

With tensor and pipeline size 1 the middle steps are identities and what remains is a plain torch model
under ZeRO-3.
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
from deberta_dist.models.plain import require_unchanged
from deberta_dist.models.residual import ResidualOutput
from deberta_dist.parallel.flat_layout import FlatLayout
from deberta_dist.parallel.layout import DTYPES, Layout, flat_layout
from deberta_dist.parallel.mesh import Mesh, MeshShape
from deberta_dist.parallel.pipeline.runner import PipelineRunner
from deberta_dist.parallel.pipeline.ties import TiedWeights, make_tie_groups
from deberta_dist.parallel.sharded_model import ShardedModel
from deberta_dist.parallel.tensor.apply import apply_sharding_rules, cut_tensor, split_sequence
from deberta_dist.parallel.tensor.sequence import SequenceRanks
from deberta_dist.parallel.zero import WeightStore
from deberta_dist.training.objectives.base import TrainedNetwork
from deberta_dist.training.optimizer import make_optimizer


@dataclass(frozen=True)
class TrainingComponents:
    """What a training loop drives of one network.

    Attributes:
        layout: Who holds what.
        sharded_model: This rank's weights.
        runner: Its micro-batches.
    """

    layout: Layout
    sharded_model: ShardedModel
    runner: PipelineRunner


def mesh_shape(config: RunConfig | FineTuneConfig) -> MeshShape:
    """The grid that a resolved configuration asks for."""
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
    """Makes this rank's part of one network of a run. Collective.

    Args:
        config: Resolved configuration.
        layout: From ``plan_layout`` for the same configuration and a network of the objective.
        deepspeed_config: Filled-in DeepSpeed JSON.
        mesh: The grid.
        shards: This rank's part of every flat parameter to start with; by default initial values, which are a
            function of (seed, name) alone.
    """
    network = layout.network
    assert isinstance(network, TrainedNetwork), network
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
    """Splits a model by the tensor-parallel plan and puts its weights into a store. Collective.

    Args:
        model: This rank's layers, on the meta device.
        layout: Who holds what.
        optimizer: ``[optimizer]`` of the run.
        deepspeed_config: Filled-in DeepSpeed JSON.
        mesh: The grid.
        shards: This rank's part of every flat parameter to start with.

    Raises:
        ConfigError: modules of the model were replaced, hooked or parametrised.
    """
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
    mesh.warm_up()
    ties = TiedWeights(layout.ties, mesh=mesh, shapes=shapes, dtype=dtype)
    return ShardedModel(model, store=store, ties=ties, device=mesh.device)


def own_flat_layout(layout: Layout, *, mesh: Mesh) -> FlatLayout:
    """The flat parameters of this rank's weight store."""
    here, size = mesh.mesh_rank, mesh.shape.data
    return flat_layout(layout, pipeline_rank=here.pipeline, tensor_rank=here.tensor, data_parallel_size=size)


def initial_value(name: str, *, layout: Layout, seed: int) -> Tensor:
    """Where a published parameter starts: full, float32, a function of (seed, name)."""
    network, shape = layout.network, layout.full_shapes[name]
    if name in network.tables_added:
        return torch.zeros(shape)
    return initial_tensor(network.saved_name(name), shape, seed=seed, std=network.config.initializer_range)


def shards_of(layout: Layout, *, mesh: Mesh, load: Callable[[str], Tensor]) -> list[Tensor]:
    """This rank's part of every flat parameter, out of full tensors.

    Args:
        layout: Who holds what.
        mesh: The grid.
        load: Full float32 value of a published parameter; asked for those alone that this rank has a part of.
    """
    here, shape = mesh.mesh_rank, mesh.shape
    flat = own_flat_layout(layout, mesh=mesh)
    shards = [torch.zeros(size // shape.data) for size in flat.sizes]
    rules = layout.network.rules
    own = shard_slices(flat, shape=shape, mesh_rank=here, full_shapes=layout.full_shapes, rules=rules)
    for shard, parts in zip(shards, own, strict=True):
        for part in parts:
            values = cut_tensor(load(part.name), part.name, rank=here.tensor, size=shape.tensor, rules=rules).flatten()
            shard[part.offset : part.offset + part.count] = values[part.begin : part.begin + part.count]
    return shards
