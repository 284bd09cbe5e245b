"""The layout of a network: who runs, holds, owns and borrows what, as plain values that need no process group.

``training/build.py`` builds each rank's model from it, the planner costs it, the dry run prints it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType

import torch
from torch import nn

from deberta_dist.config import Parallel
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.encoder import ModelWithBackbone
from deberta_dist.models.flops import ForwardFlops
from deberta_dist.models.heads import model_with_head
from deberta_dist.parallel.flat_layout import FlatLayout, lay_out
from deberta_dist.parallel.network import Network
from deberta_dist.parallel.pipeline.stages import balance_stages, explicit_stages, stages_of_rank
from deberta_dist.parallel.pipeline.ties import Tie, find_ties, owned_names
from deberta_dist.parallel.tensor import sharding_rules
from deberta_dist.parallel.tensor.apply import check_tensor_parallel_sizes, cut_tensor
from deberta_dist.values import Precision

DTYPES: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


LAYER_PREFIX = "deberta.encoder.layer."


@dataclass(frozen=True)
class TieSize:
    """What a tie communicates.

    Attributes:
        elements: Number of elements of its weights on one of its ranks: the length of a message.
        users: Number of ranks that use them, the owner included.
        pipeline_ranks: Number of pipeline ranks among the users; more than 1 crosses stages, and so perhaps nodes.
        is_sum: Whether gradients are reduced to the owner; otherwise every user has the same.
    """

    elements: int
    users: int
    pipeline_ranks: int
    is_sum: bool


@dataclass(frozen=True)
class RankWeights:
    """Number of elements on tensor rank 0 of one pipeline rank: the most of its tensor ranks, since it owns what all hold.

    Attributes:
        owned: Elements that its weight store has, without the padding of flat parameters.
        used: Elements of its gathered model: owned and borrowed.
        ties: Ties of which it is the owner or a borrower.
    """

    owned: int
    used: int
    ties: tuple[TieSize, ...]


@dataclass(frozen=True)
class Layout:
    """One layout of one network.

    Attributes:
        network: The model's configuration, sharding rules and flat groups.
        tensor_parallel_size: Number of ranks that every layer is divided over.
        stages: Consecutive layers of every pipeline stage, in pipeline order.
        stages_by_rank: Indices into ``stages`` of what every pipeline rank runs; several with an interleaved schedule.
        names_by_rank: Published parameter names used by every pipeline rank, in model order.
        full_shapes: Full (unsplit) shape of every published parameter, in model order.
        sequence_parallel: Whether activations outside of tensor-parallel regions are divided along the sequence.
    """

    network: Network
    tensor_parallel_size: int
    stages: tuple[range, ...]
    stages_by_rank: tuple[tuple[int, ...], ...]
    names_by_rank: tuple[tuple[str, ...], ...]
    full_shapes: Mapping[str, tuple[int, ...]]
    sequence_parallel: bool = False

    @property
    def config(self) -> DebertaConfig:
        """The network's configuration."""
        return self.network.config

    @cached_property
    def ties(self) -> list[Tie]:
        """Every weight with more than one user, with its owner and borrowers."""
        return find_ties(
            self.names_by_rank,
            kinds={name: self._tie_kind(name) for name in self.full_shapes},
            tensor_parallel_size=self.tensor_parallel_size,
        )

    @property
    def sequence_shards(self) -> int:
        """Number of shards of a sequence; a rank's hidden states hold one of them."""
        return self.tensor_parallel_size if self.sequence_parallel else 1

    def _tie_kind(self, name: str) -> str:
        kind = sharding_rules.parameter_sharding(name, self.network.rules).kind
        if kind in (sharding_rules.COLUMN, sharding_rules.ROW, sharding_rules.VOCAB):
            return "split"
        if self.sequence_parallel and sharding_rules.in_sequence_region(name, decoder_layer=self.network.decoder_layer):
            return sharding_rules.PARTIAL
        return kind

    @cached_property
    def rank_weights(self) -> tuple[RankWeights, ...]:
        """What every pipeline rank owns and uses. The planner asks for thousands of layouts, and flat layouts are slower."""
        sizes = {name: torch.Size(self.local_shape(name)).numel() for name in self.full_shapes}
        found = []
        for pipeline_rank, names in enumerate(self.names_by_rank):
            ties = [tie for tie in self.ties if (pipeline_rank, 0) in tie.users]
            borrowed = sum(sizes[name] for tie in ties if tie.users[0] != (pipeline_rank, 0) for name in tie.names)
            used = sum(sizes[name] for name in names)
            found.append(
                RankWeights(
                    owned=used - borrowed,
                    used=used,
                    ties=tuple(
                        TieSize(
                            elements=sum(sizes[name] for name in tie.names),
                            users=len(tie.users),
                            pipeline_ranks=len({pipeline for pipeline, _ in tie.users}),
                            is_sum=tie.is_sum,
                        )
                        for tie in ties
                    ),
                )
            )
        return tuple(found)

    def layers_of_rank(self, pipeline_rank: int) -> list[int]:
        """Numbers of the layers that a pipeline rank runs, over all its stages."""
        return [layer for index in self.stages_by_rank[pipeline_rank] for layer in self.stages[index]]

    def owned(self, pipeline_rank: int, tensor_rank: int) -> list[str]:
        """Names that a model-parallel rank owns, in model order."""
        return owned_names(self.names_by_rank[pipeline_rank], ties=self.ties, rank=(pipeline_rank, tensor_rank))

    def local_shape(self, name: str) -> tuple[int, ...]:
        """Shape of the slice of ``name`` on a tensor rank; all ranks' are alike, as vocabularies are padded."""
        full = torch.empty(self.full_shapes[name], device="meta")
        cut = cut_tensor(full, name, rank=0, size=self.tensor_parallel_size, rules=self.network.rules)
        return tuple(cut.shape)


