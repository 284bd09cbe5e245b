"""A finished task that is started again with more epochs."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from deberta_dist.errors import ConfigError
from deberta_dist.finetuning import finetune, steps
from deberta_dist.finetuning.batches import TrainingOrder
from tests.finetuning.small import DATA, Case
from tests.harness import free_port, run_ranks

STEPS = 4  # of an epoch: RTE's 32 rows, 8 in a step


def words(directory: Path, out: Path, *more: str) -> list[str]:
    """A command line for RTE with dropout."""
    fixed = ["--init", str(directory / "dropout-0.1"), "--recipe", str(directory / "recipes.toml"), "--data", str(DATA)]
    return [*fixed, "--task", "RTE", "--out", str(out), "--training.global_batch_size", "8", *more]


def fine_tune(directory: Path, arguments: list[str], port: int, first_of: int | None) -> None:
    """One rank; with ``first_of`` the first steps have the learning rates of a run of so many."""
    os.environ["MASTER_PORT"] = str(port)
    if first_of is not None:
        of_length = steps.learning_rate
        steps.learning_rate = lambda step, **schedule: of_length(
            step, **{**schedule, **({"max_steps": first_of} if step < first_of else {})}
        )
    finetune._run(directory / "finetune.sh", arguments)


def start(directory: Path, out: Path, *more: str, first_of: int | None = None, processes: int = 1) -> Path:
    """Runs it and returns the task's folder."""
    run_ranks(processes, fine_tune, directory, words(directory, out, *more), free_port(), first_of)
    return out / "seed-7" / "RTE"


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(folder: Path) -> list[tuple]:
    """Of every step and evaluation, in order."""
    keys = ("step", "loss", "grad_norm", "lr", "consumed_samples", "valid_accuracy", "is_best")
    return [tuple(line.get(key) for key in keys) for line in lines(folder) if "resumed_from_step" not in line]


def test_more_epochs_continue_the_same_training(
    start_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit-equal to one process that is never interrupted and sets these learning rates."""
    folder = start(start_directory, tmp_path / "run", "--training.epochs", "1")
    first = {name: (folder / name).read_text() for name in ("run.json", "metrics.jsonl", "val.jsonl")}
    weights = load_file(folder / "weights" / "model.safetensors")
    start_words = words(start_directory, tmp_path / "run", "--training.epochs", "2")
    finetune._run(start_directory / "finetune.sh", [*start_words, "--dry-run"])
    assert f"RTE, seed 7: continues {folder} (1 epochs, {STEPS} steps)" in capsys.readouterr().out
    start(start_directory, tmp_path / "run", "--training.epochs", "2")
    once = start(start_directory, tmp_path / "once", "--training.epochs", "2", first_of=STEPS)
    assert numbers(folder) == numbers(once) and len([line for line in lines(once) if "loss" in line]) == 2 * STEPS
    for name in ("weights/model.safetensors", f"state/step-{2 * STEPS:08d}/rank-00000.safetensors"):
        found, expected = load_file(folder / name), load_file(once / name)
        assert found and all(np.array_equal(found[key], expected[key]) for key in expected)
    for name in ("val.jsonl", "test.jsonl"):
        assert (folder / name).read_text() == (once / name).read_text()

    (record,) = [line for line in lines(folder) if "resumed_from_step" in line]
    rates = [line["lr"] for line in lines(folder) if "loss" in line]
    assert record["changed"] == ["training.epochs: 1 -> 2"]
    assert (record["lr_before"], record["lr_after"]) == (rates[STEPS - 1], rates[STEPS])
    described = json.loads((folder / "run.json").read_text())
    assert described["steps"] == 2 * STEPS and described["made_from"]["settings"]["training"]["epochs"] == 2
    (earlier,) = described["earlier"]
    assert earlier["epochs"] == 1 and earlier["score"] == json.loads(first["run.json"])["score"]
    aside = tmp_path / "run" / "seed-7" / "RTE.epochs-1"
    assert {name: (aside / name).read_text() for name in first} == first and not (aside / "state").exists()
    kept = load_file(aside / "weights" / "model.safetensors")
    assert all(np.array_equal(kept[key], weights[key]) for key in weights)
    assert {path.parent.name for path in aside.glob("AX-*/test.jsonl")} == {"AX-b", "AX-g"}

    # Finished for these epochs, and for fewer; without a state it cannot go on.
    begin = start_directory / "finetune.sh"
    finetune._run(begin, start_words)
    assert "everything is finished already" in capsys.readouterr().out
    shutil.rmtree(folder / "state")
    for epochs, message in (
        ("1", r"settings\.training\.epochs was 2\.0, is 1\.0\): more epochs than it had would continue it"),
        ("3", r"keeps no state/ to continue from \(run\.keep_weights and run\.keep_state\)"),
    ):
        for more in ((), ("--dry-run",)):
            with pytest.raises(ConfigError, match=message):
                finetune._run(begin, words(start_directory, tmp_path / "run", "--training.epochs", epochs, *more))
    with pytest.raises(ConfigError, match="settings.optimizer.learning_rate was"):
        finetune._run(
            begin, words(start_directory, tmp_path / "run", "--training.epochs", "3", "--optimizer.learning_rate", "1")
        )
    shutil.move(folder, folder.with_name("RTE.epochs-2"))
    (folder.with_name("RTE.epochs-2") / "state").mkdir()
    with pytest.raises(ConfigError, match="RTE.epochs-2 is there without .*: a start ended while"):
        finetune._run(begin, start_words)


@pytest.mark.slow
def test_more_epochs_continue_on_another_layout(start_directory: Path, tmp_path: Path) -> None:
    for out, processes in (("same", 1), ("other", 2)):
        start(start_directory, tmp_path / out, "--training.epochs", "1")
        start(start_directory, tmp_path / out, "--training.epochs", "2", processes=processes)
    same, other = (
        np.array([n[1:3] for n in numbers(tmp_path / out / "seed-7" / "RTE") if n[1] is not None]) for out in ("same", "other")
    )
    np.testing.assert_allclose(other, same, rtol=1e-4)


@pytest.mark.parametrize(("epochs", "batch"), [(1.0, 12), (0.7, 12), (2.5, 5), (1.0, 32)])
def test_no_row_is_lost_or_repeated_where_the_shorter_run_ended_within_a_step(
    start_directory: Path, epochs: float, batch: int
) -> None:
    plan, _ = Case("RTE").plan(start_directory)
    options = {"global_batch_size": batch, "micro_batch_size": 3, "max_choices": 3, "seed": 7}

    def keys(order: TrainingOrder, first: int) -> list:
        return [e.key for step in range(first, order.num_steps) for some in order.micro_batches(step) for e, _ in some]

    short = TrainingOrder(plan.features["train"], epochs=epochs, **options)
    longer = TrainingOrder(plan.features["train"], epochs=3, done=(short.num_steps, short.num_decisions), **options)
    whole = TrainingOrder(plan.features["train"], epochs=3, **options)
    assert keys(short, 0) + keys(longer, short.num_steps) == keys(whole, 0)
    assert longer.num_decisions == whole.num_decisions and longer.num_steps >= whole.num_steps
