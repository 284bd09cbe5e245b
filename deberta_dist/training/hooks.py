"""The hooks of a run, in the order in which the loop calls them."""

from collections.abc import Callable, Mapping
from typing import Any

from deberta_dist.errors import DivergedError
from deberta_dist.training.loop import FinishedStep, Hook, Place, Request, StepOutcome
from deberta_dist.training.metrics import MetricsLog, NetworkMetrics, StepMetrics
from deberta_dist.training.saving import Checkpointing


class FiniteGuard(Hook):
    """Ends a run whose weights are beyond repair: too many steps in a row had a non-finite gradient.

    Args:
        most_skipped: Number of skipped steps in a row at which the run ends.
        run: Name of the run in the message, if there are several.
    """

    place = Place.GUARD

    def __init__(self, *, most_skipped: int, run: str = "") -> None:
        self._most_skipped, self._run = most_skipped, run
        self._skipped_in_a_row = 0

    def after_step(self, step: FinishedStep) -> Request:
        """Counts skipped steps in a row; a step that was left out neither counts nor ends the row."""
        if step.results:
            is_skipped = any(result.grad_norm is None for result in step.results.values())
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if is_skipped else 0
        return Request.NOTHING

    def act(self, step: FinishedStep, requests: Request) -> None:
        """Raises DivergedError; by then the metrics of the step are recorded."""
        if self._skipped_in_a_row >= self._most_skipped:
            raise DivergedError(
                f"{f'{self._run}: ' if self._run else ''}{self._skipped_in_a_row} steps in a row had a non-finite gradient, "
                f"the last one step {step.number}; lower optimizer.learning_rate or look at the data"
            )


class MetricsHook(Hook):
    """Records every step with what it was for every network.

    Args:
        log: The run's; on ranks other than 0 it does nothing.
        more: Further numbers of a step and the network whose weights are the run's result; ``mfu`` among them is the model
            FLOPs utilisation.
    """

    place = Place.METRICS

    def __init__(self, log: MetricsLog, *, more: Callable[[FinishedStep, Any], Mapping[str, Any]]) -> None:
        self._log, self._more = log, more

    def after_step(self, step: FinishedStep) -> Request:
        """Records the step here, not in ``act``, so that the record exists whatever the hooks do next."""
        if not step.results:
            self._log.left_out(step=step.number, consumed_samples=step.consumed_samples)
            return Request.NOTHING
        others = dict(step.results)
        result = others.pop("")
        more = dict(self._more(step, result))
        self._log.step(
            StepMetrics(
                step=step.number,
                **_numbers(result),
                tokens_per_second=result.num_tokens / step.seconds,
                mfu=more.pop("mfu", None),
                consumed_samples=step.consumed_samples,
                data_seconds=step.waited_seconds,
                skipped=result.grad_norm is None,
            ),
            networks={name: NetworkMetrics(**_numbers(other)) for name, other in others.items()},
            **more,
        )
        return Request.NOTHING


def _numbers(result: StepOutcome) -> dict[str, Any]:
    """What is recorded of every network."""
    return {"loss": result.loss, "grad_norm": result.grad_norm, "lr": result.learning_rate}


class EvaluationHook(Hook):
    """Evaluates every ``every`` steps, and whenever a hook asks for it.

    Args:
        evaluate: Evaluates and records the result; its argument is the number of steps done. Collective.
        every: Steps from one evaluation to the next; 0: only when another hook asks.
    """

    place = Place.EVALUATION
    answers = Request.EVALUATE

    def __init__(self, evaluate: Callable[[int], None], *, every: int) -> None:
        self._evaluate, self._every = evaluate, every

    def after_step(self, step: FinishedStep) -> Request:
        """Whether one is due."""
        return Request.EVALUATE if self._every and step.number % self._every == 0 else Request.NOTHING

    def act(self, step: FinishedStep, requests: Request) -> None:
        """Evaluates if an evaluation is due or asked for."""
        if Request.EVALUATE in requests:
            self._evaluate(step.number)


class CheckpointHook(Hook):
    """Saves when a checkpoint is due, and whenever a hook asks for it; finishes checkpoints written in the background."""

    place = Place.CHECKPOINT
    answers = Request.SAVE

    def __init__(self, checkpointing: Checkpointing) -> None:
        self._checkpointing = checkpointing

    def after_step(self, step: FinishedStep) -> Request:
        """Whether one is due."""
        return Request.SAVE if self._checkpointing.is_due(step.number) else Request.NOTHING

    def act(self, step: FinishedStep, requests: Request) -> None:
        """Saves after the evaluation, so that the log has both in the order of their steps."""
        self._checkpointing.poll()
        if Request.SAVE in requests:
            self._checkpointing.save(step=step.number, consumed_samples=step.consumed_samples)

    def after_training(self) -> None:
        """Waits until the last checkpoint is whole."""
        self._checkpointing.poll(wait=True)


class StopHook(Hook):
    """Ends the run after its last step.

    Args:
        max_steps: Number of the last step.
        with_it: Requests after the last step, whether or not they are due.
    """

    place = Place.STOP

    def __init__(self, max_steps: int, *, with_it: Request) -> None:
        self._max_steps, self._with_it = max_steps, with_it

    def after_step(self, step: FinishedStep) -> Request:
        """Asks to stop at the end."""
        return Request.STOP | self._with_it if step.number == self._max_steps else Request.NOTHING
