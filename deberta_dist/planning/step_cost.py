"""Seconds of one optimizer step of a layout on a machine: arithmetic, and a simulation of the pipeline.

    step = before + pipeline + after + once, added up over the networks of the objective

    pipeline   every micro-batch forward and backward through all stages (``pipeline_timeline.py``); a pass takes the
               seconds of its work (``pass_work.py``) plus those of its all-reduces over the tensor axis
    before     all-gather of the stage's weights over the data axis, then the ties' broadcasts, gradients set to zero
    after      the ties' gradients reduced to their owners, gradients checked, scaled, cast and reduce-scattered, norm, Adam
               (and, of a network that hands ids on, their broadcast over the pipeline)
    once       what is called whatever the size of the model (``Machine.step_seconds``): each network has an engine

Every rank of ``before`` and of ``after`` waits for the slowest; nothing of them overlaps with the pipeline, as in
``training/step.py``, and nothing of one network with another's: they run one after the other. Data is read in the
background and not counted, nor is a table that one network adds to another's, which each rank does to its own shard. The
sizes of all messages are those of ``communication.py`` (a test compares); the seconds of one are ``Machine.seconds``.

On a machine whose processes share cores (``Machine.cores``) everything that computes takes so many times as long as there
are processes for a core, and the timeline shares them out pass by pass.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from deberta_dist.config import offload_device, precision
from deberta_dist.models.masked_lm import NUM_DECODER_PASSES
from deberta_dist.parallel.layout import DTYPES, TieSize
from deberta_dist.planning.communication import handed_bytes, layer_all_reduces
from deberta_dist.planning.machine import Machine
from deberta_dist.planning.memory import FLOAT32, expected_targets, reduced_width
from deberta_dist.planning.pass_work import Work, stage_work
from deberta_dist.planning.pipeline_timeline import ZERO_BUBBLE, Timeline, orders, play
from deberta_dist.planning.plan import NetworkPlan, Plan

# Bytes that pass through memory per element, reads and writes.
# Gradients: zeroed 4; read to be scaled and rounded 4; the norm in float64 4 + 8 + 8 of a shard.
ZEROED, SCALED, NORM_OF_SHARD = FLOAT32, FLOAT32, 5 * FLOAT32
# Adam, of a shard: reads gradient, master weight and two moments, writes the last three; the gradient in float32 before.
ADAM = 7 * FLOAT32 + 2 * FLOAT32


@dataclass(frozen=True)
class StepCost:
    """One step, seconds; costs of networks add up.

    Attributes:
        before: Seconds before the pipeline; see the module for these first four.
        pipeline: Seconds of all micro-batches.
        after: Seconds after the pipeline.
        once: Seconds that do not depend on the model.
        ideal: The part of ``pipeline`` in which the busiest rank works.
        tensor: The part of ``ideal`` that is all-reduces over the tensor axis.
        bubble: Share of ``pipeline`` in which a pipeline rank waits, the mean over them.
        utilisation: MFU: the model's FLOPs over the devices' peak in the whole step; 0 if no peak is known. Recomputation
            does not count.
    """

    before: float
    pipeline: float
    after: float
    once: float
    ideal: float
    tensor: float
    bubble: float
    utilisation: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.before + self.pipeline + self.after + self.once

    def __add__(self, other: "StepCost") -> "StepCost":
        return StepCost(
            before=self.before + other.before,
            pipeline=self.pipeline + other.pipeline,
            after=self.after + other.after,
            once=self.once + other.once,
            ideal=self.ideal + other.ideal,
            tensor=self.tensor + other.tensor,
            bubble=(self.bubble * self.pipeline + other.bubble * other.pipeline) / (self.pipeline + other.pipeline),
            utilisation=(self.utilisation * self.seconds + other.utilisation * other.seconds) / (self.seconds + other.seconds),
        )


@dataclass(frozen=True)
class StagePasses:
    """Seconds of one micro-batch on one stage: forward, backward, and the part of both that is all-reduces."""

    forward: float
    backward: float
    tensor: float


def stage_passes(part: NetworkPlan, machine: Machine) -> list[StagePasses]:
    """Every stage of a network's pipeline, first to last."""
    found: dict[tuple[int, bool, bool], StagePasses] = {}
    last = part.model_config.num_hidden_layers
    passes = []
    for layers in part.layout.stages:
        kind = (len(layers), layers.start == 0, layers.stop == last)
        if kind not in found:
            found[kind] = _stage_passes(part, machine, layers)
        passes.append(found[kind])
    return passes


