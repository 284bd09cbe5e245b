"""Triton kernels after the scores' gradient: its sums over rows of the relative table, and dQ, dK.

The row of a distance does not fall as the distance grows, so the pairs of a query (or key) that share a row are neighbours.
The gradient of c2p[i, r] (or p2c[j, r]) is then a sum over a range, which needs no atomics.

Kernels have many parameters: Triton takes pointers, strides and sizes one by one.

Owner: the token whose products with the relative table are differentiated, the query of c2p and the key of p2c.
Other: the token on the other side of a pair. Layouts are those of ``kernels``; the scores' gradients come with the
owners first: transposed, where the owners are keys.
"""

import triton
import triton.language as tl

from deberta_dist.kernels.fused.kernels import gathered


@triton.jit
def _range_of_row(
    owner_position, lowest, highest, order_starts, num_positions, OF_KEYS: tl.constexpr, HAS_POSITIONS: tl.constexpr
):  # fmt: skip
    """Begin and end of the others at distances lowest .. highest, [I, J]; end <= begin if there are none."""
    if OF_KEYS:
        begin, end = owner_position + lowest, owner_position + highest + 1
    else:
        begin, end = owner_position - highest, owner_position - lowest + 1
    begin = tl.minimum(tl.maximum(begin, 0), num_positions)
    end = tl.minimum(tl.maximum(end, 0), num_positions)
    if OF_KEYS and HAS_POSITIONS:
        begin, end = gathered(order_starts, begin), gathered(order_starts, end)
    return begin, end


@triton.jit
def _gradients_at(
    score_gradient, owners, others, order, score_stride, inside, OF_KEYS: tl.constexpr, HAS_POSITIONS: tl.constexpr
):  # fmt: skip
    """Score gradients of pairs [I, J], float32, 0 outside; neighbours in I are others of one owner."""
    if OF_KEYS and HAS_POSITIONS:
        others = gathered(order, others, inside, 0)
    return gathered(score_gradient, owners * score_stride + others, inside, 0.0).to(tl.float32)


@triton.jit
def _sums_of_rows(
    score_gradient, rows, row_inside, owners, owner_inside, position, lowest_distance, highest_distance, order,
    order_starts, score_stride, num_positions, OF_KEYS: tl.constexpr, HAS_POSITIONS: tl.constexpr,
):  # fmt: skip
    """Of a tile of rows and owners, [rows, owners]; the rows walk their ranges in step."""
    lowest = tl.load(lowest_distance + rows, mask=row_inside, other=0)[:, None]
    highest = tl.load(highest_distance + rows, mask=row_inside, other=-1)[:, None]
    begin, end = _range_of_row(position[None, :], lowest, highest, order_starts, num_positions, OF_KEYS, HAS_POSITIONS)
    length = tl.where(row_inside[:, None] & owner_inside[None, :], end - begin, 0)
    total = tl.zeros([rows.shape[0], owners.shape[0]], tl.float32)
    for step in range(tl.max(tl.max(length, 1), 0)):
        total += _gradients_at(
            score_gradient, owners[None, :], begin + step, order, score_stride, step < length, OF_KEYS, HAS_POSITIONS
        )
    return total


