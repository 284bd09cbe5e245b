"""What parallelism needs to know of a model: how it is made, divided into stages and sharded.

Layout, weight store, checkpoint slices and export ask a `Network` and never name a model. What a pre-training run needs
beyond that (fields of a batch, a loss, what one network passes to another) belongs to the objective, in
``training/objectives``. A classifier being fine-tuned is a network without an objective.
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

    Equal networks have equal layouts. Layouts are cached by a network's value, so its fields have to be hashable.

    Attributes:
        config: Sizes and switches of its encoder.
        name: Prefix of its parameter names in a checkpoint of several networks. Empty for the network whose weights are
            published, which keep their published names.
        tables_apart: Parameters with a flat parameter of their own, so that their shards coincide with those of another
            network (see `training.objectives.base.Fold`).
        tables_added: Those of ``tables_apart`` that are used as the sum with another network's table, and start at zero.
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
        """How its modules are divided over tensor ranks, by module name."""
        return SHARDING_RULES

    @property
    def decoder_layer(self) -> int | None:
        """Number of the layer that runs on targets instead of all tokens of a sequence; None without one."""
        return None

    @property
    def flat_groups(self) -> tuple[FlatGroup, ...]:
        """The flat parameters of its weight store, in order; every parameter lies in exactly one."""
        shared = (FlatGroup(is_decayed, True), FlatGroup(is_not_decayed, False))
        if not self.tables_apart:
            return shared
        apart = frozenset(self.tables_apart)
        return (
            *(FlatGroup(functools.partial(_is_in, own, apart), decays) for own, decays in shared),
            *(FlatGroup(table.__eq__, is_decayed(table)) for table in self.tables_apart),
        )

    def meta_model(self) -> nn.Module:
        """The whole model on the meta device."""
        with without_memory():
            return self.make()

    @property
    def own_key(self) -> tuple[int, ...]:
        """A number mixed into its dropout keys, so that networks of one run drop different elements; empty without a name."""
        return (int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "little"),) if self.name else ()

    def saved_name(self, name: str) -> str:
        """What a checkpoint, and the seed of an initial value, call the parameter ``name``."""
        return f"{self.name}.{name}" if self.name else name
