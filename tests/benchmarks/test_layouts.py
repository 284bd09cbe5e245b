"""The layouts benchmark: what it solves for, what it compares, and one small round of it."""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import layouts
from deberta_dist.errors import ConfigError
from deberta_dist.operations.calibration import STAGES, _fit, calibration, machine_of, with_step_seconds
from deberta_dist.operations.calibration_rank import MESSAGES, LayoutCase, plan_of
from deberta_dist.operations.calibration_world import World
from deberta_dist.operations.measure import BenchmarkError
from deberta_dist.planning.machine import Link
from deberta_dist.planning.pass_work import stage_work
from deberta_dist.planning.step_cost import step_cost


def a_round(scale: float = 1.0) -> dict[str, Any]:
    """Primitives of a machine of 50 GFLOP/s, 10 GB/s, 10 us per call, messages of 1 GB/s and 0.1 ms."""
    stages = []
    for tensor, start, stop, size in STAGES:
        work = sum_of(plan_of(LayoutCase(tensor, 1, 1, size)), range(start, stop))
        stages.append(scale * (work.products / 5e10 + work.bytes / 1e10 + work.calls * 1e-5))
    link = dict.fromkeys(MESSAGES, (1, 1.0)) | {"all_reduce": (2, 1.0), "all_gather": (1, 0.5), "reduce_scatter": (1, 0.5)}
    messages = {kind: [link[kind][0] * 1e-4 + link[kind][1] * size / 1e9 for size in sizes] for kind, sizes in MESSAGES.items()}
    return {"products": {1: scale / 5e10, 2: scale / 5e10}, "stages": {1: stages, 2: stages}, "messages": {2: messages}}


def sum_of(plan, layers: range):
    forward, backward = stage_work(plan.main, layers, has_fused_attention=False)
    return forward + backward


def test_the_primitives_of_a_known_machine_give_that_machine() -> None:
    # One round of three is disturbed: medians.
    table = calibration([a_round(), a_round(3.0), a_round()], cores=2)
    machine = machine_of(table, 2)
    assert machine.product_rate == pytest.approx(5e10) and machine.memory_bandwidth == pytest.approx(1e10)
    assert machine.seconds_per_call == pytest.approx(1e-5)
    assert set(machine.kinds) == set(MESSAGES)
    for link in machine.kinds.values():
        assert dataclasses.astuple(link) == pytest.approx(dataclasses.astuple(Link(1e-4, 1e9)), rel=1e-3)
    plan = plan_of(LayoutCase(1, 1, 1))
    bare = step_cost(plan, machine_of(table, 1))
    table["processes"] = with_step_seconds(table, bare.seconds - bare.once + 0.05)
    assert step_cost(plan, machine_of(table, 1)).once == pytest.approx(0.05)
    assert step_cost(plan_of(LayoutCase(1, 1, 4)), machine_of(table, 4)).once == pytest.approx(0.1), (
        "four processes on two cores"
    )


def test_no_cost_is_negative() -> None:
    works = [sum_of(plan_of(LayoutCase(1, 1, 1, size)), range(1, 2)) for size in (2, 8)]
    for per_byte, per_call in ((1e-10, 0.0), (0.0, 1e-5), (3e-10, 1e-5)):
        machine_seconds = [work.bytes * per_byte + work.calls * per_call for work in works]
        found = _fit(works, machine_seconds, per_product=0.0)
        assert found == pytest.approx((max(per_byte, 1e-14), max(per_call, 1e-9)), rel=1e-3, abs=1e-9)
    assert min(_fit(works, [1.0, 0.5], per_product=0.0)) > 0


def test_order_and_distance_are_told() -> None:
    rows = [
        {
            "layout": name,
            "processes": 2,
            "measured": one,
            "range": [one, one],
            "predicted": other,
            "busy": 1.0,
            "error": other / one - 1,
        }
        for name, one, other in (("1x1x2", 1.0, 1.1), ("1x2x1", 1.2, 1.0), ("2x1x1", 2.0, 1.4))
    ]
    text = layouts.describe(rows, cores=2, load=(0.1, 2.0), rounds=3, steps=4)
    assert "order as predicted: wrong; 2 of 3 pairs are in order" in text and "not in order: 1x1x2 before 1x2x1" in text
    assert "within 25%: 1 of 2 predictions; not 2x1x1" in text and "load average 0.1 before, 2.0 after" in text


def test_layouts_are_checked_before_anything_starts() -> None:
    assert [case.name for case in layouts.parse_layouts("2x1x1,1x1x1,2x1x1")] == ["1x1x1", "2x1x1"]
    for text, message in (
        ("2x1", "'2x1' is no layout"),
        ("1x1x0", "is no layout"),
        ("3x1x1", "does not divide 4 attention heads|does not divide model.num_attention_heads = 4"),
        ("1x9x1", "cannot share"),
        ("1x1x3", "data 3 does not divide 8 micro-batches"),
    ):
        with pytest.raises(ConfigError, match=message):
            layouts.parse_layouts(text)


def test_a_round_of_two_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    layouts.add_arguments(parser)
    flags = ["--layouts", "1x1x1,1x1x2", "--steps", "1", "--timeout", "200", "--calibration", str(tmp_path / "it.json")]
    found = layouts.run(argparse.Namespace(**vars(parser.parse_args(flags)), rounds=1))
    assert {row["layout"] for row in found["rows"]} == {"1x1x1", "1x1x2"}
    assert all(row["measured"] > 0 and row["predicted"] > 0 and 0 < row["busy"] < 1.5 for row in found["rows"])
    table = json.loads((tmp_path / "it.json").read_text())
    assert set(table["processes"]) == {"1", "2"} and machine_of(table, 8).product_rate > 1e8
    assert "1 calibrates" not in capsys.readouterr().err
    with pytest.raises(ConfigError, match="must be positive"):
        layouts.run(argparse.Namespace(**vars(parser.parse_args(flags)), rounds=0))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo no room >&2; exit 3", "rank 0 (has ended|ended in 'stage').*no room"),
        ("exec sleep 60", "had not answered 'stage'"),
    ],
)
def test_a_rank_that_fails_or_hangs_ends_it_all(
    script: str, message: str, tmp_path: Path, ranks_run: Callable[[str], None]
) -> None:
    ranks_run(script)
    world = World(1, folder=tmp_path, deadline=time.monotonic() + (0.0 if "sleep" in script else 60.0))
    try:
        with pytest.raises(BenchmarkError, match=message):
            world.ask("stage")
    finally:
        world.end()
