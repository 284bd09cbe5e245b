"""Triton kernels behind the scores' gradient: sums over what shares a row of the relative table, and dQ, dK.

The row of a distance does not fall as the distance grows, so the pairs of one query (or key) that share a row are
neighbours: the gradient of c2p[i, r] (or p2c[j, r]) is a sum over a range, and needs no atomics.

Owner: the token whose products with the relative table are differentiated, the query of c2p and the key of p2c.
Other: the token on the other side of a pair. Layouts are those of ``kernels``; the scores' gradients come with the
owners first: transposed, where the owners are keys.
"""

import triton
import triton.language as tl


@triton.jit
def _range_of_row(
    owner_position, lowest, highest, order_starts, num_positions, OF_KEYS: tl.constexpr, HAS_POSITIONS: tl.constexpr
):  # fmt: skip
    """Begin and end of the others at distances lowest .. highest; end <= begin if there are none."""
    if OF_KEYS:
        begin, end = owner_position + lowest, owner_position + highest + 1
    else:
        begin, end = owner_position - highest, owner_position - lowest + 1
    begin = tl.minimum(tl.maximum(begin, 0), num_positions)
    end = tl.minimum(tl.maximum(end, 0), num_positions)
    if OF_KEYS and HAS_POSITIONS:
        begin, end = tl.load(order_starts + begin), tl.load(order_starts + end)
    return begin, end


