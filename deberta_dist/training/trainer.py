"""One optimizer step, and one evaluation, of a parallel run.

The loop above knows nothing of parallelism: it asks for step s and gets its loss. Everything random in a
step is a function of (seed, step), so a step is the same wherever and whenever it runs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from deberta_dist.data.loader import Batch
from deberta_dist.models.dropout import mix_key
from deberta_dist.parallel.mesh import Mesh
from deberta_dist.parallel.pipeline.runner import MicroBatches
from deberta_dist.training.build import TrainingParts
from deberta_dist.training.step import optimizer_step, world_totals
from deberta_dist.training.step_batch import StepBatch, pack
from deberta_dist.training.target_sizes import TargetSizes


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        loss: Mean over all targets of the step (nats), before the update.
        grad_norm: Global norm before clipping; None when the step was skipped.
        num_targets: Targets of the step over all ranks.
        num_tokens: Tokens of the step over all ranks, padding left out.
    """

    loss: float
    grad_norm: float | None
    num_targets: int
    num_tokens: int

    @property
    def skipped(self) -> bool:
        """Whether a gradient was not finite on some rank, so that no rank stepped."""
        return self.grad_norm is None


@dataclass(frozen=True)
class EvaluationResult:
    """Masked-token prediction on held-out text.

    Attributes:
        loss: Mean over all targets (nats).
        accuracy: Share of targets whose most likely token is the right one.
        num_targets: How many there were.
    """

    loss: float
    accuracy: float
    num_targets: int


class Trainer:
    """Drives the parts of one rank.

    Args:
        parts: From ``build``.
        mesh: The grid.
        seed: Seed of dropout.

    A batch that is `pack`-ed ahead, in another thread, costs the step one copy; any other is packed here.
    """

    def __init__(self, parts: TrainingParts, *, mesh: Mesh, seed: int) -> None:
        self.parts = parts
        self._mesh = mesh
        self._seed = seed

    def pack(self, batch: Batch, *, sizes: TargetSizes | None = None) -> StepBatch:
        """Makes a batch of this data-parallel rank ready for `step`, in any thread.

        Args:
            batch: This rank's micro-batches, stacked.
            sizes: To pad the targets to; absent: they are not padded.
        """
        count, device = self.parts.runner.num_micro_batches, self._mesh.device
        return pack(batch, num_micro_batches=count, device=device, sizes=sizes)

    def step(self, batch: Batch | StepBatch, *, step: int, learning_rate: float) -> StepResult:
        """One optimizer step. Collective.

        Args:
            batch: This data-parallel rank's micro-batches, stacked or packed.
            step: Number of the step, from 0.
            learning_rate: For this step.
        """
        mesh = self._mesh
        here = self._here(batch)
        micro_batches = self._micro_batches(here, dropout_keys=self._dropout_keys(step))
        # Of all micro-batches on all replicas: sequences of a bucket may be many or few, every target weighs the same.
        counts = here.counts.clone()
        dist.all_reduce(counts, group=mesh.groups["data"])
        numbers, grad_norm = optimizer_step(
            self.parts.sharded_model,
            mesh=mesh,
            count=counts[0],
            learning_rate=learning_rate,
            forward_backward=lambda scale: self.parts.runner.forward_backward(micro_batches, loss_scale=scale),
            known=counts[1:],
        )
        loss_sum, _, num_targets, num_tokens = numbers
        return StepResult(
            loss=loss_sum / max(num_targets, 1), grad_norm=grad_norm, num_targets=int(num_targets), num_tokens=int(num_tokens)
        )

    def evaluate(self, batches: Iterable[Batch | StepBatch]) -> EvaluationResult:
        """Forward passes without dropout over this data-parallel rank's batches. Collective."""
        model = self.parts.sharded_model
        model.gather(with_gradients=False)
        totals = torch.zeros(3, dtype=torch.float64, device=self._mesh.device)
        for batch in batches:
            keys = [0] * self.parts.runner.num_micro_batches
            sums = self.parts.runner.evaluate(self._micro_batches(self._here(batch), dropout_keys=keys))
            totals += world_totals(sums, mesh=self._mesh)
        model.release()
        loss, correct, num_targets = totals.tolist()
        return EvaluationResult(
            loss=loss / max(num_targets, 1), accuracy=correct / max(num_targets, 1), num_targets=int(num_targets)
        )

    def _dropout_keys(self, step: int) -> list[int]:
        """Keys of this rank's micro-batches: functions of their number in the global batch, not of the layout."""
        count = self.parts.runner.num_micro_batches
        first = self._mesh.coordinate.data * count
        # 63 bits, as keys once travelled: their runs go on with the same masks.
        return [mix_key(self._seed, step, number) >> 1 for number in range(first, first + count)]

    def _here(self, batch: Batch | StepBatch) -> StepBatch:
        return (batch if isinstance(batch, StepBatch) else self.pack(batch)).to(self._mesh.device)

    def _micro_batches(self, batch: StepBatch, *, dropout_keys: Sequence[int]) -> MicroBatches:
        count = len(dropout_keys)
        masks = batch.attention_mask.chunk(count)
        documents = [None] * count if batch.document_ids is None else batch.document_ids.chunk(count)
        names = ("attention_mask", "document_ids", "targets", "dropout_key")
        values = zip(masks, documents, batch.targets, dropout_keys, strict=True)
        return MicroBatches(input_ids=batch.input_ids, fields=[dict(zip(names, found, strict=True)) for found in values])