@triton.jit
def _sums_of_one_row(
    score_gradient, row, owners, owner_inside, position, lowest_distance, highest_distance, order,
    order_starts, score_stride, num_positions, OF_KEYS: tl.constexpr, HAS_POSITIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one row, [owners]; BLOCK pairs of its ranges at a time."""
    lowest, highest = tl.load(lowest_distance + row), tl.load(highest_distance + row)
    begin, end = _range_of_row(position[None, :], lowest, highest, order_starts, num_positions, OF_KEYS, HAS_POSITIONS)
    length = tl.where(owner_inside[None, :], end - begin, 0)
    total = tl.zeros([BLOCK, owners.shape[0]], tl.float32)
    for start in range(0, tl.max(length), BLOCK):
        step = start + tl.arange(0, BLOCK)[:, None]
        total += _gradients_at(
            score_gradient, owners[None, :], begin + step, order, score_stride, step < length, OF_KEYS, HAS_POSITIONS
        )
    return tl.sum(total, 0)


@triton.jit
def row_sums_kernel(
    score_gradient, sums, lowest_distance, highest_distance, positions, order, order_starts,
    score_stride, batch_size, num_heads, num_queries, num_owners, num_positions, num_rows, first_end, last_end,
    OF_KEYS: tl.constexpr, HAS_POSITIONS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """sums[owner, r] = sum of the score gradients of the owner's pairs whose distance has row r; [N, B, owners, R].

    The first two programs of a tile of owners take one row each, ``first_end`` and ``last_end``: they hold every
    distance beyond the table's reach, and all rows of their tiles would wait for them.
    """
    batch = tl.program_id(2)
    head = tl.program_id(1)
    num_tiles = tl.cdiv(num_owners, BLOCK_O)
    tile = tl.program_id(0) % num_tiles
    tile_of_rows = tl.program_id(0) // num_tiles
    score_gradient += (batch.to(tl.int64) * num_heads + head) * num_owners * score_stride
    sums += (head.to(tl.int64) * batch_size + batch) * num_owners * num_rows
    order += batch * num_queries
    order_starts += batch * (num_positions + 1)
    owners_here = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    owners = tl.minimum(owners_here, num_owners - 1)
    owner_inside = owners_here < num_owners
    position = owners
    if HAS_POSITIONS and not OF_KEYS:
        position = tl.load(positions + batch * num_owners + owners)
    if tile_of_rows < 2:
        row = tl.where(tile_of_rows == 0, first_end, last_end)
        total = _sums_of_one_row(
            score_gradient, row, owners, owner_inside, position, lowest_distance, highest_distance, order,
            order_starts, score_stride, num_positions, OF_KEYS, HAS_POSITIONS, BLOCK_R,
        )  # fmt: skip
        tl.store(sums + owners * num_rows + row, total.to(sums.dtype.element_ty), mask=owner_inside)
    else:
        rows = (tile_of_rows - 2) * BLOCK_R + tl.arange(0, BLOCK_R)
        row_inside = (rows < num_rows) & (rows != first_end) & (rows != last_end)
        totals = _sums_of_rows(
            score_gradient, rows, row_inside, owners, owner_inside, position, lowest_distance, highest_distance, order,
            order_starts, score_stride, num_positions, OF_KEYS, HAS_POSITIONS,
        )  # fmt: skip
        # Owners first, so that the store's eight rows per thread are not forced upon the loads above.
        tl.store(
            sums + (owners * num_rows)[:, None] + rows[None, :],
            tl.trans(totals.to(sums.dtype.element_ty)),
            mask=owner_inside[:, None] & row_inside[None, :],
        )


@triton.jit
def token_gradient_kernel(
    score_gradient, other, row_sums, table, gradient,
    score_stride, other_stride, gradient_stride, table_head_stride, table_row_stride,
    batch_size, num_heads, num_owners, num_others, num_rows, scale,
    HAS_ROWS: tl.constexpr, HEAD_SIZE: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ = scale (dScore K + sums Kr), or dK = scale (dScore^T Q + sums Qr); one program per tile of owners."""
    batch = tl.program_id(2)
    head = tl.program_id(1)
    head_channels = tl.arange(0, HEAD_SIZE)
    score_gradient += (batch.to(tl.int64) * num_heads + head) * num_owners * score_stride
    other += batch.to(tl.int64) * num_others * other_stride + head * HEAD_SIZE
    row_sums += (head.to(tl.int64) * batch_size + batch) * num_owners * num_rows
    table += head * table_head_stride
    owners_here = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    owners = tl.minimum(owners_here, num_owners - 1)

    accumulator = tl.zeros([BLOCK_O, HEAD_SIZE], tl.float32)
    for start in range(0, num_others, BLOCK_T):
        others = start + tl.arange(0, BLOCK_T)
        inside = others < num_others
        slopes = tl.load(score_gradient + (owners * score_stride)[:, None] + others[None, :], mask=inside[None, :], other=0.0)
        tile = tl.load(other + (others * other_stride)[:, None] + head_channels[None, :], mask=inside[:, None], other=0.0)
        accumulator += tl.dot(slopes, tile, input_precision=PRECISION)
    if HAS_ROWS:
        for start in range(0, num_rows, BLOCK_T):
            rows = start + tl.arange(0, BLOCK_T)
            inside = rows < num_rows
            sums = tl.load(row_sums + (owners * num_rows)[:, None] + rows[None, :], mask=inside[None, :], other=0.0)
            tile = tl.load(table + (rows * table_row_stride)[:, None] + head_channels[None, :], mask=inside[:, None], other=0.0)
            accumulator += tl.dot(sums, tile, input_precision=PRECISION)

    gradient += batch.to(tl.int64) * num_owners * gradient_stride + head * HEAD_SIZE
    tl.store(
        gradient + (owners * gradient_stride)[:, None] + head_channels[None, :],
        (accumulator * scale).to(gradient.dtype.element_ty),
        mask=(owners_here < num_owners)[:, None],
    )