def plan_layout(network: Network, *, parallel: Parallel, flops: ForwardFlops) -> Layout:
    """Divides a network over tensor and pipeline ranks.

    Args:
        network: What is divided; stages consist of its layers.
        parallel: ``[parallel]`` with "auto" resolved, except for ``layers_per_stage``.
        flops: FLOPs of every layer, by which "auto" stages are balanced.

    Raises:
        ConfigError: heads or FFN columns do not divide by the tensor-parallel size, or stages do not fit the layers.
    """
    config = network.config
    check_tensor_parallel_sizes(
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        tensor_parallel_size=parallel.tensor_parallel_size,
    )
    num_stages = parallel.pipeline_parallel_size * parallel.stages_per_rank
    if parallel.layers_per_stage == "auto":
        stages = balance_stages(flops.by_layer, num_stages=num_stages)
    else:
        stages = explicit_stages(parallel.layers_per_stage, num_layers=config.num_hidden_layers, num_stages=num_stages)
    stages_by_rank = [
        tuple(
            stages_of_rank(
                rank,
                pipeline_parallel_size=parallel.pipeline_parallel_size,
                stages_per_rank=parallel.stages_per_rank,
            )
        )
        for rank in range(parallel.pipeline_parallel_size)
    ]
    names_by_rank = tuple(
        names_of_layers(network, tuple(layer for index in indices for layer in stages[index])) for indices in stages_by_rank
    )
    return Layout(
        network=network,
        tensor_parallel_size=parallel.tensor_parallel_size,
        stages=tuple(stages),
        stages_by_rank=tuple(stages_by_rank),
        names_by_rank=names_by_rank,
        full_shapes=full_shapes(network),
        sequence_parallel=parallel.sequence_parallel,
    )


# Cached, like the two below: a search makes thousands of layouts of one network.
@lru_cache(maxsize=16)
def full_shapes(network: Network) -> Mapping[str, tuple[int, ...]]:
    """Full shape of every published parameter, in model order."""
    return MappingProxyType({name: tuple(p.shape) for name, p in network.meta_model().named_parameters()})


