"""One optimizer step of fine-tuning, with or without SiFT, and predictions for a split."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from deberta_dist.data.pinned import to_device
from deberta_dist.errors import DivergedError
from deberta_dist.finetuning.batches import TaskBatch, batch_key, pad
from deberta_dist.finetuning.sift import Sift, SiftSettings
from deberta_dist.models.encoder import DebertaModel
from deberta_dist.models.targets import BOOL, require_tensor
from deberta_dist.parallel.mesh import Mesh
from deberta_dist.parallel.sharded_model import ShardedModel
from deberta_dist.tasks.base import Features
from deberta_dist.tasks.decisions import Probabilities
from deberta_dist.tasks.encoding import Example
from deberta_dist.training.step import optimizer_step

# Decisions whose sequences are in memory at once while predicting.
_CHUNK = 4096


@dataclass(frozen=True)
class FineTuneResult:
    """What one optimizer step did.

    Attributes:
        loss: Task loss, mean over the step's decisions (nats), before the update.
        sift_loss: Adversarial loss, mean over the step's decisions, unweighted; None without SiFT.
        accuracy: Share of decisions whose best label is a right one.
        grad_norm: Global norm before clipping; None when the step was skipped.
        learning_rate: Of the step.
        num_tokens: Read by the step, over all ranks, padding left out.
    """

    loss: float
    sift_loss: float | None
    accuracy: float
    grad_norm: float | None
    learning_rate: float
    num_tokens: int


class FineTuner:
    """Drives one rank's classifier.

    Args:
        model: A classifier, this rank's shards of it.
        mesh: Its data axis shares out the decisions of a step and the sequences of a split.
        sift: How to perturb; None for plain fine-tuning.
        seed: Start of the random numbers of dropout and of SiFT's perturbations.
        pad_id: Fills sequences up to the longest of a batch.
        sep_id: Ends the first of two texts, behind which token types are 1.
    """

    def __init__(
        self, model: ShardedModel, *, mesh: Mesh, sift: SiftSettings | None, seed: int, pad_id: int, sep_id: int
    ) -> None:
        self.model = model
        self._mesh, self._seed = mesh, seed
        self.pad_id, self.sep_id = pad_id, sep_id
        self._weight = 0.0 if sift is None else sift.weight
        backbone = model.model.deberta
        assert isinstance(backbone, DebertaModel)
        self._sift = None if sift is None else Sift(backbone.embeddings.LayerNorm, sift)
        self._has_types = backbone.config.type_vocab_size > 1

    def step(
        self, batches: Iterable[tuple[int, TaskBatch]], *, num_decisions: int, step: int, learning_rate: float
    ) -> FineTuneResult:
        """One optimizer step. Collective.

        Args:
            batches: This data-parallel rank's micro-batches with their numbers in the step.
            num_decisions: Of the step, over all ranks.
            step: Number of the step, from 0.
            learning_rate: Rate of this step; the schedule is the caller's.
        """
        loss_scale = self.model.store.loss_scale

        def forward_backward(scale: Tensor) -> Tensor:
            self.model.model.train()
            sums = torch.zeros(4, device=self._mesh.device)
            for number, batch in batches:
                key = batch_key(self._seed, step, number)
                sums += self._one(batch.to(self._mesh.device), key=key, scale=scale, loss_scale=loss_scale)
            return sums

        count = torch.full((), num_decisions, device=self._mesh.device)
        totals, grad_norm = optimizer_step(
            self.model, mesh=self._mesh, count=count, learning_rate=learning_rate, forward_backward=forward_backward
        )
        loss, sift_loss, correct, _ = (total / num_decisions for total in totals)
        return FineTuneResult(
            loss=loss,
            sift_loss=None if self._sift is None else sift_loss,
            accuracy=correct,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            num_tokens=int(totals[3]),
        )

    def _one(self, batch: TaskBatch, *, key: int, scale: Tensor, loss_scale: float) -> Tensor:
        """Gradients of one micro-batch; returns its sums of losses, adversarial losses, right answers, tokens."""

        def forward(dropout_key: int | None) -> Tensor:
            return self._logits(batch, dropout_key=dropout_key)

        if self._sift is None:
            logits = forward(key)
            adversarial = torch.zeros(len(logits), device=logits.device)
        else:
            logits, adversarial = self._sift.passes(forward, key=key, loss_scale=loss_scale)
        losses = decision_loss(logits, batch.gold)
        # Sums: `scale` divides by the decisions of the whole step, so micro-batches of any size weigh what they hold.
        ((losses.sum() + self._weight * adversarial.sum()) * scale).backward()
        self.model.accumulate()
        correct = batch.gold.gather(1, logits.argmax(dim=1, keepdim=True)).sum()
        tokens = batch.attention_mask.sum()
        return torch.stack([losses.detach().sum(), adversarial.detach().sum(), correct.float(), tokens.float()])

    def _logits(self, batch: TaskBatch, *, dropout_key: int | None) -> Tensor:
        """Float32 [D, C]."""
        logits = self.model.model(
            batch.input_ids,
            batch.attention_mask,
            token_type_ids=batch.token_type_ids if self._has_types else None,
            dropout_key=dropout_key,
        ).logits
        return batch.decision_logits(logits)

    def predict(self, features: Features, *, batch_size: int) -> Probabilities:
        """Probabilities of every decision of a split, the same on every data-parallel rank. Collective.

        Args:
            features: Encoded sequences of all decisions.
            batch_size: Sequences per forward pass of a rank; sequences of like length meet in one.

        Raises:
            DivergedError: the model gives numbers that are not finite.
        """
        self.model.gather(with_gradients=False)
        self.model.model.eval()
        found: dict[Any, Any] = {}
        with torch.no_grad():
            for start in range(0, len(features.examples), _CHUNK):
                found |= self._predict(features, features.examples[start : start + _CHUNK], batch_size=batch_size)
        self.model.release()
        return found

    def _predict(self, features: Features, examples: Sequence[Example], *, batch_size: int) -> Probabilities:
        task = features.split.task
        rows: list[np.ndarray] = []
        owners: list[tuple[int, int]] = []
        for number, example in enumerate(examples):
            for choice in range(len(example.seconds)):
                windows = features.sequences(example, choice)
                rows += windows
                owners += [(number, choice)] * len(windows)
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        # Every rank fills its rows of one table and the sum over ranks adds zeros: the same bits however many there are.
        logits = torch.zeros(len(rows), task.num_outputs, device=self._mesh.device)
        shape, here = self._mesh.shape, self._mesh.mesh_rank
        # Dealt out in order of length, so that every rank has short batches and long ones.
        for batch in list(range(0, len(order), batch_size))[here.data :: shape.data]:
            own = order[batch : batch + batch_size]
            padded = pad([rows[row] for row in own], pad_id=self.pad_id, sep_id=self.sep_id)
            ids, mask, types, slots = to_device([*padded, torch.tensor(own)], self._mesh.device)
            output = self.model.model(ids, mask, token_type_ids=types if self._has_types else None)
            logits.index_copy_(0, slots, output.logits.float())
        dist.all_reduce(logits, group=self._mesh.groups["data"])
        if not logits.isfinite().all():
            raise DivergedError(
                f"{features.split.where}: the model's answers are not finite; lower optimizer.learning_rate, or take a "
                "run.deepspeed with bf16 instead of fp16"
            )
        # float64 from here on: averages over windows and runs should add no rounding of their own.
        return _probabilities(features, examples, logits.double().cpu().numpy(), owners)


def decision_loss(logits: Tensor, gold: Tensor) -> Tensor:
    """Cross entropy [D] of logits [D, C]: minus the log of the probability that the right ones have together.

    Args:
        gold: which are right, bool [D, C].

    Raises:
        ValueError: ``gold`` is not as it should be.
    """
    require_tensor(gold, name="gold", shapes=[logits.shape], kinds=[BOOL], user="the loss of these decisions")
    return logits.logsumexp(dim=1) - logits.masked_fill(~gold, float("-inf")).logsumexp(dim=1)


def _probabilities(
    features: Features, examples: Sequence[Example], logits: np.ndarray, owners: Sequence[tuple[int, int]]
) -> Probabilities:
    """What the task makes of the logits of its sequences."""
    split = features.split
    sums: list[dict[int, list[np.ndarray]]] = [{} for _ in examples]
    for row, (number, choice) in zip(logits, owners, strict=True):
        sums[number].setdefault(choice, []).append(row)
    found = {}
    for example, by_choice in zip(examples, sums, strict=True):
        windows = [by_choice[choice] for choice in range(len(example.seconds))]
        found[example.key] = split.task.probabilities(split.decisions[example.key], windows)
    return found
