"""A step played through: known bubbles, torch's orders, shared cores."""

import pytest
from torch.distributed.pipelining import schedules

from deberta_dist.planning.pipeline_timeline import BACKWARD, FORWARD, ZERO_BUBBLE, orders, play

NAMES = {schedules.FORWARD: FORWARD, schedules.FULL_BACKWARD: BACKWARD}


def equal_stages(schedule: str, *, ranks: int, micro_batches: int, loops: int = 1, **options):
    passes = orders(schedule, ranks=ranks, stages_per_rank=loops, micro_batches=micro_batches)
    stages = ranks * loops
    return play(passes, forward=[1.0 / loops] * stages, backward=[2.0 / loops] * stages, transfer=0.0, **options)


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 3), (2, 2), (2, 7), (4, 4), (4, 8), (8, 3), (8, 32)])
def test_the_bubble_of_equal_stages_with_free_messages(ranks: int, micro_batches: int) -> None:
    expected = (ranks - 1) / (micro_batches + ranks - 1)
    for schedule in ("1f1b", "gpipe"):
        found = equal_stages(schedule, ranks=ranks, micro_batches=micro_batches)
        assert found.bubble == pytest.approx(expected)
        assert found.seconds == pytest.approx(3 * (micro_batches + ranks - 1))
        assert found.worked == pytest.approx((3.0 * micro_batches,) * ranks)


@pytest.mark.parametrize("loops", [2, 4])
def test_interleaving_divides_the_bubble(loops: int) -> None:
    found = equal_stages("interleaved_1f1b", ranks=4, micro_batches=8, loops=loops)
    assert found.bubble == pytest.approx(3 / (loops * 8 + 3))


def test_zero_bubble_waits_least_and_does_all_the_work() -> None:
    passes = orders(ZERO_BUBBLE, ranks=4, stages_per_rank=1, micro_batches=8)
    split = play(passes, forward=[1.0] * 4, backward=[1.0] * 4, weights=[1.0] * 4, transfer=0.0)
    assert split.worked == pytest.approx((24.0,) * 4)
    assert split.bubble < 0.6 * equal_stages("1f1b", ranks=4, micro_batches=8).bubble


def test_slow_messages_and_uneven_stages_make_it_longer() -> None:
    passes = orders("1f1b", ranks=2, stages_per_rank=1, micro_batches=4)
    options = {"forward": [1.0, 1.0], "backward": [2.0, 2.0]}
    assert play(passes, **options, transfer=0.0).seconds == 15
    # Played by hand: of eight messages four find their receiver waiting.
    assert play(passes, **options, transfer=0.5).seconds == pytest.approx(15 + 4 * 0.5)
    assert play(passes, forward=[1.0, 3.0], backward=[2.0, 4.0], transfer=0.0).seconds == 1 + 4 * 7 + 2


def test_cores_are_shared_by_those_who_work() -> None:
    alone = equal_stages("1f1b", ranks=2, micro_batches=4)
    assert equal_stages("1f1b", ranks=2, micro_batches=4, cores=2).seconds == pytest.approx(alone.seconds)
    assert equal_stages("1f1b", ranks=2, micro_batches=4, cores=1).seconds == pytest.approx(24), (
        "nobody waits for a core in vain"
    )
    replicas = equal_stages("1f1b", ranks=2, micro_batches=4, cores=2, processes=2)
    assert replicas.seconds == pytest.approx(24), "two of the four processes are enough to fill two cores"


@pytest.mark.parametrize(("ranks", "loops", "micro_batches"), [(2, 2, 4), (4, 2, 8), (4, 3, 10), (2, 4, 3)])
def test_orders_are_torchs(ranks: int, loops: int, micro_batches: int) -> None:
    if micro_batches % max(1, micro_batches // ranks):
        pytest.skip("torch refuses it")
    schedule = object.__new__(schedules.ScheduleInterleaved1F1B)
    schedule.pp_group_size, schedule.n_local_stages, schedule._n_microbatches = ranks, loops, micro_batches
    schedule.microbatches_per_round = micro_batches // max(1, micro_batches // ranks)
    found = orders("interleaved_1f1b", ranks=ranks, stages_per_rank=loops, micro_batches=micro_batches)
    for rank in range(ranks):
        actions = [action for action in schedule._calculate_single_rank_operations(rank) if action is not None]
        assert found[rank] == [(NAMES[a.computation_type], a.stage_index, a.microbatch_index) for a in actions]


@pytest.mark.parametrize("kind", [schedules.Schedule1F1B, schedules.ScheduleGPipe])
def test_orders_of_single_stages_are_torchs(kind: type) -> None:
    schedule = object.__new__(kind)
    schedule._num_stages, schedule._n_microbatches = 4, 6
    name = "1f1b" if kind is schedules.Schedule1F1B else "gpipe"
    actions = schedule._get_pipeline_order()
    for rank, passes in enumerate(orders(name, ranks=4, stages_per_rank=1, micro_batches=6)):
        # torch 2.13 prints the last rank's micro-batches from 1 on; it runs them from 0.
        expected = [NAMES[a.computation_type] for a in actions[rank] if a is not None and a.computation_type in NAMES]
        assert [kind for kind, _, _ in passes] == expected
        for each in (FORWARD, BACKWARD):
            assert [number for kind, _, number in passes if kind == each] == list(range(6))
