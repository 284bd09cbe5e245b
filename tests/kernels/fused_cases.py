"""Inputs of the fused attention, and what the plain formula makes of them."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from deberta_dist.kernels import AttentionMask, RelativePositions, attention_scale, disentangled_attention
from deberta_dist.kernels.inputs import AttentionCall
from deberta_dist.models.positions import position_row_of_distance

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Case:
    """One call; ``positions`` None means queries 0 .. Q - 1."""

    batch: int = 2
    heads: int = 2
    queries: int = 19
    keys: int = 19
    head_size: int = 32
    buckets: int = 8
    max_distance: int = 16
    c2p: bool = True
    p2c: bool = True
    key_mask: Tensor | None = None
    documents: Tensor | None = None
    positions: Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: int = 0x9E3779B97F4A7C15
    counted_queries: int | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0
    operands: list[Tensor] = field(init=False)
    gradient: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype).to(DEVICE)

        tokens = [normal(self.batch, self.heads, n, self.head_size) for n in (self.queries, self.keys, self.keys)]
        rows = 2 * (self.buckets if self.buckets > 0 else self.max_distance)
        self.operands = tokens + [normal(self.heads, rows, self.head_size) for _ in range(self.c2p + self.p2c)]
        self.gradient = normal(*tokens[0].shape)
        for name in ("key_mask", "documents", "positions"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else torch.as_tensor(value).to(DEVICE))

    def fused(self, operands: list[Tensor] | None = None) -> Tensor:
        from deberta_dist.kernels.fused import fused_attention

        query, key, value, *tables = self.operands if operands is None else operands
        call = AttentionCall(
            scale=attention_scale(self.head_size, has_c2p=self.c2p, has_p2c=self.p2c),
            positions=self.relative_positions(),
            mask=self.mask(),
            dropout_p=self.dropout_p,
            dropout_seed=self.dropout_seed,
            recompute=False,
            counted_queries=self.counted_queries,
        )
        rel_key, rel_query = tables[0] if self.c2p else None, tables[-1] if self.p2c else None
        return fused_attention(query, key, value, rel_key, rel_query, call)

    def formula(self, operands: list[Tensor], *, implementation: str | None = "reference") -> Tensor:
        query, key, value, *tables = operands
        return disentangled_attention(
            query,
            key,
            value,
            positions=self.relative_positions(),
            rel_key_NRH=tables[0] if self.c2p else None,
            rel_query_NRH=tables[-1] if self.p2c else None,
            mask=self.mask(),
            dropout_p=self.dropout_p,
            dropout_seed=self.dropout_seed,
            counted_queries=self.counted_queries,
            implementation=implementation,
        )[0]

    def relative_positions(self) -> RelativePositions:
        rows = torch.tensor(position_row_of_distance(self.buckets, self.max_distance), device=DEVICE)
        return RelativePositions(rows, self.positions)

    def mask(self) -> AttentionMask | None:
        if self.key_mask is None and self.documents is None:
            return None
        segments = torch.ones(self.batch, self.keys, dtype=torch.int64, device=DEVICE)
        segments = segments if self.documents is None else self.documents
        segments = segments if self.key_mask is None else segments * self.key_mask
        if self.positions is not None:
            return AttentionMask(key_segments_BS=segments, query_segments_BQ=segments.gather(1, self.positions))
        if self.queries < self.keys:
            return AttentionMask(key_segments_BS=segments, query_segments_BQ=segments[:, : self.queries])
        return AttentionMask(key_segments_BS=segments)


def values_and_gradients(function, operands: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """The function's value, then its gradient for each operand."""
    leaves = [operand.detach().clone().requires_grad_() for operand in operands]
    value = function(leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves, gradient.to(value.dtype))]


def random_case(seed: int) -> Case:
    """Any shape, terms, masks, positions and dropout."""
    generator = np.random.default_rng(seed)

    def chance() -> bool:
        return bool(generator.random() < 0.5)

    batch, queries, keys = int(generator.integers(1, 4)), int(generator.integers(1, 40)), int(generator.integers(1, 40))
    with_positions, with_mask, with_documents = chance(), chance(), chance()
    if with_mask or with_documents:
        queries = queries if with_positions else min(queries, keys)
    terms = int(generator.integers(1, 4))
    return Case(
        batch=batch,
        heads=int(generator.integers(1, 3)),
        queries=queries,
        keys=keys,
        buckets=int(generator.choice([0, 4, 8])),
        max_distance=int(generator.choice([8, 16, 64])),
        c2p=bool(terms & 1),
        p2c=bool(terms & 2),
        key_mask=torch.from_numpy(generator.random((batch, keys)) < 0.7) if with_mask else None,
        documents=torch.from_numpy(np.sort(generator.integers(0, 4, (batch, keys)))) if with_documents else None,
        positions=torch.from_numpy(generator.integers(0, keys, (batch, queries))) if with_positions else None,
        dropout_p=0.3 if chance() else 0.0,
        dropout_seed=int(generator.integers(0, 2**63)) * 2 + 1,
        seed=seed,
    )
