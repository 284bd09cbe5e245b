"""Triton kernels that see pairs of query and key: dropout bits, forward, backward of the scores.

The products of tokens with the relative table, c2p = Q Kr^T and p2c = K Qr^T, are computed beforehand by matrix products, for
the rows that occur, and read here by pointer at the row of each pair's distance. Holding them in registers and permuting
there spills more than a kilobyte per thread. c2p and p2c come scaled, because unscaled they exceed the range of fp16; scores
are in units of log2, ``scale_log2`` = scale log2(e).

A program's second and third numbers are its head and its sample. Sizes need not be multiples of a tile: addresses are clamped
to the last token, and pairs beyond it count as not seen. No kernel uses atomics, so two runs agree in every bit. ``launch``
starts all of them; they have many parameters because Triton takes pointers, strides and sizes one by one.

Layouts: tokens [B, T, N, H] with the stride of a token given; c2p [N, B, Q, R]; p2c [N, B, S, R]; lse, delta [B, N, Q];
keep_bits uint8 [B, N, Q, ceil(S / 8)], bit j % 8 of byte j // 8 for key j; score gradients [B, N, Q, stride] and,
transposed, [B, N, S, stride].

Letters: B batch, N heads, Q queries, S keys, H head size, R rows of the relative table that occur.
"""

import triton
import triton.language as tl

from deberta_dist.kernels.fused.words import keeps, words_of_row


@triton.jit(do_not_specialize=["seed_low", "seed_high", "threshold", "counted_queries"])
def keep_bits_kernel(
    keep_bits, seed_low, seed_high, threshold, num_heads, num_queries, counted_queries, num_bytes, BLOCK: tl.constexpr
):  # fmt: skip
    """One bit per pair: whether dropout keeps it, by the words of ``kernels.dropout``; no size of a tile enters.

    The words are those of ``counted_queries`` queries per head; queries behind them are padding.
    """
    flat = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch_head = tl.program_id(2).to(tl.int64) * num_heads + tl.program_id(1)
    row = batch_head * counted_queries + flat // num_bytes
    low, high = words_of_row(row, seed_low, seed_high)
    byte = flat * 0
    for bit in tl.static_range(8):
        byte |= keeps(low, high, flat % num_bytes * 8 + bit, threshold).to(tl.int32) << bit
    size = num_queries * num_bytes
    tl.store(keep_bits + batch_head * size + flat, byte.to(tl.uint8), mask=flat < size)


@triton.jit
def gathered(pointer, offsets, mask=None, other=None):
    """Elements at ``offsets`` [I, J]; neighbouring threads of a warp take neighbours in I.

    The compiler cannot see which offsets out of a table lie side by side, and its versions guess differently: without
    the hint, 3.7 to 3.9 let each load of a warp touch eight rows or more. The hint is not true, for rows repeat, but it
    only chooses who reads what: elements share a load where their address is known to be a multiple of its size, and
    none is.
    """
    pointers = pointer + offsets
    return tl.load(tl.max_contiguous(pointers, [32, 1]), mask=mask, other=other)


