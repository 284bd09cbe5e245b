"""What a step of one process asks of its device: bounds, which a faster product has to lower."""

import dataclasses

import numpy as np
import pytest

from tests.harness import run_ranks
from tests.integration.parallel_run import train_plain
from tests.pretend_device.compiled import Kernels
from tests.pretend_device.small_runs import STEP, Case, Run, check, run_cases

PORTABLE = 16  # the size of head that it takes to have it

# Upper bounds by `small_runs.COLUMNS`: host waits per micro-batch, step, evaluation and checkpoint; launches per layer, forward
# and backward, and per step of one micro-batch; unpinned copies per step. pytest -rP prints what is measured.
CASES = {
    "fused": (Case(), (0, 1, 1, 6, 48, 375, 0)),
    "fused, recompute selective": (Case(recompute="selective"), (0, 1, 1, 6, 48, 375, 0)),
    "fused, recompute full": (Case(recompute="full"), (0, 1, 1, 6, 61, 429, 0)),
    "fused, documents": (Case(documents=True), (0, 1, 1, 6, 48, 422, 0)),
    "fused, vocabulary in chunks": (Case(vocabulary_chunks=4), (0, 1, 1, 6, 48, 517, 0)),
    "fused, compiled": (Case(compile=True), (0, 1, 1, 6, 54, 399, 0)),
    "fused, DeepSpeed": (Case(deepspeed=True, steps=3), (0, 3, 2, 6, 48, 393, 0)),
    "portable": (Case(head_size=PORTABLE), (0, 1, 1, 6, 160, 796, 0)),
    "portable, recompute selective": (Case(head_size=PORTABLE, recompute="selective"), (0, 1, 1, 6, 205, 978, 0)),
    "portable, recompute full": (Case(head_size=PORTABLE, recompute="full"), (0, 1, 1, 6, 239, 1114, 0)),
}
EXACT = Case(triton=False, dropout=0.0, precision="fp32", micro_batches=2, documents=True)
DROPPING = Case(triton=False, precision="fp32", micro_batches=2)


@pytest.fixture(scope="module")
def runs(residual_kernels: dict[str, Kernels]) -> dict[str, Run]:
    cases = {name: case for name, (case, _) in CASES.items()}
    others = {"exact": EXACT, "dropping": DROPPING, "dropping, compiled": dataclasses.replace(DROPPING, compile=True)}
    return run_ranks(1, run_cases, {**cases, **others}, residual_kernels)[0]


@pytest.mark.parametrize("name", CASES)
def test_step_is_within_its_bounds(name: str, runs: dict[str, Run]) -> None:
    case, bounds = CASES[name]
    check(name, [runs[name]], bounds)
    kernels = runs[name].record.launches().where(within=STEP, name="triton forward_kernel")
    assert bool(kernels) == (case.head_size != PORTABLE), "another attention than the case is for"


@pytest.mark.parametrize("name", CASES)
def test_every_launch_of_a_backward_pass_has_a_line_and_a_micro_batch(name: str, runs: dict[str, Run]) -> None:
    for direction in ("backward", "recompute"):
        launches = runs[name].record.launches().where(within=STEP, direction=direction)
        # The loss is scaled behind the model, and the weight store's own backward pass is for all micro-batches at once.
        inside = launches.where(lambda event: not event.site.startswith(("parallel/pipeline/runner.py:", "parallel/zero/")))
        strange = inside.where(lambda event: not event.site or "micro-batch 0" not in event.phases)
        assert not strange, strange.report()
        assert direction == "recompute" or len(inside) > 150


def test_numbers_are_those_of_plain_pytorch(runs: dict[str, Run]) -> None:
    history = runs["exact"].history
    np.testing.assert_allclose(history, train_plain(EXACT)["history"], rtol=1e-5)
    assert history[-1][0] < history[0][0]


def test_change_between_training_and_evaluation(runs: dict[str, Run]) -> None:
    first, second = (runs["fused"].record.host_waits().where(within=f"evaluation {number}") for number in range(2))
    # From torch 2.13 on the ranks of a pipeline agree on shapes at every change, a pipeline of one as well.
    assert len(first) <= len(second) + 2, first.report()


def test_numbers_do_not_depend_on_who_compiles(runs: dict[str, Run]) -> None:
    """What is dropped either: by the kernel's formula, compiled or in torch's operators."""
    np.testing.assert_allclose(runs["dropping, compiled"].history, runs["dropping"].history, rtol=1e-5)
    assert abs(runs["dropping"].history[0][0] - runs["exact"].history[0][0]) > 1e-4, "dropout was not on"


def test_deepspeed_takes_the_steps_of_its_stand_in(runs: dict[str, Run]) -> None:
    np.testing.assert_allclose(runs["fused, DeepSpeed"].history[:2], runs["fused"].history, rtol=2e-3)


@pytest.mark.parametrize("attention", ["fused", "portable"])
def test_full_recomputation_repeats_the_forward_pass_of_a_layer(attention: str, runs: dict[str, Run]) -> None:
    launches = runs[f"{attention}, recompute full"].measures()["launches per layer"]
    forward, again = (launches.where(direction=direction) for direction in ("forward", "recompute"))
    assert forward.counts() == again.counts()
    assert len(forward) > 10


def test_compiled_functions_are_launched(runs: dict[str, Run], residual_kernels: dict[str, Kernels]) -> None:
    launches = runs["fused, compiled"].measures()["launches per layer"].where(name="compiled _hashed_residual_norm")
    per_pass = [len(launches.where(direction=direction)) for direction in ("forward", "backward")]
    kernels = residual_kernels["_hashed_residual_norm"]
    assert per_pass == [2 * number for number in kernels], "a layer has two"
    assert kernels.forward == 1, "joined to one kernel"
