"""Runs the micro-batches of one optimizer step through the stages of this rank.

The schedules are torch.distributed.pipelining's. Every stage reads its micro-batch (mask, targets, dropout key) from the data
itself, so only hidden states and their gradients are sent. One stage and one micro-batch take the same path as many. A
schedule has buffers of one shape, so the runner makes one schedule for each shape of a micro-batch.

Why it cannot deadlock: NCCL runs the sends and receives of a communicator batch by batch, and a batch ends when each of its
messages has met its counterpart. In all three schedules the counterparts of a batch lie in a single batch of each neighbour.
1F1B pairs "send a hidden state down, receive a gradient" with the next rank's "send a gradient up, receive a hidden state";
GPipe's batches go one way; an interleaved schedule has one batch per time step, with the same time steps on all ranks. So
every wait is for a rank that is at an earlier point of a finite schedule. ``tests/parallel/pipeline/test_message_order.py``
records the batches of real ranks and replays them under NCCL's rule.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from deberta_dist.parallel.mesh import Mesh
from deberta_dist.parallel.pipeline import MicroBatches
from deberta_dist.values import PipelineSchedule

# Value of parallel.schedule -> the name that torch.distributed.pipelining has for it.
SCHEDULES: Mapping[PipelineSchedule, str] = {
    "1f1b": "1F1B",
    "gpipe": "GPipe",
    "interleaved_1f1b": "Interleaved1F1B",
}


class Stage(nn.Module):
    """Consecutive layers of a rank's model, with the signature that pipelining calls.

    Args:
        model: The rank's model, with the layers of all its stages; ``model.forward_stage`` runs any range of them.
        layers: Numbers of this stage's layers; a stage that starts with layer 0 takes ids.
    """

    def __init__(self, model: nn.Module, *, layers: range) -> None:
        super().__init__()
        self.model = model
        self.layers = layers

    def forward(self, first: Tensor, *, number: Tensor, batch: MicroBatches) -> Tensor:
        """Runs one micro-batch.

        Args:
            first: Token ids [B, S] on the first stage, hidden states [B, S / sequence_shards, D] on the others.
            number: Number of the micro-batch, int64 [1] on the host: pipelining splits a tensor [M] into these.
            batch: All micro-batches of the step; pipelining passes what is no tensor to every micro-batch whole.
        """
        is_ids = self.layers.start == 0
        return self.model.forward_stage(  # type: ignore[operator]  # every network's model has it
            None if is_ids else first,
            input_ids=first if is_ids else None,
            layers=self.layers,
            **batch.fields[int(number)],
        )


class SharingStage(PipelineStage):
    """A pipeline stage whose receive buffers are shared with the same stage of the runner's schedules for other shapes.

    All shapes have the same number of tokens, and only one schedule runs at a time: a buffer serves all of them.

    Attributes:
        buffers: (stage, activations or gradients, micro-batch, position) -> buffer, filled in by the schedule that runs first.
        after_backward: Called after the backward pass of each micro-batch.
    """

    buffers: dict[tuple[int, str, int, int], Tensor]
    after_backward: Callable[[], None]

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> None:
        super().backward_one_chunk(*args, **kwargs)
        self.after_backward()

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        # torch 2.11 decides here, once for training and evaluation, whether received tensors require gradients. Without this
        # an evaluation before the first step would leave every later step without gradients.
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
                # None where nothing is received; from torch 2.15 on also where the buffer is only made on receipt.
                if (buffer := getattr(info, "buffer", None)) is not None:
                    first = self.buffers.setdefault((self.stage_index, kind, micro_batch, number), buffer)
                    if first is not buffer:
                        info.buffer = first.detach().view(buffer.shape).requires_grad_(buffer.requires_grad)


class ScaledLoss:
    """The scaled loss of a micro-batch, from what the last stage returns: sums [1, N] with the loss first, or (sums, ids).

    Attributes:
        scale: Factor on the loss in the running step; the runner sets it before each.
    """

    scale: float | Tensor = 1.0

    def __call__(self, output: Tensor | tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        sums = output[0] if isinstance(output, tuple) else output
        return sums[0, 0] * self.scale


class PipelineRunner:
    """Forward and backward of all micro-batches of a step.

    There are many parameters because the pipeline knows neither the configuration nor the model: ``training/build.py`` is
    the one caller, and gives it plain values of both.

    Args:
        model: The rank's model: this rank's layers, divided by the sharding rules.
        stages: Layers of every stage of the pipeline, on any rank.
        local_stages: Indices into ``stages`` of what this rank runs.
        mesh: Its pipeline group carries hidden states and gradients.
        schedule: A key of ``SCHEDULES``.
        num_micro_batches: M, micro-batches of a step on one data rank.
        micro_batch_shapes: (B, S), sequences and tokens, of every shape a micro-batch can have. The micro-batches of one step
            have the same shape, and B x S is the same for all shapes.
        hidden_size: D, the width of the hidden states that are sent.
        sequence_shards: Number of shards of a sequence; the hidden states that are sent hold S / sequence_shards tokens.
        dtype: Compute dtype, that of the hidden states that are sent.
        num_results: N, width of the last stage's float32 result [1, N], whose first number is the loss.
        hands_on: Whether the last stage also returns ids, int64 [B, S].
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
        # Key: the shape of all micro-batches together, (M * B, S), which is that of ``MicroBatches.input_ids``.
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
        """Runs all micro-batches; gradients of ``loss_scale`` times the loss sum accumulate in the parameters.

        Returns:
            Sums over the micro-batches, float32 [num_results] on this rank's device: on ranks of the last stage, zeros
            elsewhere; and the last stage's ids, int64 [M * B, S], there and with ``hands_on``, otherwise None.
        """
        self._model.train()
        return self._run(batch, loss_scale=loss_scale, backward=True)

    def evaluate(self, batch: MicroBatches) -> tuple[Tensor, Tensor | None]:
        """Forward passes only, without dropout; returns what ``forward_backward`` does."""
        self._model.eval()
        with torch.no_grad():
            return self._run(batch, loss_scale=1.0, backward=False)

    def _run(self, batch: MicroBatches, *, loss_scale: float | Tensor, backward: bool) -> tuple[Tensor, Tensor | None]:
        rows, length = batch.input_ids.shape
        schedule = self._schedules[rows, length]
        call = schedule.step if backward else schedule.eval
        # Set, not passed: schedules of torch 2.11 give no further arguments to the loss function.
        self._loss.scale = loss_scale
        args = (batch.input_ids,) if self._has_first else ()
        output = call(
            *args,
            # The last stage computes the loss itself; pipelining calls a loss function only if it is given targets.
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
    # The loss is already divided by the targets of the whole step; pipelining would divide gradients by M as well.
    options = {"loss_fn": loss, "scale_grads": False}
    schedule_class = get_schedule_class(SCHEDULES[name])
    if issubclass(schedule_class, PipelineScheduleMulti):
        return schedule_class(stages, num_micro_batches, **options)
    if num_micro_batches < num_stages:
        # Pipelining's 1F1B refuses fewer micro-batches than stages. It would never reach its steady state and be GPipe.
        schedule_class = ScheduleGPipe
    return schedule_class(stages[0], num_micro_batches, **options)
