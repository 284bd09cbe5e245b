"""Sequence parallelism changes no number: losses, norms, gradients, weights and dropout masks are those without it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests.harness import run_ranks
from tests.integration.parallel_run import LENGTH, Case, relative_error, train
from tests.integration.test_parity import label, oracle, require_one_process
from tests.integration.test_resume import DROPOUT, history, interrupted, run, weights

BUCKETS = (8, 12, LENGTH)
SEQUENCE = {"parallel__sequence_parallel": "true"}


def slow(case: Case) -> object:
    return pytest.param(case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "case",
    [
        Case(tensor=2, sequence=True),
        Case(tensor=2, pipeline=2, sequence=True, model="v1", recompute="selective"),
        Case(tensor=2, sequence=True, as_on_a_gpu=True),
        slow(Case(tensor=4, sequence=True)),
        slow(Case(tensor=4, sequence=True, documents=True, recompute="full")),
        slow(Case(tensor=2, pipeline=2, sequence=True)),
        slow(Case(tensor=2, pipeline=2, sequence=True, recompute="full")),
        slow(Case(tensor=2, pipeline=2, sequence=True, documents=True)),
        slow(Case(tensor=2, pipeline=2, sequence=True, buckets=BUCKETS)),
        slow(Case(tensor=2, pipeline=2, sequence=True, schedule="interleaved_1f1b", stages_per_rank=2)),
        slow(Case(tensor=2, pipeline=2, data=2, sequence=True)),
        slow(Case(tensor=2, pipeline=2, data=2, sequence=True, model="v1", recompute="full")),
    ],
    ids=label,
)
def test_equals_one_process(case: Case) -> None:
    require_one_process(case)


def require_equal(cases: list[Case]) -> None:
    found = [run_ranks(case.world_size, train, case)[0] for case in cases]
    first = found[0]
    for other in found[1:]:
        np.testing.assert_allclose(other["history"], first["history"], rtol=1e-5)
        for name, weight in first["weights"].items():
            assert relative_error(other["weights"][name], weight) < 1e-4, name
    plain = oracle(cases[0].global_batch_size, "v2")["history"]
    assert abs(first["history"][0][0] - plain[0][0]) > 1e-4, "dropout was not on"


def test_dropout_is_that_of_the_same_layout_without() -> None:
    """Attention dropout included: on as many tensor ranks each drops the same probabilities of its heads."""
    without = Case(tensor=2, dropout=0.1)
    require_equal([without, dataclasses.replace(without, sequence=True)])


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_dropout_of_tokens_does_not_depend_on_who_holds_them(recompute: str) -> None:
    """Not so attention dropout, which differs between numbers of tensor ranks, with and without sequence parallelism."""
    alone = Case(dropout=0.1, attention_dropout=0.0)
    split = {"sequence": True, "recompute": recompute}
    others = [{"tensor": 4, **split}, {"tensor": 2, "pipeline": 2, **split}]
    require_equal([alone, *(dataclasses.replace(alone, **sizes) for sizes in others)])


@pytest.mark.slow
def test_bf16_follows_float32() -> None:
    case = Case(tensor=2, pipeline=2, sequence=True, precision="bf16")
    expected, found = oracle(case.global_batch_size, case.model), run_ranks(case.world_size, train, case)
    (losses, norms), (expected_losses, expected_norms) = (np.array(one["history"]).T for one in (found[0], expected))
    np.testing.assert_allclose(losses, expected_losses, rtol=2**-8)
    assert abs(norms[0] / expected_norms[0] - 1) < 2**-5


@pytest.mark.slow
def test_a_run_goes_on_with_it_and_without_it(corpus: Path, tmp_path: Path) -> None:
    """Its checkpoints are those of any layout; on its own layout it is bit-equal to a run without interruption."""
    whole = tmp_path / "whole"
    run(corpus, whole, (2, 2, 1), **SEQUENCE, **dict(DROPOUT))
    same = interrupted(whole, tmp_path / "same")
    run(corpus, same, (2, 2, 1), **SEQUENCE, **dict(DROPOUT))
    assert history(same) == history(whole)
    assert all(np.array_equal(weights(same)[name], weight) for name, weight in weights(whole).items())
    without = interrupted(whole, tmp_path / "without")
    run(corpus, without, (2, 1, 2), **dict(DROPOUT))
    np.testing.assert_allclose(history(without), history(whole), rtol=1e-5)
    again = interrupted(without, tmp_path / "again")
    run(corpus, again, (2, 1, 1), **SEQUENCE, **dict(DROPOUT))
    np.testing.assert_allclose(history(again), history(whole), rtol=1e-5)
