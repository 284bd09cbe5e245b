"""One optimizer step, and one evaluation, of a parallel run.

The loop above knows nothing of parallelism: it asks for step s and gets its loss. Everything random in a step is a function
of (seed, step), so a step is the same on any layout and after any resume.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from deberta_dist.data.loader import Batch
from deberta_dist.models.dropout import mix_key
from deberta_dist.parallel.mesh import Mesh
from deberta_dist.training.build import TrainingComponents
from deberta_dist.training.objectives.base import Objective, TrainedNetwork, alone, check_folds
from deberta_dist.training.step import Half, apply_halves, reduce_half, world_totals
from deberta_dist.training.step_batch import StepBatch, pack
from deberta_dist.training.target_sizes import TargetSizes


@dataclass(frozen=True)
class NetworkResult:
    """What one optimizer step was for one network.

    Attributes:
        loss: Mean over what its loss is the mean over (nats), before the update.
        grad_norm: Global norm of its gradient before clipping; None when no rank stepped.
        learning_rate: Of its step.
        num_tokens: Tokens of the step over all ranks, padding left out.
        sums: What its last stage added up, over all ranks, by `TrainedNetwork.results`.
    """

    loss: float
    grad_norm: float | None
    learning_rate: float
    num_tokens: int
    sums: Mapping[str, float]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        loss: Of all networks together, each with its weight (nats), before the update; each the mean over its targets.
        grad_norm: Global norm before clipping, over all networks; None when one of them was skipped.
        num_targets: Targets of the step over all ranks.
        num_tokens: Tokens of the step over all ranks, padding left out.
        networks: What the step did to each network, by its name.
    """

    loss: float
    grad_norm: float | None
    num_targets: int
    num_tokens: int
    networks: Mapping[str, NetworkResult] = field(default_factory=dict)

    @property
    def skipped(self) -> bool:
        """Whether a gradient was not finite on some rank, so that no rank stepped."""
        return self.grad_norm is None


@dataclass(frozen=True)
class EvaluationResult:
    """What a network's loss asks for, on held-out text: masked tokens, of masked language modelling.

    Attributes:
        loss: Mean over all targets (nats).
        accuracy: Share of targets whose most likely answer is the right one.
        num_targets: How many there were.
        counted: What they are: one of `step_batch.COUNTS`.
    """

    loss: float
    accuracy: float
    num_targets: int
    counted: str = "targets"


