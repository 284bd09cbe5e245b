"""What a step asks of the devices of several ranks: bounds, and which messages pass."""

import numpy as np
import pytest

from tests.harness import run_ranks
from tests.integration.parallel_run import train_plain
from tests.pretend_device.compiled import Kernels
from tests.pretend_device.small_runs import STEP, Case, Run, check, run_cases

# By `small_runs.COLUMNS`, of the busier rank: see test_steps.py.
CASES = {
    "data 2": (Case(data=2), (0, 1, 1, 6, 48, 375, 0)),
    "tensor 2": (Case(tensor=2), (0, 1, 1, 6, 54, 416, 0)),
    "tensor 2, sequence": (Case(tensor=2, sequence=True), (0, 1, 1, 6, 61, 460, 0)),
    "pipeline 2": (Case(pipeline=2, num_layers=4, micro_batches=3), (0, 1, 1, 6, 49, 814, 0)),
}
EXACT = {
    name: Case(**layout, triton=False, dropout=0.0, precision="fp32", micro_batches=2)
    for name, layout in {
        "tensor 2, sequence": {"tensor": 2, "sequence": True},
        "pipeline 2": {"pipeline": 2},
    }.items()
}


@pytest.fixture(scope="module")
def runs(residual_kernels: dict[str, Kernels]) -> dict[str, list[Run]]:
    cases = {name: case for name, (case, _) in CASES.items()}
    cases |= {f"exact, {name}": case for name, case in EXACT.items()}
    ranks = run_ranks(2, run_cases, cases, residual_kernels)
    return {name: [rank[name] for rank in ranks] for name in cases}


@pytest.mark.parametrize("name", CASES)
def test_step_is_within_its_bounds(name: str, runs: dict[str, list[Run]]) -> None:
    check(name, runs[name], CASES[name][1])


@pytest.mark.parametrize("name", EXACT)
def test_numbers_are_those_of_plain_pytorch(name: str, runs: dict[str, list[Run]]) -> None:
    expected = train_plain(EXACT[name])["history"]
    for run in runs[f"exact, {name}"]:
        np.testing.assert_allclose(run.history, expected, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_no_message_of_a_step_passes_through_the_hosts(name: str, runs: dict[str, list[Run]]) -> None:
    for run in runs[name]:
        messages = run.record.collectives().where(within=STEP)
        assert messages
        on_host = messages.where(lambda event: event.is_on_host)
        assert not on_host, on_host.report()
