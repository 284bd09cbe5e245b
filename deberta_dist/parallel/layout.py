"""Who runs, holds, owns and borrows what: the whole layout of a run as values, without a process.

``build.py`` makes the real thing from it on every rank, the dry run prints it, the tests compare it.
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
    """What a tie sends.

    Attributes:
        elements: Of all its weights, as one user holds them.
        users: How many ranks use them.
        pipeline_ranks: Over how many pipeline ranks.
        is_sum: Whether gradients go back to the owner.
    """

    elements: int
    users: int
    pipeline_ranks: int
    is_sum: bool


@dataclass(frozen=True)
class RankWeights:
    """Elements of one pipeline rank's first tensor-parallel rank, which owns what all of them hold.

    Attributes:
        owned: Without the padding of flat parameters.
        used: Owned and borrowed.
        ties: Those that it is in.
    """

    owned: int
    used: int
    ties: tuple[TieSize, ...]


@dataclass(frozen=True)
class Layout:
    """One layout of one network.

    Attributes:
        network: The model.
        tensor_parallel_size: Ranks that share every layer.
        stages: Layers of every pipeline stage.
        stages_by_rank: Stage indices of every pipeline rank.
        names_by_rank: Published parameter names used by every pipeline rank, in model order.
        full_shapes: Full (unsplit) shape of every published parameter, in model order.
        sequence_parallel: Whether activations between the split computations are split along the sequence.
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
        """Of the network."""
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
        """Parts of the sequence, of which a rank's hidden states hold one."""
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
        """What every pipeline rank owns and uses: what a cost model needs, at a hundredth of the time of flat layouts."""
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
                            pipeline_ranks=len({place[0] for place in tie.users}),
                            is_sum=tie.is_sum,
                        )
                        for tie in ties
                    ),
                )
            )
        return tuple(found)

    def layers_of_rank(self, pipeline_rank: int) -> list[int]:
        """Every layer that a pipeline rank runs."""
        return [layer for index in self.stages_by_rank[pipeline_rank] for layer in self.stages[index]]

    def owned(self, pipeline_rank: int, tensor_rank: int) -> list[str]:
        """Names that the rank at this place owns."""
        return owned_names(self.names_by_rank[pipeline_rank], ties=self.ties, place=(pipeline_rank, tensor_rank))

    def local_shape(self, name: str) -> tuple[int, ...]:
        """Shape of the slice of ``name`` on any tensor-parallel rank."""
        full = torch.empty(self.full_shapes[name], device="meta")
        cut = cut_tensor(full, name, rank=0, size=self.tensor_parallel_size, rules=self.network.rules)
        return tuple(cut.shape)


def plan_layout(network: Network, *, parallel: Parallel, flops: ForwardFlops) -> Layout:
    """Lays a network out.

    Args:
        network: The model.
        parallel: Resolved sizes.
        flops: Cost of every layer, by which stages are balanced.

    Raises:
        ConfigError: heads or features do not divide, or stages do not fit the layers.
    """
    config = network.config
    check_tensor_parallel_sizes(
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        tensor_parallel_size=parallel.tensor_parallel_size,
    )
    num_stages = parallel.pipeline_parallel_size * parallel.stages_per_rank
    if parallel.layers_per_stage == "auto":
        stages = balance_stages(flops.units, num_stages=num_stages)
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


@lru_cache(maxsize=16)
def full_shapes(network: Network) -> Mapping[str, tuple[int, ...]]:
    """Full shape of every published parameter, in model order."""
    return MappingProxyType({name: tuple(p.shape) for name, p in network.meta_model().named_parameters()})


@lru_cache(maxsize=4096)
def names_of_layers(network: Network, layers: tuple[int, ...]) -> tuple[str, ...]:
    """Published names of the parameters that a pipeline rank with these layers uses, in model order.

    Layers between the first and the last keep the same beside their own weights, so one of them is asked for all: a
    model for every rank of every layout would take seconds.
    """
    last = network.config.num_hidden_layers - 1
    kinds = {min(layer, 1) if layer < last else last for layer in layers}
    kept = frozenset[str]().union(*(_names_beside_layers(network, kind) for kind in kinds))
    prefixes = tuple(f"{LAYER_PREFIX}{layer}." for layer in layers)
    return tuple(name for name in full_shapes(network) if name in kept or name.startswith(prefixes))


@lru_cache(maxsize=64)
def _names_beside_layers(network: Network, layer: int) -> frozenset[str]:
    model = network.meta_model()
    model.keep_layers([layer])  # type: ignore[operator]  # every network's model has it
    return frozenset(name for name, _ in model.named_parameters() if not name.startswith(LAYER_PREFIX))


def classifier_layout(config: DebertaConfig, *, num_outputs: int, tensor_parallel_size: int, head: str = "sequence") -> Layout:
    """Lays a classifier out: one stage, cut over tensor-parallel ranks.

    Args:
        config: The model.
        num_outputs: Rows of the classifier, where its head has as many as there are labels.
        head: A key of `models.heads.HEADS`; every rank has the whole of it.
        tensor_parallel_size: Ranks that share every layer.

    Raises:
        ConfigError: heads or features do not divide.
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
    """An encoder with a head of fine-tuning, without the positions that only a mask decoder adds.

    Attributes:
        num_outputs: Rows of the classifier, where its head has as many as there are labels.
        head: A key of `models.heads.HEADS`.
    """

    num_outputs: int
    head: str = "sequence"

    def make(self) -> ModelWithBackbone:
        """The classifier."""
        model = model_with_head(self.config, self.head, num_labels=self.num_outputs)
        if not self.config.position_biased_input:
            model.deberta.embeddings.position_embeddings = None
        return model


def meta_classifier(config: DebertaConfig, *, num_outputs: int, head: str = "sequence") -> nn.Module:
    """The whole classifier without any memory."""
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
