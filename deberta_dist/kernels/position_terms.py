"""One position term of the scores, forward and backward, for a chunk of heads and samples.

A term is the product of the tokens of one side with the relative table: queries for c2p, keys for p2c. Score [i, j] gets the
product with the row of distance i - j, so c2p and p2c are the same with the two sides swapped:

    c2p: term[x, y] = scale q_x . Kr[row(x - y)]    p2c: term[x, y] = scale k_x . Qr[row(y - x)], added to score [y, x]

`BandTerm`: where both sides are 0, 1, 2, ... the table is laid out by distance, and a block of b tokens needs a window of
Y + b - 1 of its rows. In the product [b, Y + b - 1] the wanted elements form a diagonal band, which is a view whose stride is
one less than the row's. So no element is gathered by index, and the backward pass writes the same band into a block of zeros.
`GatherTerm`: for queries at any positions, products with all rows of the table, gathered by index.

Letters: C heads of the chunk, B its samples, X tokens of this side, Y of the other, H head size, R table rows,
L distances.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from deberta_dist.kernels.inputs import AttentionCall, as_factor, product_into, score_dtype

MIN_BLOCKED_TRANSPOSITION = 3600


class Chunk(NamedTuple):
    """Heads and samples of one pass through the caches."""

    heads: slice
    samples: slice


class PositionTerm(Protocol):
    """The interface of `BandTerm` and `GatherTerm`."""

    def add(self, content_CBXH: Tensor, scores_CBQS: Tensor, chunk: Chunk, *, is_first: bool) -> None:
        """Adds the term to the scores; writes it if it is the first."""

    def backward(self, content_CBXH: Tensor, gradient_CBQS: Tensor, chunk: Chunk, *, into_CBXH: Tensor) -> None:
        """Adds the tokens' gradient to ``into_CBXH``, unless products were given, and the operand's to its sum over chunks."""

    def operand_gradient(self) -> Tensor:
        """Gradient of the table [N, R, H], or of the given products [B, N, X, R], summed over the chunks so far."""


class BandTerm:
    """The term where queries and keys are at positions 0, 1, 2, ...: needs no index.

    Args:
        table_NRH: projected table of all heads, as a factor.
        rows_L: its row for each of the X + Y - 1 distances, in the order in which y ascends; int64.
        scale: factor on the products, that of all scores.
        transposed: scores are [y, x] (p2c).
        block: tokens of a block, b.
    """

    def __init__(self, table_NRH: Tensor, *, rows_L: Tensor, scale: float, transposed: bool, block: int) -> None:
        self._rows_L = rows_L
        self._scale = scale
        self._table_NLH = table_NRH.index_select(1, rows_L)
        self._gradient_NLH: Tensor | None = None
        self._table_shape = table_NRH.shape
        self._transposed = transposed
        self._block = block
        self._zeros: dict[tuple[int, ...], Tensor] = {}

    def add(self, content_CBXH: Tensor, scores_CBQS: Tensor, chunk: Chunk, *, is_first: bool) -> None:
        """See `PositionTerm`."""
        scores = scores_CBQS.transpose(2, 3) if self._transposed else scores_CBQS
        workspace = None
        for tokens, rows, window in self._blocks(self._cut(content_CBXH), shape=scores.shape):
            shape = (*rows.shape[:2], window.stop - window.start)
            if workspace is None:
                workspace = scores.new_empty(shape).view(-1)
            products = workspace[: shape[0] * shape[1] * shape[2]].view(shape)
            product_into(products, rows, self._table_NLH[chunk.heads, window].transpose(1, 2), scale=self._scale)
            target = scores[:, :, tokens]
            band = _band(products, target.shape)
            target.copy_(band) if is_first else target.add_(band)

    def backward(self, content_CBXH: Tensor, gradient_CBQS: Tensor, chunk: Chunk, *, into_CBXH: Tensor) -> None:
        """See `PositionTerm`."""
        if self._gradient_NLH is None:
            self._gradient_NLH = torch.zeros_like(self._table_NLH, dtype=score_dtype(self._table_NLH))
        gradient = _transposed_copy(gradient_CBQS) if self._transposed else gradient_CBQS
        cut = self._cut(content_CBXH)
        d_cut = [torch.empty_like(rows, dtype=score_dtype(rows)) for rows in cut]
        blocks = self._blocks(cut, shape=gradient.shape)
        for (tokens, rows, window), d_rows in zip(blocks, (block for group in d_cut for block in group), strict=True):
            shape = (*rows.shape[:2], window.stop - window.start)
            # The band covers the same elements in every block, so the zeros beside it need no second filling.
            if shape not in self._zeros:
                self._zeros[shape] = rows.new_zeros(shape)
            products = self._zeros[shape]
            source = gradient[:, :, tokens]
            _band(products, source.shape).copy_(source)
            product_into(d_rows, products, self._table_NLH[chunk.heads, window], scale=self._scale)
            target = self._gradient_NLH[chunk.heads, window]
            product_into(target, products.transpose(1, 2), rows, scale=self._scale, adds=True)
        self._add_cut(d_cut, into_CBXH)

    def operand_gradient(self) -> Tensor:
        """See `PositionTerm`."""
        assert self._gradient_NLH is not None, "backward comes before"
        gradient = self._gradient_NLH.new_zeros(self._table_shape)
        return gradient.index_add_(1, self._rows_L, self._gradient_NLH)

    def _cut(self, content_CBXH: Tensor) -> list[Tensor]:
        """Tokens by blocks, [blocks, C, B * b, H]: the whole blocks, then a shorter one if tokens are left."""
        num_rows = content_CBXH.shape[2]
        whole = num_rows - num_rows % self._block
        groups = ((content_CBXH[:, :, :whole], self._block), (content_CBXH[:, :, whole:], num_rows - whole))
        return [
            group.unflatten(2, (-1, size)).permute(2, 0, 1, 3, 4).flatten(2, 3) for group, size in groups if group.shape[2] > 0
        ]

    def _add_cut(self, cut: list[Tensor], target_CBXH: Tensor) -> None:
        """Adds blocks laid out as by `_cut`."""
        start = 0
        for group in cut:
            rows = group.unflatten(2, (target_CBXH.shape[1], -1)).permute(1, 2, 0, 3, 4)
            stop = start + rows.shape[2] * rows.shape[3]
            target_CBXH[:, :, start:stop].unflatten(2, rows.shape[2:4]).add_(rows)
            start = stop

    def _blocks(self, cut: list[Tensor], *, shape: torch.Size) -> Iterator[tuple[slice, Tensor, slice]]:
        """Per block: its tokens as a slice, their content [C, B * b, H], and its window of the table."""
        _, _, num_rows, num_columns = shape
        starts = range(0, num_rows, self._block)
        for start, rows in zip(starts, (block for group in cut for block in group), strict=True):
            stop = min(start + self._block, num_rows)
            yield slice(start, stop), rows, slice(num_rows - stop, num_rows - start + num_columns - 1)


class GatherTerm:
    """The term for queries at any positions.

    Args:
        table_NRH: projected table of all heads, as a factor; None if products are given.
        products_BNXR: scaled products of all tokens with it, if the caller has computed them.
        index_BXY: row of the table for every pair, int64.
        transposed: scores are [y, x] (p2c).
    """

    def __init__(
        self,
        table_NRH: Tensor | None,
        *,
        products_BNXR: Tensor | None = None,
        index_BXY: Tensor,
        scale: float,
        transposed: bool,
    ) -> None:
        self._table_NRH = table_NRH
        self._products_BNXR = products_BNXR
        self._scale = scale
        self._gradient: Tensor | None = None
        self._index_BXY = index_BXY
        self._transposed = transposed

    @property
    def _operand(self) -> Tensor:
        operand = self._products_BNXR if self._table_NRH is None else self._table_NRH
        assert operand is not None, "one of the two is given"
        return operand

    def add(self, content_CBXH: Tensor, scores_CBQS: Tensor, chunk: Chunk, *, is_first: bool) -> None:
        """See `PositionTerm`."""
        if self._table_NRH is None:
            products = self._operand[chunk.samples, chunk.heads].transpose(0, 1)
        else:
            table = self._table_NRH[chunk.heads].transpose(1, 2)
            products = scores_CBQS.new_empty(*content_CBXH.shape[:3], table.shape[2])
            product_into(products.flatten(1, 2), content_CBXH.flatten(1, 2), table, scale=self._scale)
        term = products.gather(-1, self._index(chunk, num_heads=products.shape[0]))
        term = term.transpose(2, 3) if self._transposed else term
        scores_CBQS.copy_(term) if is_first else scores_CBQS.add_(term)

    def backward(self, content_CBXH: Tensor, gradient_CBQS: Tensor, chunk: Chunk, *, into_CBXH: Tensor) -> None:
        """See `PositionTerm`."""
        operand = self._operand
        if self._gradient is None:
            self._gradient = torch.zeros_like(operand, dtype=score_dtype(operand))
        gradient = _transposed_copy(gradient_CBQS) if self._transposed else gradient_CBQS
        index = self._index(chunk, num_heads=gradient.shape[0])
        if self._table_NRH is None:
            self._gradient[chunk.samples, chunk.heads].transpose(0, 1).scatter_add_(-1, index, gradient)
            return
        products = gradient.new_zeros(*gradient.shape[:3], operand.shape[1])
        products = products.scatter_add_(-1, index, gradient).flatten(1, 2)
        target = self._gradient[chunk.heads]
        product_into(target, products.transpose(1, 2), content_CBXH.flatten(1, 2), scale=self._scale, adds=True)
        d_rows = gradient.new_empty(content_CBXH.shape)
        product_into(d_rows.flatten(1, 2), products, operand[chunk.heads], scale=self._scale)
        into_CBXH.add_(d_rows)

    def operand_gradient(self) -> Tensor:
        """See `PositionTerm`."""
        assert self._gradient is not None, "backward comes before"
        return self._gradient

    def _index(self, chunk: Chunk, *, num_heads: int) -> Tensor:
        return self._index_BXY[chunk.samples].expand(num_heads, -1, -1, -1)


def position_terms(
    rel_key_NRH: Tensor | None,
    rel_query_NRH: Tensor | None,
    p2c_BNSR: Tensor | None,
    call: AttentionCall,
    *,
    batch: int,
    lengths: tuple[int, int],
    block: int,
) -> tuple[PositionTerm | None, PositionTerm | None]:
    """The terms (c2p, p2c) of a call, None for an absent one; ``lengths`` are (Q, S)."""
    num_queries, num_keys = lengths
    positions, scale = call.positions, call.scale
    rel_key, rel_query = (None if table is None else as_factor(table) for table in (rel_key_NRH, rel_query_NRH))
    if positions.query_positions_BQ is None and p2c_BNSR is None:
        distances = torch.arange(1 - num_keys, num_queries, device=positions.row_of_distance.device)
        rows = positions.rows(distances)
        band = functools.partial(BandTerm, scale=scale, block=block)
        return (
            None if rel_key is None else band(rel_key, rows_L=rows.flip(0), transposed=False),
            None if rel_query is None else band(rel_query, rows_L=rows, transposed=True),
        )
    index = positions.index(num_queries, num_keys).expand(batch, num_queries, num_keys)
    c2p = None if rel_key is None else GatherTerm(rel_key, index_BXY=index, scale=scale, transposed=False)
    if rel_query is None and p2c_BNSR is None:
        return c2p, None
    index = index.transpose(1, 2)
    return c2p, GatherTerm(rel_query, products_BNXR=p2c_BNSR, index_BXY=index, scale=scale, transposed=True)


def _band(products: Tensor, shape: torch.Size) -> Tensor:
    """Element (x, b - 1 - x + y) of every block of b rows: a view [C, B, b, Y] of [C, B * b, Y + b - 1]."""
    block, width = shape[2], products.shape[2]
    strides = (shape[1] * block * width, block * width, width - 1, 1)
    return products.as_strided(shape, strides, products.storage_offset() + block - 1)


def _transposed_copy(x_CBQS: Tensor) -> Tensor:
    """The last two dimensions exchanged, contiguous."""
    result = torch.empty_like(x_CBQS.transpose(2, 3), memory_format=torch.contiguous_format)
    # torch's CPU kernel transposes a single large matrix in blocks that fit the cache, but a batch element by element.
    if x_CBQS.device.type == "cpu" and x_CBQS.shape[2] * x_CBQS.shape[3] >= MIN_BLOCKED_TRANSPOSITION:
        for target, source in zip(result.flatten(0, 1), x_CBQS.flatten(0, 1), strict=True):
            target.copy_(source.t())
        return result
    return result.copy_(x_CBQS.transpose(2, 3))
