"""Pipeline parallelism. What a step hands to it stands here, so that planning a run imports nothing of torch's pipelines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class MicroBatches:
    """The micro-batches of one step on one data-parallel rank: M micro-batches of B sequences.

    Attributes:
        input_ids: Token ids, int64 [M * B, S].
        fields: For each micro-batch, the keyword arguments of ``model.forward_stage`` beside ids, hidden states and layers.
    """

    input_ids: Tensor
    fields: Sequence[Mapping[str, Any]]
