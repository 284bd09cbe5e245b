"""Every layout fine-tunes the same model, with and without SiFT, as one process of plain PyTorch."""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.finetuning.small import CLIPPING, Case, relative_error, train, train_plain
from tests.harness import run_ranks

LAYOUTS = [
    *(Case("WSC", tensor=t, data=d, sift=s) for t, d in ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2)) for s in (False, True)),
    Case("COPA", data=2, sift=True),
    Case("ReCoRD", tensor=2, sift=True),
    Case("MultiRC", data=2),
    Case("CB", tensor=4, sift=True),
    Case("RTE", data=2, sift=True, overrides=("--training.recompute", "selective")),
    Case("WSC", tensor=2, sift=True, overrides=("--sift.num_steps", "2", "--sift.loss", "mse", "--sift.noise", "0.1")),
]


def label(case: Case) -> str:
    """The fields of a case that differ from its defaults."""
    default = Case(case.task)
    return ",".join(f"{k}={v}" for k, v in vars(case).items() if v != getattr(default, k) or k == "task")


@cache
def oracle(case: Case, directory: Path) -> dict[str, Any]:
    return train_plain(case, directory)


def expected_of(case: Case, directory: Path) -> dict[str, Any]:
    """The plain process, once for all layouts of a task: its layout does not matter to it."""
    return oracle(dataclasses.replace(case, tensor=1, data=1, predicts=False), directory)


@pytest.mark.parametrize("case", LAYOUTS, ids=label)
def test_layout_equals_one_process(case: Case, start_directory: Path) -> None:
    expected = expected_of(case, start_directory)
    found = run_ranks(case.world_size, train, case, start_directory)
    for rank in found:
        np.testing.assert_allclose(rank["history"], expected["history"], rtol=1e-5, err_msg="loss, SiFT loss, norm")
    # Choices of an untrained model hardly differ, and so have small gradients.
    assert case.task in ("COPA", "ReCoRD") or all(norm > CLIPPING for *_, norm in expected["history"]), "no clipping"
    assert all((adversarial > 0) == case.sift for _, adversarial, _ in expected["history"])
    assert found[0]["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        if name == "classifier.bias" and case.task in ("COPA", "ReCoRD"):
            continue  # one number added to all choices: its gradient is nothing but rounding
        assert relative_error(found[0]["weights"][name], weight) < 1e-4, name


@pytest.mark.parametrize("sift", [pytest.param(False, marks=pytest.mark.slow), True])
def test_dropout_does_not_depend_on_the_number_of_ranks(sift: bool, start_directory: Path) -> None:
    cases = [Case("WSC", data=data, sift=sift, dropout=0.1) for data in (1, 2, 4)]
    histories = [run_ranks(case.world_size, train, case, start_directory)[0]["history"] for case in cases]
    for history in histories[1:]:
        np.testing.assert_allclose(history, histories[0], rtol=1e-5)
    without = expected_of(Case("WSC", sift=sift), start_directory)["history"]
    assert abs(histories[0][0][0] - without[0][0]) > 1e-4, "dropout was not on"


@pytest.mark.parametrize(
    "task", ["ReCoRD", pytest.param("MultiRC", marks=pytest.mark.slow), pytest.param("BoolQ", marks=pytest.mark.slow)]
)
def test_predictions_are_the_same_however_many_ranks(task: str, start_directory: Path) -> None:
    runs = [run_ranks(data, train, Case(task, data=data, steps=1, predicts=True), start_directory) for data in (1, 3)]
    for ranks in runs:
        assert all(rank["before"] == ranks[0]["before"] for rank in ranks), "ranks disagree"
    alone, shared = runs[0][0], runs[1][0]
    assert alone["before"] == shared["before"], "same weights, same batches: the same bits"
    assert list(alone["before"]) == sorted(alone["before"])
    assert alone["before"] != alone["after"]


def test_sift_gathers_weights_no_more_often_than_a_plain_step(start_directory: Path) -> None:
    plain, sift = (run_ranks(2, train, Case("WSC", data=2, sift=on), start_directory)[0]["traffic"] for on in (False, True))
    assert plain == sift and sum(plain.values()) >= 2 * 3, "gather, reduce, totals of two steps"
