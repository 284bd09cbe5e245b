"""The communication benchmark: counts equal the formula, the peer's grow with the micro-batches, faults are told."""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

from benchmarks import scale
from benchmarks.scale_rank import TrafficCase, model_config
from deberta_dist.errors import ConfigError
from deberta_dist.models.masked_lm import DebertaForMaskedLM
from deberta_dist.operations.measure import BenchmarkError


@pytest.fixture(scope="module")
def found(forked_ranks: Callable[[], AbstractContextManager[None]]) -> dict[str, Any]:
    arguments = argparse.Namespace(processes=2, layouts="2x1x1,2x1x1+sp,1x1x2", micro_batches="1,2", layers=2, timeout=200)
    with forked_ranks():
        return scale.run(arguments)


def test_counted_is_the_formula(found: dict[str, Any]) -> None:
    for row in found["rows"]:
        case = TrafficCase(row["tensor"], row["pipeline"], row["data"], row["micro_batches"], row["sequence_parallel"], 2)
        for counted, expected in zip(row["ranks"], scale.formula(case), strict=True):
            assert {kind: counted.get(kind, 0) for kind in scale.KINDS} == expected
    num_parameters = sum(parameter.numel() for parameter in DebertaForMaskedLM(model_config(layers=2)).parameters())
    one, two = (row["bytes"] for row in found["rows"] if row["data"] == 2)
    assert one == two, "nothing of a step with data parallelism alone depends on the micro-batches"
    # Per rank each weight once, and at most one element of padding per flat parameter.
    assert 0 <= one["zero_gather"] / 2 - 4 * num_parameters <= 2 * 4
    assert one["zero_reduce"] == one["zero_gather"]
    for is_sequence in (False, True):
        rows = [row["bytes"] for row in found["rows"] if row["tensor"] == 2 and row["sequence_parallel"] is is_sequence]
        assert rows[1]["tensor"] == 2 * rows[0]["tensor"] > 0
        assert rows[1]["tie_broadcast"] == rows[0]["tie_broadcast"] > 0


def test_the_peer_grows_with_the_micro_batches(found: dict[str, Any]) -> None:
    ours = next(row["bytes"] for row in found["rows"] if row["data"] == 2)
    rows = {(row["name"], row["micro_batches"]): row["bytes"] for row in found["deepspeed"]}
    all_held, as_large = (f"DeepSpeed, {title}" for title in scale.PEERS)
    for micro_batches in (1, 2):
        held = rows[all_held, micro_batches]
        assert held["zero_gather"] == pytest.approx(micro_batches * ours["zero_gather"], rel=1e-4)
        assert held["zero_reduce"] == held["zero_gather"]
        released = rows[as_large, micro_batches]
        assert held["zero_gather"] < released["zero_gather"] < 2 * held["zero_gather"]
        assert released["zero_reduce"] == held["zero_reduce"]


@pytest.mark.parametrize(
    ("counted", "expected", "message"),
    [
        ({"tensor": 8}, {"tensor": 12}, "rank 1, tensor: counted 8 bytes, planning/communication.py says 12"),
        ({}, {"scalars": 16}, "rank 1, scalars: counted 0 bytes"),
        ({"alltoall_": 4}, {}, "rank 1, alltoall_: counted 4 bytes, planning/communication.py says 0"),
    ],
)
def test_a_difference_is_an_error(counted: dict[str, int], expected: dict[str, int], message: str) -> None:
    case = TrafficCase(1, 1, 2, 4)
    with pytest.raises(BenchmarkError, match=f"1x1x2 with 4 micro-batches, {message}"):
        scale.check(case, counted=[{"tensor": 3}, counted], expected=[{"tensor": 3}, expected])
    scale.check(case, counted=[{"tensor": 3, "deepspeed_norms": 8}], expected=[{"tensor": 3, "scalars": 0}])


def test_a_peer_with_another_loss_is_an_error() -> None:
    case = TrafficCase(1, 1, 2, 4)
    ours, peer = [[{"first_loss": 6.0}, {"first_loss": 6.0}]], [[{"first_loss": 5.0}, {"first_loss": 7.0}]]
    scale.check_losses([case], ours, [case, TrafficCase(1, 1, 2, 8)], [*peer, *ours])
    peer[0][0] = {"first_loss": 5.01}
    with pytest.raises(BenchmarkError, match="do not run the same model"):
        scale.check_losses([case], ours, [case], peer)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo no room; exit 3", "rank [01] ended with 3: no room"),
        ("echo still here; exec sleep 60", "rank 0 had not ended after --timeout"),
    ],
)
def test_a_rank_that_fails_or_hangs_ends_it_all(script: str, message: str, ranks_run: Callable[[str], None]) -> None:
    ranks_run(script)
    with pytest.raises(BenchmarkError, match=message):
        scale.count_all([], [], processes=2, timeout=1)


def test_layouts_and_micro_batches() -> None:
    assert len(scale.parse_layouts(None, processes=8)) == 10
    assert scale.parse_layouts("2x2x2+sp,1x1x8", processes=8) == [(2, 2, 2, True), (1, 1, 8, False)]
    with pytest.raises(ConfigError, match="'1x1x2.sp' is no layout"):
        scale.parse_layouts("1x1x2+sp", processes=2)
    assert scale.parse_micro_batches("16,1,1") == [1, 16]
    with pytest.raises(ConfigError, match="'3x1x1' is no layout of --processes 2; there are 2x1x1, 1x2x1, 1x1x2"):
        scale.parse_layouts("1x1x2,3x1x1", processes=2)
    for text in ("0", "1,", "-1", "two"):
        with pytest.raises(ConfigError, match="expected positive integers"):
            scale.parse_micro_batches(text)
