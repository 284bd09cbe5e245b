"""The interface of an objective: what pre-training minimises. `masked_lm` implements it.

A step takes the networks in order. For each, weights are gathered, the pipeline runs all micro-batches, and the gradients are
reduce-scattered, which frees its memory for the next. Ids that its last stage returns (never hidden states) go to the first
stage of the next. Each network's update follows its own reduction, or, if the objective is joint, all updates come at the end.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deberta_dist.errors import ConfigError
from deberta_dist.models.flops import ForwardFlops
from deberta_dist.parallel.layout import Layout
from deberta_dist.parallel.network import Network
from deberta_dist.parallel.pipeline import MicroBatches
from deberta_dist.training.step_batch import COUNTS, StepBatch


@dataclass(frozen=True, kw_only=True)
class TrainedNetwork(Network):
    """A network with a loss: its model has ``forward_stage``, whose last stage returns float32 [1, len(results)].

    Attributes:
        loss_weight: Factor on its loss, and so on its gradient.
        learning_rate_factor: Factor on the run's learning rate in every step.
    """

    loss_weight: float = 1.0
    learning_rate_factor: float = 1.0

    @property
    @abstractmethod
    def results(self) -> tuple[str, ...]:
        """Names of the last stage's sums over a micro-batch: "loss" first, the only one with a gradient, and "correct"."""

    @property
    @abstractmethod
    def mean_over(self) -> str:
        """What the loss is the mean over: a name in both `results` and `step_batch.COUNTS`, which count the same."""

    @property
    def hands_on(self) -> bool:
        """Whether the last stage also returns ids, int64 [B, S], for the next network's first stage."""
        return False

    @property
    def is_handed(self) -> bool:
        """Whether it takes the ids that the network before it hands on."""
        return False

    @abstractmethod
    def flops(self, *, length: int, micro_batch_size: int) -> ForwardFlops:
        """Forward FLOPs of every layer, per token of micro-batches of so many sequences of ``length`` tokens."""

    @abstractmethod
    def micro_batches(self, batch: StepBatch, *, dropout_keys: Sequence[int], handed: Tensor | None) -> MicroBatches:
        """The arguments of ``forward_stage`` for every micro-batch.

        Args:
            batch: The micro-batches of a step on this data rank, stacked, on the device.
            dropout_keys: One for each micro-batch, in order; their number is that of the micro-batches.
            handed: Ids from the network before, int64 [R, S], if `is_handed`; otherwise None.
        """

    def head_loss(self, model: nn.Module, *, hidden: Tensor, targets: Tensor, num_chunks: int) -> object | None:
        """For the planner: computes the head's loss alone, to measure the memory of its logits; None without such logits.

        Args:
            model: Has at least the last layer and the head.
            hidden: Hidden states of the targets, [P, D].
            targets: Ids to predict, int64 [P].
            num_chunks: Chunks of the vocabulary, ``training.vocabulary_chunks``.
        """
        return None

    @property
    def head_rows(self) -> int:
        """For planners: logits that the head makes of every target, as many as the vocabulary has rows; 0 without such a head."""
        return 0

    def head_messages(self, *, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """For planners: bytes per target of every all-reduce that the head makes over the tensor axis: forward, backward.

        Args:
            width: Bytes of an element of a hidden state.
        """
        return (), ()

    @property
    def counted(self) -> int:
        """Index of `mean_over` in `step_batch.COUNTS`."""
        return COUNTS.index(self.mean_over)


@dataclass(frozen=True)
class Fold:
    """A table that network ``reader`` uses as the sum of ``owner``'s and its own, without a gradient to ``owner``.

    In both networks the table is a flat parameter of its own, so the shards coincide: each rank adds its shards of the float32
    weights and rounds once, before the reader's ordinary gather. That needs no message and no second gather. The reader's own
    table starts at zero.

    Attributes:
        owner: Name of the network whose table is read; earlier in the objective than the reader.
        reader: Name of the network that reads it.
        table: Published name of the parameter, the same in both.
    """

    owner: str
    reader: str
    table: str


@dataclass(frozen=True)
class Objective:
    """The networks of a run and the relations between them.

    Attributes:
        networks: In the order in which a step takes them; exactly one has no name, and its weights are the run's result.
        folds: Tables that one network reads of another.
        is_joint: Whether all networks are clipped by one norm and updated together at the end of a step; otherwise each is
            updated before the next is gathered.
    """

    networks: tuple[TrainedNetwork, ...]
    folds: tuple[Fold, ...] = ()
    is_joint: bool = False

    def __post_init__(self) -> None:
        names = [network.name for network in self.networks]
        assert len(set(names)) == len(names) and names.count("") == 1, names
        gives = [False, *(network.hands_on for network in self.networks)]
        takes = [*(network.is_handed for network in self.networks), False]
        assert gives == takes, "what one network hands on, the next takes"
        for network in self.networks:
            assert network.mean_over in COUNTS and network.mean_over in network.results, network
            assert network.results[0] == "loss" and "correct" in network.results, network.results
            folded = tuple(fold.table for fold in self.folds_of(network.name))
            assert network.tables_added == folded, "a table that starts at zero is added to one of another network"
        for fold in self.folds:
            assert names.index(fold.owner) < names.index(fold.reader), fold
            assert all(fold.table in self.networks[names.index(name)].tables_apart for name in (fold.owner, fold.reader)), fold

    @property
    def main(self) -> int:
        """Index of the network whose weights are published under their own names."""
        return [network.name for network in self.networks].index("")

    def folds_of(self, reader: str) -> list[Fold]:
        """The tables that the network named ``reader`` reads of others."""
        return [fold for fold in self.folds if fold.reader == reader]


def trained(network: Network) -> TrainedNetwork:
    """The network of a layout that was planned for a run of an objective: it has a loss."""
    assert isinstance(network, TrainedNetwork), network
    return network


def alone(network: TrainedNetwork) -> Objective:
    """The objective of one network."""
    return Objective((network,))


def check_folds(objective: Objective, layouts: Sequence[Layout]) -> None:
    """Refuses tables that cannot be added shard by shard.

    Raises:
        ConfigError: a folded table has two shapes.
    """
    by_name = {layout.network.name: layout for layout in layouts}
    for fold in objective.folds:
        owner, reader = by_name[fold.owner], by_name[fold.reader]
        shapes = [layout.full_shapes[fold.table] for layout in (owner, reader)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"{fold.table} is {list(shapes[0])} in one network and {list(shapes[1])} in the other that reads it: "
                "vocabulary and embedding_size of both must be equal"
            )
        for pipeline_rank in range(len(owner.stages_by_rank)):
            for tensor_rank in range(owner.tensor_parallel_size):
                owned = [fold.table in layout.owned(pipeline_rank, tensor_rank) for layout in (owner, reader)]
                assert owned[0] == owned[1], (fold, pipeline_rank, tensor_rank)


def add_folds(objective: Objective, weights: dict[str, dict[str, Tensor]]) -> None:
    """Adds the owners' tables to the readers' in exported weights, float32, in place.

    Args:
        objective: Its folds say which tables.
        weights: Network name -> published name -> full tensor; empty on ranks without weights.
    """
    for fold in objective.folds:
        if fold.table in weights[fold.reader]:
            weights[fold.reader][fold.table] = torch.add(weights[fold.reader][fold.table], weights[fold.owner][fold.table])