def _stage_passes(part: NetworkPlan, machine: Machine, layers: range) -> StagePasses:
    config = part.config
    forward, backward = stage_work(part, layers, has_fused_attention=machine.has_fused_attention)
    sent_forward, sent_backward = stage_all_reduces(part, layers)
    size = config.parallel.tensor_parallel_size
    messages = [
        sum(machine.seconds("all_reduce", n, size=size, stride=1) for n in sent) for sent in (sent_forward, sent_backward)
    ]
    # Messages of processes that share cores are measured while all of them send: their time is shared already.
    messages = [seconds / machine.busy(part.world_size) for seconds in messages]
    return StagePasses(
        forward=work_seconds(forward, machine) + messages[0],
        backward=work_seconds(backward, machine) + messages[1],
        tensor=sum(messages),
    )


def work_seconds(work: Work, machine: Machine) -> float:
    """Seconds of a pass's work on a device, or a core, of its own.

    Products at their rate, then passes over memory. A host that runs ahead of its device only counts if it is the slower of
    the two; if they are one (a CPU), its calls are added.
    """
    device = work.products / machine.product_rate + work.bytes / machine.memory_bandwidth
    calls = work.calls * machine.seconds_per_call
    return max(device, calls) if machine.calls_overlap else device + calls


def stage_all_reduces(part: NetworkPlan, layers: range) -> tuple[list[int], list[int]]:
    """Bytes of every all-reduce over the tensor axis of one micro-batch on a stage: forward, backward.

    As ``communication.py`` counts them: its first lines say which there are.
    """
    config, model = part.config, part.model_config
    if config.parallel.tensor_parallel_size == 1:
        return [], []
    training, width = config.training, DTYPES[precision(part.deepspeed)].itemsize
    tokens, per_sequence = training.micro_batch_size * config.data.max_seq_length, expected_targets(config)
    targets = training.micro_batch_size * per_sequence
    hidden, rows = tokens * model.hidden_size * width, targets * model.hidden_size * width
    is_last = layers.stop == model.num_hidden_layers
    decodes = is_last and part.network.decoder_layer is not None
    in_backward = layer_all_reduces(config) - 2
    num_layers = len(layers) - decodes
    forward, backward = [hidden] * (2 * num_layers), [hidden] * (in_backward * num_layers)
    if layers.start == 0:
        forward.append(tokens * model.embedding_width * width)
    if decodes:
        forward += [rows] * (2 * NUM_DECODER_PASSES)
        backward += [hidden, *[rows] * (in_backward * NUM_DECODER_PASSES)]
    if is_last:
        in_head = part.network.head_messages(width=width)
        forward += [targets * each for each in in_head[0]]
        backward += [targets * each for each in in_head[1]]
    return forward, backward


def step_cost(plan: Plan, machine: Machine) -> StepCost:
    """The step of a plan, the pipelines of its networks played through."""
    return reduce(operator.add, (network_cost(part, machine) for part in plan.networks))


def network_cost(part: NetworkPlan, machine: Machine) -> StepCost:
    """One network's part of a step."""
    passes = stage_passes(part, machine)
    before, after = around_pipeline(part, machine)
    timeline = _play(part, machine, passes, schedule=part.config.parallel.schedule)
    micro_batches, by_rank = part.config.training.num_micro_batches, part.layout.stages_by_rank
    busiest = max(by_rank, key=lambda stages: sum(passes[index].forward + passes[index].backward for index in stages))
    shared = machine.busy(part.world_size)
    once = machine.step_seconds * shared
    seconds = before + timeline.seconds + after + once
    tokens = part.config.training.global_batch_size * part.config.data.max_seq_length
    flops = part.flops.training * tokens
    return StepCost(
        before=before,
        pipeline=timeline.seconds,
        after=after,
        once=once,
        ideal=micro_batches * sum(passes[index].forward + passes[index].backward for index in busiest),
        tensor=micro_batches * sum(passes[index].tensor for index in busiest),
        bubble=timeline.bubble,
        utilisation=flops / (seconds * part.world_size * machine.peak) if machine.peak else 0.0,
    )


def least_seconds(plan: Plan, machine: Machine) -> float:
    """What a step takes at least, in any schedule."""
    return sum(_least_seconds(part, machine) for part in plan.networks)


