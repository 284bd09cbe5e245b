"""When each pipeline rank works on which micro-batch: a step simulated pass by pass.

``orders`` lists the passes of each pipeline rank in the order of torch's schedules (tests compare); ``play`` simulates time: a
pass starts when its rank is free and its inputs have arrived. There is no formula for the bubble: it follows. Called by
``step_cost.py``.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from deberta_dist.values import INTERLEAVED

FORWARD, BACKWARD, WEIGHTS = "forward", "backward", "weights"
ZERO_BUBBLE = "zero_bubble"
"""A schedule of comparison, which the configuration does not offer."""

Pass = tuple[str, int, int]
"""(kind, stage, micro-batch)"""


@dataclass(frozen=True)
class Timeline:
    """A step's passes on the clock.

    Attributes:
        seconds: From the first pass's start to the last one's end.
        worked: Seconds that each pipeline rank was at work.
    """

    seconds: float
    worked: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """Share of the time in which a pipeline rank waits, the mean over the ranks."""
        return 1 - sum(self.worked) / (len(self.worked) * self.seconds) if self.seconds else 0.0


def orders(schedule: str, *, ranks: int, stages_per_rank: int, micro_batches: int) -> list[list[Pass]]:
    """What every pipeline rank does, in order.

    Args:
        schedule: ``parallel.schedule``, or ``ZERO_BUBBLE``, whose passes that only make gradients of weights are in no
            order: ``play`` puts them where a rank would wait.
        ranks: Pipeline ranks.
        stages_per_rank: Stages that each of them runs: rank, rank + ranks, ...
        micro_batches: Of a step.
    """
    if schedule == INTERLEAVED and ranks > 1:
        return [_interleaved(rank, ranks=ranks, loops=stages_per_rank, micro_batches=micro_batches) for rank in range(ranks)]
    found = []
    for rank in range(ranks):
        # torch runs 1F1B with fewer micro-batches than stages as GPipe.
        all_first = schedule == "gpipe" or micro_batches < ranks
        ahead = micro_batches if all_first else min(micro_batches, ranks - rank)
        passes: list[Pass] = [(FORWARD, rank, number) for number in range(ahead)]
        for number in range(micro_batches):
            passes.append((BACKWARD, rank, number))
            if ahead + number < micro_batches:
                passes.append((FORWARD, rank, ahead + number))
        found.append(passes)
    return found


def _interleaved(rank: int, *, ranks: int, loops: int, micro_batches: int) -> list[Pass]:
    """Source: ``torch.distributed.pipelining.schedules.ScheduleInterleaved1F1B``, torch 2.13."""
    per_round = micro_batches // max(1, micro_batches // ranks)
    forwards = micro_batches * loops
    warm_up = min((loops - 1) * per_round + 2 * (ranks - 1 - rank), forwards)
    done = {FORWARD: [0] * loops, BACKWARD: [0] * loops}
    passes: list[Pass] = []

    def add(kind: str, loop: int) -> None:
        passes.append((kind, loop * ranks + rank, done[kind][loop]))
        done[kind][loop] += 1

    for step in range(forwards + warm_up):
        if step < forwards:
            add(FORWARD, (step // per_round) % loops)
        if step >= warm_up:
            add(BACKWARD, loops - 1 - ((step - warm_up) // per_round) % loops)
    return passes


def play(
    passes_by_rank: Sequence[Sequence[Pass]],
    *,
    forward: Sequence[float],
    backward: Sequence[float],
    transfer: float,
    weights: Sequence[float] | None = None,
    processes: int = 1,
    cores: int = 0,
) -> Timeline:
    """Lets the passes of a step run.

    A pass of a stage needs the one of the stage before (backward: behind) and a message of it, unless both are on one
    rank; the last stage's backward pass needs its forward pass. Messages travel while ranks work.

    With ``cores`` all processes that are at work share them evenly: of k, each gets min(1, cores / k) of a core. Their
    common progress is a clock of its own, on which every pass takes the seconds given.

    Args:
        passes_by_rank: From ``orders``.
        forward, backward: Seconds of a pass, by stage, on a core of its own.
        transfer: Seconds of a message between neighbouring ranks.
        weights: Seconds of the gradients of weights by stage, where a schedule puts them off; then ``backward`` is without
            them. A rank has at most as many put off, and begun without, as the first rank of 1F1B begins.
        processes: That run each pass together.
        cores: 0 where every process has its own.
    """
    ranks, num_stages = len(passes_by_rank), len(forward)
    seconds = {FORWARD: forward, BACKWARD: backward}
    here: set[Pass] = {(FORWARD, 0, number) for kind, stage, number in passes_by_rank[0] if (kind, stage) == (FORWARD, 0)}
    at, busy, worked = [0] * ranks, [False] * ranks, [0.0] * ranks
    put_off: list[deque[tuple[int, int]]] = [deque() for _ in range(ranks)]
    kept = [0] * ranks
    now, progress, at_work = 0.0, 0.0, 0
    working: list[tuple[float, int, Pass, float]] = []
    travelling: list[tuple[float, Pass]] = []

    def start(rank: int) -> None:
        nonlocal at_work
        if busy[rank]:
            return
        passes, chosen = passes_by_rank[rank], None
        if at[rank] < len(passes) and passes[at[rank]] in here:
            following = passes[at[rank]]
            if weights is None or following[0] == BACKWARD or kept[rank] < ranks:
                chosen = following
                at[rank] += 1
                here.discard(chosen)
                kept[rank] += chosen[0] == FORWARD
        if chosen is None and put_off[rank]:
            chosen = (WEIGHTS, *put_off[rank].popleft())
        if chosen is None:
            return
        kind, stage, _ = chosen
        length = weights[stage] if kind == WEIGHTS else seconds[kind][stage]
        busy[rank] = True
        at_work += 1
        heapq.heappush(working, (progress + length, rank, chosen, now))

    def arrive(needed: Pass, *, rank: int) -> None:
        if needed[1] % ranks == rank or transfer == 0:
            here.add(needed)
            if needed[1] % ranks != rank:
                start(needed[1] % ranks)
        else:
            heapq.heappush(travelling, (now + transfer, needed))

    for rank in range(ranks):
        start(rank)
    while working or travelling:
        rate = min(1.0, cores / (at_work * processes)) if cores and at_work else 1.0
        ends = now + (working[0][0] - progress) / rate if working else float("inf")
        if travelling and travelling[0][0] < ends:
            arrival, needed = heapq.heappop(travelling)
            progress += (arrival - now) * rate
            now = arrival
            here.add(needed)
            start(needed[1] % ranks)
            continue
        now, (progress, rank, (kind, stage, number), began) = ends, heapq.heappop(working)
        busy[rank] = False
        at_work -= 1
        worked[rank] += now - began
        if kind == FORWARD:
            following = (FORWARD, stage + 1, number) if stage + 1 < num_stages else (BACKWARD, stage, number)
            arrive(following, rank=rank)
        elif kind == BACKWARD:
            if stage > 0:
                arrive((BACKWARD, stage - 1, number), rank=rank)
            if weights is not None:
                put_off[rank].append((stage, number))
        if kind == WEIGHTS:
            kept[rank] -= 1
        start(rank)
    assert all(done == len(passes) for done, passes in zip(at, passes_by_rank, strict=True)), "a pass waits for ever"
    return Timeline(seconds=now, worked=tuple(worked))
