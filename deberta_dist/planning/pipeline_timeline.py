"""When each pipeline rank works on which micro-batch: a step simulated pass by pass.

``orders`` lists the passes of each pipeline rank in the order of torch's schedules (tests compare); ``play`` simulates time: a
pass starts when its rank is free and its inputs have arrived. There is no formula for the bubble: it follows. Called by
``step_cost.py``.
"""

import heapq
from collections import deque
from collections.abc import Mapping, Sequence
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

    def __add__(self, other: "Timeline") -> "Timeline":
        """The one, then the other, on the same ranks."""
        worked = tuple(one + more for one, more in zip(self.worked, other.worked, strict=True))
        return Timeline(seconds=self.seconds + other.seconds, worked=worked)


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
    seconds = {FORWARD: forward, BACKWARD: backward} | ({} if weights is None else {WEIGHTS: weights})
    return _Play(passes_by_rank, seconds=seconds, transfer=transfer, processes=processes, cores=cores).run()


class _Play:
    """The state of a step that is played: what each rank does, what has arrived, what travels."""

    def __init__(
        self,
        passes_by_rank: Sequence[Sequence[Pass]],
        *,
        seconds: Mapping[str, Sequence[float]],
        transfer: float,
        processes: int,
        cores: int,
    ) -> None:
        self._passes, self._seconds, self._transfer = passes_by_rank, seconds, transfer
        self._processes, self._cores = processes, cores
        self._ranks, self._num_stages = len(passes_by_rank), len(seconds[FORWARD])
        self._puts_off = WEIGHTS in seconds
        self._here: set[Pass] = {one for one in passes_by_rank[0] if one[:2] == (FORWARD, 0)}
        self._at, self._busy, self._worked = [0] * self._ranks, [False] * self._ranks, [0.0] * self._ranks
        # Of a schedule that puts gradients of weights off: which, and how many micro-batches are begun and not done.
        self._put_off: list[deque[tuple[int, int]]] = [deque() for _ in range(self._ranks)]
        self._kept = [0] * self._ranks
        # The clock, and the common progress of all who work.
        self._now = self._progress = 0.0
        # (progress at its end, rank, pass, when it began), (arrival, pass): heaps.
        self._working: list[tuple[float, int, Pass, float]] = []
        self._travelling: list[tuple[float, Pass]] = []

    def run(self) -> Timeline:
        """Plays to the end."""
        for rank in range(self._ranks):
            self._start(rank)
        while self._working or self._travelling:
            at_work = len(self._working)
            rate = min(1.0, self._cores / (at_work * self._processes)) if self._cores and at_work else 1.0
            ends = self._now + (self._working[0][0] - self._progress) / rate if at_work else float("inf")
            if self._travelling and self._travelling[0][0] < ends:
                arrival, needed = heapq.heappop(self._travelling)
                self._progress += (arrival - self._now) * rate
                self._now = arrival
                self._here.add(needed)
                self._start(needed[1] % self._ranks)
            else:
                self._now = ends
                self._end()
        is_done = [done == len(passes) for done, passes in zip(self._at, self._passes, strict=True)]
        assert all(is_done), "a pass waits for ever"
        return Timeline(seconds=self._now, worked=tuple(self._worked))

    def _start(self, rank: int) -> None:
        """Starts the next pass of a rank, if it is free and has one that can run."""
        if self._busy[rank]:
            return
        chosen = self._next(rank)
        if chosen is None:
            return
        self._busy[rank] = True
        length = self._seconds[chosen[0]][chosen[1]]
        heapq.heappush(self._working, (self._progress + length, rank, chosen, self._now))

    def _next(self, rank: int) -> Pass | None:
        passes, number = self._passes[rank], self._at[rank]
        if number < len(passes) and passes[number] in self._here:
            following = passes[number]
            if not self._puts_off or following[0] == BACKWARD or self._kept[rank] < self._ranks:
                self._at[rank] += 1
                self._here.discard(following)
                self._kept[rank] += following[0] == FORWARD
                return following
        return (WEIGHTS, *self._put_off[rank].popleft()) if self._put_off[rank] else None

    def _end(self) -> None:
        """Ends the pass that is done first, and starts what waited for it."""
        self._progress, rank, (kind, stage, number), began = heapq.heappop(self._working)
        self._busy[rank] = False
        self._worked[rank] += self._now - began
        if kind == FORWARD:
            following = (FORWARD, stage + 1, number) if stage + 1 < self._num_stages else (BACKWARD, stage, number)
            self._send(following, rank=rank)
        elif kind == BACKWARD:
            if stage > 0:
                self._send((BACKWARD, stage - 1, number), rank=rank)
            if self._puts_off:
                self._put_off[rank].append((stage, number))
        else:
            self._kept[rank] -= 1
        self._start(rank)

    def _send(self, needed: Pass, *, rank: int) -> None:
        """Lets a pass have what it needed of ``rank``, at once or by a message."""
        to = needed[1] % self._ranks
        if to != rank and self._transfer > 0:
            heapq.heappush(self._travelling, (self._now + self._transfer, needed))
            return
        self._here.add(needed)
        if to != rank:
            self._start(to)
