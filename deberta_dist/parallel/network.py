"""What parallelism needs to know of a model that it trains: how it is made, cut, kept and sharded.

A layout is a network's, and so are the weight store, the checkpoint's slices and the export that follow from it. They
ask a network and never name a model. What a *run* needs beside that (fields of a batch, a loss, what stands between two
networks) is the objective's, one floor up: a classifier that is fine-tuned is a network, and has no objective.
"""

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.initialisation import without_memory
from deberta_dist.parallel.tensor.sharding_rules import SHARDING_RULES, Rules


class FlatGroup(NamedTuple):
    """One flat parameter of the weight store.

    Attributes:
        holds: Whether a published parameter lies in it.
        is_decayed: Whether weight decay applies to it.
    """

    holds: Callable[[str], bool]
    is_decayed: bool


def is_decayed(name: str) -> bool:
    """Whether weight decay applies to the published parameter ``name``: not to biases and LayerNorms."""
    return not (name.endswith(("bias", "LayerNorm.weight")))


def is_not_decayed(name: str) -> bool:
    """The opposite of `is_decayed`."""
    return not is_decayed(name)


def _is_in(group: Callable[[str], bool], apart: frozenset[str], name: str) -> bool:
    return name not in apart and group(name)


@dataclass(frozen=True, kw_only=True)
class Network(ABC):
    """A model with published parameter names and `keep_layers`.

    Equal networks have equal layouts: what follows from one is remembered by its value, so fields are hashable.

    Attributes:
        config: Sizes and switches.
        name: Stands before the names of its parameters where a run has several networks. The network whose weights are
            published under their own names has none.
        tables_apart: Parameters with a flat parameter of their own, so that their shards coincide with those of another
            network (see `training.objectives.base.Fold`).
        tables_added: Those of them that are read as the sum with another network's, and start at zero.
    """

    config: DebertaConfig
    name: str = ""
    tables_apart: tuple[str, ...] = ()
    tables_added: tuple[str, ...] = ()

    @abstractmethod
    def make(self) -> nn.Module:
        """The whole model."""

    @property
    def rules(self) -> Rules:
        """How its modules are split over tensor-parallel ranks."""
        return SHARDING_RULES

    @property
    def decoder_layer(self) -> int | None:
        """Number of the layer whose rows are targets and not a sequence's tokens; None without one."""
        return None

    @property
    def flat_groups(self) -> tuple[FlatGroup, ...]:
        """The flat parameters of its weight store, in order; each parameter lies in one."""
        shared = (FlatGroup(is_decayed, True), FlatGroup(is_not_decayed, False))
        if not self.tables_apart:
            return shared
        apart = frozenset(self.tables_apart)
        return (
            *(FlatGroup(functools.partial(_is_in, own, apart), decays) for own, decays in shared),
            *(FlatGroup(table.__eq__, is_decayed(table)) for table in self.tables_apart),
        )

    def meta_model(self) -> nn.Module:
        """The whole model without any memory."""
        with without_memory():
            return self.make()

    @property
    def own_key(self) -> tuple[int, ...]:
        """What tells its dropout from that of the run's other networks."""
        return (int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "little"),) if self.name else ()

    def saved_name(self, name: str) -> str:
        """What a checkpoint, and the seed of an initial value, call the parameter ``name``."""
        return f"{self.name}.{name}" if self.name else name
