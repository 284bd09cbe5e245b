"""Bytes that every rank communicates per optimizer step, by kind, computed without starting a process.

Convention: bytes of the buffer passed to the collective (the larger one where input and output differ, as in all-gather and
reduce-scatter); for the pipeline, what the rank sends. Factors of the algorithm, such as 2 (n - 1) / n of a ring all-reduce,
are not applied. A group of one rank communicates nothing.

Every message is a hidden state, or rows of one for the targets: [B, S, D] unless said otherwise.

    per layer       2 all-reduces forward (again in the backward pass if it recomputes layers), 2 backward
    embedding       1 forward
    mask decoder    2 per pass forward, 2 per pass backward over the padded targets [B, T, D]; 1 backward for the
                    hidden states that all passes attend to
    head            1 backward over the targets; its cross entropy float32 [T] and [2, T] and int64 [T] forward

With sequence parallelism over t ranks an all-gather and a reduce-scatter replace each all-reduce. Each has half of its factor
and is counted as [B, S, D]; stages send [B, S / t, D].

    per layer       2 all-gathers and 2 reduce-scatters forward (again if layers are recomputed), 2 and 2 backward;
                    2 all-gathers more in the backward pass unless layers are recomputed
    embedding       1 reduce-scatter forward, 1 all-gather backward
    convolution     1 all-gather forward, 1 reduce-scatter backward of the borders [B, t (K - 1), D], K its taps
    mask decoder    as without, and 1 all-gather forward for the hidden states; a head without it has that one
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deberta_dist.config import RunConfig, offload_device, precision
from deberta_dist.models.masked_lm import NUM_DECODER_PASSES
from deberta_dist.parallel.layout import DTYPES, Layout, flat_layout
from deberta_dist.planning.memory import FLOAT32, INT64, expected_targets, reduced_width


@dataclass(frozen=True)
class MicroBatchTargets:
    """Number of tokens to predict in one micro-batch.

    Attributes:
        total: Over all its sequences.
        widest: In the sequence with the most; the decoder pads the others to it.
    """

    total: int
    widest: int


@dataclass(frozen=True)
class RankCommunication:
    """One rank and one optimizer step, bytes by kind (see the module for the convention).

    Attributes:
        zero_gather: Weights all-gathered over the data axis, once per step.
        zero_reduce: Gradients reduce-scattered over the data axis, once per step.
        tie_broadcast: Tied weights broadcast from their owners, once per step.
        tie_reduce: Their gradients reduced to their owners, once per step.
        tensor_layers: Of the ordinary layers, the convolution included.
        tensor_embedding: Of the word embedding.
        tensor_decoder: Of the enhanced mask decoder.
        tensor_head: Of the head and its cross entropy.
        tensor_halves: What of these four is all-gathers and reduce-scatters; the rest is all-reduces.
        pipeline_activations: Sent to later stages.
        pipeline_gradients: Sent to earlier stages.
        scalars: Targets, tokens, losses and the gradient's norm (of an offloaded gradient DeepSpeed's own, not counted).
    """

    zero_gather: int
    zero_reduce: int
    tie_broadcast: int
    tie_reduce: int
    tensor_layers: int
    tensor_embedding: int
    tensor_decoder: int
    tensor_head: int
    tensor_halves: int
    pipeline_activations: int
    pipeline_gradients: int
    scalars: int

    @property
    def tensor(self) -> int:
        """All bytes over the tensor axis."""
        return self.tensor_layers + self.tensor_embedding + self.tensor_decoder + self.tensor_head

    @property
    def once_per_step(self) -> int:
        """What does not depend on the number of micro-batches."""
        return self.zero_gather + self.zero_reduce + self.tie_broadcast + self.tie_reduce + self.scalars

    @property
    def total(self) -> int:
        """All bytes of a step."""
        return self.once_per_step + self.tensor + self.pipeline_activations + self.pipeline_gradients


def rank_communication(
    layout: Layout,
    *,
    config: RunConfig,
    deepspeed_config: dict[str, Any],
    pipeline_rank: int,
    tensor_rank: int,
    targets: Sequence[MicroBatchTargets] | None = None,
) -> RankCommunication:
    """What one rank communicates in a step.

    Args:
        layout: Says what the rank runs, owns and borrows.
        config: Resolved; its batch sizes and recompute mode count.
        deepspeed_config: DeepSpeed JSON without "auto"; its precision and communication dtype count.
        pipeline_rank: With ``tensor_rank``, which rank; all data ranks are alike.
        tensor_rank: See ``pipeline_rank``.
        targets: Targets of every micro-batch; None for the expected numbers.
    """
    training, parallel = config.training, config.parallel
    if targets is None:
        targets = expected_micro_batches(config)
    assert len(targets) == training.num_micro_batches
    width, replicas = DTYPES[precision(deepspeed_config)].itemsize, parallel.data_parallel_size
    flats = flat_layout(layout, pipeline_rank=pipeline_rank, tensor_rank=tensor_rank, data_parallel_size=replicas)
    flat = sum(flats.sizes) if replicas > 1 else 0

    lent, collected = 0, 0
    for tie in layout.ties:
        if (pipeline_rank, tensor_rank) in tie.users:
            size = sum(torch.Size(layout.local_shape(name)).numel() for name in tie.names)
            lent += size
            collected += size * tie.is_sum

    stages = layout.stages_by_rank[pipeline_rank]
    last = len(layout.stages) - 1
    tokens = training.micro_batch_size * config.data.max_seq_length
    hidden = tokens * layout.config.hidden_size * width * training.num_micro_batches
    in_decoder, in_head = _target_bytes(layout, config=config, width=width, targets=targets)
    is_split, has_last = layout.tensor_parallel_size > 1, last in stages
    decodes = has_last and layout.network.decoder_layer is not None
    layers = len(layout.layers_of_rank(pipeline_rank)) - decodes
    per_layer = layer_messages(config)
    embedding = tokens * layout.config.embedding_width * width * training.num_micro_batches
    is_sequence, shards = layout.sequence_parallel, layout.sequence_shards
    borders, joined = 0, is_sequence * has_last * hidden
    if is_sequence and 0 in layout.layers_of_rank(pipeline_rank) and layout.config.conv_kernel_size > 0:
        beside = shards * (layout.config.conv_kernel_size - 1)
        borders = 2 * beside * hidden // config.data.max_seq_length
    in_layers = is_split * layers * per_layer * hidden + borders
    in_embedding = is_split * (0 in stages) * (1 + is_sequence) * embedding
    return RankCommunication(
        zero_gather=flat * width,
        zero_reduce=flat * reduced_width(deepspeed_config),
        tie_broadcast=lent * width,
        tie_reduce=collected * FLOAT32,
        tensor_layers=in_layers,
        tensor_embedding=in_embedding,
        tensor_decoder=is_split * decodes * (hidden + in_decoder + joined),
        tensor_head=is_split * (has_last * in_head + (not decodes) * joined),
        tensor_halves=is_sequence * (in_layers + in_embedding + joined),
        pipeline_activations=sum(index < last for index in stages) * hidden // shards + handed_bytes(layout, config),
        pipeline_gradients=sum(index > 0 for index in stages) * hidden // shards,
        scalars=_scalars(layout, config, deepspeed_config),
    )


def layer_all_reduces(config: RunConfig) -> int:
    """Number of all-reduces over the tensor axis in one layer and micro-batch without sequence parallelism."""
    return 4 + 2 * (config.training.recompute == "full")


def layer_messages(config: RunConfig) -> int:
    """Number of messages over the tensor axis in one layer and micro-batch, each of a whole hidden state."""
    if not config.parallel.sequence_parallel:
        return layer_all_reduces(config)
    # Two halves of every all-reduce, and the inputs of attention and feed-forward gathered again.
    return 2 * layer_all_reduces(config) + 2 * (config.training.recompute != "full")


def expected_micro_batches(config: RunConfig) -> list[MicroBatchTargets]:
    """Every micro-batch with the expected number of targets in every sequence."""
    per_sequence = expected_targets(config)
    one = MicroBatchTargets(total=config.training.micro_batch_size * per_sequence, widest=per_sequence)
    return [one] * config.training.num_micro_batches


def _target_bytes(layout: Layout, *, config: RunConfig, width: int, targets: Sequence[MicroBatchTargets]) -> tuple[int, int]:
    """All-reduces whose size depends on the targets: (mask decoder's passes, head), bytes per step."""
    sequences = config.training.micro_batch_size
    # The decoder has at least one row per sequence, also where there is nothing to predict.
    rows = sum(sequences * max(one.widest, 1) for one in targets)
    decoder = NUM_DECODER_PASSES * layer_all_reduces(config) * rows * layout.config.hidden_size * width
    total = sum(one.total for one in targets)
    return decoder, total * sum(map(sum, layout.network.head_messages(width=width)))


def handed_bytes(layout: Layout, config: RunConfig) -> int:
    """Ids for the next network, broadcast over the pipeline axis, int64."""
    training, is_cut = config.training, config.parallel.pipeline_parallel_size > 1
    tokens = training.num_micro_batches * training.micro_batch_size * config.data.max_seq_length
    return INT64 * tokens * (layout.network.hands_on and is_cut)


def _scalars(layout: Layout, config: RunConfig, deepspeed_config: dict[str, Any]) -> int:
    """Bytes of scalars: int64 targets and tokens over the data axis; the network's float64 results over the world; a float64
    norm of every flat gradient, over the data axis and over the model-parallel ranks.
    """
    parallel = config.parallel
    replicas, model = parallel.data_parallel_size, parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    offload = offload_device(deepspeed_config, "optimizer")
    norms = 8 * len(layout.network.flat_groups) * (offload == "none")
    results = 8 * len(layout.network.results)
    return (16 + norms) * (replicas > 1) + results * (replicas * model > 1) + norms * (model > 1)
