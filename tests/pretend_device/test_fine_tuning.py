"""What a step of fine-tuning with SiFT asks of its device: bounds."""

from pathlib import Path

import numpy as np
import pytest

from tests.finetuning.small import Case, train_plain, write_start
from tests.harness import run_ranks
from tests.pretend_device.small_runs import STEP, Run, check, fine_tune

# Width of four heads of 32, for the fused attention, and of 8, for the portable one.
FUSED, PORTABLE = 128, 32

# By `small_runs.COLUMNS`: see test_steps.py. An evaluation is the predictions for a split, a checkpoint its weights.
CASES = {
    "SiFT, fused": (FUSED, (4, 4, 10, 2, 204, 29)),
    "SiFT, portable": (PORTABLE, (4, 4, 10, 2, 408, 29)),
}
CASE = Case("WSC", steps=2, sift=True)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    directories = {width: tmp_path_factory.mktemp(f"start-{width}") for width in (FUSED, PORTABLE)}
    for width, directory in directories.items():
        write_start(directory, dropout=0.0, hidden_size=width)
    return directories


@pytest.fixture(scope="module")
def runs(directories: dict[int, Path]) -> dict[str, Run]:
    return run_ranks(1, fine_tune, {name: (CASE, directories[width]) for name, (width, _) in CASES.items()})[0]


@pytest.mark.parametrize("name", CASES)
def test_step_is_within_its_bounds(name: str, runs: dict[str, Run]) -> None:
    width, bounds = CASES[name]
    check(name, [runs[name]], bounds)
    kernels = runs[name].record.launches().where(within=STEP, name="triton forward_kernel")
    assert bool(kernels) == (width == FUSED), "another attention than the case is for"


def test_numbers_are_those_of_plain_pytorch(directories: dict[int, Path], runs: dict[str, Run]) -> None:
    expected = train_plain(CASE, directories[PORTABLE])["history"]
    np.testing.assert_allclose(runs["SiFT, portable"].history, expected, rtol=1e-5)
