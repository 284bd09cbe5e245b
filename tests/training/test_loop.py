"""The training loop with steps and hooks that only take notes, and the learning rate at every step."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from deberta_dist.errors import DivergedError
from deberta_dist.training.hooks import CheckpointHook, EvaluationHook, FiniteGuard, MetricsHook, StopHook
from deberta_dist.training.loop import FinishedStep, Hook, Loop, Place, Request, learning_rate
from deberta_dist.training.metrics import MetricsLog

LAST = 6
EVERYTHING = Request.EVALUATE | Request.SAVE


@dataclass(frozen=True)
class Result:
    """A step's; of a network whose loss is the number of the step."""

    loss: float
    learning_rate: float
    grad_norm: float | None = 1.0
    num_tokens: int = 100


@dataclass
class Steps:
    """Notes every step into ``events`` as (what, steps done)."""

    events: list[tuple[str, int]]
    not_finite: frozenset[int] = frozenset()
    networks: tuple[str, ...] = ("",)
    made: list[int] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)

    def make_batch(self, step: int) -> str:
        self.made.append(step)
        self.threads.add(threading.get_ident())
        return f"batch {step}"

    def take(self, batch: str, *, step: int, learning_rate: float) -> dict[str, Result]:
        assert batch == f"batch {step}"
        self.events.append(("step", step + 1))
        self.rates.append(learning_rate)
        norm = None if step + 1 in self.not_finite else 1.0
        return {
            name: Result(step + 1.0 + 10 * number, learning_rate / 2**number, norm) for number, name in enumerate(self.networks)
        }

    def consumed_samples(self, num_steps: int) -> int:
        return 8 * num_steps


class Checkpointing:
    """Stands for `saving.Checkpointing`; a checkpoint is due after step 4."""

    def __init__(self, events: list[tuple[str, int]]) -> None:
        self._events = events

    def is_due(self, steps_done: int) -> bool:
        return steps_done == 4

    def poll(self, *, wait: bool = False) -> None:
        if wait:
            self._events.append(("wait", 0))

    def save(self, *, step: int, consumed_samples: int) -> None:
        assert consumed_samples == 8 * step
        self._events.append(("save", step))


class Asks(Hook):
    """Asks for something after a step, once, and before steps."""

    def __init__(self, place: Place, *, after: dict[int, Request] | None = None, skips: tuple[int, ...] = ()) -> None:
        self.place, self._after, self._skips = place, dict(after or {}), skips
        self.seen: list[FinishedStep] = []

    def before_step(self, step: int) -> Request:
        return Request.SKIP if step in self._skips else Request.NOTHING

    def after_step(self, step: FinishedStep) -> Request:
        self.seen.append(step)
        return self._after.pop(step.number, Request.NOTHING)


@dataclass
class Run:
    """A loop over ``Steps`` with the hooks of a run, and what happened."""

    directory: Path
    not_finite: frozenset[int] = frozenset()
    networks: tuple[str, ...] = ("",)
    first_step: int = 0
    events: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.steps = Steps(self.events, not_finite=self.not_finite, networks=self.networks)

    def __call__(self, *more: Hook, roll_back: Callable[[], int] | None = None) -> list[tuple[str, int]]:
        log = MetricsLog(self.directory, is_writer=True, max_steps=LAST, print_every=2)
        hooks = [
            StopHook(LAST, with_it=EVERYTHING),
            CheckpointHook(Checkpointing(self.events)),
            *more,
            EvaluationHook(lambda step: self.events.append(("evaluate", step)), every=4),
            MetricsHook(log, more=lambda step, result: {"mfu": 0.5, "batch": step.batch}),
            FiniteGuard(most_skipped=2, run="RTE"),
        ]
        rate = partial(learning_rate, peak=1.0, warmup_steps=2)
        try:
            Loop(self.steps, hooks=hooks, first_step=self.first_step, max_steps=LAST, learning_rate=rate,
                 roll_back=roll_back).run()  # fmt: skip
        finally:
            log.close()
        return self.events

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]


def taken(first: int, last: int) -> list[tuple[str, int]]:
    return [("step", number) for number in range(first, last + 1)]


END = [("evaluate", LAST), ("save", LAST), ("wait", 0)]


