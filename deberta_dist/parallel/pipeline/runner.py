"""Runs the micro-batches of one optimizer step through the stages of this rank.

The schedules are torch.distributed.pipelining's; we write none. Every stage reads the same micro-batch
(mask, targets, dropout key) from the data itself, so only hidden states and their gradients travel. One
stage and one micro-batch take the same path as many. A schedule has one shape: there is one for every shape.

Why no two ranks wait for each other for ever, though NCCL runs the messages of a communicator one batch after the other and
a batch ends when all its messages have met theirs: a batch holds messages to be met by one batch of each neighbour. 1F1B
pairs "send a state down, receive a gradient" on one rank with "send a gradient up, receive a state" on the next; GPipe's
batches go one way; an interleaved schedule has one batch a time step, the same steps on all ranks, and what a batch sends
the neighbour receives in the batch of the same step. So whoever waits, waits for a rank that is earlier in a schedule that
has an end. ``tests/parallel/pipeline/test_message_order.py`` records the batches of real ranks and runs them so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from deberta_dist.parallel.mesh import Mesh
from deberta_dist.values import PipelineSchedule

# Our name -> the library's.
SCHEDULES: Mapping[PipelineSchedule, str] = {
    "1f1b": "1F1B",
    "gpipe": "GPipe",
    "interleaved_1f1b": "Interleaved1F1B",
}


@dataclass(frozen=True)
class MicroBatches:
    """The micro-batches of one step on one data-parallel rank: M micro-batches of B sequences.

    Attributes:
        input_ids: Token ids, int64 [M * B, S].
        fields: Of each micro-batch, what ``model.forward_stage`` takes by name beside ids, hidden states and layers.
    """

    input_ids: Tensor
    fields: Sequence[Mapping[str, Any]]


class Stage(nn.Module):
    """A contiguous range of the model's layers with the signature that pipelining calls.

    Args:
        model: The rank's model; ``model.forward_stage`` runs any range of the layers it kept.
        layers: The layers of this stage.
    """

    def __init__(self, model: nn.Module, *, layers: range) -> None:
        super().__init__()
        self.model = model
        self.layers = layers

    def forward(self, first: Tensor, *, number: Tensor, batch: MicroBatches) -> Tensor:
        """Runs one micro-batch.

        Args:
            first: token ids [B, S] on the first stage, hidden states [B, S / sequence_shards, D] on the others.
            number: of the micro-batch, [1], on the host.
            batch: All micro-batches.
        """
        is_ids = self.layers.start == 0
        return self.model.forward_stage(  # type: ignore[operator]  # every network's model has it
            None if is_ids else first,
            input_ids=first if is_ids else None,
            layers=self.layers,
            **batch.fields[int(number)],
        )


class SharingStage(PipelineStage):
    """A pipeline stage that receives into the buffers of the same stage in schedules of other shapes.

    All shapes have as many tokens, and one schedule runs at a time: without this each would keep as many bytes again.

    Attributes:
        buffers: Of all schedules of a runner, made by the one that runs first.
        after_backward: Called after the backward pass of each micro-batch.
    """

    buffers: dict[tuple[int, str, int, int], Tensor]
    after_backward: Callable[[], None]

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> None:
        super().backward_one_chunk(*args, **kwargs)
        self.after_backward()

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        # What is received takes gradients even where an evaluation comes before the first step: torch 2.11 decides it here,
        # once for both.
        now, self.has_backward = self.has_backward, True
        result = super()._prepare_forward_infra(*args, **kwargs)
        self.has_backward = now
        self._share("activations", self.args_recv_info)
        return result

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._prepare_backward_infra(*args, **kwargs)
        self._share("gradients", self.grad_recv_info)
        return result

    def _share(self, kind: str, received: Mapping[int, Sequence[Any]]) -> None:
        for micro_batch, infos in received.items():
            for number, info in enumerate(infos):
                # None: nothing is received, or, from torch 2.15 on, the buffer is made when it is.
                if (buffer := getattr(info, "buffer", None)) is not None:
                    first = self.buffers.setdefault((self.stage_index, kind, micro_batch, number), buffer)
                    if first is not buffer:
                        info.buffer = first.detach().view(buffer.shape).requires_grad_(buffer.requires_grad)


class ScaledLoss:
    """Scaled sum of losses from what the last stage returns: its sums [1, N], the loss first, alone or with ids beside them.

    Attributes:
        scale: Of the step that runs.
    """

    scale: float | Tensor = 1.0

    def __call__(self, output: Tensor | tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        sums = output[0] if isinstance(output, tuple) else output
        return sums[0, 0] * self.scale


class PipelineRunner:
    """Forward and backward of all micro-batches of a step.

    Args:
        model: The rank's model, cut and split.
        stages: Layers of every stage of the pipeline.
        local_stages: Indices of the stages that this rank runs.
        mesh: The grid.
        schedule: One of ``SCHEDULES``.
        num_micro_batches: M.
        micro_batch_shapes: (B, S), sequences and tokens, of all micro-batches that can come; those of one step are alike,
            and B S is the same for all.
        hidden_size: D.
        sequence_shards: Parts of the sequence, of which a rank's hidden states hold one.
        dtype: Compute dtype, of the hidden states that travel.
        num_results: N, what the last stage's float32 [1, N] holds, the loss first.
        hands_on: Whether the last stage returns int64 [B, S] beside it.
        after_backward: Called after the backward pass of each micro-batch on each of this rank's stages.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        stages: Sequence[range],
        local_stages: Sequence[int],
        mesh: Mesh,
        schedule: PipelineSchedule,
        num_micro_batches: int,
        micro_batch_shapes: Sequence[tuple[int, int]],
        hidden_size: int,
        sequence_shards: int,
        dtype: torch.dtype,
        num_results: int,
        hands_on: bool = False,
        after_backward: Callable[[], None] = lambda: None,
    ) -> None:
        self.num_micro_batches = num_micro_batches
        self._numbers = torch.arange(num_micro_batches)
        self._has_first = 0 in local_stages
        self._has_last = len(stages) - 1 in local_stages
        self._model = model
        self._loss = ScaledLoss()
        self._num_results, self._hands_on = num_results, hands_on
        result = torch.empty(1, num_results, dtype=torch.float32, device="meta", requires_grad=True)
        # By the shape of all micro-batches together, (M * B, S).
        self._schedules = {}
        buffers: dict[tuple[int, str, int, int], Tensor] = {}
        for batch, length in micro_batch_shapes:
            ids = torch.empty(batch, length, dtype=torch.int64, device="meta")
            hidden_shape = (batch, length // sequence_shards, hidden_size)
            hidden = torch.empty(hidden_shape, dtype=dtype, device="meta", requires_grad=True)
            pipeline_stages = [
                SharingStage(
                    Stage(model, layers=stages[index]),
                    index,
                    len(stages),
                    mesh.device,
                    input_args=(ids if index == 0 else hidden,),
                    output_args=(hidden,) if index < len(stages) - 1 else (result, ids) if hands_on else (result,),
                    group=mesh.groups["pipeline"],
                )
                for index in local_stages
            ]
            for stage in pipeline_stages:
                stage.buffers, stage.after_backward = buffers, after_backward
            made = _make_schedule(schedule, pipeline_stages, num_micro_batches, len(stages), loss=self._loss)
            self._schedules[num_micro_batches * batch, length] = made

    def forward_backward(self, batch: MicroBatches, *, loss_scale: float | Tensor) -> tuple[Tensor, Tensor | None]:
        """Runs all micro-batches; gradients of ``loss_scale`` times the loss sum accumulate in ``.grad``.

        Returns:
            Sums, float32 [num_results] on this rank's device, over the micro-batches on ranks of the last stage, zeros on
            the others; and what the last stage hands on, int64 [M * B, S], there alone, None elsewhere.
        """
        self._model.train()
        return self._run(batch, loss_scale=loss_scale, backward=True)

    def evaluate(self, batch: MicroBatches) -> tuple[Tensor, Tensor | None]:
        """Forward only, without dropout; returns as ``forward_backward``."""
        self._model.eval()
        with torch.no_grad():
            return self._run(batch, loss_scale=1.0, backward=False)

    def _run(self, batch: MicroBatches, *, loss_scale: float | Tensor, backward: bool) -> tuple[Tensor, Tensor | None]:
        rows, length = batch.input_ids.shape
        schedule = self._schedules[rows, length]
        call = schedule.step if backward else schedule.eval
        self._loss.scale = loss_scale
        args = (batch.input_ids,) if self._has_first else ()
        output = call(
            *args,
            # The output holds the loss already; the library wants something to compare it with.
            target=self._numbers if self._has_last else None,
            number=self._numbers,
            batch=batch,
        )
        if not self._has_last:
            return torch.zeros(self._num_results, dtype=torch.float32, device=batch.input_ids.device), None
        sums, ids = output if self._hands_on else (output, None)
        return sums.detach().sum(dim=0), ids


def _make_schedule(
    name: PipelineSchedule, stages: Sequence[PipelineStage], num_micro_batches: int, num_stages: int, *, loss: ScaledLoss
) -> Any:
    # Losses are sums that the caller has normalised: the library must not divide gradients again.
    options = {"loss_fn": loss, "scale_grads": False}
    schedule_class = get_schedule_class(SCHEDULES[name])
    if issubclass(schedule_class, PipelineScheduleMulti):
        return schedule_class(stages, num_micro_batches, **options)
    if num_micro_batches < num_stages:
        # 1F1B with fewer micro-batches than stages never reaches its steady state: what is left is GPipe.
        schedule_class = ScheduleGPipe
    return schedule_class(stages[0], num_micro_batches, **options)
