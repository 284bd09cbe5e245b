"""A step's batch for the device: ids, masks, targets and counts in one pinned buffer, sent by one copy.

Letters: M micro-batches of B sequences of S tokens, R = M B rows, T and P targets as in `models.targets`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deberta_dist.data.loader import Batch
from deberta_dist.data.pinned import PinnedTensors
from deberta_dist.models.targets import Targets, find_targets
from deberta_dist.training.target_sizes import TargetSizes

COUNTS = ("targets", "tokens")
"""What a batch counts, in the order of `StepBatch.counts`; padding is left out of both."""


@dataclass(frozen=True)
class StepBatch:
    """The micro-batches of one step on one data-parallel rank.

    Attributes:
        input_ids: int64 [R, S].
        attention_mask: 1 for real tokens, int64 [R, S].
        document_ids: int64 [R, S], see `Batch`; None if a sequence is one text.
        targets: one for each micro-batch, in order.
        counts: targets and tokens of all micro-batches, int64 [2], see `COUNTS`.
        pinned: the host buffer that all tensors are views of; None on a CPU.
    """

    input_ids: Tensor
    attention_mask: Tensor
    document_ids: Tensor | None
    targets: tuple[Targets, ...]
    counts: Tensor
    pinned: PinnedTensors | None = None

    def to(self, device: torch.device) -> "StepBatch":
        """The batch on a device, by one copy, without waiting for it."""
        if device.type == "cpu":
            return self
        assert self.pinned is not None, "packed for this device"
        return self._made_of(self.pinned.to(device))

    def _tensors(self) -> list[Tensor]:
        documents = [] if self.document_ids is None else [self.document_ids]
        found = [x for targets in self.targets for x in targets.tensors()]
        return [self.counts, self.input_ids, self.attention_mask, *documents, *found]

    def _made_of(self, tensors: Sequence[Tensor], pinned: PinnedTensors | None = None) -> "StepBatch":
        counts, input_ids, attention_mask, *rest = tensors
        documents = None if self.document_ids is None else rest.pop(0)
        targets = tuple(here.made_of(rest[4 * number : 4 * number + 4]) for number, here in enumerate(self.targets))
        return StepBatch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            document_ids=documents,
            targets=targets,
            counts=counts,
            pinned=pinned,
        )


def pack(batch: Batch, *, num_micro_batches: int, device: torch.device, sizes: TargetSizes | None = None) -> StepBatch:
    """Finds the targets of a batch and, for a GPU, copies everything into one pinned buffer. Called ahead of the step.

    Args:
        batch: M micro-batches, stacked, on the host.
        num_micro_batches: M; divides the batch's rows.
        device: the device that the batch will be copied to.
        sizes: sizes to pad the targets to; None for no padding.
    """
    is_target, targets = batch.labels > 0, []
    for rows, labels in zip(is_target.chunk(num_micro_batches), batch.labels.chunk(num_micro_batches), strict=True):
        targets.append(find_targets(rows, labels, size=None if sizes is None else sizes.of(rows)))
    counts = torch.tensor([sum(found.num_targets for found in targets), int(batch.attention_mask.sum())])
    loose = StepBatch(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        document_ids=batch.document_ids,
        targets=tuple(targets),
        counts=counts,
    )
    if device.type == "cpu":
        return loose
    pinned = PinnedTensors(loose._tensors())
    return loose._made_of(pinned.tensors, pinned)