class Trainer:
    """Drives the parts of one rank.

    Args:
        *parts: From ``build``, one for every network of the objective, in its order.
        mesh: The mesh that the parts were built on.
        seed: ``training.seed``, mixed into the dropout keys.
        objective: The networks and their relations; None for a single network.

    A batch that another thread has `pack`-ed costs the step one copy; any other is packed in the step.
    """

    def __init__(self, *parts: TrainingComponents, mesh: Mesh, seed: int, objective: Objective | None = None) -> None:
        self.objective = alone(parts[0].layout.network) if objective is None else objective
        assert [one.layout.network for one in parts] == list(self.objective.networks)
        check_folds(self.objective, [one.layout for one in parts])
        self.networks = parts
        self._by_name = {one.layout.network.name: one for one in parts}
        self._mesh = mesh
        self._seed = seed

    @property
    def parts(self) -> TrainingComponents:
        """The parts of the network whose weights are the run's result."""
        return self.networks[self.objective.main]

    def pack(self, batch: Batch, *, sizes: TargetSizes | None = None) -> StepBatch:
        """Prepares a batch of this data rank for `step`, in any thread.

        Args:
            batch: This rank's micro-batches, stacked, [M * B, S].
            sizes: Sizes to pad the targets to; None for no padding.
        """
        count, device = self.parts.runner.num_micro_batches, self._mesh.device
        return pack(batch, num_micro_batches=count, device=device, sizes=sizes)

    def step(self, batch: Batch | StepBatch, *, step: int, learning_rate: float) -> StepResult:
        """One optimizer step of every network. Collective.

        Args:
            batch: This data-parallel rank's micro-batches, stacked or packed.
            step: Number of the step, from 0.
            learning_rate: Of the run in this step; a network has its own factor on it.
        """
        here = self._here(batch)
        # Of all micro-batches on all replicas: sequences of a bucket may be many or few, every target weighs the same.
        counts = here.counts.clone()
        dist.all_reduce(counts, group=self._mesh.groups["data"])
        rates = [network.learning_rate_factor * learning_rate for network in self.objective.networks]
        halves, sums, norms, known, handed = [], [], [], [], None
        for parts in self.networks:
            half, handed = self._reduce(parts, here, step=step, counts=counts, handed=handed)
            halves.append(half)
            is_last = len(sums) + len(halves) == len(self.networks)
            if is_last or not self.objective.is_joint:
                now = slice(len(sums), len(sums) + len(halves))
                found, known, norm = apply_halves(
                    halves, learning_rates=rates[now], may_step=None not in norms, known=counts if is_last else None
                )
                sums, norms, halves = sums + found, [*norms, norm], []
        return self._result(sums, norms, rates, num_targets=int(known[0]), num_tokens=int(known[1]))

    def _reduce(
        self, parts: TrainingComponents, here: StepBatch, *, step: int, counts: Tensor, handed: Tensor | None
    ) -> tuple[Half, Tensor | None]:
        """The first half of a network's step, and what it hands on."""
        network, found = parts.layout.network, None
        keys = self._dropout_keys(step, network=network)
        micro_batches = network.micro_batches(here, dropout_keys=keys, handed=handed)

        def forward_backward(scale: Tensor) -> Tensor:
            nonlocal found
            sums, found = parts.runner.forward_backward(micro_batches, loss_scale=scale)
            return sums

        self._fold(network)
        half = reduce_half(
            parts.sharded_model,
            mesh=self._mesh,
            count=counts[network.counted],
            forward_backward=forward_backward,
            weight=network.loss_weight,
        )
        return half, self._hand_on(network, found, like=here)

    def _fold(self, network: TrainedNetwork) -> None:
        """Before a gather: adds the tables of other networks that this one reads."""
        for fold in self.objective.folds_of(network.name):
            store, base = (self._by_name[name].sharded_model.store for name in (fold.reader, fold.owner))
            store.fold(fold.table, base)

    def _hand_on(self, network: TrainedNetwork, found: Tensor | None, *, like: StepBatch) -> Tensor | None:
        """Broadcasts the last stage's ids over the pipeline ranks, of which the first needs them. Collective."""
        if not network.hands_on:
            return None
        ids = torch.empty_like(like.input_ids) if found is None else found.contiguous()
        dist.broadcast(ids, group_src=self._mesh.shape.pipeline - 1, group=self._mesh.groups["pipeline"])
        return ids

    def _result(
        self,
        sums: Sequence[Sequence[float]],
        norms: Sequence[float | None],
        rates: Sequence[float],
        *,
        num_targets: int,
        num_tokens: int,
    ) -> StepResult:
        networks, loss = {}, 0.0
        for number, (network, found, rate) in enumerate(zip(self.objective.networks, sums, rates, strict=True)):
            by_name = dict(zip(network.results, found, strict=True))
            own = by_name["loss"] / max(by_name[network.mean_over], 1)
            loss += network.loss_weight * own
            norm = norms[0 if self.objective.is_joint else number]
            networks[network.name] = NetworkResult(
                loss=own, grad_norm=norm, learning_rate=rate, num_tokens=num_tokens, sums=by_name
            )
        return StepResult(
            loss=loss,
            grad_norm=None if None in norms else norms[0] if len(norms) == 1 else math.hypot(*norms),
            num_targets=num_targets,
            num_tokens=num_tokens,
            networks=networks,
        )

    def evaluate(self, batches: Iterable[Batch | StepBatch]) -> EvaluationResult:
        """Evaluates the network whose weights are the run's result; see `evaluate_networks`. Collective."""
        return self.evaluate_networks(batches)[""]

    def evaluate_networks(self, batches: Iterable[Batch | StepBatch]) -> dict[str, EvaluationResult]:
        """Evaluates every network without dropout on this data rank's batches; results by network name. Collective."""
        found: dict[str, EvaluationResult] = {}
        if len(self.networks) > 1:  # one network after the other takes all of them
            batches = list(batches)
        handed: Iterable[Tensor | None] = itertools.repeat(None)
        for parts in self.networks:
            network, passed_on = parts.layout.network, []
            self._fold(network)
            parts.sharded_model.gather(with_gradients=False)
            totals = torch.zeros(len(network.results), dtype=torch.float64, device=self._mesh.device)
            for batch, before in zip(batches, handed, strict=False):
                here, keys = self._here(batch), [0] * parts.runner.num_micro_batches
                micro_batches = network.micro_batches(here, dropout_keys=keys, handed=before)
                sums, ids = parts.runner.evaluate(micro_batches)
                totals += world_totals(sums, mesh=self._mesh)
                passed_on.append(self._hand_on(network, ids, like=here))
            parts.sharded_model.release()
            handed = passed_on
            by_name = dict(zip(network.results, totals.tolist(), strict=True))
            count = by_name[network.mean_over]
            found[network.name] = EvaluationResult(
                loss=by_name["loss"] / max(count, 1),
                accuracy=by_name["correct"] / max(count, 1),
                num_targets=int(count),
                counted=network.mean_over,
            )
        return found

    def _dropout_keys(self, step: int, *, network: TrainedNetwork) -> list[int]:
        """Dropout keys of this rank's micro-batches: functions of their number in the global batch, not of the layout."""
        count = self.parts.runner.num_micro_batches
        first = self._mesh.mesh_rank.data * count
        # 63 bits, because earlier versions sent keys as int64, and their runs have to resume with the same masks.
        return [mix_key(self._seed, step, number, *network.own_key) >> 1 for number in range(first, first + count)]

    def _here(self, batch: Batch | StepBatch) -> StepBatch:
        return (batch if isinstance(batch, StepBatch) else self.pack(batch)).to(self._mesh.device)