def _least_seconds(part: NetworkPlan, machine: Machine) -> float:
    """One network's part of a step, at least.

    The work of a rank never stops once it has begun: it begins when a micro-batch has come through the stages before
    the rank's first one, and behind its last backward pass are those of the same stages.
    """
    passes = stage_passes(part, machine)
    before, after = around_pipeline(part, machine)
    micro_batches, there_and_back, longest = part.config.training.num_micro_batches, 0.0, 0.0
    for rank, stages in enumerate(part.layout.stages_by_rank):
        work = micro_batches * sum(passes[index].forward + passes[index].backward for index in stages)
        longest = max(longest, there_and_back + work)
        there_and_back += passes[rank].forward + passes[rank].backward
    return before + after + machine.step_seconds + longest


def play_step(plan: Plan, machine: Machine, *, schedule: str) -> Timeline:
    """The pipelines of a step, one after the other; ``schedule`` takes the place of the plan's."""
    timelines = (_play(part, machine, stage_passes(part, machine), schedule=schedule) for part in plan.networks)
    return reduce(operator.add, timelines)


def _play(part: NetworkPlan, machine: Machine, passes: Sequence[StagePasses], *, schedule: str) -> Timeline:
    """The pipeline of one network.

    A backward pass that is split in two has half of its work in each part: every product of it is made twice.
    """
    parallel, training = part.config.parallel, part.config.training
    ranks, replicas = parallel.pipeline_parallel_size, parallel.tensor_parallel_size * parallel.data_parallel_size
    width = DTYPES[precision(part.deepspeed)].itemsize
    hidden = training.micro_batch_size * part.config.data.max_seq_length * part.model_config.hidden_size * width
    share = 0.5 if schedule == ZERO_BUBBLE else 1.0
    return play(
        orders(schedule, ranks=ranks, stages_per_rank=parallel.stages_per_rank, micro_batches=training.num_micro_batches),
        forward=[one.forward for one in passes],
        backward=[one.backward * share for one in passes],
        weights=[one.backward * share for one in passes] if schedule == ZERO_BUBBLE else None,
        transfer=machine.seconds("send", hidden, size=min(2, ranks), stride=replicas),
        processes=replicas,
        cores=machine.cores,
    )


def around_pipeline(part: NetworkPlan, machine: Machine) -> tuple[float, float]:
    """Seconds (before, after) the micro-batches of a network, each of the slowest rank."""
    config, layout = part.config, part.layout
    tensor, replicas = config.parallel.tensor_parallel_size, config.parallel.data_parallel_size
    width, reduced = DTYPES[precision(part.deepspeed)].itemsize, reduced_width(part.deepspeed)
    shared = machine.busy(part.world_size)
    offload = offload_device(part.deepspeed, "optimizer") != "none"
    befores, collects, afters = [], [], []
    for weights in layout.rank_weights:
        owned, used, ties, shard = weights.owned, weights.used, weights.ties, weights.owned / replicas
        lent = sum(_tie_seconds("broadcast", tie.elements * width, tie, part, machine) for tie in ties)
        gather = machine.seconds("all_gather", owned * width, size=replicas, stride=tensor)
        befores.append(gather + lent + shared * used * ZEROED / machine.memory_bandwidth)
        collects.append(sum(_tie_seconds("reduce", tie.elements * FLOAT32, tie, part, machine) for tie in ties if tie.is_sum))
        passed = owned * (SCALED + 2 * width) + shard * NORM_OF_SHARD
        if offload:
            adam = shard * (2 * width / machine.host_bandwidth + ADAM / machine.host_memory_bandwidth)
        else:
            adam = shared * shard * ADAM / machine.memory_bandwidth
        reduce = machine.seconds("reduce_scatter", owned * reduced, size=replicas, stride=tensor)
        afters.append(reduce + shared * passed / machine.memory_bandwidth + adam)
    return max(befores), max(collects) + max(afters) + _hand_on_seconds(part, machine)


def _hand_on_seconds(part: NetworkPlan, machine: Machine) -> float:
    """Ids for the next network's first stage, from the last pipeline rank on all."""
    parallel = part.config.parallel
    num_bytes = handed_bytes(part.layout, part.config)
    stride = parallel.tensor_parallel_size * parallel.data_parallel_size
    return machine.seconds("broadcast", num_bytes, size=parallel.pipeline_parallel_size, stride=stride) if num_bytes else 0.0


def _tie_seconds(kind: str, num_bytes: float, tie: TieSize, part: NetworkPlan, machine: Machine) -> float:
    """A message of a tie: tensor-parallel ranks of one stage are neighbours, stages are far apart."""
    parallel = part.config.parallel
    stride = parallel.tensor_parallel_size * parallel.data_parallel_size if tie.pipeline_ranks > 1 else 1
    return machine.seconds(kind, num_bytes, size=tie.users, stride=stride)