@lru_cache(maxsize=4096)
def names_of_layers(network: Network, layers: tuple[int, ...]) -> tuple[str, ...]:
    """Published names of the parameters that a pipeline rank with these layers uses, in model order.

    All layers between the first and the last use the same weights beside their own, so layer 1 stands for them: building a
    model for every rank of every layout would take seconds.
    """
    last = network.config.num_hidden_layers - 1
    representatives = {min(layer, 1) if layer < last else last for layer in layers}
    beside = frozenset[str]().union(*(_names_beside_layers(network, layer) for layer in representatives))
    prefixes = tuple(f"{LAYER_PREFIX}{layer}." for layer in layers)
    return tuple(name for name in full_shapes(network) if name in beside or name.startswith(prefixes))


@lru_cache(maxsize=64)
def _names_beside_layers(network: Network, layer: int) -> frozenset[str]:
    model = network.meta_model()
    model.keep_layers([layer])  # type: ignore[operator]  # every network's model has it
    return frozenset(name for name, _ in model.named_parameters() if not name.startswith(LAYER_PREFIX))


def classifier_layout(config: DebertaConfig, *, num_outputs: int, tensor_parallel_size: int, head: str = "sequence") -> Layout:
    """The layout of a classifier: one stage, divided over tensor ranks.

    Args:
        config: The encoder's sizes and switches.
        num_outputs: Rows of the classifier, if its head has one per label.
        head: A key of `models.heads.HEADS`; every rank holds the whole head.
        tensor_parallel_size: Number of ranks that every layer is divided over.

    Raises:
        ConfigError: attention heads or FFN columns do not divide by the tensor-parallel size.
    """
    check_tensor_parallel_sizes(
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        tensor_parallel_size=tensor_parallel_size,
    )
    network = ClassifierNetwork(config=config, num_outputs=num_outputs, head=head)
    shapes = full_shapes(network)
    return Layout(
        network=network,
        tensor_parallel_size=tensor_parallel_size,
        stages=(range(config.num_hidden_layers),),
        stages_by_rank=((0,),),
        names_by_rank=(tuple(shapes),),
        full_shapes=shapes,
    )


@dataclass(frozen=True, kw_only=True)
class ClassifierNetwork(Network):
    """An encoder with a head of fine-tuning. Position embeddings that only an enhanced mask decoder would add are absent.

    Attributes:
        num_outputs: Rows of the classifier, if its head has one per label.
        head: A key of `models.heads.HEADS`.
    """

    num_outputs: int
    head: str = "sequence"

    def make(self) -> ModelWithBackbone:
        """The whole classifier on one device."""
        model = model_with_head(self.config, self.head, num_labels=self.num_outputs)
        if not self.config.position_biased_input:
            model.deberta.embeddings.position_embeddings = None
        return model


def meta_classifier(config: DebertaConfig, *, num_outputs: int, head: str = "sequence") -> nn.Module:
    """The whole classifier on the meta device."""
    return ClassifierNetwork(config=config, num_outputs=num_outputs, head=head).meta_model()


def flat_layouts(layout: Layout, *, data_parallel_size: int) -> dict[tuple[int, int], FlatLayout]:
    """The flat parameters at every (pipeline rank, tensor rank)."""
    return {
        (p, t): flat_layout(layout, pipeline_rank=p, tensor_rank=t, data_parallel_size=data_parallel_size)
        for p in range(len(layout.stages_by_rank))
        for t in range(layout.tensor_parallel_size)
    }


def flat_layout(layout: Layout, *, pipeline_rank: int, tensor_rank: int, data_parallel_size: int) -> FlatLayout:
    """The flat parameters of one rank's weight store."""
    shapes = {name: layout.local_shape(name) for name in layout.owned(pipeline_rank, tensor_rank)}
    groups = [group.holds for group in layout.network.flat_groups]
    return lay_out(shapes, groups=groups, data_parallel_size=data_parallel_size)
