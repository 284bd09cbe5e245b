"""Bytes that every rank of a run holds, computed without a device or a process.

Sizes that follow from the layout come from the functions that ``training/build.py`` calls; activations are measured
(``activations.py``). Not included: fragmentation of the allocator, communication libraries, torch itself. ``dry_run.py``
prints the numbers; tests compare them with a real run.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deberta_dist.config import RunConfig, offload_device, precision
from deberta_dist.parallel.layout import DTYPES, Layout, flat_layout
from deberta_dist.planning.activations import StageActivations, StageCase, stage_activations
from deberta_dist.values import INTERLEAVED

FLOAT32, INT64 = 4, 8  # bytes
# DeepSpeed's default of zero_optimization.reduce_bucket_size, elements.
DEFAULT_REDUCE_BUCKET = 500_000_000


@dataclass(frozen=True)
class RankMemory:
    """One rank, bytes by kind.

    Attributes:
        owned: Parameters that this rank owns (elements, without padding).
        borrowed: Parameters that it uses and another rank owns (elements).
        weights: Owned weights at rest: 1/dp, compute dtype.
        master_weights: Float32 master weights, 1/dp. Also in float32 runs: DeepSpeed 0.19.8 means to share them with
            ``weights`` there, but compares a torch.device with a string, which is never equal, and copies.
        moments: Both Adam moments, float32, 1/dp.
        gradient_shard: DeepSpeed's buffer for the reduced gradient, 1/dp, compute dtype.
        reduce_bucket: DeepSpeed's bucket, reserved from start to end.
        gathered: All owned weights while a step runs, compute dtype; 0 with one replica, where nothing is gathered.
        borrowed_weights: Weights received from their owners, compute dtype.
        gradients: Float32 sums over the micro-batches, of owned weights.
        borrowed_gradients: Float32 sums over the micro-batches, of borrowed weights.
        receive_buffers: For every micro-batch one received activation and one received gradient, the same for all shapes.
        batch: Ids, masks and targets of all micro-batches.
        activations: Saved for backward by all micro-batches in flight, without logits; for the bucket with the most.
        logits: Saved by the head in the same micro-batches.
        working: Temporaries of the micro-batch being computed, and a message that is still being sent.
        reduction: After the micro-batches, the larger of two temporaries: a tie's message beside what is borrowed, or the
            gradient rounded to the compute dtype.
        offload: Where master weights, moments and gradient shard are: ``"none"`` is the device, otherwise ``"cpu"``.
        others_at_rest: Bytes of the run's other networks on the device while this one runs.
    """

    owned: int
    borrowed: int
    weights: int
    master_weights: int
    moments: int
    gradient_shard: int
    reduce_bucket: int
    gathered: int
    borrowed_weights: int
    gradients: int
    borrowed_gradients: int
    receive_buffers: int
    batch: int
    activations: int
    logits: int
    working: int
    reduction: int
    offload: str
    others_at_rest: int = 0

    @property
    def optimizer(self) -> int:
        """Bytes of master weights, moments and gradient shard, on the device or the host."""
        return self.master_weights + self.moments + self.gradient_shard

    @property
    def at_rest(self) -> int:
        """Bytes on the device between steps."""
        optimizer = self.optimizer if self.offload == "none" else 0
        return self.weights + optimizer + self.reduce_bucket + self.receive_buffers + self.others_at_rest

    @property
    def in_micro_batches(self) -> int:
        """Peak bytes on the device during the micro-batches."""
        step = self.batch + self.gathered + self.borrowed_weights + self.gradients + self.borrowed_gradients
        return self.at_rest + step + self.activations + self.logits + self.working

    @property
    def in_reduction(self) -> int:
        """Peak bytes on the device after the micro-batches."""
        return self.at_rest + self.batch + self.gathered + self.gradients + self.reduction

    @property
    def peak(self) -> int:
        """Peak bytes on the device in a step."""
        return max(self.in_micro_batches, self.in_reduction)


def rank_memory(
    layout: Layout,
    *,
    config: RunConfig,
    deepspeed_config: dict[str, Any],
    pipeline_rank: int,
    tensor_rank: int,
    others: Sequence[Layout] = (),
) -> RankMemory:
    """Adds up one rank while one network runs; all its data-parallel replicas hold the same.

    Args:
        layout: From ``plan_layout``.
        config: Resolved configuration.
        deepspeed_config: Filled-in DeepSpeed JSON.
        pipeline_rank, tensor_rank: The rank's place.
        others: Of the run's other networks, which are at rest meanwhile.
    """
    place = {
        "config": config,
        "deepspeed_config": deepspeed_config,
        "pipeline_rank": pipeline_rank,
        "tensor_rank": tensor_rank,
    }
    replicas, dtype = config.parallel.data_parallel_size, DTYPES[precision(deepspeed_config)]
    width, held = dtype.itemsize, _elements(layout, (pipeline_rank, tensor_rank), replicas=replicas)
    share, borrowed = held.flat // replicas, held.used - held.owned
    activations = max(
        (
            _in_flight(layout, config=config, dtype=dtype, pipeline_rank=pipeline_rank, batch_shape=shape)
            for shape in config.micro_batch_shapes
        ),
        key=lambda one: one.saved + one.logits + one.working,
    )
    last = len(layout.stages) - 1
    received = sum((index > 0) + (index < last) for index in layout.stages_by_rank[pipeline_rank])
    tokens = config.training.micro_batch_size * config.data.max_seq_length // layout.sequence_shards
    hidden = tokens * layout.config.hidden_size * width
    return RankMemory(
        owned=held.owned,
        borrowed=borrowed,
        weights=share * width,
        master_weights=share * FLOAT32,
        moments=2 * share * FLOAT32,
        gradient_shard=share * width,
        reduce_bucket=_reduce_bucket_bytes(deepspeed_config),
        gathered=held.flat * width if replicas > 1 else 0,
        borrowed_weights=borrowed * width,
        gradients=held.flat * FLOAT32,
        borrowed_gradients=borrowed * FLOAT32,
        receive_buffers=received * config.training.num_micro_batches * hidden,
        batch=_batch_bytes(config),
        activations=activations.saved,
        logits=activations.logits,
        working=activations.working + (hidden if len(layout.stages) > 1 else 0),
        reduction=max(
            borrowed * (width + FLOAT32) + held.largest_tie * FLOAT32,
            held.flat * width if width < FLOAT32 else 0,
        ),
        offload=offload_device(deepspeed_config, "optimizer"),
        others_at_rest=sum(rank_memory(other, **place).at_rest for other in others),
    )


@dataclass(frozen=True)
class _Elements:
    """Parameters of one rank.

    Attributes:
        flat: Of its flat parameters, padding included.
        owned: Without the padding.
        used: Owned and borrowed.
        largest_tie: Of the tie whose gradients it collects and that has most; 0 without one.
    """

    flat: int
    owned: int
    used: int
    largest_tie: int


def _elements(layout: Layout, place: tuple[int, int], *, replicas: int) -> _Elements:
    """Of the rank at ``place``, (pipeline rank, tensor rank)."""
    pipeline_rank, tensor_rank = place

    def count(names: Iterable[str]) -> int:
        return sum(torch.Size(layout.local_shape(name)).numel() for name in names)

    flats = flat_layout(layout, pipeline_rank=pipeline_rank, tensor_rank=tensor_rank, data_parallel_size=replicas)
    return _Elements(
        flat=sum(flats.sizes),
        owned=sum(torch.Size(shape).numel() for _, _, shape in flats.places.values()),
        used=count(layout.names_by_rank[pipeline_rank]),
        largest_tie=max((count(tie.names) for tie in layout.ties if tie.is_sum and tie.users[0] == place), default=0),
    )


def _reduce_bucket_bytes(deepspeed_config: dict[str, Any]) -> int:
    zero = deepspeed_config.get("zero_optimization", {})
    if not zero.get("contiguous_gradients", True):
        return 0
    return zero.get("reduce_bucket_size", DEFAULT_REDUCE_BUCKET) * reduced_width(deepspeed_config)


def _in_flight(
    layout: Layout, *, config: RunConfig, dtype: torch.dtype, pipeline_rank: int, batch_shape: tuple[int, int]
) -> StageActivations:
    """What all stages of a rank keep at the highest moment of a step with micro-batches of one shape (B, S)."""
    parallel, training = config.parallel, config.training
    stages = [
        stage_activations(
            layout.network,
            StageCase(
                layers=layout.stages[index],
                tensor_parallel_size=layout.tensor_parallel_size,
                sequence_parallel=layout.sequence_parallel,
                batch_shape=batch_shape,
                targets_per_sequence=expected_targets(config, length=batch_shape[1]),
                dtype=dtype,
                recompute=training.recompute,
                document_boundaries=config.data.document_boundaries,
                vocabulary_chunks=training.vocabulary_chunks,
            ),
        )
        for index in layout.stages_by_rank[pipeline_rank]
    ]
    # The moment with the most saved micro-batches need not be that of the stage with the largest temporaries.
    counts, computing = max(
        micro_batches_in_flight(
            parallel.schedule,
            pipeline_rank=pipeline_rank,
            pipeline_parallel_size=parallel.pipeline_parallel_size,
            stages_per_rank=parallel.stages_per_rank,
            num_micro_batches=training.num_micro_batches,
        ),
        key=lambda moment: (
            sum(n * (stage.saved + stage.logits) for n, stage in zip(moment[0], stages, strict=True))
            + stages[moment[1]].working
        ),
    )
    return StageActivations(
        saved=sum(n * stage.saved for n, stage in zip(counts, stages, strict=True)),
        logits=sum(n * stage.logits for n, stage in zip(counts, stages, strict=True)),
        working=stages[computing].working,
    )


def _batch_bytes(config: RunConfig) -> int:
    """What a data-parallel rank reads in a step."""
    training, length = config.training, config.data.max_seq_length
    rows = training.micro_batch_size * training.num_micro_batches
    per_token = 3 if config.data.document_boundaries else 2  # ids, mask, documents
    per_target = 4  # id, token, position, slot
    return INT64 * rows * (per_token * length + per_target * expected_targets(config))


def reduced_width(deepspeed_config: dict[str, Any]) -> int:
    """Bytes of a gradient element in DeepSpeed's reduce-scatter."""
    name = str(deepspeed_config.get("communication_data_type") or precision(deepspeed_config)).lower()
    return FLOAT32 if name == "fp32" else 2


