"""A run directory that holds a finished run, and lengths that differ from it; without ranks."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deberta_dist.config import Checkpoint, RunConfig, Schedule
from deberta_dist.errors import ConfigError
from deberta_dist.planning.plan import check_plan
from deberta_dist.training.length import (
    continue_finished,
    keep_earlier_weights,
    learning_rates,
    refuse_finished,
    write_numbers,
)
from deberta_dist.training.resume import check_checkpoint
from tests.training.conftest import MakeRun


def config_with_result(make_run: MakeRun, directory: Path, text: str, **changes: Any) -> RunConfig:
    """A run in a directory that holds a result."""
    (directory / "result.json").write_text(text)
    return make_run(run={"directory": directory}, **changes)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (4, r"holds a finished run \(it has result\.json\); nothing is overwritten.*--training\.max_steps over 4"),
        (3, r"training\.max_steps = 3 is less than the 4 steps of the finished run in run\.directory"),
        (5, None),
    ],
)
def test_a_finished_run_is_started_again_for_more_steps_alone(
    make_run: MakeRun, tmp_path: Path, steps: int, message: str | None
) -> None:
    text = json.dumps({"loss": 1.0, "steps": 4})
    plan = check_plan(config_with_result(make_run, tmp_path, text, training={"max_steps": steps}), world_size=1)
    if message is not None:
        with pytest.raises(ConfigError, match=message):
            refuse_finished(plan)
        return
    assert refuse_finished(plan) == 4
    with pytest.raises(ConfigError, match="no checkpoint to continue it from"):
        check_checkpoint(None, plan=plan, tokenizer_sha256=None, data=None)
    never = make_run(run={"directory": tmp_path}, training={"max_steps": steps}, checkpoint=Checkpoint(resume="never"))
    with pytest.raises(ConfigError, match="holds a finished run"):
        refuse_finished(check_plan(never, world_size=1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "is not the result"),
        ("{}", "holds a finished run"),
        ('{"steps": -3}', "holds a finished run"),
    ],
)
def test_a_result_that_does_not_tell_its_length_is_not_continued(
    make_run: MakeRun, tmp_path: Path, text: str, message: str
) -> None:
    config = config_with_result(make_run, tmp_path, text, training={"max_steps": 10**6})
    with pytest.raises(ConfigError, match=message):
        refuse_finished(check_plan(config, world_size=1))


def test_results_and_weights_of_all_lengths_are_kept(tmp_path: Path) -> None:
    for steps in (4, 6, 9):
        if steps > 4:
            continue_finished(tmp_path, steps=4 if steps == 6 else 6)
        # Twice: a start may end between its weights and its result.
        for _ in range(2):
            kept = keep_earlier_weights(tmp_path)
            (tmp_path / "weights").mkdir(exist_ok=True)
            (tmp_path / "weights" / "of").write_text(str(steps))
        assert (kept is None) == (steps == 4)
        write_numbers(tmp_path, {"loss": 10 - steps}, steps=steps)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == {"loss": 1, "steps": 9, "earlier": [{"loss": 6, "steps": 4}, {"loss": 4, "steps": 6}]}
    found = {path.parent.name: path.read_text() for path in tmp_path.glob("*/of")}
    assert found == {"weights": "9", "weights-step-00000004": "4", "weights-step-00000006": "6"}


def test_a_result_written_before_results_told_their_length_learns_it(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"loss": 2.5}')
    continue_finished(tmp_path, steps=7)
    assert json.loads((tmp_path / "result.json").read_text()) == {"loss": 2.5, "steps": 7}


@pytest.mark.parametrize(
    ("peak", "warmup_steps", "max_steps", "after"),
    [
        (1.0, 0, 10, None),
        (1.0, 0, 6, None),
        (1.0, 0, 20, 14 / 20),
        (1.0, 0, 9, 3 / 9),
        (2.0, 0, 20, 2 * 14 / 20),
        (1.0, 10, 20, 7 / 10),
    ],
)
def test_learning_rates_before_and_after(
    make_run: MakeRun, peak: float, warmup_steps: int, max_steps: int, after: float | None
) -> None:
    """After 6 of 10 steps without warm-up to a peak of 1: the last had half of it."""
    there = make_run(optimizer={"learning_rate": 1.0}, training={"max_steps": 10}).model_dump(mode="json")
    del there["schedule"]["warmup_steps"]  # a key that is younger than the checkpoint had its default
    here = make_run(
        optimizer={"learning_rate": peak}, training={"max_steps": max_steps}, schedule=Schedule(warmup_steps=warmup_steps)
    )
    found = learning_rates(check_plan(here, world_size=1), SimpleNamespace(step=6, run_config=there))
    assert found == (None if after is None else pytest.approx((0.5, after)))
