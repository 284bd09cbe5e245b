"""The length of a run, and continuing a finished run to a larger one.

A run is finished if its directory has a ``result.json``, which says after how many steps. Started again with more steps, it
continues from its last checkpoint with the learning rates of the new length. The earlier result stays in ``result.json``
until the new one is written, and is then listed in it; the earlier weights are renamed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deberta_dist.checkpoint.errors import CheckpointError
from deberta_dist.checkpoint.find import CHECKPOINTS_NAME, checkpoints, step_name
from deberta_dist.checkpoint.manifest import Manifest, read_manifest
from deberta_dist.config import default_values
from deberta_dist.errors import ConfigError
from deberta_dist.files.atomic import replace_file
from deberta_dist.planning.plan import Plan
from deberta_dist.training.loop import learning_rate

RESULT_NAME = "result.json"
WEIGHTS_NAME = "weights"
_STEPS, _EARLIER = "steps", "earlier"
_SCHEDULE = ("optimizer.learning_rate", "schedule.warmup_steps", "training.max_steps")


def refuse_finished(plan: Plan) -> int | None:
    """Refuses to start a finished run again with the same number of steps or fewer. Any rank may call it.

    Returns:
        Steps of the finished run that is to be continued; None if there is no finished run.

    Raises:
        ConfigError: the run is finished with this number of steps or more, or must not or cannot be continued.
    """
    run, steps = Path(plan.config.run.directory), plan.config.training.max_steps
    if not (run / RESULT_NAME).exists():
        return None
    done = _finished_steps(run)
    if done is not None and steps < done:
        raise ConfigError(
            f"training.max_steps = {steps} is less than the {done} steps of the finished run in run.directory = {run}: give "
            "more than these to continue it, or another --run.directory"
        )
    if plan.config.checkpoint.resume == "never" or done is None or steps == done:
        more = (
            ""
            if done is None or plan.config.checkpoint.resume == "never"
            else f", continue it with a --training.max_steps over {done}"
        )
        raise ConfigError(
            f"run.directory = {run} holds a finished run (it has {RESULT_NAME}); nothing is overwritten: move it "
            f"away{more} or give another --run.directory"
        )
    return done


def _finished_steps(run: Path) -> int | None:
    """Steps of the finished run; None if neither the result nor a checkpoint says."""
    steps = _read_result(run).get(_STEPS)
    if type(steps) is int and steps >= 1:
        return steps
    # Early results do not say it; such a run has not been continued, so its last checkpoint has the same configuration.
    for path in checkpoints(run / CHECKPOINTS_NAME):
        try:
            return int(read_manifest(path).run_config["training"]["max_steps"])
        except (CheckpointError, KeyError, TypeError, ValueError):
            continue
    return None


def _write_result(run: Path, result: Mapping[str, Any]) -> None:
    replace_file(run / RESULT_NAME, (json.dumps(result, indent=2) + "\n").encode())


def _read_result(run: Path) -> dict[str, Any]:
    path = run / RESULT_NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): move the run away or give another --run.directory") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is not the result of a run: move the run away or give another --run.directory")
    return found


def continue_finished(run: Path, *, steps: int) -> None:
    """Adds the number of steps to an early result, before checkpoints of another length are written. For rank 0."""
    result = _read_result(run)
    if result.get(_STEPS) != steps:
        _write_result(run, {**result, _STEPS: steps})


def keep_earlier_weights(run: Path) -> Path | None:
    """Renames the weights of an earlier result, before new ones are written. For rank 0.

    Returns:
        Their new path; None if there is no earlier result.
    """
    if not (run / RESULT_NAME).exists():
        return None
    renamed = run / f"{WEIGHTS_NAME}-{step_name(_read_result(run)[_STEPS])}"
    # A start that ended between writing weights and result has renamed them already.
    if not renamed.exists() and (run / WEIGHTS_NAME).exists():
        (run / WEIGHTS_NAME).rename(renamed)
    return renamed


def write_numbers(run: Path, numbers: Mapping[str, Any], *, steps: int) -> None:
    """Writes ``result.json``, which lists earlier results, oldest first."""
    result = {**numbers, _STEPS: steps}
    if (run / RESULT_NAME).exists():
        earlier = _read_result(run)
        result[_EARLIER] = [*earlier.pop(_EARLIER, []), earlier]
    _write_result(run, result)


def learning_rates(plan: Plan, manifest: Manifest) -> tuple[float, float] | None:
    """Learning rates of the checkpoint's last step and of the next, if the schedule has changed in between; otherwise None."""
    there = {f"{name}.{key}": value for name, table in manifest.run_config.items() for key, value in table.items()}
    old = {**default_values(), **there}
    new = {f"{name}.{key}": value for name, table in plan.config.model_dump().items() for key, value in table.items()}
    step = manifest.step
    if step == 0 or step >= plan.config.training.max_steps or all(old[key] == new[key] for key in _SCHEDULE):
        return None
    before, after = (
        learning_rate(number, peak=values[_SCHEDULE[0]], warmup_steps=values[_SCHEDULE[1]], max_steps=values[_SCHEDULE[2]])
        for number, values in ((step - 1, old), (step, new))
    )
    return before, after
