"""What a step of fine-tuning with SiFT asks of its device: bounds."""

from pathlib import Path

import numpy as np
import pytest

from tests.finetuning.small import Case, train_plain, write_start
from tests.harness import run_ranks
from tests.pretend_device.small_runs import STEP, Run, check, fine_tune

# A step of two micro-batches. With dropout the model has heads of 32, for the fused attention, without it of 8.
SIZES = ("--training.global_batch_size", "6")
FUSED = Case("WSC", steps=2, sift=True, dropout=0.1, overrides=SIZES)
PORTABLE = Case("WSC", steps=2, sift=True, overrides=SIZES)
# By `small_runs.COLUMNS`: see test_steps.py. An evaluation is the predictions for a split, a checkpoint its weights.
CASES = {
    "SiFT, fused": (FUSED, (0, 1, 2, 2, 141, 1388, 0)),
    "SiFT, portable": (PORTABLE, (0, 1, 2, 2, 323, 2444, 0)),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("start")
    for case, width in ((FUSED, 128), (PORTABLE, 32)):
        write_start(directory, dropout=case.dropout, hidden_size=width)
    return directory


@pytest.fixture(scope="module")
def runs(directory: Path) -> dict[str, Run]:
    cases = {name: (case, case is FUSED) for name, (case, _) in CASES.items()}
    return run_ranks(1, fine_tune, cases, directory)[0]


@pytest.mark.parametrize("name", CASES)
def test_step_is_within_its_bounds(name: str, runs: dict[str, Run]) -> None:
    case, bounds = CASES[name]
    check(name, [runs[name]], bounds)
    kernels = runs[name].record.launches().where(within=STEP, name="triton forward_kernel")
    assert bool(kernels) == (case is FUSED), "another attention than the case is for"


def test_numbers_are_those_of_plain_pytorch(directory: Path, runs: dict[str, Run]) -> None:
    expected = train_plain(PORTABLE, directory)["history"]
    np.testing.assert_allclose(runs["SiFT, portable"].history, expected, rtol=1e-5)
