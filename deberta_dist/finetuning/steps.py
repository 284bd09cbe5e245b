"""The steps of one task for the training loop, and its best weights so far."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from deberta_dist.finetuning.batches import TaskBatch, TrainingOrder, collate, dealt
from deberta_dist.finetuning.finetuner import FineTuner, FineTuneResult
from deberta_dist.finetuning.plan import TaskPlan
from deberta_dist.parallel.mesh import Mesh
from deberta_dist.tasks import metrics
from deberta_dist.tasks.decisions import Probabilities
from deberta_dist.tasks.predictions import decide
from deberta_dist.training.hooks import EvaluationHook, FiniteGuard, MetricsHook, StopHook
from deberta_dist.training.loop import FinishedStep, Loop, Request, learning_rate
from deberta_dist.training.metrics import MetricsLog

# Steps in a row that no rank could take before the run gives up.
MAX_SKIPPED_IN_A_ROW = 20


@dataclass
class Best:
    """The best evaluation so far.

    Attributes:
        step: Steps done when it was made.
        score: Task score, percent; below all before the first.
        metrics: What the task is scored by, percent.
        probabilities: Answers to the validation split.
        shards: This rank's weights then, float32 on the host; empty while it is that of an earlier run.
    """

    step: int = 0
    score: float = -1.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    probabilities: Probabilities = field(default_factory=dict)
    shards: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class StepDecisions:
    """What a data-parallel rank reads in a step.

    Attributes:
        count: Decisions of the step, over all ranks.
        batches: This rank's micro-batches with their numbers in the step.
    """

    count: int
    batches: list[tuple[int, TaskBatch]]


class TaskSteps:
    """The steps of one task, for the loop.

    Args:
        tuner: The model on this rank with its optimizer.
        plan: Has the training rows and the sizes of batches.
        order: Says which rows a step has.
        done: Steps and decisions of a shorter run that it continues.
        mesh: Its data axis shares out the micro-batches of a step.
    """

    def __init__(self, tuner: FineTuner, *, plan: TaskPlan, order: TrainingOrder, done: tuple[int, int], mesh: Mesh) -> None:
        self._tuner, self._plan, self._order, self._mesh = tuner, plan, order, mesh
        self._first_step, self._decisions_before = done

    def consumed_samples(self, num_steps: int) -> int:
        """Decisions read by the first ``num_steps`` steps; the last step may be a part of one."""
        since = (num_steps - self._first_step) * self._plan.config.training.global_batch_size
        return min(self._decisions_before + since, self._order.num_decisions)

    def make_batch(self, step: int) -> StepDecisions:
        """This rank's micro-batches of a step."""
        train, ids = self._plan.features["train"], {"pad_id": self._tuner.pad_id, "sep_id": self._tuner.sep_id}
        of_all = self._order.micro_batches(step)
        own = dealt(len(of_all), rank=self._mesh.mesh_rank.data, size=self._mesh.shape.data)
        batches = [(i, collate(train, of_all[i], **ids).ahead_of(self._mesh.device)) for i in own]
        return StepDecisions(sum(map(len, of_all)), batches)

    def take(self, batch: StepDecisions, *, step: int, learning_rate: float) -> dict[str, FineTuneResult]:
        """Takes a step."""
        result = self._tuner.step(batch.batches, num_decisions=batch.count, step=step, learning_rate=learning_rate)
        return {"": result}

    @staticmethod
    def numbers(step: FinishedStep[StepDecisions], result: FineTuneResult) -> dict[str, Any]:
        """What a record holds beside the loop's own fields."""
        return {"sift_loss": result.sift_loss, "accuracy": result.accuracy}


def train(
    tuner: FineTuner, best: Best, *, plan: TaskPlan, order: TrainingOrder, done: tuple[int, int], mesh: Mesh, log: MetricsLog
) -> None:
    """The steps that are left; ``best`` is replaced where they are better."""
    optimizer = plan.config.optimizer
    steps = TaskSteps(tuner, plan=plan, order=order, done=done, mesh=mesh)
    hooks = [
        FiniteGuard(most_skipped=MAX_SKIPPED_IN_A_ROW, run=plan.task.name),
        MetricsHook(log, more=steps.numbers),
        EvaluationHook(
            lambda step: _evaluate(tuner, best, plan=plan, mesh=mesh, log=log, step=step),
            every=max(1, round(order.steps_per_epoch / plan.config.evaluation.per_epoch)),
        ),
        StopHook(order.num_steps, with_it=Request.EVALUATE),
    ]
    loop = Loop(
        steps,
        hooks=hooks,
        first_step=done[0],
        max_steps=order.num_steps,
        learning_rate=partial(learning_rate, peak=optimizer.learning_rate, warmup_steps=plan.config.schedule.warmup_steps),
    )
    loop.run()


def _evaluate(tuner: FineTuner, best: Best, *, plan: TaskPlan, mesh: Mesh, log: MetricsLog, step: int) -> None:
    """Scores the validation split and keeps probabilities and weights where they are the best so far."""
    features = plan.features["val"]
    probabilities = tuner.predict(features, batch_size=plan.config.evaluation.batch_size)
    scores = metrics.score(features.split, decide(features.split, probabilities))
    # One rank decides: a last bit that differs on another must not mix the weights of two steps.
    is_best = bool(mesh.broadcast_number(int(metrics.task_score(scores) > best.score)))
    if is_best:
        best.step, best.score, best.metrics = step, metrics.task_score(scores), scores
        best.probabilities, best.shards = probabilities, tuner.model.store.copy_weights()
    log.scores(step=step, scores=scores, is_best=is_best)
