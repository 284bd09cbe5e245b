"""A pre-training that version 0.1.0 began, and a kill ended behind step 3 of 6, is continued and ends as it would have.

The run: a pipeline of two stages, dropout, two blended sources of which one begins its second epoch in step 6, warm-up,
clipping in every step, float32 on a CPU with one thread per rank. Losses, gradient norms, learning rates, epochs and
held-out losses of steps 4 to 6 and the final weights are compared with the same run of 0.1.0 that nobody interrupted.

Equal in every bit where torch is the same version and `probe.py` of the fixtures gives the same hash: then products and sums
are the same ones. Elsewhere another BLAS, another vector width or another torch rounds differently in the last bit, and
the recorded numbers are compared to 1e-6 (weights to 1e-5: Adam divides small numbers by small numbers). Whether
continuing is exact on *this* machine is tested in any case, by what today's code saves on the way.

What would make the numbers differ: another order of samples or masks, another dropout of a (seed, step, micro-batch,
layer), moments or step count that are not loaded, another learning rate for a step, other initial positions in the blend.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.compatibility.commands import (
    computes_as_recorded,
    launch,
    metrics,
    numbers,
    recorded,
    same_as_recorded,
    same_numbers,
    same_tensors,
    weights,
)

SAVED, STEPS = 3, 6


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def since_resumed(run: Path) -> list[dict[str, Any]]:
    """The lines from the last resumption on; the killed run had written step 4 before."""
    lines = metrics(run)
    return lines[max(number for number, line in enumerate(lines) if "resumed_from_step" in line) :]


def test_continues_as_if_nobody_had_interrupted_it(moved: Path) -> None:
    run, whole = moved / "pretraining", moved / "uninterrupted"
    assert checkpoint(run, SAVED).is_dir() and not checkpoint(run, STEPS).exists()
    launch(moved / "pretrain.sh", "--checkpoint.every_steps", 1, "--checkpoint.keep_last", 9, processes=2)

    exact = computes_as_recorded()
    found, expected = numbers(since_resumed(run), after=SAVED), numbers(metrics(whole), after=SAVED)
    assert [line["step"] for line in expected] == [4, 5, 6, 6]
    same_numbers(found, expected, relative=0 if exact else 1e-6)
    # The epoch of one source ends on the way.
    assert expected[1]["epochs"]["speech"] < 1 < expected[2]["epochs"]["speech"]
    same_tensors(weights(run / "weights"), weights(whole / "weights"), relative=0 if exact else 1e-5)
    # The steps behind it are still those of then.
    same_numbers(numbers(metrics(run), after=0)[:3], numbers(metrics(whole), after=0)[:3], relative=0)
    assert since_resumed(run)[0]["resumed_from_step"] == SAVED

    # On this machine, from a state of then: with and without another interruption, in any case the same bits.
    again = moved / "again"
    shutil.copytree(checkpoint(run, 5), checkpoint(again, 5))
    launch(moved / "pretrain.sh", "--run.directory", again, processes=2)
    assert numbers(since_resumed(again), after=5) == numbers(since_resumed(run), after=5) != []
    same_tensors(weights(again / "weights"), weights(run / "weights"), relative=0)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param((2, 1, 1), id="2x1x1"),
        pytest.param((2, 2, 2), id="2x2x2", marks=pytest.mark.slow),
        pytest.param((1, 1, 1), id="1x1x1", marks=pytest.mark.slow),
    ],
)
def test_any_layout_reads_the_checkpoint(moved: Path, layout: tuple[int, int, int]) -> None:
    """A run of no more steps: the weights that every rank has read are written as they are, bit by bit, and evaluated.

    Sums of tensor ranks have another order, so the held-out loss is compared to 1e-6.
    """
    launch(moved / "pretrain.sh", *sizes(layout), "--training.max_steps", SAVED, processes=int(np.prod(layout)))
    expected = recorded(moved, "tensors")["halfway/model.safetensors"]
    same_as_recorded(weights(moved / "pretraining" / "weights"), expected, relative=0)
    (then,) = [line for line in metrics(moved / "uninterrupted") if "valid_loss" in line and line["step"] == SAVED]
    found = json.loads((moved / "pretraining" / "result.json").read_text(encoding="utf-8"))
    assert (found["steps"], found["num_targets"]) == (SAVED, then["valid_targets"])
    assert found["loss"] == pytest.approx(then["valid_loss"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 1, 2), (1, 2, 2)], ids=lambda layout: "x".join(map(str, layout)))
def test_continues_at_another_layout(moved: Path, layout: tuple[int, int, int]) -> None:
    """Layouts that draw the same dropout take the same steps, to rounding; tensor ranks draw another in the attention."""
    launch(moved / "pretrain.sh", *sizes(layout), processes=int(np.prod(layout)))
    found = numbers(since_resumed(moved / "pretraining"), after=SAVED)
    expected = numbers(metrics(moved / "uninterrupted"), after=SAVED)
    same_numbers(found, expected, relative=1e-5)
    same_tensors(weights(moved / "pretraining/weights"), weights(moved / "uninterrupted/weights"), relative=1e-4)


def sizes(layout: tuple[int, int, int]) -> list[object]:
    names = ("tensor", "pipeline", "data")
    return [word for name, size in zip(names, layout, strict=True) for word in (f"--parallel.{name}_parallel_size", size)]
