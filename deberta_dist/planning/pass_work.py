"""The work of one micro-batch on one stage: products, bytes through memory, operations started.

The products are those of ``models/flops.py``; the backward pass computes two for each, and recomputation repeats some.
Everything else is passes over tensors: bytes read and written by every operation that is neither a product nor a view. With B
sequences of S tokens, t tensor ranks, dropout and the letters of ``flops.py``, per layer::

    forward    w B S (24 D +  7 A / t + 2.5 F / t) + w R ( 9 A / t +   7 D) + 41 * 4 B N / t S S
    backward   w B S (28 D + 31 A / t +   4 F / t) + w R (43 A / t + 8.5 D) + 23 * 4 B N / t S S + g (4 D A + 2 D F) / t

w is the bytes of an element, g = 16 (float32) or 20 bytes the addition of a weight's gradient to its float32 sum; the
terms of queries x keys are those of the portable attention, which the fused one does not have. Selective recomputation
passes 38 of these 41 once more, full recomputation all of forward. Without dropout there are less: the tables below.

**Source**: counted on the meta device for 128 small models of different D, A, F, N, R, B, S, t, with and without dropout, and
solved for the coefficients by least squares (the worst model is 4% off, without dropout 10%); a test counts again.
"""

from dataclasses import dataclass

from deberta_dist.config import precision
from deberta_dist.models.masked_lm import NUM_DECODER_PASSES
from deberta_dist.parallel.layout import DTYPES
from deberta_dist.planning.memory import expected_targets
from deberta_dist.planning.plan import NetworkPlan

# Passes over [B, S, D] (on every tensor-parallel rank), [B, S, A / t], [B, S, F / t], [R, A / t], [R, D], float32 [B, N / t, S, S]:
# forward, backward; then what dropout of hidden states, and of attention, adds.
PASSES = ((14.0, 5.0, 2.5, 8.0, 2.0, 14.0), (19.5, 29.0, 4.0, 43.0, 4.5, 15.0))
HIDDEN_DROPOUT_PASSES = ((10.0, 0.0, 0.0, 0.0, 5.0, 0.0), (8.5, 0.0, 0.0, 0.0, 4.0, 0.0))
ATTENTION_DROPOUT_PASSES = ((0.0, 2.0, 0.0, 1.0, 0.0, 27.0), (0.0, 2.0, 0.0, 0.0, 0.0, 8.0))
# Passes over [B, N / t, S, S] that selective recomputation makes again: in any case, with dropout of attention.
SCORES_REPEATED = (13.0, 24.5)
# Operations of a layer, forward and backward: in any case, by either dropout, and of them what a fused attention saves.
CALLS, HIDDEN_DROPOUT_CALLS, ATTENTION_DROPOUT_CALLS, PORTABLE_CALLS = (42, 95), (9, 6), (37, 5), (12, 45)
REPEATED_CALLS = (10, 38)
# Bytes per weight, by the bytes of an element.
SUMMED = {4: 16, 2: 20}
# Embeddings and convolution: passes over [B, S, D], operations. Keys and values of the decoder: shares of a layer.
EMBEDDING_PASSES, EMBEDDING_CALLS, MEMORY_SHARE = (26.0, 30.0), (23, 28), (0.05, 0.25)
# The head: passes over the float32 logits.
LOGIT_PASSES = (7.5, 11.0)


@dataclass(frozen=True)
class Work:
    """The work of one pass.

    Attributes:
        products: FLOPs in matrix products.
        bytes: Bytes read and written by all other operations.
        calls: Number of operations that the host starts.
    """

    products: float = 0.0
    bytes: float = 0.0
    calls: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.products + other.products, self.bytes + other.bytes, self.calls + other.calls)

    def __mul__(self, factor: float) -> "Work":
        return Work(self.products * factor, self.bytes * factor, self.calls * factor)


@dataclass(frozen=True)
class _Sizes:
    """Numbers of elements of a micro-batch's tensors on one tensor rank, in the formulas' terms."""

    hidden: float
    heads: float
    feed_forward: float
    table_heads: float
    table: float
    scores: float
    width: int
    layer_weights: float

    def bytes(self, passes: tuple[float, ...], *, fused: bool) -> float:
        tensors = (self.hidden, self.heads, self.feed_forward, self.table_heads, self.table)
        moved = self.width * sum(number * size for number, size in zip(passes, tensors, strict=False))
        return moved + (0.0 if fused else passes[5] * 4 * self.scores)


