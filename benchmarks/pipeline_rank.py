"""One rank of the pipeline benchmark: torch's schedules over stages that sleep.

Started by ``pipeline.py`` as ``python -m benchmarks.pipeline_rank FOLDER`` with a launcher's variables. FOLDER
holds ``plan.json`` and is where the ranks meet and leave ``rank-N.json``: start and end of every step of every case.
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

SHAPE = (1, 8)


class _Sleeps(torch.autograd.Function):
    """The identity; its passes take their time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        time.sleep(ctx.seconds)
        return gradient, None, None


class SleepingStage(nn.Module):
    """A stage whose forward pass takes ``seconds``, and each of the two parts of its backward pass as long."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(SHAPE))
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        return _Sleeps.apply(x, self.seconds, self.seconds) * _Sleeps.apply(self.weight, 0.0, self.seconds)


def stage_indices(schedule: str, *, rank: int, ranks: int, stages_per_rank: int) -> list[int]:
    """The stages of a rank: in a V for the schedule that wants it, else rank, rank + ranks, ..."""
    if schedule == "ZBVZeroBubble":
        return [rank, 2 * ranks - 1 - rank]
    return [rank + loop * ranks for loop in range(stages_per_rank)]


def measure(case: dict[str, Any], *, forward_seconds: float, rounds: int) -> list[tuple[float, float]]:
    """Start and end of every step on this rank, seconds of the clock that all processes of a machine share."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    per_rank, count = case["stages_per_rank"], case["micro_batches"]
    example = torch.ones(SHAPE, requires_grad=True)
    stages = [
        PipelineStage(
            SleepingStage(forward_seconds / per_rank),
            index,
            per_rank * ranks,
            torch.device("cpu"),
            input_args=(example,),
            output_args=(example,),
        )
        for index in stage_indices(case["schedule"], rank=rank, ranks=ranks, stages_per_rank=per_rank)
    ]
    schedule_class = get_schedule_class(case["schedule"])
    is_multi = issubclass(schedule_class, PipelineScheduleMulti)
    schedule = schedule_class(
        stages if is_multi else stages[0], count, loss_fn=lambda output, target: output.sum() * 0.0, scale_grads=False
    )
    has_first = any(stage.is_first for stage in stages)
    has_last = any(stage.is_last for stage in stages)
    batch = torch.ones(count, SHAPE[1], requires_grad=True)  # or the first stage would have less to do
    steps = []
    for _ in range(rounds + 1):
        dist.barrier()
        begun = time.monotonic()
        schedule.step(*((batch,) if has_first else ()), target=batch if has_last else None)
        steps.append((begun, time.monotonic()))
    return steps[1:]


def main(folder: Path) -> None:
    """Runs all cases."""
    torch.set_num_threads(1)
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    rank = int(os.environ["RANK"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=plan["timeout_seconds"]),
    )
    found = [measure(case, forward_seconds=plan["forward_seconds"], rounds=plan["rounds"]) for case in plan["cases"]]
    (folder / f"rank-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