def test_moments_and_their_order(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run() == [*taken(1, 4), ("evaluate", 4), ("save", 4), *taken(5, 6), *END]
    assert run.steps.made == list(range(LAST)) and run.steps.threads.isdisjoint({threading.get_ident()})
    assert run.steps.rates == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    records = run.records()
    assert [(r["step"], r["loss"], r["lr"], r["consumed_samples"], r["mfu"], r["batch"]) for r in records] == [
        (n, float(n), run.steps.rates[n - 1], 8 * n, 0.5, f"batch {n - 1}") for n in range(1, LAST + 1)
    ]
    assert all(r["tokens_per_second"] > 0 and r["data_seconds"] >= 0 and not r["skipped"] for r in records)
    assert not any("." in key for key in records[0])


def test_a_run_continues_behind_the_steps_it_has(tmp_path: Path) -> None:
    run = Run(tmp_path, first_step=4)
    assert run() == [*taken(5, 6), *END] and run.steps.made == [4, 5]
    done = Run(tmp_path, first_step=LAST)
    assert done() == [("wait", 0)] and done.steps.made == []


def test_hooks_have_turns_and_see_every_step_before_any_acts(tmp_path: Path) -> None:
    turns: list[tuple[str, str]] = []

    class Notes(Hook):
        def __init__(self, place: Place) -> None:
            self.place = place

        def after_step(self, step: FinishedStep) -> Request:
            turns.append(("sees", self.place.name))
            return Request.NOTHING

        def act(self, step: FinishedStep, requests: Request) -> None:
            turns.append(("acts", self.place.name))

    Run(tmp_path, first_step=LAST - 1)(*map(Notes, reversed(Place)))
    names = ["GUARD", "METRICS", "EVALUATION", "CHECKPOINT", "STOP"]
    assert turns == [*(("sees", name) for name in names), *(("acts", name) for name in names)]


def test_any_hook_may_ask_for_an_evaluation_a_checkpoint_and_the_end(tmp_path: Path) -> None:
    """The last one as well: what it asks for is done in the turns of those who do it."""
    asks = Asks(Place.STOP, after={1: Request.SAVE, 2: Request.EVALUATE, 3: EVERYTHING | Request.STOP})
    expected = [*taken(1, 1), ("save", 1), *taken(2, 2), ("evaluate", 2), *taken(3, 3), ("evaluate", 3), ("save", 3)]
    assert Run(tmp_path)(asks) == [*expected, ("wait", 0)]


def test_a_step_that_is_left_out_counts_and_moves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    asks = Asks(Place.GUARD, skips=(1, 3))
    run = Run(tmp_path)
    expected = [*taken(1, 1), *taken(3, 3), ("evaluate", 4), ("save", 4), *taken(5, 6), *END]
    assert run(asks) == expected and run.steps.made == list(range(LAST))
    assert [bool(step.results) for step in asks.seen] == [True, False, True, False, True, True]
    assert run.steps.rates == [0.5, 1.0, 0.5, 0.25], "the schedule goes on"
    assert run.records()[1] == {"step": 2, "left_out": True, "consumed_samples": 16}
    assert "step 2: left out" in capsys.readouterr().out


def test_steps_are_undone_and_left_out_when_they_come_again(tmp_path: Path) -> None:
    """As after a spike in step 4: back to the state after step 2, and on without the batch."""
    guard = Asks(Place.GUARD, after={4: Request.ROLL_BACK})
    run = Run(tmp_path)

    def back() -> int:
        guard._skips = (3,)
        run.events.append(("back", 2))
        return 2

    undone = [*taken(1, 4), ("back", 2)]  # and step 4 neither evaluated nor saved
    assert run(guard, roll_back=back) == [*undone, *taken(3, 3), ("evaluate", 4), ("save", 4), *taken(5, 6), *END]
    assert run.steps.made[-4:] == [2, 3, 4, 5], "made again"
    assert [step.number for step in guard.seen] == [1, 2, 3, 4, 3, 4, 5, 6]


def test_what_nobody_answers_may_not_be_asked(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ROLL_BACK"):
        Run(tmp_path)(Asks(Place.GUARD, after={2: Request.ROLL_BACK}))
    loop = Loop(Steps([]), hooks=[Asks(Place.GUARD, after={1: Request.SAVE})], first_step=0, max_steps=2,
                learning_rate=partial(learning_rate, peak=1.0, warmup_steps=0))  # fmt: skip
    with pytest.raises(AssertionError, match="SAVE"):
        loop.run()


def test_too_many_steps_in_a_row_without_a_finite_gradient(tmp_path: Path) -> None:
    """The last of them is recorded, and not evaluated or saved."""
    run = Run(tmp_path, not_finite=frozenset({1, 3, 4}))
    with pytest.raises(DivergedError, match="^RTE: 2 steps in a row had a non-finite gradient, the last one step 4;"):
        run()
    assert run.events == taken(1, 4) and [record["skipped"] for record in run.records()] == [True, False, True, True]
    assert Run(tmp_path, not_finite=frozenset({1, 3, 5}))()[-3:] == END


def test_a_step_that_is_left_out_says_nothing_about_gradients(tmp_path: Path) -> None:
    run = Run(tmp_path, not_finite=frozenset({2, 4}))
    with pytest.raises(DivergedError, match="the last one step 4;"):
        run(Asks(Place.GUARD, skips=(2,)))


def test_a_record_has_the_numbers_of_every_network(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = Run(tmp_path, networks=("", "generator"))
    run()
    records = run.records()
    assert [record["step"] for record in records] == list(range(1, LAST + 1))
    for record, rate in zip(records, run.steps.rates, strict=True):
        assert (record["loss"], record["lr"], record["grad_norm"]) == (record["step"], rate, 1.0)
        others = {key: value for key, value in record.items() if key.startswith("generator.")}
        assert others == {
            "generator.loss": record["step"] + 10, "generator.grad_norm": 1.0, "generator.lr": rate / 2}  # fmt: skip
    assert (
        capsys.readouterr()
        .out.splitlines()[0]
        .startswith(
            "step 1/6 | loss  1.0000 | lr 5.00e-01 | grad norm    1.000 | "
            "generator: loss 11.0000 | lr 2.50e-01 | grad norm    1.000 | "
        )
    )


def test_an_error_in_making_a_batch_comes_where_the_batch_would(tmp_path: Path) -> None:
    run = Run(tmp_path)
    make = run.steps.make_batch

    def broken(step: int) -> str:
        if step == 2:
            raise OSError("no such row")
        return make(step)

    run.steps.make_batch = broken
    with pytest.raises(OSError, match="no such row"):
        run()
    assert run.events == taken(1, 2)


def test_learning_rate_climbs_to_the_peak_and_falls_to_nothing() -> None:
    rates = [learning_rate(step, peak=2.0, warmup_steps=4, max_steps=12) for step in range(13)]
    assert rates == [0.5, 1.0, 1.5, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_learning_rate_without_warmup_starts_at_the_peak() -> None:
    assert [learning_rate(step, peak=1.0, warmup_steps=0, max_steps=4) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_learning_rate_of_nothing_but_warmup() -> None:
    assert [learning_rate(step, peak=1.0, warmup_steps=2, max_steps=2) for step in range(2)] == [0.5, 1.0]