@triton.jit
def _tile_scores(
    query_tile, key_tile, c2p, p2c, row_of_distance, query_ids, key_ids,
    queries, keys, positions, num_keys, num_rows, scale_log2, inverse_scale,
    HAS_C2P: tl.constexpr, HAS_P2C: tl.constexpr, HAS_IDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [query tile, key tile]; -inf where not seen. Pointers stand at this batch and head; see the callers.

    The position terms are where the product starts from: added to it afterwards, the compiler keeps scores in two
    layouts and makes every exponential twice. Of c2p and of the bits of `_kept` neighbouring keys are neighbours in
    memory, of p2c neighbouring queries: they come first. Offsets are added up in 32 bits before they meet the pointer:
    a pointer per query, kept over the loop, takes two registers of each.
    """
    last = num_keys - 1
    key_at = tl.minimum(keys, last)
    bias = tl.zeros([queries.shape[0], keys.shape[0]], tl.float32)
    if HAS_C2P:
        row = gathered(row_of_distance, (positions + last)[None, :] - key_at[:, None]).to(tl.int32)
        bias += tl.trans(gathered(c2p, (queries * num_rows)[None, :] + row)).to(tl.float32)
    if HAS_P2C:
        row = gathered(row_of_distance, (positions + last)[:, None] - key_at[None, :]).to(tl.int32)
        bias += gathered(p2c, (key_at * num_rows)[None, :] + row).to(tl.float32)
    scores = tl.dot(query_tile, tl.trans(key_tile), bias * inverse_scale, input_precision=PRECISION) * scale_log2
    seen = (keys < num_keys)[None, :]
    if HAS_IDS:
        key_id = tl.load(key_ids + key_at)
        seen = seen & (tl.load(query_ids + queries)[:, None] == key_id[None, :]) & (key_id != 0)[None, :]
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _kept(keep_bits, queries, keys, num_keys):
    """Whether dropout keeps each pair of a tile."""
    key_at = tl.minimum(keys, num_keys - 1)
    num_bytes = (num_keys + 7) // 8
    byte = tl.trans(gathered(keep_bits, (queries * num_bytes)[None, :] + (key_at >> 3)[:, None])).to(tl.int32)
    return ((byte >> (key_at & 7)[None, :]) & 1) != 0


@triton.jit
def _tile_at(tokens, batch, head, at, num_tokens, token_stride, HEAD_SIZE: tl.constexpr):
    """Tokens ``at`` of one batch and head: [len(at), H]."""
    base = tokens + batch.to(tl.int64) * num_tokens * token_stride + head * HEAD_SIZE
    return tl.load(base + (at * token_stride)[:, None] + tl.arange(0, HEAD_SIZE)[None, :])


@triton.jit
def forward_kernel(
    query, key, value, c2p, p2c, row_of_distance, positions, query_ids, key_ids, keep_bits, context, lse,
    query_stride, key_stride, value_stride, batch_size, num_heads, num_queries, num_keys, num_rows,
    scale_log2, inverse_scale, inverse_keep,
    HEAD_SIZE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HAS_C2P: tl.constexpr,
    HAS_P2C: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_IDS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """context = dropout(softmax(scores)) V and lse, the rows' log2-sum-exp2; one program per tile of queries."""
    batch = tl.program_id(2)
    head = tl.program_id(1)
    batch_head = batch.to(tl.int64) * num_heads + head
    head_batch = head.to(tl.int64) * batch_size + batch
    queries_here = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    queries = tl.minimum(queries_here, num_queries - 1)
    position = queries
    if HAS_POSITIONS:
        position = tl.load(positions + batch * num_queries + queries)
    query_tile = _tile_at(query, batch, head, queries, num_queries, query_stride, HEAD_SIZE)
    c2p += head_batch * num_queries * num_rows
    p2c += head_batch * num_keys * num_rows
    query_ids += batch * num_queries
    key_ids += batch * num_keys
    keep_bits += batch_head * num_queries * ((num_keys + 7) // 8)

    # Finite, so that a row that has seen nothing yet gives exp2(-inf - finite) = 0 and not NaN.
    largest = tl.full([BLOCK_Q], -1e30, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    accumulator = tl.zeros([BLOCK_Q, HEAD_SIZE], tl.float32)
    for start in range(0, num_keys, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        key_at = tl.minimum(keys, num_keys - 1)
        key_tile = _tile_at(key, batch, head, key_at, num_keys, key_stride, HEAD_SIZE)
        scores = _tile_scores(
            query_tile, key_tile, c2p, p2c, row_of_distance, query_ids, key_ids,
            queries, keys, position, num_keys, num_rows, scale_log2, inverse_scale,
            HAS_C2P, HAS_P2C, HAS_IDS, PRECISION,
        )  # fmt: skip
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        correction = tl.exp2(largest - new_largest)
        probabilities = tl.exp2(scores - new_largest[:, None])
        total = total * correction + tl.sum(probabilities, 1)
        largest = new_largest
        if HAS_DROPOUT:
            probabilities = tl.where(_kept(keep_bits, queries, keys, num_keys), probabilities, 0.0)
        value_tile = _tile_at(value, batch, head, key_at, num_keys, value_stride, HEAD_SIZE)
        accumulator = accumulator * correction[:, None]
        accumulator += tl.dot(probabilities.to(value_tile.dtype), value_tile, input_precision=PRECISION)

    seen_any = total > 0
    divisor = tl.where(seen_any, total, 1.0)
    accumulator *= (inverse_keep / divisor)[:, None]
    inside = queries_here < num_queries
    at = ((batch.to(tl.int64) * num_queries + queries) * num_heads + head) * HEAD_SIZE
    tl.store(
        context + at[:, None] + tl.arange(0, HEAD_SIZE)[None, :],
        accumulator.to(context.dtype.element_ty),
        mask=inside[:, None],
    )
    row_lse = tl.where(seen_any, largest + tl.log2(divisor), 0.0)
    tl.store(lse + batch_head * num_queries + queries, row_lse, mask=inside)


@triton.jit
def delta_kernel(
    context, context_gradient, delta, num_heads, num_queries, HEAD_SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """delta_i = context_i . its gradient = sum_j P_ij dP_ij, with dropout or without; both inputs [B, Q, N, H]."""
    batch = tl.program_id(2)
    head = tl.program_id(1)
    queries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = queries < num_queries
    at = ((batch.to(tl.int64) * num_queries + queries) * num_heads + head) * HEAD_SIZE
    offsets = at[:, None] + tl.arange(0, HEAD_SIZE)[None, :]
    product = tl.load(context + offsets, mask=inside[:, None], other=0.0).to(tl.float32)
    product *= tl.load(context_gradient + offsets, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(delta + (batch.to(tl.int64) * num_heads + head) * num_queries + queries, tl.sum(product, 1), mask=inside)


@triton.jit
def backward_kernel(
    query, key, value, c2p, p2c, row_of_distance, positions, query_ids, key_ids, keep_bits, context_gradient, lse, delta,
    value_gradient, score_gradient, transposed_gradient,
    query_stride, key_stride, value_stride, value_gradient_stride, score_stride, transposed_stride,
    batch_size, num_heads, num_queries, num_keys, num_rows, scale_log2, inverse_scale, inverse_keep,
    HEAD_SIZE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HAS_C2P: tl.constexpr,
    HAS_P2C: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_IDS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dV = dropout(P)^T dO and dScore = P (dP - delta), before the scale and also transposed; programs own keys."""
    batch = tl.program_id(2)
    head = tl.program_id(1)
    batch_head = batch.to(tl.int64) * num_heads + head
    head_batch = head.to(tl.int64) * batch_size + batch
    keys = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    key_at = tl.minimum(keys, num_keys - 1)
    key_tile = _tile_at(key, batch, head, key_at, num_keys, key_stride, HEAD_SIZE)
    value_tile = _tile_at(value, batch, head, key_at, num_keys, value_stride, HEAD_SIZE)
    c2p += head_batch * num_queries * num_rows
    p2c += head_batch * num_keys * num_rows
    query_ids += batch * num_queries
    key_ids += batch * num_keys
    keep_bits += batch_head * num_queries * ((num_keys + 7) // 8)
    lse += batch_head * num_queries
    delta += batch_head * num_queries
    score_gradient += batch_head * num_queries * score_stride
    transposed_gradient += batch_head * num_keys * transposed_stride

    accumulator = tl.zeros([BLOCK_K, HEAD_SIZE], tl.float32)
    for start in range(0, num_queries, BLOCK_Q):
        queries_here = start + tl.arange(0, BLOCK_Q)
        queries = tl.minimum(queries_here, num_queries - 1)
        inside = queries_here < num_queries
        position = queries
        if HAS_POSITIONS:
            position = tl.load(positions + batch * num_queries + queries)
        query_tile = _tile_at(query, batch, head, queries, num_queries, query_stride, HEAD_SIZE)
        scores = _tile_scores(
            query_tile, key_tile, c2p, p2c, row_of_distance, query_ids, key_ids,
            queries, keys, position, num_keys, num_rows, scale_log2, inverse_scale,
            HAS_C2P, HAS_P2C, HAS_IDS, PRECISION,
        )  # fmt: skip
        probabilities = tl.exp2(scores - tl.load(lse + queries)[:, None])
        probabilities = tl.where(inside[:, None], probabilities, 0.0)
        gradient_tile = _tile_at(context_gradient, batch, head, queries, num_queries, num_heads * HEAD_SIZE, HEAD_SIZE)
        slope = tl.dot(gradient_tile, tl.trans(value_tile), input_precision=PRECISION)
        attended = probabilities
        if HAS_DROPOUT:
            kept = _kept(keep_bits, queries, keys, num_keys)
            slope = tl.where(kept, slope * inverse_keep, 0.0)
            attended = tl.where(kept, probabilities, 0.0)
        accumulator += tl.dot(tl.trans(attended.to(gradient_tile.dtype)), gradient_tile, input_precision=PRECISION)
        slope = probabilities * (slope - tl.load(delta + queries)[:, None])
        slope = slope.to(score_gradient.dtype.element_ty)
        pair_inside = inside[:, None] & (keys < num_keys)[None, :]
        tl.store(score_gradient + (queries * score_stride)[:, None] + keys[None, :], slope, mask=pair_inside)
        tl.store(
            transposed_gradient + (key_at * transposed_stride)[:, None] + queries_here[None, :],
            tl.trans(slope),
            mask=tl.trans(pair_inside),
        )

    value_gradient += batch.to(tl.int64) * num_keys * value_gradient_stride + head * HEAD_SIZE
    tl.store(
        value_gradient + (key_at * value_gradient_stride)[:, None] + tl.arange(0, HEAD_SIZE)[None, :],
        (accumulator * inverse_keep).to(value_gradient.dtype.element_ty),
        mask=(keys < num_keys)[:, None],
    )