@triton.jit
def _gradients_at(
    score_gradient, owners, others, order, score_stride, inside, OF_KEYS: tl.constexpr, HAS_POSITIONS: tl.constexpr
):  # fmt: skip
    """Score gradients of pairs, float32, 0 outside; ``owners`` and ``others`` broadcast against each other."""
    if OF_KEYS and HAS_POSITIONS:
        others = tl.load(order + others, mask=inside, other=0)
    return tl.load(score_gradient + owners * score_stride + others, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _owners_of_program(num_owners, positions, batch, BLOCK_O: tl.constexpr, HAS_POSITIONS: tl.constexpr):
    """Owners of this program, which of them there are, and their positions."""
    owners_here = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    owners = tl.minimum(owners_here, num_owners - 1)
    position = owners
    if HAS_POSITIONS:
        position = tl.load(positions + batch * num_owners + owners)
    return owners, owners_here < num_owners, position


@triton.jit
def row_sums_kernel(
    score_gradient, sums, lowest_distance, highest_distance, positions, order, order_starts,
    score_stride, batch_size, num_heads, num_queries, num_owners, num_positions, num_rows, first_end, last_end,
    OF_KEYS: tl.constexpr, HAS_POSITIONS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """sums[owner, r] = sum of the score gradients of the owner's pairs whose distance has row r; [N, B, owners, R].

    The rows of a tile walk their ranges in step. Rows ``first_end`` and ``last_end`` are left to `end_sums_kernel`: they
    hold every distance beyond the table's reach, and all rows of their tiles would wait for them.
    """
    batch = tl.program_id(2) // num_heads
    head = tl.program_id(2) % num_heads
    score_gradient += tl.program_id(2).to(tl.int64) * num_owners * score_stride
    sums += (head.to(tl.int64) * batch_size + batch) * num_owners * num_rows
    order += batch * num_queries
    order_starts += batch * (num_positions + 1)
    owners, owner_inside, position = _owners_of_program(
        num_owners, positions, batch, BLOCK_O, HAS_POSITIONS and not OF_KEYS
    )
    rows = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_inside = (rows < num_rows) & (rows != first_end) & (rows != last_end)
    lowest = tl.load(lowest_distance + rows, mask=row_inside, other=0)
    highest = tl.load(highest_distance + rows, mask=row_inside, other=-1)
    # Rows first: neighbouring threads take neighbouring rows, whose pairs are neighbours in memory.
    begin, end = _range_of_row(
        position[None, :], lowest[:, None], highest[:, None], order_starts, num_positions, OF_KEYS, HAS_POSITIONS
    )
    inside = row_inside[:, None] & owner_inside[None, :]
    length = tl.where(inside, end - begin, 0)
    total = tl.zeros([BLOCK_R, BLOCK_O], tl.float32)
    for step in range(0, tl.max(tl.max(length, 1), 0)):
        total += _gradients_at(
            score_gradient, owners[None, :], begin + step, order, score_stride, step < length, OF_KEYS, HAS_POSITIONS
        )
    tl.store(sums + (owners * num_rows)[None, :] + rows[:, None], total.to(sums.dtype.element_ty), mask=inside)


@triton.jit
def end_sums_kernel(
    score_gradient, sums, lowest_distance, highest_distance, positions, order, order_starts,
    score_stride, batch_size, num_heads, num_queries, num_owners, num_positions, num_rows, first_end, last_end,
    OF_KEYS: tl.constexpr, HAS_POSITIONS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The two rows that `row_sums_kernel` leaves, their ranges taken in blocks."""
    batch = tl.program_id(2) // num_heads
    head = tl.program_id(2) % num_heads
    score_gradient += tl.program_id(2).to(tl.int64) * num_owners * score_stride
    sums += (head.to(tl.int64) * batch_size + batch) * num_owners * num_rows
    order += batch * num_queries
    order_starts += batch * (num_positions + 1)
    owners, owner_inside, position = _owners_of_program(
        num_owners, positions, batch, BLOCK_O, HAS_POSITIONS and not OF_KEYS
    )
    row = tl.where(tl.program_id(1) == 0, first_end, last_end)
    begin, end = _range_of_row(
        position, tl.load(lowest_distance + row), tl.load(highest_distance + row),
        order_starts, num_positions, OF_KEYS, HAS_POSITIONS,
    )  # fmt: skip
    length = tl.where(owner_inside, end - begin, 0)
    total = tl.zeros([BLOCK_O], tl.float32)
    for start in range(0, tl.max(length, 0), BLOCK_T):
        step = start + tl.arange(0, BLOCK_T)
        gradients = _gradients_at(
            score_gradient, owners[:, None], begin[:, None] + step[None, :], order, score_stride,
            step[None, :] < length[:, None], OF_KEYS, HAS_POSITIONS,
        )  # fmt: skip
        total += tl.sum(gradients, 1)
    tl.store(sums + owners * num_rows + row, total.to(sums.dtype.element_ty), mask=owner_inside)


@triton.jit
def token_gradient_kernel(
    score_gradient, other, row_sums, table, gradient, score_stride, other_stride, table_head_stride, table_row_stride,
    batch_size, num_heads, num_owners, num_others, num_rows, scale,
    HAS_ROWS: tl.constexpr, HEAD_SIZE: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ = scale (dScore K + sums Kr), or dK = scale (dScore^T Q + sums Qr); one program per tile of owners."""
    batch = tl.program_id(1) // num_heads
    head = tl.program_id(1) % num_heads
    head_channels = tl.arange(0, HEAD_SIZE)
    score_gradient += tl.program_id(1).to(tl.int64) * num_owners * score_stride
    other += batch.to(tl.int64) * num_others * other_stride + head * HEAD_SIZE
    row_sums += (head.to(tl.int64) * batch_size + batch) * num_owners * num_rows
    table += head * table_head_stride
    owners_here = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    owners = tl.minimum(owners_here, num_owners - 1)

    accumulator = tl.zeros([BLOCK_O, HEAD_SIZE], tl.float32)
    for start in range(0, num_others, BLOCK_T):
        others = start + tl.arange(0, BLOCK_T)
        inside = others < num_others
        slopes = tl.load(
            score_gradient + (owners * score_stride)[:, None] + others[None, :], mask=inside[None, :], other=0.0
        )
        tile = tl.load(
            other + (others * other_stride)[:, None] + head_channels[None, :], mask=inside[:, None], other=0.0
        )
        accumulator += tl.dot(slopes, tile, input_precision=PRECISION)
    if HAS_ROWS:
        for start in range(0, num_rows, BLOCK_T):
            rows = start + tl.arange(0, BLOCK_T)
            inside = rows < num_rows
            sums = tl.load(row_sums + (owners * num_rows)[:, None] + rows[None, :], mask=inside[None, :], other=0.0)
            tile = tl.load(
                table + (rows * table_row_stride)[:, None] + head_channels[None, :], mask=inside[:, None], other=0.0
            )
            accumulator += tl.dot(sums, tile, input_precision=PRECISION)

    at = ((batch.to(tl.int64) * num_owners + owners) * num_heads + head) * HEAD_SIZE
    tl.store(
        gradient + at[:, None] + head_channels[None, :],
        (accumulator * scale).to(gradient.dtype.element_ty),
        mask=(owners_here < num_owners)[:, None],
    )
