"""One optimizer step, and one evaluation, of a parallel run.

The loop above knows nothing of parallelism: it asks for step s and gets its loss. Everything random in a
step is a function of (seed, step), so a step is the same wherever and whenever it runs.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from deberta_dist.data.loader import Batch
from deberta_dist.mesh import Mesh
from deberta_dist.models.dropout import mix_key
from deberta_dist.pipeline_parallel.runner import MicroBatches
from deberta_dist.training.build import TrainingParts
from deberta_dist.training.step import optimizer_step, world_totals


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
    """

    def __init__(self, parts: TrainingParts, *, mesh: Mesh, seed: int) -> None:
        self.parts = parts
        self._mesh = mesh
        self._seed = seed

    def step(self, batch: Batch, *, step: int, learning_rate: float) -> StepResult:
        """One optimizer step. Collective.

        Args:
            batch: This data-parallel rank's micro-batches, stacked.
            step: Number of the step, from 0.
            learning_rate: For this step.
        """
        mesh = self._mesh
        micro_batches = self._micro_batches(batch, dropout_keys=self._dropout_keys(step))
        # Of all micro-batches on all replicas: sequences of a bucket may be many or few, every target weighs the same.
        counts = torch.stack([(micro_batches.labels > 0).sum(), micro_batches.attention_mask.sum()])
        dist.all_reduce(counts, group=mesh.groups["data"])
        sums, grad_norm = optimizer_step(
            self.parts.sharded_model,
            mesh=mesh,
            count=counts[0],
            learning_rate=learning_rate,
            forward_backward=lambda scale: self.parts.runner.forward_backward(micro_batches, loss_scale=scale),
        )
        loss = float(sums[0] / sums[2].clamp(min=1))
        return StepResult(loss=loss, grad_norm=grad_norm, num_targets=int(sums[2]), num_tokens=int(counts[1]))

    def evaluate(self, batches: list[Batch]) -> EvaluationResult:
        """Forward passes without dropout over this data-parallel rank's batches. Collective."""
        model = self.parts.sharded_model
        model.gather(with_gradients=False)
        totals = torch.zeros(3, dtype=torch.float64, device=self._mesh.device)
        for batch in batches:
            keys = torch.zeros(self.parts.runner.num_micro_batches, dtype=torch.int64)
            sums = self.parts.runner.evaluate(self._micro_batches(batch, dropout_keys=keys))
            totals += world_totals(sums, mesh=self._mesh)
        model.release()
        loss, correct, num_targets = totals.tolist()
        return EvaluationResult(
            loss=loss / max(num_targets, 1), accuracy=correct / max(num_targets, 1), num_targets=int(num_targets)
        )

    def _dropout_keys(self, step: int) -> Tensor:
        """Keys of this rank's micro-batches: functions of their number in the global batch, not of the layout."""
        count = self.parts.runner.num_micro_batches
        first = self._mesh.coordinate.data * count
        # 63 bits: a key travels as a signed integer.
        keys = [mix_key(self._seed, step, number) >> 1 for number in range(first, first + count)]
        return torch.tensor(keys, dtype=torch.int64)

    def _micro_batches(self, batch: Batch, *, dropout_keys: Tensor) -> MicroBatches:
        device, documents = self._mesh.device, batch.document_ids
        return MicroBatches(
            input_ids=batch.input_ids.to(device, non_blocking=True),
            attention_mask=batch.attention_mask.to(device, non_blocking=True),
            labels=batch.labels.to(device, non_blocking=True),
            dropout_keys=dropout_keys,
            document_ids=None if documents is None else documents.to(device, non_blocking=True),
        )
