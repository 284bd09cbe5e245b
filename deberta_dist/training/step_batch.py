"""A step's batch as the device gets it: all that the host knows of it, in one pinned buffer and one copy.

Letters: M micro-batches of B sequences of S tokens, R = M B rows, T and P targets as in `models.targets`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deberta_dist.data.loader import Batch
from deberta_dist.models.targets import Targets, find_targets
from deberta_dist.training.target_sizes import TargetSizes


@dataclass(frozen=True)
class StepBatch:
    """The micro-batches of one step on one data-parallel rank.

    Attributes:
        input_ids: int64 [R, S].
        attention_mask: 1 for real tokens, int64 [R, S].
        document_ids: int64 [R, S], see `Batch`; None where a sequence is one text.
        targets: of each micro-batch.
        counts: int64 [2]: targets and tokens, padding left out.
    """

    input_ids: Tensor
    attention_mask: Tensor
    document_ids: Tensor | None
    targets: tuple[Targets, ...]
    counts: Tensor

    def to(self, device: torch.device) -> "StepBatch":
        """The same on a device, by one copy of the memory that `pack` has laid all tensors into; does not wait for it."""
        if device.type == "cpu":
            return self
        tensors = self._tensors()
        whole = torch.empty(0, dtype=torch.int64).set_(self.counts.untyped_storage())
        return self._made_of(_split(whole.to(device, non_blocking=True), [x.shape for x in tensors]))

    def _tensors(self) -> list[Tensor]:
        documents = [] if self.document_ids is None else [self.document_ids]
        found = [x for targets in self.targets for x in targets.tensors()]
        return [self.counts, self.input_ids, self.attention_mask, *documents, *found]

    def _made_of(self, tensors: Sequence[Tensor]) -> "StepBatch":
        counts, input_ids, attention_mask, *rest = tensors
        documents = None if self.document_ids is None else rest.pop(0)
        targets = tuple(
            Targets(*rest[4 * number : 4 * number + 4], num_targets=here.num_targets, width=here.width)
            for number, here in enumerate(self.targets)
        )
        return StepBatch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            document_ids=documents,
            targets=targets,
            counts=counts,
        )


def pack(batch: Batch, *, num_micro_batches: int, device: torch.device, sizes: TargetSizes | None = None) -> StepBatch:
    """Finds the targets of a batch and lays everything into one buffer, pinned for a GPU. Called ahead of the step.

    Args:
        batch: M micro-batches, stacked.
        num_micro_batches: M.
        device: that the batch will be copied to.
        sizes: to pad the targets to; absent: they are not padded.
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
    tensors = loose._tensors()
    whole = torch.empty(sum(x.numel() for x in tensors), dtype=torch.int64, pin_memory=True)
    parts = _split(whole, [x.shape for x in tensors])
    for part, tensor in zip(parts, tensors, strict=True):
        part.copy_(tensor)
    return loose._made_of(parts)


def _split(whole: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Views of a flat tensor, one behind the other."""
    parts = whole.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