def stage_work(part: NetworkPlan, layers: range, *, has_fused_attention: bool) -> tuple[Work, Work]:
    """(forward, backward) of one micro-batch on a network's stage of ``layers``, on each of its tensor-parallel ranks."""
    config, model, fused = part.config, part.model_config, has_fused_attention
    training, tensor = config.training, config.parallel.tensor_parallel_size
    sequences, length = training.micro_batch_size, config.data.max_seq_length
    tokens, recompute = sequences * length, training.recompute
    sizes = _sizes(part)
    is_last = layers.stop == model.num_hidden_layers
    decodes = is_last and part.network.decoder_layer is not None

    forward, backward = (_layer(part, sizes, number, fused=fused) for number in range(2))
    again, drops = Work(), model.attention_probs_dropout_prob > 0
    if recompute == "full":
        again = forward
    elif recompute == "selective" and not fused:
        repeated = SCORES_REPEATED[0] + drops * SCORES_REPEATED[1]
        again = Work(bytes=repeated * 4 * sizes.scores, calls=REPEATED_CALLS[0] + drops * REPEATED_CALLS[1])
    sums = Work(bytes=SUMMED[sizes.width] * sizes.layer_weights)
    ordinary = len(layers) - decodes
    total_forward, total_backward = forward * ordinary, (backward + again + sums) * ordinary
    if decodes:
        # Two passes over the targets instead of one over all tokens; keys and values are computed once.
        rows = NUM_DECODER_PASSES * expected_targets(config) / length

        def decoding(part: Work, share: float) -> Work:
            return Work(bytes=part.bytes * (rows + share), calls=part.calls * NUM_DECODER_PASSES)

        total_forward += decoding(forward, MEMORY_SHARE[0])
        total_backward += decoding(backward, MEMORY_SHARE[1]) + decoding(again, MEMORY_SHARE[0]) + sums
    words = model.vocab_size * model.embedding_width / tensor
    if layers.start == 0:
        total_forward += Work(bytes=EMBEDDING_PASSES[0] * sizes.width * sizes.hidden, calls=EMBEDDING_CALLS[0])
        total_backward += Work(
            bytes=EMBEDDING_PASSES[1] * sizes.width * sizes.hidden + SUMMED[sizes.width] * words, calls=EMBEDDING_CALLS[1]
        )
    if is_last:
        logits = 4 * sequences * expected_targets(config) * part.network.head_rows / tensor
        read = SUMMED[sizes.width] * words if part.network.head_rows else 0.0
        total_forward += Work(bytes=LOGIT_PASSES[0] * logits, calls=EMBEDDING_CALLS[0])
        total_backward += Work(bytes=LOGIT_PASSES[1] * logits + read, calls=EMBEDDING_CALLS[1])

    products = sum(part.flops.units[layer] for layer in layers) * tokens / tensor
    repeated = _repeated_products(part, layers, has_fused_attention=fused) * tokens / tensor
    return total_forward + Work(products=products), total_backward + Work(products=2 * products + repeated)


def _layer(part: NetworkPlan, sizes: _Sizes, number: int, *, fused: bool) -> Work:
    """Passes and operations of an ordinary layer: ``number`` 0 is forward, 1 backward."""
    model = part.model_config
    tables = [(PASSES, CALLS)]
    if model.hidden_dropout_prob > 0:
        tables.append((HIDDEN_DROPOUT_PASSES, HIDDEN_DROPOUT_CALLS))
    if model.attention_probs_dropout_prob > 0 and not fused:
        tables.append((ATTENTION_DROPOUT_PASSES, ATTENTION_DROPOUT_CALLS))
    moved = sum(sizes.bytes(passes[number], fused=fused) for passes, _ in tables)
    return Work(bytes=moved, calls=sum(calls[number] for _, calls in tables) - fused * PORTABLE_CALLS[number])


def _repeated_products(part: NetworkPlan, layers: range, *, has_fused_attention: bool) -> float:
    """FLOPs per token that the backward pass makes once more: recomputation, and the scores of a fused attention."""
    config, model = part.config, part.model_config
    head = 0.0
    if part.network.head_rows:
        head = config.data.mask_probability * 2 * model.embedding_width * (model.hidden_size + part.network.head_rows)
    is_last = layers.stop == model.num_hidden_layers
    all_heads, terms = model.all_head_size, len(model.pos_att_type)
    positions = terms * 2 * model.num_position_rows * all_heads
    again = 0.0
    if config.training.recompute == "full":
        again = sum(part.flops.units[layer] for layer in layers) - is_last * head
    elif config.training.recompute == "selective" and not has_fused_attention:
        again = len(layers) * (4 * config.data.max_seq_length * all_heads + positions)
    if has_fused_attention:
        again += len(layers) * (2 * config.data.max_seq_length * all_heads + positions)
    return again


def _sizes(part: NetworkPlan) -> _Sizes:
    config, model = part.config, part.model_config
    tensor, length = config.parallel.tensor_parallel_size, config.data.max_seq_length
    tokens, all_heads = config.training.micro_batch_size * length, model.all_head_size
    return _Sizes(
        hidden=tokens * model.hidden_size,
        heads=tokens * all_heads / tensor,
        feed_forward=tokens * model.intermediate_size / tensor,
        table_heads=model.num_position_rows * all_heads / tensor,
        table=model.num_position_rows * model.hidden_size,
        scores=tokens * length * model.num_attention_heads / tensor,
        width=DTYPES[precision(part.deepspeed)].itemsize,
        layer_weights=(4 * model.hidden_size * all_heads + 2 * model.hidden_size * model.intermediate_size) / tensor,
    )
