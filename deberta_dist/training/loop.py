"""The training loop: pre-training and fine-tuning both drive it, and hooks do everything beside the steps.

    batch, made ahead -> step -> every hook sees its outcome and returns requests -> every hook acts on all requests

All ranks have to make the same requests, or one evaluates while another waits in the next step. That costs no message: a
request may depend only on what is equal on all ranks, which is the number of the step, the configuration and the step's
results (sums over all ranks from the step's one reduction, `training.step.world_totals`). What only one rank knows (a signal,
its clock, its disk) has to go into those sums and come back in a result.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Flag, IntEnum, auto
from time import monotonic
from typing import Generic, Protocol, TypeVar

from deberta_dist.data.prefetch import Prefetcher

BATCHES_AHEAD = 2

B = TypeVar("B")
LearningRate = Callable[..., float]
"""(number of a step, max_steps=steps of the run) -> its learning rate."""


class Request(Flag):
    """What hooks ask for; several are combined with ``|``."""

    NOTHING = 0
    SKIP = auto()
    """Leave out the next step: its batch is dropped, no weight changes, the step counts as done."""
    ROLL_BACK = auto()
    """Undo steps, back to the one that `Loop`'s ``roll_back`` returns. Other requests after the same step are dropped."""
    EVALUATE = auto()
    SAVE = auto()
    STOP = auto()
    """End after this step, once every hook has acted."""


class Place(IntEnum):
    """When a hook's turn comes."""

    GUARD = auto()
    METRICS = auto()
    EVALUATION = auto()
    CHECKPOINT = auto()
    STOP = auto()


class StepOutcome(Protocol):
    """What a step did to one network, the same on all ranks."""

    @property
    def loss(self) -> float:
        """Mean over the step's targets (nats), before the update."""

    @property
    def grad_norm(self) -> float | None:
        """Global norm before clipping; None where a gradient was not finite, so that no rank moved a weight."""

    @property
    def learning_rate(self) -> float:
        """Of the network in the step."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the step over all ranks, padding left out."""


@dataclass(frozen=True)
class FinishedStep(Generic[B]):
    """A step as hooks see it.

    Attributes:
        number: Steps done, this one included.
        batch: What was read, this rank's part.
        results: By the name of a network, "" of the one whose weights are the run's result; empty where the step was left out.
        consumed_samples: Read since the start of the run, this step included.
        seconds: That the step took here, waiting for the batch left out.
        waited_seconds: For its batch, here.
    """

    number: int
    batch: B
    results: Mapping[str, StepOutcome]
    consumed_samples: int
    seconds: float
    waited_seconds: float


class Steps(Protocol[B]):
    """What the loop needs of a run; ``step`` counts from 0."""

    def make_batch(self, step: int) -> B:
        """This rank's batch, a function of the step alone. Called ahead, in another thread."""

    def take(self, batch: B, *, step: int, learning_rate: float) -> Mapping[str, StepOutcome]:
        """Takes the step; what it did, by the name of a network, as `FinishedStep.results`. Collective."""

    def consumed_samples(self, num_steps: int) -> int:
        """Samples read by the first ``num_steps`` steps of the run."""


class Hook:
    """Something done beside the steps. The methods of this class do nothing and ask for nothing.

    Attributes:
        place: When its turn comes; the order in which hooks are passed does not matter.
        answers: Requests that it fulfils, its own or another hook's.
    """

    place: Place
    answers = Request.NOTHING

    def before_step(self, step: int) -> Request:
        """Returns `Request.SKIP` to leave out the step (from 0); the same on all ranks."""
        return Request.NOTHING

    def after_step(self, step: FinishedStep) -> Request:
        """Sees a finished step; returns this hook's requests, the same on all ranks."""
        return Request.NOTHING

    def act(self, step: FinishedStep, requests: Request) -> None:
        """Fulfils those of ``requests``, all hooks' after ``step``, that it answers. Collective."""

    def after_training(self) -> None:
        """Completes outstanding work. Collective; not called if training ends with an error."""


class Loop(Generic[B]):
    """Takes the remaining steps of a run.

    Args:
        steps: Makes batches and takes steps.
        hooks: In any order; they are sorted by `Hook.place`, and those with the same place keep their order.
        first_step: Number of steps done before; the first step taken has this number, from 0.
        max_steps: Number of steps at which the run ends.
        learning_rate: Schedule: step number from 0 -> learning rate.
        roll_back: For `Request.ROLL_BACK`: restores an earlier state and returns the number of steps done by then. Collective.
    """

    def __init__(
        self,
        steps: Steps[B],
        *,
        hooks: Sequence[Hook],
        first_step: int,
        max_steps: int,
        learning_rate: LearningRate,
        roll_back: Callable[[], int] | None = None,
    ) -> None:
        self._steps = steps
        self._hooks = sorted(hooks, key=lambda hook: hook.place)
        self._first_step, self._max_steps = first_step, max_steps
        self._learning_rate, self._roll_back = learning_rate, roll_back
        self._answered = Request.SKIP | Request.STOP | (Request.ROLL_BACK if roll_back else Request.NOTHING)
        for hook in self._hooks:
            self._answered |= hook.answers

    def run(self) -> None:
        """Runs to the last step, or until a hook asks to stop."""
        first: int | None = self._first_step
        while first is not None:
            first = self._run_from(first)
        for hook in self._hooks:
            hook.after_training()

    def _run_from(self, first: int) -> int | None:
        """Takes steps; returns the step to continue with after a roll back, or None at the end."""
        with Prefetcher(self._steps.make_batch, start=first, depth=BATCHES_AHEAD, stop=self._max_steps) as batches:
            for step, batch in enumerate(batches, start=first):
                requests = self._step(batch, step=step, waited_seconds=batches.waited_seconds)
                if requests & (Request.STOP | Request.ROLL_BACK):
                    break
            else:
                return None
        if Request.ROLL_BACK not in requests:
            return None
        assert self._roll_back is not None
        return self._roll_back()

    def _step(self, batch: B, *, step: int, waited_seconds: float) -> Request:
        """One step with its hooks; returns their requests."""
        is_left_out = Request.SKIP in self._joined(hook.before_step(step) for hook in self._hooks)
        started = monotonic()
        learning_rate = self._learning_rate(step, max_steps=self._max_steps)
        results = {} if is_left_out else self._steps.take(batch, step=step, learning_rate=learning_rate)
        seconds = monotonic() - started
        finished = FinishedStep(
            number=step + 1,
            batch=batch,
            results=results,
            consumed_samples=self._steps.consumed_samples(step + 1),
            seconds=seconds,
            waited_seconds=waited_seconds,
        )
        requests = self._joined(hook.after_step(finished) for hook in self._hooks)
        if Request.ROLL_BACK in requests:
            requests = Request.ROLL_BACK
        for hook in self._hooks:
            hook.act(finished, requests)
        return requests

    def _joined(self, asked: Iterable[Request]) -> Request:
        requests = Request.NOTHING
        for request in asked:
            requests |= request
        assert not requests & ~self._answered, f"no hook answers {requests & ~self._answered}"
        return requests


def learning_rate(step: int, *, peak: float, warmup_steps: int, max_steps: int) -> float:
    """Learning rate of optimizer step ``step`` (counted from 0): linear warm-up, then linear decay (paper, Table 8).

    (step + 1) / warmup_steps of the peak while warming up, so that the first step already learns and step
    warmup_steps - 1 runs at the peak; then (max_steps - step) / (max_steps - warmup_steps) of it.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (max_steps - step) / (max_steps - warmup_steps)