def expected_targets(config: RunConfig, *, length: int | None = None) -> int:
    """Number of tokens to predict in a full sequence of ``length`` tokens, by default ``data.max_seq_length``; rounded."""
    return max(1, round(config.data.mask_probability * (length or config.data.max_seq_length)))


def micro_batches_in_flight(
    schedule: str, *, pipeline_rank: int, pipeline_parallel_size: int, stages_per_rank: int, num_micro_batches: int
) -> list[tuple[tuple[int, ...], int]]:
    """Micro-batches in flight on a rank during a step: (number saved by each of its stages, the stage that computes).

    For the interleaved schedule there is one entry per forward pass, its own micro-batch included, and per backward pass, in
    the order of ``torch.distributed.pipelining.schedules.ScheduleInterleaved1F1B`` (a test compares). For the others there is
    one entry, the maximum: 1F1B warms up with one forward pass per stage from here to the last; GPipe, and 1F1B with fewer
    micro-batches than stages, which runs as GPipe, does all forward passes first.
    """
    ranks, loops, micro_batches = pipeline_parallel_size, stages_per_rank, num_micro_batches
    if schedule != INTERLEAVED:
        all_first = schedule == "gpipe" or micro_batches < ranks
        return [((micro_batches if all_first else min(micro_batches, ranks - pipeline_rank),), 0)]
    per_round = micro_batches // max(1, micro_batches // ranks)
    forwards = micro_batches * loops
    warm_up = min((loops - 1) * per_round + 2 * (ranks - 1 - pipeline_rank), forwards)
    counts, moments = [0] * loops, []
    for step in range(forwards + warm_up):
        if step < forwards:
            stage = (step // per_round) % loops
            counts[stage] += 1
            moments.append((tuple(counts), stage))
        if step >= warm_up:
            stage = loops - 1 - ((step - warm_up) // per_round) % loops
            moments.append((tuple(counts), stage))
            counts[stage] -= 1
    return moments
