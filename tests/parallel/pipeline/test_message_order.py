"""Messages of the pipeline come in an order in which no ranks wait for each other for ever.

gloo delivers messages in any order. NCCL runs a rank's batches of messages over one communicator one after the other, and a
batch ends when each of its messages has met its counterpart in a batch that runs on the other rank. Real ranks are run with
gloo, their batches recorded, and these run again by that rule.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.pipelining import schedules

from tests.harness import run_ranks
from tests.integration.parallel_run import LEARNING_RATE, Case, make_trainer, own_batch

Message = tuple[str, int]
"""What, with whom: ("isend", rank) or ("irecv", rank)."""
Batches = list[list[Message]]


def blocked(ranks: Sequence[Batches]) -> dict[int, list[Message]]:
    """What each rank waits for at the end, by the rule; empty where all batches have been run."""
    waiting = [[list(batch) for batch in batches] for batches in ranks]
    progress = True
    while progress:
        progress = False
        for rank, batches in enumerate(waiting):
            while batches and not batches[0]:
                del batches[0]
                progress = True
            for message in list(batches[0]) if batches else ():
                kind, peer = message
                counterpart = ("irecv" if kind == "isend" else "isend", rank)
                if waiting[peer] and counterpart in waiting[peer][0]:
                    waiting[peer][0].remove(counterpart)
                    batches[0].remove(message)
                    progress = True
    return {rank: batches[0] for rank, batches in enumerate(waiting) if batches}


def recorded(case: Case) -> dict[str, Batches]:
    """The batches of a step and of an evaluation on this rank; the first ones also make what is kept."""
    batches: Batches = []
    send = schedules._batch_p2p

    def recording(operations: list[dist.P2POp], *args: Any, **kwargs: Any) -> Any:
        messages = [("isend" if one.op is dist.isend else "irecv", one.peer) for one in operations]
        # Messages that all go one way are started one by one; torch 2.11 puts them in a batch, which waits for less.
        alike = len({kind for kind, _ in messages}) == 1
        batches.extend([[message] for message in messages] if alike else [messages])
        return send(operations, *args, **kwargs)

    schedules._batch_p2p = recording
    trainer = make_trainer(case)
    found = {}
    for number in range(2):
        for name, run in {
            "step": lambda step=number: trainer.step(own_batch(case, step), step=step, learning_rate=LEARNING_RATE),
            "evaluation": lambda step=number: trainer.evaluate([own_batch(case, step)]),
        }.items():
            batches.clear()
            run()
            found[f"{name} {number}"] = list(batches)
    return found


@pytest.mark.parametrize(
    "case",
    [
        Case(pipeline=2, micro_batches=3),
        Case(pipeline=4, micro_batches=4),
        Case(pipeline=2, micro_batches=4, schedule="interleaved_1f1b", stages_per_rank=2),
        pytest.param(Case(pipeline=4, micro_batches=9), marks=pytest.mark.slow),
        pytest.param(Case(pipeline=4, micro_batches=1), marks=pytest.mark.slow),
        pytest.param(Case(pipeline=4, micro_batches=3, schedule="gpipe"), marks=pytest.mark.slow),
        pytest.param(
            Case(pipeline=4, num_layers=9, micro_batches=8, schedule="interleaved_1f1b", stages_per_rank=2),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda case: f"{case.schedule}-pp{case.pipeline}-{case.micro_batches}",
)
def test_no_ranks_wait_for_each_other_for_ever(case: Case) -> None:
    ranks = run_ranks(case.world_size, recorded, case)
    for name in ranks[0]:
        batches = [rank[name] for rank in ranks]
        sent = sum(kind == "isend" for rank in batches for batch in rank for kind, _ in batch)
        assert sent == sum(kind == "irecv" for rank in batches for batch in rank for kind, _ in batch)
        assert sent > 0, name
        assert not blocked(batches), name
    # All of it, one after the other.
    assert not blocked([[batch for batches in rank.values() for batch in batches] for rank in ranks])


def test_what_would_wait_for_ever_is_found() -> None:
    send, receive = (lambda peer: ("isend", peer)), (lambda peer: ("irecv", peer))
    assert not blocked([[[send(1), receive(1)]], [[receive(0), send(0)]]])
    # Both send first.
    assert set(blocked([[[send(1)], [receive(1)]], [[send(0)], [receive(0)]]])) == {0, 1}
    # Three in a ring, each with a batch that its neighbour meets in the next.
    assert blocked([[[send(1)], [receive(2)]], [[send(2)], [receive(0)]], [[send(0)], [receive(1)]]])
    assert not blocked([[[send(1)], [receive(2)]], [[receive(0)], [send(2)]], [[receive(1)], [send(0)]]])
